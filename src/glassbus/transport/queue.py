"""The deliveries of one subscription in memory."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque

from glassbus.facts import Delivery
from glassbus.message import Priority
from glassbus.policy.ledger import Account
from glassbus.policy.priority import PriorityTurn
from glassbus.transport import DeadLetterRecord, Hold, SubscriptionSpec


class Queue:
    """The deliveries of one subscription."""

    def __init__(self, spec: SubscriptionSpec) -> None:
        self.name = spec.name
        self.update(spec)
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

    def update(self, spec: SubscriptionSpec) -> None:
        self.spec = spec
        self.capacity = spec.capacity

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
        for heap in (self.later, self.scheduled, *self.waiting_for_key.values()):
            found = [entry[2] for entry in heap if entry[2].handle in handles]
            if found:
                taken += found
                heap[:] = [entry for entry in heap if entry[2].handle not in handles]
                heapq.heapify(heap)
        return sorted(taken, key=lambda d: int(d.handle))

    def free_key(self, key: str) -> None:
        """The key's attempt has ended: the next delivery that waits for it is ready."""
        self.busy.pop(key, None)
        waiting = self.waiting_for_key.get(key)
        if waiting:
            self.put(heapq.heappop(waiting)[2], first=True)
        if waiting is not None and not waiting:
            del self.waiting_for_key[key]
