"""Messages in this process's memory: fast, and gone with it unless `spill_dir` is set.

Everything runs on the bus's loop, so each method is atomic up to its first
`await`. The counts of the ledger are the lengths of the queues themselves, so
what does not balance here is a real loss.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from glassbus.clock import Clock
from glassbus.errors import (
    BusNotRunning,
    ErrorReport,
    QueueFull,
    UnknownDeadLetter,
    UnknownSubscription,
)
from glassbus.facts import (
    BackpressureApplied,
    Delivery,
    DeliveryDiscarded,
    DeliveryExpired,
    Fact,
    OverflowHandled,
    transport_failed,
)
from glassbus.message import Envelope, Level, Priority
from glassbus.policy.delivery import Decision, State
from glassbus.policy.ledger import Account, Audit, Ledger
from glassbus.policy.overflow import Rung, is_expanded, next_rung, unconsumed_report
from glassbus.policy.routing import ByTopic, destination, matches
from glassbus.transport import (
    DeadLetterFilter,
    DeadLetterRecord,
    Features,
    Forced,
    Hold,
    Listener,
    QueueState,
    Recorded,
    Stored,
    SubscriptionSpec,
    Whereabouts,
)
from glassbus.transport.known import KnownIds, Recognised
from glassbus.transport.ladder import make_room, overflowed, plans
from glassbus.transport.locating import ids_like, locate
from glassbus.transport.queue import Queue, Waiter, wanted_by
from glassbus.transport.spill import read, restore, spill

_NORMAL_ONLY = (int(Priority.NORMAL),)
_HANDLED = State.HANDLED  # looking a member up on its enum takes longer than comparing it

#: A wall clock may be set forward, so what waits for it looks again after this long, in seconds.
_WALL_LOOK_S = 1.0
_ROUNDING_S = 1e-6
#: What expires within this many seconds is expired together; a claim never hands it out, to the moment.
_EXPIRY_GROUP_S = 0.05

#: The queues that want a topic, its destination label, and the outcome of a publish to it.
_Route = tuple[tuple[Queue, ...], str, Stored]


class MemoryTransport:
    """The transport of `memory://`. See the port for what each method promises."""

    def __init__(self, *, clock: Clock, spill_dir: str | None = None, name: str = "default") -> None:
        self.features = Features(durable=False, multi_process=False, level=Level.MEMORY, ladder=True)
        self.address = "memory://"
        self.may_grow = True
        self._clock = clock
        self._spill_path = Path(spill_dir) / f"{name}.spill.jsonl" if spill_dir else None
        self._queues: dict[str, Queue] = {}
        self._routes: ByTopic[_Route] = ByTopic()
        self._known = KnownIds()
        self._sequence = itertools.count(1)
        self._gone = Account()
        self._expiring: list[tuple[float, int, int, Queue]] = []  # by wall time; of the delivery with this handle
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._restored: list[Delivery | DeadLetterRecord] = []
        self._listener: Listener
        self._loop: asyncio.AbstractEventLoop
        self._open = False

    # Opening and closing

    async def open(self, listener: Listener, /) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._open = True
        if self._spill_path is not None:
            self._restored = restore(self._spill_path)

    async def close(self, deadline_s: float, /) -> tuple[int, int]:
        if not self._open:
            return 0, 0
        self._open = False
        self._routes.clear()
        if self._timer is not None:
            self._timer.cancel()
        for queue in self._queues.values():
            for waiter in queue.line:
                if waiter.room is not None and not waiter.room.done():
                    waiter.room.set_exception(BusNotRunning("the bus stopped while this publish waited for room"))
        held = [d for queue in self._queues.values() for d in queue.held_deliveries()]
        saved = self._save()
        if saved is None:
            return len(held), 0
        lost = [d for d in held if (d.envelope.id, d.subscription) not in saved]
        self._lose(lost)
        return len(held) - len(lost), len(lost)

    def _save(self) -> set[tuple[str, str]] | None:
        """Spill what is held: None when all of it is safe, else the message id and subscription of what is."""
        if self._spill_path is None:
            return set()
        try:
            spill(self._spill_path, self.held())
        except Exception as error:  # noqa: BLE001 - what cannot be saved is lost, and that must be stated
            self._listener.state(transport_failed(self._clock.wall(), "spill", error))
        else:
            return None
        try:  # an emergency has saved already, or a message was restored from there
            return {(one.envelope.id, one.subscription) for one in read(self._spill_path)}
        except (OSError, ValueError):
            return set()  # the failure to write has been stated

    def _lose(self, lost: Sequence[Delivery]) -> None:
        """The bus ends, and these with it."""
        by_queue: dict[Queue, set[int]] = {}
        for delivery in lost:
            by_queue.setdefault(self._queues[delivery.subscription], set()).add(delivery.handle)
        for queue, handles in by_queue.items():
            queue.in_flight -= {d for d in queue.in_flight if d.handle in handles}
            queue.take_out(handles)
            queue.discarded += len(handles)
            queue.pending = len(queue.held_deliveries()) - len(queue.in_flight)
        for delivery in lost:
            self._listener.state(DeliveryDiscarded(at=self._clock.wall(), delivery=delivery, reason="stopped"))

    @property
    def spill_path(self) -> Path | None:
        return self._spill_path

    def keep_in(self, path: Path, /) -> None:
        self._spill_path = path

    def held(self) -> list[Delivery | DeadLetterRecord]:
        queues = list(self._queues.values())
        dead = [record for queue in queues for record in queue.dead.values()]
        return [*(held for queue in queues for held in queue.held_deliveries()), *dead, *self._restored]

    # Subscriptions

    async def declare(self, spec: SubscriptionSpec, /, *, consume: bool) -> Hold:
        queue = self._queues.get(spec.name)
        if queue is None:
            queue = self._queues[spec.name] = Queue(spec)
            self._take_restored(queue)
        queue.update(spec, self._clock.wall())
        queue.consumed = queue.consumed or consume
        self._routes.clear()
        queue.wake_publishers()
        return queue.hold

    def _take_restored(self, queue: Queue) -> None:
        mine = [held for held in self._restored if held.subscription == queue.name]
        self._restored = [held for held in self._restored if held.subscription != queue.name]
        for held in mine:
            queue.accepted += 1
            sequence = next(self._sequence)
            if isinstance(held, Delivery):
                held.handle = sequence
                self._accept(queue, held)
            else:
                queue.dead[str(sequence)] = msgspec.structs.replace(held, id=str(sequence))
        if not self._restored and self._spill_path is not None:
            self._spill_path.unlink(missing_ok=True)

    async def forget(self, name: str, /) -> int:
        queue = self._queue(name)
        held = queue.held_deliveries()
        now = self._clock.wall()
        del self._queues[name]
        self._routes.clear()
        lost = len(held) + len(queue.dead)
        self._gone += Account(
            accepted=queue.accepted,
            handled=queue.handled,
            expired=queue.expired,
            discarded=queue.discarded + lost,
        )
        for delivery in held:
            self._listener.state(DeliveryDiscarded(at=now, delivery=delivery, reason="forgotten"))
        for _ in range(len(queue.claimers)):
            queue.wake()
        queue.wake_publishers()
        return lost

    async def set_hold(self, name: str, /, *, paused: bool | None = None, forced: Forced | None = None) -> Hold:
        queue = self._queue(name)
        before = queue.hold
        hold = before.changed(paused, forced)
        queue.hold, queue.held = hold, hold.held
        if not hold.held:
            for _ in range(len(queue.claimers)):
                queue.wake()
        self._listener.held(name, hold)
        return before

    def _queue(self, name: str) -> Queue:
        try:
            return self._queues[name]
        except KeyError:
            raise UnknownSubscription(f"no subscription {name!r}; known are {sorted(self._queues)}") from None

    # Publishing

    def publish_now(self, envelope: Envelope, /) -> Stored | None:
        queues, label, outcome = self._routes.get(envelope.topic) or self._route(envelope.topic)
        if envelope.remember or envelope.due_at or envelope.expires_at:
            return None
        if len(queues) > 1 and any(queue.pending >= queue.limit for queue in queues):
            return None
        for queue in queues:
            pending = queue.pending
            if pending >= queue.limit:
                return None  # the only one, so nothing was done
            queue.accepted += 1
            queue.pending = pending + 1
            queue.ready[envelope.priority].append(Delivery(envelope, queue.name, label, 0, next(self._sequence)))
            if queue.claimers:
                queue.wake()
        return outcome

    async def publish(self, batch: Sequence[Envelope], /, wait_s: float) -> Sequence[Stored]:
        return self._publish_plain(batch) or await self._publish_slowly(batch, wait_s)

    def _publish_plain(self, batch: Sequence[Envelope]) -> list[Stored] | None:
        """Store a batch with nothing special about it that surely fits; None, and nothing done, for any other."""
        size = len(batch)
        routes = [self._routes.get(envelope.topic) or self._route(envelope.topic) for envelope in batch]
        for envelope, (queues, _, _) in zip(batch, routes, strict=True):
            if envelope.remember or envelope.due_at or envelope.expires_at:
                return None
            for queue in queues:
                if queue.pending + size > queue.limit:
                    return None
        for envelope, (queues, label, _) in zip(batch, routes, strict=True):
            for queue in queues:
                queue.accepted += 1
                queue.pending += 1
                queue.put(Delivery(envelope, queue.name, label, 0, next(self._sequence)))
        return [outcome for _, _, outcome in routes]

    def _route(self, topic: str) -> _Route:
        if not self._open:
            raise BusNotRunning("the transport is closed")
        queues = tuple(q for q in self._queues.values() if matches(q.spec.pattern, topic))
        label = destination(topic, (q.spec.pattern for q in queues))
        stored = Stored(tuple(q.spec.name for q in queues))
        return self._routes.keep(topic, (queues, label, stored), (label, stored.subscriptions))

    async def _publish_slowly(self, batch: Sequence[Envelope], wait_s: float) -> Sequence[Stored]:
        """The general case: known ids, delays, expiry, full queues."""
        started = self._clock.monotonic()
        waiter = Waiter(max((envelope.priority for envelope in batch), default=0), next(self._sequence))
        line: Queue | None = None
        try:
            while True:
                recognised, fresh = self._recognise(batch)
                waited_s = self._clock.monotonic() - started
                if wait_s - waited_s < _ROUNDING_S:
                    break  # a rest too small to move a clock would be waited for, for ever
                full = self._first_full(_by_queue(fresh), waiter)
                if full is None:
                    break
                if full is not line:
                    if line is not None:
                        line.leave(waiter)
                    full.join(waiter)
                    line = full
                await self._wait_for_room(waiter, wait_s - waited_s)
            return self._admit(recognised, fresh, waited_s, line)
        finally:
            if line is not None:
                line.leave(waiter)

    def _admit(
        self, recognised: Recognised, fresh: list[tuple[Envelope, _Route]], waited_s: float, line: Queue | None
    ) -> Sequence[Stored]:
        """Store a batch that need not wait, or has waited long enough. Raises QueueFull."""
        now = self._clock.wall()
        incoming = _by_queue(fresh)
        for queue in incoming:
            self._look_at(queue, now)
        todo = plans(
            {queue: [fresh[place][0].priority for place in places] for queue, places in incoming.items()},
            may_grow=self.may_grow,
        )
        refused = next((plan.queue for plan in todo if plan.step.rung is Rung.REFUSE), None)
        if line is not None:
            self._listener.state(
                BackpressureApplied(at=now, subscription=line.name, waited_s=waited_s, admitted=refused is None)
            )
        if refused is not None:
            self._listener.state(
                OverflowHandled(at=now, subscription=refused.name, action="refuse", capacity=refused.capacity)
            )
            raise QueueFull(refused.name, refused.capacity, waited_s)
        facts: list[Fact] = []
        left_out: set[tuple[Queue, int]] = set()
        for plan in todo:
            queue = plan.queue
            facts += make_room(plan, self._bury, now)
            if plan.step.rung is Rung.EXPAND:
                self._arm(min(_WALL_LOOK_S, queue.spec.overflow.expand_for))
            left_out.update((queue, incoming[queue][place]) for place in plan.left_out)
        self._known.remember(recognised)
        for place, (envelope, (queues, label, _)) in enumerate(fresh):
            for queue in queues:
                delivery = Delivery(envelope, queue.name, label, 0, next(self._sequence))
                queue.accepted += 1
                if (queue, place) in left_out:
                    report = unconsumed_report(delivery, queue.capacity, now)
                    self._bury(queue, delivery, report, "overflow", now)
                    facts += overflowed(queue.name, queue.capacity, delivery, report, now)
                else:
                    self._accept(queue, delivery)
        for fact in facts:
            self._listener.state(fact)
        return recognised.stored

    def _recognise(self, batch: Sequence[Envelope]) -> tuple[Recognised, list[tuple[Envelope, _Route]]]:
        """What of `batch` is known, and the rest with its routes. Raises MessageConflict."""
        routes = [self._routes.get(envelope.topic) or self._route(envelope.topic) for envelope in batch]
        recognised = self._known.look(batch, [route[2].subscriptions for route in routes], self._clock.wall())
        return recognised, [(batch[place], routes[place]) for place in recognised.new]

    def _first_full(self, incoming: dict[Queue, list[int]], waiter: Waiter) -> Queue | None:
        """The first queue that the publish has to wait for: for room, or for those who are to have it first."""
        now = self._clock.wall()
        for queue, places in incoming.items():
            self._look_at(queue, now)
            rung = next_rung(
                pending=queue.pending,
                incoming=len(places),
                capacity=queue.capacity,
                waited_s=0.0,
                wait_max_s=1.0,
                consumed=queue.consumed,
            )
            if rung is Rung.SLOW or queue.ahead(waiter):
                return queue
        return None

    async def _wait_for_room(self, waiter: Waiter, at_most_s: float) -> None:
        waiter.room = room = self._loop.create_future()
        timer = self._loop.call_later(at_most_s, _give_up, room)
        try:
            await room
        finally:
            timer.cancel()

    def _eased(self, queue: Queue) -> None:
        """`queue` holds one less, and somebody waits for that, or it had grown."""
        self._look_at(queue, self._clock.wall())
        queue.wake_publisher()

    def _look_at(self, queue: Queue, now: float) -> None:
        """If `queue` has grown: find out how much it takes now, and whether it is over."""
        if not queue.expanded_until:
            return
        queue.stretch(now)
        if queue.contract(now):
            self._listener.state(
                OverflowHandled(at=now, subscription=queue.name, action="contract", capacity=queue.capacity)
            )

    def _accept(self, queue: Queue, delivery: Delivery) -> None:
        queue.pending += 1
        envelope = delivery.envelope
        if envelope.expires_at:
            self._watch(queue, delivery)
        if envelope.due_at > self._clock.wall():
            heapq.heappush(queue.scheduled, (envelope.due_at, delivery.handle, delivery))
            self._arm(min(_WALL_LOOK_S, envelope.due_at - self._clock.wall()))
        else:
            queue.put(delivery)

    def _watch(self, queue: Queue, delivery: Delivery) -> None:
        """See that `delivery` expires in time while it waits."""
        queue.expiring.add(delivery.handle)
        expires_at = delivery.envelope.expires_at
        heapq.heappush(self._expiring, (expires_at, next(self._sequence), delivery.handle, queue))
        self._arm(min(_WALL_LOOK_S, expires_at - self._clock.wall() + _EXPIRY_GROUP_S))

    # Claiming and settling

    def hold_back_low(self, name: str, held: bool, /) -> None:
        queue = self._queues.get(name)
        if queue is not None:
            queue.turn.hold_back_low(held)
            for _ in range(0 if held else min(len(queue.claimers), len(queue.ready[Priority.LOW]))):
                queue.wake()

    def claim_now(self, name: str, /) -> Delivery | None:
        queue = self._queues.get(name) or self._queue(name)
        pending = queue.pending
        if not pending or queue.held:
            return None
        lane = queue.normal
        if len(lane) != pending:
            return self._claim_in_turn(queue, queue.turn.order())
        # Nothing but NORMAL waits, nearly always: then it is nobody else's turn.
        delivery = lane[0]
        envelope = delivery.envelope
        if envelope.expires_at or envelope.key is not None or queue.crowded:
            return self._claim_in_turn(queue, _NORMAL_ONLY)
        lane.popleft()
        queue.pending = pending - 1
        delivery.attempt += 1
        queue.in_flight.add(delivery)
        return delivery

    def _claim_in_turn(self, queue: Queue, order: Sequence[int]) -> Delivery | None:
        for priority in order:
            lane = queue.ready[priority]
            while lane:
                delivery = lane.popleft()
                envelope = delivery.envelope
                if envelope.expires_at and envelope.expires_at <= self._clock.wall():
                    self._expire(queue, delivery)
                    continue
                if envelope.key is not None and not queue.take_key(delivery):
                    continue
                if envelope.expires_at:
                    queue.expiring.discard(delivery.handle)
                queue.pending -= 1
                if queue.crowded:
                    self._eased(queue)
                delivery.attempt += 1
                queue.in_flight.add(delivery)
                return delivery
        return None

    async def claim(self, name: str, /) -> Delivery:
        while True:
            queue = self._queue(name)  # looked up again: it may have been forgotten
            delivery = self.claim_now(name)
            if delivery is not None:
                return delivery
            claimer = self._loop.create_future()
            queue.claimers.append(claimer)
            try:
                await claimer
            except asyncio.CancelledError:
                if claimer.done() and not claimer.cancelled():
                    queue.wake()  # the wake-up was meant for somebody who can use it
                raise

    def handled_now(self, delivery: Delivery, /) -> bool:
        queue = self._queues.get(delivery.subscription)
        if queue is None or delivery.envelope.key is not None:
            return False
        try:
            queue.in_flight.remove(delivery)
        except KeyError:
            return False
        queue.handled += 1
        return True

    def settle(self, delivery: Delivery, decision: Decision, recorded: Recorded, /) -> None:
        queue = self._queues.get(delivery.subscription)
        if queue is None or delivery not in queue.in_flight:
            recorded(delivery, decision, False)
            return
        queue.in_flight.remove(delivery)
        state = decision.state
        key = delivery.envelope.key
        if state is _HANDLED:
            queue.handled += 1
            if key is None:
                recorded(delivery, decision, True)
                return
        else:
            self._settle_otherwise(queue, delivery, decision)
        if key is not None and state is not State.READY and not (queue.spec.strict_key and state is State.RETRYING):
            queue.free_key(key)
        recorded(delivery, decision, True)

    def _settle_otherwise(self, queue: Queue, delivery: Delivery, decision: Decision) -> None:
        delivery = _next_attempt(delivery, decision)
        if delivery.envelope.expires_at and decision.state in (State.READY, State.RETRYING):
            self._watch(queue, delivery)
        match decision.state:
            case State.READY:
                queue.pending += 1
                key = delivery.envelope.key
                if key is not None:
                    queue.busy[key] = delivery
                queue.put(delivery, first=True)
            case State.RETRYING:
                queue.pending += 1
                key = delivery.envelope.key
                if key is not None and queue.spec.strict_key:
                    queue.busy[key] = delivery
                due = self._clock.monotonic() + decision.delay_s
                heapq.heappush(queue.later, (due, delivery.handle, delivery))
                self._arm(decision.delay_s)
            case State.DEAD_LETTERED:
                assert decision.report is not None
                self._bury(queue, delivery, decision.report, decision.reason, self._clock.wall())
            case State.EXPIRED:
                queue.expired += 1
            case State.DISCARDED:
                queue.discarded += 1
            case _:
                raise AssertionError(f"a delivery in flight cannot become {decision.state}")

    def _bury(self, queue: Queue, delivery: Delivery, report: ErrorReport, reason: str, now: float) -> None:
        identity = str(next(self._sequence))  # later than every earlier one, so that ids sort by death
        queue.dead[identity] = DeadLetterRecord(
            id=identity,
            envelope=delivery.envelope,
            subscription=queue.name,
            destination=delivery.destination,
            attempts=delivery.attempt,
            report=report,
            reason=reason,
            died_at=now,
            first_failed_at=delivery.first_failed_at,
            replays=delivery.replays,
        )

    async def flush(self) -> None:
        """Settlements are recorded as they are handed over."""

    # Time

    def _arm(self, in_s: float) -> None:
        at = self._loop.time() + max(0.0, in_s)
        if at < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            self._timer = self._loop.call_at(at, self._tick)

    def _tick(self) -> None:
        """Make ready what is due, expire what is over, and set the timer for what comes next."""
        self._timer, self._timer_at = None, float("inf")
        wall, monotonic = self._clock.wall(), self._clock.monotonic()
        for queue in self._queues.values():
            while queue.later and queue.later[0][0] <= monotonic:
                # To the back: in an outage the probes then go round, and no message spends its attempts alone.
                queue.put(heapq.heappop(queue.later)[2])
            while queue.scheduled and queue.scheduled[0][0] <= wall:
                queue.put(heapq.heappop(queue.scheduled)[2])
            self._look_at(queue, wall)
            if is_expanded(queue.spec.overflow, queue.expanded_until, wall):
                self._arm(min(_WALL_LOOK_S, queue.expanded_until - wall))
            if queue.later:
                self._arm(queue.later[0][0] - monotonic)
            if queue.scheduled:
                self._arm(min(_WALL_LOOK_S, queue.scheduled[0][0] - wall))
        over: dict[Queue, set[int]] = {}
        while self._expiring and self._expiring[0][0] <= wall:
            _, _, handle, queue = heapq.heappop(self._expiring)
            if handle in queue.expiring:  # else it is in flight, or settled
                over.setdefault(queue, set()).add(handle)
        for queue, handles in over.items():
            if self._queues.get(queue.name) is queue:
                for delivery in queue.take_out(handles):
                    self._expire(queue, delivery)
        if self._expiring:
            self._arm(min(_WALL_LOOK_S, self._expiring[0][0] - wall + _EXPIRY_GROUP_S))

    def _expire(self, queue: Queue, delivery: Delivery) -> None:
        queue.pending -= 1
        queue.expired += 1
        queue.expiring.discard(delivery.handle)
        queue.let_go(delivery)
        if queue.crowded:
            self._eased(queue)
        self._listener.state(DeliveryExpired(at=self._clock.wall(), delivery=delivery))

    # Looking

    def ledger(self) -> Ledger:
        return Ledger({name: queue.account() for name, queue in self._queues.items()}, self._gone)

    def queues(self) -> dict[str, QueueState]:
        return {name: self._state(queue) for name, queue in self._queues.items()}

    def _state(self, queue: Queue) -> QueueState:
        heads = [lane[0].envelope.published_at for lane in queue.ready if lane]
        timed = [d.envelope.published_at for _, _, d in queue.later]
        timed += [d.envelope.published_at for waiting in queue.waiting_for_key.values() for _, _, d in waiting]
        return QueueState(
            spec=queue.spec,
            hold=queue.hold,
            consumers=int(queue.consumed),
            oldest_at=min([*heads, *timed], default=0.0),
            dead_letter_oldest_at=min((r.died_at for r in queue.dead.values()), default=0.0),
            expanded_to=queue.capacity if queue.capacity != queue.spec.capacity else 0,
            expanded_until=queue.expanded_until,
        )

    async def audit(self) -> Audit:
        ledger = self.ledger()
        problems = [
            f"{account.unaccounted} deliveries of {name!r} are unaccounted for"
            for name, account in ledger.accounts.items()
            if account.unaccounted
        ]
        messages = len({d.envelope.id for q in self._queues.values() for d in q.held_deliveries()})
        return Audit(ledger, ledger, messages, tuple(problems))

    async def probe(self) -> float:
        started = time.perf_counter()
        await asyncio.sleep(0)
        return time.perf_counter() - started

    def disk_free_bytes(self) -> int | None:
        return None

    # Dead letters

    async def locate(self, message_id: str, /) -> Whereabouts | None:
        now, monotonic = self._clock.wall(), self._clock.monotonic()
        return locate(self._queues.values(), message_id, now, monotonic)

    async def ids_like(self, beginning: str, limit: int, /) -> list[str]:
        return ids_like(self._queues.values(), beginning)[:limit]

    async def dead_letters(self, wanted: DeadLetterFilter, limit: int, /) -> list[DeadLetterRecord]:
        records = [r for queue in self._queues.values() for r in queue.dead.values() if wanted_by(wanted, r)]
        records.sort(key=lambda r: int(r.id), reverse=True)
        return records[:limit]

    async def replay(self, ids: Sequence[str], /) -> list[DeadLetterRecord]:
        moved = self._dug_up(ids)
        for record in moved:
            queue = self._queues[record.subscription]
            del queue.dead[record.id]
            envelope = msgspec.structs.replace(record.envelope, expires_at=0.0)
            delivery = Delivery(
                envelope, record.subscription, record.destination, 0, int(record.id), replays=record.replays + 1
            )
            self._accept(queue, delivery)
        return moved

    async def discard(self, ids: Sequence[str], /) -> list[DeadLetterRecord]:
        removed = self._dug_up(ids)
        for record in removed:
            queue = self._queues[record.subscription]
            del queue.dead[record.id]
            queue.discarded += 1
        return removed

    def _dug_up(self, ids: Sequence[str]) -> list[DeadLetterRecord]:
        by_id = {r.id: r for queue in self._queues.values() for r in queue.dead.values()}
        unknown = [i for i in ids if i not in by_id]
        if unknown:
            raise UnknownDeadLetter(f"no dead letter {', '.join(map(repr, unknown))}")
        return [by_id[i] for i in dict.fromkeys(ids)]


def _by_queue(fresh: list[tuple[Envelope, _Route]]) -> dict[Queue, list[int]]:
    """Where each queue's part of a batch is."""
    places: dict[Queue, list[int]] = {}
    for place, (_, (queues, _, _)) in enumerate(fresh):
        for queue in queues:
            places.setdefault(queue, []).append(place)
    return places


def _give_up(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _next_attempt(delivery: Delivery, decision: Decision) -> Delivery:
    """A fresh object for what follows, so that the facts of this attempt keep theirs unchanged."""
    return Delivery(
        delivery.envelope,
        delivery.subscription,
        delivery.destination,
        decision.attempt,
        delivery.handle,
        first_failed_at=decision.first_failed_at,
        recovering=decision.recovering,
        replays=delivery.replays,
    )
