"""Where spans go: nowhere, or to whatever tracer provider the program has.

An outlet is made from a provider when it is first seen, which may be long after
the bus was made. This module needs the OpenTelemetry API only; the SDK is
imported when the program's own provider is one of the SDK's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from glassbus.telemetry.propagation import Place

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
SCOPE = "glassbus"
#: Roots are sampled when 64 random bits are below their bound.
ALWAYS = 1 << 64

#: Under it every span is exported, unless the program limits it further. Bytes.
VALUE_BYTES_MAX = 256

Attributes = Mapping[str, Any]
#: name, attributes, time in ns
Event = tuple[str, Attributes, int]

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSAMPLED = TraceFlags(TraceFlags.DEFAULT)


class SpanData:
    """A span as it is to be. Times are ns since the epoch; `end_ns` 0: it is still running.

    `kept`: it tells of a failure, so it takes the way that is always open. `error`: the
    description of a failed status. `touched`: code that is not ours added to it.
    """

    __slots__ = (
        "attributes", "end_ns", "error", "events", "kept", "kind", "links", "name", "ok", "parent", "place",
        "remote", "start_ns", "touched",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        kind: SpanKind,
        place: Place,
        parent: int,
        attributes: dict[str, Any],
        start_ns: int,
        end_ns: int,
        kept: bool = False,
        remote: bool = False,
        error: str | None = None,
        links: Sequence[tuple[Place, Attributes]] = (),
        events: Sequence[Event] = (),
    ) -> None:
        self.name = name
        self.kind = kind
        self.place = place
        self.parent = parent
        self.attributes = attributes
        self.start_ns = start_ns
        self.end_ns = end_ns
        self.kept = kept
        self.remote = remote
        self.error = error
        self.links = links
        self.events = events
        self.ok = self.touched = False


#: Makes the spans of one decision. May be called on any thread, once.
Make = Callable[[], Iterable[SpanData]]


class Outlet(Protocol):
    """Takes spans. Thread-safe; `emit` and `end` do not block beyond what the program's own processors do."""

    #: False: nobody records, so build nothing.
    recording: bool
    #: Whether spans have the ids that are derived here, so that logs and exemplars may name them.
    keeps_ids: bool
    #: Roots: sampled when 64 random bits are below it; None: ask `samples`.
    bound: int | None
    value_bytes_max: int

    def samples(self, trace_id: int, parent: SpanContext | None) -> bool:
        """Whether a publish in `trace_id` under `parent` is sampled."""

    def emit(self, span: SpanData, /) -> None:
        """Export a span that has ended."""

    def tell(self, make: Make, spans: int, kept: bool = True, /) -> None:
        """Export the `spans` spans that `make` makes: now, or soon on the exporter's thread. `kept`: of a failure."""

    def start(self, make: Callable[[], SpanData], place: Callable[[], Place], /) -> Span:
        """A running span at `place`, for the handler's context. A `LightSpan` where `make` need not be called yet."""

    def end(self, running: Span, span: SpanData, /) -> None:
        """End what `start` gave and is no `LightSpan`, with the attributes, status and end of `span`."""


class Nowhere:
    """No provider, or one that is switched off."""

    recording = keeps_ids = False
    bound: int | None = 0
    value_bytes_max = VALUE_BYTES_MAX

    def samples(self, trace_id: int, parent: SpanContext | None) -> bool:
        # Without an SDK contexts are passed on as they came, by the rules of the API.
        return parent is not None and parent.trace_flags.sampled

    def emit(self, span: SpanData, /) -> None:
        """There is nobody to show it to."""

    def tell(self, make: Make, spans: int, kept: bool = True, /) -> None:
        """There is nobody to show it to."""

    def start(self, make: Callable[[], SpanData], place: Callable[[], Place], /) -> Span:
        return NonRecordingSpan(context_of(place()))

    def end(self, running: Span, span: SpanData, /) -> None:
        """There is nobody to show it to."""


class Foreign:
    """A provider that is not the SDK's. It samples and names spans itself, so links between attempts
    lead to spans that only exist where it took our ids, and a failure is exported when it samples it."""

    recording = True
    keeps_ids = False
    bound: int | None = 0
    value_bytes_max = VALUE_BYTES_MAX

    def __init__(self, provider: trace.TracerProvider) -> None:
        self._tracer = provider.get_tracer(SCOPE, schema_url=SCHEMA_URL)

    def samples(self, trace_id: int, parent: SpanContext | None) -> bool:
        return parent is not None and parent.trace_flags.sampled

    def emit(self, span: SpanData, /) -> None:
        self.end(self._start(span), span)

    def tell(self, make: Make, spans: int, kept: bool = True, /) -> None:
        for span in make():
            self.emit(span)

    def start(self, make: Callable[[], SpanData], place: Callable[[], Place], /) -> Span:
        return self._start(make())

    def _start(self, span: SpanData) -> Span:
        parent = span.place._replace(span_id=span.parent or span.place.span_id)
        context = trace.set_span_in_context(NonRecordingSpan(context_of(parent, remote=True)))
        return self._tracer.start_span(
            span.name,
            context,
            span.kind,
            span.attributes,
            links_of(span.links),
            span.start_ns,
            record_exception=False,
            set_status_on_exception=False,
        )

    def end(self, running: Span, span: SpanData, /) -> None:
        running.set_attributes(span.attributes)
        for name, attributes, at in span.events:
            running.add_event(name, attributes, at)
        if span.error is not None:
            running.set_status(Status(StatusCode.ERROR, span.error))
        running.end(span.end_ns)


def context_of(place: Place, *, remote: bool = False) -> SpanContext:
    state = TraceState.from_header([place.state]) if place.state else None
    return SpanContext(place.trace_id, place.span_id, remote, _SAMPLED if place.sampled else _UNSAMPLED, state)


def links_of(links: Sequence[tuple[Place, Attributes]]) -> list[Link]:
    return [Link(context_of(place, remote=True), attributes) for place, attributes in links]


def place_of(context: SpanContext) -> Place:
    state = context.trace_state.to_header() if context.trace_state else ""
    return Place(context.trace_id, context.span_id, context.trace_flags.sampled, state)


NOWHERE: Outlet = Nowhere()


def _global_provider() -> trace.TracerProvider | None:
    return trace._TRACER_PROVIDER


# Both are asked for each message. The public getters take 0.7 us and 0.05 us, a look at the private names
# 0.04 us and 0.01 us; where a later API has others, the public ones serve.
#: What the program has set, or None so far.
global_provider: Callable[[], trace.TracerProvider | None] = (
    _global_provider if hasattr(trace, "_TRACER_PROVIDER") else trace.get_tracer_provider
)
#: The context of this task or thread: empty where nothing is current.
current_context: Callable[[], Context] = otel_context.get_current
with contextlib.suppress(AttributeError):  # another version of the API: then the public way
    current_context = otel_context._RUNTIME_CONTEXT._current_context.get  # type: ignore[attr-defined]


def outlet_for(provider: trace.TracerProvider | None, failures: Callable[[], Any]) -> Outlet:
    """The outlet of `provider`. `failures` gives the processor for failure spans, or None for the provider's own."""
    if provider is None or isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return NOWHERE
    if any(kind.__module__.startswith("opentelemetry.sdk.trace") for kind in type(provider).__mro__):
        from glassbus.telemetry.sdk import sdk_outlet

        return sdk_outlet(provider, failures)
    return Foreign(provider)
