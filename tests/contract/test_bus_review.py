"""The bus on every transport: what a first review found, held for good."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NoReturn

import pytest
from suite import House, Store

from glassbus import (
    AdaptiveTimeout,
    InvalidMessage,
    KillSwitch,
    Message,
    MessageBus,
    Outgoing,
    PublishUncertain,
    QueueFull,
    Retry,
    TransportError,
)
from glassbus.facts import AttemptFailed, DeliveryDeadLettered
from glassbus.message import Envelope
from glassbus.testing import VirtualClock, run_virtual
from glassbus.transport import Hold


async def nothing(message: Message) -> None:
    """Handles anything."""


@pytest.mark.parametrize("stubborn_s", [0.0, 5.0, 60.0])
def test_an_overdue_handler_leaves_the_timeouts_of_its_neighbours_alone(store: Store, stubborn_s: float) -> None:
    """One slot cleans up, is overdue or is abandoned; an attempt that starts meanwhile is cancelled in time."""

    async def scenario(house: House) -> None:
        bus, ends = house.bus(), []

        @bus.subscribe(
            "t",
            name="s",
            concurrency=2,
            timeout=1.0,
            abandon_after=30.0,
            retry=Retry(max_attempts=1),
            adaptive_timeout=AdaptiveTimeout(cap=1),
        )
        async def handler(message: Message) -> None:
            began = house.clock.monotonic()
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                if message.payload == "stubborn":
                    await asyncio.sleep(stubborn_s)
                else:
                    ends.append(house.clock.monotonic() - began)
                raise

        async with bus:
            await bus.publish("t", "stubborn")
            for wait_s in (1.5, 1.0, 3.0):
                await asyncio.sleep(wait_s)
                await bus.publish("t", "neighbour")
            await asyncio.sleep(5)
            assert ends == pytest.approx([1.0, 1.0, 1.0], abs=0.01)

    store.run_bus(scenario)


def test_drain_ends_when_the_bus_stops_and_names_what_is_left(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()

        @bus.subscribe("t", name="s", timeout=1000.0)
        async def slow(message: Message) -> None:
            await asyncio.sleep(500)

        await bus.start()
        for _ in range(3):
            await bus.publish("t")
        during = asyncio.ensure_future(bus.drain())
        await asyncio.sleep(1)
        await bus.stop(1.0)
        for drained in (await during, await bus.drain()):
            if store.backend.keeps:
                assert drained.reasons == {"s": "stopped"}
                assert not drained.complete
            else:
                assert drained.complete  # discarded, each with a fact

    store.run_bus(scenario)


def test_before_its_start_a_bus_says_that_its_store_is_not_open(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()
        bus.subscribe("t", name="s")(nothing)
        for ask in (bus.ledger, bus.queues, lambda: bus.pause("s")):
            with pytest.raises(TransportError, match="not started"):
                ask()
        with pytest.raises(TransportError, match="not started"):
            await bus.drain()

    store.run_bus(scenario)


def test_two_verbs_at_once_change_their_own_part_of_a_hold(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()
        bus.subscribe("t", name="s")(nothing)
        async with bus:
            await asyncio.gather(bus.pause("s"), bus.breakers["s"].force_open())
            assert bus.queues()["s"].hold == Hold(True, "forced_open")
            await asyncio.gather(bus.breakers["s"].reset(), bus.resume("s"))
            assert bus.queues()["s"].hold == Hold()
            await bus.publish("t")
            assert (await bus.drain()).complete

    store.run_bus(scenario)


def test_pause_from_another_thread_changes_nothing(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()
        bus.subscribe("t", name="s")(nothing)
        async with bus:
            with pytest.raises(RuntimeError, match="no running event loop"):
                await asyncio.to_thread(bus.pause, "s")
            await bus.publish("t")
            assert (await bus.drain()).complete

    store.run_bus(scenario)


def test_a_lowered_max_attempts_does_not_blame_a_death(store: Store) -> None:
    if not store.backend.keeps:
        return  # nothing of it outlives a restart

    async def scenario(house: House) -> None:
        async def fails(message: Message) -> None:
            raise ValueError("honest")

        bus = house.bus()
        bus.subscribe("t", name="s", retry=Retry(max_attempts=9, immediate=1, base_delay=9.0))(fails)
        async with bus:
            await bus.publish("t")
            await asyncio.sleep(0.2)
        assert len(house.seen.of(AttemptFailed)) == 2
        again = house.bus()
        again.subscribe("t", name="s", retry=Retry(max_attempts=2))(fails)
        async with again:
            await again.drain()
            (dead,) = await again.dead_letters.list()
        assert (dead.reason, dead.attempts) == ("attempts_spent", 2)
        assert "message_processing_error" in dead.report.message
        assert len(house.seen.of(DeliveryDeadLettered)) == 1

    store.run_bus(scenario)


@pytest.mark.parametrize("messages", ["axx", ["axx"], [("t", 1, 2)], [("t",)], [{"topic": "t"}], 5, [None], b"tt"])
def test_a_batch_of_anything_but_messages_is_refused(store: Store, messages: object) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()
        bus.subscribe(">", name="s")(nothing)
        async with bus:
            with pytest.raises(InvalidMessage):
                await bus.publish_many([Outgoing("t", 1), *messages] if isinstance(messages, list) else messages)  # type: ignore[arg-type]
            with pytest.raises(InvalidMessage):
                await bus.publish("t", headers=[])  # type: ignore[arg-type]
            assert bus.ledger().accounts["s"].accepted == 0

    store.run_bus(scenario)


def test_a_task_that_a_handler_left_behind_waits_for_room_like_everybody(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus(publish_timeout=100.0)
        tasks: list[asyncio.Task[object]] = []

        @bus.subscribe("first", name="first")
        async def first(message: Message) -> None:
            async def later() -> None:
                await asyncio.sleep(1)
                for _ in range(3):
                    await bus.publish("second")

            tasks.append(asyncio.create_task(later()))
            with pytest.raises(QueueFull):  # here waiting could be for itself
                for _ in range(5):
                    await bus.publish("second")

        @bus.subscribe("second", name="second", capacity=1)
        async def second(message: Message) -> None:
            await asyncio.sleep(5)

        async with bus:
            await bus.publish("first")
            await bus.drain()
            await asyncio.gather(*tasks)
            await bus.drain()

    store.run_bus(scenario)


def test_success_rate_is_of_what_was_settled_lately_and_retries_do_not_lower_it(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, failed_once = house.bus(), set[str]()
        quick = Retry(max_attempts=3, immediate=2)

        @bus.subscribe("t", name="s", retry=quick, kill_switch=KillSwitch(enabled=False))
        async def handler(message: Message) -> None:
            if message.payload == "never":
                raise ValueError("never")
            if message.id not in failed_once:
                failed_once.add(message.id)
                raise ConnectionError("once")

        async with bus:
            assert bus.health().success_rate == 1.0
            for _ in range(4):
                await bus.publish("t", "late")
                await bus.drain()
            assert len(house.seen.of(AttemptFailed)) == 4
            assert bus.health().success_rate == 1.0
            for _ in range(4):
                await bus.publish("t", "never")
            await bus.drain()
            assert bus.health().success_rate == 0.5
            assert bus.health().status == "critical"
            await asyncio.sleep(310)
            assert bus.health().success_rate == 1.0
            assert bus.health().status == "healthy"

    store.run_bus(scenario)


@pytest.mark.parametrize(
    "options",
    [{"retry": 3}, {"kill_switch": False}, {"concurrency": "2"}, {"timeout": "1"}, {"capacity": True}],
    ids=str,
)
def test_subscribe_refuses_options_of_the_wrong_type_by_name(options: dict[str, object]) -> None:
    bus = MessageBus(telemetry=False)
    with pytest.raises(ValueError, match=next(iter(options))):
        bus.subscribe("t", **options)(nothing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pattern"):
        bus.subscribe(nothing)  # type: ignore[arg-type]


def test_dead_letters_are_found_by_the_bare_and_the_qualified_name_of_their_error(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()

        @bus.subscribe("t", name="s")
        async def wants_a_number(payload: int) -> None:
            """Handles numbers."""

        async with bus:
            await bus.publish("t", "no number")
            await bus.drain()
            for name in ("PayloadUndecodable", "glassbus.errors.PayloadUndecodable"):
                (dead,) = await bus.dead_letters.list(exception_type=name)
                assert "codec.py" not in dead.report.stack_trace, "our own frames say nothing to a user"
            assert not await bus.dead_letters.list(exception_type="Undecodable")

    store.run_bus(scenario)


def test_a_bus_made_in_virtual_time_takes_its_clock() -> None:
    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(telemetry=False)
        assert bus.clock is clock
        runs = []

        @bus.subscribe("t", retry=Retry(max_attempts=2, immediate=0, base_delay=3600.0, max_delay=3600.0))
        async def fails_once(message: Message) -> None:
            runs.append(clock.monotonic())
            if len(runs) == 1:
                raise ValueError("once")

        async with bus:
            await bus.publish("t")
            assert (await bus.drain()).complete
        assert len(runs) == 2

    run_virtual(scenario, seed=1)
    assert not isinstance(MessageBus(telemetry=False).clock, VirtualClock)


def test_a_replay_long_after_the_expiry_is_handled_all_the_same(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, broken = house.bus(), [True]

        @bus.subscribe("t", name="s", retry=Retry(max_attempts=1))
        async def handler(message: Message) -> None:
            if broken[0]:
                raise ValueError("broken")

        async with bus:
            await bus.publish("t", expires_in=10)
            await bus.drain()
            await asyncio.sleep(1000)
            broken[0] = False
            (dead,) = await bus.dead_letters.list()
            assert await bus.dead_letters.replay(dead.id) == 1
            await bus.drain()
            assert bus.ledger().accounts["s"].handled == 1

    store.run_bus(scenario)


def test_an_uncertain_batch_names_every_message_of_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()
        bus.subscribe("t", name="s")(nothing)

        async def breaks(batch: Sequence[Envelope], *_: object, **__: object) -> NoReturn:
            raise PublishUncertain(batch[0].id, "no answer")

        async with bus:
            with monkeypatch.context() as patch:
                patch.setattr(bus._transport, "publish", breaks)
                with pytest.raises(PublishUncertain) as raised:
                    await bus.publish_many([Outgoing("t", message_id=name) for name in "abc"])
            assert raised.value.message_ids == ("a", "b", "c")

    store.run_bus(scenario)


def test_free_space_is_told_where_there_is_a_disk(store: Store) -> None:
    async def scenario(house: House) -> None:
        async with house.bus() as bus:
            free = bus.disk_free_bytes()
            assert (free is not None and free > 0) == store.backend.disk

    store.run_bus(scenario)
