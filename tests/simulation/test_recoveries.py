"""Handlers fail in every way while the configuration changes under them: nothing is lost, and all comes to rest."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from glassbus import ConfigurationError, KillSwitch, MessageBus, Priority, PublishRejected, Retry
from glassbus.testing import VirtualClock, run_virtual


class World:
    """What goes wrong, by chance."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def configuration(self) -> Mapping[str, Any]:
        chance = self.chance
        luck = chance.random()
        if luck < 0.1:
            raise SystemExit
        settings: dict[str, Any] = {
            "timeout": -1 if luck < 0.2 else chance.choice([0.5, 1, 3]),
            "concurrency": chance.randint(1, 12),
            "capacity": chance.randint(50, 500),
            "paused": chance.random() < 0.1,
            "retry": {"max_attempts": chance.randint(1, 5)},
        }
        return {"subscriptions": {"s": settings}}

    async def handle(self, payload: int) -> None:
        chance = self.chance
        luck = chance.random()
        await asyncio.sleep(chance.random() * 2)
        for share, error in (
            (0.05, MemoryError()),
            (0.08, ConfigurationError("no such setting")),
            (0.10, KeyboardInterrupt()),
            (0.12, asyncio.CancelledError()),
            (0.15, PermissionError()),
        ):
            if luck < share:
                raise error
        if luck < 0.17:  # ignores that it is cancelled, for a while
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                await asyncio.sleep(chance.random() * 20)

    async def trouble(self, bus: MessageBus) -> None:
        """What operators do, and the messages of one turn."""
        chance = self.chance
        if chance.random() < 0.05:
            with contextlib.suppress(ConfigurationError):  # it is wrong now and then
                await bus.reload()
        if chance.random() < 0.02:
            await bus.pause("s")
        if chance.random() < 0.1:
            await bus.resume("s")
        await asyncio.sleep(chance.random() * 0.5)


@pytest.mark.parametrize("store", ["memory", "sqlite"])
@pytest.mark.parametrize("seed", range(3))
def test_every_message_is_settled_and_every_gauge_comes_to_rest(seed: int, store: str, tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        world = World(seed)
        url = "memory://" if store == "memory" else f"sqlite:///{tmp_path / 'store.db'}"
        bus = MessageBus(url, clock=clock, telemetry=False, seed=seed, configuration=world.configuration)
        bus.subscribe(
            "t",
            name="s",
            timeout=1.0,
            concurrency=4,
            retry=Retry(max_attempts=4, budget_per_second=1e6),
            kill_switch=KillSwitch(minimum=50),
        )(world.handle)
        accepted = 0
        async with bus:
            for n in range(200):
                with contextlib.suppress(PublishRejected):  # counted by what is not accepted
                    await bus.publish(
                        "t", n, priority=world.chance.choice(list(Priority)), key=world.chance.choice([None, "a", "b"])
                    )
                    accepted += 1
                await world.trouble(bus)
            for _ in range(100):
                await bus.resume("s")
                if (await bus.drain()).complete:
                    break
                await asyncio.sleep(5)
            await asyncio.sleep(600)
            account = bus.ledger().accounts["s"]
            assert account.handled + account.dead_lettered == account.accepted == accepted
            assert (await bus.audit()).ok
            [worker] = bus.subscribers()
            assert worker.limit + worker.lost == worker.subscription.concurrency
            assert (worker.sheds, worker.timeout_s) == (False, worker.subscription.timeout)
            assert not bus.intake.paused
            assert {view.state for view in bus.breaker_views()} <= {"closed", "half_open"}

    run_virtual(run, seed=seed, limit_s=1e6)
