"""Many failures: health is known throughout, others are served, and nearly everything is handled."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from kit import NEVER, House, play
from prometheus_client import CollectorRegistry

from glassbus import HealthStatus, KillSwitch, Message, PublishError, Retry
from glassbus import facts as f
from glassbus.faults import (
    Between,
    ClockJump,
    Delay,
    DiskFull,
    DropConnection,
    Hang,
    Raise,
    Refuse,
    TelemetryDown,
    inject,
)

KNOWN = {HealthStatus.HEALTHY, HealthStatus.DEGRADED, HealthStatus.CRITICAL}


@pytest.mark.parametrize("fault", [Refuse(), Raise(ValueError, "no"), Raise(MemoryError)], ids=str)
def test_a_thousand_errors_in_a_tight_loop_leave_health_known_and_others_served(fault: Any) -> None:
    async def scenario(house: House) -> None:
        house.subscribe("failing", retry=Retry(max_attempts=1), concurrency=50)
        house.subscribe("fine", concurrency=10)
        await house.bus.start()
        seen: set[HealthStatus] = set()
        with inject(house.bus, fault, "handler:failing") as injection:
            for number in range(1000):
                with contextlib.suppress(PublishError):  # shedding may pause the intake: then it is published later
                    await house.bus.publish("work.a", number)
                seen.add(house.bus.health().status)
            await house.bus.drain(3600)
        accepted = house.bus.ledger().accounts["fine"].accepted
        assert injection.hits == accepted > 0
        assert seen <= KNOWN
        assert house.bus.health().status in KNOWN
        assert len(house.runs) == accepted
        assert house.bus.ledger().accounts["failing"].dead_lettered == accepted
        assert house.bus.journal.statistics()["total_errors"] >= accepted  # and what recoveries have to say
        if not isinstance(fault, Raise) or fault.error is not MemoryError:
            assert accepted == 1000

    play(scenario)


def test_with_the_kill_switch_a_thousand_messages_wait_and_none_is_lost() -> None:
    async def scenario(house: House) -> None:
        switch = KillSwitch(minimum=10, open_for=5.0, probes=2)
        house.subscribe("failing", retry=Retry(max_attempts=5), kill_switch=switch, concurrency=10)
        house.subscribe("fine", concurrency=10)
        await house.bus.start()
        with inject(house.bus, Refuse(), "handler:failing") as injection:
            for number in range(1000):
                await house.bus.publish("work.a", number)
            await asyncio.sleep(60.0)
            assert house.bus.ledger().accounts["fine"].handled == 1000
            assert house.bus.health().status in (HealthStatus.DEGRADED, HealthStatus.CRITICAL)
            assert injection.hits < 100  # what is down is left alone
        await asyncio.sleep(10.0)
        await house.bus.drain(3600)
        total = house.total()
        assert total.handled + total.dead_lettered == 2000
        assert total.dead_lettered < 20
        await asyncio.sleep(600.0)  # success is of the last five minutes
        assert [move.partition(" ")[2] for move in house.health(0.0)] == ["degraded", "healthy"]  # not with each probe

    play(scenario)


def test_half_of_the_handlers_failing_leaves_the_other_half_as_quick_as_ever() -> None:
    async def scenario(house: House) -> None:
        for number in range(8):
            name = f"{'bad' if number % 2 else 'good'}-{number}"
            house.subscribe(name, retry=Retry(max_attempts=3, base_delay=0.1), kill_switch=NEVER, timeout=1.0)
        await house.bus.start()
        with inject(house.bus, Raise(ValueError), "handler:bad-*", probability=0.5, seed=7):
            for number in range(500):
                await house.bus.publish("work.a", number)
                await asyncio.sleep(0.1)
                assert house.bus.health().status in KNOWN
                for name, account in house.bus.ledger().accounts.items():
                    if name.startswith("good"):
                        assert account.handled == number + 1  # nobody waits for those that fail
            await house.bus.drain(600)
        accounts = house.bus.ledger().accounts
        assert all(accounts[name].dead_lettered == 0 for name in accounts if name.startswith("good"))
        bad = [accounts[name] for name in accounts if name.startswith("bad")]
        assert all(account.handled + account.dead_lettered == 500 for account in bad)
        assert 0.08 < sum(account.dead_lettered for account in bad) / 2000 < 0.18  # half, three times in a row

    play(scenario)


# Normal conditions: hours in which networks, disks and services are as they are


POISON = {234, 1777}


@pytest.mark.parametrize(
    ("url", "messages", "lasts_s"),
    [("memory://", 10_000, 10_000.0), ("sqlite:///store.db?durability=process", 2_000, 3_000.0)],
    ids=["memory", "sqlite"],
)
def test_more_than_999_in_1000_are_handled_under_normal_conditions_and_all_are_accounted_for(
    url: str, messages: int, lasts_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of messages to three subscriptions; every fault here passes, but for two messages that are poison."""
    monkeypatch.chdir(tmp_path)
    handled: Counter[tuple[str, str]] = Counter()

    async def scenario(house: House) -> None:
        bus, chance = house.bus, random.Random(11)
        retry = Retry(max_attempts=12, base_delay=0.5, max_delay=30.0)

        async def charge(message: Message[int]) -> None:
            await asyncio.sleep(0.01 + chance.random() * 0.05)
            if message.payload in POISON:
                raise ZeroDivisionError("nobody can mend that")
            handled["charge", message.id] += 1

        async def ship(message: Message[int]) -> None:
            await asyncio.sleep(0.1)
            handled["ship", message.id] += 1

        def archive(message: Message[int]) -> None:
            handled["archive", message.id] += 1

        def away(part: float, for_s: float) -> Between:
            return Between(part * lasts_s, part * lasts_s + for_s)

        for handler in (charge, ship, archive):
            bus.subscribe("orders.*", name=handler.__name__, retry=retry, timeout=2.0, concurrency=4)(handler)
        faults = [
            inject(bus, Refuse(), "handler:charge", probability=0.01, seed=1),  # a bad network
            inject(bus, DropConnection(), "handler:ship", probability=0.005, seed=2),
            inject(bus, Hang(), "handler:charge", probability=0.002, seed=3),  # a call that never comes back
            inject(bus, Delay(1.0), "handler:ship", probability=0.02, seed=4),
            inject(bus, Raise(MemoryError), "handler:archive", probability=0.001, seed=5),
            inject(bus, Refuse(), "handler:ship", schedule=away(0.1, 60)),  # an outage
            inject(bus, Raise(PermissionError), "handler:charge", schedule=away(0.3, 30)),  # a token ran out
            inject(bus, DropConnection(), "transport:publish", probability=0.001, seed=6),
            inject(bus, Refuse(), "transport:*", schedule=away(0.5, 10)),  # a store that is away
            inject(bus, DiskFull(), "disk", schedule=away(0.7, 20)),
            inject(bus, TelemetryDown(), "telemetry", probability=0.5, seed=7),
        ]
        await bus.start()
        with contextlib.ExitStack() as stack:
            for fault in faults:
                stack.enter_context(fault)
            for number in range(messages):
                await publish(house, number)
                await asyncio.sleep(lasts_s / messages)
                if number == messages * 4 // 5:
                    stack.enter_context(inject(bus, ClockJump(1800.0), "clock"))
            await asyncio.sleep(120.0)
            await bus.drain(600)
        assert all(fault.hits for fault in faults)
        total = bus.ledger().total
        assert total.accepted == 3 * messages
        assert (total.pending, total.in_flight, total.expired, total.discarded) == (0, 0, 0, 0)
        assert total.handled + total.dead_lettered == total.accepted
        assert total.handled / total.accepted > 0.999
        letters = await bus.dead_letters.list()
        assert {letter.message.payload for letter in letters} == POISON, [one.report for one in letters]
        assert total.dead_lettered == len(POISON)
        assert len(handled) == total.handled  # and those are the very ones
        assert (await bus.audit()).ok
        assert not house.of(f.LedgerUnbalanced)

    play(scenario, url, telemetry=True, registry=CollectorRegistry())


async def publish(house: House, number: int) -> None:
    """As a service does: repeated with the same id until it is known to be stored."""
    while True:
        try:
            await house.bus.publish("orders.created", number, message_id=f"order-{number}")
            return
        except PublishError:
            await asyncio.sleep(0.5)
