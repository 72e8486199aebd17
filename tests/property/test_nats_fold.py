"""The fold of the JetStream transport, without a server: the same everywhere, from the start or from a snapshot."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glassbus.errors import StoreCorrupt
from glassbus.policy.delivery import PENDING, State
from glassbus.testing import FakeClock
from glassbus.transport.nats import records as r
from glassbus.transport.nats import snapshot
from glassbus.transport.nats.model import Full
from glassbus.transport.nats.state import Fold
from glassbus.transport.nats.view import Place, View

OWNERS = ("one", "two")
SUBSCRIPTIONS = (
    r.Declare("a", "t.*", 4, False, True, True, 1.5, 20.0),
    r.Declare("b", "t.x", 3, True, True, True, 1.0, 20.0),
    r.Declare("c", ">", 2, False, False, False, 1.0, 20.0),
)
STEPS = st.tuples(
    st.sampled_from(OWNERS),
    st.one_of(
        st.tuples(
            st.just("publish"),
            st.integers(1, 3),
            st.sampled_from(["t.x", "t.y", "u"]),
            st.sampled_from([None, "k", "l"]),
            st.integers(0, 3),
            st.sampled_from(["", "once", "twice"]),
            st.booleans(),
        ),
        st.tuples(st.just("part"), st.booleans()),
        st.tuples(st.just("claim"), st.integers(0, 30), st.integers(1, 4)),
        st.tuples(st.just("handle"), st.integers(0, 30)),
        st.tuples(
            st.just("settle"),
            st.integers(0, 30),
            st.sampled_from([State.READY, State.RETRYING, State.DEAD_LETTERED, State.DISCARDED, State.EXPIRED]),
        ),
        st.tuples(st.just("expire"), st.integers(0, 30)),
        st.tuples(st.just("replay"), st.integers(0, 3)),
        st.tuples(st.just("discard"), st.integers(0, 3)),
        st.tuples(st.just("hold"), st.booleans()),
        st.tuples(st.just("forget")),
        st.tuples(st.just("leave")),
        st.tuples(st.just("expel")),
        st.tuples(st.just("contract")),
        st.tuples(st.just("late"), st.integers(1, 3)),
    ),
    st.integers(0, 15),
)


#: Where the view has what a claim would find.
TO_BE_HAD = (Place.READY, Place.SUSPECT)


class Writer:
    """Turns drawn steps into entries, as owners would who see the state as it is, or as it was."""

    def __init__(self) -> None:
        self.fold = Fold()
        self.entries: list[r.Entry] = []
        self._numbers = Counter[str]()
        self._ids = itertools.count()
        self._now = 1000.0
        for owner in OWNERS:
            self.write(owner, r.Register(["a", "b"], 15.0))
        for declared in SUBSCRIPTIONS:
            self.write("one", declared)

    def write(self, owner: str, *ops: r.Op, number: int = 0) -> list[Any] | None:
        self._numbers[owner] += 1
        entry = r.Entry(owner, number or self._numbers[owner], self._now, list(ops))
        entry = r.decode(r.encode(entry), "a test")
        self.entries.append(entry)
        return self.fold.apply(entry, len(self.entries))

    def sent(self, topic: str, key: str | None, priority: int, id_: str) -> r.Sent:
        number = next(self._ids)
        return r.Sent(
            id_ or f"m{number}",
            topic,
            "raw",
            {},
            b"x",
            priority,
            key,
            self._now,
            self._now + 5 if number % 5 == 0 else 0.0,
            self._now + 30 if number % 7 == 0 else 0.0,
            b"d" if id_ else b"",
            int(number % 11 == 0),
            f"place{number}" if number % 11 == 0 else "",
        )

    def step(self, owner: str, operation: str, arguments: list[Any], seconds: int) -> None:
        fold = self.fold
        self._now += seconds
        rows = list(fold.rows.values())
        flying = [row for row in rows if row.state is State.IN_FLIGHT]
        at_most = max(1, len(rows))
        letters = sorted(id_ for book in fold.books.values() for id_ in book.dead)
        match operation, arguments:
            case "publish", [count, topic, key, priority, id_, waited]:
                batch = [self.sent(topic, key, priority, id_ if n == 0 else "") for n in range(count)]
                self.write(owner, r.Publish(batch, waited=waited))
            case "part", [complete]:
                self.write(owner, r.Part(7, [self.sent("t.x", None, 1, "")]))
                if complete:
                    self.write(owner, r.Publish([self.sent("t.y", None, 1, "")], 7, 1, waited=True))
            case "claim", [at, count]:
                self.write(owner, r.Claim([(row.d, row.version) for row in rows[at % at_most :][:count]]))
            case "handle", [at] if flying:
                row = flying[at % len(flying)]
                self.write(owner, r.Handled([(row.d, row.version)]))
            case "settle", [at, state] if flying:
                row = flying[at % len(flying)]
                report = b"report" if state is State.DEAD_LETTERED else b""
                op = r.Settle(row.d, row.version, int(state), row.attempt - (at % 2), 3.0, None, 0.0, "why", report)
                self.write(owner, op)
            case "expire", [at]:
                self.write(owner, r.Expire([(row.d, row.version) for row in rows[at % at_most :][:3]]))
            case (("replay" | "discard"), [at]):
                kind = r.Replay if operation == "replay" else r.Discard
                self.write(owner, kind(letters[at : at + 1] or [999]))
            case "hold", [paused]:
                self.write(owner, r.SetHold("a", paused, None))
            case "forget", _:
                self.write(owner, r.Forget("b"))
                self.write(owner, SUBSCRIPTIONS[1])
            case "leave", _:
                self.write(owner, r.Leave())
                self.write(owner, r.Register(["a", "b"], 15.0))
            case "expel", _:
                other = OWNERS[1 - OWNERS.index(owner)]
                lost = fold.owners.get(other)
                self.write(owner, r.Expel(other, lost.number if lost else 0, 2))
                self.write(other, r.Register(["a"], 15.0))
            case "contract", _:
                self.write(owner, r.Contract(["a", "b", "c"]))
            case "late", [by]:  # an entry that was taken for lost comes out of some buffer
                before = snapshot.dump(fold) if not _parts(fold) else b""
                number = max(0, fold.owners[owner].number - by) if owner in fold.owners else 1
                targets = [(row.d, row.version) for row in rows]
                assert self.write(owner, r.Claim(targets), number=number or -1) is None
                if before:
                    assert _but_for_seq(snapshot.dump(fold)) == _but_for_seq(before)


def _but_for_seq(stored: bytes) -> Any:
    fold = Fold()
    snapshot.load(fold, stored)
    fold.seq = 0
    return snapshot.dump(fold)


def _parts(fold: Fold) -> bool:
    return any(owner.parts for owner in fold.owners.values())


def check(fold: Fold) -> None:
    """Every count and every index says what the deliveries say."""
    needed = Counter[int]()
    for row in fold.rows.values():
        needed[row.blob] += 1
        if row.dead is not None and row.dead.blob:
            needed[row.dead.blob] += 1
        assert (row.state is State.DEAD_LETTERED) == (row.dead is not None)
        assert (row.state is State.IN_FLIGHT) == bool(row.owner)
        if row.owner:
            assert row.d in fold.owners[row.owner].rows
    for owner in fold.owners.values():
        needed.update(seq for parts in owner.parts.values() for seq, _, _ in parts)
        assert all(fold.rows[d].owner == owner.token for d in owner.rows)
    assert {seq: blob.needed for seq, blob in fold.blobs.items()} == dict(needed)
    assert not {seq for seq, _ in fold.spent} & needed.keys()
    assert fold.suspects == sum(bool(row.suspect) for row in fold.rows.values())
    for book in fold.books.values():
        mine = [row for row in fold.rows.values() if row.book is book]
        pending = sum(row.state in PENDING for row in mine)
        in_flight = sum(row.state is State.IN_FLIGHT for row in mine)
        assert (book.pending, book.in_flight) == (pending, in_flight)
        assert set(book.dead.values()) == {row for row in mine if row.state is State.DEAD_LETTERED}
        settled = book.handled + book.expired + book.discarded + len(book.dead)
        assert book.accepted == pending + in_flight + settled
        keys = Counter(row.key for row in mine if row.key is not None and row.state is State.IN_FLIGHT)
        assert set(keys.values()) <= {1}
        assert {(book.id, key) for key in keys} == {where for where in fold.busy if where[0] == book.id}
        tried = [row for row in mine if row.key is not None and row.state in PENDING and row.attempt]
        for row in tried:
            assert row.d in fold.tried[book.id, row.key or ""]
        assert sum(len(found) for where, found in fold.tried.items() if where[0] == book.id) == len(tried)


@given(steps=st.lists(STEPS, max_size=60), cut=st.floats(0, 1))
def test_a_snapshot_at_any_point_leads_to_the_same_state(steps: list[Any], cut: float) -> None:
    writer = Writer()
    for owner, (operation, *arguments), seconds in steps:
        writer.step(owner, operation, arguments, seconds)
        check(writer.fold)
    at = int(cut * len(writer.entries))
    early = Fold()
    for seq, entry in enumerate(writer.entries[:at], 1):
        early.apply(entry, seq)
    if _parts(early) or _parts(writer.fold):
        return  # no snapshot is taken while a publish is half written
    late = Fold()
    snapshot.load(late, snapshot.dump(early))
    for seq, entry in enumerate(writer.entries[at:], at + 1):
        late.apply(entry, seq)
    check(late)
    assert snapshot.dump(late) == snapshot.dump(writer.fold)


SEND = ("publish", 1, "t.x", None, 0, "", False)


@given(steps=st.lists(STEPS, max_size=60))
# The one suspect there is has expired: who waits behind it must not wait for ever.
@example(
    steps=[
        ("one", SEND, 0),
        ("one", ("claim", 0, 1), 0),
        ("one", SEND, 0),
        ("one", SEND, 0),
        ("one", ("expel",), 0),
        ("two", ("expel",), 0),
    ]
)
def test_what_this_process_would_claim_next_is_always_to_be_had(steps: list[Any]) -> None:
    """The view offers no delivery twice, none that is not pending, and every one that is unless its key is taken."""
    writer = Writer()
    view = View(FakeClock(wall=1e9), lambda book: None)
    for owner, (operation, *arguments), seconds in steps:
        writer.step(owner, operation, arguments, seconds)
    for seq, entry in enumerate(writer.entries, 1):
        view.fold.apply(entry, seq)
    view.promote()
    fold = view.fold
    if OWNERS[0] not in fold.owners:
        fold.apply(r.Entry(OWNERS[0], 10**6, 1e9, [r.Register(["a", "b"], 15.0)]), len(writer.entries) + 1)
    for book in fold.books.values():
        account = view.account(book)
        places = Counter(Place(row.place) for row in fold.rows.values() if row.book is book)
        assert account.unaccounted == 0
        assert account.ready == sum(places[p] for p in (Place.READY, Place.KEYED, Place.SUSPECT, Place.TAKEN))
        if book.hold.held:
            assert view.take(book, 10, [], []) == []
            continue
        offered: set[int] = set()
        overdue: list[Any] = []
        while True:
            taken = view.take(book, 100, [], overdue)
            if not taken:
                ready = [row.d for row in fold.rows.values() if row.book is book and row.place in TO_BE_HAD]
                assert not ready, "nothing was offered, though this is to be had"
                if not overdue:
                    break
            while overdue:  # as the entry that expires them does
                book.expired += 1
                fold.drop(overdue.pop())
            for row in taken:
                assert row.state in PENDING
                assert row.d not in offered
                offered.add(row.d)
                assert fold._take(row.d, row.version, fold.owners[OWNERS[0]])
                book.handled += 1
                fold.drop(row)
        left = [row for row in fold.rows.values() if row.book is book and row.state in PENDING]
        flying = {row.key for row in fold.rows.values() if row.book is book and row.state is State.IN_FLIGHT} - {None}
        assert all(row.key in flying for row in left), [(row.d, Place(row.place)) for row in left]


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b"\x00" + b, lambda b: b""])
def test_a_damaged_snapshot_is_told_as_such(damage: Any) -> None:
    writer = Writer()
    writer.step("one", "publish", [3, "t.x", None, 1, "", False], 0)
    with pytest.raises(StoreCorrupt):
        snapshot.load(Fold(), damage(snapshot.dump(writer.fold)))


def test_what_is_no_entry_is_told_as_such() -> None:
    for stored in (b"", b"\xff", b"\x93\x01\x02\x03", b"{}"):
        with pytest.raises(StoreCorrupt, match="entry 7"):
            r.decode(stored, "entry 7")


def test_an_entry_of_nobody_changes_nothing_but_is_to_be_swept() -> None:
    fold = Fold()
    sent = r.Sent("m", "t", "raw", {}, b"")
    assert fold.apply(r.Entry("nobody", 1, 0.0, [r.Publish([sent])]), 1) is None
    assert not fold.rows
    assert [seq for seq, _ in fold.spent] == [1]


def test_an_owner_that_wrote_meanwhile_is_not_expelled() -> None:
    writer = Writer()
    seen = writer.fold.owners["two"].number
    writer.write("two", r.Renew(0))
    assert writer.write("one", r.Expel("two", seen, 2)) == [None]
    assert writer.write("one", r.Expel("two", seen + 1, 2)) == [0]
    assert set(writer.fold.owners) == {"one"}


def test_two_processes_that_fill_a_queue_together_never_overfill_it() -> None:
    writer = Writer()
    verdicts = [writer.write(owner, r.Publish([writer.sent("t.y", None, 1, "")])) for owner in OWNERS for _ in range(5)]
    assert sum(isinstance(v[0], Full) for v in verdicts if v) == 6
    assert writer.fold.books["a"].pending == 4
