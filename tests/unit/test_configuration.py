"""A configuration read again while the bus runs: whole or not at all, and what happens when it cannot work."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Callable, Coroutine, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from glassbus import ConfigurationError, KillSwitch, MessageBus, Retry, TransportError
from glassbus.facts import (
    BreakerStateChanged,
    DeliveryDeadLettered,
    DeliveryHandled,
    RecoveryConcluded,
    RecoveryStarted,
    SubscriptionPaused,
    SubscriptionResumed,
)
from glassbus.recovery.sources import LastKnownGood
from glassbus.testing import RecordingObserver, VirtualClock, run_virtual

EVERYDAY = {"SubscriptionDeclared", "BusStarted", "BusStopped", "MessagePublished", "DeliveryHandled", "HealthChanged"}


class Source:
    """A configuration that tests change."""

    def __init__(self, **values: Any) -> None:
        self.values: Any = values
        self.error: BaseException | None = None
        self.asked = 0
        self.clock: VirtualClock | None = None
        self.asked_at: list[float] = []

    def __call__(self) -> Mapping[str, Any]:
        self.asked += 1
        if self.clock is not None:
            self.asked_at.append(self.clock.monotonic())
        if self.error is not None:
            raise self.error
        return self.values  # type: ignore[no-any-return]

    def says(self, **settings: Any) -> None:
        """Of the subscription "s"."""
        self.values = {"subscriptions": {"s": settings}}


class Scene:
    def __init__(self, clock: VirtualClock, configuration: Any, **options: Any) -> None:
        self.clock = clock
        self.seen = RecordingObserver()
        self.bus = MessageBus(
            clock=clock, telemetry=False, observers=[self.seen], seed=1, configuration=configuration, **options
        )

    def told(self) -> list[str]:
        return [name for name in self.seen.names() if name not in EVERYDAY and not name.startswith("Escalation")]

    def concluded(self) -> list[tuple[str, str]]:
        return [(f.action, f.outcome) for f in self.seen.of(RecoveryConcluded)]

    def worker(self, name: str = "s") -> Any:
        return self.bus._workers[name]


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        run_virtual(test)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def bind(bus: MessageBus, name: str = "s", **options: Any) -> list[Any]:
    """A subscription that notes what it handles."""
    got: list[Any] = []

    @bus.subscribe(name, name=name, **options)
    async def handle(payload: Any) -> None:
        got.append(payload)

    return got


# In force


@in_virtual_time
async def test_it_holds_from_the_start_and_a_reload_changes_what_runs(clock: VirtualClock) -> None:
    source = Source(
        bus={"publish_timeout": 1.5, "payload_bytes_max": 50},
        subscriptions={"s": {"timeout": 3, "concurrency": 2, "retry": {"max_attempts": 9}}, "elsewhere": {}},
    )
    scene = Scene(clock, source)
    bus = scene.bus
    bind(bus, timeout=7.0, concurrency=5, retry=Retry(max_attempts=2, base_delay=0.7))
    async with bus:
        worker = scene.worker()
        assert (worker.timeout_s, worker.limit, worker.retry) == (3.0, 2, Retry(max_attempts=9, base_delay=0.7))
        assert worker.subscription.abandon_after == 30.0, "it keeps its relation to the timeout"
        with pytest.raises(Exception, match="at most 50"):
            await bus.publish("s", "x" * 60)
        assert await bus.reload() == ("elsewhere",)
        source.says(
            timeout=1.0,
            abandon_after=4.0,
            concurrency=3,
            capacity=77,
            kill_switch={"open_for": 1},
            adaptive_timeout={"cap": 2},
            overflow={"displace": False},
        )
        await bus.reload()
        assert (worker.timeout_s, worker.limit, worker.retry) == (1.0, 3, Retry(max_attempts=2, base_delay=0.7))
        subscription = worker.subscription
        assert (subscription.abandon_after, subscription.kill_switch) == (4.0, KillSwitch(open_for=1))
        assert bus.queues()["s"].spec.capacity == 77
        await bus.publish("s", "x" * 60)
        source.values = {}
        await bus.reload()
        assert (worker.timeout_s, worker.limit, bus.queues()["s"].spec.capacity) == (7.0, 5, 100_000)


@in_virtual_time
async def test_concurrency_is_raised_and_lowered_while_handlers_run(clock: VirtualClock) -> None:
    source, running, most = Source(), 0, 0
    scene = Scene(clock, source)
    bus = scene.bus

    @bus.subscribe("s", name="s", concurrency=4)
    async def handle(payload: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(1.0)
        running -= 1

    async with bus:
        for n in range(60):
            await bus.publish("s", n)
        await asyncio.sleep(0.5)
        for limit in (1, 9, 2, 6):
            source.says(concurrency=limit)
            await bus.reload()
            await asyncio.sleep(1.1)
            most = 0
            await asyncio.sleep(2.0)
            assert most == limit
            assert scene.worker().limit == limit
        await bus.drain()
        assert bus.ledger().accounts["s"].handled == 60
        assert len(scene.seen.of(DeliveryHandled)) == 60


@in_virtual_time
async def test_a_lower_limit_holds_at_once_for_idle_slots_and_a_higher_one_never_overshoots(
    clock: VirtualClock,
) -> None:
    source, running, most = Source(), 0, 0
    scene = Scene(clock, source)
    bus = scene.bus

    @bus.subscribe("s", name="s", concurrency=4)
    async def handle(payload: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(1.0)
        running -= 1

    async with bus:
        await asyncio.sleep(0.1)
        source.says(concurrency=1)
        await bus.reload()
        for n in range(40):
            await bus.publish("s", n)
        await asyncio.sleep(2.5)
        assert most == 1
        for limit in (2, 1, 2, 1, 2):  # faster than any handler ends
            source.says(concurrency=limit)
            await bus.reload()
        await asyncio.sleep(5)
        assert most == 2


@in_virtual_time
async def test_when_the_store_fails_nothing_of_a_configuration_is_applied(clock: VirtualClock) -> None:
    source = Source()
    scene = Scene(clock, source)
    bind(scene.bus, "a", capacity=10)
    bind(scene.bus, "b", capacity=10)
    async with scene.bus as bus:
        declare = bus._transport.declare

        async def fails(spec: Any, /, *, consume: bool) -> Any:
            if spec.name == "b" and spec.capacity != 10:
                raise TransportError("no store today")
            return await declare(spec, consume=consume)

        bus._transport.declare = fails  # type: ignore[method-assign]
        source.values = {"subscriptions": {name: {"capacity": 99, "timeout": 1.0} for name in ("a", "b")}}
        with pytest.raises(TransportError, match="no store today"):
            await bus.reload()
        assert {name: state.spec.capacity for name, state in bus.queues().items()} == {"a": 10, "b": 10}
        assert scene.worker("a").timeout_s == 30.0


@in_virtual_time
async def test_paused_is_a_setting_and_an_operator_can_end_it(clock: VirtualClock) -> None:
    source = Source()
    source.says(paused=True)
    scene = Scene(clock, source)
    got = bind(scene.bus)
    async with scene.bus as bus:
        await bus.publish("s", 1)
        assert (await bus.drain()).reasons == {"s": "paused"}
        source.says(paused=False)
        await bus.reload()
        await bus.drain()
        assert got == [1]
        source.says(paused=True)
        await bus.reload()
        await bus.publish("s", 2)
        await bus.resume("s")
        await bus.drain()
        assert got == [1, 2]
        assert {f.reason for f in scene.seen.of(SubscriptionPaused)} == {""}


@in_virtual_time
async def test_a_subscription_bound_later_gets_its_part(clock: VirtualClock) -> None:
    source = Source(subscriptions={"late": {"timeout": 9}, "broken": {"timeout": 5, "abandon_after": 1}})
    scene = Scene(clock, source)
    async with scene.bus as bus:
        bind(bus, "late")
        bind(bus, "broken")
        await bus.publish("late", 1)
        assert scene.worker("late").timeout_s == 9.0
        [paused] = scene.seen.of(SubscriptionPaused)
        assert paused.subscription == "broken"
        assert "abandon_after" in paused.reason


# Wrong


WRONG = [
    ({"subscription": {}}, "did you mean 'subscriptions'"),
    ({"subscriptions": {"s": {"timout": 3}}}, "subscriptions.s has no setting 'timout'; did you mean 'timeout'"),
    ({"subscriptions": {"s": {"timeout": "3"}}}, "subscriptions.s.timeout must be a number, not '3'"),
    ({"subscriptions": {"s": {"timeout": -1}}}, "subscriptions.s: timeout must be more than 0"),
    ({"subscriptions": {"s": {"timeout": float("nan")}}}, "subscriptions.s.timeout must be a number"),
    ({"subscriptions": {"s": {"concurrency": 0}}}, "subscriptions.s: concurrency must be a whole number"),
    ({"subscriptions": {"s": {"concurrency": True}}}, "subscriptions.s.concurrency must be a whole number, not True"),
    ({"subscriptions": {"s": {"paused": 1}}}, "subscriptions.s.paused must be true or false"),
    ({"subscriptions": {"s": {"retry": 3}}}, "subscriptions.s.retry must be a table"),
    ({"subscriptions": {"s": {"retry": {"max_attempts": 0}}}}, "subscriptions.s.retry: Retry.max_attempts"),
    ({"subscriptions": {"s": {"retry": {"dead_letter_on": 0}}}}, "subscriptions.s.retry has no setting"),
    ({"subscriptions": {"s": {"kill_switch": {"ratio": 2}}}}, "subscriptions.s.kill_switch: KillSwitch needs"),
    ({"subscriptions": {"s": {"adaptive_timeout": {"cap": 0.5}}}}, "subscriptions.s.adaptive_timeout: .*cap"),
    ({"subscriptions": {"s": 3}}, "subscriptions.s must be a table"),
    ({"subscriptions": []}, "subscriptions is a list"),
    ({"bus": {"name": "x"}}, "bus has no setting 'name'"),
    ({"bus": {"publish_timeout": -1}}, "bus: publish_timeout"),
    ({"subscriptions": {"s": {"timeout": None}}}, "subscriptions.s.timeout is a NoneType"),
    ({1: 2}, "a key of it is a int"),
    (["no mapping"], "must be a mapping, not a list"),
    (None, "must be a mapping"),
]


@pytest.mark.parametrize(("values", "complaint"), WRONG, ids=[complaint[:40] for _, complaint in WRONG])
def test_what_cannot_work_is_refused_whole_with_its_key_named(values: Any, complaint: str) -> None:
    """Nothing of it is applied, and the last known good stays in force."""

    async def run(clock: VirtualClock) -> None:
        source = Source()
        source.says(timeout=3.0)
        scene = Scene(clock, source)
        bind(scene.bus)
        bind(scene.bus, "other")
        async with scene.bus as bus:
            source.values = values
            if isinstance(values, dict) and isinstance(values.get("subscriptions"), dict):
                source.values = {"subscriptions": {**values["subscriptions"], "other": {"timeout": 1.0}}}
            with pytest.raises(ConfigurationError, match=complaint):
                await bus.reload()
            assert scene.worker().timeout_s == 3.0
            assert scene.worker("other").timeout_s == 30.0
            assert scene.told() == ["RecoveryStarted", "RecoveryConcluded"] * 2
            assert scene.concluded() == [("reload", "failed"), ("last_known_good", "succeeded")]

    run_virtual(run)


class SilentError(Exception):
    def __str__(self) -> str:
        raise SystemExit


class Liar(dict[str, Any]):
    def items(self) -> Any:
        raise GeneratorExit


@pytest.mark.parametrize(
    "error", [OSError("gone"), SilentError(), SystemExit(1), KeyboardInterrupt(), GeneratorExit(), StopIteration(1)]
)
def test_a_source_that_raises_anything_changes_nothing(error: BaseException) -> None:
    async def run(clock: VirtualClock) -> None:
        source = Source()
        source.says(timeout=3.0)
        scene = Scene(clock, source)
        got = bind(scene.bus)
        async with scene.bus as bus:
            source.error = error
            with pytest.raises(ConfigurationError, match=f"'Source' failed: .*{type(error).__name__}"):
                await bus.reload()
            await bus.publish("s", 1)
            await bus.drain()
            assert (got, scene.worker().timeout_s) == ([1], 3.0)

    run_virtual(run)


def test_a_source_that_lies_or_cancels_changes_nothing() -> None:
    async def cancels() -> Mapping[str, Any]:
        raise asyncio.CancelledError

    async def exits() -> Mapping[str, Any]:
        raise KeyboardInterrupt

    async def run(clock: VirtualClock) -> None:
        source = Source()
        scene = Scene(clock, lambda: source() if isinstance(source.values, dict) else source.values())
        got = bind(scene.bus)
        async with scene.bus as bus:
            endless: dict[str, Any] = {}
            endless["subscriptions"] = endless
            for lie in (Liar(a=1), endless, cancels, exits):
                source.values = lie
                with pytest.raises(ConfigurationError):
                    await bus.reload()
            await bus.publish("s", 1)
            await bus.drain()
            assert got == [1]

    run_virtual(run)


@in_virtual_time
async def test_an_async_source_that_hangs_is_given_up(clock: VirtualClock) -> None:
    hangs = False

    async def source() -> Mapping[str, Any]:
        if hangs:
            await asyncio.sleep(1000)
        return {"subscriptions": {"s": {"timeout": 3}}}

    scene = Scene(clock, source)
    bind(scene.bus)
    async with scene.bus as bus:
        assert scene.worker().timeout_s == 3.0
        hangs, started = True, clock.monotonic()
        with pytest.raises(ConfigurationError, match="did not answer within 5 s"):
            await bus.reload()
        assert clock.monotonic() - started == pytest.approx(5.0)


def test_a_plain_source_that_hangs_keeps_neither_the_loop_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """In real time, because nobody can hurry a thread."""
    import threading

    monkeypatch.setattr("glassbus.recovery.sources.SOURCE_TIMEOUT_S", 0.05)
    let_go = threading.Event()

    def source() -> Mapping[str, Any]:
        let_go.wait(60)
        return {}

    async def run() -> None:
        seen = RecordingObserver()
        bus = MessageBus(telemetry=False, observers=[seen], configuration=source)
        bind(bus)
        async with bus:
            assert [f.subscription for f in seen.of(SubscriptionPaused)] == ["s"]

    try:
        asyncio.run(run())
    finally:
        let_go.set()


@pytest.mark.parametrize("source", [17, "settings.yaml", b"x.toml", {"bus": {}}])
def test_what_can_be_no_source_is_refused_when_the_bus_is_made(source: Any) -> None:
    with pytest.raises(ConfigurationError, match="configuration"):
        MessageBus(telemetry=False, configuration=source)


@in_virtual_time
async def test_a_bus_without_a_configuration_says_so(clock: VirtualClock) -> None:
    scene = Scene(clock, None)
    with pytest.raises(ConfigurationError, match="is new"):
        await scene.bus.reload()
    async with scene.bus as bus:
        with pytest.raises(ConfigurationError, match="give it one"):
            await bus.reload()


# Files


def test_files_in_toml_and_json(tmp_path: Path) -> None:
    toml, js = tmp_path / "bus.toml", tmp_path / "bus.json"
    toml.write_text("[subscriptions.s]\ntimeout = 3\nretry.max_attempts = 4\n")
    js.write_text('{"subscriptions": {"s": {"timeout": 3, "retry": {"max_attempts": 4}}}}')

    async def run(clock: VirtualClock) -> None:
        for source in (toml, str(js)):
            scene = Scene(clock, source)
            bind(scene.bus)
            async with scene.bus as bus:
                assert (scene.worker().timeout_s, scene.worker().retry.max_attempts) == (3.0, 4)
                Path(source).write_text("{ neither")  # noqa: ASYNC240 - a few bytes
                with pytest.raises(ConfigurationError, match=Path(source).name):
                    await bus.reload()
                Path(source).unlink()  # noqa: ASYNC240
                with pytest.raises(ConfigurationError, match="FileNotFoundError"):
                    await bus.reload()

    run_virtual(run)


def test_the_last_known_good_outlives_the_process(tmp_path: Path) -> None:
    """At a start with a source that fails, what was in force before holds; and the source is tried again."""

    async def first(clock: VirtualClock, source: Source) -> None:
        scene = Scene(clock, source, state_dir=tmp_path / "state")
        bind(scene.bus)
        async with scene.bus:
            pass

    async def second(clock: VirtualClock, source: Source) -> None:
        scene = Scene(clock, source, state_dir=tmp_path / "state")
        got = bind(scene.bus)
        async with scene.bus as bus:
            assert scene.worker().timeout_s == 3.0
            assert scene.concluded() == [("reload", "failed"), ("last_known_good", "succeeded")]
            assert scene.seen.of(SubscriptionPaused) == []
            await bus.publish("s", 1)
            await asyncio.sleep(12)
            source.error = None
            source.says(timeout=4.0)
            healed_at = clock.monotonic()
            while scene.worker().timeout_s != 4.0:
                await asyncio.sleep(0.5)
            assert clock.monotonic() - healed_at < 30
            assert got == [1]
            assert scene.concluded()[-1] == ("reload", "succeeded")

    source = Source()
    source.says(timeout=3.0)
    run_virtual(lambda clock: first(clock, source))
    [saved] = (tmp_path / "state").glob("configuration-*")
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    source.error = OSError("gone")
    run_virtual(lambda clock: second(clock, source))


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "other"])
def test_a_damaged_last_known_good_is_not_used(tmp_path: Path, damage: str) -> None:
    source = Source()
    source.says(timeout=3.0)

    async def run(clock: VirtualClock, paused: bool) -> None:
        scene = Scene(clock, source, state_dir=tmp_path)
        bind(scene.bus)
        async with scene.bus:
            assert (scene.worker().gate.state_name == "paused") is paused
            if paused:
                assert scene.concluded() == [("reload", "failed"), ("last_known_good", "failed")]

    run_virtual(lambda clock: run(clock, False))
    [saved] = tmp_path.glob("configuration-*")
    body = saved.read_bytes()
    saved.write_bytes(
        {
            "flipped": body.replace(b"3.0", b"9.0"),
            "cut": body[: len(body) // 2],
            "emptied": b"",
            "other": json.dumps({"subscriptions": {}}).encode(),
        }[damage]
    )
    source.error = OSError("gone")
    run_virtual(lambda clock: run(clock, True))


def test_buses_with_other_sources_keep_their_own(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        for name in ("a", "b"):
            scene = Scene(clock, Source(), name=name, state_dir=tmp_path)
            async with scene.bus:
                pass

    run_virtual(run)
    assert len(list(tmp_path.glob("configuration-*"))) == 2


def test_a_configuration_that_cannot_be_saved_holds_all_the_same(tmp_path: Path) -> None:
    async def run(clock: VirtualClock, failures: dict[str, int]) -> None:
        scene = Scene(clock, source, state_dir=tmp_path)
        bind(scene.bus)
        async with scene.bus as bus:
            assert scene.worker().timeout_s == 3.0
            assert bus.observer_failures() == failures

    source = Source()
    source.says(timeout=3.0)
    run_virtual(lambda clock: run(clock, {}))
    [saved] = tmp_path.glob("configuration-*")
    saved.unlink()
    (saved / "in the way").mkdir(parents=True)
    run_virtual(lambda clock: run(clock, {"Configuration": 1}))
    assert [p.name for p in tmp_path.glob("configuration-*")] == [saved.name], "nothing half-written is left"


# At a start that cannot work


@in_virtual_time
async def test_only_the_part_that_cannot_work_is_paused_and_keeps_its_messages(clock: VirtualClock) -> None:
    source = Source(subscriptions={"s": {"timeout": -1}, "fine": {"timeout": 4.0}})
    scene = Scene(clock, source)
    got, fine = bind(scene.bus), bind(scene.bus, "fine")
    async with scene.bus as bus:
        [paused] = scene.seen.of(SubscriptionPaused)
        assert paused.subscription == "s"
        assert "timeout must be more than 0" in paused.reason
        assert scene.worker("fine").timeout_s == 4.0
        await bus.publish("s", 1)
        await bus.publish("fine", 2)
        assert (await bus.drain()).reasons == {"s": "paused"}
        assert (got, fine) == ([], [2])
        await asyncio.sleep(40)
        source.says(timeout=2.0)
        healed_at = clock.monotonic()
        while not got:
            await asyncio.sleep(0.5)
        assert clock.monotonic() - healed_at < 30
        assert scene.worker().timeout_s == 2.0
        assert [f.subscription for f in scene.seen.of(SubscriptionResumed)] == ["s"]


@in_virtual_time
async def test_a_source_that_stays_broken_opens_its_breaker_and_is_asked_less(clock: VirtualClock) -> None:
    source = Source()
    source.error = OSError("gone")
    scene = Scene(clock, source)
    bind(scene.bus)
    async with scene.bus as bus:
        await asyncio.sleep(120)
        [view] = [v for v in bus.breaker_views() if v.name == "configuration/configuration_error"]
        assert view.failed_count <= 12
        assert {f.breaker for f in scene.seen.of(BreakerStateChanged)} == {"configuration/configuration_error"}
        source.error, healed_at = None, clock.monotonic()
        while scene.worker().gate.state_name == "paused":
            await asyncio.sleep(0.5)
        assert clock.monotonic() - healed_at < 30
        assert view.state == "closed"


# Handlers that fail with a configuration error


@in_virtual_time
async def test_a_handler_that_lacks_a_setting_has_it_read_again(clock: VirtualClock) -> None:
    """configuration_error, transient: one reload besides the retry; nothing is lost."""
    source = Source()
    settings: dict[str, int] = {}
    scene = Scene(clock, lambda: (settings.update(key=1), source())[1] if source.asked else source())
    got = []

    @scene.bus.subscribe("s", name="s")
    async def handle(payload: int) -> None:
        if "key" not in settings:
            raise ConfigurationError("no key")
        got.append(payload)

    async with scene.bus as bus:
        await asyncio.sleep(10)
        source.says(timeout=5.0)
        await bus.publish("s", 1)
        await bus.drain()
        assert got == [1]
        assert source.asked == 2
        assert scene.told() == [
            "AttemptFailed",
            "RetryScheduled",
            "RecoveryStarted",
            "RecoveryConcluded",
            "RecoveryEnded",
        ]
        assert scene.concluded() == [("reload", "succeeded")]
        [started] = scene.seen.of(RecoveryStarted)
        assert (started.component, started.error) == ("configuration", "ConfigurationError: no key")


@in_virtual_time
async def test_a_handler_that_never_gets_its_setting_is_paused_and_keeps_its_messages(clock: VirtualClock) -> None:
    """configuration_error, permanent: three dead letters, then the subscription waits; healed within 30 s."""
    broken, got = True, []
    scene = Scene(clock, None)

    @scene.bus.subscribe("s", name="s", retry=Retry(max_attempts=3), kill_switch=KillSwitch(enabled=False))
    async def handle(payload: int) -> None:
        if broken:
            raise ConfigurationError("no key")
        got.append(payload)

    async with scene.bus as bus:
        for n in range(50):
            await bus.publish("s", n)
        while not scene.seen.of(SubscriptionPaused):
            await asyncio.sleep(0.1)
        [paused] = scene.seen.of(SubscriptionPaused)
        assert "3 deliveries in a row" in paused.reason
        assert len(scene.seen.of(DeliveryDeadLettered)) == 3
        assert (await bus.drain()).reasons == {"s": "paused"}
        await asyncio.sleep(100)
        account = bus.ledger().accounts["s"]
        assert account.dead_lettered <= 8, "tried again now and then, with one attempt"
        assert account.accepted == 50 == account.dead_lettered + account.pending + account.in_flight
        broken, healed_at = False, clock.monotonic()
        while not got:
            await asyncio.sleep(0.1)
        assert clock.monotonic() - healed_at < 30
        await bus.drain()
        assert len(got) == 50 - account.dead_lettered
        assert scene.worker().gate.state_name == "running"
        told = [name for name in scene.told() if name.startswith("Subscription")]
        assert told == ["SubscriptionPaused", "SubscriptionResumed"], "trying again is told once it works"


@in_virtual_time
async def test_single_messages_of_that_kind_pause_nobody(clock: VirtualClock) -> None:
    scene = Scene(clock, None)

    @scene.bus.subscribe("s", name="s", retry=Retry(max_attempts=1))
    async def handle(payload: int) -> None:
        if payload % 3 == 0:
            raise ModuleNotFoundError("no module of that name")

    async with scene.bus as bus:
        for n in range(60):
            await bus.publish("s", n)
        await bus.drain()
        assert len(scene.seen.of(DeliveryDeadLettered)) == 20
        assert scene.seen.of(SubscriptionPaused) == []


@in_virtual_time
async def test_many_failing_handlers_do_not_hammer_the_source(clock: VirtualClock) -> None:
    source = Source()
    scene = Scene(clock, source)

    @scene.bus.subscribe("s", name="s", concurrency=20, retry=Retry(max_attempts=3))
    async def handle(payload: int) -> None:
        raise ConfigurationError("no key")

    async with scene.bus as bus:
        for n in range(200):
            await bus.publish("s", n)
        source.clock = clock
        await asyncio.sleep(60)
        gaps = [later - earlier for earlier, later in pairwise(source.asked_at)]
        assert gaps
        assert min(gaps) >= 5.0
        assert {("reload", "failed"), ("reload", "refused")} == set(scene.concluded()) - {
            ("last_known_good", "succeeded")
        }


@in_virtual_time
async def test_another_configuration_lets_a_paused_handler_go_on_at_once(clock: VirtualClock) -> None:
    source, got = Source(), []
    scene = Scene(clock, source)

    @scene.bus.subscribe("s", name="s", retry=Retry(max_attempts=1), kill_switch=KillSwitch(enabled=False))
    async def handle(payload: int) -> None:
        if not source.values:
            raise ConfigurationError("no key")
        got.append(payload)

    async with scene.bus as bus:
        for n in range(10):
            await bus.publish("s", n)
        while not scene.seen.of(SubscriptionPaused):
            await asyncio.sleep(0.1)
        source.says(timeout=5.0)
        await bus.reload()
        await bus.drain()
        assert len(got) == 7


@in_virtual_time
async def test_an_operator_lets_a_paused_handler_go_on(clock: VirtualClock) -> None:
    broken, got = True, []
    scene = Scene(clock, None)

    @scene.bus.subscribe("s", name="s", retry=Retry(max_attempts=1))
    async def handle(payload: int) -> None:
        if broken:
            raise ConfigurationError("no key")
        got.append(payload)

    async with scene.bus as bus:
        for n in range(10):
            await bus.publish("s", n)
        while not scene.seen.of(SubscriptionPaused):
            await asyncio.sleep(0.1)
        broken = False
        await bus.resume("s")
        await bus.drain()
        assert len(got) == 7


@pytest.mark.parametrize("kind", ["pipe", "device", "nested"])
def test_what_is_no_saved_configuration_is_damaged_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "configuration-0.json"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            path.write_text("[" * 100_000)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        LastKnownGood(str(tmp_path), "0").load()
