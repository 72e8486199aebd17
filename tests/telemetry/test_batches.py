"""Spans for the SDK's own batch processor are made when they are exported; nobody can tell by looking at them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind
from prometheus_client import CollectorRegistry

from glassbus import Message, MessageBus, Retry
from glassbus.telemetry.outlet import SpanData
from glassbus.telemetry.propagation import Place
from glassbus.telemetry.sdk import SdkOutlet


class Keeps(SpanExporter):
    """Keeps what it is given, and which thread gave it."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []
        self.threads: set[int] = set()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.threads.add(threading.get_ident())
        self.spans.extend(spans)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing is held."""


def provider(exporter: Keeps, batches: bool, ratio: float = 1.0) -> TracerProvider:
    made = TracerProvider(sampler=ParentBased(TraceIdRatioBased(ratio)), shutdown_on_exit=False)
    made.add_span_processor(BatchSpanProcessor(exporter) if batches else SimpleSpanProcessor(exporter))
    return made


async def run(made: TracerProvider) -> None:
    bus = MessageBus(tracer_provider=made, registry=CollectorRegistry(), seed=1)

    @bus.subscribe("a.*", name="s", retry=Retry(max_attempts=2, immediate=1))
    async def handler(message: Message[str]) -> None:
        if message.payload == "fails":
            raise ValueError("no")

    async with bus:
        await bus.publish("a.b", "works", message_id="1")
        await bus.publish("a.b", "fails", message_id="2")
        await bus.drain()
    made.force_flush()


def told(spans: list[ReadableSpan]) -> list[Any]:
    """What does not differ from run to run, in an order that does not either."""
    changing = {"glassbus.published_at", "glassbus.recovery.delay_s"}
    shown = []
    for span in spans:
        full = json.loads(span.to_json())
        kept = {k: v for k, v in full["attributes"].items() if k not in changing}
        shown.append((full["name"], full["kind"], full["status"], sorted(kept.items()), len(full["links"])))
    return sorted(shown, key=repr)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_batched_spans_are_those_that_any_other_processor_is_given(ratio: float) -> None:
    found = []
    for batches in (True, False):
        exporter = Keeps()
        made = provider(exporter, batches, ratio)
        asyncio.run(run(made))
        made.shutdown()
        found.append(told(exporter.spans))
    assert found[0] == found[1]
    assert len(found[0]) > (4 if ratio == 0.0 else 6)


def test_batched_spans_are_made_by_the_thread_that_exports_them() -> None:
    exporter = Keeps()
    made_on: set[int] = set()
    made = provider(exporter, True)
    outlet = SdkOutlet(made, lambda: None)

    def make() -> list[SpanData]:
        made_on.add(threading.get_ident())
        return [SpanData("process a", SpanKind.CONSUMER, Place(1, n, True), 0, {}, 1, 2) for n in (1, 2)]

    outlet.tell(make, 2, False)
    assert not made_on
    made.shutdown()
    # The SDK's exporters look at spans where they are; ours does here.
    assert [span.context.span_id for span in exporter.spans if span.context] == [1, 2]
    assert made_on == {threading.get_ident()}  # once, and not before


def test_a_decision_that_cannot_be_made_into_spans_takes_no_others_with_it() -> None:
    exporter = Keeps()
    made = provider(exporter, True)
    outlet = SdkOutlet(made, lambda: None)

    def fails() -> list[SpanData]:
        raise LookupError("nobody knows")

    outlet.tell(fails, 2, False)
    outlet.tell(list, 1, False)
    outlet.tell(lambda: [SpanData("good", SpanKind.CONSUMER, Place(1, 2, True), 0, {}, 1, 2)], 1, False)
    made.shutdown()
    assert [span.name for span in exporter.spans] == [*["error telemetry"] * 3, "good"]
    assert [(span.attributes or {}).get("error.type") for span in exporter.spans[:3]] == [
        "LookupError",
        "LookupError",
        "ValueError",
    ]


def test_a_batch_processor_that_was_changed_is_asked_as_any_other() -> None:
    exporter = Keeps()
    ended: list[Any] = []
    made = provider(exporter, True)
    (processor,) = made._active_span_processor._span_processors
    setattr(processor, "on_end", ended.append)  # noqa: B010
    outlet = SdkOutlet(made, lambda: None)
    outlet.tell(lambda: [SpanData("good", SpanKind.CONSUMER, Place(1, 2, True), 0, {}, 1, 2)], 1, False)
    assert [span.name for span in ended] == ["good"]
    made.shutdown()


def test_a_sampled_publish_is_shown_though_the_bus_stops_at_once() -> None:
    """It is told when the loop turns, which the publisher need not wait for."""
    exporter = Keeps()
    made = provider(exporter, False)

    async def scenario() -> None:
        bus = MessageBus(tracer_provider=made, registry=CollectorRegistry())
        bus.subscribe("a", name="s")(_take)
        async with bus:
            await bus.publish("a")
            assert exporter.spans == []

    asyncio.run(scenario())
    made.shutdown()
    assert "publish a" in [span.name for span in exporter.spans]


async def _take(message: Message[Any]) -> None:
    """Handled."""
