"""What a scrape says: the core's numbers, the facts' counts, states as they are, everything at 0 from the start."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.trace import NoOpTracer, TracerProvider
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from glassbus import Message, MessageBus, PublishRejected, Retry
from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity
from glassbus.facts import (
    AttemptFailed,
    BackpressureApplied,
    BreakerStateChanged,
    BusStopped,
    Delivery,
    DeliveryDeadLettered,
    DeliveryDiscarded,
    DeliveryRedelivered,
    PublishRefused,
    TransportFailed,
    TransportRecovered,
)
from glassbus.message import Envelope
from glassbus.policy.ledger import Account
from glassbus.telemetry import catalogue, exposition, observe
from tests.telemetry.conftest import FakeBreaker, FakeConnection

REPORT = ErrorReport(
    error_id="e-1",
    timestamp=100.0,
    category=ErrorCategory.TIMEOUT_ERROR,
    severity=ErrorSeverity.HIGH,
    message="too slow",
    exception_type="TimeoutError",
    fingerprint="f",
)


def delivery(destination: str = "orders.*", published_at: float = 97.0) -> Delivery:
    return Delivery(
        Envelope("m-1", "orders.created", b"", "json", {}, published_at=published_at),
        "charge",
        destination,
        attempt=1,
        started_at=98.0,
    )


class Scrape:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.kind, body = exposition(registry, "application/openmetrics-text; version=1.0.0")
        self.text = body.decode()
        self.families = {family.name: family for family in parse_openmetrics(self.text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The only sample of `name` that has `labels`."""
        found = [s for s in self.samples if s.name == f"glassbus_{name}" and labels.items() <= s.labels.items()]
        assert len(found) == 1, (name, labels, found)
        return float(found[0].value)

    def labels(self, name: str) -> list[dict[str, str]]:
        return [s.labels for s in self.samples if s.name == f"glassbus_{name}"]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_a_bus_that_has_done_nothing_has_its_series_at_zero(source: Any, registry: CollectorRegistry) -> None:
    kept = observe(source, registry=registry)
    scrape = Scrape(registry)
    for result in catalogue.RESULTS:
        labels = {"destination": "orders.*", "subscription": "charge", "result": result}
        assert scrape.value("messages_settled_total", bus="default", **labels) == 0
    for outcome in ("succeeded", "failed"):
        assert scrape.value("process_duration_seconds_count", subscription="charge", outcome=outcome) == 0
    pairs = {(s["category"], s["severity"]) for s in scrape.labels("errors_total")}
    assert pairs == set(catalogue.PAIRS)
    for name in ("backpressure_seconds_total", "messages_unaccounted", "telemetry_spans_summarised_total"):
        assert scrape.value(name) == 0
    for category in catalogue.CATEGORIES:
        assert scrape.value("dead_letters_total", subscription="charge", category=category) == 0
    for from_state, to_state in catalogue.USUAL_MOVES:
        moved = {"breaker": "charge", "from_state": from_state, "to_state": to_state}
        assert scrape.value("breaker_transitions_total", **moved) == 0
    for component in ("queue/queue_overflow", "resources/resource_exhaustion", "configuration/configuration_error"):
        assert scrape.value("breaker_state", breaker=component, state="closed") == 1
        assert scrape.value("breaker_transitions_total", breaker=component, from_state="closed", to_state="open") == 0
        assert scrape.value("breaker_calls_total", breaker=component, outcome="failed") == 0
    for action in ("expand", "shed", "reload"):
        assert scrape.value("recovery_attempts_total", action=action, outcome="failed") == 0
    for channel in ("log", "pager"):
        assert scrape.value("escalations_total", severity="critical", channel=channel, outcome="sent") == 0
    assert [s for s in scrape.labels("recovery_attempts_total") if s["action"] == "reconnect"] == []
    assert "_created" not in scrape.text
    assert kept.name == "default"


def test_a_broker_has_the_series_of_its_connection_and_spool_from_the_start(
    make_source: Callable[..., Any], registry: CollectorRegistry
) -> None:
    source = make_source()
    source.endpoints = [FakeConnection("nats://one:4222"), FakeConnection("nats://two:4222", up=False)]
    kept = observe(source, registry=registry)
    scrape = Scrape(registry)
    for endpoint in ("nats://one:4222", "nats://two:4222"):
        assert scrape.value("spool_messages", endpoint=endpoint) == 0
        assert scrape.value("reconnects_total", endpoint=endpoint) == 0
    for action in ("reconnect", "failover", "refresh_credentials"):
        for outcome in ("succeeded", "failed", "refused"):
            assert scrape.value("recovery_attempts_total", action=action, outcome=outcome) == 0
    for name in ("endpoint/connection_error", "endpoint/authentication_error"):
        assert scrape.value("breaker_state", breaker=name, state="closed") == 1
    # Once it is in use it is read, not assumed.
    source.breaker = FakeBreaker("endpoint/connection_error", "component", "", "open", refused=3)
    scrape = Scrape(registry)
    assert scrape.value("breaker_state", breaker="endpoint/connection_error", state="closed") == 0
    assert scrape.value("breaker_calls_total", breaker="endpoint/connection_error", outcome="refused") == 3
    assert kept.name


def test_happy_counts_are_read_from_the_core(source: Any, registry: CollectorRegistry) -> None:
    kept = observe(source, registry=registry)
    source.published.accepted = 3
    source.published.duration.observe(0.0002)
    source.tally.handled = 2
    source.tally.duration.observe(0.02)
    source.tally.age.observe(0.3)
    source.tally.late = 1
    source.tally.late_duration.observe(9.0)
    scrape = Scrape(registry)
    assert scrape.value("messages_published_total", destination="orders.*", outcome="accepted") == 3
    assert scrape.value("messages_settled_total", result="handled") == 2
    assert scrape.value("process_duration_seconds_count", outcome="late") == 1
    assert scrape.value("process_duration_seconds_sum", outcome="succeeded") == pytest.approx(0.02)
    bucket = {"outcome": "succeeded", "destination": "orders.*"}
    assert scrape.value("process_duration_seconds_bucket", le="0.01", **bucket) == 0
    assert scrape.value("process_duration_seconds_bucket", le="0.025", **bucket) == 1
    assert scrape.value("process_duration_seconds_bucket", le="+Inf", **bucket) == 1
    assert kept.stopped is False


def test_failures_are_counted_from_their_facts(source: Any, registry: CollectorRegistry) -> None:
    observer = observe(source, registry=registry)
    observer.on_fact(AttemptFailed(at=99.0, delivery=delivery(), report=REPORT, duration_s=1.0))
    observer.on_fact(DeliveryDeadLettered(at=100.0, delivery=delivery(), report=REPORT, reason="attempts_spent"))
    observer.on_fact(DeliveryRedelivered(at=1.0, delivery=delivery(), reason="owner_died"))
    observer.on_fact(BackpressureApplied(at=1.0, subscription="charge", waited_s=0.5, admitted=True))
    observer.on_fact(
        PublishRefused(
            at=1.0, topic="t", destination="_other", message_id="", reason="queue_full", error="full", duration_s=0.1
        )
    )
    scrape = Scrape(registry)
    kind = {"component": "handler", "category": "timeout_error", "severity": "high"}
    assert scrape.value("errors_total", destination="orders.*", **kind) == 1
    assert scrape.value("errors_total", component="publish", category="queue_overflow") == 1
    assert scrape.value("messages_settled_total", result="dead_lettered") == 1
    assert scrape.value("message_age_seconds_sum", result="dead_lettered") == 3.0
    assert scrape.value("dead_letters_total", category="timeout_error") == 1
    assert scrape.value("process_duration_seconds_count", outcome="failed") == 1
    assert scrape.value("redeliveries_total", reason="owner_died") == 1
    assert scrape.value("backpressure_seconds_total", subscription="charge") == 0.5
    assert scrape.value("messages_published_total", outcome="rejected") == 1


def test_a_delivery_that_died_unrun_is_an_error_and_a_discarded_dead_letter_is_not_settled_twice(
    source: Any, registry: CollectorRegistry
) -> None:
    observer = observe(source, registry=registry)
    observer.on_fact(DeliveryDeadLettered(at=100.0, delivery=delivery(), report=REPORT, reason="overflow"))
    observer.on_fact(DeliveryDiscarded(at=101.0, delivery=delivery(), reason="dead_letter"))
    scrape = Scrape(registry)
    assert scrape.value("errors_total", component="handler", destination="orders.*") == 1
    assert scrape.value("messages_settled_total", result="discarded") == 0


def test_gauges_are_the_state_of_the_moment(source: Any, registry: CollectorRegistry) -> None:
    observer = observe(source, registry=registry, wall=lambda: 100.0)
    source.account = Account(accepted=9, ready=4, scheduled=1, retrying=1, in_flight=2, dead_lettered=1)
    source.breaker.state, source.breaker.refused = "open", 7
    source.subscriber.state, source.subscriber.in_flight = "breaker_open", 2
    source.state.status = "degraded"
    source.round_trip_age, source.disk = 1.5, 1000
    source.failures = {"Mine": 2}
    scrape = Scrape(registry)
    assert {s: scrape.value("queue_messages", state=s) for s in catalogue.QUEUE_STATES} == {
        "ready": 4,
        "scheduled": 1,
        "retrying": 1,
        "in_flight": 2,
    }
    assert scrape.value("dead_letter_messages", subscription="charge") == 1
    assert scrape.value("handlers_in_flight", subscription="charge") == 2
    assert scrape.value("breaker_calls_total", breaker="charge", outcome="refused") == 7
    for name, states, now in (
        ("breaker_state", catalogue.BREAKER_STATES, "open"),
        ("subscription_state", catalogue.SUBSCRIPTION_STATES, "breaker_open"),
    ):
        mine = {"breaker": "charge"} if name == "breaker_state" else {}
        assert {s: scrape.value(name, state=s, **mine) for s in states} == {s: float(s == now) for s in states}
    assert [s for s in catalogue.HEALTH_STATES if scrape.value("health_status", status=s)] == ["degraded"]
    assert scrape.value("disk_free_bytes") == 1000
    assert scrape.value("last_round_trip_age_seconds") == 1.5
    assert scrape.value("observer_failures_total", observer="Mine") == 2
    source.subscriber.in_flight = 0
    assert Scrape(registry).value("handlers_in_flight", subscription="charge") == 0
    assert observer.stopped is False


def test_the_connection_is_down_from_a_failure_until_it_recovers(source: Any, registry: CollectorRegistry) -> None:
    observer = observe(source, registry=registry)
    category = ErrorCategory.CONNECTION_ERROR
    observer.on_fact(TransportFailed(at=1.0, operation="probe", error="gone", category=category, uncertain=False))
    assert Scrape(registry).value("connection_up", endpoint="memory://") == 0
    observer.on_fact(TransportRecovered(at=3.0, after_s=2.0))
    assert Scrape(registry).value("connection_up", endpoint="memory://") == 1
    assert Scrape(registry).value("reconnects_total", endpoint="memory://") == 1


def test_a_store_that_cannot_be_read_costs_its_part_of_the_scrape_and_no_more(
    source: Any, registry: CollectorRegistry
) -> None:
    kept = observe(source, registry=registry)
    source.store_down = True
    Scrape(registry)
    scrape = Scrape(registry)
    assert scrape.labels("queue_messages") == []
    assert scrape.value("health_status", status="healthy") == 1
    assert scrape.value("telemetry_scrape_failures_total") == 2
    assert kept.source is source


def test_two_buses_share_a_registry_and_two_of_one_name_are_told_apart(
    make_source: Callable[..., Any], registry: CollectorRegistry
) -> None:
    sources = [make_source("orders"), make_source("billing"), make_source("orders")]
    observers = [observe(source, registry=registry) for source in sources]
    for number, source in enumerate(sources):
        source.tally.handled = number + 1
    scrape = Scrape(registry)
    handled = {
        s["bus"]: scrape.value("messages_settled_total", bus=s["bus"], result="handled")
        for s in scrape.labels("build_info")
    }
    assert handled == {"orders": 1, "billing": 2, "orders-2": 3}
    assert len(observers) == 3


def test_the_series_of_a_bus_stay_after_it_stops_and_go_with_it(
    make_source: Callable[..., Any], registry: CollectorRegistry
) -> None:
    source = make_source()
    observer = observe(source, registry=registry)
    source.tally.handled = 5
    observer.on_fact(BusStopped(at=1.0, bus="default", given_back=0, discarded=0, within_deadline=True))
    source.store_down = True
    scrape = Scrape(registry)
    assert scrape.value("messages_settled_total", result="handled") == 5
    assert scrape.value("telemetry_scrape_failures_total") == 0
    # A new bus of the name takes its place; without one they go when it is garbage.
    follower = make_source()
    observe(follower, registry=registry)
    del source, observer, follower
    gc.collect()
    assert Scrape(registry).labels("messages_settled_total") == []


def test_destinations_beyond_the_cap_become_other_and_are_counted(source: Any, registry: CollectorRegistry) -> None:
    observer = observe(source, registry=registry)
    for number in range(1000):
        observer.on_fact(AttemptFailed(at=99.0, delivery=delivery(f"d-{number}"), report=REPORT, duration_s=1.0))
    scrape = Scrape(registry)
    destinations = {s["destination"] for s in scrape.labels("errors_total")}
    assert len(destinations) <= 202
    assert "_other" in destinations
    assert scrape.value("telemetry_series_overflow_total") >= 1000
    total = sum(s.value for s in scrape.samples if s.name == "glassbus_errors_total")
    assert total == 1000


@pytest.mark.parametrize("accept", ["", "text/plain", "application/openmetrics-text; version=1.0.0", "nonsense;;;="])
def test_the_exposition_is_what_was_asked_for_and_parses(source: Any, registry: CollectorRegistry, accept: str) -> None:
    kept = observe(source, registry=registry)
    kind, body = exposition(registry, accept)
    wants_openmetrics = accept.startswith("application/openmetrics")
    assert kind.startswith("application/openmetrics-text" if wants_openmetrics else "text/plain")
    parse = parse_openmetrics if wants_openmetrics else parse_text
    assert len(list(parse(body.decode()))) >= len(catalogue.METRICS)
    assert kept.name


def test_everything_scraped_is_declared_with_its_labels_and_their_values(
    spans: Any, registry: CollectorRegistry
) -> None:
    async def main() -> Scrape:
        bus = MessageBus(telemetry=False)
        bus.observe(observe(bus, registry=registry, tracer_provider=spans(1.0).provider))

        @bus.subscribe("orders", name="charge", retry=Retry(max_attempts=3, base_delay=0.001))
        async def charge(message: Message[Any]) -> None:
            if message.payload:
                raise ValueError

        async with bus:
            await bus.publish("orders")
            await bus.publish("orders", 1)
            await bus.publish("nobody", 1)
            await bus.drain()
            return Scrape(registry)

    scrape = asyncio.run(main())
    for sample in scrape.samples:
        name = sample.name.removeprefix("glassbus_")
        metric = catalogue.BY_NAME.get(name)
        if metric is None:
            metric = catalogue.BY_NAME[name.rpartition("_")[0]]
            assert metric.type == "histogram", name
        labels = {key: value for key, value in sample.labels.items() if key not in ("bus", "le")}
        assert "bus" in sample.labels
        assert set(labels) == set(metric.labels), name
        for label, value in labels.items():
            allowed = metric.labels[label]
            assert not allowed or value in allowed, (name, label, value)


def test_error_counts_and_durations_lead_to_a_trace_that_exists(spans: Any, registry: CollectorRegistry) -> None:
    kept = spans(0.0)

    async def main() -> Scrape:
        bus = MessageBus(telemetry=False)
        bus.observe(observe(bus, registry=registry, tracer_provider=kept.provider))

        @bus.subscribe("orders", name="charge", retry=Retry(max_attempts=1))
        async def charge(message: Message[Any]) -> None:
            raise ValueError

        async with bus:
            await bus.publish("orders")
            await bus.drain()
            return Scrape(registry)

    scrape = asyncio.run(main())
    process = kept.one("process")
    ids = {"trace_id": f"{process.context.trace_id:032x}", "span_id": f"{process.context.span_id:016x}"}
    shown = {s.name: s.exemplar.labels for s in scrape.samples if s.exemplar is not None}
    assert shown == {"glassbus_errors_total": ids, "glassbus_process_duration_seconds_bucket": ids}


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_every_exemplar_leads_to_a_span_that_was_exported_and_its_value_is_in_its_bucket(
    spans: Any, registry: CollectorRegistry, ratio: float
) -> None:
    """Durations that went well have one when they were sampled, failures always."""
    kept = spans(ratio)

    async def main() -> Scrape:
        bus = MessageBus(registry=registry, tracer_provider=kept.provider)

        @bus.subscribe("orders", name="charge", retry=Retry(max_attempts=2, immediate=1))
        async def charge(message: Message[Any]) -> None:
            await asyncio.sleep(message.payload / 500)
            if message.payload == 3:
                raise ValueError

        async with bus:
            for number in range(20):
                await bus.publish("orders", number % 4)
                with contextlib.suppress(PublishRejected):
                    await bus.publish("orders", number, headers={"bad": "\n"})
            await bus.publish("nobody")
            await bus.drain()
            return Scrape(registry)

    scrape = asyncio.run(main())
    there = {(f"{s.context.trace_id:032x}", f"{s.context.span_id:016x}") for s in kept.all()}
    shown = [s for s in scrape.samples if s.exemplar is not None]
    for sample in shown:
        assert (sample.exemplar.labels["trace_id"], sample.exemplar.labels["span_id"]) in there, sample
        assert sample.exemplar.value <= float(sample.labels.get("le", "inf"))
    durations = {(s.name, s.labels["outcome"]) for s in shown if "outcome" in s.labels}
    failed = {
        ("glassbus_process_duration_seconds_bucket", "failed"),
        ("glassbus_publish_duration_seconds_bucket", "rejected"),
    }
    sampled = {
        ("glassbus_process_duration_seconds_bucket", "succeeded"),
        ("glassbus_publish_duration_seconds_bucket", "accepted"),
    }
    assert failed <= durations
    assert sampled <= durations or ratio < 1
    assert not sampled & durations or ratio > 0


def test_without_spans_of_our_ids_nothing_leads_to_them(registry: CollectorRegistry) -> None:
    """A provider that is not the SDK's gives spans ids of its own: an exemplar or a log line would lead nowhere."""
    bus = MessageBus(registry=registry, tracer_provider=ForeignProvider(), telemetry=False)
    observer = observe(bus, registry=registry, tracer_provider=bus.tracer_provider)
    assert observer.tracing.outlet.recording
    observer.on_fact(AttemptFailed(at=99.0, delivery=delivery(), report=REPORT, duration_s=1.0))
    assert [s for s in Scrape(registry).samples if s.exemplar is not None] == []
    assert observer.trace_of(AttemptFailed, delivery(), "") == {}


class ForeignProvider(TracerProvider):
    """A provider of somebody else."""

    def get_tracer(self, *_: Any, **__: Any) -> Any:
        return NoOpTracer()


def test_facts_and_scrapes_on_many_threads_add_up(source: Any, registry: CollectorRegistry) -> None:
    observer = observe(source, registry=registry)
    fact = AttemptFailed(at=99.0, delivery=delivery(), report=REPORT, duration_s=1.0)
    moved = BreakerStateChanged(
        at=1.0, breaker="b", kind="endpoint", subscription="", from_state="closed", to_state="open", reason="r"
    )

    def state_many() -> None:
        for _ in range(500):
            observer.on_fact(fact)
            observer.on_fact(moved)

    threads = [threading.Thread(target=state_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        Scrape(registry)
    for thread in threads:
        thread.join()
    scrape = Scrape(registry)
    assert scrape.value("errors_total", destination="orders.*") == 2000
    assert scrape.value("breaker_transitions_total", breaker="b") == 2000
    assert scrape.value("telemetry_seconds_total", signal="facts") > 0


def test_names_taken_by_somebody_else_leave_the_bus_without_metrics_but_running(
    source: Any, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    from prometheus_client import Counter

    Counter("glassbus_errors", "somebody else's", registry=registry)
    observer = observe(source, registry=registry)
    observer.on_fact(AttemptFailed(at=time.time(), delivery=delivery(), report=REPORT, duration_s=1.0))
    assert "registered already" in caplog.text


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_while_a_thread_was_counting_can_count(source: Any, registry: CollectorRegistry) -> None:
    observer = observe(source, registry=registry)
    fact = AttemptFailed(at=99.0, delivery=delivery(), report=REPORT, duration_s=1.0)
    with observer.counts._lock:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                observer.on_fact(fact)
                code = 0
            finally:
                os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_stopped_bus_still_says_that_its_ledger_does_not_balance(
    make_source: Callable[..., Any], registry: CollectorRegistry
) -> None:
    """It may have stopped for that: an alert on it would go out as soon as it was needed."""
    source = make_source()
    source.account = Account(accepted=3, handled=1)
    observer = observe(source, registry=registry)
    observer.on_fact(BusStopped(at=1.0, bus="default", given_back=0, discarded=0, within_deadline=True))
    assert Scrape(registry).value("messages_unaccounted") == 2
