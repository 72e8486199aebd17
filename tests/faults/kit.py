"""Short words for scenarios: a bus in virtual time, one subscription, and the facts that count."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from glassbus import KillSwitch, Message, MessageBus, Retry
from glassbus import facts as f
from glassbus.facts import Fact
from glassbus.policy.ledger import Account
from glassbus.testing import RecordingObserver, VirtualClock, run_virtual

Result = TypeVar("Result")

#: Facts that tell of the surroundings of a scenario, and not of what happens in it.
_SURROUNDINGS = {"SubscriptionDeclared", "BusStarted", "BusStopped", "MessagePublished"}
#: Retries without chance, so that what is stated, and when, is exact.
STEADY = Retry(max_attempts=3, immediate=1, base_delay=0.0)
NEVER = KillSwitch(enabled=False)


class House:
    """One bus and what it stated."""

    def __init__(self, clock: VirtualClock, url: str = "memory://", **options: Any) -> None:
        self.clock = clock
        self.seen = RecordingObserver()
        self.runs: list[Any] = []
        options.setdefault("telemetry", False)
        options.setdefault("seed", 1)
        observers = [self.seen, *options.pop("observers", ())]
        self.bus = MessageBus(url, observers=observers, **options)

    def subscribe(self, name: str = "work", pattern: str = "work.*", **options: Any) -> None:
        """A handler that takes every message, and remembers the payload."""
        options.setdefault("retry", STEADY)
        options.setdefault("kill_switch", NEVER)

        async def take(message: Message[Any]) -> None:
            self.runs.append(message.payload)

        self.bus.subscribe(pattern, name=name, **options)(take)

    def names(self) -> list[str]:
        """What was stated, in order, without the surroundings."""
        return [name for name in self.seen.names() if name not in _SURROUNDINGS]

    def story(self, since: float) -> list[str]:
        """Every fact but the surroundings: how long after `since` (wall seconds), its type, and what matters of it."""
        return [_line(fact, since) for fact in self.seen.facts if not _is_aside(fact)]

    def escalations(self, since: float) -> list[str]:
        """The same of who was told; that goes on beside the rest."""
        return [_line(fact, since) for fact in self.seen.facts if type(fact).__name__.startswith("Escalation")]

    def health(self, since: float) -> list[str]:
        """Each move of health: how long after, and where to."""
        return [f"{fact.at - since:.0f} {fact.to_status}" for fact in self.of(f.HealthChanged) if fact.at >= since]

    def total(self) -> Account:
        return self.bus.ledger().total

    def of(self, kind: type[Fact]) -> list[Any]:
        return self.seen.of(kind)


_TOLD: dict[type[Any], tuple[str, ...]] = {
    f.AttemptFailed: ("attempt", "category"),
    f.RetryScheduled: ("action", "delay_s"),
    f.RecoveryEnded: ("outcome",),
    f.DeliveryHandled: ("attempt",),
    f.DeliveryDeadLettered: ("reason",),
    f.BreakerStateChanged: ("breaker", "to_state"),
    f.BackpressureApplied: ("waited_s", "admitted"),
    f.OverflowHandled: ("action", "capacity"),
    f.PublishRefused: ("reason",),
    f.TimeoutAdapted: ("to_s",),
    f.LoadShed: ("limit", "low_priority_held"),
    f.LoadRegained: ("limit", "low_priority_held"),
    f.CodecFellBack: ("declared", "used"),
    f.RecoveryStarted: ("component", "action"),
    f.RecoveryConcluded: ("component", "action", "outcome"),
    f.TransportFailed: ("operation",),
    f.TransportRecovered: ("after_s",),
    f.SubscriptionPaused: ("subscription",),
    f.SubscriptionResumed: ("subscription",),
    f.EscalationOpened: ("name", "severity"),
    f.EscalationNotified: ("name", "channel", "event", "outcome"),
    f.EscalationAcknowledged: ("name", "by"),
    f.EscalationResolved: ("name", "reason"),
    f.FaultInjected: ("fault", "target"),
    f.FaultHealed: ("hits",),
}


def _is_aside(fact: Fact) -> bool:
    name = type(fact).__name__
    return name in _SURROUNDINGS or name.startswith("Escalation") or name == "HealthChanged"


def _line(fact: Any, since: float) -> str:
    found = []
    for name in _TOLD.get(type(fact), ()):
        for part in (fact, getattr(fact, "delivery", None), getattr(fact, "report", None)):
            if hasattr(part, name):
                value = getattr(part, name)
                found.append(f"{value:.3g}" if type(value) is float else str(value))
                break
    return " ".join([f"{fact.at - since:.1f}", type(fact).__name__, *found])


def play(scenario: Callable[[House], Awaitable[Result]], url: str = "memory://", **options: Any) -> Result:
    """Run `scenario` on a house of its own, in virtual time. The ledger must balance at its end."""

    async def whole(clock: VirtualClock) -> Result:
        house = House(clock, url, **options)
        try:
            result = await scenario(house)
            assert house.bus.ledger().balanced
            return result
        finally:
            await house.bus.stop(1.0)

    return run_virtual(whole)
