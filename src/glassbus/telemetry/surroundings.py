"""Spans of what goes on around messages: breakers, the store, full queues, the end of a bus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from glassbus import facts as f
from glassbus.facts import Fact
from glassbus.record.failures import Failure
from glassbus.telemetry.outlet import SpanData
from glassbus.telemetry.propagation import Lineage, Place, random_bits
from glassbus.telemetry.spans import SpanWriter, ns


def new_trace() -> Place:
    """A trace that nothing is in yet."""
    return Place(random_bits(128) or 1, 0, True)


class Surroundings:
    """Writes those spans. `admit(site, spans)` is the flood budget: below 0 means only counted."""

    def __init__(
        self,
        writer: SpanWriter,
        lineage: Lineage,
        *,
        connection: str,
        emit: Callable[[SpanData], None],
        admit: Callable[[str, int], int],
    ) -> None:
        self._writer = writer
        self._lineage = lineage
        self._connection = connection
        self._emit = emit
        self._admit = admit
        self._opened: dict[str, Place] = {}
        self._down: Place | None = None
        self._lost: dict[str, Place] = {}

    def breaker_moved(self, fact: f.BreakerStateChanged) -> None:
        if self._admit(f"breaker:{fact.breaker}", 1) < 0:
            return
        causes = [self._lineage.trail(cause).own for cause in fact.causes]
        # The newest cause tipped it; a timer or an operator has none, and moves it in a trace of its own.
        at = causes.pop() if causes else new_trace()
        opening = None if fact.causes else self._opened.get(fact.breaker)
        move = (fact.from_state, fact.to_state)
        span = self._writer.breaker(fact.breaker, fact.kind, move, fact.reason, at, ns(fact.at), causes, opening)
        if fact.to_state in ("open", "forced_open"):
            self._opened[fact.breaker] = span.place
        self._emit(span)

    def transport_failed(self, fact: f.TransportFailed, failure: Failure) -> None:
        at_ns = ns(fact.at)
        if self._down is None:
            change = {"glassbus.connection.state": "down", "glassbus.operation": fact.operation}
            name, error = f"connection {self._connection}", self._writer.text(fact.error)
            span = self._writer.happening(name, new_trace(), at_ns, at_ns, change, error)
            self._down = span.place
            self._emit(span)
        skipped = self._admit(failure.site, 1)
        if skipped >= 0:
            self._emit(self._writer.error(failure, self._down, self._down.span_id, at_ns, skipped))

    def transport_recovered(self, fact: f.TransportRecovered) -> None:
        at, self._down = self._down or new_trace(), None
        change = {"glassbus.connection.state": "up", "glassbus.connection.down_s": fact.after_s}
        name = f"connection {self._connection}"
        self._emit(self._writer.happening(name, at, ns(fact.at - fact.after_s), ns(fact.at), change))

    def overflowed(self, fact: f.OverflowHandled, at: Place) -> None:
        if self._admit(f"overflow:{fact.subscription}", 1) >= 0:
            change = {"glassbus.subscription": fact.subscription, "glassbus.overflow.action": fact.action}
            at_ns = ns(fact.at)
            self._emit(self._writer.happening(f"overflow {fact.subscription}", at, at_ns, at_ns, change))

    def stopped(self, fact: f.BusStopped) -> None:
        change = {
            "glassbus.given_back": fact.given_back,
            "glassbus.discarded": fact.discarded,
            "glassbus.within_deadline": fact.within_deadline,
        }
        self._emit(self._writer.happening("shutdown", new_trace(), ns(fact.at), ns(fact.at), change))

    def connection_lost(self, fact: f.ConnectionLost, failure: Failure) -> None:
        at_ns = ns(fact.at)
        if fact.endpoint not in self._lost:
            change = {"glassbus.connection.state": "down"}
            error = self._writer.text(fact.error)
            span = self._writer.happening(f"connection {fact.endpoint}", new_trace(), at_ns, at_ns, change, error)
            self._lost[fact.endpoint] = span.place
            self._emit(span)
        at = self._lost[fact.endpoint]
        skipped = self._admit(failure.site, 1)
        if skipped >= 0:
            self._emit(self._writer.error(failure, at, at.span_id, at_ns, skipped))

    def connection_restored(self, fact: f.ConnectionRestored) -> None:
        at = self._lost.pop(fact.failed_over_from or fact.endpoint, None) or new_trace()
        self._lost.clear()  # one endpoint of a set serves at a time
        change = {
            "glassbus.connection.state": "up",
            "glassbus.connection.down_s": fact.after_s,
            "glassbus.connection.attempts": fact.attempts,
        }
        if fact.failed_over_from:
            change["glassbus.connection.failed_over_from"] = fact.failed_over_from
        name = f"connection {fact.endpoint}"
        self._emit(self._writer.happening(name, at, ns(fact.at - fact.after_s), ns(fact.at), change))

    def credentials_refreshed(self, fact: f.CredentialsRefreshed, failure: Failure | None) -> None:
        at = self._lost.get(fact.endpoint) or new_trace()
        change = {"glassbus.connection.state": "credentials_refreshed" if fact.succeeded else "credentials_refused"}
        error = self._writer.text(fact.error) if failure is not None else None
        at_ns = ns(fact.at)
        span = self._writer.happening(f"connection {fact.endpoint}", at, at_ns, at_ns, change, error)
        self._emit(span)
        if failure is not None:
            self._emit(self._writer.error(failure, span.place, span.place.span_id, at_ns))

    def forwarded(self, fact: f.SpoolForwarded) -> None:
        if self._admit(f"spool:{fact.endpoint}", 1) >= 0:
            change = {
                "glassbus.connection.state": "up",
                "glassbus.spool.forwarded": fact.messages,
                "glassbus.spool.remaining": fact.remaining,
            }
            at_ns = ns(fact.at)
            self._emit(self._writer.happening(f"connection {fact.endpoint}", new_trace(), at_ns, at_ns, change))

    def recovered(self, fact: f.RecoveryConcluded, failure: Failure | None) -> None:
        """A recovery of a component; under the loss of its connection, where that is what it mends."""
        if self._admit(f"recover:{fact.component}:{fact.category}:{fact.target}", 1) < 0:
            return
        change = {
            "glassbus.recovery.action": fact.action,
            "glassbus.recovery.outcome": fact.outcome,
            "glassbus.recovery.target": self._writer.text(fact.target),
            "glassbus.error.category": fact.category.value,
            "glassbus.attempt": fact.attempt,
        }
        at = self._lost.get(fact.target) or new_trace()
        error = self._writer.text(fact.error) if fact.error else None
        span = self._writer.happening(
            f"recover {fact.component}", at, ns(fact.at - fact.duration_s), ns(fact.at), change, error
        )
        self._emit(span)
        if failure is not None:
            self._emit(self._writer.error(failure, span.place, span.place.span_id, ns(fact.at)))

    def load_changed(self, fact: f.LoadShed | f.LoadRegained, at: Place) -> None:
        if self._admit(f"load:{fact.subscription}", 1) >= 0:
            change = {
                "glassbus.subscription": fact.subscription,
                "glassbus.recovery.action": "shed" if isinstance(fact, f.LoadShed) else "regain",
                "glassbus.recovery.limit": fact.limit,
                "glassbus.recovery.outcome": "succeeded",
            }
            at_ns = ns(fact.at)
            self._emit(self._writer.happening("recover resources", at, at_ns, at_ns, change))

    def notified(self, fact: f.EscalationNotified, failure: Failure | None) -> None:
        if self._admit(f"escalate:{fact.name}:{fact.channel}", 1) < 0:
            return
        change = {
            "glassbus.escalation.channel": fact.channel,
            "glassbus.escalation.event": fact.event,
            "glassbus.escalation.outcome": fact.outcome,
            "glassbus.escalation.notification": fact.notification,
            "glassbus.error.severity": fact.severity.value,
            "glassbus.error.fingerprint": fact.fingerprint,
        }
        error = self._writer.text(fact.error) if failure is not None else None
        start_ns, end_ns = ns(fact.at - fact.duration_s), ns(fact.at)
        span = self._writer.happening(f"escalate {fact.name}", new_trace(), start_ns, end_ns, change, error, calls=True)
        self._emit(span)
        if failure is not None:
            self._emit(self._writer.error(failure, span.place, span.place.span_id, end_ns))

    def emergency_ended(self, fact: f.EmergencyStopEnded) -> None:
        change = {
            "glassbus.reason": self._writer.text(fact.reason),
            "glassbus.saved": fact.saved,
            "glassbus.within_deadline": fact.within_deadline,
        }
        start_ns, end_ns = ns(fact.at - fact.duration_s), ns(fact.at)
        self._emit(self._writer.happening("shutdown", new_trace(), start_ns, end_ns, change))

    def fault(self, fact: f.FaultInjected | f.FaultHealed) -> None:
        change: dict[str, Any] = {"glassbus.fault.kind": fact.fault, "glassbus.fault.state": "injected"}
        if isinstance(fact, f.FaultHealed):
            change["glassbus.fault.state"] = "healed"
            change["glassbus.fault.hits"] = fact.hits
        at_ns = ns(fact.at)
        self._emit(self._writer.happening(f"fault {fact.target}", new_trace(), at_ns, at_ns, change))

    def error_at(self, fact: Fact, failure: Failure | None, at: Place) -> None:
        """The span of an error that has no other, under `at`; nothing when `fact` turned out to be none."""
        skipped = self._admit(failure.site, 1) if failure is not None else -1
        if failure is not None and skipped >= 0:
            self._emit(self._writer.error(failure, at, at.span_id, ns(fact.at), skipped))
