"""What becomes due by itself: retries, delayed publishes, expiry, leases, dead owners, old ids."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Literal

import apsw

from glassbus.facts import OwnerLost
from glassbus.policy.delivery import State
from glassbus.transport.sqlite.books import Owner
from glassbus.transport.sqlite.publishing import DUPLICATE_WINDOW_S
from glassbus.transport.sqlite.schema import FREE, KEYED, SUSPECT
from glassbus.transport.sqlite.sql import numbers, select, value
from glassbus.transport.sqlite.transaction import Transaction

_EXPIRE_AT_ONCE = 1000
_FORGET_AT_ONCE = 5000

_DUE = "SELECT subscription, count(*) FROM deliveries WHERE state = ? AND due <= ? GROUP BY subscription"
# To the back of the queue: in an outage the probes then go round, and no message spends its attempts alone.
_TRY_AGAIN = "UPDATE deliveries SET state = 0, due = NULL, position = ? WHERE state = 2 AND due <= ?"
_MAKE_READY = "UPDATE deliveries SET state = 0, due = NULL WHERE state = 1 AND due <= ?"
_NEXT = """
SELECT (SELECT min(due) FROM deliveries WHERE state = 2 AND due IS NOT NULL),
       (SELECT min(due) FROM deliveries WHERE state = 1 AND due IS NOT NULL),
       (SELECT min(expires_at) FROM deliveries WHERE expires_at > 0 AND state < 3)
"""
_OVERDUE = (
    "SELECT id FROM deliveries WHERE expires_at > 0 AND expires_at <= ? AND state < 3 ORDER BY expires_at LIMIT ?"
)
_TAKE_BACK = f"""
UPDATE deliveries SET state = 0, lane = {SUSPECT}, suspect = ?, owner = NULL WHERE owner = ? AND state = 3
"""  # noqa: S608 - constants only
_OVER = "SELECT seq FROM messages WHERE remember_until > 0 AND remember_until <= ? LIMIT ?"
_FORGET = """
DELETE FROM messages AS m WHERE seq IN carray(?)
  AND NOT EXISTS (SELECT 1 FROM deliveries AS d WHERE d.id BETWEEN m.seq AND m.seq + m.fanout - 1)
"""


def next_due(txn: Transaction) -> tuple[float, float, float]:
    """When the next retry (monotonic), delayed publish and expiry (wall) are due; infinity for none."""
    retry, scheduled, expiry = select(txn.connection, _NEXT)[0]
    never = float("inf")
    return (
        never if retry is None else retry,
        never if scheduled is None else scheduled,
        never if expiry is None else expiry,
    )


def promote(txn: Transaction) -> None:
    """Make ready what is due."""
    for state, now in ((State.RETRYING, txn.monotonic), (State.SCHEDULED, txn.wall)):
        due = select(txn.connection, _DUE, (int(state), now))
        for subscription, count in due:
            queue = txn.books.by_id[subscription]
            if state is State.RETRYING:
                queue.retrying -= count
            else:
                queue.scheduled -= count
            queue.ready += count
            txn.books.dirty.add(queue)
        if due and state is State.RETRYING:
            txn.connection.execute(_TRY_AGAIN, (txn.books.next_id, now))
        elif due:
            txn.connection.execute(_MAKE_READY, (now,))


def expire_overdue(txn: Transaction) -> bool:
    """Settle what waited past its `expires_in`; whether there may be more."""
    ids = [row[0] for row in select(txn.connection, _OVERDUE, (txn.wall, _EXPIRE_AT_ONCE))]
    if ids:
        txn.expire(ids)
    return len(ids) == _EXPIRE_AT_ONCE


def forget_old_ids(txn: Transaction) -> bool:
    """Let go of ids whose time is over; whether there may be more."""
    seqs = [row[0] for row in select(txn.connection, _OVER, (txn.wall, _FORGET_AT_ONCE))]
    if seqs:
        txn.connection.execute(_FORGET, (numbers(seqs),))
        # Those still stored go with their last delivery, and are not looked at again here.
        txn.connection.execute("UPDATE messages SET remember_until = 0 WHERE seq IN carray(?)", (numbers(seqs),))
    return len(seqs) == _FORGET_AT_ONCE


# Owners


def register(txn: Transaction, token: str, boot: str, lease_until: float) -> int:
    """Enter this process; its id."""
    txn.connection.execute(
        "INSERT INTO owners (token, boot_id, pid, lease_until) VALUES (?, ?, ?, ?)",
        (token, boot, os.getpid(), lease_until),
    )
    owner = txn.connection.last_insert_rowid()
    txn.books.owners[owner] = Owner(owner, token, boot, lease_until)
    return owner


def renew(txn: Transaction, owner: int, lease_until: float) -> None:
    txn.connection.execute("UPDATE owners SET lease_until = ? WHERE id = ?", (lease_until, owner))


def consume(txn: Transaction, owner: int, names: Iterable[str]) -> None:
    """Enter `owner` as a consumer of each subscription that still exists."""
    for name in names:
        queue = txn.books.queues.get(name)
        if queue is None:
            continue
        txn.connection.execute("INSERT OR IGNORE INTO consumers VALUES (?, ?)", (queue.id, owner))
        queue.consumers += txn.connection.changes()


def expel(txn: Transaction, owner: Owner, why: int) -> None:
    """Take back what a lost owner had in flight, its attempts charged: each is a suspect now."""
    count = release(txn, owner.id, why)
    # A commit that failed under it may have survived it: its publishers retry with the same ids.
    txn.connection.execute(
        "UPDATE meta SET value = CASE key WHEN 'watermark' THEN ?1 ELSE ?2 END "
        "WHERE key IN ('watermark', 'watermark_until')",
        (txn.books.next_id - 1, txn.wall + DUPLICATE_WINDOW_S),
    )
    txn.books.watermark, txn.books.watermark_until = txn.books.next_id - 1, txn.wall + DUPLICATE_WINDOW_S
    reason: Literal["owner_died", "lease_expired"] = "owner_died" if why == 1 else "lease_expired"
    txn.answers.facts.append(OwnerLost(at=txn.wall, owner=owner.token, deliveries=count, reason=reason))


def release(txn: Transaction, owner: int, why: int) -> int:
    """Put back what `owner` has in flight and strike it off; how many. `why` 0: uncharged."""
    connection, books = txn.connection, txn.books
    found = select(
        connection,
        "SELECT subscription, count(*) FROM deliveries WHERE owner = ? AND state = 3 GROUP BY subscription",
        (owner,),
    )
    if why:
        connection.execute(_TAKE_BACK, (why, owner))
    else:
        give_back(
            txn,
            [row[0] for row in select(connection, "SELECT id FROM deliveries WHERE owner = ? AND state = 3", (owner,))],
        )
    total = 0
    for subscription, count in found:
        queue = books.by_id[subscription]
        if why:
            queue.in_flight -= count
            queue.ready += count
            queue.suspects += count
        books.dirty.add(queue)
        total += count
    for (subscription,) in select(connection, "SELECT subscription FROM consumers WHERE owner = ?", (owner,)):
        if subscription in books.by_id:
            books.by_id[subscription].consumers -= 1
    connection.execute("DELETE FROM consumers WHERE owner = ?", (owner,))
    connection.execute("DELETE FROM owners WHERE id = ?", (owner,))
    books.owners.pop(owner, None)
    if total:
        txn.expiry_at = txn.wall  # some of it may have expired meanwhile
    return total


def give_back(txn: Transaction, ids: Sequence[int]) -> None:
    """Return deliveries in flight to their queues uncharged."""
    if not ids:
        return
    wanted = numbers(ids)
    for subscription, count, suspects in select(
        txn.connection,
        "SELECT subscription, count(*), sum(suspect > 0) FROM deliveries WHERE id IN carray(?) GROUP BY subscription",
        (wanted,),
    ):
        queue = txn.books.by_id[subscription]
        queue.in_flight -= count
        queue.ready += count
        queue.suspects += suspects
        txn.books.dirty.add(queue)
    txn.connection.execute(
        f"UPDATE deliveries SET state = 0, lane = iif(suspect > 0, {SUSPECT}, {FREE}), owner = NULL, "  # noqa: S608
        "attempt = attempt - 1 WHERE id IN carray(?)",
        (wanted,),
    )


def reconcile(txn: Transaction) -> None:
    """After a commit of unknown outcome: what is in flight for us and was never handed out goes back uncharged."""
    rows = select(txn.connection, "SELECT id FROM deliveries WHERE owner = ? AND state = 3", (txn.owner,))
    give_back(txn, [row[0] for row in rows if row[0] not in txn.in_flight])


def heal(txn: Transaction) -> None:
    """On opening: what waits for a key that nobody holds may be claimed again."""
    held = select(
        txn.connection,
        f"SELECT DISTINCT subscription, key FROM deliveries AS w WHERE state = 0 AND lane = {KEYED} AND NOT EXISTS "  # noqa: S608
        "(SELECT 1 FROM deliveries AS o WHERE o.subscription = w.subscription AND o.key = w.key AND o.state IN (2, 3))",
    )
    txn.free_keys([(txn.books.by_id[subscription], key) for subscription, key in held])


def new_boot(txn: Transaction, boot: str) -> None:
    """The machine was restarted: monotonic due times mean nothing any more, so retries are due now."""
    stored = value(txn.connection, "SELECT value FROM meta WHERE key = 'boot_id'")
    if stored == boot:
        return
    txn.connection.execute("UPDATE deliveries SET due = -1e300 WHERE state = 2")
    txn.connection.execute("UPDATE meta SET value = ? WHERE key = 'boot_id'", (boot,))
    promote(txn)


def has_old_ids(connection: apsw.Connection, wall: float) -> bool:
    """Whether there are remembered ids whose time is over."""
    oldest = value(connection, "SELECT min(remember_until) FROM messages WHERE remember_until > 0")
    return oldest is not None and oldest <= wall
