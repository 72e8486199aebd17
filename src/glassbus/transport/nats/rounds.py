"""What goes into the next entry, and what follows once its verdicts are known.

In this order: what must be known of earlier publishes, settlements, calls, lost owners, expiry, publishes,
claims. One entry is under way at a time; what comes meanwhile shares the next one.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Literal

from glassbus.clock import Clock
from glassbus.errors import (
    GlassbusError,
    MessageConflict,
    PublishRejected,
    QueueFull,
    StorageFull,
    UnknownSubscription,
)
from glassbus.facts import (
    BackpressureApplied,
    Delivery,
    DeliveryDeadLettered,
    DeliveryExpired,
    Fact,
    OverflowHandled,
    OwnerLost,
)
from glassbus.message import Envelope, Priority
from glassbus.policy.delivery import Decision, State
from glassbus.transport.nats import records as r
from glassbus.transport.nats.backlog import Backlog
from glassbus.transport.nats.climbing import capacity
from glassbus.transport.nats.contents import INLINE_BYTES, made_up
from glassbus.transport.nats.requests import Answers, Call, Held, Publish, Settlement
from glassbus.transport.nats.sending import Sending
from glassbus.transport.nats.state import (
    REDELIVERED,
    Accepted,
    Book,
    Conflicting,
    Full,
    Incomplete,
    Row,
    Unknown,
)
from glassbus.transport.nats.stream import Place
from glassbus.transport.nats.sweeping import Sweeper
from glassbus.transport.nats.view import View
from glassbus.transport.reports import encode_report

#: An entry is closed when it has this much in it.
ENTRY_BYTES = 256 * 1024
SETTLEMENTS_MAX = 1000
_LEASE_EXPIRED = 2


class Rounds:
    """Composes entries and answers requests. Belongs to the NATS thread.

    `hand_out(name, rows)` is told of deliveries that are ours now, `tell(rows, facts)` states what `facts` makes
    of deliveries: their messages may have to be read first.
    """

    def __init__(
        self,
        place: Place,
        clock: Clock,
        backlog: Backlog,
        view: View,
        sweeper: Sweeper,
        *,
        lease_s: float,
        hand_out: Callable[[str, Sequence[Row]], None],
        tell: Callable[[Sequence[Row], Callable[[list[Delivery]], list[Fact]]], None],
    ) -> None:
        self.view = view
        self.token = secrets.token_hex(8)
        self.consuming: set[str] = set()
        #: Deliveries that are ours, by number, with their version.
        self.holding: dict[int, int] = {}
        #: When each owner last gave a sign; monotonic.
        self.signs: dict[str, float] = {}
        self.renew_at = 0.0
        self.retry_at = 0.0
        self.reconcile = False
        #: Up to which entry the stream was swept, where that is yet to be said.
        self.swept = 0
        self.fence = False
        self.max_payload = 1024 * 1024
        #: Whether queues may grow for publishers of this process, and which keep their LOW messages.
        self.may_grow = True
        self.low_held_back: set[str] = set()
        self.left: int | None = None
        self._place = place
        self._clock = clock
        self._backlog = backlog
        self._sweeper = sweeper
        self._lease_s = lease_s
        self._hand_out = hand_out
        self._tell = tell
        self._number = 0
        self._bodies = 0
        self._parts = 0
        self._dropped_parts: list[int] = []
        self._remember: list[tuple[str, bytes, list[int]]] = []

    @property
    def registered(self) -> bool:
        return self.token in self.view.fold.owners

    def begin_anew(self) -> None:
        """Others gave us up: what we had is theirs, and we are another owner from now on."""
        self.token = secrets.token_hex(8)
        self._number = 0
        self._dropped_parts = []
        self.holding.clear()

    # Composing

    def compose(self, answers: Answers, *, closing: bool) -> Sending | None:
        """The next entry, if there is anything to say."""
        now = self._clock.monotonic()
        if now < self.retry_at:
            return None
        sending = Sending(self.token)
        if not self.registered:
            sending.add(r.Register(sorted(self.consuming), self._lease_s))
        self._fence(sending)
        self._known_ids(sending)
        self._settle(sending, answers)
        self._call(sending)
        if not closing:
            self._upkeep(sending, now)
            self._publish(sending, answers, now)
            self._claim(sending, answers)
        elif not self._backlog.settlements:
            sending.add(r.Leave(), self._left)
        if not sending.ops:
            return None
        return self._numbered(sending)

    def _numbered(self, sending: Sending) -> Sending:
        self._number += 1 + len(sending.parts)
        sending.number = self._number
        self.renew_at = min(self.renew_at, self._clock.monotonic() + self._lease_s / 3)
        return sending

    def _fence(self, sending: Sending) -> None:
        """After a loss: a late entry of ours is void once a later one was read, and nothing is ours unknown to us."""
        if self.fence:
            self.fence = False
            sending.add(r.Renew(self.view.fold.seq), undo=self._fence_again)
        for number in self._dropped_parts:
            sending.add(r.Part(number, []))
        self._dropped_parts = []
        if self.reconcile and self.registered:
            self.reconcile = False
            for d in self.view.fold.owners[self.token].rows - self.holding.keys():
                row = self.view.fold.rows[d]
                sending.add(_uncharged(row))

    def _fence_again(self) -> None:
        self.fence = True

    def _left(self, verdict: Any, _answers: Answers) -> None:
        self.left = verdict

    # Known ids

    def _known_ids(self, sending: Sending) -> None:
        for publish in self._backlog.forsaken:
            if publish.sent is not None and publish not in self._backlog.publishes:
                self._know(publish)
        self._backlog.forsaken = []
        if self._remember:
            ids, self._remember = self._remember, []
            sending.add(r.Remember(ids), undo=lambda: self._remember.extend(ids))

    def _know(self, publish: Publish) -> None:
        """Its ids are to be recognised, because its publisher cannot know whether it was stored, and it was."""
        fold = self.view.fold
        for sent, envelope in zip(publish.sent or (), publish.batch, strict=True):
            if not sent.digest:
                route = fold.route(envelope.topic)
                self._remember.append((envelope.id, digest(envelope), list(route.ids)))

    # Settlements

    def _settle(self, sending: Sending, answers: Answers) -> None:
        backlog = self._backlog
        batch = backlog.settlements[:SETTLEMENTS_MAX]
        del backlog.settlements[:SETTLEMENTS_MAX]
        handled: list[Settlement] = []
        used = 0
        for position, settlement in enumerate(batch):
            if used > ENTRY_BYTES:
                backlog.settlements[:0] = batch[position:]
                break
            held: Held = settlement.delivery.handle
            if self.holding.get(held.d) != held.version or held.owner != self.token:
                answers.refused.append(settlement)
                continue
            del self.holding[held.d]
            if settlement.decision.state is State.HANDLED:
                handled.append(settlement)
                continue
            op = _settle_op(held, settlement.decision)
            used += len(op.report)
            backlog.settling.append(settlement)
            sending.add(op, self._settled([settlement]), self._unsettled([settlement]))
        if handled:
            backlog.settling.extend(handled)
            targets = [(s.delivery.handle.d, s.delivery.handle.version) for s in handled]
            sending.add(r.Handled(targets), self._settled(handled), self._unsettled(handled))

    def _settled(self, settlements: list[Settlement]) -> Callable[[Any, Answers], None]:
        def finish(verdict: Any, answers: Answers) -> None:
            verdicts = verdict if isinstance(verdict, list) else [verdict]
            for settlement, took in zip(settlements, verdicts, strict=True):
                (answers.recorded if took else answers.refused).append(settlement)
            self._no_longer_settling(settlements)

        return finish

    def _unsettled(self, settlements: list[Settlement]) -> Callable[[], None]:
        def undo() -> None:
            self._no_longer_settling(settlements)
            for settlement in settlements:
                held: Held = settlement.delivery.handle
                if held.owner == self.token:
                    self.holding[held.d] = held.version
            self._backlog.settlements[:0] = settlements

        return undo

    def _no_longer_settling(self, settlements: list[Settlement]) -> None:
        done = set(map(id, settlements))
        backlog = self._backlog
        backlog.settling = [s for s in backlog.settling if id(s) not in done]
        # One that was taken for lost, and asked for once more, needs no second answer.
        if backlog.settlements:
            backlog.settlements = [s for s in backlog.settlements if id(s) not in done]

    def give_back(self, delivery: Delivery) -> None:
        """A delivery that nobody took goes back unseen."""
        self._backlog.settlements.append(Settlement(delivery, uncharged(delivery), nobody_asks))

    # Calls

    def _call(self, sending: Sending) -> None:
        calls, self._backlog.calls = self._backlog.calls, []
        for call in calls:
            if call.future.done():  # cancelled
                continue
            if isinstance(call.op, r.Declare) and call.op.consume:
                self.consuming.add(call.op.name)
            elif isinstance(call.op, r.Forget):
                self.consuming.discard(call.op.name)
            elif isinstance(call.op, r.Renew):
                call.op.seen = self.view.fold.seq
            sending.calls.append(call)
            sending.add(call.op, _called(call))

    # What is done of itself

    def _upkeep(self, sending: Sending, now: float) -> None:
        self.view.promote()
        if now >= self.renew_at:
            self.renew_at = now + self._lease_s / 3
            sending.add(r.Renew(self.view.fold.seq))
        for owner in self.view.fold.owners.values():
            if owner.token != self.token and now >= self.expires_at(owner.token, owner.lease_s):
                sending.add(r.Expel(owner.token, owner.number, _LEASE_EXPIRED), self._expelled(owner.token))
        if self.swept:
            sending.add(r.Swept(self.swept))
            self.swept = 0
        overdue = self.view.overdue()
        if overdue:
            self._expire(sending, overdue)
        if self.view.fold.expanded:
            self._contract(sending)

    def expires_at(self, token: str, lease_s: float) -> float:
        """When the lease of an owner ends, if it gives no further sign; monotonic."""
        return self.signs.setdefault(token, self._clock.monotonic()) + lease_s

    def _expelled(self, token: str) -> Callable[[Any, Answers], None]:
        def finish(verdict: int | None, answers: Answers) -> None:
            if verdict is not None:
                wall = self._clock.wall()
                answers.facts.append(OwnerLost(at=wall, owner=token, deliveries=verdict, reason="lease_expired"))

        return finish

    def _expire(self, sending: Sending, rows: list[Row]) -> None:
        def finish(expired: list[Row], _answers: Answers) -> None:
            if expired:
                self._tell(expired, self._expiries)
            undo()

        def undo() -> None:
            for row in rows:
                self.view.put_back_overdue(row)

        sending.add(r.Expire([(row.d, row.version) for row in rows]), finish, undo)

    def _expiries(self, deliveries: list[Delivery]) -> list[Fact]:
        return [DeliveryExpired(at=self._clock.wall(), delivery=delivery) for delivery in deliveries]

    def _contract(self, sending: Sending) -> None:
        wall, fold = self._clock.wall(), self.view.fold
        over = [book.name for book in fold.expanded if fold.contracts(book, wall)]
        if over:
            sending.add(r.Contract(over), self._contracted)

    def _contracted(self, books: list[Book], answers: Answers) -> None:
        for book in books:
            answers.facts.append(self._overflow(book, "contract"))

    def _overflow(self, book: Book, action: Literal["expand", "contract", "refuse"]) -> OverflowHandled:
        wall = self._clock.wall()
        return OverflowHandled(at=wall, subscription=book.name, action=action, capacity=capacity(book, wall))

    # Publishes

    def _publish(self, sending: Sending, answers: Answers, now: float) -> None:
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
                self._answer_slowed(publish, answers, admitted=False)
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
        fold = self.view.fold
        incoming: dict[Book, list[int]] = {}
        for envelope in publish.batch:
            if not envelope.remember or fold.recognise(envelope.id, wall) is None:
                for book in fold.route(envelope.topic).books:
                    incoming.setdefault(book, []).append(envelope.priority)
        return incoming

    def _refuses(self, publish: Publish) -> Book | None:
        """The queue that would refuse `publish` as it is now, so that it need not be sent; None if none would."""
        fold, wall = self.view.fold, self._clock.wall()
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
                self._dropped_parts.append(op.part_of)
            if not publish.future.done() and not publish.uncertain:
                self._backlog.publishes.insert(0, publish)

        sending.add(op, self._published(publish, waited), undo)
        return size

    def _sent(self, envelope: Envelope) -> r.Sent:
        body, parts, place = envelope.body, 0, ""
        if len(body) > INLINE_BYTES:
            self._bodies += 1
            body, parts = b"", -(-len(envelope.body) // self._piece)
            place = f"{self.token}-{self._bodies}"
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

    def _published(self, publish: Publish, waited: bool) -> Callable[[Any, Answers], None]:
        def finish(verdict: Any, answers: Answers) -> None:
            match verdict:
                case Accepted():
                    if publish.uncertain or publish.forsaken:
                        self._know(publish)
                    self._answer_slowed(publish, answers, admitted=True)
                    answers.facts.extend(self._overflow(book, "expand") for book in verdict.grew)
                    if verdict.buried:
                        self._tell(verdict.buried, self._burials(verdict.buried))
                    answers.results.append((publish.future, verdict.stored))
                case Conflicting():
                    self._answer_slowed(publish, answers, admitted=False)
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
        self._answer_slowed(publish, answers, admitted=False)
        refused = self._overflow(book, "refuse")
        answers.facts.append(refused)
        answers.failed.append((publish.future, QueueFull(book.name, refused.capacity, waited_s)))

    def _answer_slowed(self, publish: Publish, answers: Answers, *, admitted: bool) -> None:
        """State once, with its outcome, that a publisher was made to wait."""
        waited_s = self._clock.monotonic() - publish.arrived
        if publish.slowed is not None and waited_s > 0:
            answers.facts.append(
                BackpressureApplied(
                    at=self._clock.wall(), subscription=publish.slowed.name, waited_s=waited_s, admitted=admitted
                )
            )

    # Claims

    def _claim(self, sending: Sending, answers: Answers) -> None:
        fold, backlog = self.view.fold, self._backlog
        targets: list[Row] = []
        overdue: list[Row] = []
        running: list[Row] | None = None
        for name, waiting in list(backlog.claims.items()):
            while waiting and waiting[0].done():  # cancelled
                waiting.popleft()
            book = fold.books.get(name)
            if book is None:
                error = UnknownSubscription(f"no subscription {name!r}; known are {sorted(fold.books)}")
                answers.failed.extend((future, error) for future in backlog.claims.pop(name))
                continue
            if not waiting or not self.view.lanes(book).waiting or book.hold.held:
                continue
            if running is None:
                running = self._running() if fold.suspects else []
            wanted = sum(not future.done() for future in waiting)
            least = Priority.NORMAL if name in self.low_held_back else Priority.LOW
            taken = self.view.take(book, wanted, running, overdue, least)
            targets += taken
            running += [row for row in taken if row.suspect]
        if overdue:
            self._expire(sending, overdue)
        if targets:
            sending.add(
                r.Claim([(row.d, row.version) for row in targets]), self._claimed(targets), self._unclaimed(targets)
            )

    def _running(self) -> list[Row]:
        owner = self.view.fold.owners.get(self.token)
        return [self.view.fold.rows[d] for d in owner.rows] if owner is not None else []

    def _claimed(self, rows: list[Row]) -> Callable[[Any, Answers], None]:
        def finish(verdicts: list[bool], _answers: Answers) -> None:
            ours: dict[str, list[Row]] = {}
            for row, had in zip(rows, verdicts, strict=True):
                if had:
                    self.holding[row.d] = row.version
                    ours.setdefault(row.book.name, []).append(row)
                else:
                    self.view.put_back(row)
            for name, had_rows in ours.items():
                self._hand_out(name, had_rows)

        return finish

    def _unclaimed(self, rows: list[Row]) -> Callable[[], None]:
        def undo() -> None:
            for row in rows:
                self.view.put_back(row)

        return undo

    def delivery(self, row: Row, envelope: Envelope) -> Delivery:
        """What is handed out of a delivery that is ours."""
        return Delivery(
            envelope,
            row.book.name,
            self.view.fold.route(row.topic).destination,
            row.attempt,
            Held(row.d, row.version, self.token),
            REDELIVERED[row.suspect],  # type: ignore[arg-type] # its words are the field's
            row.first_failed_at,
            row.recovering,
            row.replays,
        )

    def waiters(self, name: str) -> deque[Any]:
        return self._backlog.claims.setdefault(name, deque())

    # Time

    def next_due(self) -> tuple[float, float]:
        """When there is something to do, and some housekeeping; monotonic."""
        now = self._clock.monotonic()
        retry, wall = self.view.next_due()
        fold = self.view.fold
        ends = [book.expanded_until for book in fold.expanded if book.pending <= book.spec.capacity]
        wall = min([wall, *ends])
        # A little late: a sum of floats that fell short of the time would wake us for nothing, again and again.
        work = min(retry, now + wall - self._clock.wall() + 1e-6, self._backlog.next_deadline())
        owners = fold.owners.values()
        leases = [self.expires_at(o.token, o.lease_s) for o in owners if o.token != self.token]
        return max(work, self.retry_at), max(min([self.renew_at, *leases]), self.retry_at)

    def failed(self, sending: Sending, error: GlassbusError, answers: Answers) -> None:
        """The server refused the entry, so nothing of it is stored: publishes and calls are told, the rest is kept."""
        full = getattr(error, "full", False)
        for publish in sending.publishes:
            self._answer_slowed(publish, answers, admitted=False)
            refusal = StorageFull(f"{error}; nothing was stored") if full else PublishRejected(f"not stored: {error}")
            publish.uncertain = True  # so that it is not sent again
            answers.failed.append((publish.future, refusal))
        answers.failed.extend((call.future, error) for call in sending.calls)
        sending.undo()


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


def _settle_op(held: Held, decision: Decision) -> r.Settle:
    op = r.Settle(
        held.d,
        held.version,
        int(decision.state),
        decision.attempt,
        max(0.0, decision.delay_s),
        decision.recovering,
        decision.first_failed_at,
        decision.reason,
    )
    report = decision.report
    if decision.state is State.DEAD_LETTERED:
        assert report is not None, "a dead letter needs its report"
        op.report = encode_report(report)
        op.about = (_plain(str(report.category)), _plain(report.exception_type), _plain(report.fingerprint))
    return op


def _plain(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _uncharged(row: Row) -> r.Settle:
    return r.Settle(row.d, row.version, int(State.READY), row.attempt - 1, 0.0, row.recovering, row.first_failed_at)


def uncharged(delivery: Delivery) -> Decision:
    return Decision(
        State.READY,
        delivery.attempt - 1,
        recovering=delivery.recovering,
        first_failed_at=delivery.first_failed_at,
    )


def nobody_asks(delivery: Delivery, decision: Decision, accepted: bool, /) -> None:
    """Of a delivery that nobody took, nobody wants to know."""


def _called(call: Call) -> Callable[[Any, Answers], None]:
    def finish(verdict: Any, answers: Answers) -> None:
        if isinstance(verdict, Unknown) and isinstance(call.op, r.SetHold | r.Forget):
            answers.failed.append((call.future, UnknownSubscription(f"no subscription {verdict.what[0]!r}")))
            return
        try:
            answers.results.append((call.future, call.finish(verdict)))
        except GlassbusError as error:
            answers.failed.append((call.future, error))

    return finish
