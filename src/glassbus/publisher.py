"""The way in: checks a message, seals it into an envelope, counts and states what became of it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from glassbus.clock import Clock
from glassbus.codec import RAW, Codec, encode_with_any
from glassbus.config import Settings
from glassbus.errors import InvalidHeaders, InvalidPayload, PublishRejected, shown, type_name
from glassbus.facts import (
    DuplicateRecognised,
    MessagePublished,
    MessageSpooled,
    MessageUnrouted,
    PublishLeftUncertain,
    PublishRefused,
)
from glassbus.message import (
    KEY_LENGTH_MAX,
    MESSAGE_ID_LENGTH_MAX,
    Envelope,
    Level,
    Priority,
    check_headers,
    check_text,
    check_topic,
)
from glassbus.observer import Hub, Observer, Propagator, safe_text
from glassbus.policy.routing import OTHER, ByTopic, destination, matches
from glassbus.record.tally import PublishTally
from glassbus.transport import Stored

# Looking a member up on its enum takes longer than comparing it.
_NORMAL = Priority.NORMAL
_TRACEPARENT_LENGTH = 55
_TRACE_CONTEXT = frozenset({"traceparent", "tracestate", "baggage"})
#: Where the trace context of a stranger is kept, to be linked to.
_LINKED = "linked-traceparent"
_DELAY_MAX_S = 10 * 365 * 86400
# Message ids end in 60 bits that run through every value once, in an order that looks random
# (a Weyl sequence: any odd step does). A leading 1 keeps them 16 hexadecimal digits long.
_ID_STEP = 0x9E3779B97F4A7C1
_ID_MASK = (1 << 60) - 1
_ID_TOP = 1 << 60


class Publisher:
    """Makes envelopes, and keeps the counts of publishing by destination."""

    def __init__(self, settings: Settings, level: Level, hub: Hub, clock: Clock, codecs: tuple[Codec, ...]) -> None:
        self.tallies: dict[str, PublishTally] = {}
        self.bytes_max = settings.payload_bytes_max
        self._codec, *self._further_codecs = codecs
        self._untrusted = settings.untrusted
        self._level = level
        self._hub = hub
        self._monotonic, self._wall = clock.monotonic, clock.wall
        self._topics: ByTopic[PublishTally] = ByTopic()
        self._patterns: list[str] = []
        self._propagators: tuple[Propagator, ...] = ()
        self._blank: dict[str, str] = {}
        self._sampling: tuple[Observer, ...] = ()
        self._untold: list[MessagePublished] = []
        started = int(clock.wall()) & 0xFFFFFFFF
        self._id_prefix = f"{started:08x}{secrets.token_hex(4)}"
        self._id_next = secrets.randbits(60)

    def adopt(self, observer: Observer) -> None:
        """Let an observer that is a Propagator write headers, and one that asks for it see sampled publishes."""
        if isinstance(observer, Propagator):
            self._propagators = (*self._propagators, observer)
        if getattr(observer, "wants_sampled", False):
            self._sampling = (*self._sampling, observer)

    def learn(self, patterns: list[str]) -> None:
        """The patterns of every stored subscription; they bound the destination labels."""
        if patterns != self._patterns:
            self._patterns = patterns
            self._topics.clear()

    def seal(
        self,
        topic: str,
        payload: Any,
        message_id: str | None,
        key: str | None,
        priority: Priority,
        headers: dict[str, str] | None,
        delay: float,
        expires_in: float | None,
    ) -> Envelope:
        """Check everything and make the envelope. Raises PublishRejected."""
        if type(topic) is not str or topic not in self._topics:
            topic = check_topic(topic)
        codec: Codec = RAW if type(payload) is bytes else self._codec
        try:
            body = codec.encode(payload)
        except InvalidPayload as error:
            # No failure when another of the list can carry it: the envelope tells which one did.
            codec, body = encode_with_any(self._further_codecs, payload, error)
        if len(body) > self.bytes_max:
            raise InvalidPayload(
                f"payload takes {len(body)} bytes; at most {self.bytes_max} are allowed "
                "(payload_bytes_max): store it elsewhere and publish where it is"
            )
        carried = {} if headers is None else self._checked(topic, headers)
        if message_id is None and key is None and expires_in is None and delay == 0 and priority is _NORMAL:
            if self._propagators:
                self._inject(carried)
            self._id_next = low = (self._id_next + _ID_STEP) & _ID_MASK
            fresh = self._id_prefix + hex(low + _ID_TOP)[2:]  # noqa: FURB116 - half the time of a format
            return Envelope(fresh, topic, body, codec.name, carried, 1, None, self._wall())
        remember = message_id is not None
        if message_id is None:
            message_id = self._next_id()
        else:
            message_id = check_text("message id", message_id, MESSAGE_ID_LENGTH_MAX)
        if key is not None:
            key = check_text("key", key, KEY_LENGTH_MAX)
        now = self._wall()
        due_at = now + _seconds("delay", delay) if delay != 0 else 0.0
        expires_at = now + _seconds("expires_in", expires_in) if expires_in is not None else 0.0
        level = priority.value if type(priority) is Priority else _priority(priority).value
        self._inject(carried)
        return Envelope(message_id, topic, body, codec.name, carried, level, key, now, due_at, expires_at, remember)

    def _checked(self, topic: str, headers: dict[str, str]) -> dict[str, str]:
        """A copy of `headers` to be carried. What strangers say of a trace is set aside: a link, not a parent."""
        carried = check_headers(headers)
        if "traceparent" in carried and any(matches(pattern, topic) for pattern in self._untrusted):
            carried[_LINKED] = carried.pop("traceparent")
            carried.pop("tracestate", None)
        return carried

    def _inject(self, headers: dict[str, str]) -> None:
        """Let the propagators add to `headers`. What they add is checked like a publisher's; they take away
        nothing but trace context."""
        for propagator in self._propagators:
            # Most messages have no headers and get none: then one empty dict does for all of them.
            written = dict(headers) if headers else self._blank
            try:
                propagator.inject(written)
                if not written:
                    continue
                self._blank = {}
                written = _only_traceparent(written) or check_headers(written)
            except BaseException as error:  # noqa: BLE001 - a propagator may raise anything; the message goes out
                self._blank = {}
                self._hub.failed(propagator, "inject", error)
                continue
            if headers:
                for name in [n for n in headers if n not in written and n in _TRACE_CONTEXT]:
                    del headers[name]
            headers.update(written)

    def _next_id(self) -> str:
        self._id_next = low = (self._id_next + _ID_STEP) & _ID_MASK
        return self._id_prefix + hex(low + _ID_TOP)[2:]  # noqa: FURB116 - half the time of a format, for every message

    def stored(self, envelope: Envelope, outcome: Stored, duration_s: float) -> None:
        """Count a message that the store took, and state what somebody asked to see."""
        tally = self._topics.get(envelope.topic) or self._tally(envelope.topic)
        if outcome.duplicate or outcome.spooled is not None or not outcome.subscriptions:
            kind = DuplicateRecognised if outcome.duplicate else MessageSpooled if outcome.spooled else MessageUnrouted
            self._hub.state(
                kind(at=self._wall(), envelope=envelope, destination=tally.destination, duration_s=duration_s)
            )
            return
        tally.accepted += 1
        tally.duration.observe(duration_s)
        headers = envelope.headers
        if headers or self._hub.shows_happy:
            sampled = self._sampling and headers.get("traceparent", "").endswith("1")
            if sampled or self._hub.shows_happy:
                self._state_published(envelope, outcome, tally.destination, duration_s, bool(sampled))

    def _tally(self, topic: str) -> PublishTally:
        """The counts for `topic`'s destination: declared topics and patterns only, so they are bounded."""
        label = destination(topic, self._patterns)
        found = self.tallies.get(label)
        if found is None:
            found = self.tallies[label] = PublishTally(label)
        return self._topics.keep(topic, found, label)

    def _state_published(
        self, envelope: Envelope, outcome: Stored, label: str, duration_s: float, sampled: bool
    ) -> None:
        fact = MessagePublished(
            at=self._wall(),
            envelope=envelope,
            destination=label,
            level=self._level,
            subscriptions=outcome.subscriptions,
            duration_s=duration_s,
        )
        self._hub.state(fact)
        if sampled:
            # Not before its handler: spans are nothing that a message should wait for.
            if not self._untold:
                asyncio.get_running_loop().call_soon(self.tell)
            self._untold.append(fact)

    def tell(self) -> None:
        """Show what was published since the loop last turned to those that see sampled publishes."""
        facts, self._untold = self._untold, []
        for fact in facts:
            for observer in self._sampling:
                self._hub.show(observer, fact)

    def not_stored(self, batch: Sequence[Envelope], error: BaseException, started: float) -> None:
        """State what became of a batch that the store did not simply take."""
        if isinstance(error, PublishRejected):
            for envelope in batch:
                self.refused(envelope.topic, envelope.id, error, started)
            return
        cancelled = isinstance(error, asyncio.CancelledError)
        for envelope in batch:
            self._hub.state(
                PublishLeftUncertain(
                    at=self._wall(),
                    envelope=envelope,
                    destination=(self._topics.get(envelope.topic) or self._tally(envelope.topic)).destination,
                    error="the publish was cancelled" if cancelled else safe_text(error),
                    duration_s=self._monotonic() - started,
                )
            )

    def refused(self, topic: object, message_id: str | None, error: PublishRejected, started: float) -> None:
        """State that a message was not stored, for certain."""
        known = self._topics.get(topic) if type(topic) is str else None
        self._hub.state(
            PublishRefused(
                at=self._wall(),
                topic=topic[:80] if type(topic) is str else type_name(type(topic)),
                destination=known.destination if known is not None else OTHER,
                message_id=message_id[:MESSAGE_ID_LENGTH_MAX] if type(message_id) is str else "",
                reason=error.reason,
                error=safe_text(error, 300),
                duration_s=self._monotonic() - started,
            )
        )


def _only_traceparent(headers: dict[str, str]) -> dict[str, str] | None:
    """A plain copy when that is all there is, nearly always; None for `check_headers` to look at."""
    if len(headers) == 1 and type(headers) is dict:
        value = headers.get("traceparent")
        if type(value) is str and len(value) == _TRACEPARENT_LENGTH and value.isascii() and value.isprintable():
            return {"traceparent": value}
    return None


def _seconds(what: str, value: object) -> float:
    if type(value) not in (int, float) or not 0 <= value <= _DELAY_MAX_S:  # type: ignore[operator]
        raise InvalidHeaders(f"{what} must be 0 or more seconds, and at most ten years, not {shown(value)}")
    return float(value)  # type: ignore[arg-type]


def _priority(value: object) -> Priority:
    if type(value) is int and 0 <= value < len(Priority):
        return Priority(value)
    raise InvalidHeaders(f"priority must be one of {[f'Priority.{p.name}' for p in Priority]}, not {shown(value)}")
