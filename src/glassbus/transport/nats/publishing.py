"""Publishes: whether there is room, how they are written, and what follows from the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Literal

from glassbus.clock import Clock
from glassbus.errors import MessageConflict, PublishRejected, QueueFull, StorageFull
from glassbus.facts import BackpressureApplied, Delivery, DeliveryDeadLettered, Fact, OverflowHandled
from glassbus.message import Envelope
from glassbus.transport.nats import records as r
from glassbus.transport.nats.backlog import Backlog
from glassbus.transport.nats.climbing import capacity
from glassbus.transport.nats.contents import INLINE_BYTES, made_up
from glassbus.transport.nats.model import Accepted, Book, Conflicting, Full, Incomplete, Row
from glassbus.transport.nats.requests import Answers, Publish
from glassbus.transport.nats.sending import Finish, Sending
from glassbus.transport.nats.stream import Place
from glassbus.transport.nats.sweeping import Sweeper
from glassbus.transport.nats.view import View

#: An entry is closed when it has this much in it.
ENTRY_BYTES = 256 * 1024

#: States what the function makes of deliveries, whose messages may have to be read first.
Tell = Callable[[Sequence[Row], Callable[[list[Delivery]], list[Fact]]], None]


class Here:
    """Who we are in the stream, and what we have read of it."""

    __slots__ = ("token", "view")

    def __init__(self, token: str, view: View) -> None:
        self.token = token
        self.view = view


class Publishing:
    """Adds publishes to entries. Belongs to the NATS thread."""

    def __init__(self, here: Here, place: Place, clock: Clock, backlog: Backlog, sweeper: Sweeper, tell: Tell) -> None:
        self.max_payload = 1024 * 1024
        #: Whether queues may grow for publishers of this process.
        self.may_grow = True
        #: Parts of publishes that were not completed.
        self.dropped_parts: list[int] = []
        self._here = here
        self._place = place
        self._clock = clock
        self._backlog = backlog
        self._sweeper = sweeper
        self._tell = tell
        self._bodies = 0
        self._parts = 0
        self._remember: list[tuple[str, bytes, list[int]]] = []

    # Known ids

    def add_known_ids(self, sending: Sending) -> None:
        """Have ids recognised from now on whose publishers cannot know whether they were stored."""
        for publish in self._backlog.forsaken:
            if publish.sent is not None and publish not in self._backlog.publishes and publish.stored:
                self.know(publish)
        self._backlog.forsaken = []
        if self._remember:
            ids, self._remember = self._remember, []
            sending.add(r.Remember(ids), undo=lambda: self._remember.extend(ids))

    def know(self, publish: Publish) -> None:
        """`publish` was stored: its ids are to be recognised."""
        fold = self._here.view.fold
        for sent, envelope in zip(publish.sent or (), publish.batch, strict=True):
            if not sent.digest:
                self._remember.append((envelope.id, digest(envelope), list(fold.route(envelope.topic).ids)))

    # Adding

    def add(self, sending: Sending, answers: Answers, now: float) -> None:
        backlog = self._backlog
        waiting: list[Publish] = []
        blocked: set[Book] = set()
        coming: dict[Book, int] = {}
        used, room = 0, self._sweeper.room
        publishes = backlog.publishes
        if any(p.slowed is not None for p in publishes):
            publishes = sorted(publishes, key=lambda p: -max((e.priority for e in p.batch), default=0))
        for position, publish in enumerate(publishes):
            if publish.future.done():  # cancelled, and nothing of it was sent
                continue
            if sending.parts or used > ENTRY_BYTES:
                waiting += publishes[position:]
                break
            if used + sum(len(envelope.body) for envelope in publish.batch) > room:
                self.answer_slowed(publish, answers, admitted=False)
                answers.failed.append((publish.future, StorageFull(self._sweeper.full())))
                continue
            if self._fits(publish, blocked, coming):
                used += self._send(sending, publish, waited=False)
            elif publish.deadline > now:
                waiting.append(publish)
            elif (book := self._refuses(publish)) is not None:
                self._refuse(publish, book, answers)
            else:
                used += self._send(sending, publish, waited=True)
        backlog.publishes = waiting

    def _fits(self, publish: Publish, blocked: set[Book], coming: dict[Book, int]) -> bool:
        """Whether there is room for it, as far as is known here. The verdict on the entry decides."""
        wall = self._clock.wall()
        incoming = self._incoming(publish, wall)
        full = [
            book
            for book, priorities in incoming.items()
            if book.consumers
            and (book in blocked or book.pending + coming.get(book, 0) + len(priorities) > capacity(book, wall))
        ]
        if full:
            publish.slowed = publish.slowed or full[0]
            blocked.update(full)
            return False
        for book, priorities in incoming.items():
            coming[book] = coming.get(book, 0) + len(priorities)
        return True

    def _incoming(self, publish: Publish, wall: float) -> dict[Book, list[int]]:
        """The priorities of what is new in `publish`, for each queue that wants it."""
        fold = self._here.view.fold
        incoming: dict[Book, list[int]] = {}
        for envelope in publish.batch:
            if not envelope.remember or fold.recognise(envelope.id, wall) is None:
                for book in fold.route(envelope.topic).books:
                    incoming.setdefault(book, []).append(envelope.priority)
        return incoming

    def _refuses(self, publish: Publish) -> Book | None:
        """The queue that would refuse `publish` as it is now, so that it need not be sent; None if none would."""
        fold, wall = self._here.view.fold, self._clock.wall()
        for book, priorities in self._incoming(publish, wall).items():
            if book.pending + len(priorities) > capacity(book, wall) and (
                fold.plan(book, priorities, wall, may_grow=self.may_grow).refused
            ):
                return book
        return None

    def _send(self, sending: Sending, publish: Publish, *, waited: bool) -> int:
        """Add `publish` to the entry, or to entries before it where it is too large; about how many bytes."""
        if publish.sent is None:
            publish.sent = [self._sent(envelope) for envelope in publish.batch]
        for sent, envelope in zip(publish.sent, publish.batch, strict=True):
            if sent.parts:
                sending.bodies += self._pieces(sent, envelope)
        size = r.size(publish.sent)
        limit = min(ENTRY_BYTES * 2, self.max_payload * 3 // 4)
        op = r.Publish(publish.sent, waited=waited, may_grow=self.may_grow)
        if size > limit:
            self._parts += 1
            *parts, last = _split(publish.sent, limit)
            sending.parts += [r.Part(self._parts, messages) for messages in parts]
            op = r.Publish(last, self._parts, len(parts), waited, self.may_grow)
        sending.publishes.append(publish)

        def undo() -> None:
            if op.part_of:
                self.dropped_parts.append(op.part_of)
            if not publish.future.done() and not publish.uncertain:
                self._backlog.publishes.insert(0, publish)

        sending.add(op, self._published(publish, waited), undo)
        return size

    def _sent(self, envelope: Envelope) -> r.Sent:
        body, parts, place = envelope.body, 0, ""
        if len(body) > INLINE_BYTES:
            self._bodies += 1
            body, parts = b"", -(-len(envelope.body) // self._piece)
            place = f"{self._here.token}-{self._bodies}"
        return r.Sent(
            envelope.id,
            envelope.topic,
            envelope.codec,
            envelope.headers,
            body,
            envelope.priority,
            envelope.key,
            envelope.published_at,
            envelope.due_at,
            envelope.expires_at,
            digest(envelope) if envelope.remember else b"",
            parts,
            place,
        )

    @property
    def _piece(self) -> int:
        return self.max_payload - 1024

    def _pieces(self, sent: r.Sent, envelope: Envelope) -> list[tuple[str, bytes]]:
        size, subject = self._piece, self._place.body(sent.place)
        return [(f"{subject}.{n}", envelope.body[n * size : (n + 1) * size]) for n in range(sent.parts)]

    def _published(self, publish: Publish, waited: bool) -> Finish:
        def finish(verdict: object, answers: Answers) -> None:
            match verdict:
                case Accepted():
                    publish.stored = True
                    if publish.uncertain or publish.forsaken:
                        self.know(publish)
                    self.answer_slowed(publish, answers, admitted=True)
                    answers.facts.extend(overflow(self._clock.wall(), book, "expand") for book in verdict.grew)
                    if verdict.buried:
                        self._tell(verdict.buried, self._burials(verdict.buried))
                    answers.results.append((publish.future, verdict.stored))
                case Conflicting():
                    self.answer_slowed(publish, answers, admitted=False)
                    answers.failed.append((publish.future, MessageConflict(verdict.id)))
                case Full() if waited:
                    self._refuse(publish, verdict.book, answers)
                case Full():  # somebody else was there first
                    publish.slowed = publish.slowed or verdict.book
                    self._backlog.publishes.append(publish)
                case Incomplete():
                    refused = PublishRejected("a part of this batch was refused by the server; nothing was stored")
                    answers.failed.append((publish.future, refused))

        return finish

    @staticmethod
    def _burials(rows: list[Row]) -> Callable[[list[Delivery]], list[Fact]]:
        """What is told of deliveries that had no room."""
        dead = [row.dead for row in rows]

        def facts(deliveries: list[Delivery]) -> list[Fact]:
            told: list[Fact] = []
            for delivery, letter in zip(deliveries, dead, strict=True):
                assert letter is not None
                at, name = letter.died_at, delivery.subscription
                report = made_up(delivery, letter)
                told.append(OverflowHandled(at=at, subscription=name, action="dead_letter", capacity=letter.capacity))
                told.append(DeliveryDeadLettered(at=at, delivery=delivery, report=report, reason="overflow"))
            return told

        return facts

    def _refuse(self, publish: Publish, book: Book, answers: Answers) -> None:
        waited_s = self._clock.monotonic() - publish.arrived
        self.answer_slowed(publish, answers, admitted=False)
        refused = overflow(self._clock.wall(), book, "refuse")
        answers.facts.append(refused)
        answers.failed.append((publish.future, QueueFull(book.name, refused.capacity, waited_s)))

    def answer_slowed(self, publish: Publish, answers: Answers, *, admitted: bool) -> None:
        """State once, with its outcome, that a publisher was made to wait."""
        waited_s = self._clock.monotonic() - publish.arrived
        if publish.slowed is not None and waited_s > 0:
            answers.facts.append(
                BackpressureApplied(
                    at=self._clock.wall(), subscription=publish.slowed.name, waited_s=waited_s, admitted=admitted
                )
            )


def overflow(at: float, book: Book, action: Literal["expand", "contract", "refuse"]) -> OverflowHandled:
    return OverflowHandled(at=at, subscription=book.name, action=action, capacity=capacity(book, at))


def digest(envelope: Envelope) -> bytes:
    """What tells two messages of one id apart."""
    return blake2b(f"{envelope.topic}\0{envelope.codec}\0".encode() + envelope.body, digest_size=16).digest()


def _split(messages: list[r.Sent], limit: int) -> list[list[r.Sent]]:
    """In order, each list within `limit` bytes, or of one message."""
    lists: list[list[r.Sent]] = [[]]
    used = 0
    for sent in messages:
        size = r.size([sent])
        if lists[-1] and used + size > limit:
            lists.append([])
            used = 0
        lists[-1].append(sent)
        used += size
    return lists
