"""Clocks that tests move."""

from __future__ import annotations

import threading
from collections.abc import Callable

from glassbus.testing.loop import VirtualTimeLoop, Wait
from glassbus.testing.sleepers import Sleepers

#: Wall time at which fake and virtual clocks start, in seconds.
EPOCH = 1_700_000_000.0


class FakeClock:
    """A `Clock` that stands still until the test moves it. May be used from any thread."""

    def __init__(self, *, wall: float = EPOCH, monotonic: float = 1000.0) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._sleepers = Sleepers()
        self.attach = self._sleepers.attach
        self.detach = self._sleepers.detach

    def monotonic(self) -> float:
        return self._monotonic

    def wall(self) -> float:
        return self._wall

    def real(self, seconds: float, /) -> float | None:
        return None

    def on_thread(self, job: Callable[[], None], /) -> Callable[[], None]:
        return job

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass on both clocks.

        Attached sleepers are woken at the times they are due, and have done their work on return.
        """
        if seconds < 0:
            raise ValueError("time only moves forward; use jump() to set the wall clock back")
        self._sleepers.quiesce()
        end = self._monotonic + seconds
        while self._monotonic < end:
            due = self._sleepers.due(self._monotonic)
            # A sleeper due now was woken already: without this it would hold time still.
            to = end if due is None or due <= self._monotonic else min(due, end)
            self._wall += to - self._monotonic
            self._monotonic = to
            self._sleepers.poke()

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back by `seconds`, as an operator or NTP does."""
        self._wall += seconds
        self._sleepers.poke()


class VirtualClock:
    """A `Clock` over a `VirtualTimeLoop`. May be read on any thread."""

    def __init__(self, loop: VirtualTimeLoop, *, wall: float = EPOCH) -> None:
        self._loop = loop
        self._offset = wall - loop.time()
        self.monotonic = loop.time
        loop.glassbus_clock = self  # buses made while it runs take it
        self.on_thread = loop.on_thread
        self.attach = loop.sleepers.attach
        self.detach = loop.sleepers.detach

    def wall(self) -> float:
        return self._loop.time() + self._offset

    def real(self, seconds: float, /) -> float | None:
        return None

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back by `seconds`. On the loop's thread."""
        self._offset += seconds
        self._loop.sleepers.poke()

    def sleep(self, seconds: float) -> None:
        """Block this thread for virtual `seconds`: what `time.sleep` is in a plain handler. Not on the loop."""
        self._loop.wait_in_thread(Wait(), self._loop.time() + max(0.0, seconds))

    def gate(self) -> Gate:
        return Gate(self._loop)


class Gate:
    """Holds plain handlers on their threads until the test opens it. Virtual time moves meanwhile."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._waiting: list[Wait] = []
        self._open = False

    def wait(self) -> None:
        """Block this thread until `open`. Not on the loop."""
        wait = Wait()
        with self._lock:
            if self._open:
                return
            self._waiting.append(wait)
        self._loop.wait_in_thread(wait, None)

    def open(self) -> None:
        """Let every thread through, now and from now on."""
        with self._lock:
            self._open = True
            waiting, self._waiting = self._waiting, []
        for wait in waiting:
            self._loop.release(wait)
