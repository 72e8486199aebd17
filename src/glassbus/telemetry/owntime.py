"""What telemetry takes of the program's own threads, from a sample: to read a CPU clock costs as much as a fact."""

from __future__ import annotations

import time
from collections.abc import Callable

#: One in so many is timed. A prime, so that no pattern of facts, scopes and headers keeps step with it.
STRIDE = 17
#: The first ones are all timed, so that few are told of too.
_FIRST = 17
_UNUSUAL = 30


class OwnTime:
    """CPU seconds of whatever runs between `begin` and `end` on one thread. Never raises.

    One that takes many times as long as is usual met the garbage collector, most likely, and stands for no other.
    Threads that do so at the same time may now and then lose the count of one another.
    """

    __slots__ = ("_clock", "_clock_s", "_left", "_stride", "_timed", "_usual_s", "seconds")

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.seconds = 0.0
        self._clock = clock
        self._clock_s = -1.0  # what a reading takes itself, once it is known
        self._left = self._stride = 1
        self._timed = 0
        self._usual_s = 0.0

    def begin(self) -> float:
        """To be given to `end`, on the same thread; 0.0: this one is not timed."""
        self._left -= 1
        if self._left > 0:
            return 0.0
        self._left = self._stride
        if self._clock_s < 0.0:
            self._clock_s = min(-(self._clock() - self._clock()) for _ in range(9))
        return self._clock()

    def end(self, began: float, around_s: float = 0.0) -> None:
        """`around_s`: what it takes beyond that, where no clock is read."""
        if not began:
            return
        took_s = max(0.0, self._clock() - began - self._clock_s) + around_s
        self._timed += 1
        if self._timed <= _FIRST:
            self.seconds += took_s
            self._usual_s = self.seconds / self._timed
            if self._timed == _FIRST:
                self._stride = self._left = STRIDE
        elif took_s > _UNUSUAL * self._usual_s:
            self.seconds += took_s
        else:
            self.seconds += took_s * STRIDE
            self._usual_s += (took_s - self._usual_s) / _FIRST
