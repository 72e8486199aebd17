"""How the NATS thread is given work, and how a clock that a test moves waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable

from glassbus.clock import Clock
from glassbus.transport.nats.requests import Request


class Mailbox:
    """The inbox of an event loop on a thread of its own. A clock's `Sleeper`.

    `put`, `wake`, `poke`, `quiesce`, `due`, `begin` and `end` may be called from any thread; `items`, `sleep`
    and `idle` belong to the reader.
    """

    def __init__(self, clock: Clock) -> None:
        self.items: deque[Request] = deque()
        self.closed = False
        self._clock = clock
        self._condition = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._awake: asyncio.Event
        self._poked = False
        self._idle = False
        self._outstanding = 0
        self._due: float | None = None
        #: Asks that all that others have written be read; for clocks that tests move.
        self.ask_barrier: Callable[[], bool] = lambda: False

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """On the reader's thread, before anything else."""
        self._awake = asyncio.Event()
        self._loop = loop

    def put(self, request: Request) -> None:
        """Add `request`; `wake` makes the reader look. Does not block."""
        self.items.append(request)

    def wake(self) -> None:
        """Wake the reader. Does not block."""
        loop = self._loop
        if loop is None or self.closed:
            return
        try:
            loop.call_soon_threadsafe(self._awake.set)
        except RuntimeError:  # it has just ended
            return

    def stir(self) -> None:
        """Wake the reader, from its own thread."""
        self._awake.set()

    async def sleep(self, seconds: float, due: float | None, *, idle: bool) -> None:
        """Wait until something is put, the clock is moved, or `seconds` have passed.

        `due` is the monotonic time at which a clock that tests move must poke us. `idle`: nothing is under way
        that will end by itself.
        """
        self._due = due
        real_s = self._clock.real(seconds)
        with self._condition:
            self._idle = idle
            self._poked = False
            self._condition.notify_all()
        if not self.items:
            if real_s is None or real_s == float("inf"):
                await self._awake.wait()
            else:
                timer = asyncio.get_running_loop().call_later(real_s, self._awake.set)
                try:
                    await self._awake.wait()
                finally:
                    timer.cancel()
        self._awake.clear()
        with self._condition:
            self._idle = False

    def begin(self) -> None:
        """Something is under way that time must wait for."""
        with self._condition:
            self._outstanding += 1

    def end(self) -> None:
        with self._condition:
            self._outstanding -= 1
            self._condition.notify_all()

    def close(self) -> None:
        """The reader is gone: nobody shall wait for it."""
        with self._condition:
            self.closed = True
            self._due = None
            self._condition.notify_all()

    # A clock's sleeper

    def quiesce(self) -> None:
        self._settle()
        if not self.closed and self.ask_barrier():
            self._settle()

    def _settle(self) -> None:
        with self._condition:
            self._condition.wait_for(self._at_rest)

    def _at_rest(self) -> bool:
        return self.closed or (self._idle and not self.items and not self._poked and not self._outstanding)

    def poke(self) -> None:
        with self._condition:
            self._poked = True
        self.wake()

    def due(self) -> float | None:
        return self._due
