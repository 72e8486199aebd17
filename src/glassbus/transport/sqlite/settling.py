"""Settlements: each delivery leaves flight for where the worker decided."""

from __future__ import annotations

from collections.abc import Sequence

from glassbus.errors import ErrorReport
from glassbus.policy.delivery import State
from glassbus.transport.reports import encode_report
from glassbus.transport.sqlite.books import Held, Queue
from glassbus.transport.sqlite.requests import Settlement
from glassbus.transport.sqlite.schema import FREE, SUSPECT
from glassbus.transport.sqlite.sql import numbers
from glassbus.transport.sqlite.transaction import Transaction, VanishedError, recovering_text

_MOVE = """
UPDATE deliveries SET state = ?, lane = ?, attempt = ?, owner = NULL, due = ?, suspect = ?, first_failed_at = ?,
                      recovering = ?
WHERE id = ? AND owner = ? AND state = 3
"""
_END = "DELETE FROM deliveries WHERE id IN carray(?) AND owner = ? AND state = 3"
_OURS = "SELECT id FROM deliveries WHERE id IN carray(?) AND owner = ? AND state = 3"
_DEAD_LETTER = """
INSERT INTO dead_letters (delivery, subscription, category, exception_type, fingerprint, reason, died_at, report)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""


class Settling:
    """Applies a batch of settlements in one transaction.

    A settlement is taken only from the owner that has the delivery in flight. An owner
    learns at the start of a transaction that it was expelled, and then has nothing in
    flight; whatever else moved a row shows as a wrong count of changes, and the
    transaction is done again, looking at each row first (`careful`).
    """

    def __init__(self, txn: Transaction) -> None:
        self._txn = txn
        self._gone: set[int] = set()
        self._done: set[int] = set()
        self._ids: list[int] = []
        self._seqs: list[int] = []
        self._keys: set[tuple[Queue, str]] = set()
        self._remembered = False

    def settle(self, settlements: Sequence[Settlement]) -> None:
        txn = self._txn
        if txn.careful:
            self._look(settlements)
        in_flight, done = txn.in_flight, self._done
        recorded, refused = txn.answers.recorded, txn.answers.refused
        dirty = txn.books.dirty
        for settlement in settlements:
            held: Held = settlement.delivery.handle
            id_ = held.id
            if in_flight.get(id_) is not held or id_ in done:
                refused.append(settlement)
                continue
            done.add(id_)
            if id_ in self._gone:
                # Only we can have moved a row of ours while we are registered, or a `forget`.
                (recorded if settlement.uncertain else refused).append(settlement)
                continue
            queue = held.queue
            dirty.add(queue)
            queue.in_flight -= 1
            if settlement.decision.state is State.HANDLED:
                queue.handled += 1
                self._ids.append(id_)
                self._seqs.append(held.seq)
                if held.remember:
                    self._remembered = True
                if held.key is not None:
                    self._keys.add((queue, held.key))
            else:
                self._otherwise(settlement, held, queue)
            recorded.append(settlement)
        self._write()
        txn.ended.extend(done)

    def _look(self, settlements: Sequence[Settlement]) -> None:
        txn = self._txn
        ids = {s.delivery.handle.id for s in settlements}
        ours = {row[0] for row in txn.connection.execute(_OURS, (numbers(ids), txn.owner))} if ids else set()
        self._gone = ids - ours

    def _otherwise(self, settlement: Settlement, held: Held, queue: Queue) -> None:
        """Any end of an attempt but success. `ends`: the key's next delivery may go before this one's next attempt."""
        decision = settlement.decision
        ends = True
        match decision.state:
            case State.EXPIRED:
                queue.expired += 1
                self._end(held)
            case State.DISCARDED:
                queue.discarded += 1
                self._end(held)
            case State.DEAD_LETTERED:
                queue.dead_lettered += 1
                self._move(settlement, held, FREE, None, 0)
                self._dead_letter(settlement, held)
            case State.READY:
                # One whose attempt we took back has not ended it: still a suspect, if it was.
                suspect = held.suspect if decision.attempt < held.attempt else 0
                queue.ready += 1
                queue.suspects += bool(suspect)
                self._move(settlement, held, SUSPECT if suspect else FREE, None, suspect)
                ends = False
            case State.RETRYING:
                queue.retrying += 1
                due = self._txn.monotonic + max(0.0, decision.delay_s)
                self._txn.retry_at = min(self._txn.retry_at, due)
                self._move(settlement, held, FREE, due, 0)
                ends = not queue.spec.strict_key
            case _:
                raise AssertionError(f"a delivery in flight cannot become {decision.state!r}")
        if held.key is not None and ends:
            self._keys.add((queue, held.key))

    def _end(self, held: Held) -> None:
        self._ids.append(held.id)
        self._seqs.append(held.seq)
        self._remembered = self._remembered or held.remember
        self._txn.made_room = True

    def _move(self, settlement: Settlement, held: Held, lane: int, due: float | None, suspect: int) -> None:
        decision = settlement.decision
        values = (
            int(decision.state),
            lane,
            decision.attempt,
            due,
            suspect,
            decision.first_failed_at,
            recovering_text(decision.recovering),
            held.id,
            held.owner,
        )
        self._txn.connection.execute(_MOVE, values)
        if self._txn.connection.changes() != 1:
            raise VanishedError

    def _dead_letter(self, settlement: Settlement, held: Held) -> None:
        report = settlement.decision.report
        assert report is not None, "a dead letter needs its report"
        insert_dead_letter(self._txn, held.id, held.queue, settlement.decision.reason, report)

    def _write(self) -> None:
        txn = self._txn
        if self._ids:
            txn.connection.execute(_END, (numbers(self._ids), txn.owner))
            if txn.connection.changes() != len(self._ids):
                raise VanishedError
            txn.drop_messages(self._seqs, remembered=self._remembered)
        if self._keys:
            txn.free_keys(self._keys)


def insert_dead_letter(txn: Transaction, delivery: int, queue: Queue, reason: str, report: ErrorReport) -> None:
    """The report that goes with a delivery in state DEAD_LETTERED."""
    values = (
        delivery,
        queue.id,
        str(report.category),
        report.exception_type,
        report.fingerprint,
        reason,
        txn.wall,
        encode_report(report).decode(),
    )
    txn.connection.execute(_DEAD_LETTER, values)
