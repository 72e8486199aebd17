"""Deliveries and where they are: the moves that keep every count and every index right."""

from __future__ import annotations

from collections.abc import Iterable

from glassbus.policy.delivery import State
from glassbus.policy.ledger import Account
from glassbus.policy.overflow import contracts
from glassbus.policy.routing import ByTopic, destination, matches
from glassbus.transport import Stored
from glassbus.transport.nats.model import Blob, Book, Dead, Known, Owner, Route, Row, Unwatched, Watcher

_READY, _IN_FLIGHT, _DEAD = State.READY, State.IN_FLIGHT, State.DEAD_LETTERED


class Shelf:
    """What `Fold` changes. Whoever moves a delivery does it with these methods, and with nothing else."""

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
        self.routes: ByTopic[Route] = ByTopic()

    # Entries that are needed

    def need(self, seq: int) -> None:
        blob = self.blobs.get(seq)
        if blob is None:
            blob = self.blobs[seq] = Blob()
        blob.needed += 1

    def need_not(self, seq: int) -> None:
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
        self.need(row.blob)
        self.suspects += bool(row.suspect)
        if row.state is _DEAD:
            assert row.dead is not None
            book.dead[row.dead.id] = row
            if row.dead.blob:
                self.need(row.dead.blob)
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

    # Looking

    def route(self, topic: str) -> Route:
        found = self.routes.get(topic)
        if found is None:
            books = tuple(book for book in self.books.values() if matches(book.spec.pattern, topic))
            label = destination(topic, (book.spec.pattern for book in books))
            stored = Stored(tuple(book.name for book in books))
            found = Route(books, label, stored, tuple(book.id for book in books))
            return self.routes.keep(topic, found, (label, stored.subscriptions))
        return found

    def names(self, routed: Iterable[int]) -> tuple[str, ...]:
        """The names of subscriptions by number; forgotten ones are left out."""
        return tuple(self.by_id[i].name for i in routed if i in self.by_id)

    def recognise(self, id_: str, now: float) -> Known | None:
        known = self.known.get(id_)
        return known if known is not None and known.until > now else None

    def letters(self, ids: Iterable[int]) -> dict[int, Row]:
        """Those of `ids` that there are."""
        return {id_: book.dead[id_] for id_ in ids for book in self.books.values() if id_ in book.dead}

    @staticmethod
    def contracts(book: Book, now: float) -> bool:
        spec = book.spec
        return contracts(spec.capacity, spec.overflow, book.expanded_until, now, book.pending)

    def key_is_busy(self, row: Row) -> bool:
        """Whether another delivery of its key goes first: one in flight or, if strict, one tried before."""
        if row.key is None:
            return False
        key = (row.book.id, row.key)
        if key in self.busy:
            return True
        return row.book.spec.strict_key and row.attempt == 0 and bool(self.tried.get(key))

    # Ids

    def know(self, id_: str, known: Known, now: float) -> None:
        # Oldest first, so that what is over can be dropped from the front.
        self.known.pop(id_, None)
        self.known[id_] = known
        while self.known:
            oldest = next(iter(self.known))
            if self.known[oldest].until > now:
                return
            del self.known[oldest]

    # Moves

    def to_wait(self, row: Row, state: State, now: float) -> None:
        if row.state is _IN_FLIGHT:
            self.land(row)
        row.state = state
        row.version += 1
        row.moved_at = now
        row.book.pending += 1
        if row.key is not None and row.attempt:
            self.tried.setdefault((row.book.id, row.key), set()).add(row.d)
        self.waits(row)

    def waits(self, row: Row) -> None:
        book = row.book
        if book.line is not None:
            book.line.add(row)
            if 2 * book.pending < book.spec.capacity:
                book.line = None
        self.watcher.moved(row)

    def land(self, row: Row) -> None:
        """It is in flight no longer."""
        row.book.in_flight -= 1
        owner = self.owners.get(row.owner)
        if owner is not None:
            owner.rows.discard(row.d)
        row.owner = ""
        if row.key is not None:
            self.busy.pop((row.book.id, row.key), None)

    def bury(self, row: Row, dead: Dead) -> None:
        if row.state is _IN_FLIGHT:
            self.land(row)
        self.suspect(row, 0)
        row.state = _DEAD
        row.version += 1
        row.recovering = None
        row.dead = dead
        row.book.dead[dead.id] = row
        self.watcher.moved(row)

    def drop(self, row: Row) -> None:
        """It has come to its end."""
        if row.state is _IN_FLIGHT:
            self.land(row)
        elif row.state is _DEAD:
            self.exhume(row)
        else:
            row.book.pending -= 1
            self.untried(row)
        self.suspect(row, 0)
        del self.rows[row.d]
        self.need_not(row.blob)
        self.watcher.gone(row)

    def exhume(self, row: Row) -> None:
        assert row.dead is not None
        del row.book.dead[row.dead.id]
        if row.dead.blob:
            self.need_not(row.dead.blob)
        row.dead = None

    def untried(self, row: Row) -> None:
        if row.key is not None:
            tried = self.tried.get((row.book.id, row.key))
            if tried is not None:
                tried.discard(row.d)
                if not tried:
                    del self.tried[row.book.id, row.key]

    def suspect(self, row: Row, why: int) -> None:
        self.suspects += bool(why) - bool(row.suspect)
        row.suspect = why

    def dead_id(self) -> int:
        self.next_dead += 1
        return self.next_dead - 1
