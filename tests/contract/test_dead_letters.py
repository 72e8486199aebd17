"""The dead-letter queue: kept with everything known, found by what it is, replayed or discarded all or none."""

from __future__ import annotations

import asyncio

import pytest
from suite import Desk, Store, report

from glassbus.errors import UnknownDeadLetter


def test_a_dead_letter_keeps_everything(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        envelope = desk.envelope(b"\x00\xffraw", key="k", priority=2)
        await desk.publish(envelope)
        failed_at = desk.clock.wall()
        assert await desk.retrying(await desk.claim(), 10.0)
        await asyncio.sleep(10)
        delivery = await desk.claim()
        assert await desk.dead(delivery, "the last straw")
        (record,) = await desk.dead_letters()
        assert record.envelope == envelope
        assert (record.subscription, record.destination, record.attempts) == ("s", "orders.*", 2)
        assert (record.reason, record.replays) == ("attempts_spent", 0)
        assert record.report == report("the last straw")
        assert record.died_at == pytest.approx(failed_at + 10, abs=0.5)
        assert record.first_failed_at > 0
        account = desk.account()
        assert (account.dead_lettered, account.in_flight, account.pending) == (1, 0, 0)
        assert desk.transport.queues()["s"].dead_letter_oldest_at == pytest.approx(record.died_at, abs=0.5)
        await desk.nothing()

    store.run(scenario)


def test_the_newest_death_comes_first_and_before_pages_on(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(*(str(n) for n in range(5)))
        deliveries = [await desk.claim() for _ in range(5)]
        order = [3, 0, 4, 1, 2]
        for n in order:
            assert await desk.dead(deliveries[n])
            await asyncio.sleep(1)
        newest_first = [str(n).encode() for n in reversed(order)]
        assert [r.envelope.body for r in await desk.dead_letters()] == newest_first
        page = await desk.dead_letters(2)
        seen = list(page)
        while page:
            page = await desk.dead_letters(2, before=page[-1].id)
            seen += page
        assert [r.envelope.body for r in seen] == newest_first
        assert len({r.id for r in seen}) == 5
        assert await desk.dead_letters(0) == []

    store.run(scenario)


def test_filters(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare("s", ">")
        start = desk.clock.wall()
        one = await desk.dead_letter(b"1", "first", topic="a.b", id="m-one")
        await asyncio.sleep(100)
        two = await desk.dead_letter(b"2", "second", topic="a.c", id="m-two")

        async def ids(**wanted: object) -> list[str]:
            return [r.id for r in await desk.dead_letters(**wanted)]

        assert await ids(id=one) == [one]
        assert await ids(id="no such") == []
        assert await ids(subscription="s") == [two, one]
        assert await ids(subscription="t") == []
        assert await ids(topic="a.b") == [one]
        assert await ids(message_id="m-two") == [two]
        assert await ids(category="timeout_error") == [two, one]
        assert await ids(category="connection_error") == []
        assert await ids(exception_type="TimeoutError") == [two, one]
        assert await ids(exception_type="OSError") == []
        assert await ids(fingerprint="f-first") == [one]
        assert await ids(since=start + 50) == [two]
        assert await ids(until=start + 50) == [one]
        assert await ids(topic="a.b", fingerprint="f-second") == []

    store.run(scenario)


def test_a_replay_starts_anew_and_counts(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        dead = await desk.dead_letter(b"1")
        for replays in (1, 2):
            (moved,) = await desk.transport.replay([dead])
            assert moved.id == dead
            assert await desk.dead_letters() == []
            account = desk.account()
            assert (account.dead_lettered, account.ready, account.accepted) == (0, 1, 1)
            delivery = await desk.claim()
            assert (delivery.attempt, delivery.replays) == (1, replays)
            assert (delivery.recovering, delivery.first_failed_at) == (None, 0.0)
            assert await desk.dead(delivery)
            (record,) = await desk.dead_letters()
            assert (record.replays, record.attempts) == (replays, 1)
            dead = record.id
        await desk.transport.replay([dead])
        assert await desk.handled(await desk.claim())
        assert desk.account().handled == 1

    store.run(scenario)


def test_a_replay_wakes_who_waits(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        dead = await desk.dead_letter(b"1")
        claiming = asyncio.ensure_future(desk.claim())
        await asyncio.sleep(1)
        await desk.transport.replay([dead])
        assert (await claiming).envelope.body == b"1"

    store.run(scenario)


@pytest.mark.parametrize("verb", ["replay", "discard"])
def test_all_or_none_is_moved(store: Store, verb: str) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        ids = [await desk.dead_letter(str(n)) for n in range(3)]
        move = getattr(desk.transport, verb)
        for wrong in ("no such", "", "999999999", "-1", "1; DROP TABLE x", "9" * 40):
            with pytest.raises(UnknownDeadLetter):
                await move([*ids, wrong])
        assert desk.account().dead_lettered == 3
        assert await move([]) == []
        assert {r.id for r in await move([ids[0], ids[2], ids[0]])} == {ids[0], ids[2]}
        assert [r.id for r in await desk.dead_letters()] == [ids[1]]
        with pytest.raises(UnknownDeadLetter):
            await move([ids[0]])

    store.run(scenario)


def test_a_discarded_dead_letter_is_gone_and_counted(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        dead = await desk.dead_letter(b"1")
        (removed,) = await desk.transport.discard([dead])
        assert removed.envelope.body == b"1"
        account = desk.account()
        assert (account.dead_lettered, account.discarded, account.accepted) == (0, 1, 1)
        await desk.nothing()
        assert desk.transport.queues()["s"].dead_letter_oldest_at == 0.0

    store.run(scenario)
