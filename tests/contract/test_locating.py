"""Where a single message is: the store's own word, for the story of a message. Asking changes nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from suite import Desk, Store

from glassbus.transport import Located, Locates


async def where(desk: Desk, message_id: str) -> dict[str, Located]:
    assert isinstance(desk.transport, Locates)
    found = await desk.transport.locate(message_id)
    return {} if found is None else {one.subscription: one for one in found.deliveries}


async def place(desk: Desk, message_id: str) -> Located:
    (located,) = (await where(desk, message_id)).values()
    return located


def test_each_place_is_told(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        now = desk.clock.wall()
        await desk.publish(desk.envelope(id="waits", key="k", priority=2), desk.envelope(id="later", due_at=now + 60))
        assert (await place(desk, "later")).state == "scheduled"
        assert (await place(desk, "later")).due_at == pytest.approx(now + 60, abs=0.1)
        ready = await place(desk, "waits")
        assert (ready.state, ready.attempt, ready.owner, ready.due_at) == ("ready", 0, "", 0.0)
        delivery = await desk.claim()
        flying = await place(desk, "waits")
        assert (flying.state, flying.attempt, flying.owner_lives) in (("in_flight", 1, True), ("in_flight", 1, None))
        assert flying.owner
        assert await desk.retrying(delivery, 10.0)
        retrying = await place(desk, "waits")
        assert (retrying.state, retrying.attempt, retrying.action) == ("retrying", 1, "delayed_retry")
        assert retrying.due_at == pytest.approx(desk.clock.wall() + 10, abs=0.5)
        assert retrying.first_failed_at > 0
        await asyncio.sleep(10)
        assert await desk.dead(await desk.claim())
        dead = await place(desk, "waits")
        (letter,) = await desk.dead_letters()
        assert (dead.state, dead.attempt, dead.dead_letter) == ("dead_lettered", 2, letter.id)
        await desk.transport.replay([letter.id])
        again = await place(desk, "waits")
        assert (again.state, again.attempt, again.replays, again.dead_letter) == ("ready", 0, 1, "")
        assert await desk.handled(await desk.claim())
        assert await where(desk, "waits") == {}
        assert await where(desk, "nobody") == {}

    store.run(scenario)


def test_what_it_is_and_where_it_went(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare("one")
        await desk.declare("two")
        at = desk.clock.wall()
        await desk.publish(desk.envelope(id="m-1", key="k", priority=3))
        assert await desk.handled(await desk.claim("one"))
        assert isinstance(desk.transport, Locates)
        found = await desk.transport.locate("m-1")
        assert found is not None
        assert (found.message_id, found.topic, found.published_at, found.priority, found.key) == (
            "m-1", "orders.created", pytest.approx(at, abs=0.1), 3, "k",
        )  # fmt: skip
        assert [one.subscription for one in found.deliveries] == ["two"]
        assert found.routed in (None, ("one", "two"))

    store.run(scenario)


def test_what_waits_for_its_key_says_so(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(desk.envelope(id="first", key="k"))
        delivery = await desk.claim()
        await desk.publish(desk.envelope(id="second", key="k"))
        await desk.nothing()
        waits = await place(desk, "second")
        assert (waits.state, waits.waits_for_key) == ("ready", True)
        assert await desk.handled(delivery)
        assert not (await place(desk, "second")).waits_for_key

    store.run(scenario)


@pytest.mark.needs("keeps")
def test_a_death_is_seen_by_the_next_process(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(desk.envelope(id="m-1"))
        assert await desk.dead(await desk.claim())
        await desk.close()
        again = await desk.reopened()
        await again.declare()
        assert (await place(again, "m-1")).state == "dead_lettered"
        await again.close()

    store.run(scenario)


def test_ids_are_found_by_how_they_begin(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        ids = ["hook-1", "hook-2", "hook-20", "hooks", "Hook-1", "höök", "other", "hook%_"]
        await desk.publish(*(desk.envelope(id=one) for one in ids))

        async def like(beginning: str, limit: int = 100) -> Any:
            assert isinstance(desk.transport, Locates)
            return await desk.transport.ids_like(beginning, limit)

        assert await like("hook-") == ["hook-1", "hook-2", "hook-20"]
        assert await like("hook-", 2) == ["hook-1", "hook-2"]
        assert await like("hook%") == ["hook%_"]
        assert await like("h") == sorted(["hook-1", "hook-2", "hook-20", "hooks", "höök", "hook%_"])
        assert await like("none") == []

    store.run(scenario)


def test_what_is_no_text_is_nowhere(store: Store) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.declare()
        await desk.publish(desk.envelope(id="m-1"))
        assert isinstance(desk.transport, Locates)
        for lone in ("\udcff", "m-1\udcff"):
            assert await desk.transport.locate(lone) is None
            assert await desk.transport.ids_like(lone, 10) == []

    store.run(scenario)
