"""Publishes: recognised, routed, admitted and written, whole batches or nothing of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from glassbus.errors import (
    ErrorCategory,
    ErrorReport,
    ErrorSeverity,
    MessageConflict,
    PublishRejected,
    QueueFull,
    StorageFull,
)
from glassbus.facts import BackpressureApplied, Delivery, DeliveryDeadLettered, OverflowHandled
from glassbus.message import Envelope
from glassbus.policy.overflow import Rung, next_rung
from glassbus.transport import Stored
from glassbus.transport.sqlite.books import Fresh, Queue, Route
from glassbus.transport.sqlite.claiming import Claiming
from glassbus.transport.sqlite.requests import Publish
from glassbus.transport.sqlite.settling import insert_dead_letter
from glassbus.transport.sqlite.sql import Bulk, numbers, select, texts
from glassbus.transport.sqlite.store import digest
from glassbus.transport.sqlite.transaction import Transaction, encode_headers

#: How long an id given by the caller is recognised again, in seconds.
DUPLICATE_WINDOW_S = 600.0

_MESSAGES = Bulk(
    "messages",
    "seq id topic codec headers body priority key published_at due_at expires_at fanout remember_until digest routed",
)
_DELIVERIES = Bulk(
    "deliveries", "id message subscription state lane priority key attempt owner due expires_at position"
)
# Most messages: for one subscription, without key, delay, expiry or an id to remember.
_PLAIN_MESSAGES = Bulk("messages", "seq id topic codec headers body priority published_at")
_PLAIN_DELIVERIES = Bulk("deliveries", "id message subscription state priority attempt owner position")
_KNOWN = "SELECT id, topic, codec, body, digest, routed, remember_until, seq FROM messages WHERE id IN carray(?)"
_TOMBSTONE = """
INSERT INTO messages (seq, id, topic, codec, headers, body, priority, key, published_at, due_at, expires_at, fanout,
                      remember_until, digest, routed)
VALUES (?, ?, ?, ?, NULL, NULL, ?, NULL, ?, 0, 0, 0, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET remember_until = max(remember_until, excluded.remember_until),
                               digest = coalesce(digest, excluded.digest), routed = coalesce(routed, excluded.routed)
"""


class _Known(NamedTuple):
    """An id that the store knows, and what it stands for."""

    digest: bytes
    stored: Stored


class Publishing:
    """Admits publishes in one transaction, first come, first served for each queue."""

    def __init__(self, txn: Transaction, claiming: Claiming, *, storage_full: str = "") -> None:
        self._txn = txn
        self._books = txn.books
        self._claiming = claiming
        self._storage_full = storage_full
        self._known: dict[str, _Known] = {}
        self._here: dict[str, Envelope] = {}
        self._messages: list[Any] = []
        self._fresh: list[Fresh] = []
        self._plain_messages: list[Any] = []
        self._plain_fresh: list[Fresh] = []
        self._overflow: list[tuple[Fresh, Queue]] = []

    def look_up(self, requests: Sequence[Publish]) -> None:
        """Ask the store once which of the ids it knows.

        Ids that the bus made itself, which are those not to be remembered, are new: they are
        asked for only when an insert has found otherwise (`careful`).
        """
        careful = self._txn.careful
        ids = {
            envelope.id
            for request in requests
            for envelope in request.batch
            if envelope.remember or careful or request.uncertain
        }
        if not ids:
            return
        connection, over = self._txn.connection, []
        for id_, topic, codec, body, mark, routed, until, seq in select(connection, _KNOWN, (texts(ids),)):
            if body is None and until <= self._txn.wall:
                over.append(seq)
                continue
            stored = Stored(self._books.names(routed), duplicate=True)
            self._known[id_] = _Known(digest(topic, codec, body) if mark is None else mark, stored)
        if over:
            connection.execute("DELETE FROM messages WHERE seq IN carray(?)", (numbers(over),))

    def admit(self, requests: Iterable[Publish]) -> list[Publish]:
        """Take what there is room for; the rest, in order, has to wait."""
        waiting = []
        blocked: set[Queue] = set()
        answers = self._txn.answers
        for request in requests:
            if request.future.done():  # cancelled before anything was stored
                continue
            try:
                results = self._take(request, blocked)
            except PublishRejected as error:
                self._answer_slowed(request, admitted=False)
                answers.failed.append((request.future, error))
                continue
            if results is None:
                waiting.append(request)
                continue
            if request.slowed is not None:
                self._answer_slowed(request, admitted=True)
            answers.publishers.append(request.future)
            answers.stored.append(results)
        return waiting

    def _take(self, request: Publish, blocked: set[Queue]) -> Sequence[Stored] | None:
        """Store `request` if there is room; None if not. Changes nothing unless it is stored."""
        batch = request.batch
        if len(batch) == 1 and not (request.uncertain or self._storage_full):
            envelope = batch[0]
            if envelope.id not in self._known and envelope.id not in self._here:
                route = self._books.route(envelope.topic)
                for queue in route.queues:
                    if queue in blocked or queue.ready + queue.scheduled + queue.retrying >= queue.spec.capacity:
                        break
                else:
                    request.stored = (envelope.id,)
                    if len(route.queues) == 1 and not (
                        envelope.remember or envelope.due_at or envelope.expires_at or envelope.key is not None
                    ):
                        self._store_plain(envelope, route)
                    else:
                        self._store(envelope, route)
                    return route.alone
        return self._take_slowly(request, blocked)

    def _store_plain(self, envelope: Envelope, route: Route) -> None:
        """`_store`, of what most messages are, into a queue with room."""
        books, queue = self._books, route.queues[0]
        lanes = self._claiming.lanes(queue)
        seq = books.next_id
        books.next_id = seq + 1
        self._here[envelope.id] = envelope
        self._plain_messages += (
            seq,
            envelope.id,
            envelope.topic,
            envelope.codec,
            encode_headers(envelope.headers) if envelope.headers else None,
            envelope.body,
            envelope.priority,
            envelope.published_at,
        )
        fresh = Fresh(seq, seq, envelope, queue, route)
        self._plain_fresh.append(fresh)
        lanes.fresh[envelope.priority].append(fresh)
        queue.accepted += 1
        queue.ready += 1
        books.dirty.add(queue)

    def _take_slowly(self, request: Publish, blocked: set[Queue]) -> list[Stored] | None:
        """The general case: several messages, known ids, full queues."""
        results: list[Stored] = []
        new: dict[str, Envelope] = {}
        incoming: dict[Queue, int] = {}
        for envelope in request.batch:
            route = self._books.route(envelope.topic)
            known = self._recognise(envelope, new)
            if known is not None:
                ours = envelope.id in request.uncertain and envelope.id not in new
                results.append(route.stored if ours else known)
                continue
            results.append(route.stored)
            new[envelope.id] = envelope
            for queue in route.queues:
                incoming[queue] = incoming.get(queue, 0) + 1
        if new and self._storage_full:
            raise StorageFull(self._storage_full)
        full = [queue for queue, count in incoming.items() if not self._fits(queue, count, blocked)]
        if full:
            request.slowed = request.slowed or full[0]
            blocked.update(full)
            return None
        for envelope in new.values():
            self._store(envelope, self._books.route(envelope.topic))
        request.stored = tuple(new)
        return results

    def _recognise(self, envelope: Envelope, new: dict[str, Envelope]) -> Stored | None:
        """What is known of this id, if anything. Raises MessageConflict when it stands for something else."""
        known = self._known.get(envelope.id)
        if known is None:
            earlier = new.get(envelope.id) or self._here.get(envelope.id)
            if earlier is None:
                return None
            stored = self._books.route(earlier.topic).stored
            known = _Known(
                digest(earlier.topic, earlier.codec, earlier.body), Stored(stored.subscriptions, duplicate=True)
            )
        if known.digest != digest(envelope.topic, envelope.codec, envelope.body):
            raise MessageConflict(envelope.id)
        return known.stored

    def _fits(self, queue: Queue, incoming: int, blocked: set[Queue]) -> bool:
        rung = next_rung(
            pending=queue.pending,
            incoming=incoming,
            capacity=queue.spec.capacity,
            waited_s=0.0,
            wait_max_s=1.0,
            consumed=queue.consumers > 0,
        )
        return rung is Rung.DEAD_LETTER or (rung is Rung.ADMIT and queue not in blocked)

    def _store(self, envelope: Envelope, route: Route) -> None:
        books, txn = self._books, self._txn
        queues = route.queues
        self._here[envelope.id] = envelope
        if not queues and not envelope.remember:
            return
        seq = books.next_id
        books.next_id = seq + (len(queues) or 1)
        if envelope.remember:
            until, mark = txn.wall + DUPLICATE_WINDOW_S, digest(envelope.topic, envelope.codec, envelope.body)
            routed: str | None = route.ids
        else:
            until, mark, routed = 0.0, None, None
        self._messages += (
            seq,
            envelope.id,
            envelope.topic,
            envelope.codec,
            encode_headers(envelope.headers) if envelope.headers and queues else None,
            envelope.body if queues else None,
            envelope.priority,
            envelope.key,
            envelope.published_at,
            envelope.due_at,
            envelope.expires_at,
            len(queues),
            until,
            mark,
            routed,
        )
        id_ = seq
        for queue in queues:
            lanes = self._claiming.lanes(queue)
            fresh = Fresh(id_, seq, envelope, queue, route)
            id_ += 1
            self._fresh.append(fresh)
            queue.accepted += 1
            books.dirty.add(queue)
            if queue.ready + queue.scheduled + queue.retrying >= queue.spec.capacity:
                fresh.state = 4
                queue.dead_lettered += 1
                self._overflow.append((fresh, queue))
            elif envelope.due_at > txn.wall:
                fresh.state = 1
                fresh.due = envelope.due_at
                queue.scheduled += 1
                txn.scheduled_at = min(txn.scheduled_at, envelope.due_at)
            else:
                queue.ready += 1
                lanes.fresh[envelope.priority].append(fresh)
            if envelope.expires_at:
                txn.expiry_at = min(txn.expiry_at, envelope.expires_at)

    def refuse_overdue(self, waiting: Iterable[Publish]) -> list[Publish]:
        """Refuse those that have waited long enough; the others."""
        left = []
        for request in waiting:
            queue = request.slowed
            if queue is None or request.deadline > self._txn.monotonic:
                left.append(request)
                continue
            waited_s = self._txn.monotonic - request.arrived
            self._answer_slowed(request, admitted=False)
            self._state_overflow(queue, "refuse")
            error = QueueFull(queue.name, queue.spec.capacity, waited_s)
            self._txn.answers.failed.append((request.future, error))
        return left

    def _answer_slowed(self, request: Publish, *, admitted: bool) -> None:
        """State once, with its outcome, that a publisher was made to wait."""
        waited_s = self._txn.monotonic - request.arrived
        if request.slowed is not None and waited_s > 0:
            fact = BackpressureApplied(
                at=self._txn.wall, subscription=request.slowed.name, waited_s=waited_s, admitted=admitted
            )
            self._txn.answers.facts.append(fact)

    def _state_overflow(self, queue: Queue, action: Literal["dead_letter", "refuse"]) -> None:
        self._txn.answers.facts.append(OverflowHandled(at=self._txn.wall, subscription=queue.name, action=action))

    def write(self) -> None:
        """Insert what was admitted, each delivery in the state it has by now."""
        connection = self._txn.connection
        _PLAIN_MESSAGES.insert(connection, self._plain_messages)
        _MESSAGES.insert(connection, self._messages)
        values: list[Any] = []
        for fresh in self._plain_fresh:
            id_, envelope = fresh.id, fresh.envelope
            values += (id_, id_, fresh.queue.id, fresh.state, envelope.priority, fresh.attempt, fresh.owner, id_)
        _PLAIN_DELIVERIES.insert(connection, values)
        values = []
        for fresh in self._fresh:
            envelope = fresh.envelope
            values += (
                fresh.id,
                fresh.seq,
                fresh.queue.id,
                fresh.state,
                fresh.lane,
                envelope.priority,
                envelope.key,
                fresh.attempt,
                fresh.owner,
                fresh.due,
                envelope.expires_at,
                fresh.id,
            )
        _DELIVERIES.insert(connection, values)
        for fresh, queue in self._overflow:
            self._dead_letter(fresh, queue)

    def _dead_letter(self, fresh: Fresh, queue: Queue) -> None:
        """Nobody consumes `queue` and it is full: what comes more is kept, counted and told."""
        txn, envelope = self._txn, fresh.envelope
        report = ErrorReport(
            error_id=f"{envelope.id}:{queue.name}:overflow",
            timestamp=txn.wall,
            category=ErrorCategory.QUEUE_OVERFLOW,
            severity=ErrorSeverity.HIGH,
            message=f"queue of {queue.name!r} is full ({queue.spec.capacity}) and nothing consumes it",
            exception_type="QueueFull",
            fingerprint=f"overflow:{queue.name}",
            component="queue",
        )
        insert_dead_letter(txn, fresh.id, queue, "overflow", report)
        self._state_overflow(queue, "dead_letter")
        delivery = Delivery(envelope, queue.name, fresh.route.destination)
        txn.answers.facts.append(DeliveryDeadLettered(at=txn.wall, delivery=delivery, report=report, reason="overflow"))


def remember(txn: Transaction, request: Publish) -> None:
    """Know the ids of `request` from now on, whether its messages are still stored or already settled.

    Where it is uncertain whether they were ever stored, only those that are: to know an id
    that was not stored would turn its next publish away.
    """
    until = txn.wall + DUPLICATE_WINDOW_S
    batch = [envelope for envelope in request.batch if envelope.id in request.stored]
    if request.uncertain:
        txn.connection.execute(
            "UPDATE messages SET remember_until = max(remember_until, ?) WHERE id IN carray(?)",
            (until, texts([envelope.id for envelope in request.batch])),
        )
    for envelope in batch:
        mark = digest(envelope.topic, envelope.codec, envelope.body)
        route = txn.books.route(envelope.topic)
        seq = txn.books.next_id
        txn.books.next_id += 1
        values = (seq, envelope.id, envelope.topic, envelope.codec, envelope.priority, envelope.published_at)
        txn.connection.execute(_TOMBSTONE, (*values, until, mark, route.ids))
    ids = [envelope.id for envelope in request.batch]
    rows = select(txn.connection, "SELECT seq FROM messages WHERE id IN carray(?)", (texts(ids),))
    seqs = {row[0] for row in rows}
    for held in txn.in_flight.values():
        held.remember = held.remember or held.seq in seqs
