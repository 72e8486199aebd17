"""What a full queue does, rung by rung. Slowing publishers comes before anything else."""

from __future__ import annotations

from enum import StrEnum


class Rung(StrEnum):
    """The steps of the overflow ladder, in order."""

    ADMIT = "admit"
    SLOW = "slow"
    DEAD_LETTER = "dead_letter"
    REFUSE = "refuse"


def next_rung(
    *, pending: int, incoming: int, capacity: int, waited_s: float, wait_max_s: float, consumed: bool
) -> Rung:
    """What to do with `incoming` more messages for a queue that holds `pending` of `capacity`.

    A queue without a live consumer (`consumed` false) cannot drain, so waiting is no
    use: its overflow is dead-lettered, where it is kept, counted and alerted on.
    """
    if pending + incoming <= capacity:
        return Rung.ADMIT
    if not consumed:
        return Rung.DEAD_LETTER
    return Rung.SLOW if waited_s < wait_max_s else Rung.REFUSE
