"""Scenarios as data, played on a bus with traffic; and the demo's command, which does nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from kit import House, play

from glassbus import ConfigurationError, KillSwitch, PublishError, Retry
from glassbus import facts as f
from glassbus.cli.demo.strike import HANDLERS
from glassbus.faults import JumpingClock
from glassbus.faults.drill import Drill, Drilled, drill
from glassbus.faults.scenarios import SCENARIOS, Scenario, scenario_of, stated

PLAYED = [name for name, scenario in SCENARIOS.items() if not scenario.crash]


async def traffic(house: House) -> None:
    """Ten messages a second, each repeated with its id until it is known to be stored."""
    number = 0
    while True:
        number += 1
        for _ in range(100):
            with contextlib.suppress(PublishError):
                await house.bus.publish("work.a", number, message_id=f"m-{number}")
                break
            await asyncio.sleep(0.5)
        await asyncio.sleep(0.1)


async def played(house: House, scenario: Scenario, **options: Any) -> Drilled:
    house.subscribe(
        timeout=1.0,
        concurrency=4,
        retry=Retry(max_attempts=8, base_delay=0.1, max_delay=2.0),
        kill_switch=KillSwitch(minimum=5, ratio=0.5, open_for=2.0, probes=2),
    )
    await house.bus.start()
    running = asyncio.create_task(traffic(house))
    try:
        await asyncio.sleep(2.0)
        return await drill(house.bus, scenario, handler="work", **options)
    finally:
        running.cancel()


@pytest.mark.parametrize("name", PLAYED)
def test_every_scenario_has_the_consequences_that_it_tells_of(name: str) -> None:
    """And no others that last: the ledger balances, and all of it is handled or rests as a dead letter."""
    scenario = SCENARIOS[name]

    async def plays(house: House) -> Drilled:
        result = await played(house, scenario, hold_s=10.0)
        await asyncio.sleep(30.0)
        await house.bus.drain(300)
        total = house.total()
        assert total.handled + total.dead_lettered == total.accepted >= 20  # some let nothing in
        return result

    capacity = {"capacity": scenario.capacity} if scenario.capacity else {}
    result = play(plays, telemetry=name == "telemetry_down", registry=_registry(), **capacity)
    assert result.missing == ()
    assert result.passed
    assert result.hits > 0
    assert result.held_s == pytest.approx(10.0)
    assert result.healed_after_s < 10.0


def _registry() -> Any:
    from prometheus_client import CollectorRegistry

    return CollectorRegistry()


def test_a_consequence_that_does_not_come_is_named() -> None:
    scenario = Scenario(
        name="odd",
        summary="",
        fault=SCENARIOS["connection_error"].fault,
        target="handler:{handler}",
        while_struck=(stated(f.AttemptFailed), stated(f.DeliveryExpired)),
        once_healed=(stated(f.BreakerStateChanged, to_state="forced_open"),),
    )
    result = play(lambda house: played(house, scenario, hold_s=3.0, within_s=5.0))
    assert result.missing == ("DeliveryExpired", "BreakerStateChanged(to_state=forced_open)")
    assert not result.passed
    assert result.healed_after_s == pytest.approx(5.0, abs=0.1)


def test_a_drill_that_struck_nothing_has_not_passed() -> None:
    async def plays(house: House) -> Drilled:
        house.subscribe()
        await house.bus.start()
        return await drill(house.bus, SCENARIOS["lost_answers"], handler="work", hold_s=1.0)

    result = play(plays)
    assert (result.hits, result.passed) == (0, False)


def test_a_drill_can_be_ended_early() -> None:
    async def plays(house: House) -> Drilled:
        house.subscribe()
        await house.bus.start()
        one = Drill(house.bus, SCENARIOS["slow_disk"], hold_s=1000.0)
        running = asyncio.create_task(one.run())
        await asyncio.sleep(1.0)
        assert one.injection.active
        one.end()
        assert not one.injection.active
        return await running

    assert play(plays).held_s == pytest.approx(1.0)


def test_scenarios_are_known_by_their_names() -> None:
    assert scenario_of("disk_full") is SCENARIOS["disk_full"]
    with pytest.raises(ConfigurationError, match="connection_error, message_processing_error"):
        scenario_of("nonsense")
    with pytest.raises(ConfigurationError, match="has no field"):
        stated(f.AttemptFailed, colour="red")


def test_the_demo_says_whom_each_scenario_of_a_handler_befalls() -> None:
    assert HANDLERS.keys() == {name for name, one in SCENARIOS.items() if "{handler}" in one.target}


def test_the_demo_can_play_a_clock_jump() -> None:
    assert hasattr(JumpingClock(), "jump")
