"""What a full queue does, rung by rung: slow publishers, have the lowest priority give way, grow for a while, refuse.

| fits | consumed | time left to wait | enough gives way | growing is enough | rung |
|---|---|---|---|---|---|
| yes | any | any | any | any | ADMIT |
| no | no | any | any | any | DEAD_LETTER |
| no | yes | yes | any | any | SLOW |
| no | yes | no | yes | any | DISPLACE |
| no | yes | no | no | yes | EXPAND |
| no | yes | no | no | no | REFUSE |

Each is taken back: a publisher that was slowed is admitted, what gave way is replayed
from the dead-letter queue, what grew shrinks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from glassbus.config import Overflow
from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity
from glassbus.facts import Delivery
from glassbus.message import Priority


class Rung(StrEnum):
    """The steps of the overflow ladder, in order. DEAD_LETTER is that of a queue that nobody consumes."""

    ADMIT = "admit"
    SLOW = "slow"
    DISPLACE = "displace"
    EXPAND = "expand"
    DEAD_LETTER = "dead_letter"
    REFUSE = "refuse"


def next_rung(
    *,
    pending: int,
    incoming: int,
    capacity: int,
    waited_s: float,
    wait_max_s: float,
    consumed: bool,
    gives_way: int = 0,
    expanded: int = 0,
) -> Rung:
    """What to do with `incoming` more messages for a queue that holds `pending` of `capacity`.

    `gives_way` is how many pending ones may be displaced for them (see `giving_way`), `expanded` the capacity that
    the queue may grow to now. On DISPLACE as many give way as are too many; on EXPAND as many as are
    too many even then, mostly none. Where more is pending than the capacity (it has become less), one gives
    way for each that comes, so that it gets no more.

    A queue without a live consumer (`consumed` false) cannot drain, so neither waiting nor growing is
    any use: what is too many is dead-lettered, where it is kept, counted and alerted on: first what
    may be displaced, then the incoming.
    """
    too_many = _too_many(pending, incoming, capacity)
    if not too_many:
        return Rung.ADMIT
    if not consumed:
        return Rung.DEAD_LETTER
    if waited_s < wait_max_s:
        return Rung.SLOW
    if too_many <= gives_way:
        return Rung.DISPLACE
    if expanded > capacity and _too_many(pending, incoming, expanded) <= gives_way:
        return Rung.EXPAND
    return Rung.REFUSE


def _too_many(pending: int, incoming: int, capacity: int) -> int:
    return max(0, min(incoming, pending + incoming - capacity))


def giving_way(incoming: Sequence[int], pending: Sequence[int]) -> int:
    """How many pending messages can give way, each to an incoming one of a higher priority than its own.

    Both are priorities in any order. The answer n means: the n lowest of `pending`.
    """
    lowest = sorted(pending)
    found = 0
    for priority in sorted(incoming):
        if found < len(lowest) and lowest[found] < priority:
            found += 1
    return found


def left_out(incoming: Sequence[int], too_many: int) -> set[int]:
    """Which of a batch do not get in: the places of its `too_many` lowest, latest first."""
    lowest = sorted(range(len(incoming)), key=lambda place: (incoming[place], -place))
    return set(lowest[: max(0, too_many)])


class Step(msgspec.Struct, frozen=True):
    """What to do with a publish that need not, or may not, wait any longer.

    `displace`: so many pending ones, the lowest, are dead-lettered. `leave_out`: so many of the incoming,
    the lowest, are dead-lettered instead of stored as pending. `capacity`: what it is afterwards.
    """

    rung: Rung
    displace: int = 0
    leave_out: int = 0
    capacity: int = 0


def climb(
    *, pending: int, incoming: Sequence[int], capacity: int, expanded: int, consumed: bool, lower: Sequence[int]
) -> Step:
    """The rung for `incoming` priorities, whose time to wait is over, and how far it goes.

    `expanded` is the capacity that the queue may grow to now. `lower` are priorities of pending messages that could
    give way: the lowest there are, as many as are too many, or all there are under the highest of `incoming`.
    """
    gives_way = giving_way(incoming, lower)
    rung = next_rung(
        pending=pending,
        incoming=len(incoming),
        capacity=capacity,
        waited_s=0.0,
        wait_max_s=0.0,
        consumed=consumed,
        gives_way=gives_way,
        expanded=expanded,
    )
    too_many = _too_many(pending, len(incoming), capacity)
    match rung:
        case Rung.DISPLACE:
            return Step(rung, displace=too_many, capacity=capacity)
        case Rung.EXPAND:
            return Step(rung, displace=_too_many(pending, len(incoming), expanded), capacity=expanded)
        case Rung.DEAD_LETTER:
            displace = min(too_many, gives_way)
            return Step(rung, displace=displace, leave_out=too_many - displace, capacity=capacity)
        case _:
            return Step(rung, capacity=capacity)


# Growing for a while


def is_expanded(overflow: Overflow, expanded_until: float, now: float) -> bool:
    """Whether more is admitted than the declared capacity. Wall seconds.

    An end that is further away than an expansion lasts was written before the clock was set back: it is over.
    """
    return now < expanded_until <= now + overflow.expand_for


def expanded_capacity(capacity: int, overflow: Overflow) -> int:
    """What a queue of `capacity` grows to: never more than `overflow.expand` times as much."""
    return int(capacity * overflow.expand)


def capacity_now(capacity: int, overflow: Overflow, expanded_until: float, now: float) -> int:
    """Up to how many pending messages are admitted at `now`. `expanded_until` 0: it is not expanded."""
    return expanded_capacity(capacity, overflow) if is_expanded(overflow, expanded_until, now) else capacity


def may_grow_to(capacity: int, overflow: Overflow, expanded_until: float, *, allowed: bool = True) -> int:
    """The capacity that a queue may grow to now: its own while an earlier expansion is not taken back."""
    return expanded_capacity(capacity, overflow) if allowed and not expanded_until else capacity


def contracts(capacity: int, overflow: Overflow, expanded_until: float, now: float, pending: int) -> bool:
    """Whether an expansion is to be taken back: its time is over, and all that is pending fits again."""
    return expanded_until > 0 and pending <= capacity and not is_expanded(overflow, expanded_until, now)


# What is told of a delivery that had no room


def displaced_report(delivery: Delivery, by: int, capacity: int, now: float) -> ErrorReport:
    """A pending delivery gave way to a message of priority `by`."""
    mine, other = Priority(delivery.envelope.priority).name, Priority(by).name
    name = delivery.subscription
    return _report(
        delivery,
        "displaced",
        f"queue of {name!r} is full ({capacity}): this {mine} message gave way to a {other} one",
        now,
        gave_way_to=other,
    )


def unconsumed_report(delivery: Delivery, capacity: int, now: float) -> ErrorReport:
    """A message came for a full queue that nobody consumes."""
    name = delivery.subscription
    return _report(delivery, "overflow", f"queue of {name!r} is full ({capacity}) and nothing consumes it", now)


def _report(delivery: Delivery, kind: str, message: str, now: float, **context: str) -> ErrorReport:
    envelope = delivery.envelope
    return ErrorReport(
        error_id=f"{envelope.id}:{delivery.subscription}:{kind}",
        timestamp=now,
        category=ErrorCategory.QUEUE_OVERFLOW,
        severity=ErrorSeverity.HIGH,
        message=message,
        exception_type="QueueFull",
        context={"topic": envelope.topic, "priority": Priority(envelope.priority).name, **context},
        retry_count=max(0, delivery.attempt - 1),
        fingerprint=f"{kind}:{delivery.subscription}",
        component="queue",
    )
