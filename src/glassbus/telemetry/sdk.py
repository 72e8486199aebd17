"""The outlet of an OpenTelemetry SDK provider.

The SDK starts a span, samples it and ends it, in that order. We need spans whose
ids are known beforehand, that are made after the fact, and that are exported
although the head sampler said no. So this module, and no other, reaches past the
SDK's tracer: it builds the SDK's own span types and hands them to the provider's
processors. Where the SDK's private names it needs have changed, it says so in the log once and
the provider is used through its public face instead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from opentelemetry import trace
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.context import Context
from opentelemetry.sdk import trace as sdk_trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider, sampling
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode

from glassbus.telemetry.light import LightSpan
from glassbus.telemetry.outlet import (
    ALWAYS,
    NOWHERE,
    SCHEMA_URL,
    SCOPE,
    VALUE_BYTES_MAX,
    Foreign,
    Make,
    Outlet,
    SpanData,
    context_of,
    links_of,
)
from glassbus.telemetry.pipeline import Entry, SpanQueue, Switch, Unopened
from glassbus.telemetry.propagation import Place, new_span_id, random_bits

_log = logging.getLogger(__name__)

#: Processors that look at a span when it ends and not before: they may be shown finished spans.
_END_ONLY = (BatchSpanProcessor, SimpleSpanProcessor, SpanQueue, Switch)

_UNSET, _OK = Status(StatusCode.UNSET), Status(StatusCode.OK)


def sdk_outlet(provider: Any, failures: Callable[[], SpanProcessor | None]) -> Outlet:
    """The outlet of `provider`, through its private parts where they are as we know them."""
    if getattr(provider, "_disabled", False):
        return NOWHERE
    try:
        return SdkOutlet(provider, failures)
    except (AttributeError, TypeError) as error:
        _log.warning(
            "this OpenTelemetry SDK is not laid out as expected (%s): failures of unsampled messages have no spans",
            error,
        )
        return Foreign(provider)


class LiveSpan(sdk_trace.Span):
    """A running span with ids of our choosing; in all else the SDK's."""


class FinishedSpan(Unopened):
    """An ended span that is worked out when it is first looked at: by the exporter's thread, not by the loop."""

    def __init__(self, data: SpanData, outlet: SdkOutlet) -> None:
        self._made_of = data
        self._outlet = outlet

    def __getattr__(self, name: str) -> Any:
        # Called for what is not there yet: the attributes that the SDK's own `__init__` sets.
        if name.startswith("__") or "_name" in self.__dict__:
            raise AttributeError(name)
        outlet, data = self._outlet, self._made_of
        place, error = data.place, data.error
        super().__init__(
            data.name,
            context_of(place),
            context_of(Place(place.trace_id, data.parent, True), remote=data.remote) if data.parent else None,
            outlet.resource,
            outlet.bounded(data.attributes) if data.touched else data.attributes,
            [sdk_trace.Event(name, attributes, at) for name, attributes, at in data.events],
            links_of(data.links),
            data.kind,
            None,
            (_OK if data.ok else _UNSET) if error is None else Status(StatusCode.ERROR, error),
            data.start_ns,
            data.end_ns,
            outlet.scope,
        )
        return getattr(self, name)


class _Later:
    """What the `size` spans of one decision are made of: worked out once, when the first of them is looked at."""

    __slots__ = ("_made", "_make", "_size")

    def __init__(self, make: Make, size: int) -> None:
        self._make = make
        self._size = size
        self._made: list[SpanData] | None = None

    def span(self, number: int) -> SpanData:
        made = self._made
        if made is None:
            try:
                made = list(self._make())
                if len(made) != self._size:
                    raise ValueError(f"{len(made)} spans were made of {self._size}")
            except Exception as error:  # noqa: BLE001 - an exporter that meets it would give up its whole batch
                _log.warning("a decision could not be made into spans: %s", type(error).__name__)
                made = [_unmade(error) for _ in range(self._size)]
            self._made = made
        return made[number]


def _unmade(error: Exception) -> SpanData:
    """Stands for a span that could not be made."""
    attributes = {"error.type": type(error).__qualname__, "glassbus.error.component": "telemetry"}
    place, now = Place(random_bits(128) or 1, new_span_id(), True), time.time_ns()
    return SpanData("error telemetry", SpanKind.INTERNAL, place, 0, attributes, now, now, error="")


class LaterSpan(FinishedSpan):
    """A finished span of which not even the contents are there yet."""

    def __init__(self, later: _Later, number: int, outlet: SdkOutlet) -> None:
        self._later = later
        self._number = number
        self._outlet = outlet

    @property
    def _made_of(self) -> SpanData:  # type: ignore[override]
        return self._later.span(self._number)


class _Router(SpanProcessor):
    """Shows running spans to the provider's processors, and each ended one to those it belongs to."""

    def __init__(self, processors: SpanProcessor, failures: Callable[[], SpanProcessor | None]) -> None:
        self._processors = processors
        self._failures = failures

    def on_start(self, span: sdk_trace.Span, parent_context: Context | None = None) -> None:
        self._processors.on_start(span, parent_context=parent_context)

    def _on_ending(self, span: sdk_trace.Span) -> None:
        self._processors._on_ending(span)

    def on_end(self, span: ReadableSpan) -> None:
        attributes = span.attributes
        kept = attributes is not None and "glassbus.keep" in attributes
        ((kept and self._failures()) or self._processors).on_end(span)


class SdkOutlet:
    recording = keeps_ids = True

    def __init__(self, provider: TracerProvider, failures: Callable[[], SpanProcessor | None]) -> None:
        self._provider = provider
        self._failures = failures
        self._processors = provider._active_span_processor
        self._limits: SpanLimits = provider._span_limits
        self._router = _Router(self._processors, failures)
        self.scope = InstrumentationScope(SCOPE, _version(), SCHEMA_URL)
        self._sampler = provider.sampler
        self.bound, self._as_parent = _fast_form(provider.sampler)
        limit = self._limits.max_span_attribute_length
        self.value_bytes_max = VALUE_BYTES_MAX if limit is None else min(VALUE_BYTES_MAX, limit)
        self._seen: Any = None
        self._end_only = False
        self._sole: Any = None
        self._batches: Any = None
        self._batch: Any = None

    def bounded(self, attributes: dict[str, Any]) -> BoundedAttributes:
        """What code that is not ours may have added to, within the program's limits."""
        limits = self._limits
        return BoundedAttributes(limits.max_span_attributes, attributes, True, limits.max_span_attribute_length)

    @property
    def resource(self) -> Resource:
        # Asked each time: a fork changes it.
        return self._provider.resource

    def samples(self, trace_id: int, parent: SpanContext | None) -> bool:
        if parent is not None and self._as_parent:
            return bool(parent.trace_flags.sampled)
        context = None if parent is None else trace.set_span_in_context(NonRecordingSpan(parent))
        result = self._sampler.should_sample(context, trace_id, "publish", SpanKind.PRODUCER, None, ())
        return result.decision is sampling.Decision.RECORD_AND_SAMPLE

    def emit(self, span: SpanData, /) -> None:
        failures = self._failures() if span.kept else None
        if failures is not None:
            failures.on_end(FinishedSpan(span, self))
        elif self._may_skip_start():
            self._processors.on_end(FinishedSpan(span, self))
        else:
            self.end(self._start(span), span)

    def tell(self, make: Make, spans: int, kept: bool = True, /) -> None:
        queue = self._failures() if kept else None
        if queue is None and self._may_skip_start():
            queue = self._sole.queue if isinstance(self._sole, Switch) else self._sole
        if isinstance(queue, SpanQueue):
            queue.put(Entry(make, self._finished, spans))
            return
        if queue is not None and queue is self._batches:
            later = _Later(make, spans)
            for number in range(spans):
                self._batch(LaterSpan(later, number, self))
            return
        for span in make():
            self.emit(span)

    def _finished(self, span: SpanData) -> FinishedSpan:
        return FinishedSpan(span, self)

    def _may_skip_start(self) -> bool:
        """Whether every processor of the provider only cares for ended spans, so that a finished one will do."""
        processors = getattr(self._processors, "_span_processors", None)
        if processors is not self._seen:
            self._end_only = processors is not None and all(type(p) in _END_ONLY for p in processors)
            self._sole = processors[0] if processors is not None and len(processors) == 1 else None
            # The SDK's batches look at no more of a span than whether it is sampled, so it may be made later.
            self._batch = getattr(getattr(self._sole, "_batch_processor", None), "emit", None)
            usual = type(self._sole) is BatchSpanProcessor and "on_end" not in vars(self._sole)
            self._batches = self._sole if usual and self._batch is not None else None
            self._seen = processors
        return self._end_only

    def start(self, make: Callable[[], SpanData], place: Callable[[], Place], /) -> Span:
        return LightSpan(place) if self._may_skip_start() else self._start(make())

    def _start(self, span: SpanData) -> LiveSpan:
        place = span.place
        parent = context_of(Place(place.trace_id, span.parent, True), remote=span.remote) if span.parent else None
        running = LiveSpan(
            span.name,
            context_of(place),
            parent,
            self._sampler,
            None,
            self.resource,
            span.attributes,
            None,
            links_of(span.links),
            span.kind,
            self._router,
            limits=self._limits,
            instrumentation_scope=self.scope,
        )
        running.start(span.start_ns, trace.set_span_in_context(NonRecordingSpan(parent)) if parent else None)
        return running

    def end(self, running: Span, span: SpanData, /) -> None:
        running.set_attributes(span.attributes)
        for name, attributes, at in span.events:
            running.add_event(name, attributes, at)
        if span.error is not None:
            running.set_status(Status(StatusCode.ERROR, span.error))
        running.end(span.end_ns)


def _fast_form(sampler: sampling.Sampler) -> tuple[int | None, bool]:
    """(bound for roots or None to ask, whether a child does as its parent) of a sampler we know."""
    if isinstance(sampler, sampling.StaticSampler):
        result = sampler.should_sample(None, 1, "")
        return (ALWAYS if result.decision is sampling.Decision.RECORD_AND_SAMPLE else 0), False
    if type(sampler) is sampling.TraceIdRatioBased:
        return sampler.bound, False
    if isinstance(sampler, sampling.ParentBased):
        bound, _ = _fast_form(sampler._root)
        delegates = (
            (sampler._remote_parent_sampled, sampling.ALWAYS_ON),
            (sampler._local_parent_sampled, sampling.ALWAYS_ON),
            (sampler._remote_parent_not_sampled, sampling.ALWAYS_OFF),
            (sampler._local_parent_not_sampled, sampling.ALWAYS_OFF),
        )
        return bound, all(given is usual for given, usual in delegates)
    return None, False


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("glassbus")
    except PackageNotFoundError:
        return "unknown"
