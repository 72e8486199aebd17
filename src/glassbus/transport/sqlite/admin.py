"""What operators and programs do to subscriptions and dead letters, each inside one transaction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from glassbus.errors import UnknownDeadLetter
from glassbus.facts import DeliveryDiscarded
from glassbus.policy.delivery import State
from glassbus.policy.routing import destination
from glassbus.transport import DeadLetterFilter, DeadLetterRecord, Forced, Hold, SubscriptionSpec
from glassbus.transport.reports import decode_report
from glassbus.transport.sqlite import upkeep
from glassbus.transport.sqlite.sql import numbers, select
from glassbus.transport.sqlite.transaction import Transaction, envelope_of

#: At most so many deliveries of a forgotten subscription have a fact each; its count tells of all.
FORGOTTEN_FACTS_MAX = 10_000

_DEAD = """
SELECT d.id, d.attempt, d.first_failed_at, d.recovering, d.replays, d.suspect, d.expires_at, d.subscription,
       m.id, m.topic, m.body, m.codec, m.headers, m.priority, m.key, m.published_at, m.due_at, m.remember_until, m.seq,
       x.id, x.report, x.reason, x.died_at, s.name
FROM dead_letters AS x
JOIN deliveries AS d ON d.id = x.delivery
JOIN messages AS m ON m.seq = d.message
JOIN subscriptions AS s ON s.id = x.subscription
WHERE """


def declare(txn: Transaction, spec: SubscriptionSpec, *, consume: bool) -> Hold:
    """Create or update a subscription, and consume from it if asked to."""
    books, connection = txn.books, txn.connection
    queue = books.queues.get(spec.name)
    if queue is None:
        connection.execute(
            "INSERT INTO subscriptions (name, pattern, capacity, strict_key, displace, expand, expand_for) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (spec.name, *_columns(spec)),
        )
        books.restructured(connection)
    elif queue.spec != spec:
        connection.execute(
            "UPDATE subscriptions SET pattern = ?, capacity = ?, strict_key = ?, displace = ?, expand = ?, "
            "expand_for = ? WHERE id = ?",
            (*_columns(spec), queue.id),
        )
        books.restructured(connection)
    if consume:
        upkeep.consume(txn, txn.owner, [spec.name])
    txn.made_room = True
    return books.need(spec.name).hold


def _columns(spec: SubscriptionSpec) -> tuple[str | float, ...]:
    overflow = spec.overflow
    return (
        spec.pattern,
        spec.capacity,
        spec.strict_key,
        overflow.displace,
        float(overflow.expand),
        float(overflow.expand_for),
    )


def set_hold(txn: Transaction, name: str, paused: bool | None, forced: Forced | None) -> Hold:
    """Merged in the transaction, so that two processes cannot undo each other's part."""
    queue = txn.books.need(name)
    before = queue.hold
    hold = before.changed(paused, forced)
    txn.connection.execute(
        "UPDATE subscriptions SET paused = ?, forced = ? WHERE id = ?", (hold.paused, hold.forced, queue.id)
    )
    txn.books.restructured(txn.connection)
    txn.books.changed_holds[name] = hold
    return before


def forget(txn: Transaction, name: str) -> int:
    """Remove a subscription with all it holds; how many deliveries were discarded."""
    books, connection = txn.books, txn.connection
    queue = books.need(name)
    rows = select(connection, "SELECT id, message, state FROM deliveries WHERE subscription = ?", (queue.id,))
    told = [row[0] for row in rows if row[2] != State.DEAD_LETTERED][:FORGOTTEN_FACTS_MAX]
    for delivery, _ in txn.deliveries(told):
        txn.answers.facts.append(DeliveryDiscarded(at=txn.wall, delivery=delivery, reason="forgotten"))
    connection.execute(
        "UPDATE gone SET accepted = accepted + ?, handled = handled + ?, expired = expired + ?, "
        "discarded = discarded + ?",
        (queue.accepted, queue.handled, queue.expired, queue.discarded + len(rows)),
    )
    connection.execute("DELETE FROM dead_letters WHERE subscription = ?", (queue.id,))
    connection.execute("DELETE FROM deliveries WHERE subscription = ?", (queue.id,))
    connection.execute("DELETE FROM consumers WHERE subscription = ?", (queue.id,))
    connection.execute("DELETE FROM subscriptions WHERE id = ?", (queue.id,))
    txn.drop_messages([row[1] for row in rows], remembered=True)
    books.dirty.discard(queue)
    txn.ended.extend(held.id for held in txn.in_flight.values() if held.queue is queue)
    books.restructured(connection)
    return len(rows)


# Dead letters


def dead_letters(connection: Any, wanted: DeadLetterFilter, limit: int) -> list[DeadLetterRecord]:
    """Newest first. Reads only; on any connection."""
    conditions = {
        "s.name = ?": wanted.subscription,
        "m.topic = ?": wanted.topic,
        "m.id = ?": wanted.message_id,
        "x.category = ?": wanted.category,
        "instr('.' || x.exception_type || '|', '.' || ? || '|') > 0": wanted.exception_type,  # whole, or its last part
        "x.fingerprint = ?": wanted.fingerprint,
        "x.died_at >= ?": wanted.since,
        "x.died_at <= ?": wanted.until,
        "x.id = ?": None if wanted.id is None else _number(wanted.id),
        "x.id < ?": None if wanted.before is None else _number(wanted.before),
    }
    used = {condition: value for condition, value in conditions.items() if value is not None}
    sql = _DEAD + (" AND ".join(used) or "TRUE") + " ORDER BY x.id DESC LIMIT ?"
    return list(_records(connection, sql, (*used.values(), limit)))


def _records(connection: Any, sql: str, values: Sequence[Any]) -> Iterator[DeadLetterRecord]:
    patterns = select(connection, "SELECT name, pattern FROM subscriptions ORDER BY id")
    for row in select(connection, sql, values):
        letter, report, reason, died_at, name = row[19:]
        envelope = envelope_of(row[:19])
        yield DeadLetterRecord(
            id=str(letter),
            envelope=envelope,
            subscription=name,
            destination=destination(envelope.topic, (pattern for _, pattern in patterns)),
            attempts=row[1],
            report=decode_report(report),
            reason=reason,
            died_at=died_at,
            first_failed_at=row[2],
            replays=row[4],
        )


def _number(letter: str) -> int:
    """The row that a dead letter's id names; -1 for what was never an id."""
    return int(letter) if letter.isascii() and letter.isdigit() and len(letter) <= 18 else -1


def _dig_up(txn: Transaction, ids: Sequence[str]) -> list[tuple[DeadLetterRecord, int, int, int]]:
    """The dead letters of `ids` with delivery, message and subscription. Raises UnknownDeadLetter if one is missing."""
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        return []
    numbered = numbers([_number(letter) for letter in wanted])
    found = {r.id: r for r in _records(txn.connection, _DEAD + "x.id IN carray(?)", (numbered,))}
    unknown = [letter for letter in wanted if letter not in found]
    if unknown:
        raise UnknownDeadLetter(f"no dead letter {', '.join(map(repr, unknown))}")
    places = {
        str(row[0]): row[1:]
        for row in select(
            txn.connection,
            "SELECT x.id, x.delivery, d.message, d.subscription FROM dead_letters AS x "
            "JOIN deliveries AS d ON d.id = x.delivery WHERE x.id IN carray(?)",
            (numbered,),
        )
    }
    return [(found[letter], *places[letter]) for letter in wanted]


def replay(txn: Transaction, ids: Sequence[str]) -> list[DeadLetterRecord]:
    """Back to ready: no attempt counted, one replay more, and never expired again."""
    moved = _dig_up(txn, ids)
    for _, _, _, subscription in moved:
        queue = txn.books.by_id[subscription]
        queue.dead_lettered -= 1
        queue.ready += 1
        txn.books.dirty.add(queue)
    if moved:
        deliveries = numbers([delivery for _, delivery, _, _ in moved])
        txn.connection.execute(
            "UPDATE deliveries SET state = 0, lane = 0, attempt = 0, replays = replays + 1, first_failed_at = 0, "
            "recovering = NULL, expires_at = 0, suspect = 0 WHERE id IN carray(?)",
            (deliveries,),
        )
        txn.connection.execute("DELETE FROM dead_letters WHERE delivery IN carray(?)", (deliveries,))
    return [record for record, _, _, _ in moved]


def discard(txn: Transaction, ids: Sequence[str]) -> list[DeadLetterRecord]:
    """Remove for good."""
    removed = _dig_up(txn, ids)
    for _, _, _, subscription in removed:
        queue = txn.books.by_id[subscription]
        queue.dead_lettered -= 1
        queue.discarded += 1
        txn.books.dirty.add(queue)
    if removed:
        deliveries = numbers([delivery for _, delivery, _, _ in removed])
        txn.connection.execute("DELETE FROM dead_letters WHERE delivery IN carray(?)", (deliveries,))
        txn.connection.execute("DELETE FROM deliveries WHERE id IN carray(?)", (deliveries,))
        txn.drop_messages([message for _, _, message, _ in removed], remembered=True)
    return [record for record, _, _, _ in removed]


def probe(txn: Transaction) -> None:
    txn.connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'probe'")
