"""Room for attempts, and what happens to one that runs past its deadline.

There is no timer for each attempt: a worker has one alarm, set for the earliest
deadline among its slots. When it rings, each slot past its deadline takes its
next step: cancelled, then called overdue, then abandoned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from glassbus.facts import Delivery

#: How long a cancelled handler may clean up before it counts as overdue, in seconds.
CLEAN_UP_S = 1.0
_NEVER = float("inf")


class Slot:
    """Room for one attempt at a time."""

    __slots__ = (
        "abandoned_at",
        "deadline",
        "delivery",
        "expired",
        "permit",
        "released",
        "started",
        "stopped",
        "task",
        "touched",
    )

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.stopped = False  # its handler was told to stop, for good
        self.delivery: Delivery | None = None
        self.started = 0.0
        self.deadline = 0.0
        self.clear()

    def clear(self) -> None:
        """Ready for an attempt with nothing special about it."""
        self.touched = False  # anything below was set
        self.permit = 0
        self.expired = False
        self.released = False  # the delivery was settled over the running handler's head
        self.abandoned_at = 0.0


class Deadlines:
    """Watches the slots of one worker. Belongs to its loop.

    `cancels`: an attempt past its timeout is cancelled (a plain handler cannot be).
    `overdue` and `abandon` are told of one that goes on all the same.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        monotonic: Callable[[], float],
        abandon_after_s: float,
        cancels: bool,
        overdue: Callable[[Delivery], None],
        abandon: Callable[[Slot, Delivery, float], None],
    ) -> None:
        #: When the alarm rings next; a slot with an earlier deadline must call `watch`.
        self.at = _NEVER
        self._slots = slots
        self._monotonic = monotonic
        self._abandon_after_s = abandon_after_s
        self._cancels = cancels
        self._overdue = overdue
        self._abandon = abandon
        self._alarm: asyncio.TimerHandle | None = None

    def watch(self, deadline: float) -> None:
        """Ring at `deadline` (monotonic seconds) at the latest."""
        if deadline >= self.at:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self.at = deadline
        loop = asyncio.get_running_loop()
        self._alarm = loop.call_later(max(0.0, deadline - self._monotonic()), self._ring)

    def stop(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()

    def _ring(self) -> None:
        """Act on every slot past its deadline, and set the alarm for the next one."""
        now = self._monotonic()
        self._alarm, self.at = None, _NEVER
        earliest = _NEVER
        for slot in self._slots:
            if slot.delivery is None or slot.released:
                continue
            if slot.deadline <= now + 1e-9:
                self._overran(slot, slot.delivery, now)
            if not slot.released:
                earliest = min(earliest, slot.deadline)
        if earliest < _NEVER:
            self.watch(earliest)

    def _overran(self, slot: Slot, delivery: Delivery, now: float) -> None:
        limit = slot.started + self._abandon_after_s
        if not slot.expired:
            slot.expired = slot.touched = True
            slot.deadline = limit
            if self._cancels and slot.task is not None:
                slot.task.cancel()
                slot.deadline = min(limit, now + CLEAN_UP_S)
            else:
                self._overdue(delivery)
        elif now + 1e-9 < limit:
            slot.deadline = limit
            self._overdue(delivery)
        else:
            self._abandon(slot, delivery, now)
