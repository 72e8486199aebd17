"""1,000 of 1,000 failures at 0 % and 1 % head sampling, under `configure` and under a provider of the program's own."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from prometheus_client import CollectorRegistry

from glassbus import Delivery, KillSwitch, Message, MessageBus, Retry
from glassbus.telemetry import configure
from glassbus.testing import VirtualClock, run_virtual

MESSAGES = 1000
TOOK_S = 0.25


def work(before: Callable[[], None], after: Callable[[], None]) -> dict[str, list[str]]:
    """Every message fails once, every second one twice, of which it dies. The traces that each attempt passed on."""
    onward: dict[str, list[str]] = defaultdict(list)

    async def scenario(clock: VirtualClock) -> None:
        before()
        bus = MessageBus(clock=clock, registry=CollectorRegistry())
        after()

        @bus.subscribe(
            "orders",
            name="charge",
            concurrency=50,
            retry=Retry(max_attempts=2, immediate=1, budget_per_second=1000.0),
            kill_switch=KillSwitch(enabled=False),
        )
        async def charge(message: Message[int], delivery: Delivery) -> None:
            await bus.publish("audit", message.id)
            with trace.get_tracer("program").start_as_current_span("inside"):
                await asyncio.sleep(TOOK_S)
            if message.payload % 2 or delivery.attempt == 1:
                raise ValueError("card declined")

        @bus.subscribe("audit", name="audit")
        async def audit(message: Message[str]) -> None:
            onward[message.payload].append(message.headers["traceparent"].split("-")[1])

        async with bus:
            for number in range(MESSAGES):
                await bus.publish("orders", number)
            await bus.drain()
            assert bus.hub.failures == {}

    run_virtual(scenario)
    return onward


def nothing() -> None:
    """To be done before, or after, the bus is made."""


@pytest.mark.parametrize("ratio", ["0", "0.01"])
@pytest.mark.parametrize("provider", ["configure", "own, before the bus", "own, after the bus"])
def test_every_failure_has_its_spans_in_the_trace_that_the_message_carries_on(
    provider: str, ratio: str, no_global_provider: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    if provider == "configure":
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", ratio)
        # Virtual time makes one burst of what would take minutes.
        with configure(exporter=exporter, failure_queue_spans=20_000) as telemetry:
            onward = work(nothing, nothing)
            assert telemetry.flush(20.0)
    else:
        own = TracerProvider(sampler=ParentBased(TraceIdRatioBased(float(ratio))), shutdown_on_exit=False)
        own.add_span_processor(SimpleSpanProcessor(exporter))

        def install() -> None:
            trace.set_tracer_provider(own)

        onward = work(install, nothing) if provider == "own, before the bus" else work(nothing, install)
    check(exporter.get_finished_spans(), onward)


def check(spans: tuple[ReadableSpan, ...], onward: dict[str, list[str]]) -> None:
    assert len(onward) == MESSAGES
    by_trace: dict[str, list[ReadableSpan]] = defaultdict(list)
    for span in spans:
        by_trace[f"{span.context.trace_id:032x}"].append(span)
    stories = Counter(story(traces, by_trace) for traces in onward.values())
    retried = ("error", "process", "process", "recover")
    died = ("error", "error", "process", "process", "recover", "recover", "settle")
    assert stories == {retried: MESSAGES // 2, died: MESSAGES // 2}


def story(traces: list[str], by_trace: dict[str, list[ReadableSpan]]) -> tuple[str, ...]:
    """The names of what a message's failures left; each attempt passed the one trace on, and took its true time."""
    assert len(set(traces)) == 1
    assert len(traces) == 2
    mine = by_trace[traces[0]]
    attempts = sorted((s for s in mine if s.name == "process orders"), key=lambda s: s.start_time)
    for span in attempts:
        assert span.end_time - span.start_time == pytest.approx(TOOK_S * 1e9, rel=0.01)
    # From the first failure on the program's own spans are there too, under the attempt.
    assert [s.parent.span_id for s in mine if s.name == "inside"][-1] == attempts[1].context.span_id
    names = [s.name.split()[0] for s in mine if s.name.endswith(" orders") and not s.name.startswith("publish")]
    return tuple(sorted(names))
