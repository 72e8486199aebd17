"""Faults at the endpoint of a real broker: the connection goes, what is dialled is struck, and nothing is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from glassbus import EndpointRefused, Message, MessageBus, Reconnect
from glassbus.facts import ConnectionLost, ConnectionRestored, RecoveryConcluded
from glassbus.faults import DropConnection, Fault, First, Raise, Refuse, Schedule, inject
from glassbus.testing import RecordingObserver
from tests.nats_kit import shared, store_name

SOON_S = 30.0


@pytest.mark.parametrize(
    ("fault", "options", "failed"),
    [
        (DropConnection(), {}, []),
        (Refuse(), {"schedule": First(3)}, ["reconnect"] * 3),
        (Raise(EndpointRefused, "no such user"), {"schedule": First(1)}, ["reconnect", "refresh_credentials"]),
    ],
    ids=["drop_connection", "refuse", "refused credentials"],
)
def test_a_broker_that_is_lost_is_found_again(
    fault: Fault, options: dict[str, Schedule], failed: list[str], tmp_path: Path
) -> None:
    seen, handled = RecordingObserver(), set[int]()

    async def scenario() -> None:
        bus = MessageBus(
            f"{shared().url}/{store_name(tmp_path)}",
            telemetry=False,
            observers=[seen],
            state_dir=tmp_path / "state",
            reconnect=Reconnect(base_delay=0.01, max_delay=0.1),
        )

        @bus.subscribe("work.*", name="work")
        async def take(message: Message[int]) -> None:
            handled.add(message.payload)

        async with bus:
            await bus.publish("work.a", 0)
            async with inject(bus, fault, "endpoint", **options) as injection:
                await asyncio.sleep(0)
                for number in range(1, 20):  # to the spool, while there is no broker
                    await bus.publish("work.a", number)
                if isinstance(fault, Raise):  # nobody hammers at an endpoint that refused its credentials twice
                    async with asyncio.timeout(SOON_S):
                        while len(seen.of(RecoveryConcluded)) < 2:
                            await asyncio.sleep(0.01)
                    await bus.reconnect()
                async with asyncio.timeout(SOON_S):
                    while not seen.of(ConnectionRestored):
                        await asyncio.sleep(0.01)
            async with asyncio.timeout(SOON_S):
                while len(handled) < 20:
                    await asyncio.sleep(0.01)
            assert injection.hits == (len(failed) if isinstance(fault, Refuse) else 1)
            assert bus.ledger().balanced

    asyncio.run(scenario())
    assert len(seen.of(ConnectionLost)) >= 1
    told: list[Any] = [fact.action for fact in seen.of(RecoveryConcluded) if fact.outcome == "failed"]
    assert told == failed
