"""Publishing: atomic, routed by the stored subscriptions, deduplicated by id, held back by full queues."""

from __future__ import annotations

import asyncio

import pytest
from suite import NO_LADDER, Desk, Store

from glassbus.errors import MessageConflict, PublishUncertain, QueueFull
from glassbus.facts import BackpressureApplied, DeliveryDeadLettered, OverflowHandled
from glassbus.message import Envelope
from glassbus.transport import Stored


def test_a_message_goes_to_every_subscription_that_wants_it(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        for name, pattern in [("exact", "orders.created"), ("star", "orders.*"), ("tail", ">"), ("other", "users.>")]:
            await desk.declare(name, pattern)
        (stored,) = await desk.publish(b"1")
        assert sorted(stored.subscriptions) == ["exact", "star", "tail"]
        assert not stored.duplicate
        for name in stored.subscriptions:
            assert (await desk.claim(name)).envelope.body == b"1"
            assert desk.account(name).accepted == 1
        assert desk.account("other").accepted == 0

    store.run(scenario)


def test_what_nobody_wants_is_stored_nowhere(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        assert list(await desk.publish(b"1", topic="users.created")) == [Stored(())]
        assert desk.transport.ledger().total.accepted == 0

    store.run(scenario)


def test_a_batch_is_answered_in_order(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare("a", "a.*")
        await desk.declare("b", "b.*")
        topics = ["a.1", "b.1", "c.1", "a.2"]
        stored = await desk.publish(*(desk.envelope(topic=topic) for topic in topics))
        assert [s.subscriptions for s in stored] == [("a",), ("b",), (), ("a",)]
        assert (desk.account("a").ready, desk.account("b").ready) == (2, 1)

    store.run(scenario)


def test_a_message_arrives_as_it_was_sent(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        sent = Envelope(
            id="id with spaces / and-ß".replace("ß", "s"),
            topic="orders.created",
            body=bytes(range(256)) * 40,
            codec="raw",
            headers={"traceparent": "00-abc", "text": "ü 漢字 ' \" ; -- \\", "empty": ""},
            priority=3,
            key="customer 7",
            published_at=desk.clock.wall() - 0.125,
            expires_at=desk.clock.wall() + 1000,
        )
        await desk.publish(sent)
        delivery = await desk.claim()
        assert delivery.envelope == sent
        assert (delivery.subscription, delivery.destination, delivery.attempt) == ("s", "orders.*", 1)
        assert (delivery.redelivered, delivery.recovering, delivery.first_failed_at) == ("", None, 0.0)
        assert await desk.handled(delivery)

    store.run(scenario)


@pytest.mark.parametrize("size", [0, 1, 1024 * 1024])
def test_bodies_of_any_size_up_to_the_limit(store: Store, size: int) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"x" * size)
        assert len((await desk.claim()).envelope.body) == size

    store.run(scenario)


def test_the_destination_is_bounded_by_what_is_declared(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare("wide", "orders.>")
        await desk.declare("exact", "orders.created")
        await desk.publish(b"1", topic="orders.created")
        await desk.publish(b"2", topic="orders.x.y")
        assert (await desk.claim("exact")).destination == "orders.created"
        assert {(await desk.claim("wide")).destination for _ in range(2)} == {"orders.created", "orders.>"}

    store.run(scenario)


def test_more_topics_than_any_cache_holds(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare("s", ">", capacity=20_000)
        stored = await desk.publish(*(desk.envelope(topic=f"t.{n}", remember=n % 2 == 0) for n in range(12_000)))
        assert len(stored) == 12_000
        assert desk.account().ready == 12_000

    store.run(scenario)


# Duplicates


@pytest.mark.needs("duplicates")
def test_an_id_is_recognised_for_ten_minutes(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        first = desk.envelope(b"1", id="once", remember=True)
        assert list(await desk.publish(first)) == [Stored(("s",))]
        assert await desk.handled(await desk.claim())  # while its message is stored, an id may be known longer
        for waited_s in (0, 300, 299):
            await asyncio.sleep(waited_s)
            assert list(await desk.publish(first)) == [Stored(("s",), duplicate=True)]
        assert desk.account().accepted == 1
        await asyncio.sleep(2)
        assert list(await desk.publish(first)) == [Stored(("s",))]
        assert desk.account().accepted == 2

    store.run(scenario)


@pytest.mark.needs("duplicates")
def test_an_id_is_known_though_its_message_was_handled_long_since(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        first = desk.envelope(b"1", id="once", remember=True)
        await desk.publish(first)
        await desk.handled(await desk.claim())
        assert (await desk.publish(first))[0].duplicate
        await desk.nothing()

    store.run(scenario)


@pytest.mark.needs("duplicates")
@pytest.mark.parametrize("other", [{"body": b"2"}, {"topic": "orders.changed"}])
def test_an_id_with_another_body_or_topic_is_a_conflict_and_stores_nothing(
    store: Store, other: dict[str, object]
) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(desk.envelope(b"1", id="once", remember=True))
        with pytest.raises(MessageConflict) as caught:
            await desk.publish(b"before", desk.envelope(**{"body": b"1", "id": "once", "remember": True, **other}))
        assert caught.value.message_id == "once"
        assert desk.account().accepted == 1

    store.run(scenario)


@pytest.mark.needs("duplicates")
def test_duplicates_within_one_batch(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        twice = desk.envelope(b"1", id="once", remember=True)
        stored = await desk.publish(twice, b"between", twice)
        assert [s.duplicate for s in stored] == [False, False, True]
        assert desk.account().accepted == 2
        with pytest.raises(MessageConflict):
            await desk.publish(
                desk.envelope(b"1", id="new", remember=True), desk.envelope(b"2", id="new", remember=True)
            )
        assert desk.account().accepted == 2
        # The refused batch left no trace: its id is free.
        assert not (await desk.publish(desk.envelope(b"3", id="new", remember=True)))[0].duplicate

    store.run(scenario)


def test_an_unrouted_message_is_remembered_too(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        first = desk.envelope(b"1", id="once", remember=True)
        assert list(await desk.publish(first)) == [Stored(())]
        assert list(await desk.publish(first)) == [Stored((), duplicate=True)]

    store.run(scenario)


def test_ids_that_need_not_be_remembered_are_not_compared(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(b"1", id="same")
        await desk.handled(await desk.claim())
        assert not (await desk.publish(b"2", id="same"))[0].duplicate

    store.run(scenario)


# Full queues


@pytest.mark.needs("reports_full")
def test_a_full_queue_refuses_at_once_who_does_not_wait(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=2, overflow=NO_LADDER)
        await desk.publish(b"1", b"2")
        with pytest.raises(QueueFull) as caught:
            await desk.publish(b"3")
        assert (caught.value.subscription, caught.value.capacity) == ("s", 2)
        assert desk.account().accepted == 2
        (overflow,) = desk.ears.recorder.of(OverflowHandled)
        assert (overflow.subscription, overflow.action, overflow.capacity) == ("s", "refuse", 2)

    store.run(scenario)


@pytest.mark.needs("reports_full")
def test_a_publisher_waits_for_room_and_is_admitted(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=1)
        await desk.publish(b"1")
        waiting = asyncio.ensure_future(desk.publish(b"2", wait_s=10))
        await asyncio.sleep(3)
        assert not waiting.done()
        await desk.claim()  # what is in flight no longer takes room
        async with asyncio.timeout(1):
            await waiting
        (fact,) = desk.ears.recorder.of(BackpressureApplied)
        assert (fact.subscription, fact.admitted) == ("s", True)
        assert fact.waited_s == pytest.approx(3, abs=0.5)
        assert desk.account().accepted == 2

    store.run(scenario)


@pytest.mark.needs("reports_full")
def test_a_publisher_waits_no_longer_than_it_said(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=1)
        await desk.publish(b"1")
        started = desk.clock.monotonic()
        with pytest.raises(QueueFull) as caught:
            await desk.publish(b"2", wait_s=4)
        assert desk.clock.monotonic() - started == pytest.approx(4, abs=0.5)
        assert caught.value.waited_s == pytest.approx(4, abs=0.5)
        assert [f.admitted for f in desk.ears.recorder.of(BackpressureApplied)] == [False]

    store.run(scenario)


@pytest.mark.needs("reports_full")
def test_a_publish_is_all_or_nothing_over_its_subscriptions_and_its_batch(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare("roomy", "orders.*", capacity=100)
        await desk.declare("tight", "orders.created", capacity=2, overflow=NO_LADDER)
        await desk.publish(b"1")
        with pytest.raises(QueueFull):
            await desk.publish(b"2", b"3", b"4")
        assert (desk.account("roomy").accepted, desk.account("tight").accepted) == (1, 1)
        await desk.publish(b"2")
        with pytest.raises(QueueFull):
            await desk.publish(b"3")
        assert (desk.account("roomy").accepted, desk.account("tight").accepted) == (2, 2)

    store.run(scenario)


@pytest.mark.needs("reports_full")
def test_a_queue_that_nobody_empties_dead_letters_its_overflow(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare("live", "orders.*")
        await desk.declare("orphan", "orders.*", capacity=2, consume=False)
        started = desk.clock.monotonic()
        for n in range(5):
            (stored,) = await desk.publish(str(n), wait_s=10)
            assert sorted(stored.subscriptions) == ["live", "orphan"]
        assert desk.clock.monotonic() - started < 1
        account = desk.account("orphan")
        assert (account.accepted, account.ready, account.dead_lettered) == (5, 2, 3)
        assert desk.account("live").ready == 5
        records = await desk.dead_letters(subscription="orphan")
        assert {r.envelope.body for r in records} == {b"2", b"3", b"4"}
        assert {(r.reason, r.attempts, r.report.category.value) for r in records} == {("overflow", 0, "queue_overflow")}
        assert [f.action for f in desk.ears.recorder.of(OverflowHandled)] == ["dead_letter"] * 3
        assert [f.reason for f in desk.ears.recorder.of(DeliveryDeadLettered)] == ["overflow"] * 3

    store.run(scenario)


@pytest.mark.needs("reports_full")
def test_a_larger_capacity_takes_effect(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=1)
        await desk.publish(b"1")
        waiting = asyncio.ensure_future(desk.publish(b"2", wait_s=60))
        await asyncio.sleep(1)
        await desk.declare(capacity=5, overflow=NO_LADDER)
        async with asyncio.timeout(SOON):
            await waiting
        await desk.publish(b"3", b"4", b"5")
        with pytest.raises(QueueFull):
            await desk.publish(b"6")

    store.run(scenario)


SOON = 5.0


@pytest.mark.needs("reports_full")
def test_forgetting_the_full_queue_frees_who_waits_for_it(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare(capacity=1)
        await desk.publish(b"1")
        waiting = asyncio.ensure_future(desk.publish(b"2", wait_s=60))
        await asyncio.sleep(1)
        await desk.transport.forget("s")
        async with asyncio.timeout(SOON):
            assert list(await waiting) == [Stored(())]

    store.run(scenario)


@pytest.mark.needs("reports_full")
@pytest.mark.parametrize("steps", range(12))
def test_a_publish_cancelled_anywhere_is_stored_whole_or_not_at_all(store: Store, steps: int) -> None:
    """And publishing it again with the same id is safe whichever way it went."""

    async def scenario(desk: Desk) -> None:
        await desk.declare("a", "orders.*", capacity=2)
        await desk.declare("b", "orders.*", capacity=2)
        batch = [desk.envelope(f"{n}", id=f"id{n}", remember=True) for n in range(2)]
        full = steps % 2
        if full:
            await desk.publish(b"in the way")
        publishing = asyncio.ensure_future(desk.transport.publish(batch, 5.0))
        for _ in range(steps // 2):
            await asyncio.sleep(0)
        publishing.cancel()
        (outcome,) = await asyncio.gather(publishing, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError | PublishUncertain | list | tuple)
        await desk.transport.flush()
        accepted = [desk.account(name).accepted - full for name in "ab"]
        assert accepted in ([0, 0], [2, 2])
        for name in "ab":
            for _ in range(full):
                assert await desk.handled(await desk.claim(name))
        stored = await desk.transport.publish(batch, 5.0)
        assert [s.duplicate for s in stored] == [accepted == [2, 2]] * 2
        for name in "ab":
            assert desk.account(name).accepted == 2 + full
            assert {(await desk.claim(name)).envelope.id for _ in range(2)} == {"id0", "id1"}

    store.run(scenario)
