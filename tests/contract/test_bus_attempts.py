"""Attempts on a bus: retries, timeouts, dead letters, payload types; on every transport, with the facts in order."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from typing import Any

import msgspec
import pytest
from suite import House, Store

from glassbus import (
    AdaptiveTimeout,
    ErrorCategory,
    KillSwitch,
    Message,
    MessageConflict,
    Outgoing,
    PayloadUndecodable,
    Priority,
    Retry,
)
from glassbus.facts import (
    AttemptAbandoned,
    AttemptFailed,
    AttemptOverdue,
    Delivery,
    DeliveryDeadLettered,
    DeliveryHandled,
    MessagePublished,
    RecoveryEnded,
    RetryScheduled,
    SlotRegained,
    current_delivery,
)
from glassbus.testing import expect_facts

FLAT = Retry(max_attempts=4, immediate=1, base_delay=1.0, multiplier=1.0, max_delay=1.0)


def test_the_happy_path_states_what_happened_and_nothing_else(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, seen = house.bus(), []

        @bus.subscribe("orders.*")
        async def charge(message: Message[dict[str, int]]) -> None:
            seen.append(message)

        async with bus:
            with expect_facts(bus, MessagePublished, DeliveryHandled, exactly=True):
                receipt = await bus.publish(
                    "orders.created", {"order_id": 17}, priority=Priority.HIGH, headers={"a": "b"}
                )
                await bus.drain()
            assert receipt.subscriptions == (charge.__qualname__.rpartition("<locals>.")[2],)
            assert receipt.level is store.features.level
            assert not receipt.duplicate
        (message,) = seen
        assert message.id == receipt.message_id
        assert (message.topic, message.payload, message.headers) == ("orders.created", {"order_id": 17}, {"a": "b"})
        assert message.priority is Priority.HIGH

    store.run_bus(scenario)


def test_a_failure_that_heals_is_retried_and_its_recovery_told_once_for_each_attempt(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, attempts = house.bus(), []

        @bus.subscribe("orders.*", retry=FLAT)
        async def flaky(message: Message, delivery: Delivery) -> None:
            attempts.append((delivery.attempt, house.clock.monotonic()))
            if delivery.attempt < 4:
                raise ConnectionError("downstream is away")

        async with bus:
            with expect_facts(
                bus,
                MessagePublished,
                *(AttemptFailed, RetryScheduled),
                *(AttemptFailed, RecoveryEnded, RetryScheduled),
                *(AttemptFailed, RecoveryEnded, RetryScheduled),
                *(RecoveryEnded, DeliveryHandled),
                exactly=True,
            ) as facts:
                await bus.publish("orders.created", 1)
                await bus.drain()
        assert [attempt for attempt, _ in attempts] == [1, 2, 3, 4]
        scheduled = facts.of(RetryScheduled)
        assert [f.action for f in scheduled] == ["immediate_retry", "delayed_retry", "delayed_retry"]
        assert [f.next_attempt for f in scheduled] == [2, 3, 4]
        waited = [b - a for (_, a), (_, b) in itertools.pairwise(attempts)]
        assert waited == pytest.approx([f.delay_s for f in scheduled], abs=0.06)  # the delay told is the delay used
        assert [f.outcome for f in facts.of(RecoveryEnded)] == ["failed", "failed", "succeeded"]
        assert {f.category for f in facts.of(RecoveryEnded)} == {ErrorCategory.CONNECTION_ERROR}
        assert facts.of(RecoveryEnded)[-1].duration_s == pytest.approx(sum(waited), abs=0.06)
        assert bus.ledger().total.handled == 1

    store.run_bus(scenario)


def test_the_last_failure_dead_letters_with_its_report(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, runs = house.bus(), []

        @bus.subscribe("orders.*", name="s", retry=FLAT)
        async def broken(message: Message) -> None:
            runs.append(message.id)
            raise ValueError(f"no good: {len(runs)}")

        async with bus:
            receipt = await bus.publish("orders.created", {"n": 1}, key="k", headers={"trace": "x"})
            await bus.drain()
            assert len(runs) == 4
            (dead,) = await bus.dead_letters.list()
            assert (dead.message.id, dead.message.payload) == (receipt.message_id, {"n": 1})
            assert (dead.message.key, dead.message.headers) == ("k", {"trace": "x"})
            assert (dead.subscription, dead.attempts, dead.reason) == ("s", 4, "attempts_spent")
            assert (dead.report.exception_type, dead.report.message) == ("ValueError", "no good: 4")
            assert dead.report.category is ErrorCategory.MESSAGE_PROCESSING_ERROR
            assert "broken" in dead.report.stack_trace
            assert dead.died_at >= dead.first_failed_at > 0
            assert await bus.dead_letters.get(dead.id) == dead
        (fact,) = house.seen.of(DeliveryDeadLettered)
        assert fact.report == dead.report
        assert house.seen.names().count("AttemptFailed") == 4
        assert house.seen.names().count("RecoveryEnded") == 3

    store.run_bus(scenario)


def test_what_is_named_as_not_worth_a_retry_is_dead_lettered_at_once(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()

        @bus.subscribe("orders.*", retry=Retry(dead_letter_on=(LookupError,)))
        async def picky(message: Message) -> None:
            raise KeyError("unknown customer")

        async with bus:
            await bus.publish("orders.created")
            await bus.drain()
            (dead,) = await bus.dead_letters.list()
            assert (dead.attempts, dead.reason) == (1, "not_retryable")

    store.run_bus(scenario)


def test_a_replayed_message_starts_anew(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, healed, attempts = house.bus(), asyncio.Event(), []

        @bus.subscribe("orders.*", retry=Retry(max_attempts=2, base_delay=0.1))
        async def handler(message: Message, delivery: Delivery) -> None:
            attempts.append((message.id, delivery.attempt, delivery.replays))
            if not healed.is_set():
                raise ConnectionError

        async with bus:
            receipt = await bus.publish("orders.created")
            await bus.drain()
            (dead,) = await bus.dead_letters.list()
            healed.set()
            assert await bus.dead_letters.replay(dead.id) == 1
            await bus.drain()
            assert attempts == [(receipt.message_id, 1, 0), (receipt.message_id, 2, 0), (receipt.message_id, 1, 1)]
            assert await bus.dead_letters.list() == []
            total = bus.ledger().total
            assert (total.accepted, total.handled, total.dead_lettered) == (1, 1, 0)
        (fact,) = [f for f in house.seen.facts if type(f).__name__ == "DeadLetterReplayed"]
        assert fact.delivery.replays == 1

    store.run_bus(scenario)


# Timeouts


def test_a_handler_that_hangs_is_cancelled_at_its_timeout_and_retried(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, cancelled_at = house.bus(), []

        @bus.subscribe(
            "orders.*",
            timeout=2.0,
            retry=Retry(max_attempts=2, immediate=1),
            adaptive_timeout=AdaptiveTimeout(cap=1),
        )
        async def hangs(message: Message) -> None:
            started = house.clock.monotonic()
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                cancelled_at.append(house.clock.monotonic() - started)
                raise

        async with bus:
            await bus.publish("orders.created")
            await bus.drain()
            (dead,) = await bus.dead_letters.list()
        assert cancelled_at == pytest.approx([2.0, 2.0], abs=0.1)
        assert dead.report.category is ErrorCategory.TIMEOUT_ERROR
        assert dead.report.exception_type.endswith("HandlerTimedOut")
        assert [f.duration_s for f in house.seen.of(AttemptFailed)] == pytest.approx([2.0, 2.0], abs=0.1)

    store.run_bus(scenario)


def test_a_handler_that_ignores_cancellation_is_overdue_and_may_still_succeed_late(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()

        @bus.subscribe("orders.*", timeout=1.0, abandon_after=60.0)
        async def stubborn(message: Message) -> None:
            until = house.clock.monotonic() + 20
            while house.clock.monotonic() < until:
                try:
                    await asyncio.sleep(until - house.clock.monotonic())
                except asyncio.CancelledError:
                    continue

        async with bus:
            await bus.publish("orders.created")
            await asyncio.sleep(10)
            assert bus.ledger().total.in_flight == 1  # its lease is kept: nobody else runs it
            await bus.drain()
            assert bus.ledger().total.handled == 1
        assert house.seen.names().count("AttemptOverdue") == 1
        (handled,) = house.seen.of(DeliveryHandled)
        assert handled.late
        assert handled.duration_s == pytest.approx(20, abs=0.1)
        assert house.seen.of(AttemptFailed) == []

    store.run_bus(scenario)


def test_a_handler_that_never_ends_is_abandoned_and_its_slot_regained_when_it_does(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, let_go = house.bus(), asyncio.Event()

        @bus.subscribe("orders.*", timeout=1.0, abandon_after=10.0, concurrency=2)
        async def stuck(message: Message) -> None:
            while message.payload == "stuck" and not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue

        async with bus:
            await bus.publish("orders.created", "stuck")
            await asyncio.sleep(15)
            (dead,) = await bus.dead_letters.list()
            assert (dead.reason, dead.attempts) == ("abandoned", 1)
            (abandoned,) = house.seen.of(AttemptAbandoned)
            assert abandoned.ran_s == pytest.approx(10, abs=0.1)
            await bus.publish("orders.created", "fine")  # the other slot goes on
            await bus.drain()
            assert bus.ledger().total.handled == 1
            let_go.set()
            await asyncio.sleep(1)
            assert len(house.seen.of(SlotRegained)) == 1
            assert bus.ledger().total.handled == 1  # its late result is not used

    store.run_bus(scenario)


def test_a_plain_handler_past_its_timeout_keeps_its_slot_and_may_succeed_late(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, gate = house.bus(), house.clock.gate()

        @bus.subscribe("orders.*", timeout=1.0, abandon_after=100.0)
        def blocks(message: Message) -> None:
            gate.wait()

        async with bus:
            await bus.publish("orders.created")
            await asyncio.sleep(5)
            (overdue,) = house.seen.of(AttemptOverdue)
            assert overdue.timeout_s == 1.0
            assert bus.ledger().total.in_flight == 1
            gate.open()
            await bus.drain()
            (handled,) = house.seen.of(DeliveryHandled)
            assert handled.late

    store.run_bus(scenario)


def test_a_plain_handler_that_never_ends_is_abandoned(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, gate = house.bus(), house.clock.gate()

        @bus.subscribe("orders.*", timeout=1.0, abandon_after=3.0)
        def blocks(message: Message) -> None:
            gate.wait()

        async with bus:
            await bus.publish("orders.created")
            await asyncio.sleep(5)
            (dead,) = await bus.dead_letters.list()
            assert dead.reason == "abandoned"
            gate.open()
            await asyncio.sleep(1)
            assert len(house.seen.of(SlotRegained)) == 1
            await bus.publish("orders.created")
            await bus.drain()
            assert bus.ledger().total.handled == 1

    store.run_bus(scenario)


def test_a_cancellation_that_the_handler_makes_itself_is_a_failed_attempt(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()

        @bus.subscribe("orders.*", retry=Retry(max_attempts=2))
        async def gives_up(message: Message) -> None:
            raise asyncio.CancelledError

        async with bus:
            await bus.publish("orders.created")
            await bus.drain()
            (dead,) = await bus.dead_letters.list()
            assert dead.attempts == 2
            assert dead.report.exception_type.endswith("HandlerCancelled")

    store.run_bus(scenario)


# Handlers and payloads


class Order(msgspec.Struct):
    order_id: int
    price: float = 0.0


@dataclasses.dataclass
class Line:
    sku: str


def test_payloads_come_as_the_handler_asks(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, got = house.bus(), {}

        @bus.subscribe("a.struct", name="struct")
        async def struct(message: Message[Order]) -> None:
            got["struct"] = message.payload

        @bus.subscribe("a.payload", name="payload")
        async def payload(order: Order) -> None:
            got["payload"] = order

        @bus.subscribe("a.dataclass", name="dataclass")
        async def lines(items: list[Line]) -> None:
            got["dataclass"] = items

        @bus.subscribe("a.anything", name="anything")
        async def anything(message) -> None:  # type: ignore[no-untyped-def]
            got["anything"] = message.payload

        @bus.subscribe("a.raw", name="raw")
        async def raw(body: bytes) -> None:
            got["raw"] = body

        @bus.subscribe("a.plain", name="plain")
        def plain(order: dict[str, int]) -> None:
            got["plain"] = order

        async with bus:
            await bus.publish("a.struct", Order(1, 2.5))
            await bus.publish("a.payload", {"order_id": 2})
            await bus.publish("a.dataclass", [Line("x")])
            await bus.publish("a.anything", {"any": [None, 1.5, "ü"]})
            await bus.publish("a.raw", b"\x00\xff")
            await bus.publish("a.plain", {"n": 1})
            await bus.drain()
        assert got == {
            "struct": Order(1, 2.5),
            "payload": Order(2),
            "dataclass": [Line("x")],
            "anything": {"any": [None, 1.5, "ü"]},
            "raw": b"\x00\xff",
            "plain": {"n": 1},
        }

    store.run_bus(scenario)


def test_an_undecodable_payload_is_dead_lettered_raw_after_one_attempt(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, runs = house.bus(), []

        @bus.subscribe("orders.*")
        async def wants_an_order(order: Order) -> None:
            runs.append(order)

        async with bus:
            await bus.publish("orders.created", {"order_id": "many"})
            await bus.publish("orders.created", b"\xff\x00 raw")
            await bus.publish("orders.created", {"order_id": 1})
            await bus.drain()
            assert runs == [Order(1)]
            dead = await bus.dead_letters.list()
            assert {d.reason for d in dead} == {"not_retryable"}
            assert {d.attempts for d in dead} == {1}
            assert {d.report.category for d in dead} == {ErrorCategory.SERIALIZATION_ERROR}
            assert {d.report.exception_type.rpartition(".")[2] for d in dead} == {PayloadUndecodable.__name__}
            assert [d.message.payload for d in dead] == [b"\xff\x00 raw", {"order_id": "many"}]

    store.run_bus(scenario)


def test_each_attempt_has_its_own_payload_and_context(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, seen = house.bus(), []

        @bus.subscribe("orders.*", retry=FLAT)
        async def spoils(message: Message) -> None:
            seen.append((dict(message.payload), current_delivery.get().attempt))  # type: ignore[union-attr]
            message.payload["spoiled"] = True
            current_delivery.set(None)
            raise ValueError

        async with bus:
            await bus.publish("orders.created", {"n": 1})
            await bus.drain()
        assert seen == [({"n": 1}, attempt) for attempt in (1, 2, 3, 4)]
        assert current_delivery.get() is None

    store.run_bus(scenario)


@pytest.mark.parametrize("plain", [False, True])
def test_at_most_concurrency_attempts_run_at_once(store: Store, plain: bool) -> None:
    async def scenario(house: House) -> None:
        bus, clock = house.bus(), house.clock
        running = most = 0

        def enter() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)

        async def work(message: Message) -> None:
            nonlocal running
            enter()
            await asyncio.sleep(1)
            running -= 1

        def plain_work(message: Message) -> None:
            nonlocal running
            enter()
            clock.sleep(1)
            running -= 1

        bus.subscribe("orders.*", name="s", concurrency=3)(plain_work if plain else work)
        async with bus:
            started = clock.monotonic()
            await bus.publish_many([("orders.created", n) for n in range(9)])
            await bus.drain()
            assert clock.monotonic() - started == pytest.approx(3, abs=0.5)
        assert most == 3
        assert bus.ledger().total.handled == 9

    store.run_bus(scenario)


def test_a_poison_message_pauses_nobody(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, handled = house.bus(), []

        @bus.subscribe("orders.*", retry=Retry(max_attempts=30, immediate=30), kill_switch=KillSwitch(minimum=3))
        async def handler(message: Message) -> None:
            if message.payload == "poison":
                raise ValueError("I never work")
            handled.append(message.payload)

        async with bus:
            await bus.publish("orders.created", "poison")
            for n in range(5):
                await bus.publish("orders.created", n)
            await bus.drain()
            (dead,) = await bus.dead_letters.list()
            assert dead.attempts == 30
        assert sorted(handled) == list(range(5))
        assert "BreakerStateChanged" not in house.seen.names()

    store.run_bus(scenario)


def test_a_handler_can_publish_and_does_not_wait_for_room(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, refused = house.bus(), []

        @bus.subscribe("first.*", name="first")
        async def first(message: Message) -> None:
            started = house.clock.monotonic()
            try:
                await bus.publish("second.x")
            except Exception as error:
                refused.append((type(error).__name__, house.clock.monotonic() - started))

        @bus.subscribe("second.*", name="second", capacity=1, timeout=500.0)
        async def second(message: Message) -> None:
            await asyncio.sleep(100)

        async with bus:
            for _ in range(4):
                await bus.publish("first.x")
                await asyncio.sleep(1)
            assert [name for name, _ in refused] == ["QueueFull", "QueueFull"]
            assert all(waited_s < 0.1 for _, waited_s in refused)
            await bus.drain()
            assert bus.ledger().accounts["second"].handled == 2

    store.run_bus(scenario)


def test_options_of_publish_reach_the_message(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, got = house.bus(), []

        @bus.subscribe(">", name="s")
        async def handler(message: Message) -> None:
            got.append((message.payload, round(house.clock.wall() - message.published_at)))

        async with bus:
            await bus.publish("a", "delayed", delay=60)
            await bus.publish("a", "over", delay=60, expires_in=30)
            await bus.publish_many([Outgoing("a", "now"), ("a", "pair")])
            drained = await bus.drain()
            assert drained == {"s"}
            assert drained.reasons == {"s": "due_later"}
            await asyncio.sleep(62)
            await bus.drain()
            total = bus.ledger().total
            assert (total.handled, total.expired) == (3, 1)
        assert got == [("now", 0), ("pair", 0), ("delayed", 60)]

    store.run_bus(scenario)


def test_ids_given_by_the_caller_are_recognised(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, got = house.bus(), []

        @bus.subscribe("a.*", name="s")
        async def handler(payload: Any) -> None:
            got.append(payload)

        async with bus:
            first = await bus.publish("a.b", 1, message_id="order-17")
            again = await bus.publish("a.b", 1, message_id="order-17")
            assert (first.duplicate, again.duplicate) == (False, True)
            assert again.subscriptions == ("s",)
            with pytest.raises(MessageConflict):
                await bus.publish("a.b", 2, message_id="order-17")
            nobody = await bus.publish("elsewhere", 1)
            assert nobody.subscriptions == ()
            await bus.drain()
        assert got == [1]
        names = house.seen.names()
        assert (
            names.count("DuplicateRecognised") == names.count("PublishRefused") == names.count("MessageUnrouted") == 1
        )

    store.run_bus(scenario)
