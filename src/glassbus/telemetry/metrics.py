"""The Prometheus side: one collector for each registry serves all its buses.

Nothing is written when a message is handled: a scrape reads the core's integers,
the counts of the facts, and the states, and makes samples of them.

A bus is held weakly. Its series stay while it lives, stopped or not, so that its
last counts can still be scraped; they go when it is garbage collected, or when
another bus of the same name is made after it has stopped. Two buses of one name that live
at the same time are told apart as `name` and `name-2`.
"""

from __future__ import annotations

import logging
import platform
import sys
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import REGISTRY, CollectorRegistry
from prometheus_client.samples import Exemplar, Sample
from prometheus_client.utils import floatToGoString

from glassbus.facts import Delivery
from glassbus.record.tally import Buckets
from glassbus.telemetry import catalogue
from glassbus.telemetry.catalogue import BY_NAME, METRICS, PREFIX, Metric
from glassbus.telemetry.counts import Counts, Labels
from glassbus.telemetry.propagation import Place
from glassbus.telemetry.source import Source

_log = logging.getLogger(__name__)

Histogram = tuple[tuple[float, ...], list[int], float]


class QueueView(Protocol):
    """A queue of spans on their way out."""

    name: str
    capacity: int
    export_failures: int

    @property
    def dropped(self) -> dict[str, int]: ...
    def __len__(self) -> int: ...


class Scraped(Protocol):
    """A bus with its counts, as the collector holds it."""

    name: str
    version: str
    stopped: bool
    fact_seconds: float
    counts: Counts

    @property
    def source(self) -> Source | None:
        """None when the bus is gone."""

    @property
    def summarised(self) -> int: ...
    def now(self) -> float:
        """Wall seconds."""

    def place(self, delivery: Delivery, /) -> Place:
        """The span of an attempt."""


class _Scrape:
    """The samples of one scrape. Series that a label cap made equal are added up."""

    def __init__(self) -> None:
        self.values: dict[str, dict[Labels, float]] = {metric.name: {} for metric in METRICS}
        self.histograms: dict[str, dict[Labels, Histogram]] = {metric.name: {} for metric in METRICS}
        self.examples: dict[tuple[str, Labels, int], tuple[Place, float, float]] = {}

    def add(self, name: str, labels: Labels, value: float = 0) -> None:
        series = self.values[name]
        series[labels] = series.get(labels, 0) + value

    def one_hot(self, name: str, labels: Labels, states: Iterable[str], current: str) -> None:
        for state in states:
            self.add(name, (*labels, state), float(state == current))

    def observe(self, name: str, labels: Labels, buckets: Buckets | None = None) -> None:
        found = self.histograms[name].get(labels)
        if found is None:
            bounds = buckets.bounds if buckets is not None else BY_NAME[name].bounds
            found = self.histograms[name][labels] = (bounds, [0] * (len(bounds) + 1), 0.0)
        if buckets is None:
            return
        bounds, counts, total = found
        if bounds == buckets.bounds:
            for at, count in enumerate(buckets.counts):
                counts[at] += count
        else:
            for bound, count in zip((*buckets.bounds, float("inf")), buckets.counts, strict=True):
                counts[bisect_left(bounds, bound)] += count
        self.histograms[name][labels] = (bounds, counts, total + buckets.total)

    def families(self) -> Iterator[Family]:
        for metric in METRICS:
            family = _family(metric)
            if metric.type == "histogram":
                for labels, histogram in self.histograms[metric.name].items():
                    family.samples.extend(self._histogram(metric, labels, histogram))
            else:
                for labels, value in self.values[metric.name].items():
                    example = self.examples.get((metric.name, labels, 0))
                    family.samples.append(
                        Sample(metric.full_name, _named(metric, labels), value, None, _exemplar(example))
                    )
            yield family

    def _histogram(self, metric: Metric, labels: Labels, histogram: Histogram) -> Iterator[Sample]:
        bounds, counts, total = histogram
        name, named = metric.full_name, _named(metric, labels)
        running = 0
        for at, count in enumerate(counts):
            running += count
            le = _le(bounds[at]) if at < len(bounds) else "+Inf"
            example = self.examples.get((metric.name, labels, at))
            yield Sample(f"{name}_bucket", {**named, "le": le}, running, None, _exemplar(example))
        yield Sample(f"{name}_count", named, running)
        yield Sample(f"{name}_sum", named, total)


def _le(bound: float) -> str:
    text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
    return text


def _named(metric: Metric, labels: Labels) -> dict[str, str]:
    return dict(zip(("bus", *metric.labels), labels, strict=True))


def _family(metric: Metric) -> Family:
    name = metric.full_name.removesuffix("_total") if metric.type == "counter" else metric.full_name
    return Family(name, metric.help, metric.type, metric.unit)


def _exemplar(example: tuple[Place, float, float] | None) -> Exemplar | None:
    if example is None:
        return None
    place, value, at = example
    return Exemplar({"trace_id": f"{place.trace_id:032x}", "span_id": f"{place.span_id:016x}"}, value, at)


class BusCollector:
    """Collects every bus of one registry. Thread-safe; a part of a bus that cannot be read is left out, counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buses: list[tuple[str, weakref.ref[Scraped]]] = []
        self._seconds = 0.0
        self._unread = 0

    def add(self, scraped: Scraped) -> str:
        """Serve `scraped` from now on, under the label that is returned."""
        with self._lock:
            alive = [(label, ref, bus) for label, ref in self._buses if (bus := ref()) is not None]
            kept = [(label, ref) for label, ref, bus in alive if not (bus.stopped and bus.name == scraped.name)]
            taken = {label for label, _ in kept}
            label, number = scraped.name, 1
            while label in taken:
                number += 1
                label = f"{scraped.name}-{number}"
            if number > 1:
                _log.warning("another bus named %r is alive; the metrics of this one say bus=%r", scraped.name, label)
            self._buses = [*kept, (label, weakref.ref(scraped))]
            return label

    def describe(self) -> list[Family]:
        return [_family(metric) for metric in METRICS]

    def collect(self) -> Iterator[Family]:
        began = time.perf_counter()
        scrape = _Scrape()
        first = ""
        for label, ref in list(self._buses):
            scraped = ref()
            source = scraped.source if scraped is not None else None
            if scraped is not None and source is not None:
                self._read(scrape, label, scraped, source)
                first = first or label
        self._seconds += time.perf_counter() - began
        if first:
            # Of the process, not of a bus: the first one stands for it, so that a sum is right.
            scrape.add("telemetry_seconds_total", (first, "scrape"), self._seconds)
            scrape.add("telemetry_scrape_failures_total", (first,), self._unread)
            _read_queues(scrape, first)
        yield from scrape.families()

    def _read(self, scrape: _Scrape, bus: str, scraped: Scraped, source: Source) -> None:
        parts: tuple[Callable[[_Scrape, str, Scraped, Source], None], ...] = (
            _read_tallies,
            _read_counts,
            _read_subscribers,
            _read_breakers,
            _read_store,
            _read_bus,
            _read_telemetry,
        )
        for part in parts:
            if scraped.stopped and part is _read_store:
                continue  # a closed store has nothing to say
            try:
                part(scrape, bus, scraped, source)
            except Exception:  # noqa: BLE001 - the store may be down, and the rest of the scrape shows it
                self._unread += 1


def _read_tallies(scrape: _Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    bound = scraped.counts.destinations.bound
    for published in source.publish_tallies():
        labels = (bus, bound(published.destination), "accepted")
        scrape.add("messages_published_total", labels, published.accepted)
        scrape.observe("publish_duration_seconds", labels, published.duration)
    for tally in source.tallies():
        labels = (bus, bound(tally.destination), tally.subscription)
        for result in catalogue.RESULTS:
            scrape.add("messages_settled_total", (*labels, result), tally.handled if result == "handled" else 0)
        scrape.observe("message_age_seconds", (*labels, "handled"), tally.age)
        scrape.observe("process_duration_seconds", (*labels, "succeeded"), tally.duration)
        scrape.observe("process_duration_seconds", (*labels, "failed"))
        if tally.late:
            scrape.observe("process_duration_seconds", (*labels, "late"), tally.late_duration)


def _read_counts(scrape: _Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    counts = scraped.counts
    for category, severity in catalogue.PAIRS:
        scrape.add("errors_total", (bus, "handler", category, severity, ""))
    for category in catalogue.CATEGORIES:
        for action in catalogue.RETRY_ACTIONS:
            for outcome in ("succeeded", "failed"):
                scrape.add("recovery_attempts_total", (bus, category, action, outcome, ""))
    scrape.add("reconnects_total", (bus, source.address))
    scrape.add("connection_up", (bus, source.address), float(counts.connected and not scraped.stopped))
    for name, series in list(counts.counters.items()):
        for labels, value in list(series.items()):
            scrape.add(name, (bus, *labels), value)
    for name, observed in list(counts.histograms.items()):
        for labels, buckets in list(observed.items()):
            scrape.observe(name, (bus, *labels), buckets)
    for (name, labels, bucket), (attempt, value, at) in list(counts.examples.items()):
        scrape.examples[name, (bus, *labels), bucket] = (scraped.place(attempt), value, at)


def _read_subscribers(scrape: _Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    for view in source.subscribers():
        labels = (bus, view.name)
        scrape.add("handlers_in_flight", labels, view.in_flight)
        scrape.add("handlers_limit", labels, view.limit)
        scrape.add("handlers_overdue", labels, view.overdue)
        scrape.add("handler_timeout_seconds", labels, view.timeout_s)
        scrape.one_hot("subscription_state", labels, catalogue.SUBSCRIPTION_STATES, view.state)
        for reason in BY_NAME["redeliveries_total"].labels["reason"]:
            scrape.add("redeliveries_total", (*labels, reason))
        for category, buckets in dict(view.handling).items():
            scrape.observe("error_handling_seconds", (bus, category), buckets)
        for category in catalogue.CATEGORIES:
            scrape.add("dead_letters_total", (*labels, category))
        for action in BY_NAME["overflow_actions_total"].labels["action"]:
            scrape.add("overflow_actions_total", (*labels, action))
        scrape.add("backpressure_seconds_total", labels)


def _read_breakers(scrape: _Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    for view in source.breaker_views():
        labels = (bus, view.name, view.kind)
        scrape.one_hot("breaker_state", (*labels, view.subscription), catalogue.BREAKER_STATES, view.state)
        for move in catalogue.USUAL_MOVES:
            scrape.add("breaker_transitions_total", (*labels, view.subscription, *move))
        scrape.add("breaker_calls_total", (*labels, "succeeded"), view.succeeded_count)
        scrape.add("breaker_calls_total", (*labels, "failed"), view.failed_count)
        scrape.add("breaker_calls_total", (*labels, "refused"), view.refused)


def _read_store(scrape: _Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    now = scraped.now()
    ledger = source.ledger()
    for name, account in ledger.accounts.items():
        for state in catalogue.QUEUE_STATES:
            scrape.add("queue_messages", (bus, name, state), getattr(account, state))
        scrape.add("dead_letter_messages", (bus, name), account.dead_lettered)
    scrape.add("messages_unaccounted", (bus,), ledger.unaccounted)
    for name, queue in source.queues().items():
        labels = (bus, name)
        scrape.add("queue_capacity_messages", labels, queue.spec.capacity)
        scrape.add("queue_oldest_message_age_seconds", labels, _age(now, queue.oldest_at))
        scrape.add("dead_letter_oldest_age_seconds", labels, _age(now, queue.dead_letter_oldest_at))
        scrape.add("subscription_consumers", labels, queue.consumers)
    free = source.disk_free_bytes()
    if free is not None:
        scrape.add("disk_free_bytes", (bus,), free)


def _age(now: float, since: float) -> float:
    return max(0.0, now - since) if since else 0.0


def _read_bus(scrape: _Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    scrape.one_hot("health_status", (bus,), catalogue.HEALTH_STATES, source.health().status)
    scrape.add("journal_dropped_total", (bus,), source.journal_dropped())
    age_s = source.round_trip_age_s()
    if age_s is not None:
        scrape.add("last_round_trip_age_seconds", (bus, source.address), age_s)
    build = (bus, scraped.version, platform.python_version(), source.transport)
    scrape.add("build_info", build, 1)
    for observer, failures in source.observer_failures().items():
        scrape.add("observer_failures_total", (bus, observer), failures)


def _read_telemetry(scrape: _Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    scrape.add("telemetry_seconds_total", (bus, "facts"), scraped.fact_seconds)
    scrape.add("telemetry_spans_summarised_total", (bus,), scraped.summarised)
    scrape.add("telemetry_series_overflow_total", (bus, "destination"), scraped.counts.destinations.overflowed)


def _read_queues(scrape: _Scrape, bus: str) -> None:
    for queue in span_queues():
        labels = (bus, queue.name)
        scrape.add("telemetry_queue_spans", labels, len(queue))
        scrape.add("telemetry_queue_capacity_spans", labels, queue.capacity)
        scrape.add("telemetry_export_failures_total", labels, queue.export_failures)
        dropped = dict(queue.dropped)
        for reason in BY_NAME["telemetry_spans_dropped_total"].labels["reason"]:
            scrape.add("telemetry_spans_dropped_total", (*labels, reason), dropped.get(reason, 0))


def span_queues() -> Sequence[QueueView]:
    """The queues that `configure` made in this process."""
    setup = sys.modules.get("glassbus.telemetry.setup")
    return setup.active_queues() if setup is not None else ()


_collectors: weakref.WeakKeyDictionary[CollectorRegistry, BusCollector] = weakref.WeakKeyDictionary()
_collectors_lock = threading.Lock()


def collector_of(registry: CollectorRegistry | None) -> BusCollector:
    """The collector of `registry` (default: the client's own), registered when it is first asked for."""
    chosen = REGISTRY if registry is None else registry
    with _collectors_lock:
        found = _collectors.get(chosen)
        if found is None:
            found = BusCollector()
            try:
                chosen.register(found)
            except ValueError as error:
                _log.warning("metrics named %s… are registered already, so this bus has none: %s", PREFIX, error)
            else:
                _collectors[chosen] = found
        return found


def exposition(registry: CollectorRegistry | None = None, accept: str = "") -> tuple[str, bytes]:
    """(content type, body) of a scrape, in OpenMetrics when `accept` asks for it."""
    chosen = REGISTRY if registry is None else registry
    encode, content_type = choose_encoder(accept)
    return content_type, encode(chosen)
