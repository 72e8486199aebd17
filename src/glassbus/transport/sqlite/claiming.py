"""Claims: waiting consumers are given what is ready, its attempt counted in the same transaction.

A delivery that this transaction adds can be given at once: it is then written as in
flight and never as ready.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from glassbus.facts import Delivery
from glassbus.message import Priority
from glassbus.transport.sqlite.books import Fresh, Held, Queue
from glassbus.transport.sqlite.schema import FREE, KEYED, SUSPECT
from glassbus.transport.sqlite.sql import numbers, select, texts
from glassbus.transport.sqlite.transaction import Transaction

#: Claims that wait, by the name of their subscription, oldest first.
Claims = dict[str, deque[asyncio.Future[Delivery]]]

_COLUMNS = "id, key, expires_at, attempt, position"
_READY = f"""
SELECT {_COLUMNS} FROM deliveries
WHERE state = 0 AND subscription = ? AND lane = {FREE} AND priority = ? AND (position, id) > (?, ?)
ORDER BY position, id LIMIT ?
"""  # noqa: S608 - constants only, here and below
_FILLED = f"""
SELECT p.column1 FROM (VALUES (0), (1), (2), (3)) AS p WHERE EXISTS
  (SELECT 1 FROM deliveries WHERE state = 0 AND subscription = ? AND lane = {FREE} AND priority = p.column1)
"""  # noqa: S608
_SUSPECTS = f"""
SELECT {_COLUMNS} FROM deliveries
WHERE state = 0 AND subscription = ? AND lane = {SUSPECT} ORDER BY priority DESC, id LIMIT 64
"""  # noqa: S608
_IN_FLIGHT_KEYS = "SELECT DISTINCT key FROM deliveries WHERE subscription = ? AND key IN carray(?) AND state = 3"
_TRIED_KEYS = """
SELECT DISTINCT key FROM deliveries
WHERE subscription = ? AND key IN carray(?) AND (state = 2 OR (state = 0 AND attempt > 0))
"""
_WAIT_FOR_KEY = f"UPDATE deliveries SET lane = {KEYED} WHERE id IN carray(?)"  # noqa: S608
_TAKE = "UPDATE deliveries SET state = 3, lane = 0, owner = ?, attempt = attempt + 1 WHERE id IN carray(?)"

_PAGE_MIN = 4


class _Row(NamedTuple):
    """A stored delivery that is ready."""

    id: int
    key: str | None
    expires_at: float
    attempt: int
    position: int


class Lanes:
    """What one subscription has to give in this transaction, by priority: stored deliveries, then fresh ones."""

    __slots__ = ("fresh", "in_flight_keys", "last", "more", "queue", "stored", "tried_keys", "unknown")

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.unknown = queue.claimable > queue.suspects
        self.more = [self.unknown] * 4
        self.last = [(0, 0)] * 4
        self.stored: tuple[deque[_Row], ...] = (deque(), deque(), deque(), deque())
        self.fresh: tuple[deque[Fresh], ...] = (deque(), deque(), deque(), deque())
        self.in_flight_keys: dict[str, bool] = {}
        self.tried_keys: set[str] = set()


class Claiming:
    """Matches waiting claims with deliveries in one transaction."""

    def __init__(self, txn: Transaction, claims: Claims) -> None:
        self._txn = txn
        self._claims = claims
        self._lanes: dict[Queue, Lanes] = {}
        # What was given to whom, side by side; the queues to undo it if the transaction fails.
        self._claimers: list[asyncio.Future[Delivery]] = []
        self._given: list[Fresh | int] = []
        self._queues: list[Queue] = []
        self._taken: list[int] = []
        self._keyed: list[int] = []
        self._expired: list[int] = []
        self._suspect_given = False
        #: Subscriptions in which something waits behind suspects that were not to be had.
        self.look_again: set[str] = set()

    def _look_for_stored(self, lanes: Lanes) -> None:
        """Find once which priorities have stored deliveries, so that the others are not asked at each turn."""
        if lanes.unknown:
            lanes.unknown = False
            lanes.more = [False] * 4
            for (priority,) in select(self._txn.connection, _FILLED, (lanes.queue.id,)):
                lanes.more[priority] = True

    def lanes(self, queue: Queue) -> Lanes:
        """Asked for before the transaction's first change to the counts of `queue` by a publish."""
        found = self._lanes.get(queue)
        if found is None:
            found = self._lanes[queue] = Lanes(queue)
        return found

    def match(self, queue: Queue) -> bool:
        """Give what `queue` has to those who wait for it; whether anything was given."""
        waiting = self._claims.get(queue.name)
        if not waiting or queue.hold.held:
            return False
        lanes = self.lanes(queue)
        if queue.suspects or (self._txn.suspects and any(h.suspect and h.queue is queue for h in self._running())):
            return self._match_suspect(lanes, waiting)
        self._look_for_stored(lanes)
        least = Priority.NORMAL if queue.name in self._txn.books.low_held_back else Priority.LOW
        lane = self._only_lane(lanes) if least == Priority.LOW else None
        if lane is not None:
            return self._match_fresh(lanes, lane, waiting)
        given = False
        turn = queue.turn
        while waiting:
            if waiting[0].done():  # cancelled
                waiting.popleft()
                continue
            found = None
            for priority in turn.order():
                if priority < least:
                    continue
                found = self._next_stored(lanes, priority, len(waiting)) or self._next_fresh(
                    lanes, lanes.fresh[priority]
                )
                if found is not None:
                    break
            if found is None:
                break
            self._give(queue, waiting, found)
            given = True
        return given

    def _give(self, queue: Queue, waiting: deque[asyncio.Future[Delivery]], found: Fresh | _Row) -> None:
        self._claimers.append(waiting.popleft())
        self._queues.append(queue)
        queue.ready -= 1
        queue.in_flight += 1
        if isinstance(found, Fresh):
            found.state = 3
            found.attempt = 1
            found.owner = self._txn.owner
            self._given.append(found)
        else:
            self._taken.append(found.id)
            self._given.append(found.id)
            self._txn.books.dirty.add(queue)

    # The common case: nothing is stored, and what is new has one priority

    @staticmethod
    def _only_lane(lanes: Lanes) -> deque[Fresh] | None:
        """The one lane that has something to give, if nothing stored goes before it."""
        if any(lanes.more) or any(lanes.stored):
            return None
        filled = [lane for lane in lanes.fresh if lane]
        return filled[0] if len(filled) == 1 else None

    def _match_fresh(self, lanes: Lanes, lane: deque[Fresh], waiting: deque[asyncio.Future[Delivery]]) -> bool:
        queue, owner = lanes.queue, self._txn.owner
        claimers, given = self._claimers, self._given
        before = len(given)
        while waiting:
            if waiting[0].done():  # cancelled
                waiting.popleft()
                continue
            fresh = self._next_fresh(lanes, lane)
            if fresh is None:
                break
            claimers.append(waiting.popleft())
            fresh.state, fresh.attempt, fresh.owner = 3, 1, owner
            given.append(fresh)
        count = len(given) - before
        self._queues += [queue] * count
        queue.ready -= count
        queue.in_flight += count
        return count > 0

    # One priority of one subscription

    def _next_stored(self, lanes: Lanes, priority: int, wanted: int) -> _Row | None:
        rows = lanes.stored[priority]
        while rows or lanes.more[priority]:
            if not rows:
                self._read(lanes, priority, max(wanted, _PAGE_MIN))
                continue
            row = rows.popleft()
            if 0 < row.expires_at <= self._txn.wall:
                self._expired.append(row.id)
            elif row.key is not None and self._key_is_busy(lanes, row.key, row.attempt):
                self._keyed.append(row.id)
                lanes.queue.keyed += 1
                self._txn.books.dirty.add(lanes.queue)
            else:
                return row
        return None

    def _read(self, lanes: Lanes, priority: int, limit: int) -> None:
        queue = lanes.queue
        found = select(self._txn.connection, _READY, (queue.id, priority, *lanes.last[priority], limit))
        rows = [_Row(*row) for row in found]
        lanes.stored[priority].extend(rows)
        lanes.more[priority] = len(rows) == limit
        if rows:
            lanes.last[priority] = (rows[-1].position, rows[-1].id)
            self._look_up_keys(lanes, (row.key for row in rows))

    def _next_fresh(self, lanes: Lanes, fresh: deque[Fresh]) -> Fresh | None:
        while fresh:
            found = fresh.popleft()
            key = found.envelope.key
            if key is None:
                return found
            if key not in lanes.in_flight_keys:
                self._look_up_keys(lanes, [key, *(f.envelope.key for f in fresh)])
            if not self._key_is_busy(lanes, key, 0):
                return found
            found.lane = KEYED
            lanes.queue.keyed += 1
        return None

    # Keys

    def _look_up_keys(self, lanes: Lanes, keys: Iterable[str | None]) -> None:
        unknown = {key for key in keys if key is not None and key not in lanes.in_flight_keys}
        if not unknown:
            return
        queue = lanes.queue
        wanted = (queue.id, texts(unknown))
        lanes.in_flight_keys.update(dict.fromkeys(unknown, False))
        for (key,) in select(self._txn.connection, _IN_FLIGHT_KEYS, wanted):
            lanes.in_flight_keys[key] = True
        if queue.spec.strict_key:
            tried = select(self._txn.connection, _TRIED_KEYS, (queue.id, texts(unknown)))
            lanes.tried_keys.update(key for (key,) in tried)

    def _key_is_busy(self, lanes: Lanes, key: str, attempt: int) -> bool:
        """Whether a delivery of `key` must wait; if not, it has the key from here on.

        With `strict_key` one that was tried before goes before those that were not.
        """
        if lanes.in_flight_keys[key] or (attempt == 0 and key in lanes.tried_keys):
            return True
        lanes.in_flight_keys[key] = True
        return False

    # Suspects: one at a time in this process, and nothing of the same subscription beside it

    def _running(self) -> Iterable[Held]:
        """What is in flight in this process."""
        ended = set(self._txn.ended)
        return (held for id_, held in self._txn.in_flight.items() if id_ not in ended)

    def _match_suspect(self, lanes: Lanes, waiting: deque[asyncio.Future[Delivery]]) -> bool:
        queue = lanes.queue
        while waiting and waiting[0].done():
            waiting.popleft()
        if not waiting or self._suspect_given or any(h.suspect or h.queue is queue for h in self._running()):
            return False
        rows = [_Row(*row) for row in select(self._txn.connection, _SUSPECTS, (queue.id,))]
        self._look_up_keys(lanes, (row.key for row in rows))
        for row in rows:
            queue.suspects -= 1
            self._txn.books.dirty.add(queue)
            if 0 < row.expires_at <= self._txn.wall:
                queue.suspects += 1  # `expire` counts it out
                self._expired.append(row.id)
            elif row.key is not None and self._key_is_busy(lanes, row.key, row.attempt):
                queue.keyed += 1
                self._keyed.append(row.id)
            else:
                self._suspect_given = True
                self._give(queue, waiting, row)
                return True
        if rows:
            self.look_again.add(queue.name)
        return False

    # Writing

    def finish(self) -> None:
        """Write what was matched, except fresh deliveries, and prepare the answers."""
        txn = self._txn
        if self._keyed:
            txn.connection.execute(_WAIT_FOR_KEY, (numbers(self._keyed),))
        if self._expired:
            txn.expire(self._expired)
        stored: dict[int, Delivery] = {}
        if self._taken:
            txn.connection.execute(_TAKE, (txn.owner, numbers(self._taken)))
            for delivery, held in txn.deliveries(self._taken):
                stored[held.id] = delivery
                txn.claimed.append(held)
        txn.answers.claimers = self._claimers
        deliveries = txn.answers.deliveries
        for given in self._given:
            if isinstance(given, int):
                deliveries.append(stored[given])
                continue
            envelope, queue = given.envelope, given.queue
            held = Held(given.id, given.seq, queue, txn.owner, 1, envelope.key, 0, envelope.remember)
            txn.claimed.append(held)
            deliveries.append(Delivery(envelope, queue.name, given.route.destination, 1, held))

    def undo(self) -> None:
        """The transaction failed: those who were given something wait again, in their old order."""
        for queue, future in zip(reversed(self._queues), reversed(self._claimers), strict=True):
            self._claims.setdefault(queue.name, deque()).appendleft(future)
