"""The age of a message runs from when it was due, not from its publish: a delay that was asked for is not lateness."""

from __future__ import annotations

import asyncio

import pytest

from glassbus import Message, MessageBus, Retry
from glassbus.record.tally import Tally
from glassbus.testing import VirtualClock, run_virtual


@pytest.mark.parametrize("fails", [False, True], ids=["at once", "after a retry"])
def test_a_delay_is_not_lateness(fails: bool) -> None:
    async def scenario(clock: VirtualClock) -> Tally:
        bus = MessageBus(clock=clock, telemetry=False)
        attempts = 0

        @bus.subscribe("orders.*", retry=Retry(max_attempts=2, immediate=1))
        async def charge(message: Message) -> None:
            nonlocal attempts
            attempts += 1
            if fails and attempts == 1:
                raise ValueError("not yet")

        async with bus:
            await bus.publish("orders.created", {}, delay=3600.0)
            await asyncio.sleep(3601.0)
            await bus.drain()
            (tally,) = bus.tallies()
        return tally

    tally = run_virtual(scenario)
    assert tally.handled == 1
    assert tally.age.total < 60.0
