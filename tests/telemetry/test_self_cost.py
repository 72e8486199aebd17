"""What telemetry and error handling say of their own cost is what they cost: checked where the cost is known."""

from __future__ import annotations

import asyncio
import logging
import time
from itertools import cycle
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from glassbus import ErrorCategory, ErrorSeverity, KillSwitch, Message, MessageBus, Retry
from glassbus.facts import AttemptFailed, Delivery, MessagePublished
from glassbus.message import Envelope
from glassbus.telemetry import configure, exposition, observe, tracing
from glassbus.telemetry.around import Around, around
from glassbus.telemetry.governor import FloodBudget
from glassbus.telemetry.owntime import STRIDE, OwnTime
from tests.facts_kit import sample
from tests.telemetry.conftest import FakeSource
from tests.telemetry.test_governor import size_of

FAILURES = 60
SPENT_S = 0.002


def burn(seconds: float = SPENT_S) -> None:
    """Take CPU time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


async def fail(bus: MessageBus, failures: int = FAILURES, payload: str = "") -> None:
    @bus.subscribe("orders", name="charge", retry=Retry(max_attempts=1), kill_switch=KillSwitch(enabled=False))
    async def charge(message: Message[Any]) -> None:
        raise ValueError(message.payload)

    async with bus:
        for number in range(failures):
            await bus.publish("orders", f"{payload}{number}")
        await bus.drain()


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    found = registry.get_sample_value(f"glassbus_{name}", {"bus": "default", **labels})
    assert found is not None, name
    return found


class Ticking:
    """A CPU clock that takes half a microsecond to read."""

    def __init__(self) -> None:
        self.now = 1.0

    def __call__(self) -> float:
        self.now += 0.5e-6
        return self.now


def run(own: OwnTime, clock: Ticking, took_s: float, times: int = 1) -> None:
    for _ in range(times):
        began = own.begin()
        clock.now += took_s
        own.end(began)


@pytest.mark.parametrize(("times", "within"), [(1, 0.01), (16, 0.01), (17, 0.01), (500, 0.05), (10_000, 0.01)])
def test_a_sample_tells_of_all_and_the_clock_itself_is_not_in_it(times: int, within: float) -> None:
    clock = Ticking()
    own = OwnTime(clock)
    run(own, clock, 5e-6, times)
    assert own.seconds == pytest.approx(times * 5e-6, rel=within)


def test_a_sample_does_not_keep_step_with_what_comes_in_turn() -> None:
    """A publish, a scope, its end, a failure: each takes another time."""
    for turn in ((1e-6, 9e-6), (1e-6, 2e-6, 9e-6), (1e-6, 2e-6, 3e-6, 20e-6)):
        clock = Ticking()
        own = OwnTime(clock)
        for _ in range(5_000):
            for took_s in turn:
                run(own, clock, took_s)
        assert own.seconds == pytest.approx(5_000 * sum(turn), rel=0.02)


def test_what_met_the_garbage_collector_stands_for_no_other() -> None:
    clock = Ticking()
    own = OwnTime(clock)
    run(own, clock, 5e-6, 1_000)
    before = own.seconds
    run(own, clock, 0.040, STRIDE)  # one of them is timed
    assert 0.039 < own.seconds - before < 0.041


def test_what_became_slow_is_told_in_full() -> None:
    """A redaction that took 5 us, and from now on takes 100."""
    clock = Ticking()
    own = OwnTime(clock)
    run(own, clock, 5e-6, 1_000)
    before = own.seconds
    run(own, clock, 100e-6, 10_000)
    assert own.seconds - before == pytest.approx(1.0, rel=0.02)


class Costly(SpanProcessor):
    """One that a program adds: for each span that ends it takes as long as the next of a few times."""

    def __init__(self, clock: Ticking) -> None:
        self.spent_s = 0.0
        self._clock = clock
        self._each_s = cycle((20e-6, 50e-6, 110e-6))

    def on_end(self, span: ReadableSpan) -> None:
        took_s = next(self._each_s)
        self._clock.now += took_s
        self.spent_s += took_s


# Five are timed for each message; the first 17 are told of exactly, and later ones as a sample is.
@pytest.mark.parametrize(("messages", "within"), [(3, 1e-6), (3_000, 0.02)])
def test_what_is_scraped_is_what_was_spent(
    spans: Any, monkeypatch: pytest.MonkeyPatch, messages: int, within: float
) -> None:
    """A header, a publish and a failed attempt in its scope for each message, by a clock that the test moves."""
    clock = Ticking()
    core = Around(header_s=1e-6, fact_s=2e-6, publish_s=4e-6, scope_s=8e-6)
    monkeypatch.setattr(tracing, "OwnTime", lambda: OwnTime(clock))
    monkeypatch.setattr(tracing, "around", lambda: core)
    source: Any = FakeSource()
    provider, costly, registry = spans(1.0).provider, Costly(clock), CollectorRegistry()
    provider.add_span_processor(costly)
    observer = observe(source, registry=registry, tracer_provider=provider, wall=lambda: 100.0)
    observer.tracing.budget = FloodBudget(first=messages)
    for number in range(messages):
        headers: dict[str, str] = {}
        observer.inject(headers)
        envelope = Envelope(f"m-{number}", "orders.created", b"", "json", headers)
        observer.on_fact(sample(MessagePublished, envelope=envelope))
        delivery = Delivery(envelope, "charge", "orders.*", 1)
        with observer.scope(delivery):
            observer.on_fact(sample(AttemptFailed, delivery=delivery))
    assert costly.spent_s > messages * 100e-6
    spent_s = costly.spent_s + messages * sum(core)
    assert value(registry, "telemetry_seconds_total", signal="facts") == pytest.approx(spent_s, rel=within)


def test_what_the_core_does_for_telemetry_is_measured_once() -> None:
    assert around() is around()
    assert all(0 < each_s < 0.001 for each_s in around())


def test_time_that_showing_facts_and_making_spans_takes_is_told(no_global_provider: None) -> None:
    """A redaction that takes 2 ms is run for each failure, where its spans are made: on the exporter's thread."""
    registry = CollectorRegistry()

    def slow(text: str) -> str:
        burn()
        return text

    with configure(exporter=InMemorySpanExporter()) as telemetry:
        bus = MessageBus(telemetry=False)
        bus.observe(observe(bus, registry=registry, redact=slow))
        began = time.perf_counter()
        asyncio.run(fail(bus))
        facts = value(registry, "telemetry_seconds_total", signal="facts")
        assert 0 < facts < time.perf_counter() - began
        assert telemetry.flush(20.0)
        assert value(registry, "telemetry_seconds_total", signal="export") >= FAILURES * SPENT_S
        assert value(registry, "telemetry_seconds_total", signal="export") < 20.0


def test_time_of_attempts_that_go_well_and_are_sampled_is_told(no_global_provider: None) -> None:
    registry = CollectorRegistry()
    with configure(exporter=InMemorySpanExporter()):
        bus = MessageBus(registry=registry)
        bus.subscribe("orders", name="charge")(lambda message: None)

        async def main() -> float:
            async with bus:
                await bus.publish("orders")
                await bus.drain()
                return value(registry, "telemetry_seconds_total", signal="facts")

        assert asyncio.run(main()) > 0


def test_time_of_scrapes_is_told() -> None:
    registry = CollectorRegistry()
    bus = MessageBus(registry=registry)
    exposition(registry)
    first = value(registry, "telemetry_seconds_total", signal="scrape")
    for _ in range(10):
        exposition(registry)
    assert value(registry, "telemetry_seconds_total", signal="scrape") > first > 0
    assert bus.name


def test_time_of_handling_errors_is_told() -> None:
    """A rule that takes 2 ms is asked about each failure, once."""
    registry = CollectorRegistry()

    def slow(error: BaseException) -> Any:
        burn()
        return (ErrorCategory.MESSAGE_PROCESSING_ERROR, ErrorSeverity.MEDIUM)

    async def main() -> None:
        bus = MessageBus(registry=registry, rules=[slow])
        began = time.perf_counter()
        await fail(bus)
        took = time.perf_counter() - began
        labels = {"category": "message_processing_error"}
        assert value(registry, "error_handling_seconds_count", **labels) == FAILURES
        assert FAILURES * SPENT_S <= value(registry, "error_handling_seconds_sum", **labels) <= took

    logging.getLogger("glassbus").setLevel(logging.CRITICAL)
    try:
        asyncio.run(main())
    finally:
        logging.getLogger("glassbus").setLevel(logging.NOTSET)


@pytest.mark.parametrize("failures", [200, 3000])
def test_memory_of_error_records_is_told(failures: int) -> None:
    """Within a factor of two of what a walk over all of it finds."""
    registry = CollectorRegistry()

    async def main() -> None:
        bus = MessageBus(registry=registry)
        said, took = bus.error_memory_bytes(), size_of(bus.journal, bus._sites)
        await fail(bus, failures, "x" * 300)
        said, took = bus.error_memory_bytes() - said, size_of(bus.journal, bus._sites) - took
        assert took / 2 < said < took * 2, (said, took)
        assert value(registry, "error_memory_bytes") >= said

    asyncio.run(main())
