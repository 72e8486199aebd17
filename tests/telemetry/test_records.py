"""Failures as log records and log lines: each leads to the trace that shows it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import _logs
from opentelemetry._logs import _internal as logs_internal
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from prometheus_client import CollectorRegistry

from glassbus import Message, MessageBus, Retry
from glassbus.facts import AttemptFailed
from glassbus.telemetry import observe
from glassbus.testing import VirtualClock, run_virtual
from tests.facts_kit import DELIVERY

SECRET = "-".join(("hunter", "2"))  # made here, so that no line of a stack trace shows it


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryLogRecordExporter]:
    exporter = InMemoryLogRecordExporter()
    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    monkeypatch.setattr(logs_internal, "_LOGGER_PROVIDER", provider)
    assert _logs.get_logger_provider() is provider
    yield exporter
    provider.shutdown()


def fail_twice(kept: Any, **options: Any) -> None:
    """One message whose two attempts fail; its dead letter is critical or not as `error` says."""

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, registry=CollectorRegistry(), tracer_provider=kept.provider)

        @bus.subscribe("orders", name="charge", retry=Retry(max_attempts=2))
        async def charge(message: Message[Any]) -> None:
            raise options.get("error", ValueError)(f"card of https://user:{SECRET}@shop.example refused")

        async with bus:
            await bus.publish("orders", {"a": 1})
            await bus.drain()

    run_virtual(scenario)


def test_each_failure_is_one_record_whose_level_follows_the_outcome(
    spans: Any, records: InMemoryLogRecordExporter
) -> None:
    kept = spans(0.0)
    fail_twice(kept)
    retried, dead = [finished.log_record for finished in records.get_finished_logs()]
    assert (retried.severity_text, dead.severity_text) == ("WARN", "ERROR")
    assert {retried.event_name, dead.event_name} == {"messaging.process.exception"}
    attempts = [(span.context.trace_id, span.context.span_id) for span in kept.named("process")]
    assert [(retried.trace_id, retried.span_id), (dead.trace_id, dead.span_id)] == attempts
    assert dead.attributes["exception.type"] == "ValueError"
    assert SECRET not in str(dead.body) + str(dict(dead.attributes))


def test_what_is_critical_is_fatal(spans: Any, records: InMemoryLogRecordExporter) -> None:
    fail_twice(spans(0.0), error=MemoryError)
    assert [finished.log_record.severity_text for finished in records.get_finished_logs()] == ["WARN", "FATAL"]


def test_without_a_logger_provider_nothing_is_written(spans: Any) -> None:
    fail_twice(spans(0.0))  # and nothing raises: filterwarnings=error, and the hub would count it


@pytest.mark.parametrize(("chosen", "events"), [("", 1), ("logs/dup", 1), ("logs", 0), ("database,logs", 0)])
def test_the_standard_variable_takes_exceptions_out_of_spans(
    spans: Any, monkeypatch: pytest.MonkeyPatch, chosen: str, events: int
) -> None:
    monkeypatch.setenv("OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN", chosen)
    kept = spans(0.0)
    fail_twice(kept)
    assert [len(span.events) for span in kept.named("error")] == [events, events]


def test_log_lines_about_a_delivery_name_its_trace(spans: Any, caplog: pytest.LogCaptureFixture) -> None:
    kept = spans(0.0)
    with caplog.at_level(logging.INFO, logger="glassbus"):
        fail_twice(kept)
    assert SECRET not in caplog.text
    lines = [record for record in caplog.records if "trace_id" in record.__dict__["glassbus"]]
    assert [record.levelname for record in lines] == ["INFO", "ERROR"]
    for record, span in zip(lines, kept.named("process"), strict=True):
        assert f"trace_id={span.context.trace_id:032x} span_id={span.context.span_id:016x}" in record.getMessage()


def test_log_lines_name_no_trace_when_nobody_records_any(caplog: pytest.LogCaptureFixture) -> None:
    bus = MessageBus(telemetry=False)
    assert observe(bus, registry=CollectorRegistry()).trace_of(AttemptFailed, DELIVERY, "") == {}
