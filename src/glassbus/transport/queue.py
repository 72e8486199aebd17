"""The deliveries of one subscription in memory, and who waits for a place among them."""

from __future__ import annotations

import asyncio
import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

from glassbus.facts import Delivery
from glassbus.message import Priority
from glassbus.policy.ledger import Account
from glassbus.policy.overflow import capacity_now, contracts
from glassbus.policy.priority import PriorityTurn
from glassbus.transport import DeadLetterFilter, DeadLetterRecord, Hold, SubscriptionSpec


class Waiter:
    """A publish that waits for room: the highest priority first, then in order of arrival."""

    __slots__ = ("rank", "room")

    def __init__(self, priority: int, number: int) -> None:
        self.rank = (-priority, number)
        self.room: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.room is not None and not self.room.done():
            self.room.set_result(None)


class Queue:
    """The deliveries of one subscription."""

    def __init__(self, spec: SubscriptionSpec) -> None:
        self.name = spec.name
        self.hold = Hold()
        self.held = False
        self.consumed = False
        self.ready: tuple[deque[Delivery], ...] = (deque(), deque(), deque(), deque())
        self.normal = self.ready[Priority.NORMAL]
        self.turn = PriorityTurn()
        self.later: list[tuple[float, int, Delivery]] = []  # retrying, by monotonic time
        self.scheduled: list[tuple[float, int, Delivery]] = []  # delayed publish, by wall time
        self.expiring: set[int] = set()  # handles of what waits and can expire
        self.in_flight: set[Delivery] = set()
        self.busy: dict[str, Delivery] = {}
        self.waiting_for_key: dict[str, list[tuple[float, int, Delivery]]] = {}  # by priority
        self.dead: dict[str, DeadLetterRecord] = {}
        self.claimers: deque[asyncio.Future[None]] = deque()
        self.accepted = self.handled = self.expired = self.discarded = 0
        self.pending = 0
        self.line: list[Waiter] = []
        #: When its expansion ends, wall seconds; it stays until all that is pending fits again. 0.0: not expanded.
        self.expanded_until = 0.0
        self.update(spec, 0.0)

    # Room

    def update(self, spec: SubscriptionSpec, now: float) -> None:
        self.spec = spec
        self.stretch(now)

    def stretch(self, now: float) -> None:
        """Find out how many pending deliveries are admitted at `now`."""
        self.capacity = capacity_now(self.spec.capacity, self.spec.overflow, self.expanded_until, now)
        self._mark()

    def expand(self, until: float, now: float) -> None:
        """Admit more until `until`, and tell who waits for room."""
        self.expanded_until = until
        self.stretch(now)
        self.wake_publisher()

    def contract(self, now: float) -> bool:
        """Take the expansion back if its time is over and all that is pending fits; whether it was."""
        if not contracts(self.spec.capacity, self.spec.overflow, self.expanded_until, now, self.pending):
            return False
        self.expanded_until = 0.0
        self.stretch(now)
        return True

    def join(self, waiter: Waiter) -> None:
        insort(self.line, waiter, key=lambda w: w.rank)
        self._mark()

    def leave(self, waiter: Waiter) -> None:
        self.line.remove(waiter)
        self._mark()
        self.wake_publisher()

    def ahead(self, waiter: Waiter) -> bool:
        """Whether somebody else is to be admitted before `waiter`."""
        return bool(self.line) and self.line[0].rank < waiter.rank

    def wake_publisher(self) -> None:
        """Let the first in line look, if there is room; once admitted it lets the next one look."""
        if self.line and self.pending < self.capacity:
            self.line[0].wake()

    def wake_publishers(self) -> None:
        """Everyone who waits for room here looks again: this is another queue now, or gone."""
        for waiter in self.line:
            waiter.wake()

    def _mark(self) -> None:
        """Set what the shortest ways in and out compare with: nobody passes those who wait in line."""
        self.limit = 0 if self.line else self.capacity
        self.crowded = bool(self.line) or self.expanded_until > 0

    # Who gives way

    def last_in_line(self, below: int, wanted: int) -> list[Delivery]:
        """Up to `wanted` pending deliveries of priorities under `below` that can give way, the lowest first.

        Of one priority the last in line goes first, mostly the newest: what has waited longest is kept, and of a key
        the earlier messages. What waits for a retry or for its time comes after what is ready. With `strict_key` a
        delivery that was tried stays, because it holds its key.
        """
        found: list[Delivery] = []
        for priority in range(below):
            if len(found) == wanted:
                break
            found += self._back_of(priority, wanted - len(found))
        return found

    def _back_of(self, priority: int, wanted: int) -> list[Delivery]:
        def able(deliveries: Iterable[Delivery]) -> Iterable[Delivery]:
            strict = self.spec.strict_key
            return (
                d
                for d in deliveries
                if d.envelope.priority == priority and not (strict and d.attempt and d.envelope.key is not None)
            )

        keyed = able(d for waiting in self.waiting_for_key.values() for _, _, d in waiting)
        ready = [*islice(able(reversed(self.ready[priority])), wanted), *keyed]
        found = sorted(ready, key=_accepted, reverse=True)
        if len(found) < wanted:
            timed = able(d for _, _, d in (*self.later, *self.scheduled))
            found += sorted(timed, key=_accepted, reverse=True)
        return found[:wanted]

    def give_way(self, victims: Sequence[Delivery]) -> None:
        """Remove what `last_in_line` found. Their keys are free."""
        handles = {d.handle for d in victims}
        handles -= {d.handle for d in self._take_from_heaps(handles)}
        for lane in self.ready:
            kept = []
            while handles and lane:  # from the back, where they are
                delivery = lane.pop()
                if delivery.handle in handles:
                    handles.discard(delivery.handle)
                else:
                    kept.append(delivery)
            lane.extend(reversed(kept))
        self.pending -= len(victims)
        for delivery in victims:
            self.expiring.discard(delivery.handle)
            self.let_go(delivery)

    # The rest

    def account(self) -> Account:
        return Account(
            accepted=self.accepted,
            ready=sum(map(len, self.ready)) + sum(map(len, self.waiting_for_key.values())),
            scheduled=len(self.scheduled),
            retrying=len(self.later),
            in_flight=len(self.in_flight),
            handled=self.handled,
            dead_lettered=len(self.dead),
            expired=self.expired,
            discarded=self.discarded,
        )

    def held_deliveries(self) -> list[Delivery]:
        """Every delivery that is neither settled nor dead-lettered, oldest first within its kind."""
        ready = [d for lane in self.ready for d in lane]
        keyed = [d for waiting in self.waiting_for_key.values() for _, _, d in sorted(waiting)]
        timed = [d for _, _, d in sorted(self.later) + sorted(self.scheduled)]
        return [*self.in_flight, *ready, *keyed, *timed]

    def put(self, delivery: Delivery, *, first: bool = False) -> None:
        """Make `delivery` ready; `first` for one that was taken before and goes to the front."""
        lane = self.ready[delivery.envelope.priority]
        if first:
            lane.appendleft(delivery)
        else:
            lane.append(delivery)
        if self.claimers:
            self.wake()

    def wake(self) -> None:
        """Wake one idle claimer, if any."""
        while self.claimers:
            claimer = self.claimers.popleft()
            if not claimer.done():
                claimer.set_result(None)
                return

    def take_key(self, delivery: Delivery) -> bool:
        """Whether the key of `delivery` is free for it; if not, it is put to wait for its key."""
        key = delivery.envelope.key
        assert key is not None
        holder = self.busy.get(key)
        if holder is None or holder is delivery:
            self.busy[key] = delivery
            return True
        waiting = self.waiting_for_key.setdefault(key, [])
        heapq.heappush(waiting, (-delivery.envelope.priority, delivery.handle, delivery))
        return False

    def take_out(self, handles: set[int]) -> list[Delivery]:
        """Remove the waiting deliveries with these handles from wherever they wait."""
        taken: list[Delivery] = []
        for lane in self.ready:
            found = [d for d in lane if d.handle in handles]
            if found:
                taken += found
                kept = [d for d in lane if d.handle not in handles]
                lane.clear()
                lane.extend(kept)
        return sorted([*taken, *self._take_from_heaps(handles)], key=_accepted)

    def _take_from_heaps(self, handles: set[int]) -> list[Delivery]:
        taken: list[Delivery] = []
        for heap in (self.later, self.scheduled, *self.waiting_for_key.values()):
            found = [entry[2] for entry in heap if entry[2].handle in handles]
            if found:
                taken += found
                heap[:] = [entry for entry in heap if entry[2].handle not in handles]
                heapq.heapify(heap)
        return taken

    def let_go(self, delivery: Delivery) -> None:
        """`delivery` waits no more: if it held its key, that is free."""
        key = delivery.envelope.key
        if key is not None and self.busy.get(key, delivery).handle == delivery.handle:
            self.free_key(key)

    def free_key(self, key: str) -> None:
        """The key's attempt has ended: the next delivery that waits for it is ready."""
        self.busy.pop(key, None)
        waiting = self.waiting_for_key.get(key)
        if waiting:
            self.put(heapq.heappop(waiting)[2], first=True)
        if waiting is not None and not waiting:
            del self.waiting_for_key[key]


def _accepted(delivery: Delivery) -> int:
    """Its place in the order of acceptance."""
    return int(delivery.handle)


def wanted_by(wanted: DeadLetterFilter, record: DeadLetterRecord) -> bool:
    """Whether `record` is one of the dead letters asked for."""
    return (
        (wanted.id is None or record.id == wanted.id)
        and (wanted.subscription is None or record.subscription == wanted.subscription)
        and (wanted.topic is None or record.envelope.topic == wanted.topic)
        and (wanted.message_id is None or record.envelope.id == wanted.message_id)
        and (wanted.category is None or record.report.category == wanted.category)
        and (wanted.exception_type is None or _is_type(record.report.exception_type, wanted.exception_type))
        and (wanted.fingerprint is None or record.report.fingerprint == wanted.fingerprint)
        and (wanted.since is None or record.died_at >= wanted.since)
        and (wanted.until is None or record.died_at <= wanted.until)
        and (wanted.before is None or int(record.id) < int(wanted.before))
    )


def _is_type(qualified: str, wanted: str) -> bool:
    return wanted in (qualified, qualified.rpartition(".")[2])
