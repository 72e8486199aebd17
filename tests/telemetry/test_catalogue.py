"""The contract holds together: every fact is projected, every projection is declared."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from glassbus import KillSwitch, Message, MessageBus, PublishRejected, Retry
from glassbus.observer import ALL_FACTS
from glassbus.telemetry import catalogue, observe
from glassbus.telemetry.catalogue import METRICS, PROJECTIONS, SPANS
from glassbus.telemetry.observing import TelemetryObserver
from glassbus.testing import VirtualClock, run_virtual


@pytest.mark.parametrize("fact", sorted(ALL_FACTS, key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_every_fact_has_a_span_and_a_metric_or_a_reason(fact: type) -> None:
    projection = PROJECTIONS[fact]
    assert bool(projection.metrics) != bool(projection.no_metric)
    spans = [span.name for span in SPANS if fact in span.source]
    assert bool(spans) != bool(projection.no_span)


def test_nothing_is_projected_that_is_no_fact() -> None:
    assert set(PROJECTIONS) == ALL_FACTS
    assert {fact for span in SPANS for fact in span.source} <= ALL_FACTS


def test_every_metric_that_a_fact_is_counted_in_is_declared() -> None:
    assert {name for projection in PROJECTIONS.values() for name in projection.metrics} <= set(catalogue.BY_NAME)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_metric_names_types_and_units_follow_the_rules_of_prometheus(metric: catalogue.Metric) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
    assert metric.name.endswith("_total") == (metric.type == "counter")
    assert not metric.unit or metric.name.endswith(metric.unit)
    assert bool(metric.bounds) == (metric.type == "histogram")
    assert list(metric.bounds) == sorted(set(metric.bounds))
    assert metric.help.endswith((".", "running.")) or metric.help.rstrip().endswith(".")
    assert "bus" not in metric.labels
    assert metric.source


def test_metric_names_are_unique() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_every_span_of_a_troubled_bus_is_declared(spans: Any) -> None:
    """Names, kinds, attributes, links and events: nothing undeclared leaves."""
    kept = spans(1.0)

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False, capacity=5, publish_timeout=0.0)
        bus.observe(observe(bus, registry=CollectorRegistry(), tracer_provider=kept.provider, wall=clock.wall))
        broken = True

        @bus.subscribe("orders.*", name="charge", retry=Retry(max_attempts=3), kill_switch=KillSwitch(minimum=2))
        async def charge(message: Message[Any]) -> None:
            if broken:
                raise ValueError

        @bus.subscribe("slow", name="slow", timeout=5.0, retry=Retry(max_attempts=1))
        def slow(message: Message[Any]) -> None:
            return None

        async with bus:
            for _ in range(3):
                await bus.publish("orders.created")
            await bus.publish("slow", expires_in=0.5, delay=1.0)
            for topic in ("no such topic!", "nobody"):
                with contextlib.suppress(PublishRejected):
                    await bus.publish(topic)
            await bus.publish("orders.paid", message_id="twice")
            await bus.publish("orders.paid", message_id="twice")
            with contextlib.suppress(PublishRejected):
                for _ in range(9):
                    await bus.publish("orders.created")
            await asyncio.sleep(60.0)
            broken = False
            dead = await bus.dead_letters.list()
            await bus.dead_letters.replay(dead[0].id)
            await bus.dead_letters.discard(dead[1].id)
            await asyncio.sleep(60.0)

    run_virtual(scenario)
    declared = {span.name.partition(" ")[0]: span for span in SPANS}
    seen = set()
    for span in kept.all():
        contract = declared[span.name.partition(" ")[0]]
        seen.add(span.name.partition(" ")[0])
        assert span.kind.name == contract.kind
        assert set(span.attributes) <= set(contract.attributes), span.name
        assert {link.attributes["glassbus.link"] for link in span.links} <= set(contract.links), span.name
        assert {event.name for event in span.events} <= set(contract.events), span.name
    assert {"publish", "process", "error", "recover", "settle", "breaker", "replay", "shutdown"} <= seen


def test_the_observer_asks_for_no_fact_of_the_happy_path() -> None:
    happy = {kind for kind, projection in PROJECTIONS.items() if "by the core" in projection.no_metric}
    assert TelemetryObserver.interests == ALL_FACTS - happy
