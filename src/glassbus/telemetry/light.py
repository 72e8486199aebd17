"""A running span that costs little until somebody looks at it.

It has the whole face of an OpenTelemetry span, for the code in a handler. What that
code adds is kept aside, and is checked against the SDK's limits when it is exported,
on the exporter's thread.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry.trace import Link, Span, SpanContext, Status, StatusCode
from opentelemetry.util.types import Attributes, AttributeValue

from glassbus.errors import redacted, safe_text
from glassbus.telemetry.outlet import Event, SpanData, context_of, place_of
from glassbus.telemetry.propagation import Place


class LightSpan(Span):
    """`place` says where it is, when somebody asks; `add_to` puts what others said on top of what we say.

    Each call is atomic.
    """

    def __init__(self, place: Callable[[], Place]) -> None:
        self._place = place
        self._recording = True
        self._context: SpanContext | None = None
        self._attributes: dict[str, AttributeValue] = {}
        self._events: list[Event] = []
        self._links: list[Link] = []
        self._name = ""
        self._status: Status | None = None

    def get_span_context(self) -> SpanContext:
        context = self._context
        if context is None:
            context = self._context = context_of(self._place())
        return context

    def is_recording(self) -> bool:
        return self._recording

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        if self._recording:
            self._attributes[key] = value

    def set_attributes(self, attributes: Mapping[str, AttributeValue]) -> None:
        if self._recording:
            self._attributes.update(attributes)

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        if self._recording:
            at = timestamp if timestamp is not None else time.time_ns()
            self._events.append((name, dict(attributes or {}), at))

    def add_link(self, context: SpanContext, attributes: Attributes = None) -> None:
        if self._recording and context.is_valid:
            self._links.append(Link(context, attributes))

    def update_name(self, name: str) -> None:
        if self._recording:
            self._name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """As in the SDK: `OK` is final, `UNSET` changes nothing."""
        new = status if isinstance(status, Status) else Status(status, description)
        final = self._status is not None and self._status.status_code is StatusCode.OK
        if self._recording and not final and new.status_code is not StatusCode.UNSET:
            self._status = new

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        kind = type(exception)
        known = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        told: dict[str, Any] = {
            "exception.type": known,
            "exception.message": safe_text(exception),
            "exception.stacktrace": redacted("".join(traceback.format_exception(exception))),
            "exception.escaped": str(escaped),
        }
        self.add_event("exception", {**told, **(attributes or {})}, timestamp)

    def end(self, end_time: int | None = None) -> None:
        """Nothing can be added from now on. It is the bus that says when it ended, and exports it."""
        self._recording = False

    def add_to(self, span: SpanData) -> None:
        """Put what was added here into `span`. A failure that we know of outdoes a status that was set."""
        if self._attributes:
            span.attributes = {**self._attributes, **span.attributes}
            span.touched = True
        if self._events:
            span.events = (*self._events, *span.events)
        if self._links:
            added = [(place_of(link.context), dict(link.attributes or {})) for link in self._links]
            span.links = (*span.links, *added)
        span.name = self._name or span.name
        if self._status is not None and span.error is None:
            span.ok = self._status.status_code is StatusCode.OK
            span.error = None if span.ok else self._status.description or ""
