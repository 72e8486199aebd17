"""The store as every reader of the stream has it in memory: entries folded in their order, nothing else.

No clock, no chance, no I/O: the same entries give the same state in every process, and so the same
verdict on each operation. That is what makes a claim, a full queue, a known id or a
lost lease certain without asking anybody. What is derived for this process alone (what is due by
its clock, which claims wait) is kept by a `Watcher`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from glassbus.config import Overflow
from glassbus.policy.delivery import PENDING, State
from glassbus.policy.ledger import Account
from glassbus.policy.overflow import Rung, contracts
from glassbus.policy.routing import ByTopic, destination, matches
from glassbus.transport import Hold, Stored, SubscriptionSpec
from glassbus.transport.nats import records as r
from glassbus.transport.nats.climbing import Line, Plan, capacity, plan

#: How long an id given by the caller is recognised again, in seconds.
DUPLICATE_WINDOW_S = 600.0
#: `Row.suspect`: 0, or why the delivery is given again.
REDELIVERED = ("", "owner_died", "lease_expired")
_READY, _SCHEDULED, _RETRYING, _IN_FLIGHT, _DEAD = (
    State.READY,
    State.SCHEDULED,
    State.RETRYING,
    State.IN_FLIGHT,
    State.DEAD_LETTERED,
)


class Dead(msgspec.Struct, gc=False, array_like=True):
    """What is known of a dead letter without reading it. Its report is operation `op` of the entry at `blob`.

    `blob` 0: the queue was full, and the report is made from what is here.
    """

    id: int
    reason: str
    died_at: float
    blob: int
    op: int
    category: str
    exception_type: str
    fingerprint: str
    capacity: int = 0
    by: int = -1


class Row:
    """One delivery. `blob`, `op` and `at` say where its message is in the stream; `content` is that, if it is at hand.

    `version` counts what happened to it. `place`, `position` and `due` belong to the watcher.
    """

    __slots__ = (
        "at",
        "attempt",
        "blob",
        "book",
        "content",
        "d",
        "dead",
        "delay_s",
        "due_at",
        "expires_at",
        "first_failed_at",
        "id",
        "key",
        "moved_at",
        "op",
        "owner",
        "place",
        "position",
        "priority",
        "published_at",
        "recovering",
        "replays",
        "state",
        "suspect",
        "topic",
        "version",
    )

    def __init__(self, d: int, book: Book, sent: r.Sent, blob: int, op: int, at: int) -> None:
        self.d = d
        self.book = book
        self.id = sent.id
        self.topic = sent.topic
        self.priority = sent.priority
        self.key = sent.key
        self.published_at = sent.published_at
        self.due_at = sent.due_at
        self.expires_at = sent.expires_at
        self.content: r.Sent | None = sent
        self.blob = blob
        self.op = op
        self.at = at
        self.state = _READY
        self.attempt = 0
        self.version = 0
        self.owner = ""
        self.suspect = 0
        self.first_failed_at = 0.0
        self.recovering: tuple[str, str] | None = None
        self.replays = 0
        self.delay_s = 0.0
        self.moved_at = 0.0
        self.dead: Dead | None = None
        self.place = 0
        self.position = d


class Book:
    """One subscription and its counts."""

    __slots__ = (
        "accepted",
        "consumers",
        "dead",
        "discarded",
        "expanded_until",
        "expired",
        "handled",
        "hold",
        "id",
        "in_flight",
        "lanes",
        "line",
        "name",
        "pending",
        "spec",
    )

    def __init__(self, id: int, name: str) -> None:  # noqa: A002 - what it is
        self.id = id
        self.name = name
        self.spec = SubscriptionSpec(name, ">", 0)
        self.hold = Hold()
        self.expanded_until = 0.0
        self.accepted = self.handled = self.expired = self.discarded = 0
        self.pending = self.in_flight = 0
        self.dead: dict[int, Row] = {}
        self.consumers: set[str] = set()
        self.line: Line | None = None  # while it is full
        self.lanes: Any = None  # the watcher's

    def declared(self, op: r.Declare) -> None:
        overflow = Overflow(displace=op.displace, expand=op.expand, expand_for=op.expand_for)
        self.spec = SubscriptionSpec(op.name, op.pattern, op.capacity, op.strict_key, overflow)


class Owner:
    """A process that writes. `rows` are the deliveries it has in flight, `seen` how far it has read."""

    __slots__ = ("consuming", "lease_s", "number", "parts", "rows", "seen", "token")

    def __init__(self, token: str, lease_s: float) -> None:
        self.token = token
        self.lease_s = lease_s
        self.number = 0
        self.seen = 0
        self.rows: set[int] = set()
        self.consuming: set[str] = set()
        self.parts: dict[int, list[tuple[int, int, list[r.Sent]]]] = {}


class Known(msgspec.Struct, gc=False, array_like=True):
    """An id that is recognised until a wall time, and what it stands for."""

    until: float
    digest: bytes
    routed: tuple[int, ...]


class Route(msgspec.Struct, gc=False, frozen=True):
    """Where the messages of one topic go."""

    books: tuple[Book, ...]
    destination: str
    stored: Stored
    ids: tuple[int, ...]


class Blob(msgspec.Struct, gc=False):
    """An entry that holds messages or reports: how many of them are needed yet, and bodies kept apart."""

    needed: int = 0
    places: tuple[tuple[str, int], ...] = ()


# Verdicts, where yes or no is not enough


class Accepted(msgspec.Struct, gc=False):
    """A publish that is stored; these queues `grew` for it, and these deliveries, `buried`, had no room."""

    stored: list[Stored]
    grew: list[Book]
    buried: list[Row]


class Conflicting(msgspec.Struct, gc=False):
    id: str


class Full(msgspec.Struct, gc=False):
    book: Book


class Incomplete(msgspec.Struct, gc=False):
    """Some of its parts were not stored."""


class Unknown(msgspec.Struct, gc=False):
    """No subscription of this name, or no dead letters of these ids."""

    what: list[str]


class Watcher(Protocol):
    """Told of each change, right after it."""

    def moved(self, row: Row, /) -> None: ...
    def gone(self, row: Row, /) -> None: ...
    def held(self, book: Book, /) -> None: ...
    def structured(self) -> None:
        """Subscriptions, their capacity or their consumers changed."""


class Unwatched:
    """For a state that is only looked at."""

    def moved(self, row: Row, /) -> None:
        """Nobody looks."""

    def gone(self, row: Row, /) -> None:
        """Nobody looks."""

    def held(self, book: Book, /) -> None:
        """Nobody looks."""

    def structured(self) -> None:
        """Nobody looks."""


class Fold:
    """The state, and how each operation changes it."""

    def __init__(self, watcher: Watcher | None = None) -> None:
        self.watcher: Watcher = watcher or Unwatched()
        self.seq = 0
        self.books: dict[str, Book] = {}
        self.by_id: dict[int, Book] = {}
        self.rows: dict[int, Row] = {}
        self.owners: dict[str, Owner] = {}
        self.known: dict[str, Known] = {}
        self.gone = Account()
        self.next_row = 1
        self.next_book = 1
        self.next_dead = 1
        self.suspects = 0
        self.expanded: set[Book] = set()
        self.blobs: dict[int, Blob] = {}
        self.spent: list[tuple[int, tuple[tuple[str, int], ...]]] = []
        self.busy: dict[tuple[int, str], int] = {}
        self.tried: dict[tuple[int, str], set[int]] = {}
        self._routes: ByTopic[Route] = ByTopic()
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

    def _need(self, seq: int) -> None:
        blob = self.blobs.get(seq)
        if blob is None:
            blob = self.blobs[seq] = Blob()
        blob.needed += 1

    def _need_not(self, seq: int) -> None:
        blob = self.blobs[seq]
        blob.needed -= 1
        if not blob.needed:
            del self.blobs[seq]
            self.spent.append((seq, blob.places))

    # From a snapshot

    def restore_book(self, book: Book) -> None:
        if book.expanded_until:
            self.expanded.add(book)
        self.books[book.name] = self.by_id[book.id] = book

    def restore_owner(self, owner: Owner) -> None:
        self.owners[owner.token] = owner
        for name in owner.consuming & self.books.keys():
            self.books[name].consumers.add(owner.token)

    def restore_row(self, row: Row) -> None:
        """Owners and subscriptions first. Raises KeyError."""
        book = row.book
        self.rows[row.d] = row
        self._need(row.blob)
        self.suspects += bool(row.suspect)
        if row.state is _DEAD:
            assert row.dead is not None
            book.dead[row.dead.id] = row
            if row.dead.blob:
                self._need(row.dead.blob)
        elif row.state is _IN_FLIGHT:
            book.in_flight += 1
            self.owners[row.owner].rows.add(row.d)
            if row.key is not None:
                self.busy[book.id, row.key] = row.d
        else:
            book.pending += 1
            if row.key is not None and row.attempt:
                self.tried.setdefault((book.id, row.key), set()).add(row.d)
        self.watcher.moved(row)

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
            self._to_wait(row, _READY, entry.at)
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
            self._suspect(row, op.why)
            self._to_wait(row, _READY, entry.at)
        self._strike_off(lost)
        return count

    def _strike_off(self, owner: Owner) -> None:
        del self.owners[owner.token]
        for parts in owner.parts.values():
            for seq, _, _ in parts:
                self._need_not(seq)
        for book in self.books.values():
            book.consumers.discard(owner.token)
        self.watcher.structured()

    def _suspect(self, row: Row, why: int) -> None:
        self.suspects += bool(why) - bool(row.suspect)
        row.suspect = why

    # Subscriptions

    def _declare(self, op: r.Declare, _index: int, _entry: r.Entry, owner: Owner) -> Hold:
        book = self.books.get(op.name)
        if book is None:
            book = self.books[op.name] = self.by_id[self.next_book] = Book(self.next_book, op.name)
            self.next_book += 1
        book.declared(op)
        self._routes.clear()
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
        self._routes.clear()
        lost = [row for row in self.rows.values() if row.book is book]
        for row in lost:
            self._drop(row)
        self.gone += Account(
            accepted=book.accepted, handled=book.handled, expired=book.expired, discarded=book.discarded + len(lost)
        )
        for owner in self.owners.values():
            owner.consuming.discard(op.name)
        self.watcher.structured()
        return lost

    def route(self, topic: str) -> Route:
        found = self._routes.get(topic)
        if found is None:
            books = tuple(book for book in self.books.values() if matches(book.spec.pattern, topic))
            label = destination(topic, (book.spec.pattern for book in books))
            stored = Stored(tuple(book.name for book in books))
            found = Route(books, label, stored, tuple(book.id for book in books))
            return self._routes.keep(topic, found, (label, stored.subscriptions))
        return found

    # Publishing

    def _part(self, op: r.Part, index: int, _entry: r.Entry, owner: Owner) -> None:
        if not op.messages:
            for seq, _, _ in owner.parts.pop(op.part_of, []):
                self._need_not(seq)
            return
        owner.parts.setdefault(op.part_of, []).append((self.seq, index, op.messages))
        self._need(self.seq)

    def _publish(
        self, op: r.Publish, index: int, entry: r.Entry, owner: Owner
    ) -> Accepted | Conflicting | Full | Incomplete:
        parts = owner.parts.pop(op.part_of, []) if op.part_of else []
        whole = [*parts, (self.seq, index, op.messages)]
        verdict = self._admit(whole, op, entry.at) if len(parts) == op.parts else Incomplete()
        for seq, _, _ in parts:
            self._need_not(seq)
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
            self._know(id_, known, now)
        grew, buried = self._make_room(plans.values(), now)
        left_out = {book: {incoming[book][place] for place in planned.left_out} for book, planned in plans.items()}
        for place, (sent, route, seq, index, at) in enumerate(fresh):
            for book in route.books:
                row = self._accept(sent, book, seq, index, at, now)
                if place in left_out.get(book, ()):
                    self._bury(row, self._no_room(row, now))
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
                self._untried(row)
                self._bury(row, self._no_room(row, now, by))
                buried.append(row)
        return grew, buried

    def _accept(self, sent: r.Sent, book: Book, seq: int, index: int, at: int, now: float) -> Row:
        row = self.rows[self.next_row] = Row(self.next_row, book, sent, seq, index, at)
        self.next_row += 1
        row.moved_at = now
        book.accepted += 1
        self._need(seq)
        return row

    def _line_up(self, row: Row, now: float) -> None:
        row.book.pending += 1
        if row.due_at > now:
            row.state = _SCHEDULED
        self._waits(row)

    def _waits(self, row: Row) -> None:
        book = row.book
        if book.line is not None:
            book.line.add(row)
            if 2 * book.pending < book.spec.capacity:
                book.line = None
        self.watcher.moved(row)

    def _no_room(self, row: Row, now: float, by: int = -1) -> Dead:
        """What is kept of a delivery that had no room; `by`: the priority for which it gave way."""
        book = row.book
        kind = "overflow" if by < 0 else "displaced"
        return Dead(
            self._dead_id(),
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

    @staticmethod
    def contracts(book: Book, now: float) -> bool:
        spec = book.spec
        return contracts(spec.capacity, spec.overflow, book.expanded_until, now, book.pending)

    def recognise(self, id_: str, now: float) -> Known | None:
        known = self.known.get(id_)
        return known if known is not None and known.until > now else None

    def names(self, routed: Iterable[int]) -> tuple[str, ...]:
        """The names of subscriptions by number; forgotten ones are left out."""
        return tuple(self.by_id[i].name for i in routed if i in self.by_id)

    def _know(self, id_: str, known: Known, now: float) -> None:
        # Oldest first, so that what is over can be dropped from the front.
        self.known.pop(id_, None)
        self.known[id_] = known
        while self.known:
            oldest = next(iter(self.known))
            if self.known[oldest].until > now:
                return
            del self.known[oldest]

    def _remember(self, op: r.Remember, _index: int, entry: r.Entry, _owner: Owner) -> None:
        for id_, digest, routed in op.ids:
            if self.recognise(id_, entry.at) is None:
                self._know(id_, Known(entry.at + DUPLICATE_WINDOW_S, digest, tuple(routed)), entry.at)

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
        self._untried(row)
        if row.key is not None:
            self.busy[book.id, row.key] = d
        row.state = _IN_FLIGHT
        row.attempt += 1
        row.version += 1
        row.owner = owner.token
        owner.rows.add(d)
        self.watcher.moved(row)
        return True

    def key_is_busy(self, row: Row) -> bool:
        """Whether another delivery of its key goes first: one in flight or, if strict, one tried before."""
        if row.key is None:
            return False
        key = (row.book.id, row.key)
        if key in self.busy:
            return True
        return row.book.spec.strict_key and row.attempt == 0 and bool(self.tried.get(key))

    def _untried(self, row: Row) -> None:
        if row.key is not None:
            tried = self.tried.get((row.book.id, row.key))
            if tried is not None:
                tried.discard(row.d)
                if not tried:
                    del self.tried[row.book.id, row.key]

    def _ours(self, d: int, version: int, owner: Owner) -> Row | None:
        row = self.rows.get(d)
        if row is None or row.version != version or row.owner != owner.token or row.state is not _IN_FLIGHT:
            return None
        return row

    def _land(self, row: Row) -> None:
        """It is in flight no longer."""
        row.book.in_flight -= 1
        owner = self.owners.get(row.owner)
        if owner is not None:
            owner.rows.discard(row.d)
        row.owner = ""
        if row.key is not None:
            self.busy.pop((row.book.id, row.key), None)

    def _handled(self, op: r.Handled, _index: int, _entry: r.Entry, owner: Owner) -> list[bool]:
        answers = []
        for d, version in op.targets:
            row = self._ours(d, version, owner)
            answers.append(row is not None)
            if row is not None:
                row.book.handled += 1
                self._drop(row)
        return answers

    def _settle(self, op: r.Settle, index: int, entry: r.Entry, owner: Owner) -> bool:
        row = self._ours(op.delivery, op.version, owner)
        if row is None:
            return False
        book = row.book
        match op.state:
            case State.EXPIRED:
                book.expired += 1
                self._drop(row)
            case State.DISCARDED:
                book.discarded += 1
                self._drop(row)
            case State.DEAD_LETTERED:
                row.attempt = op.attempt
                row.first_failed_at = op.first_failed_at
                self._need(self.seq)
                self._bury(row, Dead(self._dead_id(), op.reason, entry.at, self.seq, index, *op.about))
            case State.READY | State.RETRYING:
                # One whose attempt was taken back has not ended it: still a suspect, if it was.
                self._suspect(row, row.suspect if op.state == _READY and op.attempt < row.attempt else 0)
                row.attempt = op.attempt
                row.first_failed_at = op.first_failed_at
                row.recovering = op.recovering
                row.delay_s = op.delay_s
                self._to_wait(row, State(op.state), entry.at)
            case _:
                raise AssertionError(f"a delivery in flight cannot become {op.state}")
        return True

    def _to_wait(self, row: Row, state: State, now: float) -> None:
        if row.state is _IN_FLIGHT:
            self._land(row)
        row.state = state
        row.version += 1
        row.moved_at = now
        row.book.pending += 1
        if row.key is not None and row.attempt:
            self.tried.setdefault((row.book.id, row.key), set()).add(row.d)
        self._waits(row)

    def _dead_id(self) -> int:
        self.next_dead += 1
        return self.next_dead - 1

    def _bury(self, row: Row, dead: Dead) -> None:
        if row.state is _IN_FLIGHT:
            self._land(row)
        self._suspect(row, 0)
        row.state = _DEAD
        row.version += 1
        row.recovering = None
        row.dead = dead
        row.book.dead[dead.id] = row
        self.watcher.moved(row)

    def _drop(self, row: Row) -> None:
        """It has come to its end."""
        if row.state is _IN_FLIGHT:
            self._land(row)
        elif row.state is _DEAD:
            self._exhume(row)
        else:
            row.book.pending -= 1
            self._untried(row)
        self._suspect(row, 0)
        del self.rows[row.d]
        self._need_not(row.blob)
        self.watcher.gone(row)

    def _exhume(self, row: Row) -> None:
        assert row.dead is not None
        del row.book.dead[row.dead.id]
        if row.dead.blob:
            self._need_not(row.dead.blob)
        row.dead = None

    def _expire(self, op: r.Expire, _index: int, entry: r.Entry, _owner: Owner) -> list[Row]:
        """Those that were still waiting."""
        expired = []
        for d, version in op.targets:
            row = self.rows.get(d)
            if row is not None and row.version == version and row.state in PENDING and 0 < row.expires_at <= entry.at:
                row.book.expired += 1
                self._drop(row)
                expired.append(row)
        return expired

    # Dead letters

    def letters(self, ids: Iterable[int]) -> dict[int, Row]:
        """Those of `ids` that there are."""
        return {id_: book.dead[id_] for id_ in ids for book in self.books.values() if id_ in book.dead}

    def _replay(self, op: r.Replay, _index: int, entry: r.Entry, _owner: Owner) -> Unknown | None:
        found = self.letters(op.letters)
        if len(found) < len(set(op.letters)):
            return Unknown([str(id_) for id_ in op.letters if id_ not in found])
        for row in found.values():
            self._exhume(row)
            row.attempt = 0
            row.replays += 1
            row.first_failed_at = 0.0
            row.recovering = None
            row.expires_at = 0.0
            self._to_wait(row, _READY, entry.at)
        return None

    def _swept(self, op: r.Swept, _index: int, _entry: r.Entry, _owner: Owner) -> None:
        self.spent = [spent for spent in self.spent if spent[0] > op.upto]

    def _discard(self, op: r.Discard, _index: int, _entry: r.Entry, _owner: Owner) -> Unknown | None:
        found = self.letters(op.letters)
        if len(found) < len(set(op.letters)):
            return Unknown([str(id_) for id_ in op.letters if id_ not in found])
        for row in found.values():
            row.book.discarded += 1
            self._drop(row)
        return None
