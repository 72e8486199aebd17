"""One write transaction: what its stages share, and the rows that more than one of them moves."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import apsw
import msgspec

from glassbus.errors import StoreCorrupt
from glassbus.facts import Delivery, DeliveryExpired
from glassbus.message import Envelope
from glassbus.policy.delivery import State
from glassbus.transport.sqlite.books import Books, Held, Queue
from glassbus.transport.sqlite.requests import Answers
from glassbus.transport.sqlite.schema import FREE, KEYED, REDELIVERED, SUSPECT
from glassbus.transport.sqlite.sql import numbers, select

_encode_headers = msgspec.json.Encoder().encode
_decode_headers = msgspec.json.Decoder(dict[str, str]).decode

_DELIVERIES = """
SELECT d.id, d.attempt, d.first_failed_at, d.recovering, d.replays, d.suspect, d.expires_at, d.subscription,
       m.id, m.topic, m.body, m.codec, m.headers, m.priority, m.key, m.published_at, m.due_at, m.remember_until, m.seq
FROM deliveries AS d JOIN messages AS m ON m.seq = d.message
"""
_BY_IDS = _DELIVERIES + "WHERE d.id IN carray(?)"

# A message goes with its last delivery, unless its id must be recognised for a while yet.
_NO_DELIVERY = "NOT EXISTS (SELECT 1 FROM deliveries AS d WHERE d.id BETWEEN m.seq AND m.seq + m.fanout - 1)"
_BURY = f"""
UPDATE messages AS m SET
  digest = coalesce(digest, glassbus_digest(topic, codec, body)), body = NULL, headers = NULL,
  remember_until = max(remember_until, iif(seq <= ?2, ?3, 0))
WHERE seq IN carray(?1) AND body IS NOT NULL AND (remember_until > ?4 OR seq <= ?2) AND {_NO_DELIVERY}
"""  # noqa: S608 - constants only, here and below
_DROP = f"""
DELETE FROM messages AS m
WHERE seq IN carray(?1) AND remember_until <= ?2 AND seq > ?3 AND {_NO_DELIVERY}
"""  # noqa: S608
_FREE_KEY = f"""
UPDATE deliveries SET lane = iif(suspect > 0, {SUSPECT}, {FREE})
WHERE id IN (SELECT (SELECT min(id) FROM deliveries
                     WHERE subscription = ?1 AND key = ?2 AND state = 0 AND lane = {KEYED} AND priority = p.column1)
             FROM (VALUES (0), (1), (2), (3)) AS p)
RETURNING lane
"""  # noqa: S608


class VanishedError(Exception):
    """A delivery was not where it must be: somebody else moved it. The transaction is done again, carefully."""


class Transaction:
    """What the stages of one transaction share. Nothing of it is true before the commit."""

    def __init__(
        self,
        connection: apsw.Connection,
        books: Books,
        owner: int,
        monotonic: float,
        wall: float,
        in_flight: dict[int, Held],
        *,
        suspects: int = 0,
        careful: bool = False,
    ) -> None:
        self.connection = connection
        self.books = books
        self.owner = owner
        self.monotonic = monotonic
        self.wall = wall
        self.in_flight = in_flight
        self.suspects = suspects  # how many of `in_flight` are suspects
        self.careful = careful
        self.answers = Answers()
        #: Applied to `in_flight` once committed.
        self.claimed: list[Held] = []
        self.ended: list[int] = []
        #: The earliest due times that this transaction adds.
        self.retry_at = float("inf")
        self.scheduled_at = float("inf")
        self.expiry_at = float("inf")
        self.made_room = False

    def deliveries(self, ids: Collection[int]) -> Iterator[tuple[Delivery, Held]]:
        """The stored deliveries of `ids`, each with its handle."""
        if not ids:
            return
        for row in select(self.connection, _BY_IDS, (numbers(ids),)):
            yield self._delivery(row)

    def _delivery(self, row: tuple[Any, ...]) -> tuple[Delivery, Held]:
        queue = self.books.by_id[row[7]]
        envelope = envelope_of(row)
        held = Held(row[0], row[18], queue, self.owner, row[1], row[14], row[5], row[17] > 0)
        delivery = Delivery(
            envelope,
            queue.name,
            self.books.route(envelope.topic).destination,
            row[1],
            held,
            REDELIVERED[row[5]],  # type: ignore[arg-type] # the schema's words are the field's
            row[2],
            _recovering(row[3]),
            row[4],
        )
        return delivery, held

    def drop_messages(self, seqs: Collection[int], *, remembered: bool) -> None:
        """Let go of the messages of `seqs` that have no delivery left. `remembered`: some may have to be known yet."""
        if not seqs:
            return
        watermark = self.books.watermarked(self.wall)
        wanted = numbers(seqs)
        if remembered or watermark:
            self.connection.execute(_BURY, (wanted, watermark, self.books.watermark_until, self.wall))
        self.connection.execute(_DROP, (wanted, self.wall, watermark))

    def free_keys(self, keys: Iterable[tuple[Queue, str]]) -> None:
        """The attempts on `keys` have ended: the next delivery of each key, one a priority, may be claimed."""
        for queue, key in keys:
            if not queue.keyed:
                continue
            for (lane,) in select(self.connection, _FREE_KEY, (queue.id, key)):
                queue.keyed -= 1
                queue.suspects += lane == SUSPECT
                self.books.dirty.add(queue)

    def expire(self, ids: Collection[int]) -> None:
        """Settle waiting deliveries as expired, and say so."""
        seqs, remembered = [], False
        keys: set[tuple[Queue, str]] = set()
        places = "SELECT id, state, lane FROM deliveries WHERE id IN carray(?)"
        states = {id_: (state, lane) for id_, state, lane in select(self.connection, places, (numbers(ids),))}
        for delivery, held in self.deliveries(ids):
            queue = held.queue
            state, lane = states[held.id]
            leave(queue, state, lane)
            queue.expired += 1
            self.books.dirty.add(queue)
            seqs.append(held.seq)
            remembered = remembered or held.remember
            if held.key is not None and lane != KEYED:
                keys.add((queue, held.key))
            self.answers.facts.append(DeliveryExpired(at=self.wall, delivery=delivery))
        self.connection.execute("DELETE FROM deliveries WHERE id IN carray(?)", (numbers(ids),))
        self.drop_messages(seqs, remembered=remembered)
        self.free_keys(keys)
        self.made_room = True


def leave(queue: Queue, state: int, lane: int) -> None:
    """Count a waiting delivery out of its place."""
    if state == State.READY:
        queue.ready -= 1
        queue.keyed -= lane == KEYED
        queue.suspects -= lane == SUSPECT
    elif state == State.SCHEDULED:
        queue.scheduled -= 1
    elif state == State.RETRYING:
        queue.retrying -= 1
    else:
        raise AssertionError(f"a delivery in state {state} does not wait")


def encode_headers(headers: dict[str, str]) -> str | None:
    return _encode_headers(headers).decode() if headers else None


def envelope_of(row: Sequence[Any]) -> Envelope:
    """The message of a row that ends like `_DELIVERIES`; its expiry is the delivery's, which a replay clears."""
    _, _, _, _, _, _, expires_at, _, id_, topic, body, codec, headers, priority, key, published_at, due_at, until, _ = (
        row
    )
    try:
        decoded = _decode_headers(headers) if headers else {}
    except msgspec.MsgspecError as error:
        raise StoreCorrupt(f"the stored headers of message {id_!r} are not readable: {error}") from error
    return Envelope(id_, topic, body, codec, decoded, priority, key, published_at, due_at, expires_at, until > 0)


def _recovering(stored: str | None) -> tuple[str, str] | None:
    if not stored:
        return None
    category, _, action = stored.partition(":")
    return category, action


def recovering_text(recovering: tuple[str, str] | None) -> str | None:
    return ":".join(recovering) if recovering else None
