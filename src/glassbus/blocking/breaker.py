"""CircuitBreaker: refuses calls to what keeps failing, for plain functions on any thread."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from glassbus.clock import Clock, SystemClock
from glassbus.errors import BreakerOpen, ConfigurationError, shown, type_name
from glassbus.policy.breaker import Breaker, BreakerState, ConsecutiveFailures, Transition

Result = TypeVar("Result")

#: Told of each move, after it was made and outside any lock.
OnTransition = Callable[[Transition[str]], None]

#: These end a call without saying whether what it called works.
_CONTROL_FLOW = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, BreakerOpen)


class CircuitBreaker:
    """Opens after `failure_threshold` failures in a row; `recovery_timeout` seconds later it lets one call probe.

    Any thread may call. The breaker is never locked while a call runs, so calls run side by side
    and a hanging one holds up nobody. A probe that has not ended after a minute no longer keeps another from
    probing. `succeeded_count`, `failed_count` and `refused` count calls.

    Raises ConfigurationError for a threshold below 1 or a timeout below 0.
    """

    kind = "component"
    subscription = ""

    def __init__(
        self,
        failure_threshold: int = 5,
        recovery_timeout: float = 60.0,
        *,
        name: str = "circuit breaker",
        clock: Clock | None = None,
        on_transition: OnTransition | None = None,
    ) -> None:
        if type(failure_threshold) is not int or failure_threshold < 1:
            raise ConfigurationError(f"failure_threshold must be a whole number from 1, not {shown(failure_threshold)}")
        if not isinstance(recovery_timeout, int | float) or not 0 <= recovery_timeout < math.inf:
            raise ConfigurationError(
                f"recovery_timeout must be 0 or more seconds and finite, not {shown(recovery_timeout)}"
            )
        self.name = name
        self.failure_threshold = failure_threshold
        self.recovery_timeout = float(recovery_timeout)
        self._clock = clock if clock is not None else SystemClock()
        self._on_transition = on_transition
        self._rule: ConsecutiveFailures[str] = ConsecutiveFailures(failure_threshold)
        self._breaker: Breaker[str] = Breaker(self._rule, open_for_s=self.recovery_timeout)
        self._last_failure_time: float | None = None
        self._counting = threading.Lock()
        self.succeeded_count = self.failed_count = self.refused = 0

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self.name!r} {self.state.value}, {self.failure_count} failures in a row>"

    @property
    def state(self) -> BreakerState:
        """Where it stands now. Equal to `'CLOSED'`, `'OPEN'`, `'HALF_OPEN'` in any case."""
        self._tick()
        return self._breaker.state

    @property
    def failure_count(self) -> int:
        """Failures in a row; 0 after a success."""
        return self._rule.count

    @property
    def last_failure_time(self) -> float | None:
        """Wall time of the last failure that counted, in seconds; None before the first."""
        return self._last_failure_time

    @last_failure_time.setter
    def last_failure_time(self, at: float | None) -> None:
        """Tests set it back to let time pass: an open breaker then waits from there."""
        self._last_failure_time = at
        if at is not None:
            self._breaker.opened_at = self._clock.monotonic() - (self._clock.wall() - at)

    def call(self, f: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
        """`f(*args, **kwargs)`, counted. Raises BreakerOpen, a RuntimeError, without calling it while open.

        What `f` raises is raised again, and counts as a failure unless it only ends the call (KeyboardInterrupt,
        SystemExit, cancellation, another breaker's refusal). Of an async `f` the result is to be
        awaited, and the call counts when that ends.
        """
        permit = self._admit()
        try:
            result = f(*args, **kwargs)
        except BaseException as error:
            self._failed(permit, error)
            raise
        if inspect.iscoroutine(result):
            return self._awaited(result, permit)  # type: ignore[return-value]  # as much a coroutine as f's
        self._succeeded(permit)
        return result

    def force_open(self) -> None:
        """Refuse every call until `reset`."""
        self._moved(self._breaker.force_open())

    def reset(self) -> None:
        """Closed, with nothing counted."""
        self._moved(self._breaker.reset())

    async def _awaited(self, coroutine: Coroutine[Any, Any, Any], permit: int) -> Any:
        try:
            result = await coroutine
        except BaseException as error:
            self._failed(permit, error)
            raise
        self._succeeded(permit)
        return result

    def _admit(self) -> int:
        self._tick()
        permit = self._breaker.admit(self._clock.monotonic())
        if permit is None:
            with self._counting:
                self.refused += 1
            raise BreakerOpen(f"{self.name} is {self._breaker.state.value}: the call was refused and not made")
        return permit

    def _succeeded(self, permit: int) -> None:
        with self._counting:
            self.succeeded_count += 1
        self._moved(self._breaker.succeeded(None, self._clock.monotonic(), permit))

    def _failed(self, permit: int, error: BaseException) -> None:
        if issubclass(type(error), _CONTROL_FLOW):
            self._breaker.release(permit)
            return
        with self._counting:
            self.failed_count += 1
        self._last_failure_time = self._clock.wall()
        self._moved(self._breaker.failed(None, type_name(type(error)), self._clock.monotonic(), permit))

    def _tick(self) -> None:
        self._moved(self._breaker.tick(self._clock.monotonic()))

    def _moved(self, transition: Transition[str] | None) -> None:
        if transition is not None and self._on_transition is not None:
            self._on_transition(transition)
