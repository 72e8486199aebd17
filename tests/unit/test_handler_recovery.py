"""What a handler's failure leads to beside its retry, by category: each heals by itself, and each is told in facts."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from glassbus import (
    AdaptiveTimeout,
    BusOverloaded,
    ErrorCategory,
    KillSwitch,
    MessageBus,
    Priority,
    Retry,
)
from glassbus.codec import JSON, MSGPACK, RAW
from glassbus.facts import (
    BreakerStateChanged,
    DeliveryDeadLettered,
    DeliveryHandled,
    IntakePaused,
    IntakeResumed,
    LoadRegained,
    LoadShed,
    RecoveryConcluded,
    RecoveryStarted,
    RetryScheduled,
    TimeoutAdapted,
)
from glassbus.policy.retry import Retry as PlainRetry
from glassbus.recovery.handler import paced
from glassbus.testing import RecordingObserver, VirtualClock, run_virtual

QUIET = KillSwitch(enabled=False)
#: Facts that every run has, and that are not the point here.
EVERYDAY = {"SubscriptionDeclared", "BusStarted", "BusStopped", "MessagePublished", "DeliveryHandled", "HealthChanged"}


class Scene:
    """A bus in virtual time and what it states."""

    def __init__(self, clock: VirtualClock, **options: Any) -> None:
        self.clock = clock
        self.seen = RecordingObserver()
        self.bus = MessageBus(clock=clock, telemetry=False, observers=[self.seen], seed=1, **options)

    def told(self) -> list[str]:
        return [name for name in self.seen.names() if name not in EVERYDAY and not name.startswith("Escalation")]

    def gauge(self, name: str = "s") -> tuple[int, float]:
        [view] = [v for v in self.bus.subscribers() if v.name == name]
        return view.limit, view.timeout_s


def scenario(test: Callable[[Scene], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        run_virtual(lambda clock: test(Scene(clock)))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


# Timeouts


@scenario
async def test_a_slow_spell_stretches_the_timeout_and_nothing_is_lost(scene: Scene) -> None:
    """timeout_error, transient: what takes 2.5 s under a timeout of 2 s is handled at its second attempt."""
    bus, slow = scene.bus, True

    @bus.subscribe("t", name="s", timeout=2.0)
    async def handle(payload: int) -> None:
        await asyncio.sleep(2.5 if slow else 0.1)

    async with bus:
        await bus.publish("t", 0)
        await bus.drain()
        assert scene.told() == ["AttemptFailed", "RetryScheduled", "TimeoutAdapted", "RecoveryEnded"]
        [adapted] = scene.seen.of(TimeoutAdapted)
        assert (adapted.subscription, adapted.from_s, adapted.to_s) == ("s", 2.0, 3.0)
        scene.seen.clear()
        for n in range(20):
            await bus.publish("t", n)
        await bus.drain()
        assert len(scene.seen.of(DeliveryHandled)) == 20
        assert scene.seen.of(RetryScheduled) == [], "what needed the stretch keeps it"
        slow = False
        await asyncio.sleep(200)
        assert scene.gauge() == (1, 2.0)
        assert scene.seen.of(TimeoutAdapted)[-1].to_s == 2.0
        assert bus.ledger().accounts["s"].handled == 21


@scenario
async def test_a_message_that_never_ends_is_dead_lettered_and_the_timeout_comes_back(scene: Scene) -> None:
    """timeout_error, permanent: one poison message neither reaches past the cap nor stretches it for ever."""
    bus = scene.bus

    @bus.subscribe("t", name="s", timeout=2.0, retry=Retry(max_attempts=5, base_delay=0.0))
    async def handle(payload: int) -> None:
        await asyncio.sleep(1000)

    async with bus:
        await bus.publish("t", 0)
        await bus.drain()
        [dead] = scene.seen.of(DeliveryDeadLettered)
        assert dead.report.category == ErrorCategory.TIMEOUT_ERROR
        assert scene.seen.of(TimeoutAdapted)[0].to_s == 3.0
        assert max(f.to_s for f in scene.seen.of(TimeoutAdapted)) <= 8.0
        await asyncio.sleep(300)
        assert scene.gauge() == (1, 2.0)
        falling = [f for f in scene.seen.of(TimeoutAdapted) if f.to_s < f.from_s]
        assert falling[-1].to_s == 2.0


@scenario
async def test_many_that_time_out_together_stretch_it_once(scene: Scene) -> None:
    bus = scene.bus

    @bus.subscribe("t", name="s", timeout=2.0, concurrency=50, kill_switch=QUIET, retry=Retry(max_attempts=1))
    async def handle(payload: int) -> None:
        await asyncio.sleep(1000)

    async with bus:
        for n in range(50):
            await bus.publish("t", n)
        await asyncio.sleep(2.5)
        assert [f.to_s for f in scene.seen.of(TimeoutAdapted)] == [3.0]


@scenario
async def test_the_stretch_stays_below_what_abandons(scene: Scene) -> None:
    """An attempt that has got more time is cancelled before it would be abandoned."""
    bus, ended = scene.bus, []

    @bus.subscribe("t", name="s", timeout=2.0, abandon_after=5.0, retry=Retry(max_attempts=4, base_delay=0.0))
    async def handle(payload: int) -> None:
        started = scene.clock.monotonic()
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(scene.clock.monotonic() - started)

    async with bus:
        await bus.publish("t", 0)
        await bus.drain()
        assert max(ended) <= 2.5 + 1e-6
        assert "AttemptAbandoned" not in scene.seen.names()


@scenario
async def test_a_cap_of_one_keeps_the_timeout(scene: Scene) -> None:
    bus = scene.bus

    @bus.subscribe("t", name="s", timeout=2.0, adaptive_timeout=AdaptiveTimeout(cap=1))
    async def handle(payload: int) -> None:
        await asyncio.sleep(1000)

    async with bus:
        await bus.publish("t", 0)
        await bus.drain()
        assert scene.seen.of(TimeoutAdapted) == []
        assert scene.gauge() == (1, 2.0)


@scenario
async def test_a_timeout_that_the_handler_raised_itself_stretches_nothing(scene: Scene) -> None:
    bus = scene.bus

    @bus.subscribe("t", name="s", timeout=2.0, retry=Retry(max_attempts=2))
    async def handle(payload: int) -> None:
        raise TimeoutError("downstream")

    async with bus:
        await bus.publish("t", 0)
        await bus.drain()
        assert scene.seen.of(TimeoutAdapted) == []


def test_a_plain_handler_that_ends_late_is_handled_and_the_next_ones_get_more() -> None:
    async def run(clock: VirtualClock) -> None:
        scene = Scene(clock)

        @scene.bus.subscribe("t", name="s", timeout=2.0)
        def handle(payload: float) -> None:
            clock.sleep(payload)

        async with scene.bus as bus:
            await bus.publish("t", 2.5)
            await bus.publish("t", 2.5)
            await bus.drain()
        assert scene.told() == ["AttemptOverdue", "TimeoutAdapted"]
        assert [f.late for f in scene.seen.of(DeliveryHandled)] == [True, False]

    run_virtual(run)


# Resources


@scenario
async def test_exhaustion_sheds_load_and_regains_it_and_nothing_is_lost(scene: Scene) -> None:
    """resource_exhaustion, transient: halved while attempts run out of memory, all again within 30 s of healing."""
    bus, short, most = scene.bus, True, 0
    running = 0

    @bus.subscribe("t", name="s", concurrency=8, kill_switch=QUIET, retry=Retry(max_attempts=50))
    async def handle(payload: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(0.5)
            if short and running > 2:
                raise MemoryError
        finally:
            running -= 1

    async with bus:
        for n in range(40):
            await bus.publish("t", n, priority=Priority.LOW if n % 4 == 0 else Priority.NORMAL)
        await asyncio.sleep(0.6)
        assert scene.gauge()[0] == 4
        [shed] = scene.seen.of(LoadShed)
        assert (shed.limit, shed.concurrency, shed.low_priority_held) == (4, 8, True)
        await asyncio.sleep(2)
        assert scene.gauge()[0] <= 3
        short, healed_at = False, scene.clock.monotonic()
        await bus.drain()
        assert scene.clock.monotonic() - healed_at < 60
        await asyncio.sleep(max(0.0, 30 - (scene.clock.monotonic() - healed_at)))
        assert scene.gauge()[0] == 8
        regained = scene.seen.of(LoadRegained)
        assert (regained[-1].limit, regained[-1].low_priority_held) == (8, False)
        assert bus.ledger().accounts["s"].handled == 40
        assert {(f.component, f.category, f.action, f.target) for f in scene.seen.of(RecoveryStarted)} == {
            ("resources", ErrorCategory.RESOURCE_EXHAUSTION, "shed", "s")
        }
        assert {f.outcome for f in scene.seen.of(RecoveryConcluded)} == {"succeeded"}


@scenario
async def test_low_priority_waits_while_load_is_shed(scene: Scene) -> None:
    bus, order = scene.bus, []

    @bus.subscribe("t", name="s", concurrency=2, retry=Retry(max_attempts=1))
    async def handle(payload: str) -> None:
        order.append(payload)
        if payload == "full":
            raise OSError(errno.ENOSPC, "no space left on device")

    async with bus:
        await bus.publish("t", "full")
        await asyncio.sleep(0.1)
        await bus.publish("t", "low", priority=Priority.LOW)
        await asyncio.sleep(0.1)
        assert order == ["full"]
        await bus.publish("t", "normal")
        await asyncio.sleep(0.1)
        assert order == ["full", "normal"]
        await bus.drain()
        assert order == ["full", "normal", "low"]


@scenario
async def test_one_poisonous_message_sheds_once_and_pauses_nobody(scene: Scene) -> None:
    """A message on which a handler always runs out of memory is its own trouble, not the bus's."""
    bus = scene.bus

    @bus.subscribe("t", name="s", concurrency=8, retry=Retry(max_attempts=6))
    async def handle(payload: int) -> None:
        if payload < 0:
            raise MemoryError

    async with bus:
        await bus.publish("t", -1)
        for n in range(30):
            await bus.publish("t", n)
            await asyncio.sleep(0.5)
        await bus.drain()
        assert [f.limit for f in scene.seen.of(LoadShed)] == [4]
        assert scene.seen.of(IntakePaused) == []
        assert len(scene.seen.of(DeliveryDeadLettered)) == 1
        await asyncio.sleep(20)
        assert scene.gauge()[0] == 8


@scenario
async def test_when_shedding_does_not_help_intake_pauses_and_resumes_by_itself(scene: Scene) -> None:
    """resource_exhaustion, for long: settled, reported, intake paused; all well within 30 s of healing."""
    bus, short = scene.bus, True

    @bus.subscribe("t", name="s", concurrency=4, kill_switch=QUIET, retry=Retry(max_attempts=2))
    async def handle(payload: int) -> None:
        await asyncio.sleep(0.1)
        if short:
            raise MemoryError

    async with bus:
        for n in range(100):
            await bus.publish("t", n)
        async with asyncio.timeout(100):
            while not scene.seen.of(IntakePaused):
                await asyncio.sleep(0.1)
        with pytest.raises(BusOverloaded, match="resources run out in s") as refused:
            await bus.publish("t", 1000)
        assert refused.value.reason == "overloaded"
        assert [f.limit for f in scene.seen.of(LoadShed)] == [2, 1]
        [opened] = scene.seen.of(BreakerStateChanged)
        assert (opened.breaker, opened.to_state) == ("resources/resource_exhaustion", "open")
        assert len(opened.causes) == 5
        outcomes = [f.outcome for f in scene.seen.of(RecoveryConcluded)]
        assert outcomes == ["failed"] * 5 + ["refused"]
        short, healed_at = False, scene.clock.monotonic()
        while scene.seen.of(IntakeResumed) == []:
            await asyncio.sleep(0.1)
        assert scene.clock.monotonic() - healed_at < 20
        await bus.publish("t", 1001)
        while scene.gauge()[0] < 4:
            await asyncio.sleep(0.1)
        assert scene.clock.monotonic() - healed_at < 30
        await bus.drain()
        await asyncio.sleep(10)
        assert {v.name: v.state for v in bus.breaker_views()}["resources/resource_exhaustion"] == "closed"
        account = bus.ledger().accounts["s"]
        assert (account.accepted, account.handled + account.dead_lettered) == (101, 101)


@scenario
async def test_intake_is_tried_again_while_it_lasts(scene: Scene) -> None:
    bus = scene.bus

    @bus.subscribe("t", name="s", kill_switch=QUIET, retry=Retry(max_attempts=1))
    async def handle(payload: int) -> None:
        await asyncio.sleep(0.1)
        raise MemoryError

    async def publishes() -> int:
        refused = 0
        for n in range(1200):
            try:
                await bus.publish("t", n)
            except BusOverloaded:
                refused += 1
            await asyncio.sleep(0.1)
        return refused

    async with bus:
        assert await publishes() > 600
        paused, resumed = scene.seen.of(IntakePaused), scene.seen.of(IntakeResumed)
        assert len(paused) > 3
        assert all(f.after_s <= 16 for f in resumed)
        assert bus.ledger().balanced


@scenario
async def test_intake_is_never_paused_for_longer_than_15_s(scene: Scene) -> None:
    """Also while a backlog goes on failing, so that nothing says that it is well."""
    bus = scene.bus

    @bus.subscribe("t", name="s", kill_switch=QUIET, retry=Retry(max_attempts=1))
    async def handle(payload: int) -> None:
        await asyncio.sleep(0.1)
        raise MemoryError

    async with bus:
        for n in range(1000):
            await bus.publish("t", n)
        await asyncio.sleep(60)
        assert {15 <= f.after_s <= 16 for f in scene.seen.of(IntakeResumed)} == {True}
        refused = [f for f in scene.seen.of(RecoveryConcluded) if f.outcome == "refused"]
        assert len(refused) == len(scene.seen.of(IntakePaused)), "told once for each pause, not for each failure"


@scenario
async def test_what_running_less_cannot_help_sheds_nothing(scene: Scene) -> None:
    """A stack is of one attempt; a bus that takes nothing has shed its load already."""
    bus = scene.bus

    @bus.subscribe("t", name="s", concurrency=8, kill_switch=QUIET, retry=Retry(max_attempts=1))
    async def handle(payload: int) -> None:
        raise RecursionError if payload % 2 else BusOverloaded("elsewhere")

    async with bus:
        for n in range(40):
            await bus.publish("t", n)
        await bus.drain()
        assert len(scene.seen.of(DeliveryDeadLettered)) == 40
        assert scene.seen.of(LoadShed) == []


@scenario
async def test_a_loop_that_turns_idle_regains_all_the_same(scene: Scene) -> None:
    """Every gauge is at rest again, also when nothing comes that could prove the healing."""
    bus = scene.bus

    @bus.subscribe("t", name="s", concurrency=16, retry=Retry(max_attempts=1))
    async def handle(payload: int) -> None:
        raise MemoryError

    async with bus:
        await bus.publish("t", 0)
        await asyncio.sleep(28)
        assert scene.gauge()[0] == 16
        assert scene.seen.of(LoadRegained)[-1].low_priority_held is False
        assert [f.outcome for f in scene.seen.of(RecoveryConcluded)] == ["called_off"]


def test_threads_that_cannot_start_are_exhaustion_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    async def run(clock: VirtualClock) -> None:
        scene = Scene(clock)

        @scene.bus.subscribe("t", name="s", concurrency=2, retry=Retry(max_attempts=3))
        def handle(payload: int) -> None:
            """Plain, so it needs a thread."""

        async with scene.bus:
            start = threading.Thread.start
            monkeypatch.setattr(threading.Thread, "start", _cannot_start)
            await scene.bus.publish("t", 0)
            await asyncio.sleep(0.05)
            monkeypatch.setattr(threading.Thread, "start", start)
            [failed] = scene.seen.of(RetryScheduled)
            assert failed.report.category == ErrorCategory.RESOURCE_EXHAUSTION
            await scene.bus.drain()
            assert scene.bus.ledger().accounts["s"].handled == 1
            assert [f.limit for f in scene.seen.of(LoadShed)] == [1]

    run_virtual(run)


def _cannot_start(self: object) -> None:
    raise RuntimeError("can't start new thread")


# Codecs


def test_a_payload_of_another_codec_is_read_with_the_next_of_the_list() -> None:
    """serialization_error, transient: what declares JSON and is MessagePack is handled, and told."""

    async def run(clock: VirtualClock) -> None:
        scene, got = Scene(clock, codecs=[JSON, MSGPACK]), []

        @scene.bus.subscribe("t", name="s")
        async def handle(payload: dict[str, Any]) -> None:
            got.append(payload)

        async with scene.bus:
            await _publish_as(scene.bus, "json", MSGPACK.encode({"n": 1}))
            await scene.bus.drain()
        assert got == [{"n": 1}]
        assert scene.told() == ["CodecFellBack"]
        [fell] = [f for f in scene.seen.facts if type(f).__name__ == "CodecFellBack"]
        assert (fell.declared, fell.used, fell.delivery.envelope.topic) == ("json", "msgpack", "t")  # type: ignore[union-attr]

    run_virtual(run)


def test_what_no_codec_of_the_list_can_read_is_dead_lettered_with_its_raw_bytes() -> None:
    """serialization_error, permanent."""

    async def run(clock: VirtualClock) -> None:
        scene = Scene(clock, codecs=[JSON, MSGPACK])

        @scene.bus.subscribe("t", name="s")
        async def handle(payload: dict[str, Any]) -> None:
            raise AssertionError("never run")

        async with scene.bus:
            await _publish_as(scene.bus, "json", b"\xc1 neither")
            await scene.bus.drain()
            [dead] = await scene.bus.dead_letters.list()
        assert dead.message.payload == b"\xc1 neither"
        assert dead.reason == "not_retryable"
        assert dead.report.category == ErrorCategory.SERIALIZATION_ERROR
        assert "not JSON" in dead.report.message
        assert "nor by msgpack" in dead.report.message
        assert "nor by json" not in dead.report.message
        assert scene.told() == ["AttemptFailed", "DeliveryDeadLettered"]

    run_virtual(run)


def test_without_a_list_nothing_is_guessed() -> None:
    async def run(clock: VirtualClock) -> None:
        scene = Scene(clock)

        @scene.bus.subscribe("t", name="s")
        async def handle(payload: Any) -> None:
            raise AssertionError("never run")

        async with scene.bus:
            await _publish_as(scene.bus, "json", b"\x01")  # 1 in MessagePack
            await scene.bus.drain()
        assert scene.told() == ["AttemptFailed", "DeliveryDeadLettered"]

    run_virtual(run)


def test_undecodable_bytes_are_given_raw_to_who_lists_raw() -> None:
    async def run(clock: VirtualClock) -> None:
        scene, got = Scene(clock), []

        @scene.bus.subscribe("t", name="s", codecs=[JSON, RAW])
        async def handle(payload: Any) -> None:
            got.append(payload)

        async with scene.bus:
            await _publish_as(scene.bus, "json", b"\xc1")
            await scene.bus.drain()
        assert got == [b"\xc1"]

    run_virtual(run)


def test_a_payload_that_the_first_codec_cannot_carry_goes_with_the_next() -> None:
    async def run(clock: VirtualClock) -> None:
        scene, got = Scene(clock, codecs=[JSON, MSGPACK]), []

        @scene.bus.subscribe("t", name="s")
        async def handle(payload: Any) -> None:
            got.append(payload)

        async with scene.bus:
            await scene.bus.publish("t", {"price": float("inf"), 7: b"\x00"})
            await scene.bus.publish("t", {"price": 1.5})
            await scene.bus.drain()
        assert got == [{"price": float("inf"), 7: b"\x00"}, {"price": 1.5}]
        assert scene.told() == []

    run_virtual(run)


def test_a_codec_of_a_users_that_does_its_worst_changes_no_outcome() -> None:
    class Worst:
        name = "worst"
        content_type = "x/worst"

        def encode(self, payload: Any, /) -> bytes:
            raise SystemExit

        def decoder(self, kind: Any, /) -> Callable[[bytes], Any]:
            def decode(body: bytes) -> Any:
                raise GeneratorExit

            return decode

    async def run(clock: VirtualClock) -> None:
        scene = Scene(clock, codecs=[Worst(), JSON])

        @scene.bus.subscribe("t", name="s")
        async def handle(payload: Any) -> None:
            """Takes anything."""

        async with scene.bus:
            await scene.bus.publish("t", {"fine": True})
            await _publish_as(scene.bus, "worst", b"not JSON")
            await scene.bus.drain()
            account = scene.bus.ledger().accounts["s"]
        assert (account.handled, account.dead_lettered) == (1, 1)

    run_virtual(run)


async def _publish_as(bus: MessageBus, codec: str, body: bytes) -> None:
    """Store bytes whose envelope declares `codec`, as another program might."""
    import msgspec

    sealed = bus._publisher.seal("t", b"", None, None, Priority.NORMAL, None, 0.0, None)
    await bus._transport.publish([msgspec.structs.replace(sealed, codec=codec, body=body)], 0.0)


# Every category

OF_CATEGORY: dict[ErrorCategory, type[BaseException]] = {
    ErrorCategory.CONNECTION_ERROR: ConnectionRefusedError,
    ErrorCategory.MESSAGE_PROCESSING_ERROR: ValueError,
    ErrorCategory.SERIALIZATION_ERROR: UnicodeError,
    ErrorCategory.QUEUE_OVERFLOW: asyncio.QueueFull,
    ErrorCategory.TIMEOUT_ERROR: TimeoutError,
    ErrorCategory.AUTHENTICATION_ERROR: PermissionError,
    ErrorCategory.RESOURCE_EXHAUSTION: MemoryError,
    ErrorCategory.CONFIGURATION_ERROR: ModuleNotFoundError,
}
#: What is told besides, while a failure of this category heals.
BESIDES = {
    ErrorCategory.RESOURCE_EXHAUSTION: ["RecoveryStarted", "LoadShed", "LoadRegained", "RecoveryConcluded"],
}


@pytest.mark.parametrize("category", list(ErrorCategory))
def test_a_transient_failure_of_every_category_is_recovered_from(category: ErrorCategory) -> None:
    """Nothing lost, in seconds, and exactly these facts."""

    async def run(clock: VirtualClock) -> None:
        scene, left = Scene(clock), 2

        @scene.bus.subscribe("t", name="s")
        async def handle(payload: int) -> None:
            nonlocal left
            left -= 1
            if left >= 0:
                raise OF_CATEGORY[category]

        async with scene.bus as bus:
            await bus.publish("t", 1)
            started = clock.monotonic()
            await bus.drain()
            assert clock.monotonic() - started < 10
            await asyncio.sleep(15)
            account = bus.ledger().accounts["s"]
            assert (account.handled, account.accepted) == (1, 1)
            assert scene.gauge() == (1, 30.0)
        besides = BESIDES.get(category, [])
        told = [name for name in scene.told() if name not in besides]
        assert told == [
            "AttemptFailed",
            "RetryScheduled",
            "AttemptFailed",
            "RecoveryEnded",
            "RetryScheduled",
            "RecoveryEnded",
        ]
        assert {name for name in scene.told() if name in besides} == set(besides)
        assert {f.report.category for f in scene.seen.of(RetryScheduled)} == {category}
        assert [f.outcome for f in scene.seen.of(RecoveryConcluded)] == ["succeeded"] * (len(besides) > 0)

    run_virtual(run)


@pytest.mark.parametrize("category", list(ErrorCategory))
def test_a_permanent_failure_of_every_category_is_settled_and_reported(category: ErrorCategory) -> None:
    async def run(clock: VirtualClock) -> None:
        scene = Scene(clock)

        @scene.bus.subscribe("t", name="s", retry=Retry(max_attempts=4))
        async def handle(payload: int) -> None:
            raise OF_CATEGORY[category]("for ever")

        async with scene.bus as bus:
            await bus.publish("t", 1)
            await bus.drain()
            [letter] = await bus.dead_letters.list()
            assert (letter.attempts, letter.reason) == (4, "attempts_spent")
            assert letter.report.category == category
            [dead] = scene.seen.of(DeliveryDeadLettered)
            assert dead.report.exception_type.endswith(OF_CATEGORY[category].__name__)
            assert len([name for name in scene.told() if name == "AttemptFailed"]) == 4
            assert bus.ledger().balanced

    run_virtual(run)


# Delays


@pytest.mark.parametrize("category", list(ErrorCategory))
def test_the_category_sets_the_delay_and_the_settings_stay_in_force(category: ErrorCategory) -> None:
    given = PlainRetry(max_attempts=7, immediate=2, base_delay=0.5, max_delay=3.0, budget=0.3)
    held = paced(given, category)
    assert (held.max_attempts, held.max_delay, held.budget) == (7, 3.0, 0.3)
    assert held.base_delay >= given.base_delay
    assert all(held.ceiling(n) <= 3.0 for n in range(1, 50))
    hammers = category in (
        ErrorCategory.AUTHENTICATION_ERROR,
        ErrorCategory.CONFIGURATION_ERROR,
        ErrorCategory.RESOURCE_EXHAUSTION,
        ErrorCategory.QUEUE_OVERFLOW,
    )
    assert held.immediate == (0 if hammers else 2)


def test_extreme_settings_are_paced_too() -> None:
    for category in ErrorCategory:
        assert paced(PlainRetry(base_delay=1.7e308, max_delay=1.7e308), category).base_delay <= 1.7e308
        assert paced(PlainRetry(base_delay=0.0), category).ceiling(9) == 0.0


@scenario
async def test_refused_credentials_are_not_hammered(scene: Scene) -> None:
    bus = scene.bus

    @bus.subscribe("t", name="s")
    async def handle(payload: int) -> None:
        raise PermissionError("bad key")

    async with bus:
        await bus.publish("t", 0)
        await bus.drain()
        scheduled = scene.seen.of(RetryScheduled)
        assert {f.action for f in scheduled} == {"delayed_retry"}
        assert len(scene.seen.of(DeliveryDeadLettered)) == 1
