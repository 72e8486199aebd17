"""Looking at a store without disturbing it: its own connection, short reads, any thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import apsw

from glassbus.config import Overflow
from glassbus.errors import GlassbusError, TransportError
from glassbus.policy.delivery import State
from glassbus.policy.ledger import Account, Audit, Ledger
from glassbus.policy.overflow import expanded_capacity, is_expanded
from glassbus.transport import DeadLetterFilter, DeadLetterRecord, Hold, QueueState, SubscriptionSpec, Whereabouts
from glassbus.transport.sqlite import locating
from glassbus.transport.sqlite.admin import dead_letters
from glassbus.transport.sqlite.books import overflow_of
from glassbus.transport.sqlite.schema import COUNTS, FREE, KEYED, SUSPECT
from glassbus.transport.sqlite.sql import select, value
from glassbus.transport.sqlite.store import translate

_ACCOUNTS = f"SELECT name, {', '.join(COUNTS)} FROM subscriptions ORDER BY id"  # noqa: S608 - constant names
_GONE = "SELECT accepted, handled, expired, discarded FROM gone"

# The oldest of those at the heads of the queue, by a few look-ups in the index, and of what waits for a retry.
_QUEUES = """
SELECT s.name, s.pattern, s.capacity, s.strict_key, s.displace, s.expand, s.expand_for, s.expanded_until, s.paused,
  s.forced,
  (SELECT count(*) FROM consumers AS c WHERE c.subscription = s.id),
  CASE WHEN s.ready + s.retrying = 0 THEN NULL ELSE (
    SELECT m.published_at FROM messages AS m WHERE m.seq = (
      SELECT d.message FROM deliveries AS d WHERE d.id = (
        SELECT min(first) FROM (
          SELECT (SELECT id FROM deliveries AS r WHERE r.state = 0 AND r.subscription = s.id AND r.lane = l.column1
                  AND r.priority = p.column1 ORDER BY r.position, r.id LIMIT 1) AS first
          FROM (VALUES (0), (1), (2)) AS l, (VALUES (0), (1), (2), (3)) AS p
          UNION ALL
          SELECT min(id) FROM deliveries AS w WHERE s.retrying > 0 AND w.state = 2 AND w.subscription = s.id
        )))) END,
  (SELECT min(x.died_at) FROM dead_letters AS x WHERE x.subscription = s.id)
FROM subscriptions AS s ORDER BY s.id
"""

_FIND = """
SELECT 1 FROM messages AS m JOIN deliveries AS d ON d.id BETWEEN m.seq AND m.seq + m.fanout - 1
JOIN subscriptions AS s ON s.id = d.subscription WHERE m.id = ? AND s.name = ?"""

#: What must find nothing, and what it means if it does.
_PROOFS = {
    "deliveries have lost their message": """
        SELECT count(*) FROM deliveries AS d LEFT JOIN messages AS m ON m.seq = d.message
        WHERE m.body IS NULL OR d.id NOT BETWEEN m.seq AND m.seq + m.fanout - 1""",
    "deliveries belong to no subscription": """
        SELECT count(*) FROM deliveries AS d LEFT JOIN subscriptions AS s ON s.id = d.subscription
        WHERE s.id IS NULL""",
    "messages are kept without a delivery": """
        SELECT count(*) FROM messages AS m WHERE m.body IS NOT NULL AND m.remember_until = 0 AND NOT EXISTS
          (SELECT 1 FROM deliveries AS d WHERE d.id BETWEEN m.seq AND m.seq + m.fanout - 1)""",
    "deliveries are dead-lettered without a report, or have one and are not": """
        SELECT count(*) FROM deliveries AS d LEFT JOIN dead_letters AS x ON x.delivery = d.id
        WHERE (d.state = 4) <> (x.id IS NOT NULL)""",
    "dead letters have lost their delivery": """
        SELECT count(*) FROM dead_letters AS x LEFT JOIN deliveries AS d ON d.id = x.delivery WHERE d.id IS NULL""",
    "deliveries in flight have no owner, or have one and are not": """
        SELECT count(*) FROM deliveries AS d LEFT JOIN owners AS o ON o.id = d.owner
        WHERE (d.state = 3) <> (d.owner IS NOT NULL) OR (d.state = 3 AND o.id IS NULL)""",
    "deliveries are in a state that has no rows": "SELECT count(*) FROM deliveries WHERE state > 4 OR state < 0",
    "deliveries have an id that was not given out yet": """
        SELECT count(*) FROM deliveries AS d, meta AS t WHERE t.key = 'next_id' AND d.id >= t.value""",
    "keys have more than one delivery in flight": """
        SELECT count(*) FROM (SELECT 1 FROM deliveries WHERE key IS NOT NULL AND state = 3
                              GROUP BY subscription, key HAVING count(*) > 1)""",
}


class Reader:
    """Reads on a connection of its own. Every method may be called on any thread."""

    def __init__(self, path: str, name: str, wall: Callable[[], float]) -> None:
        self._path = path
        self._wall = wall
        self._name = name
        self._lock = threading.Lock()
        self._connection: apsw.Connection | None = None

    def _connect(self) -> apsw.Connection:
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_NOFOLLOW
        connection = apsw.Connection(self._path, flags=flags)
        connection.set_busy_timeout(5000)
        for pragma, setting in (("query_only", True), ("trusted_schema", False), ("mmap_size", 0)):
            connection.pragma(pragma, setting)
        return connection

    @contextlib.contextmanager
    def _reading(self) -> Iterator[apsw.Connection]:
        """One consistent view, on the shared connection; a failed one is replaced at the next use."""
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                self._connection.execute("BEGIN")
                try:
                    yield self._connection
                finally:
                    self._connection.execute("COMMIT")
            except apsw.Error as error:
                self._drop()
                raise _read_failed(error, self._name) from error

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(apsw.Error):  # it only read
                connection.close(force=True)

    def close(self) -> None:
        with self._lock:
            self._drop()

    def ledger(self) -> Ledger:
        with self._reading() as connection:
            return _ledger(connection)

    def body_bytes(self) -> int:
        with self._reading() as connection:
            return int(value(connection, "SELECT total(length(body)) FROM messages"))

    def queues(self) -> dict[str, QueueState]:
        with self._reading() as connection:
            now = self._wall()
            return {row[0]: _queue_state(row, now) for row in select(connection, _QUEUES)}

    @contextlib.contextmanager
    def _reading_long(self) -> Iterator[apsw.Connection]:
        """One consistent view on a connection of its own, so that `ledger` need not wait for it."""
        connection: apsw.Connection | None = None
        try:
            connection = self._connect()
            connection.execute("BEGIN")
            yield connection
        except apsw.Error as error:
            raise _read_failed(error, self._name) from error
        finally:
            if connection is not None:
                connection.close(force=True)

    def dead_letters(self, wanted: DeadLetterFilter, limit: int) -> list[DeadLetterRecord]:
        with self._reading_long() as connection:
            return dead_letters(connection, wanted, limit)

    def find(self, wanted: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """Those of `wanted` (message id, subscription) that have a delivery."""
        with self._reading_long() as connection:
            found: set[tuple[str, str]] = set()
            for message_id, subscription in wanted:
                row = connection.execute(_FIND, (message_id, subscription)).fetchone()
                if row is not None:
                    found.add((message_id, subscription))
            return found

    def locate(self, message_id: str, monotonic: float) -> Whereabouts | None:
        """Where a message is, at `monotonic` seconds of this boot."""
        with self._reading_long() as connection:
            return locating.locate(connection, message_id, locating.Now.at(self._wall(), monotonic, self._path))

    def ids_like(self, beginning: str, limit: int) -> list[str]:
        with self._reading_long() as connection:
            return locating.ids_like(connection, beginning, limit)

    def audit(self) -> Audit:
        """Recount every row. Takes as long as it takes."""
        with self._reading_long() as connection:
            return _audit(connection)


def _queue_state(row: tuple[Any, ...], now: float) -> QueueState:
    """One row of `_QUEUES`."""
    name, pattern, capacity, strict_key, displace, expand, expand_for, until, paused, forced = row[:10]
    consumers, oldest_at, died_at = row[10:]
    overflow = overflow_of(Overflow(), displace, expand, expand_for)
    return QueueState(
        spec=SubscriptionSpec(name, pattern, capacity, bool(strict_key), overflow),
        hold=Hold(bool(paused), forced),
        consumers=consumers,
        oldest_at=oldest_at or 0.0,
        dead_letter_oldest_at=died_at or 0.0,
        expanded_to=expanded_capacity(capacity, overflow) if is_expanded(overflow, until, now) else 0,
        expanded_until=until,
    )


def _read_failed(error: apsw.Error, name: str) -> GlassbusError:
    failed = translate(error, name)
    return failed if isinstance(failed, TransportError) else TransportError(str(failed))


def _ledger(connection: apsw.Connection) -> Ledger:
    accounts = {name: Account(*counts) for name, *counts in select(connection, _ACCOUNTS)}
    accepted, handled, expired, discarded = select(connection, _GONE)[0]
    gone = Account(accepted=accepted, handled=handled, expired=expired, discarded=discarded)
    return Ledger(accounts, gone)


def _audit(connection: apsw.Connection) -> Audit:
    ledger = _ledger(connection)
    problems = [f"{found} {what}" for what, sql in _PROOFS.items() if (found := value(connection, sql))]
    recounted = Ledger(_recount(connection, ledger), ledger.gone)
    for name, account in ledger.accounts.items():
        counted = recounted.accounts[name]
        problems += [
            f"{name!r}: the ledger says {getattr(account, column)} {column}, the rows say {getattr(counted, column)}"
            for column in COUNTS
            if getattr(account, column) != getattr(counted, column)
        ]
        if counted.unaccounted:
            problems.append(f"{name!r}: {counted.unaccounted} deliveries are unaccounted for")
    if ledger.gone.unaccounted:
        problems.append(f"{ledger.gone.unaccounted} deliveries of forgotten subscriptions are unaccounted for")
    problems += _lanes(connection)
    damage = [str(row[0]) for row in select(connection, "PRAGMA quick_check(10)")]
    problems += [] if damage == ["ok"] else damage
    messages: int = value(connection, "SELECT count(*) FROM messages WHERE body IS NOT NULL")
    return Audit(ledger, recounted, messages, tuple(problems))


def _recount(connection: apsw.Connection, ledger: Ledger) -> dict[str, Account]:
    """The accounts with every place that has rows counted anew."""
    counted: dict[str, dict[int, int]] = {name: {} for name in ledger.accounts}
    for name, state, count in select(
        connection,
        "SELECT s.name, d.state, count(*) FROM deliveries AS d JOIN subscriptions AS s ON s.id = d.subscription "
        "GROUP BY 1, 2",
    ):
        counted[name][state] = count
    return {
        name: Account(
            accepted=account.accepted,
            ready=counted[name].get(State.READY, 0),
            scheduled=counted[name].get(State.SCHEDULED, 0),
            retrying=counted[name].get(State.RETRYING, 0),
            in_flight=counted[name].get(State.IN_FLIGHT, 0),
            handled=account.handled,
            dead_lettered=counted[name].get(State.DEAD_LETTERED, 0),
            expired=account.expired,
            discarded=account.discarded,
        )
        for name, account in ledger.accounts.items()
    }


def _lanes(connection: apsw.Connection) -> list[str]:
    """Whether the counts that steer claims are those of the rows, and nothing waits for a key that is free."""
    problems = []
    for name, keyed, suspects, keyed_rows, suspect_rows in select(
        connection,
        f"SELECT s.name, s.keyed, s.suspects, "  # noqa: S608 - constants only
        f"(SELECT count(*) FROM deliveries AS d WHERE d.state = 0 AND d.subscription = s.id AND d.lane = {KEYED}), "
        f"(SELECT count(*) FROM deliveries AS d WHERE d.state = 0 AND d.subscription = s.id AND d.lane = {SUSPECT}) "
        "FROM subscriptions AS s",
    ):
        if (keyed, suspects) != (keyed_rows, suspect_rows):
            problems.append(
                f"{name!r}: {keyed} keyed and {suspects} suspects are counted, "
                f"{keyed_rows} and {suspect_rows} are stored"
            )
    stuck = value(
        connection,
        f"SELECT count(*) FROM deliveries AS w WHERE w.key IS NOT NULL AND w.state = 0 AND w.lane = {KEYED} "  # noqa: S608
        "AND NOT EXISTS (SELECT 1 FROM deliveries AS o WHERE o.subscription = w.subscription AND o.key = w.key "
        f"AND (o.state IN (2, 3) OR (o.state = 0 AND o.lane <> {KEYED})))",
    )
    if stuck:
        problems.append(f"{stuck} deliveries wait for a key that nobody holds (lane {KEYED} instead of {FREE})")
    return problems
