"""One scrape: what is read from a bus, as plain numbers by metric and labels.

Nothing is written when a message is handled: a scrape reads the core's integers,
the counts of the facts, and the states.
"""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol

from glassbus.errors import GlassbusError
from glassbus.facts import Delivery
from glassbus.record.tally import Buckets
from glassbus.recovery.guard import BreakerView
from glassbus.telemetry import catalogue
from glassbus.telemetry.catalogue import BY_NAME, METRICS
from glassbus.telemetry.counts import Counts, Labels
from glassbus.telemetry.propagation import Place
from glassbus.telemetry.source import Source

#: Bounds, counts, sum.
Histogram = tuple[tuple[float, ...], list[int], float]
#: Where an exemplar's trace is, its value, and when (wall seconds).
Example = tuple[Place, float, float]


class QueueView(Protocol):
    """A queue of spans on their way out."""

    name: str
    capacity: int
    export_failures: int
    seconds: float

    @property
    def dropped(self) -> dict[str, int]: ...
    def __len__(self) -> int: ...


class Scraped(Protocol):
    """A bus with its counts, as the collector holds it."""

    name: str
    version: str
    stopped: bool
    counts: Counts

    @property
    def fact_seconds(self) -> float:
        """Spent on showing facts."""

    @property
    def source(self) -> Source | None:
        """None when the bus is gone."""

    @property
    def summarised(self) -> int: ...
    def now(self) -> float:
        """Wall seconds."""

    def place(self, delivery: Delivery, /) -> Place:
        """The span of an attempt."""


class Scrape:
    """The samples of one scrape. Series that a label cap made equal are added up."""

    def __init__(self) -> None:
        self.values: dict[str, dict[Labels, float]] = {metric.name: {} for metric in METRICS}
        self.histograms: dict[str, dict[Labels, Histogram]] = {metric.name: {} for metric in METRICS}
        self.examples: dict[tuple[str, Labels, int], Example] = {}

    def add(self, name: str, labels: Labels, value: float = 0) -> None:
        series = self.values[name]
        series[labels] = series.get(labels, 0) + value

    def one_hot(self, name: str, labels: Labels, states: Iterable[str], current: str) -> None:
        for state in states:
            self.add(name, (*labels, state), float(state == current))

    def rest(self, parts: Iterable[tuple[str, Mapping[Labels, float]]]) -> None:
        """Series that are there from the start, at 0: to be told before anything is added to them."""
        for name, series in parts:
            self.values[name].update(series)

    def hot(self, name: str, states: Iterable[Labels], current: str) -> None:
        """Of the series `states`, each of which ends with one, that of the `current` one is 1."""
        for labels in states:
            if labels[-1] == current:
                self.add(name, labels, 1.0)

    def observe(self, name: str, labels: Labels, buckets: Buckets | None = None) -> None:
        found = self.histograms[name].get(labels)
        if found is None:
            if buckets is not None:
                self.histograms[name][labels] = (buckets.bounds, buckets.counts.copy(), buckets.total)
            else:
                bounds = BY_NAME[name].bounds
                self.histograms[name][labels] = (bounds, [0] * (len(bounds) + 1), 0.0)
            return
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

    def read(self, bus: str, scraped: Scraped, source: Source) -> int:
        """Read all of a bus; how many of its parts could not be read, and are left out."""
        unread = 0
        for part in _PARTS:
            time.sleep(0)  # let other threads run
            if scraped.stopped and part is _read_store:
                part = _read_closed_store  # in its place
            try:
                part(self, bus, scraped, source)
            except Exception:  # noqa: BLE001 - the store may be down, and the rest of the scrape shows it
                unread += 1
        return unread


#: Series by metric, at 0, and the labels of those that are added to. They are made once: each scrape has thousands.
_Rest = tuple[tuple[tuple[str, dict[Labels, float]], ...], tuple[Labels, ...]]
_KEPT_MAX = 2048


@lru_cache(_KEPT_MAX)
def _of_subscription(bus: str, name: str) -> _Rest:
    labels = (bus, name)
    reasons, actions = (BY_NAME[metric].labels for metric in ("redeliveries_total", "overflow_actions_total"))
    states: dict[Labels, float] = {(*labels, state): 0.0 for state in catalogue.SUBSCRIPTION_STATES}
    series: tuple[tuple[str, dict[Labels, float]], ...] = (
        ("subscription_state", states),
        ("redeliveries_total", {(*labels, reason): 0.0 for reason in reasons["reason"]}),
        ("dead_letters_total", {(*labels, category): 0.0 for category in catalogue.CATEGORIES}),
        ("overflow_actions_total", {(*labels, action): 0.0 for action in actions["action"]}),
        ("backpressure_seconds_total", {labels: 0.0}),
    )
    return series, (labels, *states)


@lru_cache(_KEPT_MAX)
def _of_breaker(bus: str, name: str, kind: str, subscription: str) -> _Rest:
    labels = (bus, name, kind)
    states: dict[Labels, float] = {(*labels, subscription, state): 0.0 for state in catalogue.BREAKER_STATES}
    calls: dict[Labels, float] = {(*labels, result): 0.0 for result in ("succeeded", "failed", "refused")}
    moves: dict[Labels, float] = {(*labels, subscription, *move): 0.0 for move in catalogue.USUAL_MOVES}
    series = (("breaker_state", states), ("breaker_transitions_total", moves), ("breaker_calls_total", calls))
    return series, (*calls, *states)


@lru_cache(_KEPT_MAX)
def _of_tally(bus: str, destination: str, subscription: str) -> _Rest:
    labels = (bus, destination, subscription)
    settled: dict[Labels, float] = {(*labels, result): 0.0 for result in catalogue.RESULTS}
    ways = [(*labels, way) for way in ("handled", "succeeded", "failed", "late")]
    return (("messages_settled_total", settled),), tuple(ways)


@lru_cache(_KEPT_MAX)
def _of_queue(bus: str, name: str) -> tuple[Labels, ...]:
    return (bus, name), *((bus, name, state) for state in catalogue.QUEUE_STATES)


def _read_tallies(scrape: Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    bound = scraped.counts.destinations.bound
    for published in source.publish_tallies():
        labels = (bus, bound(published.destination), "accepted")
        scrape.add("messages_published_total", labels, published.accepted)
        scrape.observe("publish_duration_seconds", labels, published.duration)
    for tally in source.tallies():
        series, (handled, succeeded, failed, late) = _of_tally(bus, bound(tally.destination), tally.subscription)
        if handled not in scrape.values["messages_settled_total"]:  # it is when a label cap made two equal
            scrape.rest(series)
        scrape.add("messages_settled_total", handled, tally.handled)
        scrape.observe("message_age_seconds", handled, tally.age)
        scrape.observe("process_duration_seconds", succeeded, tally.duration)
        scrape.observe("process_duration_seconds", failed)
        if tally.late:
            scrape.observe("process_duration_seconds", late, tally.late_duration)


def _read_counts(scrape: Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    counts = scraped.counts
    for category, severity in catalogue.PAIRS:
        scrape.add("errors_total", (bus, "handler", category, severity, ""))
    for category in catalogue.CATEGORIES:
        for action in catalogue.RETRY_ACTIONS:
            for outcome in ("succeeded", "failed"):
                scrape.add("recovery_attempts_total", (bus, category, action, outcome, ""))
    for _, category, action in _recoveries(source):
        for outcome in ("succeeded", "failed", "refused"):
            scrape.add("recovery_attempts_total", (bus, category, action, outcome, ""))
    for channel in source.escalation_channels():
        for severity in catalogue.SEVERITIES:
            for outcome in BY_NAME["escalations_total"].labels["outcome"]:
                scrape.add("escalations_total", (bus, severity, channel, outcome))
    for name, series in list(counts.counters.items()):
        for labels, value in list(series.items()):
            scrape.add(name, (bus, *labels), value)
    for name, observed in list(counts.histograms.items()):
        for labels, buckets in list(observed.items()):
            scrape.observe(name, (bus, *labels), buckets)
    for (name, labels, bucket), (shown, value, at) in list(counts.examples.items()):
        place = shown if isinstance(shown, Place) else scraped.place(shown)
        scrape.examples[name, (bus, *labels), bucket] = (place, value, at)


def _read_subscribers(scrape: Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    for view in source.subscribers():
        series, (labels, *states) = _of_subscription(bus, view.name)
        scrape.rest(series)
        scrape.add("handlers_in_flight", labels, view.in_flight)
        scrape.add("handlers_limit", labels, view.limit)
        scrape.add("handlers_overdue", labels, view.overdue)
        scrape.add("handler_timeout_seconds", labels, view.timeout_s)
        scrape.hot("subscription_state", states, view.state)
        for category, buckets in dict(view.handling).items():
            scrape.observe("error_handling_seconds", (bus, category), buckets)


def _recoveries(source: Source) -> Iterable[tuple[str, str, str]]:
    """(component, category, action) that may come; an embedded store has no endpoint to connect to."""
    brokers = bool(list(source.connections()))
    return [one for one in catalogue.COMPONENT_RECOVERIES if brokers or one[0] != "endpoint"]


class _Unused:
    """A breaker that is made when it is first needed: closed, and nothing counted."""

    kind = "component"
    subscription = ""
    state = "closed"
    succeeded_count = failed_count = refused = 0

    def __init__(self, name: str) -> None:
        self.name = name


def _read_breakers(scrape: Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    views: list[BreakerView] = list(source.breaker_views())
    used = {view.name for view in views if view.kind == "component"}
    names = dict.fromkeys(f"{component}/{category}" for component, category, _ in _recoveries(source))
    for view in [*views, *(_Unused(name) for name in names if name not in used)]:
        series, (succeeded, failed, refused, *states) = _of_breaker(bus, view.name, view.kind, view.subscription)
        scrape.rest(series)
        scrape.hot("breaker_state", states, view.state)
        scrape.add("breaker_calls_total", succeeded, view.succeeded_count)
        scrape.add("breaker_calls_total", failed, view.failed_count)
        scrape.add("breaker_calls_total", refused, view.refused)


def _read_store(scrape: Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    now = scraped.now()
    ledger = source.ledger()
    for name, account in ledger.accounts.items():
        labels, *states = _of_queue(bus, name)
        for state in states:
            scrape.add("queue_messages", state, getattr(account, state[-1]))
        scrape.add("dead_letter_messages", labels, account.dead_lettered)
    scrape.add("messages_unaccounted", (bus,), ledger.unaccounted)
    for name, queue in source.queues().items():
        labels = _of_queue(bus, name)[0]
        scrape.add("queue_capacity_messages", labels, queue.capacity)
        scrape.add("queue_oldest_message_age_seconds", labels, _age(now, queue.oldest_at))
        scrape.add("dead_letter_oldest_age_seconds", labels, _age(now, queue.dead_letter_oldest_at))
        scrape.add("subscription_consumers", labels, queue.consumers)
    free = source.disk_free_bytes()
    if free is not None:
        scrape.add("disk_free_bytes", (bus,), free)


def _read_closed_store(scrape: Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    """A closed store has nothing to say, but for this: it may be why the bus stopped, and somebody must know."""
    with contextlib.suppress(GlassbusError, OSError):  # it may be able to tell nothing once it is closed
        scrape.add("messages_unaccounted", (bus,), source.ledger().unaccounted)


def _age(now: float, since: float) -> float:
    return max(0.0, now - since) if since else 0.0


def _read_bus(scrape: Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    scrape.one_hot("health_status", (bus,), catalogue.HEALTH_STATES, source.health().status)
    scrape.add("journal_dropped_total", (bus,), source.journal_dropped())
    scrape.add("error_memory_bytes", (bus,), source.error_memory_bytes())
    still_open = source.escalations_open()
    for severity in catalogue.SEVERITIES:
        scrape.add("escalations_open", (bus, severity), still_open.get(severity, 0))
    build = (bus, scraped.version, platform.python_version(), source.transport)
    scrape.add("build_info", build, 1)
    for observer, failures in source.observer_failures().items():
        scrape.add("observer_failures_total", (bus, observer), failures)


def _read_connections(scrape: Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    endpoints = list(source.connections())
    for view in endpoints:
        labels = (bus, view.endpoint)
        scrape.add("connection_up", labels, float(view.up and not scraped.stopped))
        scrape.add("reconnects_total", labels)
        scrape.add("spool_messages", labels, view.spooled)
        if view.round_trip_age_s is not None:
            scrape.add("last_round_trip_age_seconds", labels, view.round_trip_age_s)
    if not endpoints:  # the store is embedded: it is the one endpoint
        labels = (bus, source.address)
        scrape.add("connection_up", labels, float(scraped.counts.connected and not scraped.stopped))
        scrape.add("reconnects_total", labels)
        age_s = source.round_trip_age_s()
        if age_s is not None:
            scrape.add("last_round_trip_age_seconds", labels, age_s)


def _read_telemetry(scrape: Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    scrape.add("telemetry_seconds_total", (bus, "facts"), scraped.fact_seconds)
    scrape.add("telemetry_spans_summarised_total", (bus,), scraped.summarised)
    scrape.add("telemetry_series_overflow_total", (bus, "destination"), scraped.counts.destinations.overflowed)


def read_queues(scrape: Scrape, bus: str) -> None:
    scrape.add("telemetry_seconds_total", (bus, "export"))
    for queue in span_queues():
        labels = (bus, queue.name)
        scrape.add("telemetry_seconds_total", (bus, "export"), queue.seconds)
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


_PARTS: tuple[Callable[[Scrape, str, Scraped, Source], None], ...] = (
    # These three first: they tell which series rest at 0.
    _read_subscribers,
    _read_breakers,
    _read_tallies,
    _read_counts,
    _read_store,
    _read_bus,
    _read_connections,
    _read_telemetry,
)
