"""A fault strikes when it is told to, leaves when its block ends, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from glassbus import ConfigurationError, Message, MessageBus, ProductionMessageBus, Retry, UnknownSubscription
from glassbus.facts import FaultHealed, FaultInjected
from glassbus.faults import (
    After,
    Always,
    Between,
    ClockJump,
    CorruptPayload,
    Crash,
    Delay,
    DiskFull,
    DropConnection,
    Every,
    Fault,
    First,
    Hang,
    JumpingClock,
    MemoryPressure,
    Raise,
    Refuse,
    Schedule,
    SlowDisk,
    TelemetryDown,
    inject,
)
from glassbus.faults.schedule import admits
from glassbus.faults.taps import tap, tapped
from glassbus.faults.target import PORTS, parse_target
from glassbus.faults.transport import FaultyTransport
from glassbus.faults.wiring import _holders
from glassbus.testing import RecordingObserver, VirtualClock, expect_facts, run_virtual
from glassbus.transport import let_grow


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert tapped() == []


def plain_bus(*observers: Any, **options: Any) -> MessageBus:
    options.setdefault("telemetry", False)
    return MessageBus(observers=observers, seed=1, **options)


# When it strikes


@pytest.mark.parametrize(
    ("schedule", "struck"),
    [
        (Always(), [1, 2, 3, 4, 5, 6]),
        (After(2), [3, 4, 5, 6]),
        (First(2), [1, 2]),
        (Every(3), [3, 6]),
        (Between(2.0, 4.0), [3, 4]),
    ],
)
def test_a_schedule_says_which_calls_are_struck(schedule: Schedule, struck: list[int]) -> None:
    """Call number n is made n - 1 seconds after the injection."""
    assert [call for call in range(1, 7) if admits(schedule, call, call - 1.0)] == struck


def strikes_of(calls: int, **options: Any) -> list[bool]:
    bus = plain_bus()
    bus.subscribe("a", name="a")(_no_op)
    with inject(bus, Refuse(), "handler:a", **options) as injection:
        return [injection.strikes() for _ in range(calls)]


@given(st.integers(0, 2**32), st.floats(0, 1), st.integers(0, 10))
def test_the_same_seed_strikes_the_same_calls_whatever_the_schedule(seed: int, probability: float, skip: int) -> None:
    struck = strikes_of(40, seed=seed, probability=probability)
    assert struck == strikes_of(40, seed=seed, probability=probability)
    later = strikes_of(40, seed=seed, probability=probability, schedule=After(skip))
    assert later == [False] * skip + struck[skip:]


def test_a_probability_is_about_kept_and_another_seed_strikes_others() -> None:
    struck = strikes_of(2000, probability=0.3, seed=1)
    assert 500 < sum(struck) < 700
    assert struck != strikes_of(2000, probability=0.3, seed=2)


def test_a_limit_ends_it() -> None:
    assert strikes_of(5, limit=2, schedule=Every(2)) == [False, True, False, True, False]


# What can be asked for


FAULTS: list[Fault] = [
    Raise(ValueError),
    Delay(1.0),
    Hang(),
    DropConnection(),
    Refuse(),
    CorruptPayload(),
    DiskFull(),
    SlowDisk(0.2),
    ClockJump(3600),
    MemoryPressure(),
    TelemetryDown(),
    Crash(),
]


def test_every_fault_has_a_target_and_every_target_a_fault() -> None:
    fitting = {kind for port in PORTS.values() for kind in port.faults}
    assert fitting == {type(fault) for fault in FAULTS}
    assert all(port.faults for port in PORTS.values())


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_strikes_what_it_fits_and_nothing_else(fault: Fault) -> None:
    for kind, port in PORTS.items():
        target = f"{kind}:name" if port.named else kind
        if type(fault) in port.faults:
            assert str(parse_target(target, fault)) == target
        else:
            with pytest.raises(ConfigurationError, match="cannot strike"):
                parse_target(target, fault)


@pytest.mark.parametrize(
    "target", ["", "handler", "handler:", "transport:open", "disk:c", "nonsense", "topic:a..b", 7, None, "transport"]
)
def test_an_unknown_target_is_refused_by_name(target: Any) -> None:
    with pytest.raises(ConfigurationError, match="target"):
        inject(plain_bus(), Refuse(), target)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Delay(-1),
        lambda: Delay(float("nan")),
        lambda: SlowDisk(float("inf")),
        lambda: ClockJump(0),
        lambda: MemoryPressure(-1),
        lambda: MemoryPressure(1 << 40),
        lambda: CorruptPayload("shred"),  # type: ignore[arg-type]
        lambda: TelemetryDown("maybe"),  # type: ignore[arg-type]
        lambda: Raise("ValueError"),  # type: ignore[arg-type]
        lambda: Raise(int),  # type: ignore[arg-type]
        lambda: Raise(UnicodeDecodeError),
        lambda: After(-1),
        lambda: First(0),
        lambda: Every(0),
        lambda: Between(3.0, 3.0),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_written(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError):
        make()


@pytest.mark.parametrize(
    "options",
    [
        {"probability": 1.5},
        {"probability": float("nan")},
        {"probability": "often"},
        {"limit": 0},
        {"limit": True},
        {"schedule": "always"},
    ],
)
def test_so_is_how_often(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        inject(plain_bus(), Refuse(), "topic:a", **options)


def test_an_unknown_handler_observer_or_bus_is_refused_and_nothing_is_left() -> None:
    bus = plain_bus()
    bus.subscribe("a", name="a")(_no_op)
    with pytest.raises(UnknownSubscription, match="known are"), inject(bus, Refuse(), "handler:b"):
        pass
    with pytest.raises(ConfigurationError, match="LoggingObserver"), inject(bus, Raise(OSError), "observer:Nobody"):
        pass
    with pytest.raises(ConfigurationError, match="MessageBus"):
        inject(object(), Refuse(), "handler:a")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="not one of the faults"):
        inject(bus, ValueError("no"), "handler:a")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="JumpingClock"), inject(bus, ClockJump(5), "clock"):
        pass
    with pytest.raises(ConfigurationError, match="telemetry=False"), inject(bus, TelemetryDown(), "telemetry"):
        pass
    with pytest.raises(ConfigurationError, match="SQLite"), inject(bus, Raise(OSError), "disk"):
        pass


# Crash and the whole process


@pytest.mark.parametrize(
    ("fault", "target"),
    [(Crash(), "handler:a"), (Crash(), "process"), (MemoryPressure(1024), "process"), (Crash(), "transport:publish")],
)
def test_what_befalls_the_whole_process_must_be_allowed(
    fault: Fault, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = plain_bus()
    bus.subscribe("a", name="a")(_no_op)
    with pytest.raises(ConfigurationError, match=r"allow_crash=True.*GLASSBUS_FAULTS_ALLOW_CRASH=1"):
        inject(bus, fault, target)
    with pytest.raises(ConfigurationError, match="allow_crash"):
        inject(bus, fault, target, allow_crash="yes")  # type: ignore[arg-type]
    inject(bus, fault, target, allow_crash=True)
    monkeypatch.setenv("GLASSBUS_FAULTS_ALLOW_CRASH", "1")
    inject(bus, fault, target)


CRASH = """
import asyncio
from glassbus import MessageBus
from glassbus.faults import Crash, After, inject

bus = MessageBus("sqlite:///crash.db", telemetry=False)

@bus.subscribe("a", name="a")
async def handle(message):
    print("handled", message.payload, flush=True)

async def main():
    async with bus:
        with inject(bus, Crash(), "handler:a", schedule=After(2), allow_crash=True):
            for number in range(5):
                await bus.publish("a", number)
            await bus.drain()

asyncio.run(main())
"""


def test_a_crash_is_a_sigkill_where_the_target_is_reached(tmp_path: Any) -> None:
    ran = subprocess.run([sys.executable, "-c", CRASH], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (-9, "handled 0\nhandled 1\n"), ran.stderr


def test_memory_of_the_process_is_really_taken_and_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    size = 64 * 1024 * 1024
    gc.collect()
    before = resident()
    with inject(plain_bus(), MemoryPressure(size), "process", allow_crash=True) as injection:
        assert resident() - before > 0.9 * size
        assert injection.hits == 1
    assert resident() - before < 0.2 * size


# Coming and going


async def _no_op(message: Message[Any]) -> None:
    """Takes it."""


def wiring(bus: MessageBus) -> dict[str, Any]:
    """Everything of the bus that a message goes through, and that a fault could stand before."""
    found: dict[str, Any] = {}
    for owner, name in _holders(bus, bus._transport):
        found[f"{type(owner).__name__}.{id(owner)}.{name}"] = vars(owner)[name]
    for worker in bus.subscribers():
        found[f"{worker.name} function"] = worker._function
        found[f"{worker.name} handler"] = dict(vars(worker.subscription.handler))
    for part in (bus._transport, getattr(bus._transport, "_store", None), bus._publisher, *bus.hub.observers):
        found[f"{type(part).__name__} names"] = sorted(getattr(part, "__dict__", ()))
    found["transport"] = bus._transport
    found["hub"] = (bus.hub.observers, bus.hub.scopes, bus.hub.shows_happy, dict(bus.hub._by_type))
    return found


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name] is value or after[name] == value, name


ANYWHERE: list[tuple[Fault, str]] = [
    (Refuse(), "handler:async"),
    (Hang(), "handler:plain"),
    (Delay(1), "topic:a.>"),
    (Refuse(), "transport:*"),
    (CorruptPayload(), "transport:publish"),
    (CorruptPayload(), "codec:decode"),
    (CorruptPayload(), "codec:encode"),
    (DiskFull(), "disk"),
    (DiskFull(entirely=True), "disk"),
    (SlowDisk(0.1), "disk"),
    (ClockJump(5), "clock"),
    (TelemetryDown(), "telemetry"),
    (Raise(OSError), "observer:*"),
]


@pytest.mark.parametrize(("fault", "target"), ANYWHERE, ids=lambda one: str(one))
@pytest.mark.parametrize("url", ["memory://", "sqlite:///x.db"])
@pytest.mark.parametrize("ending", ["returns", "raises", "is cancelled", "stops the bus"])
def test_nothing_of_it_is_in_the_way_before_and_after(
    fault: Fault, target: str, url: str, ending: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the block ends, every port is the object that it was, and messages flow."""
    monkeypatch.chdir(tmp_path)
    handled: list[int] = []

    async def scenario(clock: VirtualClock) -> None:
        seen = RecordingObserver()
        bus = MessageBus(url, observers=[seen], seed=1, registry=CollectorRegistry())

        @bus.subscribe("a.*", name="async", retry=Retry(max_attempts=1))
        async def take(message: Message[int]) -> None:
            handled.append(message.payload)

        @bus.subscribe("b", name="plain")
        def keep(message: Message[int]) -> None:
            handled.append(message.payload)

        async with bus:
            before = wiring(bus)

            async def block() -> None:
                async with inject(bus, fault, target):
                    assert seen.of(FaultInjected)
                    await asyncio.sleep(0.2)
                    if ending == "raises":
                        raise KeyError(ending)
                    if ending == "is cancelled":
                        await asyncio.sleep(1e6)
                    if ending == "stops the bus":
                        await bus.stop(1.0)

            task = asyncio.create_task(block())
            await asyncio.sleep(0.5)
            if ending == "is cancelled":
                task.cancel()
            await asyncio.wait({task})
            assert isinstance(task.exception(), KeyError) if ending == "raises" else True
            if ending == "stops the bus":
                return
            await asyncio.sleep(1.5)
            same(before, wiring(bus))
            await bus.publish("a.x", 1)
            await bus.publish("b", 2)
            await bus.drain(timeout=10)
            assert sorted(handled) == [1, 2]
        told = [fact for fact in seen.facts if isinstance(fact, FaultInjected | FaultHealed)]
        if target != "observer:*":  # the recorder was struck as well
            assert [(type(fact), fact.fault, fact.target) for fact in told] == [
                (FaultInjected, str(fault), target),
                (FaultHealed, str(fault), target),
            ]

    run_virtual(scenario)


OWN = {"claim", "claim_now", "close", "flush", "handled_now", "probe", "publish", "publish_now", "settle"}


@pytest.mark.parametrize("url", ["memory://", "sqlite:///x.db"])
def test_the_stand_in_can_do_what_the_transport_can(url: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked of it, by its class or by its attributes, is answered by the real one."""
    monkeypatch.chdir(tmp_path)

    async def scenario(clock: VirtualClock) -> None:
        bus = plain_bus(url=url)
        async with bus:
            real = bus._transport
            public = {name for name in dir(real) if not name.startswith("_")}
            with inject(bus, Refuse(), "transport:probe", schedule=After(1000)):
                faulty: Any = bus._transport
                assert faulty is not real
                for name in public - OWN:
                    assert inspect.getattr_static(faulty, name, None) is not None, name
                    assert getattr(faulty, name) == getattr(real, name), name
                let_grow(faulty, False)
                assert getattr(real, "may_grow", False) is False
                assert (await faulty.audit()).ok

    run_virtual(scenario)


def test_a_subscription_that_comes_and_goes_meanwhile_is_wired_as_any_other() -> None:
    runs: list[int] = []

    async def scenario(clock: VirtualClock) -> None:
        bus = plain_bus()
        bus.subscribe("a", name="first")(_no_op)
        async with bus:
            async with inject(bus, Delay(0.1), "transport:*"), inject(bus, Delay(0.1), "handler:*"):

                @bus.subscribe("a", name="second")
                async def take(message: Message[int]) -> None:
                    runs.append(message.payload)

                await bus.publish("a", 1)
                await bus.forget("first")
                await bus.drain(60)
            await asyncio.sleep(1.0)
            held = [value for worker in bus.subscribers() for value in vars(worker).values()]
            assert not any(isinstance(value, FaultyTransport) for value in held)
            await bus.publish("a", 2)
            await bus.drain(60)
        assert runs == [1, 2]

    run_virtual(scenario)


def test_the_blocking_bus_takes_faults_from_its_callers_thread(tmp_path: Any) -> None:
    retry = Retry(max_attempts=5, base_delay=0.0)
    bus = ProductionMessageBus({"log_dir": str(tmp_path), "telemetry": False, "retry": retry})
    runs: list[int] = []
    try:
        bus.subscribe("a", lambda message: runs.append(1), name="a")
        bus.start()
        with inject(bus, Refuse(), "handler:a", schedule=First(2)) as injection:
            bus.publish("a", {"n": 1})
            bus.drain(30)
        assert (runs, injection.hits) == ([1], 2)
    finally:
        bus.stop()


def test_without_a_fault_nothing_of_the_room_is_even_loaded(tmp_path: Any) -> None:
    program = (
        "import sys, asyncio\n"
        "from glassbus import MessageBus\n"
        "async def main():\n"
        "    async with MessageBus('sqlite:///x.db') as bus:\n"
        "        await bus.publish('a', 1)\n"
        "asyncio.run(main())\n"
        "print([name for name in sys.modules if name.startswith('glassbus.faults')])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    assert ran.stdout.strip() == "[]"


def test_faults_may_be_nested_and_leave_in_any_order() -> None:
    class Owner:
        def method(self) -> str:
            return "real"

    owner = Owner()
    wraps = [lambda inner, n=n: lambda: f"{n}({inner()})" for n in "abc"]
    leave = [tap(owner, "method", wrap) for wrap in wraps]
    assert owner.method() == "c(b(a(real)))"
    leave[1]()
    assert owner.method() == "c(a(real))"
    leave[0]()
    assert owner.method() == "c(real)"
    leave[2]()
    assert owner.method() == "real"
    assert vars(owner) == {}


def test_an_injection_is_good_for_one_use_and_heals_once() -> None:
    seen = RecordingObserver()
    bus = plain_bus(seen)
    bus.subscribe("a", name="a")(_no_op)
    injection = inject(bus, Refuse(), "handler:a")
    injection.heal()  # not in place: nothing to tell
    assert seen.names() == []
    with expect_facts(bus, FaultInjected, FaultHealed, exactly=True):
        with injection:
            assert repr(injection) == "<refuse at handler:a, in place, struck 0 of 0 calls>"
        injection.heal()
    with pytest.raises(ConfigurationError, match="one use"):
        injection.begin()
    assert not injection.strikes()


def test_a_fault_may_be_there_before_the_bus_starts() -> None:
    runs: list[int] = []

    async def scenario(clock: VirtualClock) -> None:
        bus = plain_bus()

        @bus.subscribe("a", name="a", retry=Retry(max_attempts=5))
        async def take(message: Message[int]) -> None:
            runs.append(message.payload)

        with (
            inject(bus, Refuse(), "handler:a", schedule=First(2)) as first,
            inject(bus, Delay(2.0), "transport:publish"),
        ):
            async with bus:
                before = clock.monotonic()
                await bus.publish("a", 1)
                assert clock.monotonic() - before == 2.0
                await bus.drain()
        assert first.hits == 2
        assert runs == [1]

    run_virtual(scenario)


def test_it_can_be_injected_from_another_thread() -> None:
    """As for a bus whose loop runs in a thread of its own."""

    async def scenario() -> None:
        seen = RecordingObserver()
        bus = plain_bus(seen)
        bus.subscribe("a", name="a", retry=Retry(max_attempts=1))(_no_op)
        async with bus:

            def elsewhere() -> int:
                with inject(bus, Hang(), "transport:claim"), inject(bus, Refuse(), "handler:a") as injection:
                    publishing = asyncio.run_coroutine_threadsafe(bus.publish("a", 1), loop)
                    publishing.result(5)
                asyncio.run_coroutine_threadsafe(bus.drain(5), loop).result(5)
                return injection.hits

            loop = asyncio.get_running_loop()
            assert await loop.run_in_executor(None, elsewhere) == 0  # no claim came through before both were healed
            assert bus.ledger().total.handled == 1

    asyncio.run(scenario())


def test_a_jumping_clock_jumps_in_wall_time_alone() -> None:
    clock = JumpingClock()
    bus = plain_bus(clock=clock)
    wall, monotonic = clock.wall(), clock.monotonic()
    with inject(bus, ClockJump(-3600.0), "clock"):
        assert -3601 < clock.wall() - wall < -3590
        assert 0 <= clock.monotonic() - monotonic < 10
    assert 0 <= clock.wall() - wall < 10
