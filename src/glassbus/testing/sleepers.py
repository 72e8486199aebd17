"""The threads that wait on a clock that a test moves."""

from __future__ import annotations

from collections.abc import Callable

from glassbus.clock import Sleeper

#: How far time moves at once past a sleeper that does not say when it is due, in seconds.
STEP_S = 0.05


class Sleepers:
    """The threads that wait on a clock that tests move."""

    def __init__(self) -> None:
        self._all: tuple[Sleeper, ...] = ()

    def attach(self, sleeper: Sleeper, /) -> None:
        self._all = (*self._all, sleeper)

    def detach(self, sleeper: Sleeper, /) -> None:
        self._all = tuple(s for s in self._all if s is not sleeper)

    def __bool__(self) -> bool:
        return bool(self._all)

    def quiesce(self) -> None:
        for sleeper in self._all:
            sleeper.quiesce()

    def poke(self) -> None:
        for sleeper in self._all:
            sleeper.poke()
        self.quiesce()

    def due(self, now: float) -> float | None:
        """Monotonic time to move to at most, for their sake. None: none of them waits for time."""
        times = []
        for sleeper in self._all:
            ask: Callable[[], float | None] | None = getattr(sleeper, "due", None)
            at = now + STEP_S if ask is None else ask()
            if at is not None:
                times.append(max(at, now))
        return min(times, default=None)

    @property
    def silent(self) -> bool:
        """Whether one of them does not say when it is due."""
        return any(not hasattr(sleeper, "due") for sleeper in self._all)
