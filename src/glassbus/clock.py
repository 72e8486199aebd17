"""Time as a port, so that tests own it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Sleeper(Protocol):
    """A thread that waits for time to pass or for work, and that a virtual clock must carry along.

    It may also have `due() -> float | None`: the monotonic time at which it next wants to
    be poked, None while it waits for work alone. Without it, virtual time passes in small steps.
    """

    def quiesce(self) -> None:
        """Block until the thread has done all the work it was given and waits."""

    def poke(self) -> None:
        """Tell the thread that time has moved."""


class Clock(Protocol):
    """Two times, in seconds, and the threads that wait on them.

    `wall` can jump and is for what people mean (`delay`, `expires_in`, timestamps);
    `monotonic` never goes back and is the same in every process of one boot.
    """

    def monotonic(self) -> float: ...
    def wall(self) -> float: ...
    def attach(self, sleeper: Sleeper, /) -> None: ...
    def detach(self, sleeper: Sleeper, /) -> None: ...
    def real(self, seconds: float, /) -> float | None:
        """How long a thread may really sleep to pass `seconds`; None: until poked."""

    def on_thread(self, job: Callable[[], None], /) -> Callable[[], None]:
        """`job` as it is to be run on another thread, once: a virtual clock stands still until it returns."""


class SystemClock:
    """The operating system's clocks."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    def attach(self, sleeper: Sleeper, /) -> None:
        """Real time needs nobody's help."""

    def detach(self, sleeper: Sleeper, /) -> None:
        """Real time needs nobody's help."""

    def real(self, seconds: float, /) -> float | None:
        return seconds

    def on_thread(self, job: Callable[[], None], /) -> Callable[[], None]:
        return job


def default_clock() -> Clock:
    """The clock of the running loop where it has one (`glassbus.testing.run_virtual`), else the system's."""
    try:
        found: Clock | None = getattr(asyncio.get_running_loop(), "glassbus_clock", None)
    except RuntimeError:  # no loop runs here
        found = None
    return found if found is not None else SystemClock()
