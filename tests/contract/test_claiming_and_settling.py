"""Claims take each delivery once, settlements are recorded once, and nothing is lost in between."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from suite import SOON_S, Desk, Store

from glassbus.errors import UnknownSubscription
from glassbus.facts import Delivery, DeliveryDiscarded
from glassbus.policy.delivery import Decision, State


def test_a_claim_counts_the_attempt_and_takes_the_delivery(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1")
        delivery = await desk.claim()
        assert delivery.attempt == 1
        account = desk.account()
        assert (account.accepted, account.ready, account.in_flight) == (1, 0, 1)
        await desk.nothing()
        assert await desk.handled(delivery)
        account = desk.account()
        assert (account.in_flight, account.handled) == (0, 1)

    store.run(scenario)


def test_a_claim_waits_for_what_is_published_later(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        claiming = asyncio.ensure_future(desk.transport.claim("s"))
        await asyncio.sleep(100)
        assert not claiming.done()
        await desk.publish(b"1")
        async with asyncio.timeout(SOON_S):
            assert (await claiming).envelope.body == b"1"

    store.run(scenario)


def test_claim_now_takes_what_is_there_or_nothing(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        assert desk.transport.claim_now("s") is None
        await desk.publish(b"1")
        delivery = desk.transport.claim_now("s") or await desk.claim()
        assert delivery.attempt == 1
        assert desk.transport.claim_now("s") is None
        assert await desk.handled(delivery)

    store.run(scenario)


@pytest.mark.parametrize("key", [None, "k"])
def test_handled_now_records_or_does_nothing(store: Store, key: str | None) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1", key=key)
        delivery = await desk.claim()
        recorded = desk.transport.handled_now(delivery)
        assert (desk.account().in_flight, desk.account().handled) == ((0, 1) if recorded else (1, 0))
        # It is settled once, whoever settles it first.
        assert await desk.handled(delivery) is not recorded
        assert not desk.transport.handled_now(delivery)
        assert (desk.account().in_flight, desk.account().handled) == (0, 1)

    store.run(scenario)


def test_publish_now_stores_or_does_nothing(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=2)
        for n in range(4):
            before = desk.account().accepted
            stored = desk.transport.publish_now(desk.envelope(str(n)))
            assert stored is None or stored.subscriptions == ("s",)
            await desk.transport.flush()
            assert desk.account().accepted == before + (stored is not None)
        assert desk.account().accepted <= 2
        assert desk.transport.publish_now(desk.envelope(b"x", id="x", remember=True)) is None

    store.run(scenario)


@pytest.mark.parametrize("full", ["a", "b"])
def test_publish_now_stores_in_all_queues_or_in_none(store: Store, full: str) -> None:
    async def scenario(desk: Desk) -> None:
        for name in ("a", "b"):
            await desk.declare(name, capacity=1 if name == full else 5)
        await desk.publish(b"1")
        assert desk.transport.publish_now(desk.envelope("2")) is None
        await desk.transport.flush()
        assert [desk.account(name).accepted for name in ("a", "b")] == [1, 1]

    store.run(scenario)


@pytest.mark.parametrize("seed", range(5))
def test_many_claimers_get_each_delivery_once(store: Store, seed: int) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        claimed: list[str] = []

        async def work() -> None:
            while True:
                delivery = await desk.transport.claim("s")
                claimed.append(delivery.envelope.id)
                assert await desk.handled(delivery)

        workers = [asyncio.ensure_future(work()) for _ in range(7)]
        for _ in range(10):
            await desk.publish(*(b"x" for _ in range(10)))
            await asyncio.sleep(0.01)
        await asyncio.sleep(SOON_S)
        assert len(claimed) == len(set(claimed)) == 100
        assert desk.account().handled == 100
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    store.run(scenario, seed=seed)


def test_an_unknown_subscription_cannot_be_claimed_from(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        with pytest.raises(UnknownSubscription):
            await desk.claim("nobody")

    store.run(scenario)


@pytest.mark.parametrize("steps", range(8))
def test_a_claim_cancelled_anywhere_loses_nothing_and_charges_nothing(store: Store, steps: int) -> None:
    """Three claimers, of whom two are cancelled while messages arrive: all comes to whoever is left, at attempt 1."""

    async def scenario(desk: Desk) -> None:
        await desk.declare()
        claims = [asyncio.ensure_future(desk.transport.claim("s")) for _ in range(3)]
        await asyncio.sleep(0)
        publishing = asyncio.ensure_future(desk.publish(b"1", b"2"))
        for _ in range(steps):
            await asyncio.sleep(0)
        claims[0].cancel()
        claims[1].cancel()
        await publishing
        done = await asyncio.gather(*claims[:2], return_exceptions=True)
        got = [d for d in done if isinstance(d, Delivery)]
        while len(got) < 2:
            async with asyncio.timeout(SOON_S):
                got.append(await claims[2] if not any(d in got for d in _result(claims[2])) else await desk.claim())
        assert {d.envelope.body for d in got} == {b"1", b"2"}
        assert [d.attempt for d in got] == [1, 1]
        claims[2].cancel()
        await asyncio.gather(claims[2], return_exceptions=True)
        for delivery in got:
            assert await desk.handled(delivery)

    store.run(scenario)


def _result(claim: asyncio.Future[Delivery]) -> list[Delivery]:
    return [claim.result()] if claim.done() and not claim.cancelled() else []


# Settling


@pytest.mark.needs("delay")
def test_a_retry_comes_back_when_it_is_due_with_what_travels_with_it(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1")
        first = await desk.claim()
        failed_at = desk.clock.wall()
        assert await desk.retrying(first, 30.0)
        assert desk.account().retrying == 1
        await desk.nothing(within_s=29.9)
        second = await desk.claim()
        assert desk.clock.wall() - failed_at == pytest.approx(30, abs=0.2)
        assert second.attempt == 2
        assert second.recovering == ("timeout_error", "delayed_retry")
        assert second.first_failed_at == pytest.approx(failed_at)
        assert second.envelope == first.envelope
        assert first.attempt == 1  # the facts of the first attempt keep theirs
        assert await desk.handled(second)

    store.run(scenario)


def test_an_immediate_retry_is_there_at_once_and_counts(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1", b"2")
        for attempt in (1, 2, 3):
            delivery = await desk.claim()
            assert (delivery.envelope.body, delivery.attempt) == (b"1", attempt)
            decision = Decision(
                State.READY,
                attempt,
                recovering=("connection_error", "immediate_retry"),
                first_failed_at=desk.clock.wall(),
            )
            assert await desk.settle(delivery, decision)
        assert (await desk.claim()).attempt == 4

    store.run(scenario)


def test_what_is_given_back_is_not_charged_and_goes_first(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1", b"2")
        assert await desk.given_back(await desk.claim())
        assert desk.account().ready == 2
        again = await desk.claim()
        assert (again.envelope.body, again.attempt, again.redelivered) == (b"1", 1, "")

    store.run(scenario)


@pytest.mark.parametrize(
    ("state", "place"), [(State.HANDLED, "handled"), (State.EXPIRED, "expired"), (State.DISCARDED, "discarded")]
)
def test_a_settled_delivery_is_gone_and_counted(store: Store, state: State, place: str) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1")
        assert await desk.settle(await desk.claim(), Decision(state, 1))
        account = desk.account()
        assert (getattr(account, place), account.in_flight, account.pending, account.settled) == (1, 0, 0, 1)
        await desk.nothing()

    store.run(scenario)


def test_the_second_settlement_of_one_claim_is_refused_and_changes_nothing(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1")
        first = await desk.claim()
        assert await desk.handled(first)
        assert not await desk.handled(first)
        assert not await desk.dead(first)
        await desk.publish(b"2")
        second = await desk.claim()
        assert await desk.retrying(second, 0.0)
        third = await desk.claim()  # the same delivery, claimed again
        assert not await desk.handled(second)  # the claim of before is void
        assert desk.account().handled == 1
        assert await desk.handled(third)
        assert desk.account().handled == 2

    store.run(scenario)


def test_settlements_handed_over_together_are_all_recorded_by_flush(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(*(b"x" for _ in range(50)))
        answers: list[bool] = []
        for n in range(50):
            delivery = await desk.claim()
            decision = Decision(State.HANDLED, 1) if n % 2 else Decision(State.RETRYING, 1, delay_s=1000.0)
            desk.transport.settle(delivery, decision, lambda _d, _c, accepted: answers.append(accepted))
        await desk.transport.flush()
        assert answers == [True] * 50
        account = desk.account()
        assert (account.handled, account.retrying, account.in_flight) == (25, 25, 0)

    store.run(scenario)


# Forgetting


def test_a_forgotten_subscription_is_gone_with_all_it_held(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.declare("kept", "orders.*")
        await desk.publish(*(str(n) for n in range(6)))
        assert await desk.handled(await desk.claim())
        assert await desk.dead(await desk.claim())
        assert await desk.retrying(await desk.claim(), 1000)
        in_flight = await desk.claim()
        assert await desk.transport.forget("s") == 5
        assert not await desk.handled(in_flight)
        ledger = desk.transport.ledger()
        assert set(ledger.accounts) == {"kept"}
        assert (ledger.gone.accepted, ledger.gone.handled, ledger.gone.discarded) == (6, 1, 5)
        assert Counter(f.reason for f in desk.ears.recorder.of(DeliveryDiscarded)) == {"forgotten": 4}
        assert (await desk.publish(b"later"))[0].subscriptions == ("kept",)
        assert await desk.dead_letters(subscription="s") == []
        with pytest.raises(UnknownSubscription):
            await desk.transport.forget("s")
        with pytest.raises(UnknownSubscription):
            await desk.claim()

    store.run(scenario)


def test_who_waits_to_claim_from_a_forgotten_subscription_is_told(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        claims = [asyncio.ensure_future(desk.transport.claim("s")) for _ in range(2)]
        await asyncio.sleep(1)
        await desk.transport.forget("s")
        async with asyncio.timeout(SOON_S):
            told = await asyncio.gather(*claims, return_exceptions=True)
        assert [type(t) for t in told] == [UnknownSubscription] * 2

    store.run(scenario)


def test_a_name_can_be_used_again_after_forget(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1")
        await desk.transport.forget("s")
        await desk.declare()
        assert desk.account().accepted == 0
        await desk.publish(b"2")
        assert (await desk.claim()).envelope.body == b"2"
        assert desk.transport.ledger().total.accepted == 2

    store.run(scenario)


# Declaring


def test_declaring_again_changes_the_pattern_and_keeps_the_messages(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(pattern="orders.created")
        await desk.publish(b"1", topic="orders.created")
        await desk.declare(pattern="orders.changed")
        assert (await desk.publish(b"2", topic="orders.created"))[0].subscriptions == ()
        assert (await desk.publish(b"3", topic="orders.changed"))[0].subscriptions == ("s",)
        assert [(await desk.claim()).envelope.body for _ in range(2)] == [b"1", b"3"]

    store.run(scenario)


def test_what_is_stored_about_queues_can_be_seen(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare("busy", "orders.*", capacity=7, strict_key=True)
        await desk.declare("idle", "users.>", consume=False)
        first_at = desk.clock.wall()
        await desk.publish(b"1")
        await asyncio.sleep(10)
        await desk.publish(b"2")
        queues = desk.transport.queues()
        assert set(queues) == {"busy", "idle"}
        busy = queues["busy"]
        assert (busy.spec.pattern, busy.spec.capacity, busy.spec.strict_key) == ("orders.*", 7, True)
        assert (busy.consumers, queues["idle"].consumers) == (1, 0)
        assert busy.oldest_at == pytest.approx(first_at, abs=0.1)
        assert queues["idle"].oldest_at == 0.0
        assert await desk.transport.probe() >= 0
        assert desk.transport.address
        assert desk.transport.features == store.features

    store.run(scenario)
