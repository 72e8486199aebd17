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
from operator import add, attrgetter
from typing import Protocol

from glassbus.errors import GlassbusError
from glassbus.facts import Delivery
from glassbus.policy.ledger import Account
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


def pause() -> None:
    """Let other threads run. They need a moment to wake: who asks for the interpreter again at once has it again."""
    time.sleep(0.00005)


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

    def rest(self, parts: Mapping[str, Mapping[Labels, float]]) -> None:
        """Series that are there from the start, at 0: to be told before anything is added to them."""
        for name, series in parts.items():
            if self.values[name]:
                self.values[name].update(series)
            else:
                self.values[name] = dict(series)

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
            counts = list(map(add, counts, buckets.counts))
        else:
            counts = counts.copy()
            for bound, count in zip((*buckets.bounds, float("inf")), buckets.counts, strict=True):
                counts[bisect_left(bounds, bound)] += count
        self.histograms[name][labels] = (bounds, counts, total + buckets.total)

    def read(self, bus: str, scraped: Scraped, source: Source) -> int:
        """Read all of a bus; how many of its parts could not be read, and are left out."""
        unread = 0
        for part in _PARTS:
            pause()
            if scraped.stopped and part is _read_store:
                part = _read_closed_store  # in its place
            try:
                part(self, bus, scraped, source)
            except Exception:  # noqa: BLE001 - the store may be down, and the rest of the scrape shows it
                unread += 1
        return unread


#: Series by metric, at 0.
_Rest = dict[str, dict[Labels, float]]
#: Most scrapes have the very series of the one before, so these are made once for each bus: there are thousands.
_BUSES_MAX = 8


@lru_cache(_BUSES_MAX)
def _of_subscriptions(bus: str, names: tuple[str, ...]) -> tuple[_Rest, list[tuple[Labels, dict[str, Labels]]]]:
    """At rest, and for each subscription its labels, and those of its states."""
    reasons = BY_NAME["redeliveries_total"].labels["reason"]
    actions = BY_NAME["overflow_actions_total"].labels["action"]
    every: list[Labels] = [(bus, name) for name in names]
    each: list[tuple[Labels, dict[str, Labels]]] = [
        (labels, {state: (*labels, state) for state in catalogue.SUBSCRIPTION_STATES}) for labels in every
    ]
    return {
        "subscription_state": {labels: 0.0 for _, states in each for labels in states.values()},
        "redeliveries_total": {(*labels, reason): 0.0 for labels in every for reason in reasons},
        "dead_letters_total": {(*labels, category): 0.0 for labels in every for category in catalogue.CATEGORIES},
        "overflow_actions_total": {(*labels, action): 0.0 for labels in every for action in actions},
        "backpressure_seconds_total": dict.fromkeys(every, 0.0),
    }, each


@lru_cache(_BUSES_MAX)
def _of_breakers(
    bus: str, breakers: tuple[tuple[str, str, str], ...]
) -> tuple[_Rest, list[tuple[tuple[Labels, ...], dict[str, Labels]]]]:
    """At rest, and for each breaker (name, kind, subscription) the labels of its calls, and those of its states."""
    each: list[tuple[tuple[Labels, ...], dict[str, Labels]]] = [
        (
            tuple((bus, name, kind, result) for result in ("succeeded", "failed", "refused")),
            {state: (bus, name, kind, subscription, state) for state in catalogue.BREAKER_STATES},
        )
        for name, kind, subscription in breakers
    ]
    return {
        "breaker_state": {labels: 0.0 for _, states in each for labels in states.values()},
        "breaker_transitions_total": {(bus, *one, *move): 0.0 for one in breakers for move in catalogue.USUAL_MOVES},
        "breaker_calls_total": {labels: 0.0 for calls, _ in each for labels in calls},
    }, each


@lru_cache(_BUSES_MAX)
def _of_tallies(bus: str, tallies: tuple[tuple[str, str], ...]) -> tuple[_Rest, list[tuple[Labels, ...]]]:
    """At rest, and for each tally (destination, subscription) its labels, by how it went."""
    ways = ("handled", "succeeded", "failed", "late")
    each: list[tuple[Labels, ...]] = [tuple((bus, *one, way) for way in ways) for one in tallies]
    return {"messages_settled_total": {(bus, *one, way): 0.0 for one in tallies for way in catalogue.RESULTS}}, each


#: Of an account, in the order of the states.
_COUNTS: Callable[[Account], tuple[int, ...]] = attrgetter(*catalogue.QUEUE_STATES)


@lru_cache(_BUSES_MAX)
def _of_queues(bus: str, names: tuple[str, ...]) -> list[tuple[Labels, tuple[Labels, ...]]]:
    """For each queue its labels, and those of its messages by where they are."""
    return [((bus, name), tuple((bus, name, state) for state in catalogue.QUEUE_STATES)) for name in names]


def _read_tallies(scrape: Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    bound = scraped.counts.destinations.bound
    for published in source.publish_tallies():
        labels = (bus, bound(published.destination), "accepted")
        scrape.add("messages_published_total", labels, published.accepted)
        scrape.observe("publish_duration_seconds", labels, published.duration)
    pause()
    tallies = list(source.tallies())
    at_rest, each = _of_tallies(bus, tuple((bound(tally.destination), tally.subscription) for tally in tallies))
    scrape.rest(at_rest)
    settled = scrape.values["messages_settled_total"]
    for tally, (handled, succeeded, failed, late) in zip(tallies, each, strict=True):
        settled[handled] += tally.handled
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
    views = list(source.subscribers())
    at_rest, each = _of_subscriptions(bus, tuple(view.name for view in views))
    scrape.rest(at_rest)
    gauges = ("handlers_in_flight", "handlers_limit", "handlers_overdue", "handler_timeout_seconds")
    in_flight, limit, overdue, timeout = (scrape.values[name] for name in gauges)
    running = scrape.values["subscription_state"]
    for view, (labels, states) in zip(views, each, strict=True):
        in_flight[labels] = view.in_flight
        limit[labels] = view.limit
        overdue[labels] = view.overdue
        timeout[labels] = view.timeout_s
        state = states.get(view.state)
        if state is not None:
            running[state] = 1.0
        if view.handling:
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
    views += [_Unused(name) for name in names if name not in used]
    at_rest, each = _of_breakers(bus, tuple((view.name, view.kind, view.subscription) for view in views))
    scrape.rest(at_rest)
    calls, open_or_not = scrape.values["breaker_calls_total"], scrape.values["breaker_state"]
    for view, ((succeeded, failed, refused), states) in zip(views, each, strict=True):
        state = states.get(view.state)
        if state is not None:
            open_or_not[state] += 1.0
        calls[succeeded] += view.succeeded_count
        calls[failed] += view.failed_count
        calls[refused] += view.refused


def _read_store(scrape: Scrape, bus: str, scraped: Scraped, source: Source) -> None:
    now = scraped.now()
    ledger = source.ledger()
    accounts = ledger.accounts
    messages, dead = scrape.values["queue_messages"], scrape.values["dead_letter_messages"]
    for account, (labels, states) in zip(accounts.values(), _of_queues(bus, tuple(accounts)), strict=True):
        for state, count in zip(states, _COUNTS(account), strict=True):
            messages[state] = count
        dead[labels] = account.dead_lettered
    scrape.add("messages_unaccounted", (bus,), ledger.unaccounted)
    queues = source.queues()
    gauges = ("queue_capacity_messages", "queue_oldest_message_age_seconds", "dead_letter_oldest_age_seconds")
    capacity, oldest, dead_oldest = (scrape.values[name] for name in gauges)
    consumers = scrape.values["subscription_consumers"]
    for queue, (labels, _) in zip(queues.values(), _of_queues(bus, tuple(queues)), strict=True):
        capacity[labels] = queue.capacity
        oldest[labels] = _age(now, queue.oldest_at)
        dead_oldest[labels] = _age(now, queue.dead_letter_oldest_at)
        consumers[labels] = queue.consumers
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
    # First of all, for an alert takes a bus without it to be gone, whatever else of it cannot be read.
    scrape.add("build_info", (bus, scraped.version, platform.python_version(), source.transport), 1)
    scrape.one_hot("health_status", (bus,), catalogue.HEALTH_STATES, source.health().status)
    scrape.add("journal_dropped_total", (bus,), source.journal_dropped())
    scrape.add("error_memory_bytes", (bus,), source.error_memory_bytes())
    still_open = source.escalations_open()
    for severity in catalogue.SEVERITIES:
        scrape.add("escalations_open", (bus, severity), still_open.get(severity, 0))
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
