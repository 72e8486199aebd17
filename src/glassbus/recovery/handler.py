"""What a handler's failure changes beside its own delivery: delays, the timeout, the load, the configuration.

Every category retries the delivery (`policy.delivery`), because a handler's `ConnectionError` is about its own
downstream. The category sets the delay, and what else is worth doing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from glassbus.clock import Clock
from glassbus.errors import BusOverloaded, ErrorCategory
from glassbus.facts import Delivery, TimeoutAdapted
from glassbus.observer import Hub
from glassbus.policy.retry import Retry
from glassbus.policy.timeouts import AdaptiveTimeout, TimeoutInForce
from glassbus.recovery.configuration import Configuration
from glassbus.recovery.guard import ComponentBreakers
from glassbus.recovery.resources import Intake, LoadShedding

_C = ErrorCategory
#: Running fewer attempts at once does not help against these: a stack is of one attempt, and a bus that
#: takes nothing has shed its load already.
_NOT_OF_LOAD = (RecursionError, BusOverloaded)


#: A change of the timeout by less than this share of the own one is not told.
_TOLD = 0.05


class _Pace(NamedTuple):
    """How retries differ from what `Retry` says: whether an immediate one is made, and how much longer the delays are.

    `max_delay`, `max_attempts` and the budget hold all the same.
    """

    immediate: bool
    slower: float


_PACE: dict[ErrorCategory, _Pace] = {
    _C.CONNECTION_ERROR: _Pace(immediate=True, slower=2.5),  # a stale connection goes at once; a dead peer takes time
    _C.TIMEOUT_ERROR: _Pace(immediate=True, slower=1.0),
    _C.MESSAGE_PROCESSING_ERROR: _Pace(immediate=True, slower=1.0),
    _C.SERIALIZATION_ERROR: _Pace(immediate=True, slower=1.0),
    _C.QUEUE_OVERFLOW: _Pace(immediate=False, slower=2.5),
    _C.AUTHENTICATION_ERROR: _Pace(immediate=False, slower=5.0),  # no hammering: accounts get locked
    _C.RESOURCE_EXHAUSTION: _Pace(immediate=False, slower=5.0),
    _C.CONFIGURATION_ERROR: _Pace(immediate=False, slower=5.0),
}


def paced(retry: Retry, category: ErrorCategory) -> Retry:
    """`retry` as it holds for failures of `category`."""
    pace = _PACE[category]
    return msgspec.structs.replace(
        retry,
        immediate=retry.immediate if pace.immediate else 0,
        base_delay=min(retry.base_delay * pace.slower, max(retry.base_delay, retry.max_delay)),
    )


class Shared(NamedTuple):
    """What the subscriptions of a bus recover with together."""

    hub: Hub
    clock: Clock
    breakers: ComponentBreakers
    intake: Intake
    configuration: Configuration


class HandlerRecovery:
    """Of one subscription. Belongs to the bus's loop.

    `resize` and `hold_back`: see `LoadShedding`. `adapted` is told of each change of the timeout in force.
    """

    def __init__(
        self,
        name: str,
        shared: Shared,
        *,
        retry: Retry,
        timeout_s: float,
        abandon_after_s: float,
        adaptive: AdaptiveTimeout,
        concurrency: int,
        resize: Callable[[int], None],
        hold_back: Callable[[bool], bool],
        adapted: Callable[[float], None],
    ) -> None:
        self._name = name
        self._hub, self._clock = shared.hub, shared.clock
        self._configuration = shared.configuration
        self._adapted = adapted
        self._retry = retry
        self._retries: dict[ErrorCategory, Retry] = {}
        self._timeout = TimeoutInForce(timeout_s, abandon_after_s, adaptive, self._clock.monotonic())
        self._told_s = timeout_s
        self.load = LoadShedding(
            name,
            concurrency,
            hub=shared.hub,
            clock=shared.clock,
            breakers=shared.breakers,
            intake=shared.intake,
            resize=resize,
            hold_back=hold_back,
        )

    def tune(
        self, *, retry: Retry, timeout_s: float, abandon_after_s: float, adaptive: AdaptiveTimeout, concurrency: int
    ) -> None:
        """Other settings hold from now on."""
        self._retry = retry
        self._retries.clear()
        self._timeout.tune(timeout_s, abandon_after_s, adaptive)
        self._told_s = self._timeout.in_force_s
        self._adapted(self._told_s)
        self.load.resize(concurrency)

    def timeout_in_force_s(self) -> float:
        """What an attempt that runs past its own timeout is allowed now."""
        return self._timeout.in_force_s

    def retry_for(self, category: ErrorCategory) -> Retry:
        found = self._retries.get(category)
        if found is None:
            found = self._retries[category] = paced(self._retry, category)
        return found

    def failed(self, delivery: Delivery, category: ErrorCategory, error: BaseException, started: float) -> None:
        """An attempt that began at `started` (monotonic seconds) failed."""
        if category == _C.RESOURCE_EXHAUSTION and not issubclass(type(error), _NOT_OF_LOAD):
            self.load.exhausted(delivery, error, started)
        elif category == _C.CONFIGURATION_ERROR:
            self._configuration.handler_failed(self._name, delivery, error)

    def dead_lettered(self, category: ErrorCategory) -> None:
        """A delivery came to rest after a failure of `category`."""
        if category == _C.CONFIGURATION_ERROR:
            self._configuration.handler_gave_up(self._name)

    def timed_out(self, had_s: float) -> None:
        """An attempt ran past the timeout of `had_s` that it had: later ones get more."""
        self._timeout.pass_to(self._clock.monotonic())
        before_s = self._timeout.in_force_s
        self._timeout.timed_out(had_s)
        if self._longer_than(before_s):
            self._tell_timeout(before_s)
        self._adapted(self._timeout.in_force_s)

    def slow(self, took_s: float) -> None:
        """An attempt succeeded that the own timeout would have ended."""
        self._timeout.needed(took_s)

    def succeeded(self) -> None:
        """Attempts have succeeded since the last call."""
        self.load.succeeded()
        self._configuration.handler_succeeded(self._name)

    def look(self) -> None:
        """Time has passed. Called about once a second."""
        self._timeout.pass_to(self._clock.monotonic())
        self._look_at_timeout()
        self.load.look()

    def _look_at_timeout(self) -> None:
        """Tell of a way back step by step, not at each beat."""
        in_force_s, told_s = self._timeout.in_force_s, self._told_s
        at_rest = in_force_s == self._timeout.own_s
        far_back = in_force_s * max(1.1, self._timeout.factor) <= told_s
        if (at_rest and in_force_s != told_s) or far_back or self._longer_than(told_s):
            self._tell_timeout(told_s)
        self._adapted(in_force_s)

    def _longer_than(self, before_s: float) -> bool:
        """By enough to be told of."""
        return self._timeout.in_force_s > before_s + _TOLD * self._timeout.own_s

    def _tell_timeout(self, from_s: float) -> None:
        self._told_s = in_force_s = self._timeout.in_force_s
        self._hub.state(TimeoutAdapted(at=self._clock.wall(), subscription=self._name, from_s=from_s, to_s=in_force_s))

    def stop(self) -> None:
        self.load.stop()
