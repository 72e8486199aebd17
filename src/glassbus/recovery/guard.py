"""One breaker for each (component, category): a recovery that keeps failing is not tried for a while.

Asking for a permit, doing the recovery, and telling how it went are three calls, so that
nothing is locked while the recovery runs. Any thread may make them.
"""

from __future__ import annotations

import threading
from typing import Literal, Protocol

import msgspec

from glassbus.clock import Clock
from glassbus.errors import ErrorCategory, safe_text, type_name
from glassbus.facts import BreakerStateChanged, Delivery, RecoveryConcluded, RecoveryStarted, without_payload
from glassbus.observer import Hub
from glassbus.policy.breaker import Breaker, BreakerState, ConsecutiveFailures, Transition

#: The components whose recoveries are facts of their own (a handler's are facts of its delivery).
Component = Literal["endpoint", "queue", "resources", "configuration"]
_ERROR_CAP = 300


class BreakerView(Protocol):
    """A circuit breaker, as it is now: for telemetry, health and operators. The three counts only grow."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str:
        """subscription, component or endpoint."""

    @property
    def subscription(self) -> str:
        """The subscription it guards; empty for the other kinds."""

    @property
    def state(self) -> str: ...
    @property
    def succeeded_count(self) -> int: ...
    @property
    def failed_count(self) -> int: ...
    @property
    def refused(self) -> int:
        """Calls not made because it was open."""


class Permit(msgspec.Struct, frozen=True):
    """Leave to make one recovery. Give it to `succeeded`, `failed` or `release`, once."""

    component: str
    category: ErrorCategory
    number: int


class ComponentBreaker:
    """The breaker of one (component, category), in the form that telemetry reads (`BreakerView`)."""

    kind = "component"
    subscription = ""

    def __init__(self, component: str, category: ErrorCategory, threshold: int, open_for_s: float) -> None:
        self.name = f"{component}/{category.value}"
        self.breaker: Breaker[Delivery | None] = Breaker(ConsecutiveFailures(threshold), open_for_s=open_for_s)
        self.succeeded_count = self.failed_count = self.refused = 0

    @property
    def state(self) -> str:
        return self.breaker.state.value


class ComponentBreakers:
    """The breakers of a bus's components, each made when it is first asked for.

    A breaker opens after `threshold` failed recoveries in a row, and admits one as a probe
    after `open_for_s` seconds (`look`, called about once a second, moves it): soon enough to recover within
    30 s of a fault's healing. Each transition is stated.
    """

    def __init__(self, hub: Hub, clock: Clock, *, threshold: int = 5, open_for_s: float = 20.0) -> None:
        self._hub = hub
        self._monotonic, self._wall = clock.monotonic, clock.wall
        self._threshold = threshold
        self._open_for_s = open_for_s
        self._counting = threading.Lock()
        self._breakers: dict[tuple[str, ErrorCategory], ComponentBreaker] = {}
        self._paces: dict[str, float] = {}

    def pace(self, component: str, open_for_s: float) -> None:
        """Let the breakers of `component` that are made from now on be open for so long."""
        self._paces[component] = open_for_s

    def admit(self, component: str, category: ErrorCategory) -> Permit | None:
        """A permit for one recovery now, or None while the breaker refuses. Does not block."""
        one = self._of(component, category)
        self._look(one)
        number = one.breaker.admit(self._monotonic())
        if number is None:
            with self._counting:
                one.refused += 1
            return None
        return Permit(component, category, number)

    def succeeded(self, permit: Permit) -> None:
        """The recovery worked."""
        one = self._of(permit.component, permit.category)
        with self._counting:
            one.succeeded_count += 1
        self._moved(one, one.breaker.succeeded(None, self._monotonic(), permit.number))

    def failed(self, permit: Permit, cause: Delivery | None = None) -> None:
        """The recovery did not work. `cause`: the delivery whose failure asked for it; kept without payload."""
        one = self._of(permit.component, permit.category)
        kept = None if cause is None else without_payload(cause)
        with self._counting:
            one.failed_count += 1
        self._moved(one, one.breaker.failed(None, kept, self._monotonic(), permit.number))

    def release(self, permit: Permit) -> None:
        """The recovery was not made, or cancelled: it says nothing."""
        self._of(permit.component, permit.category).breaker.release(permit.number)

    def force_open(self, component: str, category: ErrorCategory) -> None:
        """Refuse every recovery until `reset`."""
        one = self._of(component, category)
        self._moved(one, one.breaker.force_open())

    def reset(self, component: str, category: ErrorCategory) -> None:
        """Closed and automatic, with nothing counted."""
        one = self._of(component, category)
        self._moved(one, one.breaker.reset())

    def healed(self, component: str, category: ErrorCategory) -> None:
        """The component is seen to work without a recovery: an automatic breaker closes, with nothing counted."""
        one = self._breakers.get((component, category))
        if one is not None and one.breaker.state in (BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN):
            self._moved(one, one.breaker.reset())

    def state(self, component: str, category: ErrorCategory) -> BreakerState:
        return self._of(component, category).breaker.state

    def ready_at(self, component: str, category: ErrorCategory) -> float:
        """From when on `admit` may give a permit, monotonic seconds: 0 if it may, infinity while forced open."""
        breaker = self._of(component, category).breaker
        if breaker.state is BreakerState.FORCED_OPEN:
            return float("inf")
        return breaker.opened_at + breaker.open_for_s if breaker.state is BreakerState.OPEN else 0.0

    def look(self) -> None:
        """Half-open those whose wait is over."""
        for one in self.views():
            self._look(one)

    def views(self) -> list[ComponentBreaker]:
        """Every breaker made so far. Any thread."""
        with self._counting:
            return list(self._breakers.values())

    def begin(
        self,
        component: Component,
        category: ErrorCategory,
        action: str,
        target: str,
        *,
        error: BaseException | None = None,
        attempt: int = 1,
        first_failed_at: float | None = None,
    ) -> Recovery | None:
        """Begin a recovery and state it; None when the breaker refuses, which is stated too.

        `first_failed_at` is monotonic seconds; without it the recovery counts from now.
        """
        now = self._monotonic()
        recovery = Recovery(
            self, component, category, action, target, attempt, now if first_failed_at is None else first_failed_at
        )
        permit = self.admit(component, category)
        if permit is None:
            recovery.refused(error)
            return None
        recovery.admitted(permit)
        recovery.started(_text(error))
        return recovery

    def unguarded(
        self, component: Component, category: ErrorCategory, action: str, target: str, *, error: str = ""
    ) -> Recovery:
        """Begin what is done when a recovery failed, and state it. No breaker guards it, none counts it."""
        recovery = Recovery(self, component, category, action, target, 1, self._monotonic(), guarded=False)
        recovery.started(error)
        return recovery

    def _of(self, component: str, category: ErrorCategory) -> ComponentBreaker:
        with self._counting:
            found = self._breakers.get((component, category))
            if found is None:
                open_for_s = self._paces.get(component, self._open_for_s)
                found = ComponentBreaker(component, category, self._threshold, open_for_s)
                self._breakers[component, category] = found
            return found

    def _look(self, one: ComponentBreaker) -> None:
        self._moved(one, one.breaker.tick(self._monotonic() + 1e-6))

    def _moved(self, one: ComponentBreaker, transition: Transition[Delivery | None] | None) -> None:
        if transition is None:
            return
        self._hub.state(
            BreakerStateChanged(
                at=self._wall(),
                breaker=one.name,
                kind="component",
                subscription="",
                from_state=transition.from_state.value,
                to_state=transition.to_state.value,
                reason=transition.reason,
                causes=tuple(cause for cause in transition.causes if cause is not None),
            )
        )


class Recovery:
    """One recovery under way. End it once, with `succeeded`, `failed` or `cancelled`: further calls do nothing."""

    def __init__(
        self,
        breakers: ComponentBreakers,
        component: Component,
        category: ErrorCategory,
        action: str,
        target: str,
        attempt: int,
        first_failed_at: float,
        *,
        guarded: bool = True,
    ) -> None:
        self._breakers = breakers
        self._component = component
        self._category = category
        self._action = action
        self._target = target
        self._attempt = attempt
        self._first_failed_at = first_failed_at
        self._permit: Permit | None = None
        self._open = not guarded

    def admitted(self, permit: Permit) -> None:
        self._permit, self._open = permit, True

    def started(self, error: str) -> None:
        """State that it begins; `error` is what made it necessary."""
        self._breakers._hub.state(
            RecoveryStarted(
                at=self._breakers._wall(),
                component=self._component,
                category=self._category,
                action=self._action,
                target=self._target,
                attempt=self._attempt,
                error=error,
            )
        )

    def refused(self, error: BaseException | None) -> None:
        self._conclude("refused", _text(error))

    def succeeded(self) -> None:
        """It worked."""
        if self._end():
            self._conclude("succeeded")
            if self._permit is not None:
                self._breakers.succeeded(self._permit)

    def failed(self, error: BaseException | str = "", cause: Delivery | None = None) -> None:
        """It did not work, because of `error`."""
        if self._end():
            self._conclude("failed", error if isinstance(error, str) else _text(error))
            if self._permit is not None:
                self._breakers.failed(self._permit, cause)

    def cancelled(self) -> None:
        """It was called off, which says nothing about whether it would have worked; not counted."""
        if self._end():
            self._conclude("called_off")
            if self._permit is not None:
                self._breakers.release(self._permit)

    def _end(self) -> bool:
        """Whether this is its end. Asked by one thread: the one that does the recovery."""
        was_open, self._open = self._open, False
        return was_open

    def _conclude(self, outcome: Literal["succeeded", "failed", "refused", "called_off"], error: str = "") -> None:
        breakers = self._breakers
        breakers._hub.state(
            RecoveryConcluded(
                at=breakers._wall(),
                component=self._component,
                category=self._category,
                action=self._action,
                target=self._target,
                attempt=self._attempt,
                outcome=outcome,
                duration_s=max(0.0, breakers._monotonic() - self._first_failed_at),
                error=error,
            )
        )


def _text(error: BaseException | None) -> str:
    return "" if error is None else f"{type_name(type(error))}: {safe_text(error, _ERROR_CAP)}"
