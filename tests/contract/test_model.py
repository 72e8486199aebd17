"""Any sequence of operations against a model in a dict: the store agrees with it after every step."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from suite import Desk, Store

from glassbus.facts import Delivery
from glassbus.policy.ledger import Account

NAMES = ("a", "b")
OPERATIONS = st.one_of(
    st.tuples(st.just("publish"), st.integers(1, 3), st.sampled_from([None, None, "k", "l"]), st.integers(0, 3)),
    st.tuples(st.just("publish_delayed"), st.integers(1, 50)),
    st.tuples(st.just("publish_expiring"), st.integers(1, 50)),
    st.tuples(st.just("claim"), st.sampled_from(NAMES)),
    st.tuples(st.just("handle"), st.integers(0, 9)),
    st.tuples(st.just("retry"), st.integers(0, 9), st.integers(0, 40)),
    st.tuples(st.just("give_back"), st.integers(0, 9)),
    st.tuples(st.just("bury"), st.integers(0, 9)),
    st.tuples(st.just("replay"), st.integers(0, 9)),
    st.tuples(st.just("discard"), st.integers(0, 9)),
    st.tuples(st.just("wait"), st.integers(1, 60)),
)


class Model:
    """Where every delivery must be, by (subscription, message id)."""

    def __init__(self) -> None:
        self.place: dict[tuple[str, str], str] = {}
        self.attempts: dict[tuple[str, str], int] = {}
        self.held: list[Delivery] = []

    def account(self, name: str) -> dict[str, int]:
        places = [place for (where, _), place in self.place.items() if where == name]
        return {
            place: places.count(place) for place in ("waiting", "in_flight", "handled", "dead_lettered", "discarded")
        }


async def play(desk: Desk, operations: list[tuple[Any, ...]]) -> None:
    model = Model()
    for name in NAMES:
        await desk.declare(name, "orders.*")
    for operation, *arguments in operations:
        await step(desk, model, operation, arguments)
        await desk.transport.flush()
        compare(desk, model)
    # To the end: nothing is stuck, and every delivery comes to its end.
    for delivery in model.held:
        assert await desk.handled(delivery)
    for name in NAMES:
        while desk.account(name).pending:
            try:
                delivery = await desk.claim(name, within_s=1000)
            except TimeoutError:
                break  # what was left expired meanwhile; the ledger below says so
            assert await desk.handled(delivery)
    total = desk.transport.ledger().total
    assert total.pending == total.in_flight == 0
    assert total.accepted == len(model.place)


async def step(desk: Desk, model: Model, operation: str, arguments: list[Any]) -> None:
    match operation, arguments:
        case "publish", [count, key, priority]:
            batch = [desk.envelope(b"x", key=key, priority=priority) for _ in range(count)]
            await desk.publish(*batch)
            for envelope in batch:
                model.place |= {(name, envelope.id): "waiting" for name in NAMES}
        case "publish_delayed", [seconds]:
            await accept(desk, model, due_at=desk.clock.wall() + seconds)
        case "publish_expiring", [seconds]:
            await accept(desk, model, expires_at=desk.clock.wall() + seconds)
        case "claim", [name]:
            delivery = desk.transport.claim_now(name)
            if delivery is None and not desk.features.durable:
                return
            if delivery is None:
                try:
                    delivery = await desk.claim(name, within_s=0.5)
                except TimeoutError:
                    return
            where = (name, delivery.envelope.id)
            assert model.place[where] == "waiting"
            model.place[where] = "in_flight"
            model.attempts[where] = model.attempts.get(where, 0) + 1
            assert delivery.attempt == model.attempts[where]
            key = delivery.envelope.key
            assert key is None or key not in {d.envelope.key for d in model.held if d.subscription == name}
            model.held.append(delivery)
        case (("handle" | "retry" | "give_back" | "bury"), [which, *rest]) if model.held:
            delivery = model.held.pop(which % len(model.held))
            where = (delivery.subscription, delivery.envelope.id)
            if operation == "handle":
                assert await desk.handled(delivery)
                model.place[where] = "handled"
            elif operation == "bury":
                assert await desk.dead(delivery)
                model.place[where] = "dead_lettered"
            elif operation == "retry":
                assert await desk.retrying(delivery, float(rest[0]))
                model.place[where] = "waiting"
            else:
                assert await desk.given_back(delivery)
                model.place[where] = "waiting"
                model.attempts[where] -= 1
        case (("replay" | "discard"), [which]):
            records = await desk.dead_letters()
            if records:
                record = records[which % len(records)]
                where = (record.subscription, record.envelope.id)
                assert model.place[where] == "dead_lettered"
                await getattr(desk.transport, operation)([record.id])
                model.place[where] = "waiting" if operation == "replay" else "discarded"
                model.attempts[where] = 0
        case "wait", [seconds]:
            await asyncio.sleep(seconds)


async def accept(desk: Desk, model: Model, **times: float) -> None:
    envelope = desk.envelope(b"x", **times)
    await desk.publish(envelope)
    model.place |= {(name, envelope.id): "waiting" for name in NAMES}


def compare(desk: Desk, model: Model) -> None:
    for name in NAMES:
        account: Account = desk.account(name)
        expected = model.account(name)
        assert account.unaccounted == 0
        assert account.accepted == sum(expected.values())
        # Time alone moves a delivery from waiting to expired.
        assert account.pending + account.expired == expected.pop("waiting")
        for place, count in expected.items():
            assert getattr(account, place) == count, (place, account, expected)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(operations=st.lists(OPERATIONS, max_size=60))
def test_the_store_agrees_with_the_model(store: Store, operations: list[tuple[Any, ...]]) -> None:
    store.fresh().run(lambda desk: play(desk, operations))
