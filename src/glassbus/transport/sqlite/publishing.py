"""Publishes: recognised, routed, admitted and written, whole batches or nothing of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from glassbus.errors import MessageConflict, PublishRejected, QueueFull, StorageFull
from glassbus.facts import BackpressureApplied, Delivery
from glassbus.message import Envelope
from glassbus.policy.overflow import Rung, next_rung
from glassbus.transport import Stored
from glassbus.transport.sqlite import overflowing
from glassbus.transport.sqlite.books import Fresh, Queue, Route
from glassbus.transport.sqlite.claiming import Claiming
from glassbus.transport.sqlite.requests import Publish
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


class _Look(NamedTuple):
    """What a publish would do: its answers, the messages that are new, and which of them each queue is to take."""

    results: list[Stored]
    new: list[tuple[Envelope, Route]]
    incoming: dict[Queue, list[int]]  # places in `new`

    def priorities(self, queue: Queue) -> list[int]:
        return [self.new[place][0].priority for place in self.incoming[queue]]


class Publishing:
    """Admits publishes in one transaction. For room, the highest priority goes first, then who came first."""

    def __init__(self, txn: Transaction, claiming: Claiming, *, storage_full: str = "", may_grow: bool = True) -> None:
        self._txn = txn
        self._books = txn.books
        self._claiming = claiming
        self._storage_full = storage_full
        self._may_grow = may_grow
        self._known: dict[str, _Known] = {}
        self._here: dict[str, Envelope] = {}
        self._messages: list[Any] = []
        self._fresh: list[Fresh] = []
        self._plain_messages: list[Any] = []
        self._plain_fresh: list[Fresh] = []
        self._left_out: list[Fresh] = []
        #: Subscriptions that were given deliveries after claims had been looked at.
        self.climbed: set[str] = set()
        overflowing.look(txn)

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

    def admit(self, requests: Sequence[Publish]) -> list[Publish]:
        """Take what there is room for; the rest, in the order in which it is to be admitted, has to wait."""
        requests = _in_line(requests)
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
                    if queue in blocked or queue.ready + queue.scheduled + queue.retrying >= queue.capacity:
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
        look = self._look_at(request)
        full = [queue for queue, places in look.incoming.items() if not self._fits(queue, len(places), blocked)]
        if not full:
            return self._keep(request, look, {})
        consumed = [queue for queue in full if queue.consumers]
        request.waits = bool(consumed)
        if request.slowed is None and consumed:
            request.slowed = consumed[0]
        blocked.update(full)
        return None

    def _look_at(self, request: Publish) -> _Look:
        """What of `request` is new, and for whom. Changes nothing. Raises MessageConflict or StorageFull."""
        look = _Look([], [], {})
        new: dict[str, Envelope] = {}
        for envelope in request.batch:
            route = self._books.route(envelope.topic)
            known = self._recognise(envelope, new)
            if known is not None:
                ours = envelope.id in request.uncertain and envelope.id not in new
                look.results.append(route.stored if ours else known)
                continue
            look.results.append(route.stored)
            new[envelope.id] = envelope
            for queue in route.queues:
                look.incoming.setdefault(queue, []).append(len(look.new))
            look.new.append((envelope, route))
        if new and self._storage_full:
            raise StorageFull(self._storage_full)
        return look

    @staticmethod
    def _fits(queue: Queue, incoming: int, blocked: set[Queue]) -> bool:
        rung = next_rung(
            pending=queue.pending,
            incoming=incoming,
            capacity=queue.capacity,
            waited_s=0.0,
            wait_max_s=1.0,
            consumed=queue.consumers > 0,
        )
        return rung is Rung.ADMIT and queue not in blocked

    def _keep(self, request: Publish, look: _Look, left_out: dict[Queue, set[int]]) -> list[Stored]:
        """Store what is new; `left_out` says which of it, by its place, is a dead letter of that queue."""
        for place, (envelope, route) in enumerate(look.new):
            self._store(envelope, route, [queue for queue, places in left_out.items() if place in places])
        request.stored = tuple(envelope.id for envelope, _ in look.new)
        return look.results

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

    def _store(self, envelope: Envelope, route: Route, left_out: Sequence[Queue] = ()) -> None:
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
            if queue in left_out:
                fresh.state = 4
                self._left_out.append(fresh)
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

    def climb(self, waiting: Sequence[Publish]) -> list[Publish]:
        """Have those climb the ladder that need not, or may not, wait any longer; who still waits. After `write`."""
        left = []
        answers = self._txn.answers
        for request in waiting:
            if request.waits and request.deadline > self._txn.monotonic:
                left.append(request)
                continue
            try:
                results = self._climb(request)
            except PublishRejected as error:
                if not isinstance(error, QueueFull):  # which has stated it
                    self._answer_slowed(request, admitted=False)
                answers.failed.append((request.future, error))
                continue
            answers.publishers.append(request.future)
            answers.stored.append(results)
        if self.climbed and left:
            left = self.admit(left)  # what grew may have room for more
        self.write()
        return left

    def _climb(self, request: Publish) -> list[Stored]:
        """Make room for `request` and store it. Raises QueueFull, and changes nothing, where that cannot be done."""
        look = self._look_at(request)
        plans = [
            overflowing.plan(self._txn, queue, look.priorities(queue), may_grow=self._may_grow)
            for queue in look.incoming
        ]
        refused = next((plan.queue for plan in plans if plan.step.rung is Rung.REFUSE), None)
        self._answer_slowed(request, admitted=refused is None)
        if refused is not None:
            overflowing.state(self._txn, refused, "refuse")
            raise QueueFull(refused.name, refused.capacity, self._txn.monotonic - request.arrived)
        left_out = {}
        for plan in plans:
            overflowing.make_room(self._txn, plan)
            left_out[plan.queue] = {look.incoming[plan.queue][place] for place in plan.left_out}
            self.climbed.add(plan.queue.name)
        results = self._keep(request, look, left_out)
        self.write()  # so that the next one sees what is pending, and may displace it
        return results

    def _answer_slowed(self, request: Publish, *, admitted: bool) -> None:
        """State once, with its outcome, that a publisher was made to wait."""
        waited_s = self._txn.monotonic - request.arrived
        if request.slowed is not None and waited_s > 0:
            fact = BackpressureApplied(
                at=self._txn.wall, subscription=request.slowed.name, waited_s=waited_s, admitted=admitted
            )
            self._txn.answers.facts.append(fact)

    def write(self) -> None:
        """Insert what was admitted since the last time, each delivery in the state it has by now."""
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
        for fresh in self._left_out:
            queue = fresh.queue
            delivery = Delivery(fresh.envelope, queue.name, fresh.route.destination)
            overflowing.leave_out(self._txn, queue, fresh.id, delivery)
        for written in (self._plain_messages, self._messages, self._plain_fresh, self._fresh, self._left_out):
            written.clear()


def _in_line(requests: Sequence[Publish]) -> Sequence[Publish]:
    """In the order in which room is given: as they came while nobody has had to wait for it."""
    if not requests or requests[0].slowed is None:
        return requests
    for request in requests:
        if request.priority < 0:
            request.priority = max((envelope.priority for envelope in request.batch), default=0)
    return sorted(requests, key=lambda request: -request.priority)


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
