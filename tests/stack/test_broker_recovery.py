"""A real nats-server behind a faulty proxy: each way to lose it, the facts it makes, exactly, and nothing lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from glassbus import (
    BusNotRunning,
    Credentials,
    EndpointRefused,
    EndpointUnreachable,
    Level,
    Message,
    MessageBus,
    Reconnect,
    Spool,
    SpoolFull,
)
from glassbus.facts import (
    BreakerStateChanged,
    ConnectionLost,
    ConnectionRestored,
    CredentialsRefreshed,
    Fact,
    RecoveryConcluded,
    RecoveryStarted,
    SpoolForwarded,
)
from glassbus.faults.proxy import FaultyProxy
from glassbus.testing import RecordingObserver
from tests.nats_kit import Server, running

#: Real seconds within which all that is waited for here must have come: far more than it takes.
SOON_S = 30.0
#: What a recovery may take from the healing of its fault (the design's budget for a broker).
RECOVERED_S = 10.0

OLD, NEW = ('authorization { user: "bus", password: "old" }', 'authorization { user: "bus", password: "new" }')


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "server") as one:
        yield one


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    """A server with a password."""
    with running(tmp_path / "server", OLD) as one:
        yield one


class Rig:
    """A bus on a broker, and what became of each message."""

    def __init__(self, urls: list[str], folder: Path, **options: Any) -> None:
        self.seen = RecordingObserver()
        self.handled: set[str] = set()
        self.accepted: set[str] = set()
        self.levels: list[Level] = []
        self.bus = MessageBus(urls, telemetry=False, state_dir=folder / "state", observers=[self.seen], **options)

        @self.bus.subscribe("orders.*", name="work", concurrency=4)
        async def work(message: Message) -> None:
            self.handled.add(message.id)

    async def publish(self, *ids: str) -> None:
        for one in ids:
            receipt = await self.bus.publish("orders.created", {"id": one}, message_id=one)
            self.accepted.add(one)
            self.levels.append(receipt.level)

    def story(self) -> list[str]:
        """What was stated of the connection."""
        return [one for fact in self.seen.facts if (one := told(fact))]

    async def until(self, true: Callable[[], bool], within_s: float = SOON_S) -> float:
        started = time.monotonic()
        async with asyncio.timeout(within_s):
            while not true():
                await asyncio.sleep(0.005)
        return time.monotonic() - started

    async def recovered(self) -> float:
        """How long it takes until there is a connection and all that was accepted is handled."""
        return await self.until(lambda: self.up() and self.accepted <= self.handled)

    def up(self) -> bool:
        return any(connection.up for connection in self.bus.connections())


def told(fact: Fact) -> str:
    match fact:
        case ConnectionLost():
            return f"lost: {fact.category}"
        case RecoveryStarted(component="endpoint"):
            return f"start {fact.action}"
        case RecoveryConcluded(component="endpoint"):
            return f"{fact.outcome} {fact.action}"
        case CredentialsRefreshed():
            return f"credentials {'new' if fact.succeeded else 'none'}"
        case BreakerStateChanged(kind="endpoint"):
            return f"breaker {fact.to_state}"
        case ConnectionRestored():
            return "restored elsewhere" if fact.failed_over_from else "restored"
    return ""


@asynccontextmanager
async def rig(
    folder: Path, *proxies: FaultyProxy, user: str = "", store: str = "rig", **options: Any
) -> AsyncIterator[Rig]:
    one = Rig([f"nats://{user}127.0.0.1:{proxy.port}/{store}" for proxy in proxies], folder, **options)
    async with one.bus:
        await one.publish("first")
        await one.until(lambda: one.accepted <= one.handled)
        one.seen.clear()
        yield one
        await one.recovered()
        assert one.bus.ledger().balanced
        assert (await one.bus.audit()).ok
        # The handler may be quicker than the spool's own note that its message has arrived.
        await one.until(lambda: one.bus.connections()[0].spooled == 0)


def play(server: Server, scenario: Callable[[FaultyProxy], Awaitable[None]]) -> None:
    async def run() -> None:
        async with FaultyProxy("127.0.0.1", server.port) as proxy:
            await scenario(proxy)

    asyncio.run(run())


def test_a_reset_connection_is_made_again(server: Server, tmp_path: Path) -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        async with rig(tmp_path, proxy) as r:
            proxy.drop()
            await r.until(lambda: bool(r.seen.of(ConnectionLost)))
            await r.publish(*(f"m-{n}" for n in range(20)))
            assert await r.recovered() < RECOVERED_S
            assert r.story() == [
                "lost: connection_error",
                "start reconnect",
                "succeeded reconnect",
                "restored",
            ]
            assert Level.DISK in r.levels

    play(server, scenario)


def test_a_killed_server_is_found_again_and_what_was_published_meanwhile_is_forwarded(
    server: Server, tmp_path: Path
) -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        async with rig(tmp_path, proxy) as r:
            await asyncio.to_thread(server.kill)
            await r.until(lambda: not r.up())
            assert not r.bus.health().ready
            await r.publish(*(f"m-{n}" for n in range(200)))
            assert set(r.levels[1:]) == {Level.DISK}
            assert r.bus.connections()[0].spooled == 200
            await asyncio.to_thread(server.start)
            assert await r.recovered() < RECOVERED_S
            await r.publish("direct")
            assert r.levels[-1] is Level.PROCESS
            assert sum(fact.messages for fact in r.seen.of(SpoolForwarded)) == 200
            assert r.story()[0] == "lost: connection_error"
            assert r.story()[-1] == "restored"
            assert r.story().count("succeeded reconnect") == 1
            await r.until(lambda: r.bus.health().ready)

    play(server, scenario)


QUICK = Reconnect(probe_every=0.5, probe_timeout=0.5)


@pytest.mark.parametrize(("way", "reconnect"), [("both", None), ("to_server", QUICK), ("to_client", QUICK)])
def test_a_partition_is_noticed_and_over_within_seconds_of_its_end(
    server: Server, tmp_path: Path, way: Any, reconnect: Reconnect | None
) -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        async with rig(tmp_path, proxy, reconnect=reconnect) as r:
            proxy.partition(way)
            publishing = asyncio.create_task(r.publish(*(f"m-{n}" for n in range(20))))
            assert await r.until(lambda: bool(r.seen.of(ConnectionLost))) < RECOVERED_S
            await publishing
            proxy.heal()
            assert await r.recovered() < RECOVERED_S
            assert r.story()[0] == "lost: connection_error"
            assert r.story()[-1] == "restored"

    play(server, scenario)


def test_it_fails_over_to_the_other_way_and_stays_there(server: Server, tmp_path: Path) -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        async with FaultyProxy("127.0.0.1", server.port) as other, rig(tmp_path, proxy, other) as r:
            proxy.refuse()
            await r.until(lambda: bool(r.seen.of(ConnectionLost)))
            await r.publish(*(f"m-{n}" for n in range(20)))
            assert await r.recovered() < RECOVERED_S
            assert r.story()[-1] == "restored elsewhere"
            assert "succeeded failover" in r.story()
            assert [c.up for c in r.bus.connections()] == [False, True]
            proxy.heal()
            await r.publish("after")
            assert [c.up for c in r.bus.connections()] == [False, True]

    play(server, scenario)


def revoke(server: Server, config: str) -> None:
    server.configure(config)
    server.reload()


def test_a_changed_password_is_asked_for_once(guarded: Server, tmp_path: Path) -> None:
    asked: list[str] = []

    def fresh() -> Credentials:
        asked.append("new")
        return Credentials("bus", "new")

    async def scenario(proxy: FaultyProxy) -> None:
        async with rig(tmp_path, proxy, user="bus:old@", credentials=fresh) as r:
            revoke(guarded, NEW)
            await r.until(lambda: bool(r.seen.of(ConnectionLost)))
            await r.publish(*(f"m-{n}" for n in range(20)))
            assert await r.recovered() < RECOVERED_S
            assert asked == ["new"]
            assert r.story()[1:] == [
                "start reconnect",
                "failed reconnect",
                "start refresh_credentials",
                "credentials new",
                "succeeded refresh_credentials",
                "restored",
            ]
            assert "old" not in str(r.seen.facts)

    play(guarded, scenario)


def test_a_password_nobody_knows_forces_the_endpoint_open_until_an_operator_mends_it(
    guarded: Server, tmp_path: Path
) -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        async with rig(tmp_path, proxy, user="bus:old@") as r:
            revoke(guarded, NEW)
            await r.until(lambda: "breaker forced_open" in r.story())
            dials = proxy.connections
            await r.publish(*(f"m-{n}" for n in range(20)))
            await asyncio.sleep(2.0)
            assert proxy.connections == dials, "no hammering"
            assert r.story()[1:] == [
                "start reconnect",
                "failed reconnect",
                "start refresh_credentials",
                "failed refresh_credentials",
                "breaker forced_open",
            ]
            [view] = [v for v in r.bus.breaker_views() if v.kind == "endpoint"]
            assert (view.state, view.name) == ("forced_open", f"nats://127.0.0.1:{proxy.port}/rig")
            assert not r.bus.health().ready
            with pytest.raises(EndpointRefused):
                await r.bus.reconnect()
            revoke(guarded, OLD)
            started = time.monotonic()
            while not r.up() and time.monotonic() < started + SOON_S:
                try:
                    await r.bus.reconnect()
                except EndpointRefused:  # the server reads its configuration some time after the signal
                    await asyncio.sleep(0.1)
            assert await r.recovered() < RECOVERED_S
            assert r.story()[-1] == "restored"

    play(guarded, scenario)


def test_what_a_dead_bus_left_in_its_spool_is_forwarded_by_the_next(server: Server, tmp_path: Path) -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        one = Rig([f"nats://127.0.0.1:{proxy.port}/rig"], tmp_path)
        async with one.bus:
            proxy.refuse()
            await one.until(lambda: not one.up())
            await one.publish(*(f"m-{n}" for n in range(30)))
            await one.bus.stop(1.0)
        with pytest.raises(EndpointUnreachable):
            await Rig(
                [f"nats://127.0.0.1:{proxy.port}/rig"], tmp_path, reconnect=Reconnect(start_timeout=0.5)
            ).bus.start()
        proxy.heal()
        two = Rig([f"nats://127.0.0.1:{proxy.port}/rig"], tmp_path)
        async with two.bus:
            await two.until(lambda: two.handled >= one.accepted)

    play(server, scenario)


def test_a_full_spool_refuses_and_without_one_publishing_fails(server: Server, tmp_path: Path) -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        async with rig(tmp_path, proxy, spool=Spool(max_messages=5)) as r:
            proxy.refuse()
            await r.until(lambda: not r.up())
            await r.publish(*(f"m-{n}" for n in range(5)))
            with pytest.raises(SpoolFull):
                await r.publish("one too many")
            proxy.heal()
        async with rig(tmp_path, proxy, store="two", spool=Spool(enabled=False), publish_timeout=0.5) as r:
            proxy.refuse()
            await r.until(lambda: not r.up())
            with pytest.raises(Exception, match=r"connection|stored"):
                await r.publish("nowhere")
            proxy.heal()
            await r.recovered()
        with pytest.raises(BusNotRunning):
            await r.publish("after the end")

    play(server, scenario)
