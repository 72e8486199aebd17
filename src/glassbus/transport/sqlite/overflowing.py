"""Full queues: which deliveries give way, how a queue grows and shrinks again. In the transaction of the publish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from glassbus.errors import ErrorReport
from glassbus.facts import Delivery, DeliveryDeadLettered, OverflowHandled
from glassbus.policy.overflow import (
    Rung,
    Step,
    capacity_now,
    climb,
    contracts,
    displaced_report,
    left_out,
    may_grow_to,
    unconsumed_report,
)
from glassbus.transport.sqlite.books import Queue
from glassbus.transport.sqlite.schema import FREE, KEYED, SUSPECT
from glassbus.transport.sqlite.settling import insert_dead_letter
from glassbus.transport.sqlite.sql import numbers, select
from glassbus.transport.sqlite.transaction import Transaction, leave

# With strict_key a delivery that was tried stays, because it holds its key.
_ABLE = "NOT (? AND key IS NOT NULL AND attempt > 0)"
_READY_BACK = f"""
SELECT id FROM deliveries WHERE state = 0 AND subscription = ? AND lane = ? AND priority = ? AND {_ABLE}
ORDER BY position DESC, id DESC LIMIT ?
"""  # noqa: S608 - constants only
_TIMED_BACK = f"""
SELECT id FROM deliveries WHERE state IN (1, 2) AND subscription = ? AND priority = ? AND {_ABLE}
ORDER BY id DESC LIMIT ?
"""  # noqa: S608
_PLACES = "SELECT id, state, lane FROM deliveries WHERE id IN carray(?)"
_BURY = f"""
UPDATE deliveries SET state = 4, lane = {FREE}, due = NULL, suspect = 0 WHERE id IN carray(?) AND state < 3
"""  # noqa: S608
_EXPANDED = "UPDATE subscriptions SET expanded_until = ? WHERE id = ?"


class Able(NamedTuple):
    """A stored delivery that can give way."""

    id: int
    priority: int


class Plan(NamedTuple):
    """What one publish leads to in one queue."""

    queue: Queue
    incoming: Sequence[int]  # priorities
    step: Step
    victims: list[Able]

    @property
    def left_out(self) -> set[int]:
        """Which of the incoming are dead-lettered instead, by their place among them."""
        return left_out(self.incoming, self.step.leave_out)


def plan(txn: Transaction, queue: Queue, priorities: Sequence[int], *, may_grow: bool) -> Plan:
    """What to do for a publish that need not, or may not, wait for `queue` any longer. Changes nothing."""
    overflow = queue.spec.overflow
    full = queue.pending + len(priorities) > queue.capacity
    able = _last_in_line(txn, queue, max(priorities), len(priorities)) if overflow.displace and full else []
    step = climb(
        pending=queue.pending,
        incoming=priorities,
        capacity=queue.capacity,
        expanded=may_grow_to(queue.spec.capacity, overflow, queue.expanded_until, allowed=may_grow),
        consumed=queue.consumers > 0,
        lower=[victim.priority for victim in able],
    )
    return Plan(queue, priorities, step, able[: step.displace])


def _last_in_line(txn: Transaction, queue: Queue, below: int, wanted: int) -> list[Able]:
    """Stored pending deliveries of priorities under `below` that can give way, the lowest first.

    Of one priority the last in line goes first, mostly the newest: what has waited longest is kept, and of a key the
    earlier messages. What waits for a retry or for its time comes after what is ready.
    """
    found: list[Able] = []
    strict = queue.spec.strict_key
    for priority in range(below):
        left = wanted - len(found)
        if not left:
            break
        ids: list[int] = []
        for lane in (FREE, KEYED, SUSPECT) if queue.ready else ():
            ids += _ids(txn, _READY_BACK, (queue.id, lane, priority, strict, left))
        ids = sorted(ids, reverse=True)[:left]
        if len(ids) < left and (queue.scheduled or queue.retrying):
            ids += _ids(txn, _TIMED_BACK, (queue.id, priority, strict, left - len(ids)))
        found += [Able(id_, priority) for id_ in ids]
    return found


def _ids(txn: Transaction, sql: str, values: tuple[int, ...]) -> list[int]:
    return [row[0] for row in select(txn.connection, sql, values)]


def make_room(txn: Transaction, plan: Plan) -> None:
    """Displace and expand as `plan` says."""
    queue = plan.queue
    if plan.step.rung is Rung.EXPAND:
        _set_expanded(txn, queue, txn.wall + queue.spec.overflow.expand_for)
        state(txn, queue, "expand")
    if plan.victims:
        _displace(txn, queue, plan.victims, sorted(plan.incoming)[-len(plan.victims) :])


def _displace(txn: Transaction, queue: Queue, victims: Sequence[Able], by: Sequence[int]) -> None:
    """Dead-letter stored deliveries, each for an incoming one of the priority beside it in `by`."""
    ids = numbers([victim.id for victim in victims])
    places = {id_: (state, lane) for id_, state, lane in select(txn.connection, _PLACES, (ids,))}
    deliveries = {held.id: delivery for delivery, held in txn.deliveries([victim.id for victim in victims])}
    txn.connection.execute(_BURY, (ids,))
    keys: set[tuple[Queue, str]] = set()
    for victim, priority in zip(victims, by, strict=True):
        delivery = deliveries[victim.id]
        state, lane = places[victim.id]
        leave(queue, state, lane)
        _dead_letter(txn, queue, victim.id, delivery, displaced_report(delivery, priority, queue.capacity, txn.wall))
        key = delivery.envelope.key
        if key is not None and lane != KEYED:
            keys.add((queue, key))
    txn.free_keys(keys)


def leave_out(txn: Transaction, queue: Queue, id_: int, delivery: Delivery) -> None:
    """Nobody consumes `queue` and it is full: `delivery`, just written, is kept, counted and told."""
    _dead_letter(txn, queue, id_, delivery, unconsumed_report(delivery, queue.capacity, txn.wall))


def _dead_letter(txn: Transaction, queue: Queue, id_: int, delivery: Delivery, report: ErrorReport) -> None:
    queue.dead_lettered += 1
    txn.books.dirty.add(queue)
    insert_dead_letter(txn, id_, queue, "overflow", report)
    state(txn, queue, "dead_letter")
    txn.answers.facts.append(DeliveryDeadLettered(at=txn.wall, delivery=delivery, report=report, reason="overflow"))


def state(txn: Transaction, queue: Queue, action: Literal["dead_letter", "expand", "contract", "refuse"]) -> None:
    txn.answers.facts.append(
        OverflowHandled(at=txn.wall, subscription=queue.name, action=action, capacity=queue.capacity)
    )


# Growing for a while


def look(txn: Transaction) -> None:
    """For each queue that has grown: find out how much it takes now, and whether that is over."""
    for queue in tuple(txn.books.expanded):
        spec = queue.spec
        queue.capacity = capacity_now(spec.capacity, spec.overflow, queue.expanded_until, txn.wall)
        if contracts(spec.capacity, spec.overflow, queue.expanded_until, txn.wall, queue.pending):
            _set_expanded(txn, queue, 0.0)
            state(txn, queue, "contract")


def _set_expanded(txn: Transaction, queue: Queue, until: float) -> None:
    txn.connection.execute(_EXPANDED, (until, queue.id))
    queue.expanded_until = until
    queue.capacity = capacity_now(queue.spec.capacity, queue.spec.overflow, until, txn.wall)
    if until:
        txn.books.expanded.add(queue)
    else:
        txn.books.expanded.discard(queue)
