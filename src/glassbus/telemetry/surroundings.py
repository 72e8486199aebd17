"""Spans of what goes on around messages: breakers, the store, full queues, the end of a bus."""

from __future__ import annotations

from collections.abc import Callable

from glassbus.facts import (
    BreakerStateChanged,
    BusStopped,
    LedgerUnbalanced,
    ObserverFailed,
    OverflowHandled,
    OwnerLost,
    TransportFailed,
    TransportRecovered,
)
from glassbus.telemetry.failures import Failure
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

    def breaker_moved(self, fact: BreakerStateChanged) -> None:
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

    def transport_failed(self, fact: TransportFailed, failure: Failure) -> None:
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

    def transport_recovered(self, fact: TransportRecovered) -> None:
        at, self._down = self._down or new_trace(), None
        change = {"glassbus.connection.state": "up", "glassbus.connection.down_s": fact.after_s}
        name = f"connection {self._connection}"
        self._emit(self._writer.happening(name, at, ns(fact.at - fact.after_s), ns(fact.at), change))

    def overflowed(self, fact: OverflowHandled, at: Place) -> None:
        if self._admit(f"overflow:{fact.subscription}", 1) >= 0:
            change = {"glassbus.subscription": fact.subscription, "glassbus.overflow.action": fact.action}
            at_ns = ns(fact.at)
            self._emit(self._writer.happening(f"overflow {fact.subscription}", at, at_ns, at_ns, change))

    def stopped(self, fact: BusStopped) -> None:
        change = {
            "glassbus.given_back": fact.given_back,
            "glassbus.discarded": fact.discarded,
            "glassbus.within_deadline": fact.within_deadline,
        }
        self._emit(self._writer.happening("shutdown", new_trace(), ns(fact.at), ns(fact.at), change))

    def bare_error(self, fact: OwnerLost | LedgerUnbalanced | ObserverFailed, failure: Failure) -> None:
        skipped = self._admit(failure.site, 1)
        if skipped >= 0:
            self._emit(self._writer.error(failure, new_trace(), 0, ns(fact.at), skipped))
