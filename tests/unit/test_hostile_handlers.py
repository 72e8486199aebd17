"""Handlers that do their worst: each ends in a settled delivery, a report and facts, and the bus goes on."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any

import pytest

from glassbus import ConfigurationError, KillSwitch, Message, MessageBus, Retry
from glassbus.facts import (
    AttemptAbandoned,
    AttemptFailed,
    AttemptOverdue,
    BreakerStateChanged,
    DeliveryDeadLettered,
    DeliveryGivenBack,
    DeliveryHandled,
    SlotRegained,
)
from glassbus.testing import RecordingObserver, VirtualClock, run_virtual

ONCE = Retry(max_attempts=1)
MANY = Retry(max_attempts=200, immediate=0, base_delay=0.01, max_delay=0.02, budget_per_second=1e6)


def make(clock: VirtualClock) -> tuple[MessageBus, RecordingObserver]:
    seen = RecordingObserver()
    return MessageBus(clock=clock, telemetry=False, observers=[seen], seed=1), seen


def scenario(test: Callable[[VirtualClock], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        run_virtual(test)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


class HostileError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")

    __repr__ = __str__


RAISED = [
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    HostileError(),
    StopIteration("x"),
    ExceptionGroup("g", [ValueError()]),
]


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("plain", [False, True])
def test_whatever_a_handler_raises_becomes_a_dead_letter(raised: BaseException, plain: bool) -> None:
    async def scene(clock: VirtualClock) -> None:
        bus, _ = make(clock)

        def on_thread(message: Message[Any]) -> None:
            if message.payload == "bad":
                raise raised

        async def on_loop(message: Message[Any]) -> None:
            on_thread(message)

        bus.subscribe("t", name="h", retry=ONCE)(on_thread if plain else on_loop)
        async with bus:
            await bus.publish("t", "bad")
            await bus.publish("t", "good")
            assert not await bus.drain(timeout=60)
            (dead,) = await bus.dead_letters.list()
            assert dead.attempts == 1
            assert dead.message.payload == "bad"
            account = bus.ledger().accounts["h"]
            assert (account.handled, account.dead_lettered) == (1, 1)
            assert bus.ledger().balanced

    run_virtual(scene)


@scenario
async def test_a_hanging_handler_is_cancelled_at_its_timeout(clock: VirtualClock) -> None:
    bus, _ = make(clock)
    cleaned: list[float] = []

    @bus.subscribe("t", name="h", timeout=2.0, retry=ONCE)
    async def hang(message: Message[Any]) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(clock.monotonic())

    async with bus:
        started = clock.monotonic()
        await bus.publish("t")
        await bus.drain(timeout=60)
        (dead,) = await bus.dead_letters.list()
    assert dead.report.category == "timeout_error"
    assert "2 s" in dead.report.message
    assert cleaned == pytest.approx([started + 2.0])


@scenario
async def test_a_handler_that_swallows_its_timeout_and_returns_is_handled_late(clock: VirtualClock) -> None:
    bus, seen = make(clock)

    @bus.subscribe("t", name="h", timeout=1.0)
    async def stubborn(message: Message[Any]) -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            await asyncio.sleep(0.5)
        task = asyncio.current_task()
        assert task is not None

    async with bus:
        for _ in range(3):
            await bus.publish("t")
        await bus.drain(timeout=60)
        assert bus.ledger().accounts["h"].handled == 3
    assert [fact.late for fact in seen.of(DeliveryHandled)] == [True] * 3
    assert not seen.of(AttemptFailed)


@scenario
async def test_a_timeout_inside_the_handler_works_after_ours_was_swallowed(clock: VirtualClock) -> None:
    """Our cancellation is taken back, or asyncio.timeout would mistake itself in the next message."""
    bus, _ = make(clock)
    ends: list[str] = []

    @bus.subscribe("t", name="h", timeout=1.0)
    async def handler(message: Message[Any]) -> None:
        if message.payload == "late":
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                return
        try:
            async with asyncio.timeout(0.1):
                await asyncio.sleep(100)
        except TimeoutError:
            ends.append("timeout")

    async with bus:
        await bus.publish("t", "late")
        await bus.publish("t", "next")
        await bus.drain(timeout=60)
    assert ends == ["timeout"]


@scenario
async def test_a_handler_that_ignores_cancellation_is_overdue_then_abandoned_then_regained(clock: VirtualClock) -> None:
    bus, seen = make(clock)
    release = asyncio.Event()

    @bus.subscribe("t", name="h", timeout=1.0, abandon_after=10.0)
    async def ignores(message: Message[Any]) -> None:
        while message.payload == "stuck" and not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    async with bus:
        await bus.publish("t", "stuck")
        await asyncio.sleep(5)
        assert len(seen.of(AttemptOverdue)) == 1
        (worker,) = bus.subscribers()
        assert (worker.overdue, worker.limit, worker.in_flight) == (1, 1, 1)
        assert bus.ledger().accounts["h"].in_flight == 1, "it keeps its lease and is not retried"
        await asyncio.sleep(6)
        (dead,) = await bus.dead_letters.list()
        assert (dead.reason, dead.attempts) == ("abandoned", 1)
        assert worker.limit == 0, "its slot is lost"
        assert bus.health().status == "critical"
        await bus.publish("t", "next")
        await asyncio.sleep(1)
        assert bus.ledger().accounts["h"].ready == 1
        release.set()
        await bus.drain(timeout=10)
        assert worker.limit == 1
        assert bus.ledger().accounts["h"].handled == 1
        assert bus.ledger().balanced
    assert [type(f) for f in seen.facts if isinstance(f, AttemptOverdue | AttemptAbandoned | SlotRegained)] == [
        AttemptOverdue,
        AttemptAbandoned,
        SlotRegained,
    ]


@scenario
async def test_a_hanging_plain_handler_keeps_its_slot_and_a_late_return_is_handled(clock: VirtualClock) -> None:
    bus, seen = make(clock)
    gate = clock.gate()

    @bus.subscribe("t", name="h", timeout=1.0, abandon_after=100.0)
    def hang(message: Message[Any]) -> None:
        gate.wait()

    async with bus:
        await bus.publish("t")
        await asyncio.sleep(5)
        assert len(seen.of(AttemptOverdue)) == 1
        assert bus.ledger().accounts["h"].in_flight == 1
        gate.open()
        await bus.drain(timeout=10)
        assert bus.ledger().accounts["h"].handled == 1
    assert seen.of(DeliveryHandled)[0].late


@scenario
async def test_a_cancellation_that_we_did_not_cause_is_a_failed_attempt(clock: VirtualClock) -> None:
    bus, seen = make(clock)

    @bus.subscribe("t", name="h", retry=Retry(max_attempts=2, immediate=1))
    async def cancelled(message: Message[Any]) -> None:
        if message.payload == "raise":
            raise asyncio.CancelledError
        if message.payload == "self":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)

    async with bus:
        await bus.publish("t", "raise")
        await bus.publish("t", "self")
        await bus.publish("t", "good")
        assert not await bus.drain(timeout=60)
        account = bus.ledger().accounts["h"]
        assert (account.handled, account.dead_lettered) == (1, 2)
    assert len(seen.of(AttemptFailed)) == 4
    assert {f.report.exception_type.rpartition(".")[2] for f in seen.of(AttemptFailed)} == {"HandlerCancelled"}


@scenario
async def test_nothing_a_handler_sets_in_its_context_leaks_to_the_next_message(clock: VirtualClock) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="clean")
    bus, _ = make(clock)
    found: list[str] = []

    @bus.subscribe("t", name="h")
    async def sets(message: Message[Any]) -> None:
        found.append(variable.get())
        variable.set("dirty")
        await asyncio.sleep(0.01)
        found.append(variable.get())

    @bus.subscribe("t", name="plain")
    def sets_too(message: Message[Any]) -> None:
        found.append(variable.get())
        variable.set("dirty")

    async with bus:
        await bus.publish("t")
        await bus.publish("t")
        await bus.drain(timeout=60)
    assert sorted(found) == ["clean"] * 4 + ["dirty"] * 2


@scenario
async def test_stop_lets_handlers_finish_within_the_deadline_and_gives_back_the_rest(
    clock: VirtualClock,
) -> None:
    bus, seen = make(clock)

    @bus.subscribe("t", name="h", concurrency=3, timeout=100.0)
    async def slow(message: Message[Any]) -> None:
        await asyncio.sleep(message.payload)

    await bus.start()
    for seconds in (1, 2, 50, 1):
        await bus.publish("t", seconds)
    await asyncio.sleep(0.5)
    began = clock.monotonic()
    await bus.stop(5.0)
    assert clock.monotonic() - began == pytest.approx(5.0, abs=0.1)
    assert len(seen.of(DeliveryHandled)) == 2
    (given_back,) = seen.of(DeliveryGivenBack)
    assert given_back.delivery.envelope.body == b"50"
    account = bus.ledger().accounts["h"]
    assert (account.handled, account.discarded, account.in_flight) == (2, 2, 0)
    assert bus.ledger().balanced


@scenario
async def test_stop_does_not_wait_for_a_handler_that_ignores_everything(clock: VirtualClock) -> None:
    bus, _ = make(clock)
    release = asyncio.Event()

    @bus.subscribe("t", name="h", timeout=1000.0)
    async def ignores(message: Message[Any]) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    await bus.start()
    await bus.publish("t")
    await asyncio.sleep(0.1)
    began = clock.monotonic()
    await bus.stop(2.0)
    assert clock.monotonic() - began < 4.0
    assert bus.ledger().balanced
    release.set()
    await asyncio.sleep(0.1)


@scenario
async def test_a_poison_message_alone_never_pauses_its_subscription(clock: VirtualClock) -> None:
    bus, seen = make(clock)

    @bus.subscribe(
        "t",
        name="h",
        retry=Retry(max_attempts=200, immediate=0, base_delay=0.01, max_delay=0.02, budget_per_second=1e6),
    )
    async def poisoned(message: Message[Any]) -> None:
        raise ValueError("always")

    async with bus:
        await bus.publish("t")
        await bus.drain(timeout=600)
    assert not seen.of(BreakerStateChanged)
    assert len(seen.of(AttemptFailed)) == 200


@scenario
async def test_an_outage_trips_the_kill_switch_keeps_the_messages_and_heals_by_itself(clock: VirtualClock) -> None:
    bus, seen = make(clock)
    down = True

    @bus.subscribe(
        "t",
        name="h",
        concurrency=4,
        retry=Retry(max_attempts=6),
        kill_switch=KillSwitch(minimum=20, open_for=3.0, probes=3),
    )
    async def needs_payments(message: Message[Any]) -> None:
        if down:
            raise ConnectionError("payments are away")

    async with bus:
        for number in range(300):
            await bus.publish("t", number)
        await asyncio.sleep(20)
        assert bus.breakers["h"].state in ("open", "half_open")
        attempts_while_open = len(seen.of(AttemptFailed))
        assert attempts_while_open < 120, "a failing dependency is hardly called"
        down = False
        healed_at = clock.monotonic()
        while bus.ledger().accounts["h"].handled + bus.ledger().accounts["h"].dead_lettered < 300:
            await asyncio.sleep(0.1)
        assert clock.monotonic() - healed_at < 10.0
        account = bus.ledger().accounts["h"]
        assert account.dead_lettered == 0
        assert bus.ledger().balanced
    opening = seen.of(BreakerStateChanged)[0]
    assert (opening.from_state, opening.to_state) == ("closed", "open")
    assert len({cause.envelope.id for cause in opening.causes}) >= 20
    assert seen.of(BreakerStateChanged)[-1].to_state == "closed"
    assert not seen.of(DeliveryDeadLettered)


def test_a_handler_whose_body_a_call_would_not_run_is_refused() -> None:
    """Otherwise its messages would count as handled although nobody had done anything with them."""
    bus = MessageBus(telemetry=False)

    def generates(_: Message) -> Any:
        yield

    async def generates_too(_: Message) -> Any:
        yield

    class Generates:
        def __call__(self, _: Message) -> Any:
            yield

    for handler in (generates, generates_too, Generates(), functools.partial(generates_too)):
        with pytest.raises(ConfigurationError, match="yield"):
            bus.subscribe("t", name="s")(handler)


def test_work_that_a_plain_handler_returns_is_done_before_it_counts_as_handled() -> None:
    async def scenario() -> None:
        done: list[str] = []

        class Work:
            def __init__(self, name: str) -> None:
                self.name = name

            def __await__(self) -> Any:
                yield from asyncio.sleep(0).__await__()
                done.append(self.name)

        async def work(name: str) -> None:
            done.append(name)

        def generates() -> Any:
            yield

        async with MessageBus(telemetry=False) as bus:
            bus.subscribe("t", name="awaitable")(lambda _: Work("awaitable"))
            bus.subscribe("t", name="coroutine")(lambda _: work("coroutine"))
            bus.subscribe("t", name="generator", retry=Retry(max_attempts=1))(lambda _: generates())
            await bus.publish("t", 1)
            await bus.drain()
            assert sorted(done) == ["awaitable", "coroutine"]
            (letter,) = await bus.dead_letters.list()
            assert (letter.subscription, letter.report.exception_type) == ("generator", "TypeError")

    asyncio.run(scenario())
