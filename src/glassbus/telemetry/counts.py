"""Facts as counts: the projection that metrics are made of.

Only what goes wrong is counted here, a fact at a time; what goes well is counted by
the core and read when it is scraped.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from typing import assert_never

from glassbus import facts as f
from glassbus.record.failures import Failure
from glassbus.record.tally import Buckets
from glassbus.telemetry.catalogue import BY_NAME, PROJECTIONS
from glassbus.telemetry.governor import OTHER, LabelCap
from glassbus.telemetry.propagation import Place

#: Label values in the order that the catalogue declares them, without `bus`.
Labels = tuple[str, ...]


_Published = f.DuplicateRecognised | f.MessageSpooled | f.MessageUnrouted | f.PublishLeftUncertain | f.PublishRefused
_NOT_COUNTED = frozenset(kind for kind, projection in PROJECTIONS.items() if projection.no_metric)

#: A span that shows what a number counts, or the attempt that has one, the value it had there, and when (wall seconds).
Example = tuple[f.Delivery | Place, float, float]


#: What one kind of failed attempt adds to: errors, its labels there, durations, its labels there.
_Failing = tuple[dict[Labels, float], Labels, Buckets, Labels]


class Counts:
    """What the facts of one bus add up to. Thread-safe; series only come, and numbers only grow."""

    def __init__(self, endpoint: str) -> None:
        self.destinations = LabelCap()
        self.counters: dict[str, dict[Labels, float]] = {}
        self.histograms: dict[str, dict[Labels, Buckets]] = {}
        #: The last trace for a counter's series, or for one bucket of a histogram's.
        self.examples: dict[tuple[str, Labels, int], Example] = {}
        self.connected = True
        self._failing: dict[tuple[str, str, str, str, str], _Failing] = {}
        self._endpoint = endpoint
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """In the child: a thread that held the lock is not there to release it."""
        self._lock = threading.Lock()

    def count(self, fact: f.Fact, failure: Failure | None, example: f.Delivery | Place | None = None) -> None:
        """Add `fact`, which is the error `failure`, if any. `example`: an attempt, or a span, whose trace shows it."""
        if type(fact) in _NOT_COUNTED:
            if example is not None and type(fact) is f.MessagePublished:
                self.published(fact, example)
            return
        with self._lock:
            if failure is not None:
                self._error(failure, example, fact.at)
            self._count(fact, example)

    def failed(self, fact: f.AttemptFailed, failure: Failure, example: f.Delivery | None) -> None:
        """As `count`, for the most frequent fact of all that goes wrong."""
        delivery, at, duration_s = fact.delivery, fact.at, fact.duration_s
        destination = self.destinations.bound(delivery.destination)
        if destination == OTHER:
            self.destinations.bound(delivery.destination)  # it did not fit into either of two series
        kind = (failure.component, failure.category, failure.severity, destination, delivery.subscription)
        with self._lock:
            errors, labels, buckets, attempts = self._failing.get(kind) or self._find_failing(kind)
            errors[labels] += 1
            bucket = bisect_left(buckets.bounds, duration_s)
            buckets.counts[bucket] += 1
            buckets.total += duration_s
            if example is not None:
                self.examples["errors_total", labels, 0] = (example, 1.0, at)
                self.examples["process_duration_seconds", attempts, bucket] = (example, duration_s, at)

    def _find_failing(self, kind: tuple[str, str, str, str, str]) -> _Failing:
        component, category, severity, destination, subscription = kind
        errors = self.counters.setdefault("errors_total", {})
        labels = (component, category, severity, destination)
        errors.setdefault(labels, 0)
        attempts = (destination, subscription, "failed")
        durations = self.histograms.setdefault("process_duration_seconds", {})
        if attempts not in durations:
            durations[attempts] = Buckets(BY_NAME["process_duration_seconds"].bounds)
        found = self._failing[kind] = (errors, labels, durations[attempts], attempts)
        return found

    def published(self, fact: f.MessagePublished, example: f.Delivery | Place) -> None:
        """Accepted messages are counted by the core; how long a sampled one took has its trace all the same."""
        labels = (self.destinations.bound(fact.destination), "accepted")
        self._show("publish_duration_seconds", labels, fact.duration_s, example, fact.at)

    def succeeded(self, delivery: f.Delivery, duration_s: float, at: float) -> None:
        """An attempt that has a span, for an example: the core counts it. `delivery` is kept, so without a payload."""
        labels = (self._destination(delivery), delivery.subscription, "succeeded")
        self._show("process_duration_seconds", labels, duration_s, delivery, at)

    def _show(self, name: str, labels: Labels, value: float, example: f.Delivery | Place, at: float) -> None:
        with self._lock:
            self.examples[name, labels, bisect_left(BY_NAME[name].bounds, value)] = (example, value, at)

    def _error(self, failure: Failure, example: f.Delivery | Place | None, at: float) -> None:
        labels = (failure.component, failure.category, failure.severity, self.destinations.bound(failure.destination))
        self._add("errors_total", labels)
        if example is not None:
            self.examples["errors_total", labels, 0] = (example, 1.0, at)

    def _count(self, fact: f.Fact, example: f.Delivery | Place | None) -> None:
        labels: Labels
        match fact:
            case f.AttemptFailed():
                pass  # by `failed`
            case f.RetryScheduled():
                pass  # counted when it ends (f.RecoveryEnded)
            case f.RecoveryEnded():
                kind = (fact.category._value_, fact.action)
                labels = (*kind, fact.outcome, self._destination(fact.delivery))
                self._add("recovery_attempts_total", labels)
                self._observe("recovery_duration_seconds", kind, fact.duration_s)
            case f.DeliveryDeadLettered():
                self._settled(fact.delivery, fact.at, "dead_lettered")
                self._add("dead_letters_total", (fact.delivery.subscription, fact.report.category._value_))
            case f.DeliveryExpired():
                self._settled(fact.delivery, fact.at, "expired")
            case f.DeliveryDiscarded():
                # A discarded dead letter was settled when it died, and is not settled twice.
                if fact.reason != "dead_letter":
                    self._settled(fact.delivery, fact.at, "discarded")
            case f.MessageUnrouted():
                self._published(fact.destination, "unrouted", fact, example)
            case f.DuplicateRecognised():
                self._published(fact.destination, "duplicate", fact, example)
            case f.PublishRefused():
                self._published(fact.destination, "rejected", fact, example)
            case f.PublishLeftUncertain():
                self._published(fact.destination, "uncertain", fact, example)
            case f.MessageSpooled():
                self._published(fact.destination, "spooled", fact, example)
            case f.BackpressureApplied():
                self._add("backpressure_seconds_total", (fact.subscription,), fact.waited_s)
            case f.OverflowHandled():
                self._add("overflow_actions_total", (fact.subscription, fact.action))
            case f.DeliveryRedelivered():
                self._add("redeliveries_total", (fact.delivery.subscription, fact.reason))
            case f.BreakerStateChanged():
                labels = (fact.breaker, fact.kind, fact.subscription, fact.from_state, fact.to_state)
                self._add("breaker_transitions_total", labels)
            case f.TransportFailed():
                self.connected = False
            case f.TransportRecovered():
                self.connected = True
                self._add("reconnects_total", (self._endpoint,))
            case f.ConnectionRestored():
                self._add("reconnects_total", (fact.endpoint,))
            case f.RecoveryConcluded():
                kind = (fact.category._value_, fact.action)
                self._add("recovery_attempts_total", (*kind, fact.outcome, ""))
                if fact.outcome != "refused":
                    self._observe("recovery_duration_seconds", kind, fact.duration_s)
            case f.EscalationNotified():
                self._add("escalations_total", (fact.severity._value_, fact.channel, fact.outcome))
            case (
                f.CodecFellBack()
                | f.ConnectionLost()
                | f.CredentialsRefreshed()
                | f.EmergencyReconciled()
                | f.EmergencyStopBegan()
                | f.ErrorReported()
                | f.IntakePaused()
                | f.JournalFailed()
                | f.LedgerUnbalanced()
                | f.ManifestQuarantined()
                | f.ObserverFailed()
                | f.OwnerLost()
                | f.SettlementRefused()
                | f.SubscriptionPaused()
            ):
                pass  # an error and nothing else: counted above
            case (
                f.AttemptAbandoned()
                | f.AttemptOverdue()
                | f.BusStarted()
                | f.BusStopped()
                | f.DeadLetterDiscarded()
                | f.DeadLetterReplayed()
                | f.DeliveryGivenBack()
                | f.DeliveryHandled()
                | f.MessagePublished()
                | f.SlotRegained()
                | f.SubscriptionDeclared()
                | f.SubscriptionForgotten()
                | f.SubscriptionResumed()
                | f.EmergencyStopEnded()
                | f.EscalationAcknowledged()
                | f.EscalationOpened()
                | f.EscalationResolved()
                | f.FaultHealed()
                | f.FaultInjected()
                | f.HealthChanged()
                | f.IntakeResumed()
                | f.LoadRegained()
                | f.LoadShed()
                | f.RecoveryStarted()
                | f.SpoolForwarded()
                | f.TimeoutAdapted()
            ):
                pass  # counted elsewhere, or a state: `catalogue.PROJECTIONS` says which
            case _:
                assert_never(fact)

    def _destination(self, delivery: f.Delivery) -> str:
        return self.destinations.bound(delivery.destination)

    def _published(self, destination: str, outcome: str, fact: _Published, example: f.Delivery | Place | None) -> None:
        labels = (self.destinations.bound(destination), outcome)
        self._add("messages_published_total", labels)
        self._observe("publish_duration_seconds", labels, fact.duration_s, example, fact.at)

    def _settled(self, delivery: f.Delivery, at: float, result: str) -> None:
        labels = (self._destination(delivery), delivery.subscription, result)
        self._add("messages_settled_total", labels)
        envelope = delivery.envelope
        self._observe("message_age_seconds", labels, max(0.0, at - (envelope.due_at or envelope.published_at)))

    def _add(self, name: str, labels: Labels, by: float = 1) -> None:
        series = self.counters.get(name)
        if series is None:
            series = self.counters[name] = {}
        series[labels] = series.get(labels, 0) + by

    def _observe(
        self, name: str, labels: Labels, value: float, example: f.Delivery | Place | None = None, at: float = 0.0
    ) -> None:
        series = self.histograms.get(name)
        if series is None:
            series = self.histograms[name] = {}
        buckets = series.get(labels)
        if buckets is None:
            buckets = series[labels] = Buckets(BY_NAME[name].bounds)
        buckets.observe(value)
        if example is not None:
            bucket = bisect_left(buckets.bounds, value)
            self.examples[name, labels, bucket] = (example, value, at)
