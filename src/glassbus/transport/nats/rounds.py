"""What goes into the next entry, and what follows once its verdicts are known.

In this order: what must be known of earlier publishes, settlements, calls, lost owners, expiry, publishes,
claims. One entry is under way at a time; what comes meanwhile shares the next one.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from glassbus.clock import Clock
from glassbus.errors import (
    GlassbusError,
    PublishRejected,
    StorageFull,
    UnknownSubscription,
)
from glassbus.facts import (
    Delivery,
    DeliveryExpired,
    Fact,
    OwnerLost,
)
from glassbus.message import Envelope, Priority
from glassbus.policy.delivery import Decision, State
from glassbus.transport.nats import records as r
from glassbus.transport.nats.backlog import Backlog
from glassbus.transport.nats.model import (
    REDELIVERED,
    Book,
    Row,
    Unknown,
)
from glassbus.transport.nats.publishing import ENTRY_BYTES, Here, Publishing, Tell, overflow
from glassbus.transport.nats.requests import Answers, Call, Held, Settlement
from glassbus.transport.nats.sending import Finish, Sending
from glassbus.transport.nats.stream import Place
from glassbus.transport.nats.sweeping import Sweeper
from glassbus.transport.nats.view import View
from glassbus.transport.reports import encode_report

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
        tell: Tell,
    ) -> None:
        self._here = Here(secrets.token_hex(8), view)
        self.publishing = Publishing(self._here, place, clock, backlog, sweeper, tell)
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
        #: Subscriptions whose LOW messages are not claimed.
        self.low_held_back: set[str] = set()
        self.left: int | None = None
        self._clock = clock
        self._backlog = backlog
        self._lease_s = lease_s
        self._hand_out = hand_out
        self._tell = tell
        self._number = 0

    @property
    def token(self) -> str:
        """Our name in the stream."""
        return self._here.token

    @property
    def view(self) -> View:
        return self._here.view

    @view.setter
    def view(self, view: View) -> None:
        self._here.view = view

    @property
    def registered(self) -> bool:
        return self.token in self.view.fold.owners

    def begin_anew(self) -> None:
        """Others gave us up: what we had is theirs, and we are another owner from now on."""
        self._here.token = secrets.token_hex(8)
        self._number = 0
        self.publishing.dropped_parts = []
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
        self.publishing.add_known_ids(sending)
        self._settle(sending, answers)
        self._call(sending)
        if not closing:
            self._upkeep(sending, now)
            self.publishing.add(sending, answers, now)
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
        for number in self.publishing.dropped_parts:
            sending.add(r.Part(number, []))
        self.publishing.dropped_parts = []
        if self.reconcile and self.registered:
            self.reconcile = False
            for d in self.view.fold.owners[self.token].rows - self.holding.keys():
                row = self.view.fold.rows[d]
                sending.add(_uncharged(row))

    def _fence_again(self) -> None:
        self.fence = True

    def _left(self, verdict: Any, _answers: Answers) -> None:
        self.left = verdict

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

    def _settled(self, settlements: list[Settlement]) -> Finish:
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

    def _expelled(self, token: str) -> Finish:
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
            answers.facts.append(overflow(self._clock.wall(), book, "contract"))

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

    def _claimed(self, rows: list[Row]) -> Finish:
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
            self.publishing.answer_slowed(publish, answers, admitted=False)
            refusal = StorageFull(f"{error}; nothing was stored") if full else PublishRejected(f"not stored: {error}")
            publish.uncertain = True  # so that it is not sent again
            answers.failed.append((publish.future, refusal))
        answers.failed.extend((call.future, error) for call in sending.calls)
        sending.undo()


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


def _called(call: Call) -> Finish:
    def finish(verdict: Any, answers: Answers) -> None:
        if isinstance(verdict, Unknown) and isinstance(call.op, r.SetHold | r.Forget):
            answers.failed.append((call.future, UnknownSubscription(f"no subscription {verdict.what[0]!r}")))
            return
        try:
            answers.results.append((call.future, call.finish(verdict)))
        except GlassbusError as error:
            answers.failed.append((call.future, error))

    return finish
