"""Failures as OpenTelemetry log records, each with the trace that shows it.

Where the program has set a logger provider, every failure becomes one record, as the
semantic conventions ask (https://opentelemetry.io/docs/specs/semconv/general/recording-errors/). Exceptions stay span
events too, because Jaeger shows no logs; `OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN=logs` leaves the events out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from opentelemetry import _logs, trace
from opentelemetry._logs import LoggerProvider, LogRecord, SeverityNumber, get_logger_provider
from opentelemetry.context import Context

from glassbus import facts as f
from glassbus.record.failures import Failure, of_report
from glassbus.telemetry.governor import FloodBudget
from glassbus.telemetry.outlet import SCHEMA_URL, SCOPE, context_of
from glassbus.telemetry.propagation import Place
from glassbus.telemetry.spans import STACK_BYTES_MAX, capped, ns

_WARN, _ERROR, _FATAL = ("WARN", SeverityNumber.WARN), ("ERROR", SeverityNumber.ERROR), ("FATAL", SeverityNumber.FATAL)


# Asked for each failure. The public getter takes 2 us while none is set, for it reads the environment each time.
_logs_api: Any = getattr(_logs, "_internal", None)
_NAMED = "OTEL_PYTHON_LOGGER_PROVIDER" in os.environ
_MAY_LOOK = hasattr(_logs_api, "_LOGGER_PROVIDER") and not _NAMED  # in a later API it may be elsewhere


def provider() -> LoggerProvider | None:
    """The program's logger provider; None while it has set none."""
    if _MAY_LOOK and _logs_api._LOGGER_PROVIDER is None:
        return None
    found = get_logger_provider()
    # The API's stand-in passes on to a provider that may be set later; until then a record would be lost in it.
    return None if type(found).__module__.startswith("opentelemetry._logs") else found


class FailureRecords:
    """Writes them, within a flood budget of their own. `text` redacts and caps; `place` is the span of an attempt.

    Thread-safe.
    """

    def __init__(self, text: Callable[[str], str], place: Callable[[f.Delivery], Place]) -> None:
        self._text = text
        self._place = place
        self.budget = FloodBudget()

    def show(self, fact: f.Fact, failure: Failure | None) -> None:
        """One record for each failure. A failed attempt is told by what was decided about it."""
        found = provider()
        if found is None:
            return
        match fact:
            case f.AttemptFailed():
                pass
            case f.RetryScheduled():
                told = of_report(fact.report, fact.delivery.destination)
                self._write(found, fact.at, told, _WARN, "messaging.process.exception", fact.delivery)
            case f.DeliveryDeadLettered():
                told = of_report(fact.report, fact.delivery.destination)
                self._write(found, fact.at, told, _ERROR, "messaging.process.exception", fact.delivery)
            case f.PublishRefused() | f.PublishLeftUncertain() if failure is not None:
                self._write(found, fact.at, failure, _WARN, "messaging.send.exception")
            case f.SettlementRefused() if failure is not None:
                self._write(found, fact.at, failure, _WARN, "messaging.settle.exception", fact.delivery)
            case _ if failure is not None:
                self._write(found, fact.at, failure, _ERROR, "glassbus.error")

    def _write(
        self,
        found: LoggerProvider,
        at: float,
        failure: Failure,
        severity: tuple[str, SeverityNumber],
        name: str,
        delivery: f.Delivery | None = None,
    ) -> None:
        if self.budget.admit(failure.site) < 0:
            return
        text, number = _FATAL if failure.severity == "critical" and severity is _ERROR else severity
        attributes: dict[str, Any] = {
            "exception.type": failure.kind,
            "exception.message": self._text(failure.message),
            "glassbus.error.component": failure.component,
            "glassbus.error.category": failure.category,
            "glassbus.error.severity": failure.severity,
        }
        report = failure.report
        if report is not None:
            attributes["glassbus.error.fingerprint"] = report.fingerprint
            if report.stack_trace:
                attributes["exception.stacktrace"] = capped(report.stack_trace, STACK_BYTES_MAX)
        if delivery is not None:
            attributes["messaging.message.id"] = delivery.envelope.id
            attributes["messaging.consumer.group.name"] = delivery.subscription
            attributes["glassbus.attempt"] = delivery.attempt
        found.get_logger(SCOPE, schema_url=SCHEMA_URL).emit(
            LogRecord(
                timestamp=ns(at),
                observed_timestamp=ns(at),
                context=self._context(delivery),
                severity_text=text,
                severity_number=number,
                body=self._text(f"{failure.kind}: {failure.message}"),
                attributes=attributes,
                event_name=name,
            )
        )

    def _context(self, delivery: f.Delivery | None) -> Context | None:
        if delivery is None:
            return None
        span = trace.NonRecordingSpan(context_of(self._place(delivery)))
        return trace.set_span_in_context(span, Context())
