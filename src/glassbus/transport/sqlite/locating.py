"""Where single messages are: look-ups by id, and by how an id begins. Reads only; on any connection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from glassbus.policy.delivery import State
from glassbus.transport import Located, Whereabouts
from glassbus.transport.sqlite import owners
from glassbus.transport.sqlite.books import Owner
from glassbus.transport.sqlite.schema import KEYED, REDELIVERED
from glassbus.transport.sqlite.sql import select

_MESSAGE = "SELECT seq, topic, published_at, fanout, routed, priority, key FROM messages WHERE id = ?"
_DELIVERIES = """
SELECT d.id, s.name, d.state, d.lane, d.attempt, d.due, d.expires_at, d.suspect, d.first_failed_at, d.recovering,
       d.replays, o.id, o.token, o.boot_id, o.lease_until, o.pid, x.id
FROM deliveries AS d JOIN subscriptions AS s ON s.id = d.subscription
LEFT JOIN owners AS o ON o.id = d.owner LEFT JOIN dead_letters AS x ON x.delivery = d.id
WHERE d.id BETWEEN ? AND ? ORDER BY d.id
"""
_NAMES = "SELECT id, name FROM subscriptions"
_BOOT = "SELECT value FROM meta WHERE key = 'boot_id'"
_LIKE = "SELECT id FROM messages WHERE id >= ? AND id < ? ORDER BY id LIMIT ?"


class Now(msgspec.Struct, frozen=True):
    """Both clocks at one moment, the boot that the monotonic one is of, and where owners' locks are."""

    wall: float
    monotonic: float
    boot: str
    locks: Path

    @classmethod
    def at(cls, wall: float, monotonic: float, path: str) -> Now:
        """For the store at `path`. Asks for the boot, which is a read of a file or more: not on the loop."""
        return cls(wall, monotonic, owners.boot_id(), Path(f"{path}-owners"))


def locate(connection: Any, message_id: str, now: Now) -> Whereabouts | None:
    """Where `message_id` is; None when the store holds nothing of it, and does not remember its id."""
    found = select(connection, _MESSAGE, (message_id,)) if _is_text(message_id) else []
    if not found:
        return None
    seq, topic, published_at, fanout, routed, priority, key = found[0]
    rows = select(connection, _DELIVERIES, (seq, seq + fanout - 1))
    here = select(connection, _BOOT)[0][0] == now.boot
    names: tuple[str, ...] | None = None
    if routed is not None:
        known = dict(select(connection, _NAMES))
        names = tuple(known[int(number)] for number in routed.split(",") if number and int(number) in known)
    elif len(rows) == fanout:
        names = tuple(row[1] for row in rows)
    deliveries = tuple(_located(row, now, here) for row in rows)
    return Whereabouts(message_id, topic, published_at, priority, key, fanout, names, deliveries)


def _located(row: tuple[Any, ...], now: Now, here: bool) -> Located:
    """One row of `_DELIVERIES`. `here`: the store's monotonic times are of this boot."""
    _, name, state, lane, attempt, due, expires_at, suspect, first_failed_at, recovering, replays = row[:11]
    _, token, _, _, pid, letter = row[11:]
    due_at = 0.0
    if due is not None:
        # A retry of before a restart of the machine is due at the next start of a bus.
        due_at = due if state == State.SCHEDULED else now.wall + max(0.0, due - now.monotonic) if here else now.wall
    lives = None
    if token is not None:
        owner = Owner(*row[11:15])
        lives = owner.boot_id == now.boot and owners.lost(owner, now.locks, now.boot, now.monotonic) == 0
    return Located(
        subscription=name,
        state=State(state).name.lower(),
        attempt=attempt,
        replays=replays,
        due_at=due_at,
        expires_at=expires_at,
        first_failed_at=first_failed_at,
        action=recovering.partition(":")[2] if recovering else "",
        waits_for_key=state == State.READY and lane == KEYED,
        redelivered=REDELIVERED[suspect],
        owner=f"process {pid}" if token is not None else "",
        owner_lives=lives,
        dead_letter=str(letter) if letter is not None else "",
    )


def ids_like(connection: Any, beginning: str, limit: int) -> list[str]:
    """Ids of messages in the store that begin so, at most `limit`, sorted."""
    if not _is_text(beginning):
        return []
    return [row[0] for row in select(connection, _LIKE, (beginning, f"{beginning}\U0010ffff", limit))]


def _is_text(wanted: str) -> bool:
    """Whether it can be asked for: halves of surrogate pairs, how Python reads bytes that are no UTF-8, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in wanted)
