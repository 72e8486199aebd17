"""The overflow ladder: each rung can be seen, loses nothing, and is taken back."""

from __future__ import annotations

import asyncio

import pytest
from suite import NO_LADDER, Desk, House, Store

from glassbus import Message, MessageBus
from glassbus.config import Overflow
from glassbus.errors import ConfigurationError, QueueFull
from glassbus.facts import (
    BackpressureApplied,
    BreakerStateChanged,
    DeliveryDeadLettered,
    DeliveryExpired,
    OverflowHandled,
    RecoveryConcluded,
    RecoveryStarted,
)
from glassbus.message import Priority

pytestmark = pytest.mark.needs("ladder")

LOW, NORMAL, HIGH, CRITICAL = Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.CRITICAL
DISPLACE = Overflow(expand=1.0)
EXPAND = Overflow(displace=False, expand_for=60.0)


async def put(desk: Desk, *ids: str, priority: int = NORMAL, wait_s: float = 0.0, **more: object) -> None:
    await desk.publish(*(desk.envelope(id=i, priority=priority, **more) for i in ids), wait_s=wait_s)


async def dead(desk: Desk, name: str = "s") -> list[str]:
    """Ids of the dead letters, oldest first."""
    return [record.envelope.id for record in reversed(await desk.dead_letters(subscription=name))]


def actions(desk: Desk) -> list[tuple[str, int]]:
    return [(fact.action, fact.capacity) for fact in desk.ears.recorder.of(OverflowHandled)]


async def all_of(desk: Desk, name: str = "s") -> list[str]:
    """Claim and handle everything that is ready; the ids in that order."""
    ids = []
    while desk.account(name).ready:
        delivery = await desk.claim(name)
        ids.append(delivery.envelope.id)
        assert await desk.handled(delivery)
    return ids


# Displacing


def test_the_lowest_priority_gives_way_and_comes_back(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=4, overflow=DISPLACE)
        await put(desk, "n1", "n2")
        await put(desk, "l1", "l2", priority=LOW)
        await put(desk, "c1", priority=CRITICAL)
        assert await dead(desk) == ["l2"]
        await put(desk, "h1", "h2", priority=HIGH)
        assert await dead(desk) == ["l2", "l1", "n2"]
        account = desk.account()
        assert (account.accepted, account.ready, account.dead_lettered) == (7, 4, 3)
        assert actions(desk) == [("dead_letter", 4)] * 3
        facts = desk.ears.recorder.of(DeliveryDeadLettered)
        assert [(f.delivery.envelope.id, f.reason, f.delivery.attempt) for f in facts] == [
            ("l2", "overflow", 0),
            ("l1", "overflow", 0),
            ("n2", "overflow", 0),
        ]
        (record, *_) = await desk.dead_letters(message_id="l2")
        assert record.report == facts[0].report
        assert (record.reason, record.attempts, record.destination) == ("overflow", 0, "orders.*")
        assert (record.report.category, record.report.component) == ("queue_overflow", "queue")
        assert record.report.fingerprint == "displaced:s"
        assert "LOW message gave way to a CRITICAL one" in record.report.message
        await desk.balanced()
        # The reverse: room is there again, and what gave way is replayed.
        assert len(await all_of(desk)) == 4
        await desk.transport.replay([r.id for r in await desk.dead_letters()])
        assert set(await all_of(desk)) == {"l1", "l2", "n2"}
        assert desk.account().handled == 7

    store.run(scenario)


def test_publishers_are_slowed_before_anything_gives_way(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=1, overflow=DISPLACE)
        await put(desk, "l1", priority=LOW)
        started = desk.clock.monotonic()
        await put(desk, "c1", priority=CRITICAL, wait_s=4)
        assert desk.clock.monotonic() - started == pytest.approx(4, abs=0.5)
        assert await dead(desk) == ["l1"]
        (slowed,) = desk.ears.recorder.of(BackpressureApplied)
        assert (slowed.waited_s, slowed.admitted) == (pytest.approx(4, abs=0.5), True)
        assert desk.stated() == ["BackpressureApplied", "OverflowHandled", "DeliveryDeadLettered"]

    store.run(scenario)


@pytest.mark.parametrize("incoming", [LOW, NORMAL])
def test_equal_and_higher_priorities_never_give_way(store: Store, incoming: int) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=2, overflow=DISPLACE)
        await put(desk, "n1", priority=NORMAL)
        await put(desk, "c1", priority=CRITICAL)
        with pytest.raises(QueueFull):
            await put(desk, "late", priority=incoming)
        assert await dead(desk) == []
        assert actions(desk) == [("refuse", 2)]
        assert await all_of(desk) == ["c1", "n1"]

    store.run(scenario)


def test_a_refused_publish_displaces_nothing_anywhere(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare("able", "orders.*", capacity=2, overflow=DISPLACE)
        await desk.declare("unable", "orders.created", capacity=2, overflow=NO_LADDER)
        await put(desk, "l1", "l2", priority=LOW)
        with pytest.raises(QueueFull) as caught:
            await put(desk, "c1", priority=CRITICAL)
        assert caught.value.subscription == "unable"
        # Of a batch too: one LOW can give way, but there is only one for two.
        await desk.declare("unable", "orders.other", capacity=2)
        delivery = await desk.claim("able")
        await put(desk, "n1")
        with pytest.raises(QueueFull):
            await put(desk, "n2", "n3")
        assert await dead(desk, "able") == []
        assert desk.account("able").accepted == 3
        assert await desk.handled(delivery)

    store.run(scenario)


def test_what_got_in_for_something_is_handed_out_at_once(store: Store) -> None:
    """All that waits is not due, so consumers are idle."""

    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=2, overflow=DISPLACE)
        await put(desk, "d1", "d2", priority=LOW, due_at=desk.clock.wall() + 500)
        claiming = asyncio.ensure_future(desk.claim(within_s=1000))
        await asyncio.sleep(1)
        async with asyncio.timeout(0.1):
            await put(desk, "c1", priority=CRITICAL)
            assert (await claiming).envelope.id == "c1"
        assert await dead(desk) == ["d2"]

    store.run(scenario)


def test_publishes_at_the_same_moment_see_what_the_one_before_put_there(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=4)
        await put(desk, *"1234", priority=HIGH)
        pair = [desk.envelope(id="l1", priority=LOW), desk.envelope(id="c1", priority=CRITICAL)]
        await asyncio.gather(desk.publish(*pair), put(desk, "h1", priority=HIGH))
        assert actions(desk) == [("expand", 6), ("dead_letter", 6)]
        assert await dead(desk) == ["l1"]
        assert desk.account().pending == 6

    store.run(scenario)


def test_of_a_batch_each_that_gets_in_outranks_what_gives_way(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=3, overflow=DISPLACE)
        await put(desk, "l1", priority=LOW)
        await put(desk, "n1", "n2")
        # A LOW beside the HIGH cannot push out a LOW, nor a NORMAL.
        low, high = desk.envelope(id="l2", priority=LOW), desk.envelope(id="h1", priority=HIGH)
        with pytest.raises(QueueFull):
            await desk.publish(low, high)
        assert desk.account().accepted == 3
        await desk.publish(high, desk.envelope(id="c1", priority=CRITICAL))
        assert await dead(desk) == ["l1", "n2"]
        assert {r.report.context["gave_way_to"] for r in await desk.dead_letters()} == {"HIGH", "CRITICAL"}

    store.run(scenario)


def test_what_is_in_flight_never_gives_way(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=1, overflow=DISPLACE)
        await put(desk, "l1", priority=LOW)
        running = await desk.claim()
        await put(desk, "l2", priority=LOW)
        await put(desk, "c1", priority=CRITICAL)
        assert await dead(desk) == ["l2"]
        with pytest.raises(QueueFull):
            await put(desk, "c2", priority=CRITICAL)
        assert await desk.handled(running)
        assert await all_of(desk) == ["c1"]

    store.run(scenario)


def test_the_newest_gives_way_first_and_what_waits_for_its_time_last(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=5, overflow=DISPLACE)
        await put(desk, "retrying", priority=LOW)
        assert await desk.retrying(await desk.claim(), 500.0)
        await put(desk, "delayed", priority=LOW, due_at=desk.clock.wall() + 500)
        await put(desk, "l1", "l2", "l3", priority=LOW)
        for n in range(5):
            await put(desk, f"c{n}", priority=CRITICAL)
        assert await dead(desk) == ["l3", "l2", "l1", "delayed", "retrying"]
        (record,) = await desk.dead_letters(message_id="retrying")
        assert (record.attempts, record.first_failed_at > 0) == (1, True)
        account = desk.account()
        assert (account.ready, account.scheduled, account.retrying) == (5, 0, 0)
        await asyncio.sleep(1000)
        assert desk.account().ready == 5
        # Replayed, they are ready, with attempts at 0.
        await desk.transport.replay([r.id for r in await desk.dead_letters()])
        assert len(await all_of(desk)) == 10

    store.run(scenario)


def test_what_gave_way_does_not_expire_afterwards(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=1, overflow=DISPLACE)
        await put(desk, "l1", priority=LOW, expires_at=desk.clock.wall() + 10)
        await put(desk, "c1", priority=CRITICAL)
        await asyncio.sleep(30)
        assert await dead(desk) == ["l1"]
        assert not desk.ears.recorder.of(DeliveryExpired)

    store.run(scenario)


@pytest.mark.needs("duplicates")
def test_the_id_of_what_gave_way_is_still_known(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=1, overflow=DISPLACE)
        first = desk.envelope(b"1", id="once", priority=LOW, remember=True)
        await desk.publish(first)
        await put(desk, "c1", priority=CRITICAL)
        (again,) = await desk.publish(first)
        assert again.duplicate
        assert desk.account().accepted == 2

    store.run(scenario)


# Displacing with keys


@pytest.mark.needs("order_with_key")
def test_of_a_key_the_earlier_messages_stay(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=4, overflow=DISPLACE)
        await put(desk, "k1", "k2", "k3", "k4", priority=LOW, key="k")
        await put(desk, "c1", "c2", priority=CRITICAL)
        assert await dead(desk) == ["k4", "k3"]
        assert await all_of(desk) == ["c1", "c2", "k1", "k2"]

    store.run(scenario)


@pytest.mark.needs("order_with_key")
def test_when_the_head_of_a_key_gives_way_the_next_is_not_stuck(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=3, overflow=DISPLACE)
        await put(desk, "h0", "h1", priority=HIGH, key="k")
        await put(desk, "l1", priority=LOW, key="k")
        running = await desk.claim()
        await desk.nothing(within_s=0.5)  # h1 and l1 wait for the key
        assert await desk.handled(running)  # it is theirs, and no claim has come for it
        await put(desk, "x1", priority=NORMAL, key="x")
        await put(desk, "c1", "c2", priority=CRITICAL)
        assert await dead(desk) == ["l1", "x1"]
        await put(desk, "c3", priority=CRITICAL)
        assert await dead(desk) == ["l1", "x1", "h1"]
        assert await all_of(desk) == ["c1", "c2", "c3"]
        await put(desk, "k9", key="k")
        assert await all_of(desk) == ["k9"]


@pytest.mark.needs("order_with_key")
def test_what_waits_for_a_busy_key_can_give_way(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=3, overflow=DISPLACE)
        await put(desk, "k0", "k1", "k2", priority=LOW, key="k")
        running = await desk.claim()
        await desk.nothing(within_s=0.5)  # k1 and k2 wait for the key
        await put(desk, "x1", priority=LOW, key="x")
        await put(desk, "c1", "c2", priority=CRITICAL, key="k")
        assert await dead(desk) == ["x1", "k2"]
        assert await desk.handled(running)
        assert await all_of(desk) == ["c1", "c2", "k1"]

    store.run(scenario)


@pytest.mark.needs("order_with_key")
@pytest.mark.parametrize("strict", [False, True])
def test_a_key_is_passed_on_when_what_had_it_gives_way(store: Store, strict: bool) -> None:
    """n1 waits for l1, which was given back: its attempt does not count, so it was never tried."""

    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=2, overflow=DISPLACE, strict_key=strict)
        await put(desk, "l1", priority=LOW, key="k")
        running = await desk.claim()
        await put(desk, "n1", key="k")
        await desk.nothing(within_s=0.5)
        assert await desk.given_back(running)
        await put(desk, "c1", priority=CRITICAL)
        assert await dead(desk) == ["l1"]
        assert await all_of(desk) == ["c1", "n1"]

    store.run(scenario)


@pytest.mark.needs("order_with_key")
@pytest.mark.parametrize("strict", [False, True])
def test_with_strict_key_what_was_tried_holds_its_place(store: Store, strict: bool) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=1, overflow=DISPLACE, strict_key=strict)
        await put(desk, "k1", priority=LOW, key="k")
        assert await desk.retrying(await desk.claim(), 30.0)
        if strict:
            with pytest.raises(QueueFull):
                await put(desk, "c1", priority=CRITICAL)
            assert await dead(desk) == []
            assert (await desk.claim(within_s=60)).envelope.id == "k1"
        else:
            await put(desk, "c1", priority=CRITICAL)
            assert await dead(desk) == ["k1"]
            # Its key is free for the next message of it.
            assert await all_of(desk) == ["c1"]
            await put(desk, "k2", priority=LOW, key="k")
            assert await all_of(desk) == ["k2"]

    store.run(scenario)


@pytest.mark.needs("order_with_key")
def test_a_strict_key_that_gave_way_before_it_was_tried_frees_the_rest(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=3, overflow=DISPLACE, strict_key=True)
        await put(desk, "a1", "b1", "a2", priority=LOW, key="a")
        running = await desk.claim()
        assert running.envelope.id == "a1"
        await desk.nothing(within_s=0.5)
        assert await desk.retrying(running, 10.0)
        await put(desk, "c1", "c2", priority=CRITICAL)
        assert await dead(desk) == ["a2", "b1"]
        assert await all_of(desk) == ["c1", "c2"]
        assert (await desk.claim(within_s=60)).envelope.id == "a1"

    store.run(scenario)


# Expanding


def test_a_full_queue_grows_for_a_while_and_shrinks_again(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=4, overflow=EXPAND)
        await put(desk, *"1234")
        started = desk.clock.wall()
        await put(desk, "5", "6")
        state = desk.transport.queues()["s"]
        assert (state.spec.capacity, state.capacity, state.expanded_to) == (4, 6, 6)
        assert state.expanded_until == pytest.approx(started + 60, abs=0.5)
        with pytest.raises(QueueFull) as caught:
            await put(desk, "7")
        assert caught.value.capacity == 6
        assert actions(desk) == [("expand", 6), ("refuse", 6)]
        for _ in range(3):
            assert await desk.handled(await desk.claim())
        assert actions(desk) == [("expand", 6), ("refuse", 6)]
        await asyncio.sleep(70)  # nobody does anything: it shrinks by itself
        assert actions(desk)[2:] == [("contract", 4)]
        fact = desk.ears.recorder.of(OverflowHandled)[-1]
        assert fact.at == pytest.approx(started + 60, abs=1.5)
        state = desk.transport.queues()["s"]
        assert (state.capacity, state.expanded_to, state.expanded_until) == (4, 0, 0.0)
        await put(desk, "8")
        await put(desk, "9")  # it may grow again
        assert actions(desk)[3:] == [("expand", 6)]

    store.run(scenario)


def test_when_its_time_is_over_nothing_more_is_admitted_and_it_shrinks_once_all_fits(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=4, overflow=EXPAND)
        await put(desk, *"1234")
        await put(desk, "5", "6")
        await asyncio.sleep(100)
        assert actions(desk) == [("expand", 6)]
        state = desk.transport.queues()["s"]
        assert (state.capacity, state.expanded_to) == (4, 0)
        assert 0 < state.expanded_until < desk.clock.wall()
        for left in (5, 4):
            with pytest.raises(QueueFull):  # nor does it grow again
                await put(desk, "no")
            assert desk.account().pending == left + 1
            running = await desk.claim()
        assert actions(desk)[-1] == ("contract", 4)
        assert desk.account().pending == 4
        assert await desk.handled(running)
        await put(desk, "yes")  # armed again
        assert actions(desk)[-1] == ("expand", 6)

    store.run(scenario)


def test_who_waits_is_let_in_by_the_growth_that_another_brought_about(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=4, overflow=EXPAND)
        await put(desk, *"1234")
        patient = [asyncio.ensure_future(put(desk, f"p{n}", wait_s=50)) for n in range(2)]
        await asyncio.sleep(1)
        await put(desk, "hasty", wait_s=5)
        await asyncio.sleep(1)
        assert [p.done() for p in patient] == [True, False]
        assert desk.account().pending == 6
        patient[1].cancel()
        await asyncio.gather(*patient, return_exceptions=True)

    store.run(scenario)


def test_growing_comes_after_displacing_and_both_together_when_they_must(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=4)
        await put(desk, "l1", priority=LOW)
        await put(desk, "n1", "n2", "n3")
        await put(desk, "h1", priority=HIGH)
        assert actions(desk) == [("dead_letter", 4)]
        await put(desk, "l2", "l3", priority=LOW)
        assert actions(desk)[1:] == [("expand", 6)]
        # Full at 6: again the lowest gives way, while it has grown.
        await put(desk, "h2", priority=HIGH)
        assert actions(desk)[2:] == [("dead_letter", 6)]
        assert await dead(desk) == ["l1", "l3"]
        await desk.declare("t", "users.*", capacity=2)
        await put(desk, "t1", topic="users.new", priority=LOW)
        await put(desk, "t2", topic="users.new")
        await put(desk, "t3", "t4", topic="users.new", priority=HIGH)
        assert await dead(desk, "t") == ["t1", "t2"]

    store.run(scenario)


def test_one_step_may_need_both(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=4)
        await put(desk, "l1", priority=LOW)
        await put(desk, "n1", "n2", "n3")
        await put(desk, "x1", "x2", "x3")  # 7 of them, 6 places, one LOW
        assert actions(desk) == [("expand", 6), ("dead_letter", 6)]
        assert await dead(desk) == ["l1"]
        assert desk.account().pending == 6

    store.run(scenario)


def test_a_shrunken_queue_still_lets_the_higher_in_for_the_lower(store: Store) -> None:
    """More is pending than the capacity: it gets no more, but what comes may take the place of something lower."""

    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=6, overflow=DISPLACE)
        await put(desk, *(f"l{n}" for n in range(6)), priority=LOW)
        await desk.declare(capacity=2, overflow=DISPLACE)
        await put(desk, "c1", priority=CRITICAL)
        assert desk.account().pending == 6
        assert await dead(desk) == ["l5"]
        with pytest.raises(QueueFull):
            await put(desk, "l6", priority=LOW)

    store.run(scenario)


@pytest.mark.needs("durable")
def test_a_growth_outlives_its_process(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=4, overflow=Overflow(displace=False, expand=1.25, expand_for=100.0))
        await put(desk, *"1234")
        await put(desk, "5")
        until = desk.transport.queues()["s"].expanded_until
        await desk.close()
        again = await desk.reopened()
        await again.declare(capacity=4, overflow=Overflow(displace=False, expand=1.25, expand_for=100.0))
        state = again.transport.queues()["s"]
        assert (state.capacity, state.expanded_until) == (5, until)
        assert state.spec.overflow == Overflow(displace=False, expand=1.25, expand_for=100.0)
        with pytest.raises(QueueFull):
            await put(again, "6")
        assert await again.handled(await again.claim())
        await asyncio.sleep(110)
        assert actions(again) == [("refuse", 5), ("contract", 4)]
        await again.balanced()
        await again.close()

    store.run(scenario)


# Nobody consumes


def test_a_queue_that_nobody_empties_keeps_the_highest_and_does_not_grow(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare("orphan", "orders.*", capacity=2, consume=False)
        await put(desk, "l1", "n1", priority=LOW)
        await put(desk, "l2", priority=LOW, wait_s=10)
        assert await dead(desk, "orphan") == ["l2"]
        await put(desk, "c1", priority=CRITICAL, wait_s=10)
        assert await dead(desk, "orphan") == ["l2", "n1"]
        batch = [desk.envelope(id=f"b{p}", priority=p) for p in (3, 0, 2)]
        await desk.publish(*batch, wait_s=10)
        # Of c1, l1 and the batch the two highest are kept.
        assert sorted(await dead(desk, "orphan")) == ["b0", "b2", "l1", "l2", "n1"]
        assert {action for action, _ in actions(desk)} == {"dead_letter"}
        assert desk.transport.queues()["orphan"].capacity == 2
        fingerprints = {r.envelope.id: r.report.fingerprint for r in await desk.dead_letters()}
        assert fingerprints["l1"] == "displaced:orphan"
        assert fingerprints["b0"] == "overflow:orphan"

    store.run(scenario)


# Who waits for room


def test_the_highest_priority_gets_the_room_and_equals_in_order_of_arrival(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=1, overflow=NO_LADDER)
        await put(desk, "first")
        admitted: list[str] = []

        async def wait(id_: str, priority: int) -> None:
            await put(desk, id_, priority=priority, wait_s=1000)
            admitted.append(id_)

        waiting = []
        for id_, priority in (("l1", LOW), ("n1", NORMAL), ("c1", CRITICAL), ("n2", NORMAL), ("c2", CRITICAL)):
            waiting.append(asyncio.ensure_future(wait(id_, priority)))
            await asyncio.sleep(1)
        for n in range(5):
            assert await desk.handled(await desk.claim())
            await asyncio.sleep(1)
            assert len(admitted) == n + 1
        await asyncio.gather(*waiting)
        assert admitted == ["c1", "c2", "n1", "n2", "l1"]
        assert await all_of(desk) == ["l1"]

    store.run(scenario)


def test_nobody_passes_those_who_wait_except_what_is_more_important(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=2, overflow=NO_LADDER)
        await put(desk, "1", "2")
        batch = asyncio.ensure_future(put(desk, "b1", "b2", wait_s=100))
        await asyncio.sleep(1)
        assert await desk.handled(await desk.claim())  # room for one, but two wait
        late = asyncio.ensure_future(put(desk, "late", wait_s=100))
        await asyncio.sleep(1)
        assert not batch.done()
        assert not late.done()
        await put(desk, "c1", priority=CRITICAL, wait_s=100)
        assert await desk.handled(await desk.claim())
        assert await desk.handled(await desk.claim())
        await asyncio.sleep(1)
        assert batch.done()
        assert not late.done()
        assert await desk.handled(await desk.claim())
        await asyncio.sleep(1)
        assert late.done()

    store.run(scenario)


def test_who_gives_up_or_is_cancelled_holds_up_nobody(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=2, overflow=NO_LADDER)
        await put(desk, "1", "2")
        first = asyncio.ensure_future(put(desk, "c1", "c2", priority=CRITICAL, wait_s=500))
        second = asyncio.ensure_future(put(desk, "h1", "h2", priority=HIGH, wait_s=5))
        third = asyncio.ensure_future(put(desk, "l1", priority=LOW, wait_s=500))
        await asyncio.sleep(1)
        assert await desk.handled(await desk.claim())
        await asyncio.sleep(1)
        first.cancel()
        await asyncio.sleep(1)
        assert not third.done()
        await asyncio.sleep(10)
        assert isinstance(second.exception(), QueueFull)
        assert third.done()
        assert desk.account().accepted == 3
        await asyncio.gather(first, return_exceptions=True)

    store.run(scenario)


# Two processes


@pytest.mark.needs("multi_process")
def test_another_process_sees_the_growth_and_it_is_taken_back_once(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        other = await desk.reopened()
        await desk.declare(capacity=4, overflow=EXPAND)
        await other.declare(capacity=4, overflow=EXPAND)
        await put(desk, *"1234")
        await put(other, "5")
        assert (actions(other), actions(desk)) == ([("expand", 6)], [])
        await put(desk, "6")
        for one in (desk, other):
            assert one.transport.queues()["s"].capacity == 6
            with pytest.raises(QueueFull):
                await put(one, "7")
        for _ in range(2):
            assert await desk.handled(await desk.claim())
        await asyncio.sleep(100)
        told = [action for action, _ in [*actions(desk), *actions(other)]]
        assert told.count("contract") == 1
        assert desk.account().pending == 4
        await other.close()

    store.run(scenario)


@pytest.mark.needs("multi_process")
def test_processes_that_race_on_a_full_queue_never_exceed_half_as_much_again(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        desks = [desk, await desk.reopened(), await desk.reopened()]
        for one in desks:
            await one.declare(capacity=10)
        outcomes = await asyncio.gather(
            *(
                put(one, f"{number}-{n}", priority=(n + number) % 4, wait_s=n % 3)
                for number, one in enumerate(desks)
                for n in range(30)
            ),
            return_exceptions=True,
        )
        refused = [o for o in outcomes if o is not None]
        assert all(isinstance(o, QueueFull) for o in refused)
        account = desk.account()
        assert account.pending == 15
        assert account.accepted == 90 - len(refused) == 15 + account.dead_lettered
        assert sum(action == "expand" for one in desks for action, _ in actions(one)) == 1
        for one in desks[1:]:
            await one.close()

    store.run(scenario)


# On a bus


def slow(bus: MessageBus, overflow: Overflow, capacity: int = 4) -> asyncio.Event:
    """A subscription that handles nothing before the event is set."""
    go = asyncio.Event()

    @bus.subscribe("orders.*", name="bill", capacity=capacity, overflow=overflow, timeout=100_000.0)
    async def bill(message: Message) -> None:
        await go.wait()

    return go


async def fill(bus: MessageBus) -> int:
    """Publish until a publish is refused; how many were taken."""
    taken = 0
    while taken < 1000:
        try:
            await bus.publish("orders.created", taken)
        except QueueFull:
            break
        taken += 1
    return taken


def told(house: House) -> list[str]:
    """What was said of recoveries of queues, in order."""
    return [
        "started" if isinstance(fact, RecoveryStarted) else fact.outcome
        for fact in house.seen.facts
        if isinstance(fact, RecoveryStarted | RecoveryConcluded) and fact.component == "queue"
    ]


def test_a_growth_is_a_recovery_that_succeeds_when_it_is_taken_back(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus(publish_timeout=0.0)
        go = slow(bus, EXPAND)
        async with bus:
            await bus.publish("orders.created", "running")
            await asyncio.sleep(1)
            for n in range(5):
                await bus.publish("orders.created", n)
            assert told(house) == ["started"]
            (started,) = house.seen.of(RecoveryStarted)
            assert (started.category, started.action, started.target) == ("queue_overflow", "expand", "bill")
            go.set()
            await asyncio.sleep(100)
            assert told(house) == ["started", "succeeded"]
            (ended,) = house.seen.of(RecoveryConcluded)
            assert ended.duration_s == pytest.approx(60, abs=2)

    store.run_bus(scenario)


def test_growing_that_never_helps_is_left_out_for_a_while(store: Store) -> None:
    """Five times in a row a queue grew and refused all the same: it stays as it is, and tries once more later."""

    async def scenario(house: House) -> None:
        bus = house.bus(publish_timeout=0.0)
        go = slow(bus, Overflow(displace=False, expand_for=1.0))
        async with bus:
            await bus.publish("orders.created", "running")
            await asyncio.sleep(1)
            for n in range(5):
                assert await fill(bus) == 6
                assert told(house) == ["started", "failed"] * (n + 1)
                go.set()
                await bus.drain()
                await asyncio.sleep(2)  # it shrinks
                go.clear()
                await bus.publish("orders.created", "running")
                await asyncio.sleep(1)
            (opened,) = house.seen.of(BreakerStateChanged)
            assert (opened.breaker, opened.to_state) == ("queue/queue_overflow", "open")
            assert await fill(bus) == 4, "it does not grow"
            assert told(house) == ["started", "failed"] * 5
            await asyncio.sleep(70)
            assert await fill(bus) == 2, "it may try again"
            assert told(house) == ["started", "failed"] * 6
            go.set()
            await bus.drain()
            await asyncio.sleep(70)
            go.clear()
            for n in range(6):
                await bus.publish("orders.created", n)
                await asyncio.sleep(0.1)
            go.set()
            await bus.drain()
            await asyncio.sleep(5)
            assert told(house)[-2:] == ["started", "succeeded"]
            states = [f.to_state for f in house.seen.of(BreakerStateChanged)]
            assert states == ["open", "half_open", "open", "half_open", "closed"]

    store.run_bus(scenario)


def test_subscribe_takes_the_rungs_and_refuses_anything_else(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus(publish_timeout=0.0)
        go = slow(bus, DISPLACE, capacity=1)
        with pytest.raises(ConfigurationError, match="overflow must be a Overflow"):
            bus.subscribe("x", overflow="displace")(lambda message: None)  # type: ignore[arg-type]
        async with bus:
            await bus.publish("orders.created", "running")
            await asyncio.sleep(1)
            await bus.publish("orders.created", "low", priority=LOW)
            await bus.publish("orders.created", "high", priority=HIGH)
            (letter,) = await bus.dead_letters.list()
            assert (letter.message.payload, letter.reason, letter.subscription) == ("low", "overflow", "bill")
            assert bus.queues()["bill"].spec.overflow == DISPLACE
            go.set()
            await bus.drain()
            assert await bus.dead_letters.replay(letter.id) == 1
            await bus.drain()
            assert bus.ledger().total.handled == 3

    store.run_bus(scenario)
