"""Nothing is declared that no bus ever says: each span with each of its attributes, links and events, each metric."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from glassbus import KillSwitch, Message, MessageBus, PublishRejected, Retry
from glassbus.facts import AttemptFailed, AttemptOverdue, BusStopped, ConnectionRestored, CredentialsRefreshed, Delivery
from glassbus.message import Envelope
from glassbus.observer import ALL_FACTS
from glassbus.record.tally import DURATION_BOUNDS, Buckets
from glassbus.telemetry import configure, exposition, observe
from glassbus.telemetry.catalogue import CATEGORIES, METRICS, SPANS
from glassbus.telemetry.governor import LABEL_VALUES_MAX, FloodBudget
from glassbus.testing import VirtualClock, run_virtual
from tests.facts_kit import sample
from tests.telemetry.conftest import FakeConnection, FakeSource

HEADERS = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}


async def live(clock: VirtualClock, kept: Any) -> None:
    """A bus on which everything happens that happens to messages."""
    bus = MessageBus(clock=clock, registry=CollectorRegistry(), tracer_provider=kept.provider, untrusted=["partner"])
    broken = True

    switch = KillSwitch(minimum=2, open_for=1.0)

    @bus.subscribe("orders.*", name="charge", retry=Retry(max_attempts=3, immediate=1), kill_switch=switch)
    async def charge(message: Message[Any]) -> None:
        if broken:
            raise ValueError

    @bus.subscribe("partner", name="partner", retry=Retry(max_attempts=1), kill_switch=KillSwitch(enabled=False))
    async def partner(message: Message[Any]) -> None:
        raise ValueError

    @bus.subscribe("slow", name="slow", timeout=600.0)
    async def slow(message: Message[Any]) -> None:
        await asyncio.sleep(500.0)

    async with bus:
        await bus.publish("partner", headers=HEADERS)
        for _ in range(3):
            await bus.publish("orders.created")
        with contextlib.suppress(PublishRejected):
            await bus.publish("no topic!")
        await asyncio.sleep(30.0)
        broken = False
        for dead in await bus.dead_letters.list():
            await bus.dead_letters.replay(dead.id)
        await asyncio.sleep(30.0)
        await bus.publish("slow")
        await asyncio.sleep(1.0)
        await bus.stop(1.0)


def told(kept: Any) -> None:
    """What other stores state, by its facts, and a flood."""
    source = FakeSource(address="nats://one:4222")
    source.transport = "nats"
    observer = observe(source, registry=CollectorRegistry(), tracer_provider=kept.provider, wall=lambda: 100.0)
    for kind in sorted(ALL_FACTS, key=lambda kind: kind.__name__):
        observer.on_fact(sample(kind))
    observer.on_fact(sample(ConnectionRestored, failed_over_from="nats://two:4222"))
    observer.on_fact(sample(CredentialsRefreshed, succeeded=True))
    envelope = Envelope("m-2", "orders.created", b"", "json", HEADERS)
    again = Delivery(envelope, "charge", "orders.*", 2, redelivered="lease_expired")
    with observer.scope(again):
        observer.on_fact(sample(AttemptOverdue, delivery=again))
    # A flood: the first failure, one that is only counted, and the next that tells of it.
    at = [0.0]
    observer.tracing.budget = FloodBudget(first=1, per_second=1.0, monotonic=lambda: at[0])
    for at[0] in (0.0, 0.1, 5.0):
        observer.on_fact(sample(AttemptFailed))


@pytest.fixture
def everything(spans: Any) -> tuple[ReadableSpan, ...]:
    kept = spans(1.0)
    run_virtual(lambda clock: live(clock, kept))
    told(kept)
    found: tuple[ReadableSpan, ...] = kept.all()
    return found


def test_every_declared_span_attribute_link_and_event_is_seen(everything: tuple[ReadableSpan, ...]) -> None:
    unseen = {}
    for span in SPANS:
        mine = [one for one in everything if one.name.partition(" ")[0] == span.name.partition(" ")[0]]
        said = {name for one in mine for name in one.attributes or {}}
        linked = {str((link.attributes or {})["glassbus.link"]) for one in mine for link in one.links}
        happened = {event.name for one in mine for event in one.events}
        missing = {*span.attributes} - said | {*span.links} - linked | {*span.events} - happened
        if missing or not mine:
            unseen[span.name] = missing
    assert unseen == {}


class Down(InMemorySpanExporter):
    """One that exports nothing."""

    def export(self, spans: Any) -> SpanExportResult:
        return SpanExportResult.FAILURE


def test_every_declared_metric_and_label_value_that_is_a_state_is_scraped(
    no_global_provider: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counters count; gauges with one series for each state show all of them; no family is there by its name alone."""
    registry = CollectorRegistry()
    source: Any = FakeSource(address="nats://one:4222")
    source.endpoints, source.disk, source.failures = [FakeConnection()], 1000, {"Mine": 1}
    source.subscriber.handling = {category: Buckets(DURATION_BOUNDS) for category in CATEGORIES}
    source.tally.handled = source.published.accepted = source.breaker.failed_count = 1
    monkeypatch.setattr(source, "journal_dropped", lambda: 1)
    with configure(exporter=Down()) as telemetry:
        observer = observe(source, registry=registry, wall=lambda: 100.0)
        facts = ALL_FACTS - {BusStopped}  # a stopped bus has no store to be asked
        for kind in sorted(facts, key=lambda kind: kind.__name__):
            observer.on_fact(sample(kind))
        observer.tracing.budget = FloodBudget(first=1, per_second=1.0, monotonic=lambda: 0.0)
        for number in range(LABEL_VALUES_MAX + 1):
            envelope = Envelope(f"m-{number}", "orders.created", b"", "json", {})
            observer.on_fact(sample(AttemptFailed, delivery=Delivery(envelope, "charge", f"orders-{number}", 1)))
        telemetry.flush(20.0)  # each span is lost, if not before
        source.store_down = True
        exposition(registry)  # a scrape that cannot read all, and takes time, which the next one tells
        source.store_down = False
        families = {family.name: family for family in registry.collect()}
    for metric in METRICS:
        family = families[metric.full_name.removesuffix("_total")]
        assert family.samples, metric.name
        if metric.type == "counter":
            counted = [one.value for one in family.samples if one.name == metric.full_name]
            assert max(counted, default=0.0) > 0.0, metric.name
        for label in {"state", "status", "queue"} & set(metric.labels) if metric.type == "gauge" else ():
            assert {one.labels[label] for one in family.samples} == set(metric.labels[label]), (metric.name, label)
