"""Room for attempts, and what happens to one that runs past its deadline.

There is no timer for each attempt: a worker has one alarm, set for the earliest
deadline among its slots. When it rings, each slot past its deadline takes its
next step: given more time while the timeout is stretched, cancelled, then called overdue, then abandoned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from glassbus.errors import UnknownSubscription
from glassbus.facts import Delivery

#: How long a cancelled handler may clean up before it counts as overdue, in seconds.
CLEAN_UP_S = 1.0
_NEVER = float("inf")
#: How soon a slot whose task ended works again, in seconds.
_REOPEN_S = 0.05
#: How soon a slot claims again when the store failed its claim, in seconds.
CLAIM_AGAIN_S = 1.0


class Slot:
    """Room for one attempt at a time."""

    __slots__ = (
        "abandoned_at",
        "allowed_s",
        "deadline",
        "delivery",
        "expired",
        "open",
        "parked",
        "permit",
        "released",
        "started",
        "stopped",
        "task",
        "touched",
    )

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.open = True  # its task goes on to the next delivery
        self.parked = False  # held back, because fewer attempts may run at once
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
        self.allowed_s = 0.0  # its timeout, where it ran past the subscription's own
        self.released = False  # the delivery was settled over the running handler's head
        self.abandoned_at = 0.0


class Slots:
    """The slots of one worker, each with the task that serves it: `serve(slot)`. Belongs to its loop.

    A task goes on while its slot is `open`. `failed` is told when the store failed a claim.
    """

    def __init__(
        self, name: str, serve: Callable[[Slot], Coroutine[Any, Any, None]], failed: Callable[[BaseException], None]
    ) -> None:
        self.all: list[Slot] = []
        self.stopping = False
        self._name = name
        self._serve = serve
        self._failed = failed

    @property
    def in_flight(self) -> int:
        return sum(slot.delivery is not None for slot in self.all)

    @property
    def overdue(self) -> int:
        return sum(slot.delivery is not None and slot.expired for slot in self.all)

    @property
    def lost(self) -> int:
        """Those whose handler was abandoned, until it returns."""
        return sum(bool(slot.abandoned_at) for slot in self.all)

    @property
    def limit(self) -> int:
        """Those that can work."""
        return sum(not slot.abandoned_at and not slot.parked for slot in self.all)

    def resize(self, count: int) -> None:
        """Let `count` slots work. What runs in others runs to its end, and then they take nothing more."""
        if self.stopping:
            return
        working = [slot for slot in self.all if not slot.parked]
        parked = [slot for slot in self.all if slot.parked]
        # Lost ones are parked first and taken back last, or none might be left that works; then idle ones.
        working.sort(key=lambda slot: (not slot.abandoned_at, slot.delivery is not None), reverse=True)
        parked.sort(key=lambda slot: not slot.abandoned_at)
        for slot in working[count:]:
            slot.parked, slot.open = True, False
            if slot.delivery is None and slot.task is not None:
                slot.task.cancel()
        for _ in range(count - len(working)):
            if parked:
                slot = parked.pop()
                slot.parked, slot.open = False, True
                if slot.task is None or slot.task.done():
                    self._open(slot)
            else:
                self.all.append(Slot())
                self._open(self.all[-1])

    def _open(self, slot: Slot) -> None:
        slot.task = asyncio.get_running_loop().create_task(self._serve(slot), name=f"glassbus:{self._name}")
        slot.task.add_done_callback(lambda task: self._ended(slot, task))

    def _ended(self, slot: Slot, task: asyncio.Task[None]) -> None:
        """The slot's task was cancelled from outside, or the store failed it. It works again soon,
        unless all is ending: a loop that shuts down is gone before the timer fires."""
        error = None if task.cancelled() else task.exception()
        if self.stopping or isinstance(error, UnknownSubscription):
            return
        if error is not None:
            self._failed(error)
        elif slot.parked:
            return
        asyncio.get_running_loop().call_later(_REOPEN_S if error is None else CLAIM_AGAIN_S, self._reopen, slot)

    def _reopen(self, slot: Slot) -> None:
        if slot.open and (slot.task is None or slot.task.done()):
            self._open(slot)

    def close(self) -> None:
        """Take nothing more: tasks that wait for a delivery end, the others when theirs is settled."""
        self.stopping = True
        for slot in self.all:
            slot.open = False
            if slot.delivery is None and slot.task is not None:
                slot.task.cancel()

    def cancel(self) -> None:
        """Tell every handler that still runs to stop, once."""
        for slot in self.running():
            if slot.task is not None and not slot.stopped:
                slot.stopped = True
                slot.task.cancel()

    def running(self) -> Iterator[Slot]:
        """Those whose task has not ended."""
        return (slot for slot in self.all if slot.task is not None and not slot.task.done())

    async def ended(self, within_s: float) -> None:
        """Wait until every task has ended, at most `within_s` seconds."""
        tasks = [slot.task for slot in self.running() if slot.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=within_s)


class Deadlines:
    """Watches the slots of one worker. Belongs to its loop.

    `in_force` is the timeout that an attempt has now, at least the one that its deadline was set by.
    `cancels`: an attempt past it is cancelled (a plain handler cannot be). `overdue` and `abandon`
    are told of one that goes on all the same.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        monotonic: Callable[[], float],
        in_force: Callable[[], float],
        abandon_after_s: float,
        cancels: bool,
        overdue: Callable[[Slot, Delivery], None],
        abandon: Callable[[Slot, Delivery, float], None],
    ) -> None:
        #: When the alarm rings next; a slot with an earlier deadline must call `watch`.
        self.at = _NEVER
        self._slots = slots
        self._monotonic = monotonic
        self.abandon_after_s = abandon_after_s
        self._in_force = in_force
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
        limit = slot.started + self.abandon_after_s
        if not slot.expired:
            slot.touched = True
            allowed_s = slot.allowed_s or self._in_force()
            if now + 1e-9 < slot.started + allowed_s:
                slot.allowed_s = allowed_s
                slot.deadline = slot.started + allowed_s
                return
            slot.allowed_s = allowed_s
            slot.expired = True
            slot.deadline = limit
            if self._cancels and slot.task is not None:
                slot.task.cancel()
                slot.deadline = min(limit, now + CLEAN_UP_S)
            else:
                self._overdue(slot, delivery)
        elif now + 1e-9 < limit:
            slot.deadline = limit
            self._overdue(slot, delivery)
        else:
            self._abandon(slot, delivery, now)
