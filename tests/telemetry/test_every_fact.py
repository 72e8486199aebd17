"""Every fact, shown once: what leaves is declared, and nothing of a payload or a header leaves."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from glassbus import MessageBus
from glassbus.facts import Fact, FactType
from glassbus.message import Envelope
from glassbus.observer import ALL_FACTS
from glassbus.record.logs import LINES, LoggingObserver
from glassbus.telemetry import observe
from glassbus.telemetry.catalogue import BY_NAME, PROJECTIONS, SPANS
from tests.facts_kit import sample

KINDS = sorted(ALL_FACTS, key=lambda kind: kind.__name__)
DECLARED = {span.name.partition(" ")[0]: span for span in SPANS}


def shown(kept: Any, *facts: Fact) -> tuple[list[Any], CollectorRegistry]:
    bus = MessageBus(telemetry=False)
    registry = CollectorRegistry()
    observer = observe(bus, registry=registry, tracer_provider=kept.provider, wall=lambda: 100.0)
    for fact in facts:
        observer.on_fact(fact)
    return kept.all(), registry


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_its_spans_and_metrics_are_those_that_the_catalogue_declares(kind: FactType, spans: Any) -> None:
    found, registry = shown(spans(1.0), sample(kind))
    for span in found:
        contract = DECLARED[span.name.partition(" ")[0]]
        assert kind in contract.source, span.name
        assert span.kind.name == contract.kind
        assert set(span.attributes) <= set(contract.attributes), span.name
        assert "secret" not in str(dict(span.attributes))
    if PROJECTIONS[kind].no_span:
        assert not found
    declared = {f"glassbus_{name}".removesuffix("_total") for name in PROJECTIONS[kind].metrics}
    assert counted(registry) <= declared


def counted(registry: CollectorRegistry) -> set[str]:
    """The counters and histograms that are not 0, but for those about telemetry itself."""
    return {
        metric.name
        for metric in registry.collect()
        if metric.type != "gauge" and "telemetry" not in metric.name and any(one.value for one in metric.samples)
    }


def test_every_declared_counter_of_a_fact_moves(spans: Any) -> None:
    _, registry = shown(spans(1.0), *(sample(kind) for kind in KINDS))
    moved = {one.name for metric in registry.collect() for one in metric.samples if one.value}
    for kind in KINDS:
        for name in PROJECTIONS[kind].metrics:
            if BY_NAME[name].type != "gauge":
                assert {f"glassbus_{name}", f"glassbus_{name}_count"} & moved, (kind.__name__, name)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_its_log_line_is_one_line_without_payload_or_headers(kind: FactType, caplog: pytest.LogCaptureFixture) -> None:
    hostile = Envelope("m\n1\x1b[31m", "orders.created", b"secret-in-payload", "json", {"h": "secret-in-header"})
    fact = sample(kind)
    if "envelope" in kind.__struct_fields__:
        fact = sample(kind, envelope=hostile)
    if "error" in kind.__struct_fields__:
        fact = sample(kind, error="two\nlines \x1b[2J")
    with caplog.at_level(logging.DEBUG, logger="glassbus"):
        LoggingObserver().on_fact(fact)
    (record,) = caplog.records
    assert record.getMessage().isprintable()
    assert "secret" not in record.getMessage()
    assert record.__dict__["glassbus"]["fact"] == kind.__name__


def test_every_fact_has_a_line() -> None:
    assert set(LINES) == ALL_FACTS
