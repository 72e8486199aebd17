"""Shows what happened: traces and metrics as two projections of the facts.

`observe` makes the observer that every bus has by default; it installs no SDK and
opens no port. `configure` sets the OpenTelemetry SDK up for programs that have not.
Importing this is cheap: the OpenTelemetry API and the Prometheus client are
imported when a bus is made, the SDK when the program has one or calls `configure`.

Every failure has its spans at any sampling rate. What that does not include:

- Spans of your own inside the first attempt of an unsampled message are not in its trace, nor is what
  is published inside them; inside its later attempts they are, if your sampler follows the parent (the
  default does).
- Under a tracer provider of your own, failure spans go to its processors and share their
  queues; `configure(failure_exporter=…)` gives them one of their own.
- A provider that is not the SDK's decides itself what it samples and which ids spans have, so
  links between attempts may lead nowhere.
- Beyond 5,000 failures of one site, then 200 a second, failures are only counted, and one span
  says how many it stands for.
- A retry that a spent budget delayed, made in one process and followed in another, is linked to
  where the policy would have put it.
- Topics of strangers (`MessageBus(untrusted=…)`) must be the same in every process of a store, or links
  between attempts of their messages lead nowhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from glassbus.telemetry.source import Source

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from glassbus.telemetry.observing import TelemetryObserver
    from glassbus.telemetry.setup import Telemetry

__all__ = ["Source", "configure", "exposition", "observe"]


def observe(
    source: Source,
    *,
    registry: Any = None,
    tracer_provider: Any = None,
    redact: Callable[[str], str] | None = None,
    wall: Callable[[], float] = time.time,
) -> TelemetryObserver:
    """An observer (and propagator) that shows `source`, its metrics registered.

    `registry` and `tracer_provider` default to the global ones; a global provider may be set at any
    time, before or after. `redact` is applied to every error text that goes into a span; by default it takes
    credentials out of URLs. `wall` is the clock of the facts, in seconds.
    """
    from glassbus.telemetry.metrics import collector_of
    from glassbus.telemetry.observing import TelemetryObserver
    from glassbus.telemetry.spans import without_credentials

    observer = TelemetryObserver(
        source,
        version=_version(),
        tracer_provider=tracer_provider,
        failures=_failure_queue if tracer_provider is None else lambda: None,
        redact=redact or without_credentials,
        wall=wall,
    )
    collector_of(registry).add(observer)
    return observer


def _failure_queue() -> Any:
    setup = sys.modules.get("glassbus.telemetry.setup")
    return setup.failure_queue() if setup is not None else None


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("glassbus")
    except PackageNotFoundError:
        return "unknown"


def configure(
    *,
    service_name: str | None = None,
    exporter: SpanExporter | None = None,
    failure_exporter: SpanExporter | None = None,
    failure_queue_spans: int = 4096,
) -> Telemetry:
    """Set the OpenTelemetry SDK up from `OTEL_*`; see `glassbus.telemetry.setup.configure`."""
    from glassbus.telemetry.setup import configure as configure_sdk

    return configure_sdk(
        service_name=service_name,
        exporter=exporter,
        failure_exporter=failure_exporter,
        failure_queue_spans=failure_queue_spans,
    )


def exposition(registry: Any = None, accept: str = "") -> tuple[str, bytes]:
    """(content type, body) of a scrape of `registry` (default: the global one), as `accept` asks for."""
    from glassbus.telemetry.metrics import exposition as expose

    return expose(registry, accept)
