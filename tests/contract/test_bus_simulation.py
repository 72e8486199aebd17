"""Whole lives of a bus, drawn from a seed: whatever operators and handlers do, each delivery ends once, and is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import Counter

import pytest
from suite import House, Store

from glassbus import KillSwitch, Message, MessageBus, QueueFull, Retry
from glassbus.facts import (
    AttemptFailed,
    DeadLetterDiscarded,
    DeadLetterReplayed,
    DeliveryDeadLettered,
    DeliveryDiscarded,
    DeliveryExpired,
    DeliveryHandled,
    Fact,
    RecoveryEnded,
    RetryScheduled,
)

#: How many lives to play; a nightly run plays many more.
LIVES = int(os.environ.get("GLASSBUS_LIVES", "6"))
SWITCH = KillSwitch(minimum=4, open_for=2.0, probes=2)
RETRY = Retry(max_attempts=3, base_delay=0.2, max_delay=1.0)

Where = tuple[str, str]


class Life:
    """One store, and the buses that come and go on it."""

    def __init__(self, house: House, seed: int) -> None:
        self.house = house
        self.chance = random.Random(seed)
        self.published = 0
        self.accepted: Counter[Where] = Counter()
        self.resting: set[Where] = set()
        self.runs: Counter[Where] = Counter()

    def bus(self) -> MessageBus:
        chance = self.chance
        bus = self.house.bus(capacity=60, publish_timeout=0.5, seed=chance.randrange(1000))

        async def tired(message: Message) -> None:
            self.runs["tired", message.id] += 1
            await asyncio.sleep(chance.random() * 0.4)
            if chance.random() < 0.3:
                raise ConnectionError("downstream is away")

        async def stubborn(message: Message) -> None:
            self.runs["stubborn", message.id] += 1
            until = self.house.clock.monotonic() + chance.random() * 2
            while (left_s := until - self.house.clock.monotonic()) > 1e-6:
                with contextlib.suppress(asyncio.CancelledError):  # it will not be told
                    await asyncio.sleep(left_s)

        def plain(message: Message) -> None:
            self.runs["plain", message.id] += 1
            if message.payload % 7 == 0:
                raise ValueError("every seventh")

        bus.subscribe("a.>", name="tired", concurrency=3, timeout=0.3, retry=RETRY, kill_switch=SWITCH)(tired)
        bus.subscribe("*.x", name="stubborn", concurrency=2, timeout=0.5, abandon_after=1.5, retry=RETRY)(stubborn)
        bus.subscribe("b.*", name="plain", strict_key=True, retry=RETRY)(plain)
        return bus

    async def live(self) -> None:
        """One bus from its start to its stop."""
        bus = self.bus()
        async with bus:
            for _ in range(self.chance.randrange(30, 100)):
                await self.something(bus)
            if self.chance.random() < 0.5:
                await bus.stop(self.chance.choice([0.0, 0.1, 1.0, 10.0]))

    async def something(self, bus: MessageBus) -> None:
        chance, name = self.chance, self.chance.choice(["tired", "stubborn", "plain"])
        match chance.randrange(20):
            case 0:
                await bus.pause(name)
            case 1 | 2:
                await bus.resume(name)
            case 3:
                await bus.breakers[name].force_open()
            case 4 | 5:
                await bus.breakers[name].reset()
            case 6:
                dead = await bus.dead_letters.list(3)
                await bus.dead_letters.replay(*(d.id for d in dead))
            case 7:
                dead = await bus.dead_letters.list(1)
                await bus.dead_letters.discard(*(d.id for d in dead))
            case 8:
                for task in asyncio.all_tasks():  # somebody's clean-up goes too far
                    if task.get_name().startswith("glassbus:") and chance.random() < 0.3:
                        task.cancel()
            case 9:
                self.house.clock.jump(chance.choice([-30.0, 30.0]))
            case 10:
                with contextlib.suppress(TimeoutError):  # however far it came
                    await bus.drain(timeout=chance.random() * 3)
            case _:
                await self.publish(bus)
        await asyncio.sleep(chance.choice([0, 0, 0.01, 0.2, 1.0]))

    async def publish(self, bus: MessageBus) -> None:
        chance = self.chance
        self.published += 1
        try:
            receipt = await bus.publish(
                chance.choice(["a.x", "a.y.z", "b.x", "c.x", "d"]),
                self.published,
                key=chance.choice([None, None, "k", "l"]),
                delay=chance.choice([0, 0, 0, 1.5]),
                expires_in=chance.choice([None, None, None, 2.0]),
                message_id=chance.choice([None, f"id-{self.published}"]),
            )
        except QueueFull:
            return
        for subscription in receipt.subscriptions:
            self.accepted[subscription, receipt.message_id] += 1

    async def end(self) -> None:
        """A last bus with nothing held back, until nothing is left to do."""
        bus = self.bus()
        async with bus:
            for name in ("tired", "stubborn", "plain"):
                await bus.resume(name)
                await bus.breakers[name].disable()
            for _ in range(50):
                await asyncio.sleep(5)
                if not await bus.drain():
                    break
            ledger = bus.ledger()
            assert ledger.balanced
            assert ledger.total.pending == ledger.total.in_flight == 0
            self.resting = {(d.subscription, d.message.id) for d in await bus.dead_letters.list(10_000)}
        self.check()

    def check(self) -> None:
        resting = self.resting
        ends: Counter[Where] = Counter()
        deaths: Counter[Where] = Counter()
        recoveries: Counter[Where] = Counter()
        for fact in self.house.seen.facts:
            match fact:
                case DeliveryHandled() | DeliveryExpired() | DeliveryDiscarded() | DeadLetterDiscarded():
                    ends[_where(fact)] += 1
                case DeliveryDeadLettered():
                    deaths[_where(fact)] += 1
                case DeadLetterReplayed():
                    deaths[_where(fact)] -= 1
                case RetryScheduled():
                    recoveries[_where(fact)] += 1
                case RecoveryEnded():
                    recoveries[_where(fact)] -= 1
                case AttemptFailed():
                    assert self.runs[_where(fact)] > 0
            if isinstance(fact, DeadLetterDiscarded):
                deaths[_where(fact)] -= 1
        if not self.house.store.backend.keeps:
            # Dead letters went with the memory of the buses that had them, and are no longer to be seen.
            resting = {where for where, count in deaths.items() if count}
        assert {where for where, count in deaths.items() if count} == resting
        assert set(deaths.values()) <= {0, 1}
        assert self.accepted.keys() == ends.keys() | resting
        assert not ends.keys() & resting
        assert set(ends.values()) <= {1}, {where: count for where, count in ends.items() if count > 1}
        # A recovery that was begun has ended, unless its delivery was taken away or expired while it waited.
        assert set(recoveries.values()) <= {0, 1}


def _where(fact: Fact) -> Where:
    delivery = fact.delivery  # type: ignore[union-attr]
    return delivery.subscription, delivery.envelope.id


@pytest.mark.parametrize("seed", range(LIVES))
def test_every_delivery_ends_once_and_is_told(store: Store, seed: int) -> None:
    async def scenario(house: House) -> None:
        life = Life(house, seed)
        for _ in range(3):
            await life.live()
        await life.end()
        assert life.published > 20
        assert sum(life.runs.values()) > 10

    store.run_bus(scenario, seed=seed)


@pytest.mark.parametrize("lie", ["loses one", "tells one twice", "invents one"])
def test_the_check_notices(store: Store, lie: str) -> None:
    async def scenario(house: House) -> None:
        life = Life(house, 0)
        await life.live()
        await life.end()
        told = house.seen.of(DeliveryHandled)
        facts = list(house.seen.facts)
        if lie == "loses one":
            facts.remove(told[0])
        else:
            facts.append(told[-1])
        if lie == "invents one":
            life.accepted.pop(_where(told[-1]))
        house.seen.clear()
        for fact in facts:
            house.seen.on_fact(fact)
        with pytest.raises(AssertionError):
            life.check()

    store.run_bus(scenario)
