"""Close and open again: what is kept is there, what is not kept is said to be gone."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from suite import SOON_S, Desk, Store

from glassbus.errors import BusNotRunning, PublishRejected, PublishUncertain
from glassbus.facts import DeliveryDiscarded
from glassbus.policy.delivery import Decision, State
from glassbus.transport import Hold


async def filled(desk: Desk) -> None:
    """One delivery in each place: in flight, ready, retrying, scheduled, dead, handled; and two of one key."""
    await desk.declare()
    for body in (b"handled", b"dead", b"retrying", b"in flight"):
        await desk.publish(body)
    assert await desk.handled(await desk.claim())
    assert await desk.dead(await desk.claim())
    assert await desk.retrying(await desk.claim(), 100)
    assert (await desk.claim()).envelope.body == b"in flight"
    await desk.publish(b"scheduled", due_at=desk.clock.wall() + 200)
    await desk.publish(b"ready")
    await desk.publish(b"k1", b"k2", key="k")


@pytest.mark.needs("keeps")
def test_everything_held_is_there_at_the_next_open(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await filled(desk)
        kept, discarded = await desk.close()
        assert discarded == 0
        assert kept >= 1
        again = await desk.reopened()
        try:
            await again.declare()
            seen: Counter[bytes] = Counter()
            while len(seen) < 6:
                delivery = await again.claim(within_s=300)
                seen[delivery.envelope.body] += 1
                assert delivery.attempt == {b"retrying": 2}.get(delivery.envelope.body, delivery.attempt)
                assert await again.handled(delivery)
            assert seen == Counter([b"retrying", b"in flight", b"scheduled", b"ready", b"k1", b"k2"])
            assert desk.clock.wall() >= 200
            (record,) = await again.dead_letters()
            assert record.envelope.body == b"dead"
            await again.balanced()
            await again.nothing()
        finally:
            await again.close()

    store.run(scenario)


@pytest.mark.needs("durable")
def test_the_counts_go_on_after_a_reopen(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await filled(desk)
        await desk.declare("other", "orders.*")
        await desk.transport.forget("other")
        before = desk.transport.ledger()
        await desk.close()
        again = await desk.reopened()
        after = again.transport.ledger()
        assert after.gone == before.gone
        assert after.total.accepted == before.total.accepted
        account = again.account()
        assert (account.handled, account.dead_lettered, account.in_flight) == (1, 1, 0)
        assert account.pending == 6
        await again.balanced()
        await again.close()

    store.run(scenario)


@pytest.mark.needs("durable")
def test_subscriptions_holds_and_known_ids_are_kept(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=7, strict_key=True)
        await desk.transport.set_hold("s", paused=True, forced="disabled")
        await desk.publish(desk.envelope(b"1", id="once", remember=True))
        await desk.close()
        again = await desk.reopened()
        state = again.transport.queues()["s"]
        assert state.hold == Hold(True, "disabled")
        assert (state.spec.capacity, state.spec.strict_key, state.consumers) == (7, True, 0)
        (stored,) = await again.publish(again.envelope(b"1", id="once", remember=True))
        assert (stored.duplicate, stored.subscriptions) == (True, ("s",))
        assert (await again.publish(b"2"))[0].subscriptions == ("s",)
        assert await again.declare(capacity=9) == Hold(True, "disabled")
        await again.close()

    store.run(scenario)


@pytest.mark.needs("durable")
def test_a_delay_runs_on_while_the_store_is_closed(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"due", due_at=desk.clock.wall() + 60)
        await desk.publish(b"over", expires_at=desk.clock.wall() + 60)
        await desk.publish(b"failed")
        while (delivery := await desk.claim()).envelope.body != b"failed":
            over = delivery  # back it goes when the one that fails is found
        assert await desk.retrying(delivery, 60)
        assert await desk.given_back(over)
        await desk.close()
        await asyncio.sleep(61)
        again = await desk.reopened()
        await again.declare()
        assert {(await again.claim()).envelope.body for _ in range(2)} == {b"due", b"failed"}
        await again.nothing()
        assert again.account().expired == 1
        await again.close()

    store.run(scenario)


def test_memory_without_a_place_says_what_went_with_it(store: Store) -> None:
    if store.backend.keeps:
        pytest.skip(f"{store.backend.name} keeps what it holds")

    async def scenario(desk: Desk) -> None:
        await filled(desk)
        kept, discarded = await desk.close()
        assert (kept, discarded) == (0, 6)
        facts = desk.ears.recorder.of(DeliveryDiscarded)
        assert {f.reason for f in facts} == {"stopped"}
        assert Counter(f.delivery.envelope.body for f in facts) == Counter(
            [b"retrying", b"in flight", b"scheduled", b"ready", b"k1", b"k2"]
        )
        account = desk.account()
        assert (account.discarded, account.pending, account.in_flight, account.dead_lettered) == (6, 0, 0, 1)

    store.run(scenario)


def test_closing_twice_does_nothing(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await filled(desk)
        await desk.close()
        stated = desk.stated()
        assert await desk.close() == (0, 0)
        assert desk.stated() == stated

    store.run(scenario)


def test_settlements_handed_over_before_a_close_are_recorded(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(*(b"x" for _ in range(20)))
        answers: list[bool] = []
        for _ in range(20):
            delivery = await desk.claim()
            desk.transport.settle(delivery, Decision(State.HANDLED, 1), lambda _d, _c, took: answers.append(took))
        assert await desk.close() == (0, 0)
        assert answers == [True] * 20
        if store.features.durable:
            again = await desk.reopened()
            assert again.account().handled == 20
            await again.close()

    store.run(scenario)


def test_a_publisher_that_waits_for_room_is_told_when_the_store_closes(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=1)
        await desk.publish(b"1")
        waiting = asyncio.ensure_future(desk.publish(b"2", wait_s=1000))
        await asyncio.sleep(1)
        await desk.close()
        with pytest.raises((BusNotRunning, PublishRejected, PublishUncertain)):
            async with asyncio.timeout(SOON_S):
                await waiting

    store.run(scenario)


@pytest.mark.needs("keeps")
@pytest.mark.parametrize("steps", range(6))
def test_closing_at_any_moment_of_a_publish_leaves_it_whole_or_not_there(store: Store, steps: int) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare("a", "orders.*")
        await desk.declare("b", "orders.*")
        publishing = asyncio.ensure_future(desk.publish(b"1", b"2", b"3"))
        for _ in range(steps):
            await asyncio.sleep(0)
        await desk.close()
        (outcome,) = await asyncio.gather(publishing, return_exceptions=True)
        again = await desk.reopened()
        await again.declare("a", "orders.*")
        await again.declare("b", "orders.*")
        accepted = [again.account(name).accepted for name in "ab"]
        if isinstance(outcome, PublishRejected):
            assert accepted == [0, 0]
        elif isinstance(outcome, PublishUncertain):
            assert accepted in ([0, 0], [3, 3])
        else:
            assert accepted == [3, 3], outcome
        await again.balanced()
        await again.close()

    store.run(scenario)
