"""Pause and forced states: stored with the subscription, felt by every claim."""

from __future__ import annotations

import asyncio

import pytest
from suite import SOON_S, Desk, Store

from glassbus.errors import UnknownSubscription
from glassbus.message import Priority
from glassbus.transport import Hold, hold_back_low


@pytest.mark.parametrize("hold", [Hold(paused=True), Hold(forced="forced_open"), Hold(True, "forced_open")])
def test_while_held_nothing_is_claimed_and_everything_is_kept(store: Store, hold: Hold) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1")
        await desk.transport.set_hold("s", paused=hold.paused, forced=hold.forced)
        await desk.nothing()
        assert desk.transport.claim_now("s") is None
        await desk.publish(b"2")
        assert desk.account().ready == 2
        assert desk.transport.queues()["s"].hold == hold
        claims = [asyncio.ensure_future(desk.transport.claim("s")) for _ in range(2)]
        await asyncio.sleep(SOON_S)
        await desk.transport.set_hold("s", paused=False, forced="")
        async with asyncio.timeout(SOON_S):
            assert {d.envelope.body for d in await asyncio.gather(*claims)} == {b"1", b"2"}
        assert desk.ears.holds == [("s", hold), ("s", Hold(False, ""))]

    store.run(scenario)


def test_a_disabled_breaker_holds_nothing(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1")
        await desk.transport.set_hold("s", paused=False, forced="disabled")
        assert (await desk.claim()).attempt == 1

    store.run(scenario)


def test_who_waits_already_is_held_too(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        claiming = asyncio.ensure_future(desk.transport.claim("s"))
        await asyncio.sleep(0)
        await desk.transport.set_hold("s", paused=True)
        await desk.publish(b"1")
        await asyncio.sleep(SOON_S)
        assert not claiming.done()
        await desk.transport.set_hold("s", paused=False, forced="")
        async with asyncio.timeout(SOON_S):
            assert (await claiming).envelope.body == b"1"

    store.run(scenario)


def test_a_held_delivery_in_flight_can_be_settled(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1")
        delivery = await desk.claim()
        await desk.transport.set_hold("s", paused=True)
        assert await desk.handled(delivery)
        assert desk.account().handled == 1

    store.run(scenario)


def test_a_hold_is_of_one_subscription(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare("held", "orders.*")
        await desk.declare("free", "orders.*")
        await desk.publish(b"1")
        await desk.transport.set_hold("held", paused=True)
        await desk.claim("free")
        await desk.nothing("held")

    store.run(scenario)


def test_declaring_again_tells_the_stored_hold(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        assert await desk.declare() == Hold()
        await desk.transport.set_hold("s", paused=True, forced="disabled")
        assert await desk.declare() == Hold(True, "disabled")

    store.run(scenario)


def test_an_unknown_subscription_cannot_be_held(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        with pytest.raises(UnknownSubscription):
            await desk.transport.set_hold("nobody", paused=True)

    store.run(scenario)


def test_low_priority_can_be_held_back_alone_and_is_handed_out_again(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        if not hold_back_low(desk.transport, "nothing yet", False):
            pytest.skip("this transport hands out every priority or none")
        await desk.declare()
        hold_back_low(desk.transport, "s", True)
        claiming = asyncio.ensure_future(desk.transport.claim("s"))
        await asyncio.sleep(SOON_S)
        await desk.publish(b"low 1", priority=Priority.LOW)
        await asyncio.sleep(SOON_S)
        assert not claiming.done()
        await desk.publish(b"first")
        async with asyncio.timeout(SOON_S):
            assert (await claiming).envelope.body == b"first"
        waiting = [asyncio.ensure_future(desk.transport.claim("s")) for _ in range(2)]
        await desk.publish(b"low 2", priority=Priority.LOW)
        await asyncio.sleep(SOON_S)
        assert not any(claim.done() for claim in waiting)
        await desk.publish(b"normal")
        await desk.publish(b"high", priority=Priority.HIGH)
        async with asyncio.timeout(SOON_S):
            assert {d.envelope.body for d in await asyncio.gather(*waiting)} == {b"normal", b"high"}
        assert desk.account().ready == 2
        waiting = [asyncio.ensure_future(desk.transport.claim("s")) for _ in range(2)]
        await asyncio.sleep(SOON_S)
        hold_back_low(desk.transport, "s", False)
        async with asyncio.timeout(SOON_S):
            assert {d.envelope.body for d in await asyncio.gather(*waiting)} == {b"low 1", b"low 2"}

    store.run(scenario)
