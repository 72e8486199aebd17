"""What only the JetStream transport has: its stream, its server's deaths, its owners on other machines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client
from suite import Ears, report

from glassbus import (
    ConfigurationError,
    Message,
    MessageBus,
    PublishRejected,
    PublishUncertain,
    Retry,
    StorageFull,
    TransportError,
)
from glassbus.clock import Clock, SystemClock
from glassbus.config import Address, Settings, addresses
from glassbus.errors import EndpointRefused, EndpointUnreachable, StoreCorrupt, StoreTooNew
from glassbus.facts import DeliveryDeadLettered, DeliveryDiscarded, DeliveryExpired, OwnerLost
from glassbus.message import Envelope
from glassbus.policy.delivery import Decision, State
from glassbus.transport import DeadLetterFilter, SubscriptionSpec, Transport
from glassbus.transport.factory import make_transport
from glassbus.transport.nats import sweeping, view
from glassbus.transport.nats.connection import Link
from glassbus.transport.nats.transport import LEASE_S
from tests import nats_kit, server_kit
from tests.patient import Patient

#: Seconds within which what must come has come, however busy the machine is.
SOON_S = 60.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[nats_kit.Server]:
    with nats_kit.running(tmp_path / "nats") as started:
        yield started


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"{nats_kit.shared().url}/{nats_kit.store_name(tmp_path)}"


class Ahead(SystemClock):
    """The operating system's clocks, `by_s` seconds ahead: what takes long need not be waited for."""

    by_s = 0.0

    def monotonic(self) -> float:  # type: ignore[override]
        return time.monotonic() + self.by_s

    def wall(self) -> float:  # type: ignore[override]
        return time.time() + self.by_s


def transport(url: str, clock: Clock | None = None) -> Transport:
    return make_transport(addresses(url), settings=Settings(), clock=clock or SystemClock(), supervise=Patient)


@asynccontextmanager
async def opened(url: str, ears: Ears | None = None, clock: Clock | None = None) -> AsyncIterator[Transport]:
    made = transport(url, clock)
    await made.open(ears or Ears())
    try:
        yield made
    finally:
        await made.close(5.0)


def envelope(n: int, **fields: Any) -> Envelope:
    fields.setdefault("body", b"x")
    fields.setdefault("codec", "raw")
    return Envelope(id=f"m{n}", topic="t", headers={}, **fields)


async def jetstream(url: str, work: Callable[[Client], Awaitable[Any]]) -> Any:
    client = Client()
    await client.connect(url.rpartition("/")[0])
    try:
        return await work(client)
    finally:
        await client.close()


async def api(client: Client, verb: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    answer = await client.request(f"$JS.API.{verb}", json.dumps(body or {}).encode(), timeout=5)
    found: dict[str, Any] = json.loads(answer.data)
    return found


async def settle(made: Transport, name: str, decision: Callable[[int], Decision]) -> bool:
    delivery = await made.claim(name)
    answers: list[bool] = []
    made.settle(delivery, decision(delivery.attempt), lambda _d, _c, took: answers.append(took))
    await made.flush()
    return answers[0]


def handled(attempt: int) -> Decision:
    return Decision(State.HANDLED, attempt)


# The server dies


def test_what_was_accepted_survives_the_servers_sigkill_and_the_bus_goes_on(server: nats_kit.Server) -> None:
    async def scenario() -> None:
        bus = MessageBus(f"{server.url}/kills", telemetry=False)
        seen: Counter[int] = Counter()
        accepted: set[int] = set()

        @bus.subscribe("t", name="s", concurrency=8, retry=Retry(max_attempts=5, base_delay=0.05))
        async def handler(payload: int) -> None:
            seen[payload] += 1
            if payload % 7 == 0 and seen[payload] == 1:
                raise ConnectionError("once")

        async def publish() -> None:
            for n in range(900):
                while n not in accepted:
                    try:
                        await bus.publish("t", n, message_id=f"m{n}")
                        accepted.add(n)
                    except (PublishUncertain, TransportError, PublishRejected):
                        await asyncio.sleep(0.05)

        async with bus:
            publishing = asyncio.ensure_future(publish())
            for _ in range(3):
                target = len(accepted) + 200
                while len(accepted) < target and not publishing.done():
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            await asyncio.wait_for(publishing, 60)
            async with asyncio.timeout(SOON_S):
                while bus.ledger().total.settled < 900:
                    await asyncio.sleep(0.05)
            total = bus.ledger().total
            assert (total.accepted, total.handled, total.unaccounted) == (900, 900, 0)
            audit = await bus.audit()
            assert audit.ok, audit.problems
        assert set(seen) == set(range(900))

    asyncio.run(scenario())


def test_what_waits_goes_on_when_the_server_is_there_again(server: nats_kit.Server) -> None:
    """Claims wait, settlements are kept, publishes are told at once; none of it needs a new transport."""

    async def scenario() -> None:
        async with opened(f"{server.url}/waits") as made:
            await made.declare(SubscriptionSpec("s", "t", 10), consume=True)
            await made.publish([envelope(1), envelope(2)], 0.0)
            first = await made.claim("s")
            await made.claim("s")
            waiting = asyncio.ensure_future(made.claim("s"))
            await asyncio.sleep(0.05)
            await asyncio.to_thread(server.kill)
            answers: list[bool] = []
            made.settle(first, handled(1), lambda _d, _c, took: answers.append(took))
            with pytest.raises((EndpointUnreachable, PublishUncertain)):
                await asyncio.wait_for(made.publish([envelope(3)], 0.0), SOON_S)
            with pytest.raises(EndpointUnreachable):
                await asyncio.wait_for(made.probe(), SOON_S)
            assert not waiting.done()
            assert not answers
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(SOON_S):
                await made.flush()
                assert answers == [True]
                while True:
                    try:
                        await made.publish([envelope(4)], 0.0)
                        break
                    except EndpointUnreachable:
                        await asyncio.sleep(0.05)
                assert (await waiting).envelope.id == "m4"
            assert (await made.audit()).ok

    asyncio.run(scenario())


async def answers_again(made: Transport) -> None:
    async with asyncio.timeout(SOON_S):
        while True:
            try:
                await made.probe()
                return
            except EndpointUnreachable:
                await asyncio.sleep(0.05)


def test_one_that_has_nothing_to_say_is_connected_again_too(server: nats_kit.Server) -> None:
    async def scenario() -> None:
        async with opened(f"{server.url}/idle") as made:
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            await answers_again(made)
            assert made._supervisor.up()  # type: ignore[attr-defined]

    asyncio.run(scenario())


def test_a_close_while_the_server_is_away_keeps_its_deadline_and_refuses_what_it_could_not_record(
    server: nats_kit.Server,
) -> None:
    async def scenario() -> None:
        made = transport(f"{server.url}/closing")
        await made.open(Ears())
        await made.declare(SubscriptionSpec("s", "t", 10), consume=True)
        await made.publish([envelope(1)], 0.0)
        delivery = await made.claim("s")
        waiting = asyncio.ensure_future(made.claim("s"))
        await asyncio.to_thread(server.kill)
        answers: list[bool] = []
        made.settle(delivery, handled(1), lambda _d, _c, took: answers.append(took))
        async with asyncio.timeout(SOON_S):
            assert await made.close(0.5) == (0, 0)
            while not answers:
                await asyncio.sleep(0.01)
            with pytest.raises(TransportError):
                await waiting
        assert answers == [False]
        made._engine.join(SOON_S)  # type: ignore[attr-defined]
        assert not made._engine._thread.is_alive()  # type: ignore[attr-defined]

    asyncio.run(scenario())


@pytest.mark.parametrize("connected", [True, False])
def test_a_loop_that_is_closed_under_it_ends_its_thread_and_gives_back_what_it_had(
    server: nats_kit.Server, connected: bool
) -> None:
    loop = asyncio.new_event_loop()

    async def abandoned() -> Transport:
        made = transport(f"{server.url}/left")
        await made.open(Ears())
        await made.declare(SubscriptionSpec("s", "t", 10), consume=True)
        await made.publish([envelope(1)], 0.0)
        await made.claim("s")
        return made

    made = loop.run_until_complete(abandoned())
    if not connected:
        server.kill()
    loop.close()
    made._engine.join(SOON_S)  # type: ignore[attr-defined]
    assert not made._engine._thread.is_alive()  # type: ignore[attr-defined]

    async def scenario() -> None:
        async with opened(f"{server.url}/left") as again:
            delivery = await asyncio.wait_for(again.claim("s"), SOON_S)
            assert (delivery.attempt, delivery.redelivered) == (1, "")

    if connected:
        asyncio.run(scenario())


def test_a_forked_child_is_told_to_open_its_own(url: str) -> None:
    async def scenario() -> None:
        async with opened(url) as made:
            await made.declare(SubscriptionSpec("s", "t", 10), consume=True)
            made._process = -1  # type: ignore[attr-defined] # as it is in a child
            with pytest.raises(TransportError, match="forked"):
                await made.publish([envelope(1)], 0.0)
            with pytest.raises(TransportError, match="forked"):
                made.ledger()
            assert await made.close(1.0) == (0, 0)
            made._process = os.getpid()  # type: ignore[attr-defined]

    asyncio.run(scenario())


def test_a_server_that_lost_its_store_stops_the_bus_instead_of_beginning_anew(server: nats_kit.Server) -> None:
    async def scenario() -> None:
        ears = Ears()
        async with opened(f"{server.url}/wiped", ears):
            await asyncio.to_thread(server.kill)
            shutil.rmtree(server.place / "store")
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(SOON_S):
                while not ears.errors:
                    await asyncio.sleep(0.05)
            assert isinstance(ears.errors[0], StoreCorrupt)

    asyncio.run(scenario())


def test_another_server_with_a_stream_of_its_own_is_read_from_its_beginning(
    server: nats_kit.Server, tmp_path: Path
) -> None:
    """Servers of a failover set should serve one stream; where they do not, nothing of them is mixed."""

    async def scenario(other: nats_kit.Server) -> None:
        async with opened(f"{other.url}/two") as before:
            await before.declare(SubscriptionSpec("theirs", "t", 10), consume=False)
            await before.publish([envelope(9)], 0.0)
        async with opened(f"{server.url}/two,{other.url}/two") as made:
            await made.declare(SubscriptionSpec("ours", "t", 10), consume=True)
            for n in range(20):
                await made.publish([envelope(n, body=b"x")], 0.0)
                if n < 10:
                    await settle(made, "ours", handled)
            held = await made.claim("ours")
            await asyncio.to_thread(server.kill)
            await answers_again(made)
            assert set(made.ledger().accounts) == {"theirs"}
            answers: list[bool] = []
            made.settle(held, handled(1), lambda _d, _c, took: answers.append(took))
            await made.flush()
            assert answers == [False]
            (stored,) = await made.publish([envelope(100)], 0.0)
            assert stored.subscriptions == ("theirs",)
            assert made.ledger().accounts["theirs"].pending == 2
            assert (await made.audit()).ok

    with nats_kit.running(tmp_path / "other") as other:
        asyncio.run(scenario(other))


# Owners


_WORKER = """
import asyncio, sys
from glassbus import MessageBus

bus = MessageBus(sys.argv[1], name=sys.argv[2], telemetry=False)

@bus.subscribe("t", name="s", concurrency=4)
async def handler(payload: int) -> None:
    if payload == -1:
        print("poison", flush=True)
        await asyncio.sleep(3600)
    print(payload, flush=True)

async def main():
    async with bus:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


@asynccontextmanager
async def worker(url: str, name: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that consumes until its stdin is closed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        textwrap.dedent(_WORKER),
        url,
        name,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        limit=1 << 20,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def lines(process: asyncio.subprocess.Process) -> list[str]:
    """All that it has said once it has been let go."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    return (await process.stdout.read()).decode().split()


def test_two_processes_share_the_work_and_none_is_done_twice(url: str) -> None:
    async def scenario() -> None:
        async with worker(url, "one") as one, worker(url, "two") as two, opened(url) as made:
            for process in (one, two):
                assert process.stdout is not None
                await asyncio.wait_for(process.stdout.readline(), SOON_S)
            for n in range(0, 400, 20):
                await made.publish([envelope(m, body=str(m).encode(), codec="json") for m in range(n, n + 20)], 0.0)
            async with asyncio.timeout(SOON_S):
                while made.ledger().accounts["s"].handled < 400:
                    await asyncio.sleep(0.05)
            shares = [await lines(process) for process in (one, two)]
            assert sorted(int(n) for n in [*shares[0], *shares[1]]) == list(range(400))
            assert all(shares)
            assert (await made.audit()).ok

    asyncio.run(scenario())


def test_a_killed_owners_deliveries_come_back_charged_and_one_at_a_time(url: str) -> None:
    async def scenario() -> None:
        ears, ahead = Ears(), Ahead()
        async with opened(url, ears, ahead) as made:
            async with worker(url, "doomed") as process:
                assert process.stdout is not None
                assert (await asyncio.wait_for(process.stdout.readline(), SOON_S)).split() == [b"ready"]
                await made.publish([envelope(n, body=b"-1", codec="json") for n in range(2)], 0.0)
                for _ in range(2):
                    assert (await asyncio.wait_for(process.stdout.readline(), SOON_S)).split() == [b"poison"]
                async with asyncio.timeout(SOON_S):
                    while made.ledger().accounts["s"].in_flight < 2:
                        await asyncio.sleep(0.01)
                process.send_signal(signal.SIGKILL)
            await made.probe()  # all that it wrote was read
            ahead.by_s = LEASE_S
            async with asyncio.timeout(SOON_S):
                first = await made.claim("s")
            assert (first.attempt, first.redelivered) == (2, "lease_expired")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(made.claim("s"), 0.3)
            made.settle(first, handled(2), lambda *_: None)
            async with asyncio.timeout(SOON_S):
                second = await made.claim("s")
            assert (second.attempt, second.redelivered) == (2, "lease_expired")
        (lost,) = ears.recorder.of(OwnerLost)
        assert (lost.deliveries, lost.reason) == (2, "lease_expired")

    asyncio.run(scenario())


def test_an_owner_that_was_given_up_cannot_settle_and_becomes_another(url: str) -> None:
    async def scenario() -> None:
        async with opened(f"{url}?lease=0.5") as slow:
            await slow.declare(SubscriptionSpec("s", "t", 10), consume=True)
            await slow.publish([envelope(1)], 0.0)
            stale = await slow.claim("s")
            # It gives no sign for a while, as a process that is stopped does not.
            slow._engine._rounds._lease_s = 1000.0  # type: ignore[attr-defined]
            slow._engine._rounds.renew_at = float("inf")  # type: ignore[attr-defined]
            async with opened(url) as other, asyncio.timeout(SOON_S):
                await other.declare(SubscriptionSpec("s", "t", 10), consume=True)
                again = await other.claim("s")
                assert (again.attempt, again.redelivered) == (2, "lease_expired")
                answers: list[bool] = []
                slow.settle(stale, handled(1), lambda _d, _c, took: answers.append(took))
                await slow.flush()
                assert answers == [False]
                other.settle(again, handled(2), lambda _d, _c, took: answers.append(took))
                await other.flush()
                assert answers == [False, True]
                await slow.publish([envelope(2)], 0.0)
                assert (await slow.claim("s")).envelope.id == "m2"
                await other.probe()  # it reads its own entry back, and so has read that claim
                assert slow.ledger() == other.ledger()
                assert (await other.audit()).ok

    asyncio.run(scenario())


# The connection, but not the server, breaks


class Proxy:
    """Between a transport and its server. `deafen`: what the server says is held back; `mute`: what it is told."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._hears = asyncio.Event()
        self._hears.set()
        self._speaks = asyncio.Event()
        self._speaks.set()
        self._server: asyncio.Server
        self._all: list[asyncio.StreamWriter] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._all:
            writer.transport.abort()  # and nobody is waited for who does not read
        await asyncio.gather(*(writer.wait_closed() for writer in self._all), return_exceptions=True)

    def deafen(self, deaf: bool) -> None:
        (self._hears.clear if deaf else self._hears.set)()

    def mute(self) -> asyncio.Event:
        """Hold back what the connections there are now say; setting the event lets it go."""
        speaks, self._speaks = self._speaks, asyncio.Event()
        self._speaks.set()
        speaks.clear()
        return speaks

    def drop_clients(self) -> None:
        """Break the connections there are now, but only for the client."""
        for writer in self._clients:
            writer.close()
        self._clients.clear()

    def drop(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        self._tasks.add(serving)
        serving.add_done_callback(self._tasks.discard)
        self._all.append(writer)
        upstream, sink = await asyncio.open_connection("127.0.0.1", self._to)
        self._all.append(sink)
        self._writers |= {writer, sink}
        self._clients.add(writer)
        for source, target, gate in ((reader, sink, self._speaks), (upstream, writer, self._hears)):
            task = asyncio.ensure_future(self._pump(source, target, gate))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, gate: asyncio.Event) -> None:
        try:
            while data := await source.read(65536):
                await gate.wait()
                target.write(data)
                await target.drain()
        except OSError:
            return
        finally:
            target.close()


@pytest.mark.parametrize("remember", [True, False])
def test_a_publish_without_an_answer_is_uncertain_and_its_id_known_if_it_was_stored(url: str, remember: bool) -> None:
    async def scenario() -> None:
        name = url.rpartition("/")[2]
        async with Proxy(nats_kit.shared().port) as proxy, opened(f"nats://127.0.0.1:{proxy.port}/{name}") as made:
            await made.declare(SubscriptionSpec("s", "t", 10), consume=True)
            proxy.deafen(True)
            publishing = asyncio.ensure_future(made.publish([envelope(1, remember=remember)], 0.0))
            async with opened(url) as other, asyncio.timeout(SOON_S):
                while other.ledger().total.accepted < 1:  # it is stored, and its publisher cannot know
                    await asyncio.sleep(0.01)
            assert not publishing.done()
            proxy.drop()
            with pytest.raises(PublishUncertain) as raised:
                await asyncio.wait_for(publishing, SOON_S)
            assert raised.value.message_ids == ("m1",)
            proxy.deafen(False)
            async with asyncio.timeout(SOON_S):
                while True:
                    try:
                        (stored,) = await made.publish([envelope(1, remember=True)], 0.0)
                        break
                    except EndpointUnreachable:
                        await asyncio.sleep(0.05)
            assert stored.duplicate
            assert made.ledger().total.accepted == 1
            assert (await made.audit()).ok

    asyncio.run(scenario())


def test_a_claim_or_settlement_whose_answer_was_lost_is_neither_lost_nor_made_twice(url: str) -> None:
    async def scenario() -> None:
        name = url.rpartition("/")[2]
        async with Proxy(nats_kit.shared().port) as proxy, opened(f"nats://127.0.0.1:{proxy.port}/{name}") as made:
            await made.declare(SubscriptionSpec("s", "t", 10), consume=True)
            await made.publish([envelope(1), envelope(2)], 0.0)
            first = await made.claim("s")
            proxy.deafen(True)
            answers: list[bool] = []
            made.settle(first, handled(1), lambda _d, _c, took: answers.append(took))
            claiming = asyncio.ensure_future(made.claim("s"))
            async with opened(url) as other, asyncio.timeout(SOON_S):
                while other.ledger().total.handled < 1:
                    await asyncio.sleep(0.01)
            proxy.drop()
            proxy.deafen(False)
            async with asyncio.timeout(SOON_S):
                second = await claiming
                await made.flush()
            assert (second.envelope.id, second.attempt) == ("m2", 1)
            assert answers == [True]
            account = made.ledger().accounts["s"]
            assert (account.handled, account.in_flight, account.pending) == (1, 1, 0)

    asyncio.run(scenario())


def test_what_a_buffer_gives_up_after_the_reconnection_is_void(url: str) -> None:
    """A claim and a publish, written, taken for lost, made again, and then delivered after all."""

    async def scenario() -> None:
        name = url.rpartition("/")[2]
        async with Proxy(nats_kit.shared().port) as proxy, opened(f"nats://127.0.0.1:{proxy.port}/{name}") as made:
            await made.declare(SubscriptionSpec("s", "t", 10), consume=True)
            await made.publish([envelope(1)], 0.0)
            late = proxy.mute()
            claiming = asyncio.ensure_future(made.claim("s"))
            publishing = asyncio.ensure_future(made.publish([envelope(2)], 0.0))
            await asyncio.sleep(0.1)
            proxy.drop_clients()
            with pytest.raises(PublishUncertain):
                await asyncio.wait_for(publishing, SOON_S)
            async with asyncio.timeout(SOON_S):
                first = await claiming
                while True:
                    try:
                        (stored,) = await made.publish([envelope(2, remember=True)], 0.0)
                        break
                    except EndpointUnreachable:
                        await asyncio.sleep(0.05)
            assert not stored.duplicate
            before = made.ledger()
            late.set()
            async with opened(url) as other:
                for _ in range(20):
                    await other.probe()
                    await asyncio.sleep(0.01)
                assert other.ledger() == before
            assert (first.attempt, first.redelivered) == (1, "")
            assert (before.total.accepted, before.total.in_flight) == (2, 1)
            assert (await made.audit()).ok

    asyncio.run(scenario())


# The stream


def test_what_an_owner_has_not_read_yet_is_not_swept_away(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "ENTRIES", 40)
    place = url.rpartition("/")[2]

    async def scenario() -> None:
        # Each says how far it has read when it renews its lease: two of them, here, not for a long time.
        slow = f"{url}?lease=3600"
        async with opened(slow) as made, opened(slow), opened(slow):
            for _ in range(100):
                await made.probe()

            async def head(client: Client) -> int:
                info = await api(client, f"STREAM.INFO.glassbus-{place}", {"subjects_filter": f"glassbus.{place}.>"})
                subjects: dict[str, int] = info["state"].get("subjects") or {}
                return subjects[f"glassbus.{place}.e.o"] if f"glassbus.{place}.head" in subjects else 0

            async with asyncio.timeout(SOON_S):
                while not (left := await jetstream(url, head)):
                    await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            assert left >= 100

    asyncio.run(scenario())


def test_snapshots_keep_the_stream_short_and_lose_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "ENTRIES", 40)
    place = url.rpartition("/")[2]

    async def scenario() -> None:
        async with opened(url) as made:
            await made.declare(SubscriptionSpec("s", "t", 10_000), consume=True)
            await made.declare(SubscriptionSpec("idle", "u", 10_000), consume=False)
            await made.set_hold("idle", paused=True)
            kept = [envelope(n, body=f"kept {n}".encode(), key="k" if n < 3 else None) for n in range(5)]
            await made.publish(kept, 0.0)
            large = envelope(99, body=b"large" * 20_000)
            await made.publish([large], 0.0)
            dead = await made.claim("s")
            failure = report("it went wrong")
            made.settle(
                dead,
                Decision(State.DEAD_LETTERED, 1, report=failure, reason="attempts_spent"),
                lambda *_: None,
            )
            await made.flush()
            for round_ in range(3):
                for n in range(100, 160):
                    await made.publish([envelope(round_ * 1000 + n, priority=3, remember=n == 100)], 0.0)
                    async with asyncio.timeout(SOON_S):
                        delivery = await made.claim("s")
                        while delivery.envelope.priority != 3:
                            put_back = Decision(State.RETRYING, 0, delay_s=1000.0)
                            made.settle(delivery, put_back, lambda *_: None)
                            delivery = await made.claim("s")
                    made.settle(delivery, handled(1), lambda *_: None)
                await made.flush()
                await _swept(place)
            before = made.ledger()
            held = made.queues()["idle"].hold
            assert (await made.audit()).ok
        async with opened(url) as again:
            after = again.ledger()
            assert after.accounts["s"].handled == before.accounts["s"].handled == 180
            assert after.accounts["s"].accepted == before.accounts["s"].accepted
            assert again.queues()["idle"].hold == held
            assert held.paused
            (stored,) = await again.publish([envelope(2100, priority=3, remember=True)], 0.0)
            assert stored.duplicate
            (letter,) = await again.replay([r.id for r in await again.dead_letters(DeadLetterFilter(), 10)])
            assert letter.envelope.body == b"kept 0"
            assert letter.report.message == "it went wrong"
            assert (await again.audit()).ok

    asyncio.run(scenario())


async def _swept(place: str) -> None:
    """Wait until the stream of `place` is short."""

    async def look(client: Client) -> None:
        async with asyncio.timeout(SOON_S):
            while True:
                info = await api(client, f"STREAM.INFO.glassbus-{place}", {"subjects_filter": f"glassbus.{place}.>"})
                subjects: dict[str, int] = info["state"].get("subjects") or {}
                entries = sum(count for subject, count in subjects.items() if ".e." in subject)
                if subjects.get(f"glassbus.{place}.head") == 1 and entries < 60:
                    return
                await asyncio.sleep(0.1)

    await jetstream(f"{nats_kit.shared().url}/x", look)


def test_large_bodies_are_kept_apart_and_removed_with_their_message(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "ENTRIES", 1)
    place = url.rpartition("/")[2]

    async def scenario() -> None:
        async with opened(url) as made, opened(url) as other:
            await made.declare(SubscriptionSpec("s", "t", 10), consume=True)
            body = bytes(range(256)) * 8192
            await made.publish([envelope(1, body=body)], 0.0)
            delivery = await other.claim("s")
            assert delivery.envelope.body == body

            async def bodies(client: Client) -> int:
                info = await api(client, f"STREAM.INFO.glassbus-{place}", {"subjects_filter": f"glassbus.{place}.b.>"})
                return len(info["state"].get("subjects") or {})

            assert await jetstream(url, bodies) == 3
            other.settle(delivery, handled(1), lambda *_: None)
            await other.flush()
            async with asyncio.timeout(SOON_S):
                while await jetstream(url, bodies):
                    await made.probe()
                    await asyncio.sleep(0.1)

    asyncio.run(scenario())


def test_a_full_stream_refuses_publishes_and_takes_settlements(url: str) -> None:
    async def scenario() -> None:
        async with opened(f"{url}?max_bytes=1000000") as made:
            await made.declare(SubscriptionSpec("s", "t", 100_000), consume=True)
            stored = 0
            with pytest.raises(StorageFull):
                async with asyncio.timeout(SOON_S):
                    while True:
                        await made.publish([envelope(stored, body=b"x" * 10_000)], 0.0)
                        stored += 1
            assert 50 < stored < 100
            for _ in range(stored):
                async with asyncio.timeout(SOON_S):
                    assert await settle(made, "s", handled)
            async with asyncio.timeout(SOON_S):
                while True:
                    try:
                        await made.publish([envelope(10_000)], 0.0)
                        break
                    except StorageFull:
                        await asyncio.sleep(0.1)
            assert made.ledger().accounts["s"].handled == stored
            assert (await made.audit()).ok

    asyncio.run(scenario())


def test_what_is_not_at_hand_is_read_when_it_is_needed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with more waiting messages than are kept in memory: claims, expiry, the ladder, dead letters."""
    monkeypatch.setattr(view, "AT_HAND_BYTES", 0)

    async def scenario() -> None:
        ears = Ears()
        async with opened(url, ears) as made:
            await made.declare(SubscriptionSpec("s", "t", 2), consume=True)
            await made.publish([envelope(1, body=b"one")], 0.0)
            first = await made.claim("s")
            assert first.envelope.body == b"one"
            made.settle(first, Decision(State.RETRYING, 1, delay_s=0.0), lambda *_: None)
            second = await made.claim("s")
            assert (second.attempt, second.envelope.body) == (2, b"one")
            failure = report("it went wrong")
            made.settle(second, Decision(State.DEAD_LETTERED, 2, report=failure, reason="x"), lambda *_: None)
            await made.publish([envelope(2, body=b"low", priority=0)], 0.0)
            await made.publish([envelope(3, body=b"over", expires_at=SystemClock().wall() + 0.2)], 0.0)
            await made.publish([envelope(4, body=b"high", priority=3)], 0.0)  # for the low one
            async with asyncio.timeout(SOON_S):
                while not ears.recorder.of(DeliveryExpired):
                    await asyncio.sleep(0.02)
            assert [f.delivery.envelope.body for f in ears.recorder.of(DeliveryExpired)] == [b"over"]
            assert [f.delivery.envelope.body for f in ears.recorder.of(DeliveryDeadLettered)] == [b"low"]
            dead = await made.dead_letters(DeadLetterFilter(), 10)
            assert [d.envelope.body for d in dead] == [b"low", b"one"]
            assert (await made.claim("s")).envelope.body == b"high"
            assert await made.forget("s") == 3
            assert [f.delivery.envelope.body for f in ears.recorder.of(DeliveryDiscarded)] == [b"high"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"metadata": {}}, StoreCorrupt),
        ({"metadata": {"glassbus.version": "2"}}, StoreTooNew),
        ({"max_age": 3_600_000_000_000}, StoreCorrupt),
        ({"retention": "workqueue"}, StoreCorrupt),
        ({"storage": "memory"}, StoreCorrupt),
        ({"discard": "old"}, StoreCorrupt),
        ({"subjects": ["mine.>"]}, StoreCorrupt),
    ],
    ids=str,
)
def test_a_stream_that_is_not_ours_or_not_as_it_must_be_is_refused(
    url: str, change: dict[str, Any], error: type[Exception]
) -> None:
    place = url.rpartition("/")[2]

    async def scenario() -> None:
        config = {
            "name": f"glassbus-{place}",
            "subjects": [f"glassbus.{place}.>"],
            "retention": "limits",
            "storage": "file",
            "discard": "new",
            "allow_direct": True,
            "metadata": {"glassbus.version": "1"},
            **change,
        }
        made = await jetstream(url, lambda client: api(client, f"STREAM.CREATE.glassbus-{place}", config))
        assert "error" not in made
        with pytest.raises(error, match=f"glassbus-{place}"):
            await transport(url).open(Ears())

    asyncio.run(scenario())


def test_a_stream_deleted_under_the_bus_stops_it(server: nats_kit.Server) -> None:
    async def scenario() -> None:
        ears = Ears()
        async with opened(f"{server.url}/gone", ears) as made:
            await made.declare(SubscriptionSpec("s", "t", 10), consume=True)
            await jetstream(f"{server.url}/x", lambda client: api(client, "STREAM.DELETE.glassbus-gone"))
            async with asyncio.timeout(SOON_S):
                while not ears.errors:
                    await asyncio.sleep(0.05)
            assert isinstance(ears.errors[0], StoreCorrupt)

    asyncio.run(scenario())


# Being let in


def test_an_old_server_is_refused_with_its_version_and_the_one_needed() -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = {"server_id": "x", "version": "2.10.7", "max_payload": 1048576, "headers": True, "jetstream": True}
        writer.write(f"INFO {json.dumps(info)}\r\nPONG\r\n".encode())
        await _reader.read()
        writer.close()
        await writer.wait_closed()
        served.set()

    served = asyncio.Event()

    async def scenario() -> None:
        old = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = old.sockets[0].getsockname()[1]
        with pytest.raises(ConfigurationError, match=r"2\.10\.7.*2\.12\.0"):
            await transport(f"nats://127.0.0.1:{port}/x").open(Ears())
        old.close()
        await asyncio.wait_for(served.wait(), SOON_S)

    asyncio.run(scenario())


def test_a_connection_that_nobody_reads_is_closed_all_the_same() -> None:
    """What was not written is dropped, and no socket stays behind."""
    info = {"server_id": "x", "version": "2.12.0", "max_payload": 1 << 26, "headers": True, "jetstream": True}
    letting_go = asyncio.Event()
    read: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"INFO {json.dumps(info)}\r\nPONG\r\n".encode())
        await letting_go.wait()
        with contextlib.suppress(ConnectionResetError):  # dropped, which is what is wanted
            while data := await reader.read(1 << 20):
                read.append(len(data))
        writer.close()
        served.set()

    served = asyncio.Event()

    async def scenario() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            link = Link(Address(f"nats://127.0.0.1:{port}"), lambda _error: None)
            await link.connect("a test", None)
            much = 40 * (1 << 20)
            await link.send("t", bytes(much))
            await link.close()
            letting_go.set()
            await asyncio.wait_for(served.wait(), SOON_S)
            assert sum(read) < much

    asyncio.run(scenario())


def test_nobody_there_is_told_as_unreachable() -> None:
    async def scenario() -> None:
        with pytest.raises(EndpointUnreachable, match=r"nats://127\.0\.0\.1"):
            await transport(f"nats://127.0.0.1:{server_kit.free_port()}/x").open(Ears())

    asyncio.run(scenario())


_USERS = """
authorization {
  users: [
    { user: app, password: "s3cret!word" }
    { user: reader, password: "s3cret!word", permissions: { publish: ["$JS.API.>", "_INBOX.>"], subscribe: ">" } }
  ]
}
"""


def test_credentials_let_in_are_refused_or_too_weak_and_are_never_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "s3cret!word"

    async def scenario(server: nats_kit.Server) -> None:
        where = f"127.0.0.1:{server.port}/auth"
        shown: list[str] = []
        good = transport(f"nats://app:{secret}@{where}")
        await good.open(Ears())
        await good.close(5.0)
        shown += [repr(good), good.address]
        for user, password in (("app", "wrong-pass"), ("reader", secret)):
            made = transport(f"nats://{user}:{password}@{where}")
            with pytest.raises(EndpointRefused) as raised:
                await asyncio.wait_for(made.open(Ears()), SOON_S)
            error: BaseException | None = raised.value
            while error is not None:
                shown.append(f"{error!s} {error!r} {error.args}")
                error = error.__cause__ or error.__context__
            assert isinstance(raised.value, PermissionError)
        bus = MessageBus(f"nats://app:{secret}@{where}", telemetry=False)
        shown.append(repr(bus))
        text = "\n".join(shown) + caplog.text
        assert secret not in text
        assert "wrong-pass" not in text

    with nats_kit.running(tmp_path / "nats", _USERS) as server:
        asyncio.run(scenario(server))
    out, err = capfd.readouterr()
    assert secret not in out + err
    assert "wrong-pass" not in out + err


@pytest.mark.parametrize(
    "bad",
    [
        "nats://h/a.b",
        "nats://h/a/b",
        "nats://h/x?level=memory",
        "nats://h/x?level=quorum",
        "nats://h/x?replicas=0",
        "nats://h/x?replicas=many",
        "nats://h/x?max_bytes=-1",
        "nats://h/x?lease=0",
        "nats://h/x?lease=soon",
        "nats://h/x?nonsense=1",
        "nats://h/x,nats://i/y",
        "nats://h/x,nats://i/x?level=disk",
        "nats://h/x,sqlite:///x.db",
    ],
)
def test_urls_that_cannot_work_are_refused_before_anything_is_dialled(bad: str) -> None:
    with pytest.raises(ConfigurationError):
        transport(bad)


def test_the_level_is_what_the_operator_asserts() -> None:
    levels = {url: transport(url).features.level for url in ("nats://h/x", "nats://h/x?level=disk")}
    assert levels == {"nats://h/x": "process", "nats://h/x?level=disk": "disk"}
    assert transport("nats://h/x?level=quorum&replicas=3").features.level == "quorum"


def test_a_handler_on_two_buses_sees_messages_through_a_restart_of_both(server: nats_kit.Server) -> None:
    """As a user would: publish, stop everything, start the server and a new bus, and all is there."""

    async def first() -> None:
        bus = MessageBus(f"{server.url}/shop", telemetry=False)

        @bus.subscribe("orders.*", name="s")
        async def handler(message: Message) -> None:
            await asyncio.sleep(3600)

        async with bus:
            for n in range(5):
                await bus.publish("orders.created", n)
            await bus.stop(0.1)

    async def second() -> list[int]:
        bus, got = MessageBus(f"{server.url}/shop", telemetry=False), []

        @bus.subscribe("orders.*", name="s")
        async def handler(payload: int, delivery: Any) -> None:
            assert delivery.attempt == 1
            got.append(payload)

        async with bus:
            await bus.drain(timeout=SOON_S)
        return got

    asyncio.run(first())
    server.stop()
    server.start()
    assert asyncio.run(second()) == [0, 1, 2, 3, 4]
