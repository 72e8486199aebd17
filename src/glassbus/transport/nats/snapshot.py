"""The whole state as bytes, so that the entries before it need not be kept, and the state from such bytes."""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from glassbus.errors import StoreCorrupt
from glassbus.policy.delivery import State
from glassbus.policy.ledger import Account
from glassbus.transport import Hold
from glassbus.transport.nats import records as r
from glassbus.transport.nats.connection import Link, NotFound
from glassbus.transport.nats.model import Blob, Book, Dead, Known, Owner, Row
from glassbus.transport.nats.state import Fold
from glassbus.transport.nats.stream import Place


class Head(msgspec.Struct, array_like=True):
    """Where the newest snapshot is: the state behind entry `seq`, in so many pieces."""

    version: int
    seq: int
    pieces: int
    digest: bytes


class _Book(msgspec.Struct, array_like=True, gc=False):
    id: int
    name: str
    spec: r.Declare
    hold: tuple[bool, str]
    counts: tuple[int, int, int, int]
    expanded_until: float


class _Owner(msgspec.Struct, array_like=True, gc=False):
    token: str
    lease_s: float
    number: int
    seen: int
    consuming: list[str]


class _Row(msgspec.Struct, array_like=True, gc=False):
    d: int
    book: int
    id: str
    topic: str
    priority: int
    key: str | None
    published_at: float
    due_at: float
    expires_at: float
    blob: int
    op: int
    at: int
    state: int
    attempt: int
    version: int
    owner: str
    suspect: int
    first_failed_at: float
    recovering: tuple[str, str] | None
    replays: int
    delay_s: float
    moved_at: float
    dead: Dead | None


class _Whole(msgspec.Struct, array_like=True):
    seq: int
    gone: tuple[int, int, int, int]
    next: tuple[int, int, int]
    books: list[_Book]
    owners: list[_Owner]
    known: list[tuple[str, Known]]
    rows: list[_Row]
    places: list[tuple[int, tuple[tuple[str, int], ...]]]
    spent: list[tuple[int, tuple[tuple[str, int], ...]]]


_encode = msgspec.msgpack.Encoder().encode
_decode_whole = msgspec.msgpack.Decoder(_Whole).decode
_decode_head = msgspec.msgpack.Decoder(Head).decode


def dump(fold: Fold) -> bytes:
    """The state of `fold`. It must have no part of a publish under way."""
    gone = fold.gone
    whole = _Whole(
        fold.seq,
        (gone.accepted, gone.handled, gone.expired, gone.discarded),
        (fold.next_row, fold.next_book, fold.next_dead),
        [_book(book) for book in fold.books.values()],
        [_Owner(o.token, o.lease_s, o.number, o.seen, sorted(o.consuming)) for o in fold.owners.values()],
        list(fold.known.items()),
        [_row(row) for row in fold.rows.values()],
        [(seq, blob.places) for seq, blob in fold.blobs.items() if blob.places],
        fold.spent,
    )
    return _encode(whole)


def _book(book: Book) -> _Book:
    spec = book.spec
    overflow = spec.overflow
    declared = r.Declare(
        book.name,
        spec.pattern,
        spec.capacity,
        spec.strict_key,
        False,
        overflow.displace,
        overflow.expand,
        overflow.expand_for,
    )
    return _Book(
        book.id,
        book.name,
        declared,
        (book.hold.paused, book.hold.forced),
        (book.accepted, book.handled, book.expired, book.discarded),
        book.expanded_until,
    )


def _row(row: Row) -> _Row:
    return _Row(
        row.d,
        row.book.id,
        row.id,
        row.topic,
        row.priority,
        row.key,
        row.published_at,
        row.due_at,
        row.expires_at,
        row.blob,
        row.op,
        row.at,
        int(row.state),
        row.attempt,
        row.version,
        row.owner,
        row.suspect,
        row.first_failed_at,
        row.recovering,
        row.replays,
        row.delay_s,
        row.moved_at,
        row.dead,
    )


def load(fold: Fold, stored: bytes) -> None:
    """Bring an empty `fold` to the state that `dump` saw. Raises StoreCorrupt."""
    try:
        whole = _decode_whole(stored)
        fold.seq = whole.seq
        accepted, handled, expired, discarded = whole.gone
        fold.gone = Account(accepted=accepted, handled=handled, expired=expired, discarded=discarded)
        fold.next_row, fold.next_book, fold.next_dead = whole.next
        for kept in whole.books:
            fold.restore_book(_load_book(kept))
        for one in whole.owners:
            owner = Owner(one.token, one.lease_s)
            owner.number, owner.seen, owner.consuming = one.number, one.seen, set(one.consuming)
            fold.restore_owner(owner)
        fold.known = dict(whole.known)
        for kept_row in whole.rows:
            fold.restore_row(_load_row(kept_row, fold.by_id[kept_row.book]))
        for book in fold.books.values():
            book.dead = dict(sorted(book.dead.items()))  # in the order of death
        for seq, places in whole.places:
            fold.blobs.setdefault(seq, Blob()).places = places
        fold.spent = whole.spent
    except (msgspec.MsgspecError, KeyError, ValueError) as error:
        raise StoreCorrupt(f"the snapshot of the store is damaged: {type(error).__name__}: {error}") from error


def _load_book(kept: _Book) -> Book:
    book = Book(kept.id, kept.name)
    book.declared(kept.spec)
    book.hold = Hold(kept.hold[0], kept.hold[1])  # type: ignore[arg-type] # its words are the field's
    book.accepted, book.handled, book.expired, book.discarded = kept.counts
    book.expanded_until = kept.expanded_until
    return book


def _load_row(kept: _Row, book: Book) -> Row:
    sent = r.Sent(kept.id, kept.topic, "", {}, b"", kept.priority, kept.key, kept.published_at, kept.due_at)
    row = Row(kept.d, book, sent, kept.blob, kept.op, kept.at)
    row.content = None
    row.expires_at = kept.expires_at
    row.state = State(kept.state)
    row.attempt, row.version, row.owner, row.suspect = kept.attempt, kept.version, kept.owner, kept.suspect
    row.first_failed_at, row.recovering, row.replays = kept.first_failed_at, kept.recovering, kept.replays
    row.delay_s, row.moved_at, row.dead = kept.delay_s, kept.moved_at, kept.dead
    return row


# In the stream


async def read_head(link: Link, place: Place) -> tuple[int, Head | None]:
    """Where the newest head is in the stream, and what it says; 0 and None when there is none yet."""
    try:
        seq, stored = await link.last(place.stream, place.head)
    except NotFound:
        return 0, None
    try:
        return seq, _decode_head(stored)
    except msgspec.MsgspecError as error:
        raise StoreCorrupt(f"the head of the store on {link.address} is damaged: {error}") from error


async def read(link: Link, place: Place, head: Head) -> bytes | None:
    """The snapshot that `head` names; None when a newer one has taken its place meanwhile. Raises StoreCorrupt."""
    pieces = []
    try:
        for piece in range(head.pieces):
            _, stored = await link.last(place.stream, f"{place.snapshot(head.seq)}.{piece}")
            pieces.append(stored)
    except NotFound:
        return None
    whole = b"".join(pieces)
    if _digest(whole) != head.digest:
        raise StoreCorrupt(f"the snapshot of the store on {link.address} is damaged: its checksum is another")
    return whole


async def write(link: Link, place: Place, seq: int, whole: bytes, behind: int) -> None:
    """Store a snapshot, then the head that names it. Raises StoreRefused when somebody else was first."""
    size = link.max_payload - 1024
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    for number, piece in enumerate(pieces):
        await link.store(f"{place.snapshot(seq)}.{number}", piece)
    head = Head(r.VERSION, seq, len(pieces), _digest(whole))
    await link.store(place.head, _encode(head), behind=behind)


def _digest(whole: bytes) -> bytes:
    return blake2b(whole, digest_size=16).digest()
