"""What each span says: names, kinds and attributes, as `catalogue` declares them.

Semantic conventions for messaging: https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
Payloads, headers and keys are never attributes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.trace import SpanKind

from glassbus.errors import redact
from glassbus.facts import Delivery
from glassbus.message import Envelope
from glassbus.policy.retry import Retry
from glassbus.record.failures import Failure
from glassbus.telemetry.outlet import Attributes, SpanData
from glassbus.telemetry.propagation import Place, Trail, linked, new_span_id

STACK_BYTES_MAX = 4096
_SYSTEMS = {"nats": "nats", "amqp": "rabbitmq"}

# Looked up once: each look at a member of an enum takes a tenth of what a span takes.
_PRODUCER, _CONSUMER, _CLIENT, _INTERNAL = SpanKind.PRODUCER, SpanKind.CONSUMER, SpanKind.CLIENT, SpanKind.INTERNAL

Link = tuple[Place, Attributes]
_TO_PUBLISH: Attributes = {"glassbus.link": "publish"}
_TO_PREVIOUS: Attributes = {"glassbus.link": "previous_attempt"}
_TO_FAILURE: Attributes = {"glassbus.link": "last_failure"}
_TO_CAUSE: Attributes = {"glassbus.link": "cause"}
_TO_OPENING: Attributes = {"glassbus.link": "opening"}
_TO_STRANGER: Attributes = {"glassbus.link": "stranger"}


_OPT_IN = "OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN"


def span_events_wanted() -> bool:
    """Whether exceptions are recorded as span events: always, unless the standard variable says `logs`."""
    chosen = {part.strip() for part in os.environ.get(_OPT_IN, "").split(",")}
    return "logs" not in chosen or "logs/dup" in chosen


def ns(seconds: float) -> int:
    return int(seconds * 1e9)


def capped(text: str, bytes_max: int) -> str:
    """`text` as valid UTF-8 of at most `bytes_max` bytes: a lone surrogate would make a whole batch unexportable."""
    if len(text) <= bytes_max and text.isascii():
        return text
    return text.encode("utf-8", "replace")[:bytes_max].decode("utf-8", "ignore")


@lru_cache(maxsize=256)
def _stack(text: str) -> str:
    # One string for each failure site, however many of its spans wait in a queue.
    return capped(text, STACK_BYTES_MAX)


#: The default redaction: no credentials of any URL.
without_credentials = redact


def _server(address: str) -> dict[str, str | int]:
    """`server.address` and `server.port` of a broker. Of several that may serve, none is known to be the one."""
    place = urlsplit(address) if "://" in address and "," not in address else None
    if place is None or not place.hostname:
        return {}
    return {"server.address": place.hostname, **({"server.port": place.port} if place.port else {})}


class SpanWriter:
    """Writes the spans of one bus. Reads nothing but its arguments, so any thread may use it."""

    def __init__(
        self,
        bus: str,
        transport: str,
        retry_of: Callable[[str], Retry | None],
        clean: Callable[[str], str],
        address: str = "",
    ) -> None:
        self.bus = bus
        self._server = _server(address)
        self.value_bytes_max = 256
        self._events = span_events_wanted()
        self._system = _SYSTEMS.get(transport, "glassbus")
        self._retry_of = retry_of
        self._clean = clean

    def _messaging(self, operation: str, kind: str, envelope: Envelope, destination: str) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            "messaging.system": self._system,
            "messaging.operation.name": operation,
            "messaging.operation.type": kind,
            "messaging.destination.name": envelope.topic,
            "messaging.message.id": envelope.id,
            "glassbus.bus": self.bus,
        }
        if destination != envelope.topic:
            attributes["messaging.destination.template"] = destination
        attributes.update(self._server)
        return attributes

    def text(self, text: str) -> str:
        """An error text as it may be shown. What a failing redaction hook was given is not."""
        try:
            cleaned = str.__str__(self._clean(text))
        except BaseException as error:  # noqa: BLE001 - the hook is the program's, and may raise anything
            return f"<redaction raised {type(error).__name__}>"
        return capped(cleaned, self.value_bytes_max)

    # The way of a message

    def publish(
        self,
        envelope: Envelope,
        destination: str,
        place: Place,
        parent: int,
        end_s: float,
        duration_s: float,
        outcome: str,
        failure: Failure | None = None,
    ) -> SpanData:
        """`place` is the publish itself; a stranger's context that it was given is linked to."""
        attributes = self._messaging("publish", "send", envelope, destination)
        attributes["glassbus.outcome"] = outcome
        span = SpanData(
            f"publish {destination}", _PRODUCER, place, parent, attributes, ns(end_s - duration_s), ns(end_s)
        )
        stranger = linked(envelope.headers)
        if stranger is not None:
            span.links = [(stranger, _TO_STRANGER)]
        if failure is not None:
            self.fail(span, failure)
        return span

    def process(
        self,
        delivery: Delivery,
        trail: Trail,
        previous: Place | None,
        start_ns: int,
        end_ns: int,
        strangers: Sequence[Place] = (),
    ) -> SpanData:
        envelope, destination, attempt = delivery.envelope, delivery.destination, delivery.attempt
        attributes: dict[str, Any] = {
            "messaging.system": self._system,
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": envelope.topic,
            "messaging.message.id": envelope.id,
            "messaging.consumer.group.name": delivery.subscription,
            "glassbus.bus": self.bus,
            "glassbus.attempt": attempt,
            "glassbus.published_at": envelope.published_at,
        }
        if destination != envelope.topic:
            attributes["messaging.destination.template"] = destination
        attributes.update(self._server)
        retry = self._retry_of(delivery.subscription)
        if retry is not None:
            attributes["glassbus.max_attempts"] = retry.max_attempts
        if delivery.redelivered:
            attributes["glassbus.redelivered"] = delivery.redelivered
        span = SpanData(
            f"process {destination}", _CONSUMER, trail.own, trail.parent, attributes, start_ns, end_ns, False, True
        )
        if attempt > 1 or delivery.replays:
            # It follows a failure: part of a story that is kept.
            span.kept = attributes["glassbus.keep"] = True
            if delivery.replays:
                attributes["glassbus.replays"] = delivery.replays
            links: list[Link] = []
            if previous is not None:
                links.append((previous, _TO_PREVIOUS))
            if trail.delayed and trail.origin.span_id:
                links.append((trail.origin, _TO_PUBLISH))
            span.links = links
        if strangers:
            span.links = [*span.links, *((place, _TO_STRANGER) for place in strangers)]
        return span

    def fail(self, span: SpanData, failure: Failure) -> None:
        """Mark `span` as failed."""
        span.attributes["error.type"] = failure.kind
        span.kept = span.attributes["glassbus.keep"] = True
        span.error = self.text(f"{failure.kind}: {failure.message}")

    def error(self, failure: Failure, at: Place, parent: int, at_ns: int, summarised: int = 0) -> SpanData:
        """A span of its own for an error, in the trace of `at` under `parent`."""
        message = self.text(failure.message)
        attributes: dict[str, Any] = {
            "error.type": failure.kind,
            "glassbus.bus": self.bus,
            "glassbus.error.component": failure.component,
            "glassbus.error.category": failure.category,
            "glassbus.error.severity": failure.severity,
            "glassbus.keep": True,
        }
        event: dict[str, Any] = {"exception.type": failure.kind, "exception.message": message}
        report = failure.report
        if report is not None:
            attributes["glassbus.error.id"] = capped(report.error_id, self.value_bytes_max)
            attributes["glassbus.error.fingerprint"] = report.fingerprint
            if report.stack_trace:
                event["exception.stacktrace"] = _stack(report.stack_trace)
        if summarised:
            attributes["glassbus.summarised"] = summarised
        name = f"error {failure.destination or failure.component}"
        place = Place(at.trace_id, new_span_id(), True, at.state)
        events = (("exception", event, at_ns),) if self._events else ()
        return SpanData(name, _INTERNAL, place, parent, attributes, at_ns, at_ns, True, False, message, (), events)

    def recover(self, delivery: Delivery, at: Place, start_ns: int, end_ns: int, action: str, outcome: str) -> SpanData:
        attributes: dict[str, Any] = {
            "messaging.message.id": delivery.envelope.id,
            "glassbus.bus": self.bus,
            "glassbus.subscription": delivery.subscription,
            "glassbus.attempt": delivery.attempt,
            "glassbus.recovery.action": action,
            "glassbus.recovery.outcome": outcome,
            "glassbus.keep": True,
        }
        return self._child(f"recover {delivery.destination}", _INTERNAL, at, attributes, start_ns, end_ns)

    def settle(
        self, delivery: Delivery, at: Place, at_ns: int, operation: str, reason: str, error: str | None = None
    ) -> SpanData:
        attributes = self._messaging("settle", "settle", delivery.envelope, delivery.destination)
        attributes["glassbus.settlement"] = operation
        attributes["messaging.consumer.group.name"] = delivery.subscription
        attributes["glassbus.attempt"] = delivery.attempt
        attributes["glassbus.reason"] = reason
        attributes["glassbus.keep"] = True
        if error is not None:
            attributes["error.type"] = reason
        span = self._child(f"settle {delivery.destination}", _CLIENT, at, attributes, at_ns, at_ns)
        span.error = error
        return span

    def replay(
        self,
        delivery: Delivery,
        place: Place,
        origin: Place,
        failed: Place | None,
        at_ns: int,
        strangers: Sequence[Place] = (),
    ) -> SpanData:
        attributes = self._messaging("replay", "send", delivery.envelope, delivery.destination)
        attributes["messaging.consumer.group.name"] = delivery.subscription
        attributes["glassbus.replays"] = delivery.replays
        attributes["glassbus.keep"] = True
        links = [(stranger, _TO_STRANGER) for stranger in strangers]
        if failed is not None:
            links.insert(0, (failed, _TO_FAILURE))
        if origin.span_id:
            links.insert(0, (origin, _TO_PUBLISH))
        name = f"replay {delivery.destination}"
        return SpanData(name, _PRODUCER, place, 0, attributes, at_ns, at_ns, kept=True, links=links)

    # Around it

    def breaker(
        self,
        name: str,
        kind: str,
        move: tuple[str, str],
        reason: str,
        at: Place,
        at_ns: int,
        causes: Iterable[Place],
        opening: Place | None,
    ) -> SpanData:
        """A transition; under `at` when that is the attempt which tipped it, else a root there."""
        attributes = {
            "glassbus.bus": self.bus,
            "glassbus.breaker.name": name,
            "glassbus.breaker.kind": kind,
            "glassbus.breaker.from_state": move[0],
            "glassbus.breaker.to_state": move[1],
            "glassbus.reason": self.text(reason),
            "glassbus.keep": True,
        }
        span = self._child(f"breaker {name} {move[0]}->{move[1]}", _INTERNAL, at, attributes, at_ns, at_ns)
        links: list[Link] = [(cause, _TO_CAUSE) for cause in causes]
        if opening is not None:
            links.append((opening, _TO_OPENING))
        span.links = links
        return span

    def happening(
        self,
        name: str,
        at: Place,
        start_ns: int,
        end_ns: int,
        attributes: dict[str, Any],
        error: str | None = None,
        *,
        calls: bool = False,
    ) -> SpanData:
        """Something of the bus itself: connection, overflow, shutdown. `calls`: it called somebody else."""
        attributes = {"glassbus.bus": self.bus, **attributes, "glassbus.keep": True}
        span = self._child(name, _CLIENT if calls else _INTERNAL, at, attributes, start_ns, end_ns)
        span.error = error
        return span

    def _child(
        self, name: str, kind: SpanKind, at: Place, attributes: dict[str, Any], start_ns: int, end_ns: int
    ) -> SpanData:
        place = Place(at.trace_id, new_span_id(), True, at.state)
        return SpanData(name, kind, place, at.span_id, attributes, start_ns, max(start_ns, end_ns), kept=True)
