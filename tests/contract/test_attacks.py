"""The bus on every transport, under attack: what was found once stays mended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
from suite import House, Store

from glassbus import (
    BusNotRunning,
    GlassbusError,
    HealthStatus,
    InvalidMessage,
    Message,
    MessageBus,
    PublishUncertain,
    Retry,
    TransportError,
)
from glassbus.facts import ObserverFailed, PublishLeftUncertain, TransportFailed
from glassbus.testing import RecordingObserver, VirtualClock, run_virtual


async def nothing(message: Message) -> None:
    """Handles anything."""


def no(*_: object) -> NoReturn:
    raise KeyboardInterrupt("hands off")


class ClassRaisesError(Exception):
    __class__ = property(no)  # type: ignore[assignment]


class EverythingRaisesError(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise KeyboardInterrupt(name)

    __str__ = __repr__ = no  # type: ignore[assignment]


def meta_raises() -> BaseException:
    class HostileMeta(type):
        def __getattribute__(cls, name: str) -> Any:
            raise SystemExit(name)

        def __hash__(cls) -> int:
            raise SystemExit

    class MetaRaisesError(Exception, metaclass=HostileMeta):
        pass

    return MetaRaisesError()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("make", [ClassRaisesError, EverythingRaisesError, meta_raises])
def test_an_exception_that_resists_being_looked_at_is_a_dead_letter(
    store: Store, make: Callable[[], BaseException], plain: bool
) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()

        def raises(message: Message) -> None:
            if message.payload == "bad":
                raise make()

        async def raises_async(message: Message) -> None:
            raises(message)

        bus.subscribe("t", name="s", retry=Retry(max_attempts=2))(raises if plain else raises_async)
        async with bus:
            await bus.publish("t", "bad")
            await bus.publish("t", "good")
            assert (await bus.drain(timeout=60)).complete
            (dead,) = await bus.dead_letters.list()
            assert dead.attempts == 2
            account = bus.ledger().accounts["s"]
            assert (account.handled, account.dead_lettered) == (1, 1)
        assert not house.seen.of(TransportFailed)

    store.run_bus(scenario)


class Liar(str):
    __slots__ = ()

    def __hash__(self) -> int:
        raise SystemExit

    def __eq__(self, other: object) -> bool:
        return False


def test_strings_of_a_users_type_are_taken_as_plain_ones(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, seen = house.bus(), []

        @bus.subscribe("t", name="s")
        async def handler(message: Message) -> None:
            seen.append((type(message.topic), type(message.key), type(message.id)))

        async with bus:
            await bus.publish(Liar("t"), key=Liar("k"), message_id=Liar("m"))
            await bus.drain(timeout=60)
            assert bus.ledger().balanced
            assert bus.ledger().accounts["s"].handled == 1
        assert seen == [(str, str, str)]

    store.run_bus(scenario)


@pytest.mark.parametrize(
    "options",
    [{"priority": True}, {"priority": 1.0}, {"delay": []}, {"delay": True}, {"headers": []}, {"key": 3}, {"key": ""}],
    ids=str,
)
def test_options_of_the_wrong_type_are_refused(store: Store, options: dict[str, Any]) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()
        bus.subscribe("t", name="s")(nothing)
        async with bus:
            with pytest.raises(InvalidMessage):
                await bus.publish("t", **options)

    store.run_bus(scenario)


def test_a_store_that_breaks_under_a_publish_leaves_it_uncertain(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()
        bus.subscribe("t", name="s")(nothing)

        async def breaks(*_: object, **__: object) -> NoReturn:
            raise TransportError("the disk fell out")

        async with bus:
            with monkeypatch.context() as patch:
                patch.setattr(bus._transport, "publish", breaks)
                with pytest.raises(PublishUncertain, match="the disk fell out") as raised:
                    await bus.publish("t", message_id="m")
            assert raised.value.message_id == "m"
            assert [f.envelope.id for f in house.seen.of(PublishLeftUncertain)] == ["m"]

    store.run_bus(scenario)


def test_health_shows_a_failing_store_at_once_and_its_healing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()
        bus.subscribe("t", name="s")(nothing)

        async def breaks() -> NoReturn:
            raise TransportError("no answer")

        async with bus:
            assert bus.health().status is HealthStatus.HEALTHY
            with monkeypatch.context() as patch:
                patch.setattr(bus._transport, "probe", breaks)
                await asyncio.sleep(6)
                assert (bus.health().status, bus.health().ready) == (HealthStatus.CRITICAL, False)
                await asyncio.sleep(10)
                assert len(house.seen.of(TransportFailed)) == 1, "told once"
            await asyncio.sleep(2)
            assert (bus.health().status, bus.health().ready) == (HealthStatus.HEALTHY, True)

    store.run_bus(scenario)


def test_a_handler_cannot_wait_for_the_end_of_its_own_subscription(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, refused = house.bus(), []

        @bus.subscribe("t", name="s")
        async def handler(message: Message) -> None:
            for verb in (bus.forget("s"), bus.stop()):
                try:
                    await verb
                except GlassbusError as error:
                    refused.append(str(error))

        async with bus:
            await bus.publish("t")
            await bus.drain(timeout=60)
            assert bus.ledger().accounts["s"].handled == 1
        assert len(refused) == 2

    store.run_bus(scenario)


def test_another_loop_is_refused_before_anything_is_stored(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, errors = house.bus(), []
        bus.subscribe("t", name="s")(nothing)

        def elsewhere() -> None:
            async def publish() -> None:
                await bus.publish("t")

            try:
                asyncio.run(publish())
            except BusNotRunning as error:
                errors.append(str(error))

        async with bus:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join(10)
            assert "another event loop" in errors[0]
            assert bus.ledger().accounts["s"].accepted == 0

    store.run_bus(scenario)


class BadPropagator:
    """Writes what no publisher may, and takes away what publishers wrote."""

    def __init__(self, bad: Callable[[dict[Any, Any]], None]) -> None:
        self.bad = bad

    def on_fact(self, fact: object, /) -> None:
        """Sees nothing."""

    def inject(self, headers: dict[str, str], /) -> None:
        self.bad(headers)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("key", lambda h: h.update({3: "x"})),
        ("crlf", lambda h: h.update({"x": "a\r\nb"})),
        ("size", lambda h: h.update({"x": "v" * 1_000_000})),
        ("clear", lambda h: h.clear()),
        ("raise", lambda h: no()),
    ],
)
def test_a_propagator_cannot_spoil_a_message(name: str, bad: Callable[[dict[Any, Any]], None]) -> None:
    async def scenario(clock: VirtualClock) -> None:
        told, seen = RecordingObserver(), []
        bus = MessageBus(telemetry=False, observers=[BadPropagator(bad), told])  # type: ignore[list-item]

        @bus.subscribe("t")
        async def handler(message: Message) -> None:
            seen.append(message.headers)

        async with bus:
            await bus.publish("t", headers={"mine": "kept"})
            await bus.publish("t")
            await bus.drain()
        assert seen == [{"mine": "kept"}, {}]
        # Taking headers away is simply not done; all else is a failure of the propagator, and told.
        failures = [(f.observer, f.during) for f in told.of(ObserverFailed)]
        assert failures == [("BadPropagator", "inject")] * bus.hub.failures.get("BadPropagator", 0)
        assert bool(failures) == (name != "clear")

    run_virtual(scenario)
