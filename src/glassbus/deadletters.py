"""The dead-letter queue: inspect, replay, discard."""

from __future__ import annotations

from typing import Any

import msgspec

from glassbus.clock import Clock
from glassbus.codec import CODECS
from glassbus.errors import ErrorReport, PayloadUndecodable, UnknownDeadLetter
from glassbus.facts import DeadLetterDiscarded, DeadLetterReplayed, Delivery
from glassbus.message import Message, Priority
from glassbus.observer import Hub
from glassbus.transport import DeadLetterFilter, DeadLetterRecord, Transport


class DeadLetter(msgspec.Struct, frozen=True):
    """A delivery at rest. `attempts` were made; `report` tells the last failure.

    `message.payload` is the decoded payload, or the raw bytes where they cannot be decoded.
    Times are wall seconds; `replays` counts how often it was replayed before.
    """

    id: str
    message: Message[Any]
    subscription: str
    attempts: int
    report: ErrorReport
    reason: str
    died_at: float
    first_failed_at: float
    replays: int


class DeadLetters:
    """The dead letters of a bus's store, of every subscription in it."""

    def __init__(self, transport: Transport, hub: Hub, clock: Clock) -> None:
        self._transport = transport
        self._hub = hub
        self._clock = clock

    async def list(
        self,
        limit: int = 100,
        *,
        subscription: str | None = None,
        topic: str | None = None,
        message_id: str | None = None,
        category: str | None = None,
        exception_type: str | None = None,
        fingerprint: str | None = None,
        since: float | None = None,
        until: float | None = None,
        before: str | None = None,
    ) -> list[DeadLetter]:
        """At most `limit` dead letters that match every filter given, newest first.

        `since` and `until` are wall seconds; `before` is the id of the last one of the page before.
        """
        wanted = DeadLetterFilter(
            subscription, topic, message_id, category, exception_type, fingerprint, since, until, before
        )
        return [_shown(record) for record in await self._transport.dead_letters(wanted, limit)]

    async def get(self, dead_letter_id: str) -> DeadLetter:
        """One dead letter. Raises UnknownDeadLetter."""
        found = await self._transport.dead_letters(DeadLetterFilter(id=dead_letter_id), 1)
        if not found:
            raise UnknownDeadLetter(f"no dead letter {dead_letter_id!r}")
        return _shown(found[0])

    async def replay(self, *ids: str) -> int:
        """Put dead letters back in their queues as new, attempts at 0; how many. All or none.

        The same message id and headers are kept. Raises UnknownDeadLetter.
        """
        moved = await self._transport.replay(ids)
        for record in moved:
            self._hub.state(
                DeadLetterReplayed(at=self._clock.wall(), delivery=_delivery(record, 1), report=record.report)
            )
        return len(moved)

    async def discard(self, *ids: str) -> int:
        """Remove dead letters for good; how many. All or none. Raises UnknownDeadLetter."""
        removed = await self._transport.discard(ids)
        for record in removed:
            self._hub.state(
                DeadLetterDiscarded(at=self._clock.wall(), delivery=_delivery(record, 0), report=record.report)
            )
        return len(removed)


def _delivery(record: DeadLetterRecord, replays: int) -> Delivery:
    return Delivery(
        record.envelope,
        record.subscription,
        record.destination,
        record.attempts,
        first_failed_at=record.first_failed_at,
        replays=record.replays + replays,
    )


def _shown(record: DeadLetterRecord) -> DeadLetter:
    envelope = record.envelope
    codec = CODECS.get(envelope.codec)
    try:
        payload = codec.decoder(Any)(envelope.body) if codec is not None else envelope.body
    except PayloadUndecodable:
        payload = envelope.body  # kept raw: what cannot be read must not be lost
    message = Message(
        envelope.id,
        envelope.topic,
        payload,
        envelope.headers,
        Priority(envelope.priority),
        envelope.key,
        envelope.published_at,
    )
    return DeadLetter(
        record.id,
        message,
        record.subscription,
        record.attempts,
        record.report,
        record.reason,
        record.died_at,
        record.first_failed_at,
        record.replays,
    )
