"""The observer that every bus has by default: its traces and its metrics."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from glassbus.facts import (
    AttemptFailed,
    BusStopped,
    Delivery,
    DeliveryHandled,
    Fact,
    FactType,
    MessagePublished,
    RetryScheduled,
)
from glassbus.observer import ALL_FACTS
from glassbus.policy.retry import Retry
from glassbus.policy.routing import matches
from glassbus.record.failures import failure_of, of_report
from glassbus.telemetry.counts import Counts
from glassbus.telemetry.live import leave_span
from glassbus.telemetry.propagation import Lineage, Place
from glassbus.telemetry.records import FailureRecords
from glassbus.telemetry.shown import named
from glassbus.telemetry.source import Source
from glassbus.telemetry.spans import SpanWriter, without_credentials
from glassbus.telemetry.tracing import Tracing

_observers: weakref.WeakSet[TelemetryObserver] = weakref.WeakSet()


def _matcher(patterns: tuple[str, ...]) -> Callable[[str], bool] | None:
    if not patterns:
        return None
    return lambda topic: any(matches(pattern, topic) for pattern in patterns)


def _after_fork() -> None:
    for observer in list(_observers):
        observer.counts.after_fork()
        observer.tracing.after_fork()
        observer.records.budget.after_fork()


os.register_at_fork(after_in_child=_after_fork)


class TelemetryObserver:
    """Shows one bus to OpenTelemetry and to Prometheus. Observer and Propagator in one. Thread-safe.

    It asks for no fact of the happy path, but for MessagePublished of messages with a
    sampled `traceparent` (`wants_sampled`). It holds the bus weakly.
    """

    interests: frozenset[FactType] = ALL_FACTS - {MessagePublished, DeliveryHandled}
    wants_sampled = True

    def __init__(
        self,
        source: Source,
        *,
        version: str,
        tracer_provider: Any = None,
        failures: Callable[[], Any] = lambda: None,
        redact: Callable[[str], str] = without_credentials,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.name = source.name
        self.version = version
        self.now = wall
        self.stopped = False
        self.counts = Counts(source.address)
        self._source = weakref.ref(source)
        self._policies: dict[str, Retry] = {}
        writer = SpanWriter(source.name, source.transport, self._retry, redact, source.address)
        self.tracing = Tracing(
            writer,
            Lineage(self._immediate, _matcher(source.untrusted)),
            connection=source.address,
            wall=wall,
            provider=tracer_provider,
            failures=failures,
            succeeded=self.counts.succeeded,
        )
        self._own_time = self.tracing.own_time
        self.records = FailureRecords(writer.text, self.place)
        _observers.add(self)
        # Bound once: these are called for each message.
        self.inject = self.tracing.inject
        self._scope = self.tracing.scope_among_strangers if source.untrusted else self.tracing.scope
        #: A message without a header is in no sampled trace, but where that is decided here.
        self.scopes_plain = bool(source.untrusted)

    @property
    def source(self) -> Source | None:
        return self._source()

    @property
    def fact_seconds(self) -> float:
        """CPU seconds spent here on facts, and on publishes and attempts that have a span."""
        return self._own_time.seconds

    @property
    def summarised(self) -> int:
        return self.tracing.summarised

    def on_fact(self, fact: Fact, /) -> None:
        began = self._own_time.begin()
        kind = type(fact)
        # What is counted has the trace that shows it as an example.
        if kind is MessagePublished:  # of a sampled message: no failure, and soon to be handled
            example = self.tracing.show_published(fact)  # type: ignore[arg-type]
            if example is not None:
                self.counts.published(fact, example)  # type: ignore[arg-type]
        elif kind is AttemptFailed:
            failure = of_report(fact.report, fact.delivery.destination)  # type: ignore[union-attr]
            self.counts.failed(fact, failure, self.tracing.show_failed(fact, failure))  # type: ignore[arg-type]
        elif kind is RetryScheduled:  # counted when it ends
            self.tracing.show_retry(fact)  # type: ignore[arg-type]
            self.records.show(fact, None)
        else:
            self._show(fact)
        around = self.tracing.around
        self._own_time.end(began, around.publish_s if kind is MessagePublished else around.fact_s)

    def _show(self, fact: Fact) -> None:
        failure = failure_of(fact)
        self.tracing.show(fact, failure)
        self.counts.count(fact, failure, self.tracing.shown(fact))
        self.records.show(fact, failure)
        if isinstance(fact, BusStopped):
            self.stopped = True

    def scope(self, work: Delivery, /) -> AbstractContextManager[None]:
        return self._scope(work)

    def enter_worker(self) -> None:
        """A bus may be started while a span is current: its handlers are not part of that."""
        leave_span()

    def place(self, delivery: Delivery, /) -> Place:
        """The span of an attempt."""
        return self.tracing.lineage.trail(delivery).own

    def trace_of(self, kind: FactType, delivery: Delivery, reason: str, /) -> dict[str, str]:
        """As `observer.TraceOf` asks: in which trace a fact about `delivery` is shown. Any thread, any time."""
        return named(self.tracing.lineage, kind, delivery, reason) if self.tracing.outlet.keeps_ids else {}

    def _retry(self, subscription: str) -> Retry | None:
        found = self._policies.get(subscription)
        if found is None:
            source = self._source()
            if source is not None:
                self._policies.update((view.name, view.retry) for view in source.subscribers())
                found = self._policies.get(subscription)
        return found

    def _immediate(self, subscription: str) -> int:
        retry = self._retry(subscription)
        return retry.immediate if retry is not None else Retry().immediate
