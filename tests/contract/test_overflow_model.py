"""Any sequence of operations on queues that are mostly full: the store does what the ladder says, and loses nothing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from suite import Desk, Store

from glassbus.config import Overflow
from glassbus.errors import QueueFull
from glassbus.facts import Delivery, OverflowHandled
from glassbus.policy.overflow import Rung, capacity_now, climb, contracts, left_out, may_grow_to
from glassbus.transport import DeadLetterRecord

pytestmark = pytest.mark.needs("ladder")

PRIORITIES = st.lists(st.integers(0, 3), min_size=1, max_size=4)
OPERATIONS = st.one_of(
    st.tuples(st.just("publish"), PRIORITIES, st.sampled_from([None, None, "k", "l"]), st.sampled_from([0, 0, 0, 2])),
    st.tuples(st.just("publish"), PRIORITIES, st.sampled_from([None, "k"]), st.just(0)),
    st.tuples(st.just("delayed"), st.integers(0, 3), st.integers(1, 50)),
    st.tuples(st.just("claim"), st.sampled_from(["a", "c"])),
    st.tuples(st.just("handle"), st.integers(0, 9)),
    st.tuples(st.just("retry"), st.integers(0, 9), st.integers(0, 40)),
    st.tuples(st.just("give_back"), st.integers(0, 9)),
    st.tuples(st.just("replay"), st.integers(0, 9)),
    st.tuples(st.just("wait"), st.integers(1, 30)),
)


@dataclass
class Line:
    """One queue as it must be: priority of every message that waits, and which of them cannot give way."""

    capacity: int
    overflow: Overflow
    consumed: bool = True
    strict: bool = False
    waiting: dict[str, int] = field(default_factory=dict)
    keyed: dict[str, bool] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)
    in_flight: dict[str, int] = field(default_factory=dict)
    dead: dict[str, int] = field(default_factory=dict)
    handled: int = 0
    until: float = 0.0

    def look(self, now: float) -> None:
        if contracts(self.capacity, self.overflow, self.until, now, len(self.waiting)):
            self.until = 0.0

    def able(self) -> list[int]:
        stays = {i for i in self.waiting if self.strict and i in self.tried and self.keyed[i]}
        return sorted(p for i, p in self.waiting.items() if i not in stays) if self.overflow.displace else []


class Model:
    def __init__(self) -> None:
        self.lines = {
            "a": Line(4, Overflow(expand_for=20.0)),
            "b": Line(5, Overflow(), consumed=False),
            "c": Line(4, Overflow(expand=1.0), strict=True),
        }
        self.held: list[Delivery] = []
        self.told = 0

    def look(self, now: float) -> None:
        for line in self.lines.values():
            line.look(now)


async def play(desk: Desk, operations: list[tuple[Any, ...]]) -> None:
    model = Model()
    for name, line in model.lines.items():
        await desk.declare(
            name,
            "orders.*",
            capacity=line.capacity,
            overflow=line.overflow,
            strict_key=line.strict,
            consume=line.consumed,
        )
    for operation, *arguments in operations:
        await step(desk, model, operation, arguments)
        await desk.transport.flush()
        model.look(desk.clock.wall())
        compare(desk, model)


async def step(desk: Desk, model: Model, operation: str, arguments: list[Any]) -> None:
    match operation, arguments:
        case "publish", [priorities, key, wait_s]:
            batch = [desk.envelope(b"x", priority=p, key=key) for p in priorities]
            await publish(desk, model, batch, wait_s)
        case "delayed", [priority, seconds]:
            await publish(desk, model, [desk.envelope(b"x", priority=priority, due_at=desk.clock.wall() + seconds)], 0)
        case "claim", [name]:
            try:
                delivery = await desk.claim(name, within_s=0.5)
            except TimeoutError:
                return
            line, id_ = model.lines[name], delivery.envelope.id
            line.in_flight[id_] = line.waiting.pop(id_)
            model.held.append(delivery)
        case (("handle" | "retry" | "give_back"), [which, *rest]) if model.held:
            delivery = model.held.pop(which % len(model.held))
            line, id_ = model.lines[delivery.subscription], delivery.envelope.id
            priority = line.in_flight.pop(id_)
            if operation == "handle":
                assert await desk.handled(delivery)
                line.handled += 1
            else:
                line.waiting[id_] = priority
                if operation == "retry":
                    line.tried.add(id_)
                    assert await desk.retrying(delivery, float(rest[0]))
                else:
                    assert await desk.given_back(delivery)
        case "replay", [which]:
            records = await desk.dead_letters()
            if records:
                record = records[which % len(records)]
                line, id_ = model.lines[record.subscription], record.envelope.id
                await desk.transport.replay([record.id])
                line.waiting[id_] = line.dead.pop(id_)
                line.tried.discard(id_)
        case "wait", [seconds]:
            await asyncio.sleep(seconds)


async def publish(desk: Desk, model: Model, batch: list[Any], wait_s: float) -> None:
    now_before = desk.clock.wall()
    try:
        await desk.publish(*batch, wait_s=wait_s)
        refused = False
    except QueueFull:
        refused = True
    now = desk.clock.wall()
    assert now - now_before <= wait_s + 0.5
    model.look(now)
    incoming = [envelope.priority for envelope in batch]
    steps = {
        name: climb(
            pending=len(line.waiting),
            incoming=incoming,
            capacity=capacity_now(line.capacity, line.overflow, line.until, now),
            expanded=may_grow_to(line.capacity, line.overflow, line.until),
            consumed=line.consumed,
            lower=[p for p in line.able() if p < max(incoming)][: len(incoming)],
        )
        for name, line in model.lines.items()
    }
    assert refused == any(step.rung is Rung.REFUSE for step in steps.values()), steps
    facts = desk.ears.recorder.of(OverflowHandled)[model.told :]
    model.told += len(facts)
    assert ("refuse" in [f.action for f in facts]) == refused
    if refused:
        return
    records = await desk.dead_letters()
    for name, line in model.lines.items():
        went, out = steps[name], left_out(incoming, steps[name].leave_out)
        fresh = [r for r in records if r.subscription == name and r.envelope.id not in line.dead]
        displaced = [r for r in fresh if r.report.fingerprint == f"displaced:{name}"]
        check_displaced(line, displaced, line.able()[: went.displace])
        assert {r.envelope.id for r in fresh} - {r.envelope.id for r in displaced} == {batch[n].id for n in out}
        for record in displaced:
            line.dead[record.envelope.id] = line.waiting.pop(record.envelope.id)
        for n, envelope in enumerate(batch):
            (line.dead if n in out else line.waiting)[envelope.id] = envelope.priority
            line.keyed[envelope.id] = envelope.key is not None
        if went.rung is Rung.EXPAND:
            line.until = desk.transport.queues()[name].expanded_until
            assert now - 0.5 <= line.until - line.overflow.expand_for <= now + 0.5
        assert [f.action for f in facts if f.subscription == name].count("expand") == (went.rung is Rung.EXPAND)


def check_displaced(line: Line, displaced: list[DeadLetterRecord], expected: list[int]) -> None:
    assert sorted(r.envelope.priority for r in displaced) == expected
    for record in displaced:
        assert record.envelope.id in line.waiting, "only what waits gives way"
        assert record.reason == "overflow"
        assert (record.attempts > 0) == (record.envelope.id in line.tried)


def compare(desk: Desk, model: Model) -> None:
    ledger, queues = desk.transport.ledger(), desk.transport.queues()
    for name, line in model.lines.items():
        account = ledger.accounts[name]
        assert account.unaccounted == 0
        places = (account.pending, account.in_flight, account.handled, account.dead_lettered)
        assert places == (len(line.waiting), len(line.in_flight), line.handled, len(line.dead)), name
        assert queues[name].expanded_until == line.until
        assert queues[name].capacity == capacity_now(line.capacity, line.overflow, line.until, desk.clock.wall())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(operations=st.lists(OPERATIONS, max_size=60))
def test_a_full_store_does_what_the_ladder_says(store: Store, operations: list[tuple[Any, ...]]) -> None:
    store.fresh().run(lambda desk: play(desk, operations))
