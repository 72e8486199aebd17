"""What each fault does at each port: to handlers, payloads, the store, the disk, time and observers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import apsw
import pytest
from kit import NEVER, House, play
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from prometheus_client import CollectorRegistry

from glassbus import (
    BrokerUnreachable,
    ConfigurationError,
    ErrorSeverity,
    HandlerAbandoned,
    InvalidPayload,
    Message,
    MessageBus,
    PublishUncertain,
    Retry,
    StorageFull,
    StoreCorrupt,
)
from glassbus import facts as f
from glassbus.faults import (
    After,
    ClockJump,
    CorruptPayload,
    Delay,
    DiskFull,
    DropConnection,
    Every,
    First,
    Hang,
    MemoryPressure,
    Raise,
    Refuse,
    SlowDisk,
    TelemetryDown,
    inject,
)
from glassbus.recovery.escalation import Escalation
from glassbus.telemetry import setup
from glassbus.telemetry.pipeline import SpanQueue
from glassbus.testing import VirtualClock, run_virtual

ONCE = Retry(max_attempts=1)


def failures(house: House) -> list[str]:
    return [fact.report.exception_type.rpartition(".")[2] for fact in house.of(f.AttemptFailed)]


# Handlers


@pytest.mark.parametrize(
    ("fault", "failed", "runs"),
    [
        (Raise(KeyError, "x"), "KeyError", 1),
        (Raise(lambda: StoreCorrupt("of our own")), "StoreCorrupt", 1),
        (Raise(KeyboardInterrupt), "KeyboardInterrupt", 1),
        (Refuse(), "ConnectionRefusedError", 1),
        (DropConnection(), "ConnectionResetError", 2),  # the work was done, and the answer lost: it is done again
        (MemoryPressure(), "MemoryError", 1),
        (Delay(2.0), "HandlerTimedOut", 1),
        (Hang(), "HandlerTimedOut", 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("plain", [False, True])
def test_a_handler_that_is_struck_fails_so_and_is_retried(fault: Any, failed: str, runs: int, plain: bool) -> None:
    if plain and failed == "HandlerTimedOut":
        pytest.skip("a thread cannot be cancelled: the next test")

    async def scenario(house: House) -> None:
        if plain:

            def keep(message: Message[Any]) -> None:
                house.runs.append(message.payload)

            house.bus.subscribe("work.*", name="work", kill_switch=NEVER)(keep)
        else:
            house.subscribe(timeout=1.0)
        await house.bus.start()
        with inject(house.bus, fault, "handler:work", schedule=First(1)) as injection:
            await house.bus.publish("work.a", 1)
            await house.bus.drain()
        assert (injection.calls, injection.hits) == (2, 1)
        assert failures(house) == [failed]
        assert house.runs == [1] * runs
        assert house.total().handled == 1

    play(scenario)


@pytest.mark.parametrize(("fault", "late"), [(Delay(3.0), True), (Hang(), True)], ids=str)
def test_a_plain_handler_that_is_held_is_late(fault: Any, late: bool) -> None:
    async def scenario(house: House) -> None:
        def keep(message: Message[Any]) -> None:
            house.runs.append(message.payload)

        house.bus.subscribe("work.*", name="work", timeout=1.0, abandon_after=60.0)(keep)
        await house.bus.start()
        async with inject(house.bus, fault, "handler:work"):
            await house.bus.publish("work.a", 1)
            await asyncio.sleep(5.0)
            assert len(house.of(f.AttemptOverdue)) == 1
            assert house.runs == ([1] if isinstance(fault, Delay) else [])
        await house.bus.drain()
        (handled,) = house.of(f.DeliveryHandled)
        assert handled.late is late
        assert house.runs == [1]

    play(scenario)


def test_a_stubborn_hang_is_abandoned_and_its_slot_regained_when_it_heals() -> None:
    async def scenario(house: House) -> None:
        house.subscribe(timeout=1.0, abandon_after=5.0)
        await house.bus.start()
        async with inject(house.bus, Hang(stubborn=True), "handler:work"):
            await house.bus.publish("work.a", 1)
            await house.bus.drain(20)
            (dead,) = house.of(f.DeliveryDeadLettered)
            assert dead.report.exception_type.endswith(HandlerAbandoned.__name__)
            assert not house.of(f.SlotRegained)
        await asyncio.sleep(0.1)
        assert len(house.of(f.SlotRegained)) == 1
        await house.bus.publish("work.a", 2)
        await house.bus.drain()
        assert house.runs == [1, 2]  # the hung one went on when it could, and was not counted

    play(scenario)


def test_only_the_subscription_that_is_named_is_struck() -> None:
    async def scenario(house: House) -> None:
        house.subscribe("charge", retry=ONCE)
        house.subscribe("charge-back", retry=ONCE)
        house.subscribe("ship", retry=ONCE)
        await house.bus.start()
        with inject(house.bus, Refuse(), "handler:charge*") as injection:
            await house.bus.publish("work.a", 1)
            await house.bus.drain()
        assert injection.hits == 2
        assert {fact.delivery.subscription for fact in house.of(f.DeliveryDeadLettered)} == {"charge", "charge-back"}

    play(scenario)


def test_only_messages_of_the_topic_are_struck_whoever_handles_them() -> None:
    async def scenario(house: House) -> None:
        house.subscribe("one", "work.*", retry=ONCE)
        house.subscribe("two", ">", retry=ONCE)

        @house.bus.subscribe("work.*", name="plain", retry=ONCE)
        def keep(message: Message[Any]) -> None:
            house.runs.append(message.payload)

        await house.bus.start()
        with inject(house.bus, Refuse(), "topic:work.bad") as injection:
            await house.bus.publish("work.good", "good")
            await house.bus.publish("work.bad", "bad")
            await house.bus.drain()
        assert (injection.calls, injection.hits) == (3, 3)
        assert house.runs == ["good"] * 3

    play(scenario)


def test_nested_faults_are_met_from_the_newest_on() -> None:
    """What an outer fault stops never reaches the inner one."""

    async def scenario(house: House) -> None:
        house.subscribe(retry=Retry(max_attempts=10, base_delay=0))
        await house.bus.start()
        first = inject(house.bus, Refuse(), "handler:work", schedule=First(2))
        second = inject(house.bus, Raise(OSError), "topic:work.>", schedule=First(3))
        with first as inner, second as outer:
            await house.bus.publish("work.a", 1)
            await house.bus.drain()
        assert (outer.calls, outer.hits, inner.calls, inner.hits) == (6, 3, 3, 2)
        assert failures(house) == ["OSError"] * 3 + ["ConnectionRefusedError"] * 2

    play(scenario)


# Payloads


@pytest.mark.parametrize("how", ["garble", "truncate"])
def test_bytes_damaged_as_they_are_read_are_whole_in_the_dead_letter(how: Any) -> None:
    async def scenario(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        with inject(house.bus, CorruptPayload(how), "codec:decode") as injection:
            await house.bus.publish("work.a", {"order": 17, "text": "a long one, so that there is something to damage"})
            await house.bus.drain()
        assert failures(house) == ["PayloadUndecodable"]
        (dead,) = await house.bus.dead_letters.list()
        await house.bus.dead_letters.replay(dead.id)
        await house.bus.drain()
        assert injection.hits == 1
        assert house.runs == [{"order": 17, "text": "a long one, so that there is something to damage"}]

    play(scenario)


@pytest.mark.parametrize("target", ["codec:encode", "transport:publish"])
def test_bytes_damaged_before_they_are_stored_are_kept_so(target: str) -> None:
    async def scenario(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        with inject(house.bus, CorruptPayload(), target, schedule=Every(2)):
            for number in range(4):
                await house.bus.publish("work.a", number)
            await house.bus.drain()
        assert sorted(house.runs) == [0, 2]
        dead = await house.bus.dead_letters.list()
        assert [letter.message.payload for letter in dead] == [b"\xff", b"\xff"]

    play(scenario)


def test_a_codec_that_raises_does_so_in_the_words_of_its_port() -> None:
    async def scenario(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        refused = pytest.raises(InvalidPayload, match="OSError: no")
        with inject(house.bus, Raise(OSError, "no"), "codec:encode", schedule=First(1)), refused:
            await house.bus.publish("work.a", 1)
        with inject(house.bus, Raise(OSError, "no"), "codec:decode"):
            await house.bus.publish("work.a", 2)
            await house.bus.drain()
        assert failures(house) == ["PayloadUndecodable"]

    play(scenario)


# The transport


URLS = ["memory://", "sqlite:///store.db?durability=process"]


@pytest.fixture(params=URLS, ids=["memory", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    found: str = request.param
    return found


@pytest.mark.parametrize(
    ("fault", "stored"), [(Refuse(), False), (DropConnection(), True), (Raise(OSError), None)], ids=str
)
def test_a_publish_that_is_struck_is_uncertain_unless_nothing_was_sent_and_repeated_it_is_stored_once(
    url: str, fault: Any, stored: bool | None
) -> None:
    # An error that says nothing of what was sent leaves it uncertain.
    expected, told = (
        (BrokerUnreachable, f.PublishRefused) if stored is False else (PublishUncertain, f.PublishLeftUncertain)
    )

    async def scenario(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        with inject(house.bus, fault, "transport:publish", schedule=First(1)) as injection:
            with pytest.raises(expected) as caught:
                await house.bus.publish("work.a", 1, message_id="m-1")
            await house.bus.drain()
            assert house.runs == [1] * bool(stored)
            assert getattr(caught.value, "message_id", "m-1") == "m-1"
            receipt = await house.bus.publish("work.a", 1, message_id="m-1")
        assert receipt.duplicate is bool(stored)
        await house.bus.drain()
        assert (house.runs, injection.calls, injection.hits) == ([1], 2, 1)
        assert len(house.of(told)) == 1

    play(scenario, url)


def test_a_publish_that_hangs_goes_on_when_the_fault_heals(url: str) -> None:
    async def scenario(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        with inject(house.bus, Hang(), "transport:publish"):
            publishing = asyncio.create_task(house.bus.publish("work.a", 1))
            await asyncio.sleep(100)
            assert not publishing.done()
        assert not (await publishing).duplicate
        await house.bus.drain()
        assert house.runs == [1]

    play(scenario, url)


def test_claims_that_fail_are_made_again_and_told(url: str) -> None:
    async def scenario(house: House) -> None:
        house.subscribe(concurrency=3)
        await house.bus.start()
        await asyncio.sleep(0.1)  # its slots wait for their first message
        with inject(house.bus, Refuse(), "transport:claim") as injection:
            await asyncio.sleep(0.1)
            await house.bus.publish("work.a", 1)
            await asyncio.sleep(4.0)
            assert house.runs == []
            assert house.bus.health().status == "critical"
        await house.bus.drain()
        assert house.runs == [1]
        assert injection.hits >= 6
        told = house.of(f.TransportFailed)
        assert {fact.operation for fact in told} == {"claim of work"}
        assert 3 <= len(told) <= 6  # all slots fail together: told once a second

    play(scenario, url)


@pytest.mark.parametrize("fault", [Refuse(), Raise(OSError), DropConnection()], ids=str)
def test_a_settlement_that_fails_is_kept_and_stored_when_it_can_be(url: str, fault: Any) -> None:
    async def scenario(house: House) -> None:
        house.subscribe(concurrency=5)
        await house.bus.start()
        with inject(house.bus, fault, "transport:settle", schedule=First(7)) as injection:
            for number in range(3):
                await house.bus.publish("work.a", number)
            await asyncio.sleep(0.5)
            assert (house.total().handled, house.total().in_flight) == (0, 3)
            await house.bus.drain()
            assert injection.active
        assert sorted(house.runs) == [0, 1, 2]
        assert injection.hits == 7
        assert house.total().handled == 3
        await asyncio.sleep(2.0)
        assert [fact.operation for fact in house.of(f.TransportFailed)] == ["settle"]
        (recovered,) = house.of(f.TransportRecovered)
        assert 1.0 < recovered.after_s < 4.0
        assert len(house.of(f.DeliveryHandled)) == 3

    play(scenario, url)


@pytest.mark.parametrize("fault", [Hang(), Delay(30.0)], ids=str)
def test_settlements_that_are_held_up_are_stored_when_the_fault_heals(url: str, fault: Any) -> None:
    async def scenario(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        async with inject(house.bus, fault, "transport:settle"):
            await house.bus.publish("work.a", 1)
            await asyncio.sleep(5.0)
            assert (house.runs, house.total().in_flight) == ([1], 1)
            with pytest.raises(TimeoutError):
                await house.bus.drain(2.0)
        await house.bus.drain(2.0)
        assert house.total().handled == 1
        assert not house.of(f.TransportFailed)

    play(scenario, url)


def test_what_is_never_settled_is_given_again_by_a_durable_store(tmp_path: Path) -> None:
    """A store that fails to the end keeps what it could not be told as in flight, for the next run."""
    url = f"sqlite:///{tmp_path / 'store.db'}"

    async def first(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        injection = inject(house.bus, Refuse(), "transport:settle").begin()
        await house.bus.publish("work.a", 1)
        await asyncio.sleep(1.0)
        assert house.runs == [1]
        await house.bus.stop(1.0)
        injection.heal()

    async def second(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        await house.bus.drain()
        assert house.runs == [1]
        assert house.total().handled == 1

    play(first, url)
    play(second, url)


def test_a_store_that_does_not_answer_a_probe_is_seen_in_health(url: str) -> None:
    async def scenario(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        with inject(house.bus, Refuse(), "transport:probe", schedule=After(1)):
            await asyncio.sleep(11.0)
            health = house.bus.health()
            assert (health.status, health.ready) == ("critical", False)
        await asyncio.sleep(2.0)
        assert house.bus.health().status == "healthy"
        assert [fact.operation for fact in house.of(f.TransportFailed)] == ["probe"]

    play(scenario, url)


# The disk


def test_a_full_disk_refuses_publishes_and_takes_acknowledgements(url: str) -> None:
    async def scenario(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        await house.bus.publish("work.a", 1, delay=1.0)
        with inject(house.bus, DiskFull(), "disk") as injection:
            await asyncio.sleep(0.5)  # the measure is asked four times a second
            with pytest.raises(StorageFull):
                await house.bus.publish("work.a", 2)
            await asyncio.sleep(1.0)
            assert house.total().handled == 1
            assert house.bus.disk_free_bytes() in (0, None)
            assert house.bus.health().status in ("degraded", "critical")
        assert injection.hits >= 1
        await asyncio.sleep(0.5)
        await house.bus.publish("work.a", 2)
        await house.bus.drain()
        assert house.runs == [1, 2]

    play(scenario, url)


def test_a_disk_that_is_full_to_the_last_byte_holds_up_settlements_until_it_heals(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        with inject(house.bus, Delay(1.0), "handler:work"):
            await house.bus.publish("work.a", 1)
            await asyncio.sleep(0.5)  # it is at work
            with inject(house.bus, DiskFull(entirely=True), "disk"):
                with pytest.raises(StorageFull):
                    await house.bus.publish("work.a", 2)
                await asyncio.sleep(10.0)
                assert (house.runs, house.total().handled, house.total().in_flight) == ([1], 0, 1)
        await house.bus.drain(30)
        assert house.runs == [1]
        assert house.total().handled == 1
        assert house.of(f.TransportFailed)
        assert house.of(f.TransportRecovered)
        assert (await house.bus.audit()).ok

    play(scenario, f"sqlite:///{tmp_path / 'store.db'}")


def test_a_stop_that_is_cancelled_while_the_store_fails_leaves_the_bus_stopped(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        house = House(clock, f"sqlite:///{tmp_path / 'store.db'}")
        house.subscribe()
        await house.bus.start()
        async with inject(house.bus, DiskFull(entirely=True), "disk"):
            stopping = asyncio.create_task(house.bus.stop(5.0))
            await asyncio.sleep(0.5)
            stopping.cancel()
            await asyncio.wait({stopping})
            assert stopping.cancelled()
            async with asyncio.timeout(10.0):
                await house.bus.stop(1.0)
        assert not house.bus.running
        assert len(house.of(f.BusStopped)) == 1

    run_virtual(scenario)


def test_an_io_error_of_the_disk_goes_through_the_stores_own_recovery(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        with inject(house.bus, Raise(apsw.IOError, "disk I/O error"), "disk", schedule=First(2)) as injection:
            for number in range(5):
                await house.bus.publish("work.a", number)
            await house.bus.drain(60)
        assert injection.hits == 2
        assert sorted(house.runs) == [0, 1, 2, 3, 4]
        assert house.total().handled == 5
        assert house.of(f.TransportFailed)
        assert (await house.bus.audit()).ok

    play(scenario, f"sqlite:///{tmp_path / 'store.db'}")


def test_a_slow_disk_makes_publishing_slow_in_virtual_time(url: str) -> None:
    async def scenario(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        with inject(house.bus, SlowDisk(2.0), "disk") as injection:
            before = house.clock.monotonic()
            await house.bus.publish("work.a", 1)
            assert 2.0 <= house.clock.monotonic() - before < 2.5
            await house.bus.drain()
            assert house.clock.monotonic() - before >= 4.0  # its settlement took as long
        assert injection.hits >= 2

    play(scenario, url)


def test_a_slow_disk_really_slows_the_writer_in_real_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        bus = MessageBus(f"sqlite:///{tmp_path / 'store.db'}", telemetry=False)
        async with bus:
            with inject(bus, SlowDisk(0.05), "disk") as injection:
                loop = asyncio.get_running_loop()
                before = loop.time()
                await bus.publish("work.a", 1)
                assert loop.time() - before >= 0.05
            assert injection.hits >= 1

    asyncio.run(scenario())


# Time


def test_a_clock_that_jumps_back_delays_nothing_but_what_waits_for_wall_time() -> None:
    async def scenario(house: House) -> None:
        house.subscribe(retry=Retry(max_attempts=3, immediate=0, base_delay=2.0))
        await house.bus.start()
        with inject(house.bus, ClockJump(-3600.0), "clock"):
            before = house.clock.monotonic()
            with inject(house.bus, Refuse(), "handler:work", schedule=First(2)):
                await house.bus.publish("work.a", 1)
                await house.bus.drain(30)
            assert house.clock.monotonic() - before < 10
        assert house.runs == [1]

    play(scenario)


def test_a_clock_that_jumps_forward_expires_what_had_time() -> None:
    async def scenario(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        await house.bus.pause("work")
        await house.bus.publish("work.a", 1, expires_in=60.0)
        with inject(house.bus, ClockJump(3600.0), "clock"):
            await asyncio.sleep(2.0)
        assert house.total().expired == 1

    play(scenario)


# Observers and telemetry


def test_an_observer_that_is_struck_changes_nothing_and_is_counted() -> None:
    class Mine:
        def __init__(self) -> None:
            self.facts: list[str] = []

        def on_fact(self, fact: Any) -> None:
            self.facts.append(type(fact).__name__)

    mine = Mine()

    async def scenario(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        with inject(house.bus, Raise(OSError, "no"), "observer:Mine") as injection:
            await house.bus.publish("work.a", 1)
            await house.bus.drain()
        assert injection.hits == len(house.of(f.ObserverFailed)) >= 1
        assert "DeliveryHandled" not in mine.facts
        assert house.runs == [1]

    play(scenario, observers=[mine])


class Exporter(SpanExporter):
    def __init__(self) -> None:
        self.spans: list[Any] = []

    def export(self, spans: Any) -> SpanExportResult:
        self.spans += spans
        return SpanExportResult.SUCCESS


@pytest.mark.parametrize("how", ["raise", "hang"])
def test_telemetry_that_is_down_loses_spans_and_nothing_else(how: Any) -> None:
    """The exporters of `configure()` and the observer of the bus; here with a provider of the test's own."""
    exporter = Exporter()
    queue = SpanQueue("failures", lambda: exporter, delay_s=0.0)
    before, setup._active = setup._active, setup.Telemetry(None, None, queue)
    try:

        async def scenario(house: House) -> None:
            house.subscribe()
            await house.bus.start()
            away = inject(house.bus, Refuse(), "handler:work", schedule=First(1))
            with inject(house.bus, TelemetryDown(how), "telemetry") as injection, away:
                await house.bus.publish("work.a", 1)
                await house.bus.drain()
            assert house.runs == [1]
            assert injection.hits >= (how == "raise")
            assert bool(house.of(f.ObserverFailed)) is (how == "raise")

        play(scenario, telemetry=True, registry=CollectorRegistry())
    finally:
        setup._active = before
        assert queue.close(5.0) is True  # whoever hung was let go
    assert "export" not in vars(exporter)


def test_an_exporter_that_hangs_is_let_go_when_the_fault_heals() -> None:
    exporter = Exporter()
    queue = SpanQueue("failures", lambda: exporter, delay_s=0.0)
    provider = TracerProvider()
    provider.add_span_processor(queue)
    before, setup._active = setup._active, setup.Telemetry(None, None, queue)
    try:
        bus = MessageBus(telemetry=False)
        with inject(bus, TelemetryDown("hang"), "telemetry") as injection:
            provider.get_tracer("test").start_span("one").end()
            assert not queue.flush(0.2)
            assert (injection.hits, exporter.spans) == (1, [])
        assert queue.flush(5.0)
        assert [span.name for span in exporter.spans] == ["one"]
    finally:
        setup._active = before
        queue.close(5.0)


# Escalation channels


class Pager:
    """A channel of somebody's own."""

    name, at_least, batch, refresh_s = "pager", ErrorSeverity.LOW, 10, 0.0

    def __init__(self) -> None:
        self.told: list[str] = []

    def send(self, notices: Any) -> None:
        self.told += [f"{notice.event} {notice.escalation.name}" for notice in notices]


@pytest.mark.parametrize("fault", [Refuse(), DropConnection(), Raise(SystemExit), Hang(), Delay(40.0)], ids=str)
def test_a_channel_that_is_struck_is_told_again_when_it_works(fault: Any) -> None:
    pager = Pager()

    async def scenario(house: House) -> None:
        house.subscribe(retry=ONCE)
        await house.bus.start()
        async with inject(house.bus, fault, "channel:pager") as injection:
            with inject(house.bus, Raise(ValueError), "handler:work"):
                await house.bus.publish("work.a", 1)
                await house.bus.drain()
            await asyncio.sleep(35.0)
            failed = [fact for fact in house.of(f.EscalationNotified) if fact.channel == "pager"]
            assert {fact.outcome for fact in failed} == {"failed"}
            assert injection.hits >= 1
            assert set(pager.told) == ({"opened MessageDeadLettered"} if isinstance(fault, DropConnection) else set())
            log = [fact.outcome for fact in house.of(f.EscalationNotified) if fact.channel == "log"]
            assert log == ["sent"]  # the others do not wait for it
        await asyncio.sleep(120.0)
        assert pager.told[-1] == "opened MessageDeadLettered"
        assert house.of(f.EscalationNotified)[-1].outcome == "sent"
        assert vars(house.bus.escalations._lanes[1])["_channel"] is pager

    play(scenario, escalation=Escalation(channels=(pager,)))


# The configuration


@pytest.mark.parametrize("fault", [Raise(OSError), Hang(), Delay(60.0)], ids=str)
def test_a_configuration_that_is_struck_cannot_be_reloaded_and_stays_as_it_was(fault: Any) -> None:
    values = {"subscriptions": {"work": {"timeout": 7.0}}}

    async def scenario(house: House) -> None:
        house.subscribe()
        await house.bus.start()
        async with inject(house.bus, fault, "configuration"):
            values["subscriptions"]["work"]["timeout"] = 9.0
            with pytest.raises(ConfigurationError):
                await house.bus.reload()
            assert house.bus.subscribers()[0].timeout_s == 7.0
        await house.bus.reload()
        assert house.bus.subscribers()[0].timeout_s == 9.0

    play(scenario, configuration=lambda: values)
