"""Sets the OpenTelemetry SDK up from the standard `OTEL_*` variables, for programs that have not.

https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/

Spans of the happy path and failure spans have a queue, a thread and an exporter
each, so a flood of the first cannot push out the second.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SpanExporter

from glassbus.errors import ConfigurationError
from glassbus.telemetry.outlet import global_provider
from glassbus.telemetry.pipeline import SpanQueue, Switch

_log = logging.getLogger(__name__)

#: At interpreter exit, what is queued gets so long to leave.
EXIT_DEADLINE_S = 3.0
#: A failing message's spans leave together and soon: a collector that decides on traces waits for no one.
_FAILURE_DELAY_S = 0.2

MakeExporter = Callable[[], SpanExporter]


class Telemetry:
    """What `configure` set up. A context manager that shuts down at its end.

    `spans` and `failures` are the two queues, None where there is nothing to export to.
    """

    def __init__(
        self, provider: trace.TracerProvider | None, spans: SpanQueue | None, failures: SpanQueue | None
    ) -> None:
        self.provider = provider
        self.spans = spans
        self.failures = failures

    @property
    def queues(self) -> tuple[SpanQueue, ...]:
        """Failures first: they leave first."""
        return tuple(queue for queue in (self.failures, self.spans) if queue is not None)

    def flush(self, deadline_s: float = 5.0) -> bool:
        """Export what is queued within `deadline_s`, whatever the exporter does. True: all of it was taken."""
        return self._each(SpanQueue.flush, deadline_s)

    def shutdown(self, deadline_s: float = 5.0) -> bool:
        """As `flush`, and then take no more. `configure` may be called again after it. Idempotent."""
        global _active
        done = self._each(SpanQueue.close, deadline_s)
        with _lock:
            if _active is self:
                _active = None
        return done

    def _each(self, method: Callable[[SpanQueue, float], bool], deadline_s: float) -> bool:
        until = time.monotonic() + deadline_s
        for queue in self.queues:
            queue.hurry()  # they work side by side, so one that hangs does not take the time of the other
        done = [method(queue, max(0.0, until - time.monotonic())) for queue in self.queues]
        return all(done)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


_lock = threading.Lock()
_active: Telemetry | None = None
# The SDK's global provider can be set once in a process; ours is kept and its queue exchanged.
_switch = Switch()
_ours: TracerProvider | None = None


def active_queues() -> tuple[SpanQueue, ...]:
    active = _active
    return active.queues if active is not None else ()


def failure_queue() -> SpanQueue | None:
    """Where failure spans of the global provider go; None: to that provider's own processors."""
    active = _active
    return active.failures if active is not None else None


def configure(
    *,
    service_name: str | None = None,
    exporter: SpanExporter | None = None,
    failure_exporter: SpanExporter | None = None,
    failure_queue_spans: int = 4096,
) -> Telemetry:
    """Make the SDK ready from `OTEL_*`, once: another call returns what the first one made.

    Honoured: OTEL_SDK_DISABLED, OTEL_TRACES_EXPORTER (otlp, console, none), OTEL_EXPORTER_OTLP_[TRACES_]PROTOCOL
    (grpc, http/protobuf), the endpoint, header, timeout and certificate variables of the exporters,
    OTEL_TRACES_SAMPLER[_ARG] for the happy path, OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES,
    OTEL_BSP_* for the queue of happy spans. `service_name` counts where the variables name none.

    `exporter` and `failure_exporter` replace the exporters of the two queues; without the second, failure
    spans get an exporter of the first's kind, or the given `exporter` itself. Where the program has set a
    provider of its own, that is left as it is, and only a `failure_exporter` changes anything:
    failure spans then go there, through a queue of their own.

    Installs a global tracer provider and starts no thread until the first span. Raises ConfigurationError.
    """
    global _active
    with _lock:
        if _active is None:
            _active = _build(service_name, exporter, failure_exporter, failure_queue_spans)
        return _active


def _build(
    service_name: str | None,
    exporter: SpanExporter | None,
    failure_exporter: SpanExporter | None,
    failure_queue_spans: int,
) -> Telemetry:
    global _ours
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Telemetry(None, None, None)
    theirs = global_provider()
    if theirs is not None and theirs is not _ours:
        if failure_exporter is None:
            _log.info("a tracer provider is set already: spans go to its processors")
            return Telemetry(theirs, None, None)
        given = failure_exporter
        return Telemetry(theirs, None, _failures(lambda: given, failure_queue_spans))
    make = (lambda: exporter) if exporter is not None else _make_exporter()
    make_failures = (lambda: failure_exporter) if failure_exporter is not None else make
    spans = _happy(make) if make is not None else None
    failures = _failures(make_failures, failure_queue_spans) if make_failures is not None else None
    if _ours is None:
        _ours = TracerProvider(resource=_resource(service_name), shutdown_on_exit=False)
        _ours.add_span_processor(_switch)
        trace.set_tracer_provider(_ours)
        atexit.register(_at_exit)
    _switch.queue = spans
    return Telemetry(_ours, spans, failures)


def _at_exit() -> None:
    active = _active
    if active is not None:
        active.shutdown(EXIT_DEADLINE_S)


def _resource(service_name: str | None) -> Resource:
    given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    named = os.environ.get("OTEL_SERVICE_NAME") or SERVICE_NAME in {
        one.partition("=")[0].strip() for one in given.split(",")
    }
    return Resource.create({} if service_name is None or named else {SERVICE_NAME: service_name})


def _failures(make: MakeExporter, capacity: int) -> SpanQueue:
    return SpanQueue("failures", make, capacity=capacity, batch_max=min(512, capacity), delay_s=_FAILURE_DELAY_S)


def _happy(make: MakeExporter) -> SpanQueue:
    capacity = int(_number("OTEL_BSP_MAX_QUEUE_SIZE", 2048))
    batch_max = int(_number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512))
    delay_s = _number("OTEL_BSP_SCHEDULE_DELAY", 5000) / 1000
    return SpanQueue("spans", make, capacity=capacity, batch_max=min(batch_max, capacity), delay_s=delay_s)


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 1 <= number < 1e9:
        raise ConfigurationError(f"{variable}={text!r} must be a number, 1 or more")
    return number


def _make_exporter() -> MakeExporter | None:
    """What makes an exporter as the variables say; None for `none`."""
    wanted = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"
    if wanted == "none":
        return None
    if wanted == "console":
        return ConsoleSpanExporter
    if wanted != "otlp":
        raise ConfigurationError(f"OTEL_TRACES_EXPORTER={wanted!r} is not known; use otlp, console or none")
    variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((p for v in variables if (p := os.environ.get(v, "").strip().lower())), "grpc")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter
    raise ConfigurationError(f"OTLP protocol {protocol!r} is not known; use grpc or http/protobuf")
