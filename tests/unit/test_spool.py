"""The spool before a broker's transport: what is published while the broker is away arrives, in order, once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from glassbus.clock import Clock, SystemClock
from glassbus.config import Address, Overflow, Settings, Spool
from glassbus.errors import (
    ConfigurationError,
    EndpointUnreachable,
    InvalidPayload,
    MessageConflict,
    PublishRejected,
    PublishUncertain,
    QueueFull,
    SpoolFull,
    StoreCorrupt,
    StoreReadOnly,
    UnknownDeadLetter,
)
from glassbus.facts import DeliveryDeadLettered, Fact, MessageUnrouted, SpoolForwarded, TransportFailed
from glassbus.message import Envelope, Level
from glassbus.policy.delivery import Decision, State
from glassbus.testing import RecordingObserver, VirtualClock, run_virtual
from glassbus.transport import DeadLetterFilter, Dialer, Hold, Listener, Stored, SubscriptionSpec, Supervisor
from glassbus.transport.factory import make_transport
from glassbus.transport.memory import MemoryTransport
from glassbus.transport.spool import SpoolingTransport
from glassbus.transport.spoolfile import SPOOL, take_files
from glassbus.transport.wrapper import TransportWrapper

ADDRESS = Address("nats://broker:4222")


class Link:
    """A supervisor whose connection the test makes and breaks."""

    def __init__(self) -> None:
        self._up = asyncio.Event()
        self._up.set()

    async def start(self, dialer: Dialer, /) -> None: ...

    def lost(self, error: BaseException, /) -> None: ...

    async def connected(self) -> None:
        await self._up.wait()

    def up(self) -> bool:
        return self._up.is_set()

    async def stop(self) -> None: ...

    def cut(self) -> None:
        self._up.clear()

    def mend(self) -> None:
        self._up.set()


class Broker(TransportWrapper):
    """A broker in memory that can be away, uncertain, full or picky, and that recognises ids."""

    def __init__(self, memory: MemoryTransport, link: Link) -> None:
        super().__init__(memory)
        self.link = link
        self.uncertain = False
        self.full = False
        self.refuses: dict[str, PublishRejected] = {}
        self.order: list[str] = []
        self.batches: list[int] = []
        self.breaks_after = -1

    async def publish(self, batch: Sequence[Envelope], /, wait_s: float) -> Sequence[Stored]:
        await asyncio.sleep(0.001)
        if not self.link.up():
            raise EndpointUnreachable("the broker is away")
        if self.full:
            raise QueueFull("work", 1, wait_s)
        for envelope in batch:
            if envelope.id in self.refuses:
                raise self.refuses[envelope.id]
        if self.breaks_after == 0:
            self.link.cut()
            raise EndpointUnreachable("the broker went away")
        self.breaks_after -= 1
        stored = await self._inner.publish(batch, wait_s)
        self.order += [e.id for e, one in zip(batch, stored, strict=True) if not one.duplicate]
        self.batches.append(len(batch))
        if self.uncertain:
            raise PublishUncertain(batch[0].id, "the connection broke")
        return stored


class Ears:
    def __init__(self) -> None:
        self.seen = RecordingObserver()
        self.errors: list[BaseException] = []

    def state(self, fact: Fact, /) -> None:
        self.seen.on_fact(fact)

    def held(self, subscription: str, hold: Hold, /) -> None: ...

    def broken(self, error: BaseException, /) -> None:
        self.errors.append(error)


class Desk:
    def __init__(self, clock: Clock, folder: Path, settings: Spool | None = None, bus: str = "default") -> None:
        self.clock = clock
        self.link = Link()
        self.ears = Ears()
        self.memory = MemoryTransport(clock=clock)
        self.broker = Broker(self.memory, self.link)
        self.spool = SpoolingTransport(
            self._make, self._supervise, settings or Spool(), folder=str(folder), bus=bus, clock=clock
        )

    def _make(self, watch: Callable[[Sequence[Address], Listener], Supervisor]) -> Broker:
        watch([ADDRESS], self.ears)
        return self.broker

    def _supervise(self, addresses: Sequence[Address], listener: Listener) -> Supervisor:
        return self.link

    async def publish(self, *ids: str, wait_s: float = 1.0, **fields: Any) -> Stored:
        return (await self.spool.publish([message(one, **fields) for one in ids], wait_s))[0]

    async def forwarded(self, within_s: float = 10.0) -> None:
        async with asyncio.timeout(within_s):
            while self.spool.spooled():
                await asyncio.sleep(0.01)


def message(message_id: str, topic: str = "orders.created", body: bytes = b"{}", **fields: Any) -> Envelope:
    return Envelope(message_id, topic, body, "json", fields.pop("headers", {}), published_at=1.0, **fields)


def names(folder: Path, ending: str) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(ending))


def readable_by_others(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.stat().st_mode & 0o077]


@asynccontextmanager
async def desk(clock: Clock, folder: Path, **options: Any) -> AsyncIterator[Desk]:
    one = Desk(clock, folder, **options)
    await one.spool.open(one.ears)
    await one.spool.declare(
        SubscriptionSpec("work", "orders.*", 100_000, overflow=Overflow(displace=False, expand=1.0)), consume=True
    )
    try:
        yield one
    finally:
        await one.spool.close(5.0)


def play(scenario: Callable[[VirtualClock], Awaitable[None]]) -> None:
    async def run(clock: VirtualClock) -> None:
        await scenario(clock)

    run_virtual(run)


def test_while_the_connection_is_up_nothing_is_spooled(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            stored = await d.publish("m-1")
            assert (stored.subscriptions, stored.spooled) == (("work",), None)
            assert d.spool.spooled() == 0
            assert d.ears.seen.facts == ()

    play(scenario)


def test_what_is_published_while_it_is_down_is_on_disk_and_forwarded_in_order_with_the_same_ids(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            await d.publish("before")
            d.link.cut()
            ids = [f"m-{n}" for n in range(300)]
            for one in ids:
                stored = await d.publish(one)
                assert (stored.spooled, stored.subscriptions, stored.duplicate) == (Level.DISK, ("work",), False)
            assert d.spool.spooled() == 300
            d.link.mend()
            await d.forwarded()
            assert d.broker.order == ["before", *ids]
            forwarded = d.ears.seen.of(SpoolForwarded)
            assert sum(fact.messages for fact in forwarded) == 300
            assert forwarded[-1].remaining == 0
            assert forwarded[-1].endpoint == "nats://broker:4222"

    play(scenario)


def test_every_part_of_a_message_survives_the_detour(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            d.link.cut()
            sent = message(
                "m-1",
                body=b"\x00\xff",
                headers={"traceparent": "00-a-b-01", "x": "é"},
                priority=3,
                key="k",
                due_at=clock.wall() + 50,
                expires_at=clock.wall() + 100,
                remember=True,
            )
            await d.spool.publish([sent], 1.0)
            got: list[Envelope] = []
            publish = d.broker.publish

            async def look(batch: Sequence[Envelope], /, wait_s: float) -> Sequence[Stored]:
                got.extend(batch)
                return await publish(batch, wait_s)

            d.broker.publish = look  # type: ignore[method-assign]
            d.link.mend()
            await d.forwarded()
            assert got == [sent]

    play(scenario)


def test_a_publish_that_ended_uncertain_is_spooled_and_recognised_by_its_id(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            d.broker.uncertain = True
            stored = await d.publish("m-1", remember=True)
            assert stored.spooled is Level.DISK
            d.broker.uncertain = False
            await d.forwarded()
            assert d.broker.order == ["m-1"]
            assert d.spool.ledger().total.accepted == 1

    play(scenario)


def test_new_publishes_wait_behind_what_is_left_or_go_there_too(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            d.link.cut()
            for n in range(500):
                await d.publish(f"old-{n}")
            d.link.mend()
            new = await asyncio.gather(*(d.publish(f"new-{n}") for n in range(50)))
            assert {stored.spooled for stored in new} == {Level.DISK}
            last = await d.publish("last")
            await d.forwarded()
            assert d.broker.order[:500] == [f"old-{n}" for n in range(500)]
            assert d.broker.order[-1] == "last"
            assert last.spooled is None or d.spool.spooled() == 0
            assert (await d.publish("direct")).spooled is None

    play(scenario)


def test_the_spool_runs_empty_under_a_publisher_that_never_pauses(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            d.link.cut()
            for n in range(100):
                await d.publish(f"old-{n}")
            d.link.mend()
            for n in range(5000):
                if (await d.publish(f"new-{n}")).spooled is None:
                    return
            raise AssertionError("it never ran empty")

    play(scenario)


def test_an_id_published_twice_is_a_duplicate_and_another_body_is_a_conflict(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            d.link.cut()
            await d.publish("m-1", remember=True)
            assert (await d.publish("m-1", remember=True, headers={"traceparent": "another"})).duplicate
            with pytest.raises(MessageConflict):
                await d.publish("m-1", remember=True, body=b"[]")
            assert d.spool.spooled() == 1

    play(scenario)


def test_a_full_spool_refuses_and_an_uncertain_publish_stays_uncertain(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path, settings=Spool(max_messages=3, max_bytes=1000)) as d:
            d.link.cut()
            await d.publish("a", "b")
            with pytest.raises(SpoolFull, match="2 messages of at most 3"):
                await d.publish("c", "d")
            with pytest.raises(SpoolFull, match="bytes of at most 1000"):
                await d.publish("c", body=b"x" * 1000)
            await d.publish("c")
            assert SpoolFull.reason == "spool_full"
            d.link.mend()
            await d.forwarded()
            d.link.cut()
            await d.publish("e", body=b"x" * 900)
            d.link.mend()
            await d.forwarded()
            d.broker.uncertain = True
            with pytest.raises(PublishUncertain):
                await d.publish("f", body=b"x" * 1001)

    play(scenario)


def test_what_the_broker_refuses_for_good_is_set_aside_visible_and_holds_up_nobody(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            d.link.cut()
            for one in ("a", "too-large", "b", "conflict", "c"):
                await d.publish(one, key="k", priority=2)
            d.broker.refuses = {"too-large": InvalidPayload("too large"), "conflict": MessageConflict("conflict")}
            d.link.mend()
            await d.forwarded()
            assert d.broker.order == ["a", "b", "c"]
            records = await d.spool.dead_letters(DeadLetterFilter(), 10)
            assert [r.envelope.id for r in records] == ["conflict", "too-large"]
            assert {r.subscription for r in records} == {SPOOL}
            assert [(r.envelope.key, r.envelope.priority) for r in records] == [("k", 2)] * 2
            assert records[1].report.message == "too large"
            assert records[1].report.fingerprint
            facts = d.ears.seen.of(DeliveryDeadLettered)
            assert [fact.delivery.envelope.id for fact in facts] == ["too-large", "conflict"]
            assert await d.spool.dead_letters(DeadLetterFilter(id=records[0].id), 1) == [records[0]]
            assert [r.envelope.id for r in await d.spool.dead_letters(DeadLetterFilter(before=records[0].id), 9)] == [
                "too-large"
            ]
            d.broker.refuses.clear()
            moved = await d.spool.replay([records[1].id])
            assert [r.id for r in moved] == [records[1].id]
            await d.forwarded()
            assert d.broker.order[-1] == "too-large"
            await d.spool.discard([records[0].id])
            assert await d.spool.dead_letters(DeadLetterFilter(), 10) == []
            with pytest.raises(UnknownDeadLetter):
                await d.spool.discard([records[0].id])
            assert (await d.spool.audit()).ok

    play(scenario)


def test_dead_letters_of_the_broker_are_listed_behind_and_handled_beside(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            from tests.contract.suite import report

            await d.publish("theirs")
            delivery = await d.spool.claim("work")
            d.spool.settle(
                delivery,
                Decision(State.DEAD_LETTERED, 1, report=report(), reason="attempts_spent"),
                lambda *_: None,
            )
            await d.spool.flush()
            d.link.cut()
            await d.publish("ours")
            d.broker.refuses = {"ours": InvalidPayload("no")}
            d.link.mend()
            await d.forwarded()
            both = await d.spool.dead_letters(DeadLetterFilter(), 10)
            assert [r.envelope.id for r in both] == ["ours", "theirs"]
            first = await d.spool.dead_letters(DeadLetterFilter(), 1)
            rest = await d.spool.dead_letters(DeadLetterFilter(before=first[-1].id), 1)
            assert [r.envelope.id for r in first + rest] == ["ours", "theirs"]
            with pytest.raises(UnknownDeadLetter):
                await d.spool.replay([both[0].id, "999"])
            assert len(await d.spool.dead_letters(DeadLetterFilter(), 10)) == 2, "none was moved"
            d.broker.refuses.clear()
            assert len(await d.spool.replay([one.id for one in both])) == 2
            await d.forwarded()
            assert d.broker.order[-1] == "ours"

    play(scenario)


def test_a_queue_that_is_full_holds_the_spool_back_until_there_is_room(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            d.link.cut()
            await d.publish("a")
            await d.publish("b")
            d.broker.full = True
            d.link.mend()
            await asyncio.sleep(60)
            assert d.spool.spooled() == 2
            d.broker.full = False
            await d.forwarded()
            assert d.broker.order == ["a", "b"]
            assert await d.spool.dead_letters(DeadLetterFilter(), 9) == []

    play(scenario)


def test_a_refusal_for_no_known_reason_is_final_only_after_some_tries(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            d.link.cut()
            await d.publish("odd")
            await d.publish("fine")
            d.broker.refuses = {"odd": PublishRejected("out of cheese")}
            d.link.mend()
            await asyncio.sleep(0.05)
            assert d.spool.spooled() == 2
            await d.forwarded(60)
            assert d.broker.order == ["fine"]
            [record] = await d.spool.dead_letters(DeadLetterFilter(), 9)
            assert record.report.message == "out of cheese"

    play(scenario)


def test_the_connection_breaking_in_the_middle_loses_and_reorders_nothing(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            d.link.cut()
            ids = [f"m-{n}" for n in range(400)]
            for one in ids:
                await d.publish(one)
            for batches in (1, 0, 2):
                d.broker.breaks_after = batches
                d.link.mend()
                await asyncio.sleep(5)
                assert not d.link.up()
            d.broker.breaks_after = -1
            d.link.mend()
            await d.forwarded()
            assert d.broker.order == ids

    play(scenario)


def test_messages_nobody_wants_are_stated_when_they_arrive(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            d.link.cut()
            stored = await d.publish("m-1", topic="unknown.topic")
            assert stored.subscriptions == ()
            d.link.mend()
            await d.forwarded()
            await asyncio.sleep(0.1)
            [fact] = d.ears.seen.of(MessageUnrouted)
            assert fact.envelope.id == "m-1"

    play(scenario)


def test_a_spool_outlives_a_stop_and_is_forwarded_by_the_next_start(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            d.link.cut()
            for n in range(10):
                await d.publish(f"m-{n}")
        async with desk(clock, tmp_path) as d:
            await d.forwarded()
            assert d.broker.order == [f"m-{n}" for n in range(10)]

    play(scenario)


def test_two_buses_never_share_a_file_and_what_a_third_left_is_adopted(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as a, desk(clock, tmp_path) as b, desk(clock, tmp_path, bus="other") as c:
            for number, d in enumerate((a, b, c)):
                d.link.cut()
                await d.publish(f"of-{number}")
        assert names(tmp_path, ".db") == [
            "spool-default-0.db",
            "spool-default-1.db",
            "spool-other-0.db",
        ]
        async with desk(clock, tmp_path) as d:
            assert d.spool.spooled() == 2, "not that of a bus of another name"
            await d.forwarded()
            assert d.broker.order == ["of-1", "of-0"], "what others left goes first"
        assert readable_by_others(tmp_path) == []

    play(scenario)


def test_a_lock_is_not_kept_by_a_forked_child(tmp_path: Path) -> None:
    [file] = take_files(str(tmp_path), "default", SystemClock())
    ready, is_ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(is_ready, b"x")
        signal.pause()
    try:
        os.read(ready, 1)
        file._lock.release()
        again = take_files(str(tmp_path), "default", SystemClock())
        assert [one.path.name for one in again] == ["spool-default-0.db"]
        again[0]._lock.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(is_ready)


def test_it_survives_sigkill_in_order(tmp_path: Path) -> None:
    """A child spools until it is killed, the last ones in the middle of being forwarded; all it was told are there."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:

        async def live() -> None:
            async with desk(SystemClock(), tmp_path) as d:
                d.link.cut()
                for n in range(10_000):
                    if n == 150:
                        d.broker.breaks_after = 1
                        d.link.mend()
                    await d.publish(f"m-{n}")
                    os.write(write, f"m-{n}\n".encode())

        try:
            asyncio.run(live())
        finally:
            os._exit(1)
    os.close(write)
    told = b""
    while told.count(b"\n") < 300:
        told += os.read(read, 65536)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 65536):
        told += more
    os.close(read)
    ids = told.decode().split()

    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            await d.forwarded(600)
            arrived = d.broker.order
            assert arrived == sorted(arrived, key=lambda one: int(one[2:]))
            assert set(ids) - set(arrived) <= {f"m-{n}" for n in range(64)}, (
                "what had reached the broker before the kill"
            )
            assert arrived[-1] == ids[-1] or int(arrived[-1][2:]) == int(ids[-1][2:]) + 1
            assert (await d.spool.audit()).ok

    play(scenario)


def test_a_damaged_spool_is_told_of_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "spool-default-0.db").write_bytes(b"this is no database" * 1000)

    async def scenario(clock: VirtualClock) -> None:
        with pytest.raises(StoreCorrupt, match="spool-default-0"):
            async with desk(clock, tmp_path):
                pass
        [file] = take_files(str(tmp_path), "default", clock)
        file._lock.release()

    play(scenario)


def test_a_spool_that_breaks_with_messages_in_it_stops_the_bus(tmp_path: Path) -> None:
    """Its file was deleted under it, which it looks at once a second."""

    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path / "a") as d:
            d.link.cut()
            await d.publish("m-1")
            (tmp_path / "a" / "spool-default-0.db").unlink()
            await asyncio.sleep(5)
            assert d.ears.errors
        async with desk(clock, tmp_path / "b") as d:
            (tmp_path / "b" / "spool-default-0.db").unlink()
            await asyncio.sleep(5)
            assert d.ears.errors == [], "an empty one takes nothing with it"
            assert d.ears.seen.of(TransportFailed)
            assert (await d.publish("m-1")).spooled is None
            d.link.cut()
            with pytest.raises(EndpointUnreachable, match="its spool is broken"):
                await d.publish("m-2")

    play(scenario)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_told_of(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreReadOnly):
        take_files(str(tmp_path), "default", SystemClock())
    tmp_path.chmod(0o700)


def test_a_folder_that_is_a_file_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreReadOnly, match="no spool can be kept"):
        take_files(str(tmp_path / "file"), "default", SystemClock())


def test_a_cancelled_publish_leaves_no_count_behind(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:
            d.link.cut()
            task = asyncio.create_task(d.publish("m-1"))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            d.link.mend()
            await d.publish("m-2")
            await d.forwarded()
            assert d.broker.order[-1] == "m-2"
            assert d.spool.spooled() == 0

    play(scenario)


@pytest.mark.parametrize("wrong", [{"max_messages": 0}, {"max_bytes": 1.5}, {"enabled": 1}, {"max_messages": True}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="Spool"):
        Spool(**wrong)


def test_a_spool_is_for_brokers_and_needs_a_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="broker"):
        make_transport([Address("memory://")], settings=Settings(), clock=SystemClock(), spool=Spool())
    with pytest.raises(ConfigurationError, match="state_dir"):
        make_transport([ADDRESS], settings=Settings(), clock=SystemClock(), spool=Spool())


def test_a_message_is_found_in_the_spool_and_then_where_it_was_forwarded_to(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with desk(clock, tmp_path) as d:

            async def places(message_id: str) -> list[tuple[str, str]]:
                found = await d.spool.locate(message_id)
                return [] if found is None else [(one.subscription, one.state) for one in found.deliveries]

            d.link.cut()
            await d.publish("m-1", "m-2")
            assert await places("m-1") == [(SPOOL, "ready")]
            assert await d.spool.ids_like("m-", 10) == ["m-1", "m-2"]
            d.link.mend()
            await d.forwarded()
            await asyncio.sleep(1.0)
            assert await places("m-1") == [("work", "ready")]
            assert await places("m-3") == []

    play(scenario)
