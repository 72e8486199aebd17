"""Delays, expiry and retries by the right clock; priorities weighted; one at a time for a key."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from suite import Desk, Store

from glassbus.facts import DeliveryExpired

# Time


@pytest.mark.needs("delay")
def test_a_delayed_message_comes_when_it_is_due(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        due_at = desk.clock.wall() + 60
        await desk.publish(b"later", due_at=due_at)
        await desk.publish(b"latest", due_at=due_at + 60)
        await desk.publish(b"now")
        assert (desk.account().scheduled, desk.account().ready) == (2, 1)
        assert (await desk.claim()).envelope.body == b"now"
        await desk.nothing(within_s=59)
        for body, at in ((b"later", due_at), (b"latest", due_at + 60)):
            assert (await desk.claim(within_s=100)).envelope.body == body
            assert desk.clock.wall() == pytest.approx(at, abs=1.1)

    store.run(scenario)


def test_what_is_not_handled_in_time_expires(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"ready", expires_at=desk.clock.wall() + 10)
        await desk.publish(b"lasting")
        await asyncio.sleep(12)
        account = desk.account()
        assert (account.expired, account.ready) == (1, 1)
        (fact,) = desk.ears.recorder.of(DeliveryExpired)
        assert fact.delivery.envelope.body == b"ready"
        assert (await desk.claim()).envelope.body == b"lasting"

    store.run(scenario)


def test_the_retry_of_an_expired_message_is_not_made(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1", expires_at=desk.clock.wall() + 10)
        assert await desk.retrying(await desk.claim(), 60)
        await desk.nothing(within_s=100)
        assert desk.account().expired == 1
        assert desk.stated().count("DeliveryExpired") == 1

    store.run(scenario)


def test_what_is_in_flight_does_not_expire(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1", expires_at=desk.clock.wall() + 10)
        delivery = await desk.claim()
        await asyncio.sleep(20)
        assert desk.account().in_flight == 1
        assert await desk.handled(delivery)
        assert (desk.account().handled, desk.account().expired) == (1, 0)
        assert "DeliveryExpired" not in desk.stated()

    store.run(scenario)


def test_what_expired_before_it_is_given_back_is_not_claimed_again(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1", expires_at=desk.clock.wall() + 10)
        delivery = await desk.claim()
        await asyncio.sleep(20)
        assert await desk.given_back(delivery)
        await desk.nothing()
        assert desk.account().expired == 1

    store.run(scenario)


@pytest.mark.needs("delay")
def test_delays_and_expiry_follow_the_wall_clock_when_it_is_set(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"due", due_at=desk.clock.wall() + 3600)
        await desk.publish(b"over", expires_at=desk.clock.wall() + 3600)
        desk.clock.jump(3601)
        assert (await desk.claim()).envelope.body == b"due"
        await asyncio.sleep(5)
        assert desk.account().expired == 1

    store.run(scenario)


@pytest.mark.needs("delay")
def test_the_wall_clock_set_back_holds_a_delayed_message_back(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"due", due_at=desk.clock.wall() + 10)
        desk.clock.jump(-100)
        await desk.nothing(within_s=60)
        await asyncio.sleep(55)
        assert (await desk.claim()).envelope.body == b"due"

    store.run(scenario)


@pytest.mark.parametrize("jump_s", [3600, -3600])
def test_a_retry_does_not_care_what_the_wall_clock_says(store: Store, jump_s: float) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1")
        assert await desk.retrying(await desk.claim(), 10)
        desk.clock.jump(jump_s)
        await desk.nothing(within_s=9.9)
        assert (await desk.claim()).attempt == 2

    store.run(scenario)


def test_retries_come_back_in_the_order_they_are_due(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(*(str(n) for n in range(5)))
        for delay_s in (5, 3, 1, 4, 2):
            assert await desk.retrying(await desk.claim(), delay_s)
        for body in (b"2", b"4", b"1", b"3", b"0"):
            assert (await desk.claim()).envelope.body == body

    store.run(scenario)


# Order


def test_without_key_or_priority_messages_come_in_the_order_of_acceptance(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        for n in range(0, 30, 3):
            await desk.publish(*(str(m) for m in range(n, n + 3)))
        assert [int((await desk.claim()).envelope.body) for _ in range(30)] == list(range(30))

    store.run(scenario)


@pytest.mark.needs("priorities")
def test_priorities_are_weighted_eight_four_two_one(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        for priority in range(4):
            await desk.publish(*(b"x" for _ in range(30)), priority=priority)
        for _ in range(2):
            got = Counter([(await desk.claim()).envelope.priority for _ in range(15)])
            assert got == {3: 8, 2: 4, 1: 2, 0: 1}

    store.run(scenario)


@pytest.mark.needs("priorities")
def test_the_lowest_never_starves_however_much_more_important_comes(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"low", priority=0)
        await desk.publish(*(b"x" for _ in range(20)), priority=3)
        waited = 0
        while (delivery := await desk.claim()).envelope.priority:
            waited += 1
            await desk.publish(b"more", priority=3)
            assert await desk.handled(delivery)
        assert waited <= 15

    store.run(scenario)


@pytest.mark.needs("priorities")
def test_within_a_priority_acceptance_decides(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        for n in range(40):
            await desk.publish(str(n), priority=n % 4)
        got: dict[int, list[int]] = {}
        for _ in range(40):
            envelope = (await desk.claim()).envelope
            got.setdefault(envelope.priority, []).append(int(envelope.body))
        assert all(bodies == sorted(bodies) for bodies in got.values())

    store.run(scenario)


@pytest.mark.needs("order_with_key")
def test_one_at_a_time_for_a_key_in_order_while_others_go_on(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        for n in range(3):
            await desk.publish(f"a{n}", key="a")
        await desk.publish(b"b0", key="b")
        await desk.publish(b"free")
        first = await desk.claim()
        assert first.envelope.body == b"a0"
        assert {(await desk.claim()).envelope.body for _ in range(2)} == {b"b0", b"free"}
        await desk.nothing()
        assert desk.account().ready == 2
        assert await desk.handled(first)
        second = await desk.claim()
        assert second.envelope.body == b"a1"
        await desk.nothing()
        assert await desk.dead(second)
        assert (await desk.claim()).envelope.body == b"a2"

    store.run(scenario)


@pytest.mark.needs("order_with_key")
def test_freeing_a_key_wakes_who_waits_for_it(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1", b"2", key="k")
        first = await desk.claim()
        waiting = asyncio.ensure_future(desk.claim())
        await asyncio.sleep(1)
        assert not waiting.done()
        assert await desk.handled(first)
        assert (await waiting).envelope.body == b"2"

    store.run(scenario)


@pytest.mark.needs("order_with_key")
def test_a_key_is_of_one_subscription(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare("a", "orders.*")
        await desk.declare("b", "orders.*")
        await desk.publish(b"1", b"2", key="k")
        assert (await desk.claim("a")).envelope.body == b"1"
        assert (await desk.claim("b")).envelope.body == b"1"

    store.run(scenario)


@pytest.mark.needs("order_with_key")
def test_a_waiting_retry_lets_its_key_go_on(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1", b"2", key="k")
        assert await desk.retrying(await desk.claim(), 10)
        second = await desk.claim()
        assert second.envelope.body == b"2"
        await desk.nothing(within_s=20)  # the retry is due, and its key is taken
        assert await desk.handled(second)
        assert (await desk.claim()).envelope.body == b"1"

    store.run(scenario)


@pytest.mark.needs("order_with_key")
@pytest.mark.parametrize("end", ["handled", "dead"])
def test_a_strict_key_is_held_back_while_a_message_of_it_waits_for_retry(store: Store, end: str) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(strict_key=True)
        await desk.publish(b"1", b"2", key="k")
        await desk.publish(b"other", key="l")
        assert await desk.retrying(await desk.claim(), 10)
        assert (await desk.claim()).envelope.body == b"other"
        await desk.nothing(within_s=9)
        again = await desk.claim()
        assert (again.envelope.body, again.attempt) == (b"1", 2)
        await desk.nothing()
        assert await getattr(desk, end)(again)
        assert (await desk.claim()).envelope.body == b"2"

    store.run(scenario)


@pytest.mark.needs("order_with_key")
def test_a_strict_key_is_free_again_when_its_waiting_retry_expires(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(strict_key=True)
        await desk.publish(b"1", key="k", expires_at=desk.clock.wall() + 5)
        await desk.publish(b"2", key="k")
        assert await desk.retrying(await desk.claim(), 60)
        await asyncio.sleep(7)
        assert (await desk.claim()).envelope.body == b"2"

    store.run(scenario)


@pytest.mark.needs("order_with_key")
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_given_back_keeps_its_place_in_its_key(store: Store, strict: bool) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(strict_key=strict)
        await desk.publish(b"1", b"2", b"3", key="k")
        for body in (b"1", b"2", b"3"):
            assert await desk.given_back(await desk.claim())
            again = await desk.claim()
            assert (again.envelope.body, again.attempt) == (body, 1)
            assert await desk.handled(again)

    store.run(scenario)


@pytest.mark.needs("order_with_key")
def test_an_expired_message_in_the_middle_of_a_key_blocks_nobody(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1", key="k")
        await desk.publish(b"2", key="k", expires_at=desk.clock.wall() + 5)
        await desk.publish(b"3", key="k")
        first = await desk.claim()
        waiting = asyncio.ensure_future(desk.transport.claim("s"))
        await asyncio.sleep(10)
        assert await desk.handled(first)
        async with asyncio.timeout(5):
            assert (await waiting).envelope.body == b"3"

    store.run(scenario)


@pytest.mark.needs("order_with_key")
@pytest.mark.parametrize("seed", range(4))
def test_keys_keep_their_order_with_many_claimers(store: Store, seed: int) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        running: set[str | None] = set()
        seen: dict[str | None, list[int]] = {}

        async def work() -> None:
            while True:
                delivery = await desk.transport.claim("s")
                key = delivery.envelope.key
                assert key not in running
                running.add(key)
                await asyncio.sleep(0.01 * (len(seen) % 3))
                seen.setdefault(key, []).append(int(delivery.envelope.body))
                running.discard(key)
                assert await desk.handled(delivery)

        workers = [asyncio.ensure_future(work()) for _ in range(6)]
        for n in range(60):
            await desk.publish(str(n), key=f"k{n % 4}")
        await asyncio.sleep(20)
        for worker in workers:
            worker.cancel()
        ended = await asyncio.gather(*workers, return_exceptions=True)
        assert all(isinstance(e, asyncio.CancelledError) for e in ended), ended
        assert sorted(seen) == ["k0", "k1", "k2", "k3"]
        assert all(numbers == sorted(numbers) and len(numbers) == 15 for numbers in seen.values())

    store.run(scenario, seed=seed)
