"""The overflow ladder on queues in memory: what is to be done for one publish, and doing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from glassbus.errors import ErrorReport
from glassbus.facts import Delivery, DeliveryDeadLettered, Fact, OverflowHandled
from glassbus.policy.overflow import Rung, Step, climb, displaced_report, left_out, may_grow_to
from glassbus.transport.queue import Queue

#: Puts a delivery, which is no longer pending, to rest: queue, delivery, report, reason, wall time.
Bury = Callable[[Queue, Delivery, ErrorReport, str, float], None]


class Plan(NamedTuple):
    """What one publish leads to in one queue."""

    queue: Queue
    incoming: Sequence[int]  # priorities
    step: Step
    victims: list[Delivery]

    @property
    def left_out(self) -> set[int]:
        """Which of the incoming are dead-lettered instead, by their place among them."""
        return left_out(self.incoming, self.step.leave_out)


def plans(incoming: Mapping[Queue, Sequence[int]], *, may_grow: bool) -> list[Plan]:
    """What to do for a publish whose time to wait is over. Changes nothing."""
    return [_plan(queue, priorities, may_grow) for queue, priorities in incoming.items()]


def _plan(queue: Queue, priorities: Sequence[int], may_grow: bool) -> Plan:
    overflow = queue.spec.overflow
    full = queue.pending + len(priorities) > queue.capacity
    able = queue.last_in_line(max(priorities), len(priorities)) if overflow.displace and full else []
    step = climb(
        pending=queue.pending,
        incoming=priorities,
        capacity=queue.capacity,
        expanded=may_grow_to(queue.spec.capacity, overflow, queue.expanded_until, allowed=may_grow),
        consumed=queue.consumed,
        lower=[d.envelope.priority for d in able],
    )
    return Plan(queue, priorities, step, able[: step.displace])


def make_room(plan: Plan, bury: Bury, now: float) -> list[Fact]:
    """Displace and expand as `plan` says; the facts of it, true from now on."""
    queue, step, facts = plan.queue, plan.step, list[Fact]()
    if step.rung is Rung.EXPAND:
        queue.expand(now + queue.spec.overflow.expand_for, now)
        facts.append(OverflowHandled(at=now, subscription=queue.name, action="expand", capacity=queue.capacity))
    if plan.victims:
        queue.give_way(plan.victims)
        highest = sorted(plan.incoming)[-len(plan.victims) :]
        for delivery, by in zip(plan.victims, highest, strict=True):
            report = displaced_report(delivery, by, queue.capacity, now)
            bury(queue, delivery, report, "overflow", now)
            facts += overflowed(queue.name, queue.capacity, delivery, report, now)
    return facts


def overflowed(name: str, capacity: int, delivery: Delivery, report: ErrorReport, now: float) -> list[Fact]:
    """The facts of one delivery that was dead-lettered for want of room."""
    return [
        OverflowHandled(at=now, subscription=name, action="dead_letter", capacity=capacity),
        DeliveryDeadLettered(at=now, delivery=delivery, report=report, reason="overflow"),
    ]
