"""How the writer thread is given work, and how it waits: for work, for time, or for a clock that a test moves."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from glassbus.clock import Clock
from glassbus.transport.sqlite.requests import Request


class Mailbox:
    """An inbox that its one reader can sleep on. A clock's `Sleeper`.

    `put`, `wake`, `poke`, `quiesce` and `due` may be called from any thread; `items` and `sleep`
    belong to the reader.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._condition = threading.Condition()
        self._asleep = False
        self._poked = False
        self._due: float | None = None
        self.items: deque[Request] = deque()
        self.closed = False

    def put(self, request: Request) -> None:
        """Add `request`; the reader takes it when it next looks. `wake` makes it look."""
        self.items.append(request)

    def wake(self) -> None:
        """Wake the reader if it sleeps. Does not block."""
        # The reader says that it sleeps before it looks at the items for the last time, so
        # either it sees what was put before or we see that it sleeps.
        if self._asleep:
            with self._condition:
                self._condition.notify_all()

    def sleep(self, seconds: float, due: float | None) -> None:
        """Wait until something is put, the clock is moved, or `seconds` have passed.

        `due` is the monotonic time at which a clock that tests move must poke us.
        """
        self._due = due
        with self._condition:
            self._asleep = True
            if not self.items and not self._poked:
                self._condition.notify_all()
                self._condition.wait(self._clock.real(seconds))
            self._asleep = self._poked = False

    def close(self) -> None:
        """The reader is gone: nobody shall wait for it."""
        with self._condition:
            self.closed = True
            self._due = None
            self._condition.notify_all()

    def quiesce(self) -> None:
        idle: Callable[[], bool] = lambda: self.closed or (self._asleep and not self.items and not self._poked)  # noqa: E731
        with self._condition:
            self._condition.wait_for(idle)

    def poke(self) -> None:
        with self._condition:
            self._poked = True
            self._condition.notify_all()

    def due(self) -> float | None:
        return self._due
