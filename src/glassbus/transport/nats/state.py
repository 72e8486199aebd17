"""The store as every reader of the stream has it in memory: entries folded in their order, nothing else.

No clock, no chance, no I/O: the same entries give the same state in every process, and so the same
verdict on each operation. That is what makes a claim, a full queue, a known id or a
lost lease certain without asking anybody. What is derived for this process alone (what is due by
its clock, which claims wait) is kept by a `Watcher`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from glassbus.policy.delivery import PENDING, State
from glassbus.policy.ledger import Account
from glassbus.policy.overflow import Rung
from glassbus.transport import Hold, Stored
from glassbus.transport.nats import records as r
from glassbus.transport.nats.climbing import Plan, capacity, plan
from glassbus.transport.nats.model import (
    Accepted,
    Book,
    Conflicting,
    Dead,
    Full,
    Incomplete,
    Known,
    Owner,
    Route,
    Row,
    Unknown,
    Watcher,
)
from glassbus.transport.nats.shelf import Shelf

#: How long an id given by the caller is recognised again, in seconds.
DUPLICATE_WINDOW_S = 600.0
_READY, _SCHEDULED, _IN_FLIGHT = State.READY, State.SCHEDULED, State.IN_FLIGHT


class Fold(Shelf):
    """The state, and the verdict on each operation."""

    def __init__(self, watcher: Watcher | None = None) -> None:
        super().__init__(watcher)
        self._verdicts: dict[type, Callable[[Any, int, r.Entry, Owner], Any]] = {
            r.Register: self._register,
            r.Renew: self._renew,
            r.Leave: self._leave,
            r.Expel: self._expel,
            r.Declare: self._declare,
            r.Forget: self._forget,
            r.SetHold: self._set_hold,
            r.Publish: self._publish,
            r.Part: self._part,
            r.Claim: self._claim,
            r.Handled: self._handled,
            r.Settle: self._settle,
            r.Expire: self._expire,
            r.Replay: self._replay,
            r.Discard: self._discard,
            r.Remember: self._remember,
            r.Swept: self._swept,
            r.Contract: self._contract,
        }

    def apply(self, entry: r.Entry, seq: int) -> list[Any] | None:
        """Let `entry` take effect; a verdict for each operation, or None when all of it is void.

        It is void when its writer is no owner, or when it comes after a later one of the same writer.
        """
        self.seq = seq
        owner = self.owners.get(entry.owner)
        if owner is None:
            first = entry.ops[0] if entry.ops else None
            if not isinstance(first, r.Register):
                self._bears(entry, seq)
                return None
            owner = self.owners[entry.owner] = Owner(entry.owner, first.lease_s)
        if entry.number <= owner.number:
            self._bears(entry, seq)
            return None
        owner.number = entry.number
        verdicts = self._verdicts
        answers = [verdicts[type(op)](op, index, entry, owner) for index, op in enumerate(entry.ops)]
        self._bears(entry, seq)
        return answers

    def _bears(self, entry: r.Entry, seq: int) -> None:
        """See whether the entry holds messages or reports, and whether any of them is needed."""
        places: tuple[tuple[str, int], ...] = ()
        bearing = False
        for op in entry.ops:
            kind = type(op)
            if kind is r.Publish or kind is r.Part:
                bearing = True
                places += tuple((m.place, m.parts) for m in op.messages if m.parts)  # type: ignore[union-attr]
            elif kind is r.Settle and op.report:  # type: ignore[union-attr]
                bearing = True
        if not bearing:
            return
        blob = self.blobs.get(seq)
        if blob is None:
            self.spent.append((seq, places))
        elif places:
            blob.places = places

    # Owners

    def _register(self, op: r.Register, _index: int, _entry: r.Entry, owner: Owner) -> None:
        owner.lease_s = op.lease_s
        self._consume(owner, op.consuming)

    def _consume(self, owner: Owner, names: Iterable[str]) -> None:
        for name in names:
            owner.consuming.add(name)
            book = self.books.get(name)
            if book is not None:
                book.consumers.add(owner.token)
        self.watcher.structured()

    @staticmethod
    def _renew(op: r.Renew, _index: int, _entry: r.Entry, owner: Owner) -> None:
        owner.seen = op.seen

    def _leave(self, _op: r.Leave, _index: int, entry: r.Entry, owner: Owner) -> int:
        """How much now waits in the queues that it consumed from."""
        for d in sorted(owner.rows):
            row = self.rows[d]
            row.attempt -= 1
            self.to_wait(row, _READY, entry.at)
        waiting = sum(self.books[name].pending for name in owner.consuming if name in self.books)
        self._strike_off(owner)
        return waiting

    def _expel(self, op: r.Expel, _index: int, entry: r.Entry, _owner: Owner) -> int | None:
        """How many deliveries were taken back, their attempts charged; None when it lives after all."""
        lost = self.owners.get(op.owner)
        if lost is None or lost.number != op.number:
            return None
        count = len(lost.rows)
        for d in sorted(lost.rows):
            row = self.rows[d]
            self.suspect(row, op.why)
            self.to_wait(row, _READY, entry.at)
        self._strike_off(lost)
        return count

    def _strike_off(self, owner: Owner) -> None:
        del self.owners[owner.token]
        for parts in owner.parts.values():
            for seq, _, _ in parts:
                self.need_not(seq)
        for book in self.books.values():
            book.consumers.discard(owner.token)
        self.watcher.structured()

    # Subscriptions

    def _declare(self, op: r.Declare, _index: int, _entry: r.Entry, owner: Owner) -> Hold:
        book = self.books.get(op.name)
        if book is None:
            book = self.books[op.name] = self.by_id[self.next_book] = Book(self.next_book, op.name)
            self.next_book += 1
        book.declared(op)
        self.routes.clear()
        if op.consume:
            owner.consuming.add(op.name)
        for other in self.owners.values():
            if op.name in other.consuming:
                book.consumers.add(other.token)
        self.watcher.structured()
        return book.hold

    def _set_hold(self, op: r.SetHold, _index: int, _entry: r.Entry, _owner: Owner) -> Hold | Unknown:
        book = self.books.get(op.name)
        if book is None:
            return Unknown([op.name])
        before = book.hold
        book.hold = before.changed(op.paused, op.forced)  # type: ignore[arg-type] # its words are the field's
        self.watcher.held(book)
        return before

    def _forget(self, op: r.Forget, _index: int, _entry: r.Entry, _owner: Owner) -> list[Row] | Unknown:
        """The deliveries that went with it, dead letters too."""
        book = self.books.pop(op.name, None)
        if book is None:
            return Unknown([op.name])
        del self.by_id[book.id]
        self.expanded.discard(book)
        self.routes.clear()
        lost = [row for row in self.rows.values() if row.book is book]
        for row in lost:
            self.drop(row)
        self.gone += Account(
            accepted=book.accepted, handled=book.handled, expired=book.expired, discarded=book.discarded + len(lost)
        )
        for owner in self.owners.values():
            owner.consuming.discard(op.name)
        self.watcher.structured()
        return lost

    # Publishing

    def _part(self, op: r.Part, index: int, _entry: r.Entry, owner: Owner) -> None:
        if not op.messages:
            for seq, _, _ in owner.parts.pop(op.part_of, []):
                self.need_not(seq)
            return
        owner.parts.setdefault(op.part_of, []).append((self.seq, index, op.messages))
        self.need(self.seq)

    def _publish(
        self, op: r.Publish, index: int, entry: r.Entry, owner: Owner
    ) -> Accepted | Conflicting | Full | Incomplete:
        parts = owner.parts.pop(op.part_of, []) if op.part_of else []
        whole = [*parts, (self.seq, index, op.messages)]
        verdict = self._admit(whole, op, entry.at) if len(parts) == op.parts else Incomplete()
        for seq, _, _ in parts:
            self.need_not(seq)
        return verdict

    def _admit(
        self, whole: list[tuple[int, int, list[r.Sent]]], op: r.Publish, now: float
    ) -> Accepted | Conflicting | Full:
        stored: list[Stored] = []
        fresh: list[tuple[r.Sent, Route, int, int, int]] = []
        here: dict[str, Known] = {}
        incoming: dict[Book, list[int]] = {}
        for seq, index, messages in whole:
            for at, sent in enumerate(messages):
                route = self.route(sent.topic)
                if sent.digest:
                    known = here.get(sent.id) or self.recognise(sent.id, now)
                    if known is not None:
                        if known.digest != sent.digest:
                            return Conflicting(sent.id)
                        stored.append(Stored(self.names(known.routed), duplicate=True))
                        continue
                    here[sent.id] = Known(now + DUPLICATE_WINDOW_S, sent.digest, route.ids)
                stored.append(route.stored)
                for book in route.books:
                    incoming.setdefault(book, []).append(len(fresh))
                fresh.append((sent, route, seq, index, at))
        plans: dict[Book, Plan] = {}
        for book, places in incoming.items():
            if book.pending + len(places) > capacity(book, now):
                if book.consumers and not op.waited:
                    return Full(book)
                plans[book] = self.plan(book, [fresh[p][0].priority for p in places], now, may_grow=op.may_grow)
                if plans[book].refused:
                    return Full(book)
        for id_, known in here.items():
            self.know(id_, known, now)
        grew, buried = self._make_room(plans.values(), now)
        left_out = {book: {incoming[book][place] for place in planned.left_out} for book, planned in plans.items()}
        for place, (sent, route, seq, index, at) in enumerate(fresh):
            for book in route.books:
                row = self._accept(sent, book, seq, index, at, now)
                if place in left_out.get(book, ()):
                    self.bury(row, self._no_room(row, now))
                    buried.append(row)
                else:
                    self._line_up(row, now)
        return Accepted(stored, grew, buried)

    def plan(self, book: Book, priorities: Sequence[int], now: float, *, may_grow: bool) -> Plan:
        """What a publish leads to in a queue that is too full for it. Changes nothing."""
        return plan(self.rows, book, priorities, now, may_grow=may_grow)

    def _make_room(self, plans: Iterable[Plan], now: float) -> tuple[list[Book], list[Row]]:
        grew: list[Book] = []
        buried: list[Row] = []
        for planned in plans:
            book = planned.book
            if planned.step.rung is Rung.EXPAND:
                book.expanded_until = now + book.spec.overflow.expand_for
                self.expanded.add(book)
                grew.append(book)
            for row, by in zip(planned.victims, planned.by(), strict=True):
                book.pending -= 1
                self.untried(row)
                self.bury(row, self._no_room(row, now, by))
                buried.append(row)
        return grew, buried

    def _accept(self, sent: r.Sent, book: Book, seq: int, index: int, at: int, now: float) -> Row:
        row = self.rows[self.next_row] = Row(self.next_row, book, sent, seq, index, at)
        self.next_row += 1
        row.moved_at = now
        book.accepted += 1
        self.need(seq)
        return row

    def _line_up(self, row: Row, now: float) -> None:
        row.book.pending += 1
        if row.due_at > now:
            row.state = _SCHEDULED
        self.waits(row)

    def _no_room(self, row: Row, now: float, by: int = -1) -> Dead:
        """What is kept of a delivery that had no room; `by`: the priority for which it gave way."""
        book = row.book
        kind = "overflow" if by < 0 else "displaced"
        return Dead(
            self.dead_id(),
            "overflow",
            now,
            0,
            0,
            "queue_overflow",
            "QueueFull",
            f"{kind}:{book.name}",
            capacity(book, now),
            by,
        )

    def _contract(self, op: r.Contract, _index: int, entry: r.Entry, _owner: Owner) -> list[Book]:
        """Those whose expansion is over."""
        over = []
        for name in op.names:
            book = self.books.get(name)
            if book is not None and self.contracts(book, entry.at):
                book.expanded_until = 0.0
                self.expanded.discard(book)
                over.append(book)
        return over

    def _remember(self, op: r.Remember, _index: int, entry: r.Entry, _owner: Owner) -> None:
        for id_, digest, routed in op.ids:
            if self.recognise(id_, entry.at) is None:
                self.know(id_, Known(entry.at + DUPLICATE_WINDOW_S, digest, tuple(routed)), entry.at)

    # Claims and settlements

    def _claim(self, op: r.Claim, _index: int, _entry: r.Entry, owner: Owner) -> list[bool]:
        return [self._take(d, version, owner) for d, version in op.targets]

    def _take(self, d: int, version: int, owner: Owner) -> bool:
        row = self.rows.get(d)
        if row is None or row.version != version or row.state not in PENDING:
            return False
        book = row.book
        if book.hold.held or self.key_is_busy(row):
            return False
        book.pending -= 1
        book.in_flight += 1
        self.untried(row)
        if row.key is not None:
            self.busy[book.id, row.key] = d
        row.state = _IN_FLIGHT
        row.attempt += 1
        row.version += 1
        row.owner = owner.token
        owner.rows.add(d)
        self.watcher.moved(row)
        return True

    def _ours(self, d: int, version: int, owner: Owner) -> Row | None:
        row = self.rows.get(d)
        if row is None or row.version != version or row.owner != owner.token or row.state is not _IN_FLIGHT:
            return None
        return row

    def _handled(self, op: r.Handled, _index: int, _entry: r.Entry, owner: Owner) -> list[bool]:
        answers = []
        for d, version in op.targets:
            row = self._ours(d, version, owner)
            answers.append(row is not None)
            if row is not None:
                row.book.handled += 1
                self.drop(row)
        return answers

    def _settle(self, op: r.Settle, index: int, entry: r.Entry, owner: Owner) -> bool:
        row = self._ours(op.delivery, op.version, owner)
        if row is None:
            return False
        book = row.book
        match op.state:
            case State.EXPIRED:
                book.expired += 1
                self.drop(row)
            case State.DISCARDED:
                book.discarded += 1
                self.drop(row)
            case State.DEAD_LETTERED:
                row.attempt = op.attempt
                row.first_failed_at = op.first_failed_at
                self.need(self.seq)
                self.bury(row, Dead(self.dead_id(), op.reason, entry.at, self.seq, index, *op.about))
            case State.READY | State.RETRYING:
                # One whose attempt was taken back has not ended it: still a suspect, if it was.
                self.suspect(row, row.suspect if op.state == _READY and op.attempt < row.attempt else 0)
                row.attempt = op.attempt
                row.first_failed_at = op.first_failed_at
                row.recovering = op.recovering
                row.delay_s = op.delay_s
                self.to_wait(row, State(op.state), entry.at)
            case _:
                raise AssertionError(f"a delivery in flight cannot become {op.state}")
        return True

    def _expire(self, op: r.Expire, _index: int, entry: r.Entry, _owner: Owner) -> list[Row]:
        """Those that were still waiting."""
        expired = []
        for d, version in op.targets:
            row = self.rows.get(d)
            if row is not None and row.version == version and row.state in PENDING and 0 < row.expires_at <= entry.at:
                row.book.expired += 1
                self.drop(row)
                expired.append(row)
        return expired

    # Dead letters

    def _replay(self, op: r.Replay, _index: int, entry: r.Entry, _owner: Owner) -> Unknown | None:
        found = self.letters(op.letters)
        if len(found) < len(set(op.letters)):
            return Unknown([str(id_) for id_ in op.letters if id_ not in found])
        for row in found.values():
            self.exhume(row)
            row.attempt = 0
            row.replays += 1
            row.first_failed_at = 0.0
            row.recovering = None
            row.expires_at = 0.0
            self.to_wait(row, _READY, entry.at)
        return None

    def _swept(self, op: r.Swept, _index: int, _entry: r.Entry, _owner: Owner) -> None:
        self.spent = [spent for spent in self.spent if spent[0] > op.upto]

    def _discard(self, op: r.Discard, _index: int, _entry: r.Entry, _owner: Owner) -> Unknown | None:
        found = self.letters(op.letters)
        if len(found) < len(set(op.letters)):
            return Unknown([str(id_) for id_ in op.letters if id_ not in found])
        for row in found.values():
            row.book.discarded += 1
            self.drop(row)
        return None
