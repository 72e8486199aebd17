"""Emergency stop: nothing that was held is lost, whatever else goes wrong; and what the next start makes of it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glassbus import BusNotRunning, Delivery, GlassbusError, HealthStatus, Message, MessageBus, StoreCorrupt
from glassbus import facts as f
from glassbus.policy.ledger import Account, Ledger
from glassbus.recovery import manifest as manifests
from glassbus.recovery.manifest import Manifest, Saved
from glassbus.testing import RecordingObserver, VirtualClock, run_virtual
from glassbus.transport import sealed, spill

STORES = ["memory", "memory+spill", "sqlite"]


class House:
    """A bus on one place, made anew for each start. Its handler waits until it is let go."""

    def __init__(self, store: str, place: Path) -> None:
        self.store = store
        self.place = place
        self.seen = RecordingObserver()
        self.handled: list[Any] = []
        self.go = asyncio.Event()
        self.ignores_cancel = False

    def make(self, **options: Any) -> MessageBus:
        self.seen = RecordingObserver()
        kept = {"spill_dir": self.place / "spill"} if self.store == "memory+spill" else {}
        url = f"sqlite:///{self.place / 'store.db'}" if self.store == "sqlite" else "memory://"
        bus = MessageBus(url, telemetry=False, observers=[self.seen], state_dir=self.place / "state", **kept, **options)

        @bus.subscribe("orders.*", name="charge", concurrency=2, timeout=1000.0)
        async def charge(message: Message[Any]) -> None:
            while not self.go.is_set():
                try:
                    await self.go.wait()
                except asyncio.CancelledError:
                    if not self.ignores_cancel:
                        raise
            self.handled.append(message.payload)

        return bus

    async def filled(self, **options: Any) -> MessageBus:
        """A running bus with two messages in flight and three that wait."""
        bus = self.make(**options)
        await bus.start()
        for number in range(5):
            await bus.publish("orders.created", number)
        while len(next(iter(bus._workers.values())).at_work()) < 2:
            await asyncio.sleep(0.01)
        return bus

    async def next_start(self) -> list[str]:
        """Start again, handle everything, and say what was stated about the emergency."""
        self.go.set()
        bus = self.make()
        async with bus:
            await bus.drain(60.0)
            assert bus.ledger().balanced
        return [name for name in self.seen.names() if name.startswith(("Emergency", "Manifest"))]


@pytest.fixture(params=STORES)
def house(request: pytest.FixtureRequest, tmp_path: Path) -> House:
    return House(request.param, tmp_path)


def test_what_was_held_is_written_down_and_the_next_start_restores_and_reconciles_it(house: House) -> None:
    async def run(clock: VirtualClock) -> None:
        bus = await house.filled()
        ended = await bus.emergency_stop("the cooling failed", deadline=4.0)
        names = house.seen.names()
        assert names.index("EmergencyStopBegan") < names.index("EmergencyStopEnded") < names.index("BusStopped")
        assert ended.within_deadline
        assert ended.duration_s <= 4.0
        assert ended.saved == (2 if house.store == "sqlite" else 5)
        path = house.place / "state" / ended.manifest
        assert path.stat().st_mode & 0o777 == 0o600
        assert b"payload" not in path.read_bytes()
        assert bus.health().status is HealthStatus.CRITICAL
        assert "the cooling failed" in bus.health().checks[0].detail
        assert await house.next_start() == ["EmergencyReconciled"]
        (reconciled,) = house.seen.of(f.EmergencyReconciled)
        assert (reconciled.saved, reconciled.restored, reconciled.missing) == (ended.saved, ended.saved, 0)
        assert sorted(house.handled) == [0, 1, 2, 3, 4]
        assert not path.exists()
        assert await house.next_start() == []

    run_virtual(run)


def test_intake_ends_at_once_and_says_why(house: House) -> None:
    async def run(clock: VirtualClock) -> None:
        bus = await house.filled()
        stopping = asyncio.create_task(bus.emergency_stop("fire"))
        await asyncio.sleep(0)
        with pytest.raises(BusNotRunning, match="has stopped taking messages: emergency stop: fire"):
            await bus.publish("orders.created", 6)
        with pytest.raises(BusNotRunning):
            await bus.publish_many([("orders.created", 7)])
        assert not bus.health().ready
        await stopping
        with pytest.raises(BusNotRunning):
            await bus.publish("orders.created", 8)

    run_virtual(run)


def test_it_is_one_stop_however_often_it_is_asked_for(house: House) -> None:
    async def run(clock: VirtualClock) -> None:
        bus = await house.filled()
        asked = [asyncio.create_task(bus.emergency_stop(f"reason {n}")) for n in range(3)]
        await asyncio.sleep(0.01)
        asked[0].cancel()  # who asked may go: the stop goes on
        bus.emergency.request("and again")
        stopped = asyncio.create_task(bus.stop(60.0))
        ended = await asked[1]
        assert ended is await asked[2] is await bus.emergency_stop("later")
        await stopped
        assert house.seen.names().count("EmergencyStopBegan") == house.seen.names().count("EmergencyStopEnded") == 1
        assert house.seen.names().count("BusStopped") == 1
        assert ended.reason == "reason 0"

    run_virtual(run)


def test_a_stop_at_work_is_overtaken(house: House) -> None:
    async def run(clock: VirtualClock) -> None:
        bus = await house.filled()
        patient = asyncio.create_task(bus.stop(3600.0))
        await asyncio.sleep(1.0)
        ended = await bus.emergency_stop("it takes too long", deadline=4.0)
        assert ended.duration_s <= 4.0
        assert ended.within_deadline
        await patient
        assert clock.monotonic() < 1000.0 + 10.0  # it does not wait for its handlers any more
        await house.next_start()
        assert sorted(house.handled) == [0, 1, 2, 3, 4]

    run_virtual(run)


def test_handlers_that_ignore_their_cancellation_do_not_hold_it_up(house: House) -> None:
    async def run(clock: VirtualClock) -> None:
        house.ignores_cancel = True
        bus = await house.filled()
        ended = await bus.emergency_stop("now", deadline=2.0)
        assert ended.within_deadline
        assert not bus.running
        house.go.set()  # they end after all, and what they did is not used
        await asyncio.sleep(0.1)
        house.handled.clear()
        await house.next_start()
        assert sorted(house.handled) == [0, 1, 2, 3, 4]

    run_virtual(run)


def test_while_it_starts_the_start_fails_and_says_why(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        house = House("sqlite", tmp_path)
        bus = house.make()
        starting = asyncio.create_task(bus.start())
        await asyncio.sleep(0)
        ended = await bus.emergency_stop("never mind")
        with pytest.raises(GlassbusError, match="stopped in an emergency while it started: never mind"):
            await starting
        assert (ended.saved, ended.manifest) == (0, "")
        assert not bus.running
        assert bus.stopped
        await house.next_start()

    run_virtual(run)


@pytest.mark.parametrize("when", ["before", "after"])
def test_before_a_start_and_after_a_stop_there_is_nothing_to_save(tmp_path: Path, when: str) -> None:
    async def run(clock: VirtualClock) -> None:
        bus = House("sqlite", tmp_path).make()
        if when == "after":
            await bus.start()
            await bus.stop()
        ended = await bus.emergency_stop("anyway")
        assert (ended.saved, ended.manifest) == (0, "")
        assert not list((tmp_path / "state").glob("emergency/*/*.jsonl"))

    run_virtual(run)


def test_a_handler_cannot_wait_for_it_but_may_ask_for_it(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        bus = MessageBus(f"sqlite:///{tmp_path}/s.db", telemetry=False)
        refused: list[str] = []

        @bus.subscribe("a", name="s")
        async def handle(_: Message[Any]) -> None:
            try:
                await bus.emergency_stop("inside")
            except GlassbusError as error:
                refused.append(str(error))
            bus.emergency.request("inside")

        await bus.start()
        await bus.publish("a", 1)
        while not bus.stopped:
            await asyncio.sleep(0.01)
        assert (await bus.emergency_stop("x")).reason == "inside"
        assert "cannot await" in refused[0]

    run_virtual(run)


def test_a_handlers_exceptions_and_a_raising_observer_never_cause_one(tmp_path: Path) -> None:
    class Raising:
        def on_fact(self, _: f.Fact, /) -> None:
            raise StoreCorrupt("lies")

        def scope(self, _: Delivery, /) -> Any:
            raise StoreCorrupt("lies")

    async def run(clock: VirtualClock) -> None:
        bus = MessageBus(f"sqlite:///{tmp_path}/s.db", telemetry=False, observers=[Raising()])  # type: ignore[list-item]

        @bus.subscribe("a", name="s")
        async def handle(_: Message[Any]) -> None:
            raise StoreCorrupt("a handler's own")

        async with bus:
            for n in range(50):
                await bus.publish("a", n)
            await asyncio.sleep(120.0)
            assert bus.running
            assert not bus.emergency.began

    run_virtual(run)


# What is unrecoverable


def test_a_store_that_cannot_go_on_is_an_emergency(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        house = House("sqlite", tmp_path)
        bus = await house.filled()
        bus._break(StoreCorrupt("malformed"))
        ended = await bus.emergency_stop("x")
        (began,) = house.seen.of(f.EmergencyStopBegan)
        assert (began.reason, began.error) == ("the store cannot go on", "StoreCorrupt: malformed")
        assert ended.saved == 2

    run_virtual(run)


def test_messages_that_are_nowhere_are_one_once_an_audit_has_confirmed_them_twice(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        import apsw

        house = House("sqlite", tmp_path)
        bus = await house.filled()
        thief = apsw.Connection(str(tmp_path / "store.db"))
        thief.execute("UPDATE subscriptions SET accepted = accepted + 1")
        thief.close()
        while not bus.stopped:
            await asyncio.sleep(0.1)
        await bus.emergency_stop("x")
        (began,) = house.seen.of(f.EmergencyStopBegan)
        assert began.reason == "messages are unaccounted for"
        assert began.error

    run_virtual(run)


def test_an_alarm_that_no_audit_confirms_stops_nothing(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        house = House("sqlite", tmp_path)
        bus = await house.filled()
        bus.hub.state(f.LedgerUnbalanced(at=clock.wall(), subscription="charge", unaccounted=1))
        await asyncio.sleep(10.0)
        assert bus.running
        house.go.set()
        await bus.stop()

    run_virtual(run)


def test_error_handling_that_keeps_failing_is_one_and_once_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(clock: VirtualClock) -> None:
        seen = RecordingObserver()
        bus = MessageBus(f"sqlite:///{tmp_path}/s.db", telemetry=False, observers=[seen])

        @bus.subscribe("a", name="s")
        async def handle(message: Message[Any]) -> None:
            if message.payload:
                raise ValueError("no")

        await bus.start()
        worker = bus._workers["s"]
        describe = worker._sites.describe
        monkeypatch.setattr(worker._sites, "describe", lambda *_, **__: 1 / 0)
        for n in range(8):
            await bus.publish("a", n)
            await asyncio.sleep(2.0)
        assert bus.running  # seven times
        monkeypatch.setattr(worker._sites, "describe", describe)
        await bus.publish("a", 0)
        await asyncio.sleep(2.0)
        monkeypatch.setattr(worker._sites, "describe", lambda *_, **__: 1 / 0)
        for n in range(1, 10):
            await bus.publish("a", n)
            await asyncio.sleep(2.0)
        assert bus.running  # nine times since a message was handled
        await bus.publish("a", 10)
        await asyncio.sleep(2.0)
        assert bus.stopped
        (began,) = seen.of(f.EmergencyStopBegan)
        assert (began.reason, began.error) == ("error handling keeps failing", "ZeroDivisionError: division by zero")

    run_virtual(run)


# A disk and a store that do not help


@pytest.mark.parametrize("store", STORES)
def test_a_disk_that_cannot_be_written_does_not_keep_it_from_ending(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    async def run(clock: VirtualClock) -> None:
        house = House(store, tmp_path)
        bus = await house.filled()
        monkeypatch.setattr(manifests, "write", full)
        if store != "sqlite":
            monkeypatch.setattr(spill, "spill", full)
            monkeypatch.setattr("glassbus.transport.memory.spill", full)
        ended = await bus.emergency_stop("full", deadline=4.0)
        assert bus.stopped
        assert ended.manifest == ""
        assert "No space left" in "".join(fact.error for fact in house.seen.of(f.TransportFailed))

    run_virtual(run)


def test_a_store_that_hangs_does_not_keep_it_from_ending(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        house = House("sqlite", tmp_path)
        bus = await house.filled()
        closed = bus._transport.close

        async def hang(_: float) -> tuple[int, int]:
            await asyncio.sleep(1e6)
            return 0, 0

        bus._transport.close = hang  # type: ignore[method-assign]
        ended = await bus.emergency_stop("stuck", deadline=4.0)
        assert bus.stopped
        assert house.seen.of(f.EmergencyStopEnded) == [ended]
        assert clock.monotonic() <= 1000.0 + 4.0 + 3.0
        await closed(1.0)

    run_virtual(run)


def test_what_is_told_last_is_told_after_everything_is_closed(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        house = House("sqlite", tmp_path)
        bus = await house.filled()
        told: list[str] = []

        def last(left_s: float) -> None:
            assert left_s > 0
            told.append(house.seen.names()[-1])
            raise SystemExit

        bus.emergency.last.append(last)
        await bus.emergency_stop("x", deadline=4.0)
        assert told == ["BusStopped"]

    run_virtual(run)


def test_without_a_directory_a_memory_bus_loses_what_it_always_loses_and_says_so(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        seen = RecordingObserver()
        bus = MessageBus(telemetry=False, observers=[seen])

        @bus.subscribe("a", name="s")
        async def handle(_: Message[Any]) -> None:
            await asyncio.sleep(1e6)

        await bus.start()
        for n in range(3):
            await bus.publish("a", n)
        ended = await bus.emergency_stop("x", deadline=2.0)
        assert (ended.saved, ended.manifest) == (0, "")
        assert len(seen.of(f.DeliveryDiscarded)) == 3

    run_virtual(run)


# The next start


def manifest_of(house: House) -> Path:
    (path,) = (house.place / "state" / "emergency" / "default").glob("*.manifest.jsonl")
    return path


def spill_of(house: House) -> Path:
    (path,) = house.place.rglob("*.spill.jsonl")
    return path


def cut(text: bytes) -> bytes:
    return text[: len(text) // 2]


def flip(text: bytes) -> bytes:
    return text[:20] + bytes([text[20] ^ 1]) + text[21:]


@pytest.mark.parametrize("damage", [cut, flip, lambda _: b""])
def test_a_damaged_manifest_is_put_aside_and_the_bus_starts_with_all_its_messages(
    house: House, damage: Callable[[bytes], bytes]
) -> None:
    async def run(clock: VirtualClock) -> None:
        bus = await house.filled()
        await bus.emergency_stop("x", deadline=2.0)
        path = manifest_of(house)
        path.write_bytes(damage(path.read_bytes()))
        assert await house.next_start() == ["ManifestQuarantined"]
        (quarantined,) = house.seen.of(f.ManifestQuarantined)
        assert quarantined.manifest == path.name
        assert (path.parent / quarantined.moved_to).exists()
        assert sorted(house.handled) == [0, 1, 2, 3, 4]

    run_virtual(run)


@pytest.mark.parametrize("store", ["memory", "memory+spill"])
@pytest.mark.parametrize("damage", [cut, flip, lambda _: b""])
def test_damaged_messages_are_put_aside_counted_as_missing_and_somebody_is_told(
    tmp_path: Path, store: str, damage: Callable[[bytes], bytes]
) -> None:
    async def run(clock: VirtualClock) -> None:
        house = House(store, tmp_path)
        bus = await house.filled()
        await bus.emergency_stop("x", deadline=2.0)
        path = spill_of(house)
        path.write_bytes(damage(path.read_bytes()))
        assert await house.next_start() == ["ManifestQuarantined", "EmergencyReconciled"]
        (reconciled,) = house.seen.of(f.EmergencyReconciled)
        assert (reconciled.saved, reconciled.restored, reconciled.missing) == (5, 0, 5)
        opened = [fact.name for fact in house.seen.of(f.EscalationOpened)]
        assert {"MessagesMissing", "ManifestQuarantined"} <= set(opened)
        assert list((house.place / "state" / "emergency" / "default").glob("*.missing.*"))

    run_virtual(run)


def test_messages_that_are_gone_from_the_store_are_counted_as_missing(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        house = House("sqlite", tmp_path)
        bus = await house.filled()
        await bus.emergency_stop("x", deadline=2.0)
        for name in ("store.db", "store.db-wal", "store.db-shm"):
            (tmp_path / name).unlink(missing_ok=True)  # somebody put an empty store in its place
        assert await house.next_start() == ["EmergencyReconciled"]
        (reconciled,) = house.seen.of(f.EmergencyReconciled)
        assert (reconciled.saved, reconciled.restored, reconciled.missing) == (2, 0, 5)

    run_virtual(run)


def test_messages_that_another_process_handled_meanwhile_are_not_missing(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        house = House("sqlite", tmp_path)
        bus = await house.filled()
        await bus.emergency_stop("x", deadline=2.0)
        other = MessageBus(f"sqlite:///{tmp_path / 'store.db'}", telemetry=False, state_dir=tmp_path / "elsewhere")

        @other.subscribe("orders.*", name="charge")
        async def charge(_: Message[Any]) -> None:
            """Handles everything."""

        async with other:
            await other.drain()
        assert await house.next_start() == ["EmergencyReconciled"]
        (reconciled,) = house.seen.of(f.EmergencyReconciled)
        assert (reconciled.restored, reconciled.missing) == (0, 0)

    run_virtual(run)


def test_what_several_memory_buses_left_one_restores(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        houses = [House("memory", tmp_path) for _ in range(3)]
        buses = [await house.filled() for house in houses]
        for bus in buses:
            await bus.emergency_stop("x", deadline=2.0)
        house = House("memory", tmp_path)
        assert await house.next_start() == ["EmergencyReconciled"] * 3
        assert sorted(house.handled) == sorted([0, 1, 2, 3, 4] * 3)

    run_virtual(run)
    assert list((tmp_path / "state" / "emergency").rglob("*.jsonl")) == []


def test_a_command_that_looks_at_the_store_leaves_the_manifest_for_the_service(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        house = House("sqlite", tmp_path)
        bus = await house.filled()
        await bus.emergency_stop("x", deadline=2.0)
        looking = house.make()
        looking.looks_only = True
        house.go.clear()
        await looking.start()
        await looking.stop(0.1)
        assert manifest_of(house).exists()
        assert await house.next_start() == ["EmergencyReconciled"]

    run_virtual(run)


ACCOUNT = Account(accepted=10, ready=3, in_flight=2, handled=5)


@pytest.mark.parametrize(
    ("found", "now", "missing"),
    [
        ({("1", "s"), ("2", "s")}, Ledger({"s": ACCOUNT}), 0),
        ({("1", "s")}, Ledger({"s": ACCOUNT}), 1),
        ({("1", "s")}, Ledger({"s": Account(accepted=10, ready=4, handled=6)}), 0),
        (set(), Ledger({"s": Account(accepted=10, ready=3, handled=6, expired=1)}), 0),
        (set(), Ledger({"s": Account(accepted=10, ready=3, handled=6)}), 1),
        (set(), Ledger({}, Account(accepted=10, handled=5, discarded=5)), 0),
        (set(), Ledger({}), 10),
        ({("1", "s"), ("2", "s")}, Ledger({"s": Account(accepted=8, ready=3, handled=5)}), 2),
    ],
)
def test_missing_is_what_is_neither_found_nor_ended(found: set[tuple[str, str]], now: Ledger, missing: int) -> None:
    saved = (Saved("1", "s"), Saved("2", "s"))
    made = Manifest(bus="b", address="a", at=1.0, reason="r", ledger=Ledger({"s": ACCOUNT}), saved=saved)
    assert manifests.missing(made, found, now) == missing


def test_a_manifest_is_read_as_it_was_written_and_one_of_a_later_version_is_not(tmp_path: Path) -> None:
    made = Manifest(
        bus="b", address="a", at=1.0, reason="r", ledger=Ledger({"s": ACCOUNT}), saved=(Saved("1", "s", 3),)
    )
    manifests.write(tmp_path / "m", made)
    assert manifests.read(tmp_path / "m") == made
    lines = sealed.read(tmp_path / "m")
    sealed.write(tmp_path / "m", [lines[0].replace(b'"version":1', b'"version":2'), *lines[1:]])
    with pytest.raises(ValueError, match="version 2"):
        manifests.read(tmp_path / "m")


# Signals and sudden ends, in real processes


PROGRAM = """
import asyncio, signal, sys
from glassbus import Message, MessageBus

bus = MessageBus("sqlite:///{place}/store.db", telemetry=False)

@bus.subscribe("orders.*", name="charge", concurrency=4, timeout=1000)
async def charge(_: Message[int]) -> None:
    await asyncio.sleep(1000)

async def main():
    await bus.start()
    bus.emergency_on_signals(signal.SIGUSR1, deadline=1.0)
    for n in range(20):
        await bus.publish("orders.created", n)
    print("ready", flush=True)
    {then}
    while bus.running:
        await asyncio.sleep(0.05)
    ended = await bus.emergency_stop("x")
    print(ended.reason, ended.saved, flush=True)

asyncio.run(main())
"""


def start(place: Path, then: str = "") -> subprocess.Popen[str]:
    text = textwrap.dedent(PROGRAM).format(place=place, then=then)
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def handled_by_a_next_start(place: Path) -> tuple[list[int], list[str]]:
    seen, handled = RecordingObserver(), []

    async def run() -> None:
        bus = MessageBus(f"sqlite:///{place}/store.db", telemetry=False, observers=[seen])

        @bus.subscribe("orders.*", name="charge", concurrency=4)
        async def charge(message: Message[Any]) -> None:
            handled.append(message.payload)

        async with bus:
            await bus.drain(30.0)
            assert (await bus.audit()).ok

    asyncio.run(run())
    return sorted(handled), seen.names()


def test_a_signal_makes_one_and_nothing_is_lost(tmp_path: Path) -> None:
    process = start(tmp_path)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert out == "signal SIGUSR1 4\n"
    assert process.returncode == 0
    handled, names = handled_by_a_next_start(tmp_path)
    assert handled == list(range(20))
    assert "EmergencyReconciled" in names


@pytest.mark.parametrize("after_ms", [0, 2, 5, 10, 20, 40, 80, 500])
def test_killed_in_the_middle_of_one_nothing_is_lost(tmp_path: Path, after_ms: int) -> None:
    process = start(tmp_path)
    process.send_signal(signal.SIGUSR1)
    timer = threading.Timer(after_ms / 1000, process.kill)
    timer.start()
    process.communicate(timeout=30)
    timer.join()
    handled, names = handled_by_a_next_start(tmp_path)
    assert handled == list(range(20))
    assert "ManifestQuarantined" not in names


def test_a_thread_and_a_signal_handler_of_ones_own_may_ask_for_it(tmp_path: Path) -> None:
    then = "signal.signal(signal.SIGUSR2, lambda *_: bus.emergency.request('mine', 1.0)); "
    process = start(tmp_path, then + "signal.raise_signal(signal.SIGUSR2)")
    out, _ = process.communicate(timeout=30)
    assert out.startswith("mine ")


def test_signals_that_cannot_be_handled_are_refused() -> None:
    async def run() -> None:
        bus = MessageBus(telemetry=False)
        with pytest.raises(GlassbusError, match="cannot be handled here"):
            bus.emergency_on_signals(signal.SIGKILL)

    asyncio.run(run())


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """What is held can be written down `after` times more; then the disk is full."""
    left = [after]
    write = sealed.write

    def fill(path: Path, lines: Any) -> None:
        left[0] -= "escalations" not in path.parts
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        write(path, lines)

    monkeypatch.setattr(sealed, "write", fill)


def test_on_a_full_disk_a_memory_bus_says_that_nothing_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(clock: VirtualClock) -> None:
        house = House("memory", tmp_path)
        bus = await house.filled()
        full_disk(monkeypatch)
        ended = await bus.emergency_stop("x", deadline=2.0)
        assert (ended.saved, ended.manifest) == (0, "")
        assert len(house.seen.of(f.DeliveryDiscarded)) == 5
        (stopped,) = house.seen.of(f.BusStopped)
        assert (stopped.given_back, stopped.discarded) == (0, 5)
        assert bus.ledger().balanced
        assert bus.ledger().total.discarded == 5

    run_virtual(run)


def test_what_an_emergency_had_saved_before_the_disk_was_full_is_not_called_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(clock: VirtualClock) -> None:
        house = House("memory", tmp_path)
        bus = await house.filled()
        full_disk(monkeypatch, after=2)  # the spill and its manifest
        ended = await bus.emergency_stop("x", deadline=2.0)
        monkeypatch.undo()
        assert ended.saved == 5
        assert house.seen.of(f.DeliveryDiscarded) == []
        assert await house.next_start() == ["EmergencyReconciled"]
        assert sorted(house.handled) == [0, 1, 2, 3, 4]

    run_virtual(run)


def test_a_stop_that_cannot_spill_states_it_and_discards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(clock: VirtualClock) -> None:
        house = House("memory+spill", tmp_path)
        bus = await house.filled()
        full_disk(monkeypatch)
        await bus.stop(1.0)
        assert [fact.operation for fact in house.seen.of(f.TransportFailed)] == ["spill"]
        assert len(house.seen.of(f.DeliveryDiscarded)) == 5
        (stopped,) = house.seen.of(f.BusStopped)
        assert (stopped.given_back, stopped.discarded) == (0, 5)
        assert bus.ledger().balanced

    run_virtual(run)


def test_a_bus_that_spills_elsewhere_restores_what_an_emergency_left(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        bus = await House("memory", tmp_path).filled()
        await bus.emergency_stop("x", deadline=2.0)
        house = House("memory+spill", tmp_path)
        assert await house.next_start() == ["EmergencyReconciled"]
        (reconciled,) = house.seen.of(f.EmergencyReconciled)
        assert (reconciled.restored, reconciled.missing) == (5, 0)
        assert sorted(house.handled) == [0, 1, 2, 3, 4]

    run_virtual(run)
    assert list(tmp_path.rglob("*.spill.jsonl")) == []


def test_a_transport_that_cannot_restore_what_was_spilled_says_so_and_leaves_it(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        bus = await House("memory", tmp_path).filled()
        await bus.emergency_stop("x", deadline=2.0)
        other = House("sqlite", tmp_path)
        opened: set[str] = set()
        for _ in range(2):  # for as long as it is there
            assert await other.next_start() == ["EmergencyReconciled"]
            (reconciled,) = other.seen.of(f.EmergencyReconciled)
            assert (reconciled.saved, reconciled.restored, reconciled.missing) == (5, 0, 5)
            (failed,) = other.seen.of(f.TransportFailed)
            assert "5 messages in 0.spill.jsonl were not restored" in failed.error
            opened.update(fact.name for fact in other.seen.of(f.EscalationOpened))
        assert "MessagesMissing" in opened
        assert other.handled == []
        house = House("memory", tmp_path)
        assert await house.next_start() == ["EmergencyReconciled"]
        (reconciled,) = house.seen.of(f.EmergencyReconciled)
        assert (reconciled.restored, reconciled.missing) == (5, 0)
        assert sorted(house.handled) == [0, 1, 2, 3, 4]

    run_virtual(run)


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "emergency").symlink_to(tmp_path / "other")

    async def run(clock: VirtualClock) -> None:
        house = House("memory", tmp_path)
        bus = await house.filled()
        ended = await bus.emergency_stop("x", deadline=2.0)
        assert ended.saved == 0
        assert any("symbolic link" in fact.error for fact in house.seen.of(f.TransportFailed))
        assert len(house.seen.of(f.DeliveryDiscarded)) == 5

    run_virtual(run)
    assert list((tmp_path / "other").iterdir()) == []


def test_a_start_removes_what_a_killed_writer_left(house: House) -> None:
    async def run(clock: VirtualClock) -> None:
        bus = await house.filled()
        await bus.emergency_stop("x", deadline=2.0)
        left = [path.with_name(f"{path.name}.0a0b0c0d.tmp") for path in house.place.rglob("*.jsonl")]
        left = [path for path in left if "journal" not in path.parts]
        assert left
        for path in left:
            path.write_bytes(b"half")
        await house.next_start()
        assert [path for path in left if path.exists()] == []

    run_virtual(run)
