"""What can be seen of the store: counts and queues at once, dead letters and audits by reading the stream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from glassbus.errors import EndpointUnreachable, TransportError
from glassbus.facts import Delivery
from glassbus.message import Envelope
from glassbus.policy.delivery import PENDING, State
from glassbus.policy.ledger import Account, Audit, Ledger
from glassbus.transport import DeadLetterFilter, DeadLetterRecord, Located, QueueState, Whereabouts
from glassbus.transport.nats import records as r
from glassbus.transport.nats import snapshot
from glassbus.transport.nats.climbing import capacity
from glassbus.transport.nats.follower import Follower
from glassbus.transport.nats.model import REDELIVERED, Dead, Row
from glassbus.transport.nats.state import Fold
from glassbus.transport.nats.view import Place

if TYPE_CHECKING:
    from glassbus.transport.nats.engine import Engine

#: How long an audit waits for the store to be read up to one and the same entry twice, in seconds.
_AUDIT_S = 60.0


def ledger(engine: Engine) -> Ledger:
    """On any thread."""
    with engine.lock:
        view = engine.view
        return Ledger({name: view.account(book) for name, book in view.fold.books.items()}, view.fold.gone)


def queues(engine: Engine, wall: float) -> dict[str, QueueState]:
    """On any thread."""
    with engine.lock:
        view = engine.view
        found = {}
        for name, book in view.fold.books.items():
            oldest_dead = next(iter(book.dead.values()), None)
            died_at = oldest_dead.dead.died_at if oldest_dead is not None and oldest_dead.dead is not None else 0.0
            found[name] = QueueState(
                spec=book.spec,
                hold=book.hold,
                consumers=len(book.consumers),
                oldest_at=view.oldest_at(book),
                dead_letter_oldest_at=died_at,
                expanded_to=room if (room := capacity(book, wall)) != book.spec.capacity else 0,
                expanded_until=book.expanded_until,
            )
        return found


# On the NATS thread


async def deliveries(engine: Engine, rows: Sequence[Row]) -> list[Delivery]:
    """What deliveries that are gone looked like."""
    envelopes = await engine.contents.envelopes(rows)
    return [_delivery(engine, row, envelope) for row, envelope in zip(rows, envelopes, strict=True)]


def _delivery(engine: Engine, row: Row, envelope: Envelope) -> Delivery:
    return Delivery(
        envelope,
        row.book.name,
        engine.view.fold.route(row.topic).destination,
        row.attempt,
        None,
        "",
        row.first_failed_at,
        row.recovering,
        row.replays,
    )


async def dead_letters(engine: Engine, wanted: DeadLetterFilter, limit: int) -> list[DeadLetterRecord]:
    """Newest first."""
    found = [
        (row, row.dead)
        for book in engine.view.fold.books.values()
        for row in book.dead.values()
        if row.dead is not None and _wanted(row, row.dead, wanted)
    ]
    found.sort(key=lambda letter: -letter[1].id)
    return await _records(engine, found[: max(0, limit)])


def _wanted(row: Row, dead: Dead, wanted: DeadLetterFilter) -> bool:
    return (
        (wanted.id is None or str(dead.id) == wanted.id)
        and (wanted.subscription is None or row.book.name == wanted.subscription)
        and (wanted.topic is None or row.topic == wanted.topic)
        and (wanted.message_id is None or row.id == wanted.message_id)
        and (wanted.category is None or dead.category == wanted.category)
        and (wanted.exception_type is None or _is_type(dead.exception_type, wanted.exception_type))
        and (wanted.fingerprint is None or dead.fingerprint == wanted.fingerprint)
        and (wanted.since is None or dead.died_at >= wanted.since)
        and (wanted.until is None or dead.died_at <= wanted.until)
        and (wanted.before is None or not wanted.before.isdigit() or dead.id < int(wanted.before))
    )


def _is_type(qualified: str, wanted: str) -> bool:
    return wanted in (qualified, qualified.rpartition(".")[2])


async def records(engine: Engine, ids: Sequence[int]) -> list[DeadLetterRecord | None]:
    """The dead letters of `ids`, in their order; None for one that there is not."""
    rows = engine.view.fold.letters(ids)
    letters = [(row, row.dead) for row in rows.values() if row.dead is not None]
    found = {int(record.id): record for record in await _records(engine, letters)}
    return [found.get(id_) for id_ in ids]


async def _records(engine: Engine, letters: Sequence[tuple[Row, Dead]]) -> list[DeadLetterRecord]:
    made = await deliveries(engine, [row for row, _ in letters])
    reports = await engine.contents.reports([(d, dead) for d, (_, dead) in zip(made, letters, strict=True)])
    return [
        DeadLetterRecord(
            id=str(dead.id),
            envelope=delivery.envelope,
            subscription=delivery.subscription,
            destination=delivery.destination,
            attempts=delivery.attempt,
            report=report,
            reason=dead.reason,
            died_at=dead.died_at,
            first_failed_at=delivery.first_failed_at,
            replays=delivery.replays,
        )
        for delivery, (_, dead), report in zip(made, letters, reports, strict=True)
    ]


def locate(engine: Engine, message_id: str) -> Whereabouts | None:
    """Where a message is. Looks at every delivery, which is in memory. On any thread."""
    with engine.lock:
        fold = engine.view.fold
        rows = [row for row in fold.rows.values() if row.id == message_id]
        known = fold.known.get(message_id)
        routed = fold.names(known.routed) if known is not None else None
        if not rows:
            return None
        first = rows[0]
        made = tuple(_located(row) for row in rows)
        fanout = len(known.routed) if known is not None else 0
        return Whereabouts(message_id, first.topic, first.published_at, first.priority, first.key, fanout, routed, made)


def _located(row: Row) -> Located:
    state = _where(row)
    due = {"scheduled": row.due_at, "retrying": row.moved_at + row.delay_s}
    return Located(
        row.book.name,
        state,
        row.attempt,
        row.replays,
        due.get(state, 0.0),
        row.expires_at,
        row.first_failed_at,
        row.recovering[1] if row.recovering is not None else "",
        row.place == Place.KEYED,
        REDELIVERED[row.suspect],
        f"owner {row.owner}" if row.owner else "",
        None,
        str(row.dead.id) if row.dead is not None else "",
    )


def ids_like(engine: Engine, beginning: str, limit: int) -> list[str]:
    """On any thread."""
    with engine.lock:
        return sorted({row.id for row in engine.view.fold.rows.values() if row.id.startswith(beginning)})[:limit]


# Auditing


async def audit(engine: Engine) -> Audit:
    """Read the stream anew, and compare what comes of it with what this process has in memory."""
    link = engine.need_link()
    fold = Fold()
    _, head = await snapshot.read_head(link, engine.place)
    if head is not None and (whole := await snapshot.read(link, engine.place, head)) is not None:
        snapshot.load(fold, whole)
    met = asyncio.Event()
    verdict: list[Audit] = []
    failures: list[Exception] = []

    def compare() -> None:
        if not verdict and fold.seq == engine.view.fold.seq:
            verdict.append(_compared(engine, fold))
            met.set()

    def on_entry(seq: int, stored: bytes) -> None:
        fold.apply(r.decode(stored, f"entry {seq} of the store"), seq)
        compare()

    def on_failed(error: Exception) -> None:
        failures.append(error)
        met.set()

    follower = Follower(link, engine.place.stream, engine.place.entries, fold.seq, on_entry, on_failed)
    try:
        async with asyncio.timeout(_AUDIT_S):
            await follower.catch_up()
            compare()
            await met.wait()
    except TimeoutError:
        raise EndpointUnreachable(f"the store could not be read within {_AUDIT_S:.0f} s") from None
    finally:
        await follower.close()
        await follower.release()
    if failures:
        failure = failures[0]
        raise failure if isinstance(failure, TransportError) else TransportError(str(failure))
    return verdict[0]


def _compared(engine: Engine, fold: Fold) -> Audit:
    """Counts against rows, and memory against stream, at one and the same entry."""
    view = engine.view
    problems: list[str] = []
    counted = ledger(engine)
    recounted: dict[str, Account] = {}
    places: dict[str, dict[str, int]] = {name: dict.fromkeys(_WHERE.values(), 0) for name in view.fold.books}
    for row in view.fold.rows.values():
        places[row.book.name][_where(row)] += 1
        other = fold.rows.get(row.d)
        if other is None or (other.state, other.attempt, other.version, other.owner) != (
            row.state,
            row.attempt,
            row.version,
            row.owner,
        ):
            problems.append(f"delivery {row.d} of {row.book.name!r} is otherwise in the stream than in memory")
    problems += [f"delivery {d} is in the stream and not in memory" for d in fold.rows.keys() - view.fold.rows.keys()]
    for name, account in counted.accounts.items():
        other_book = fold.books.get(name)
        if other_book is None:
            problems.append(f"subscription {name!r} is in memory and not in the stream")
            continue
        recounted[name] = Account(
            accepted=other_book.accepted,
            handled=other_book.handled,
            expired=other_book.expired,
            discarded=other_book.discarded,
            **places[name],
        )
        if recounted[name] != account:
            problems.append(f"the counts of {name!r} say {account}, its deliveries {recounted[name]}")
        if account.unaccounted:
            problems.append(f"{account.unaccounted} deliveries of {name!r} are unaccounted for")
    if fold.gone != view.fold.gone:
        problems.append(f"forgotten subscriptions left {fold.gone} in the stream and {view.fold.gone} in memory")
    in_flight = {d for owner in view.fold.owners.values() for d in owner.rows}
    lost = [row.d for row in view.fold.rows.values() if row.state is State.IN_FLIGHT and row.d not in in_flight]
    problems += [f"delivery {d} is in flight and nobody has it" for d in lost]
    messages = len({row.id for row in view.fold.rows.values()})
    return Audit(counted, Ledger(recounted, fold.gone), messages, tuple(problems[:100]))


_WHERE = {
    State.READY: "ready",
    State.SCHEDULED: "scheduled",
    State.RETRYING: "retrying",
    State.IN_FLIGHT: "in_flight",
    State.DEAD_LETTERED: "dead_lettered",
}


def _where(row: Row) -> str:
    """The place in the ledger, as this process's clock has it: what is due is ready."""
    if row.state in PENDING and row.place not in (Place.SCHEDULED, Place.RETRYING):
        return "ready"
    return _WHERE[row.state]
