"""ProductionMessageBus: the same bus from threads, and what it refuses so that nothing deadlocks."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from glassbus import (
    BusNotRunning,
    ConfigurationError,
    GlassbusError,
    InvalidTopic,
    Message,
    MessageBus,
    Outgoing,
    Priority,
    ProductionMessageBus,
    PublishRejected,
    Retry,
    SubscriptionExists,
    TransportError,
    UnknownSubscription,
    WouldBlockLoop,
)

Make = Callable[..., ProductionMessageBus]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[ProductionMessageBus] = []

    def build(**config: Any) -> ProductionMessageBus:
        bus = ProductionMessageBus({"log_dir": str(tmp_path / "logs"), "telemetry": False, **config})
        made.append(bus)
        return bus

    yield build
    for bus in made:
        assert bus.stop(5.0)
        bus.recovery_manager.close()


def on_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work` on `count` threads at once; what one raises is raised here."""
    raised: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            start.wait(30)
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if raised:
        raise raised[0]


# Messages


def test_from_publish_to_handler_on_an_empty_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bus = ProductionMessageBus({})
    got: list[Any] = []
    assert bus.subscribe("orders.*", lambda message: got.append(message.payload), name="charge") == "charge"
    with bus as entered:
        assert entered is bus
        receipt = bus.publish("orders.created", {"order_id": 17}, priority=Priority.HIGH)
        assert receipt.subscriptions == ("charge",)
        assert bus.drain(timeout=30).complete
    assert got == [{"order_id": 17}]
    assert not bus.running
    assert list(tmp_path.iterdir()) == [], "nothing failed, so nothing was written"


def test_one_loop_in_one_daemon_thread_which_starts_when_it_is_needed(make: Make) -> None:
    def loops() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name == "glassbus-alone-loop"]

    bus = make(name="alone")
    bus.subscribe("a", print)
    assert (bus.health().status, loops()) == ("unknown", [])
    on_threads(8, lambda _: bus.start() and None)
    assert [thread.daemon for thread in loops()] == [True]


def test_many_threads_publish_handle_and_lose_nothing(make: Make) -> None:
    got: list[int] = []
    bus = make(concurrency=4)
    bus.subscribe("numbers", lambda message: got.append(message.payload))
    bus.start()
    on_threads(8, lambda number: [bus.publish("numbers", number * 1000 + n) for n in range(100)] and None)
    assert bus.drain(timeout=60).complete
    assert sorted(got) == sorted(number * 1000 + n for number in range(8) for n in range(100))
    assert bus.ledger().total.handled == 800
    assert bus.metrics["messages_published"] == bus.metrics["messages_processed"] == 800


def test_a_plain_handler_publishes_on(make: Make) -> None:
    bus, ended = make(), threading.Event()
    bus.subscribe("first", lambda message: bus.publish("second", message.payload) and None, name="first")
    bus.subscribe("second", lambda message: ended.set(), name="second")
    bus.start()
    bus.publish("first", 1)
    assert ended.wait(30)


def test_a_full_queue_does_not_make_a_handler_wait_for_itself(make: Make) -> None:
    bus, refused = make(publish_timeout=3600.0), threading.Event()

    def grow(message: Message) -> None:
        try:
            for _ in range(3):
                bus.publish("loop", None)
        except PublishRejected:
            refused.set()

    bus.subscribe("loop", grow, capacity=1, retry=Retry(max_attempts=1))
    bus.start()
    bus.publish("loop", None)
    assert refused.wait(30)


def test_the_publishers_context_reaches_what_runs_on_the_loop(make: Make) -> None:
    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")

    class Header:
        def on_fact(self, fact: object, /) -> None: ...
        def inject(self, headers: dict[str, str], /) -> None:
            headers["tenant"] = tenant.get()

    got: list[str] = []
    bus = make(observers=[Header()])
    bus.subscribe("a", lambda message: got.append(message.headers["tenant"]))
    bus.start()

    def publish(number: int) -> None:
        tenant.set(f"t{number}")
        bus.publish("a")

    on_threads(4, publish)
    bus.drain(timeout=30)
    assert sorted(got) == ["t0", "t1", "t2", "t3"]


def test_a_batch_and_its_receipts(make: Make) -> None:
    bus = make()
    bus.subscribe("a", lambda message: None, name="a")
    bus.start()
    receipts = bus.publish_many([("a", 1), Outgoing("b", message_id="m")])
    assert [receipt.subscriptions for receipt in receipts] == [("a",), ()]
    assert receipts[1].message_id == "m"


def test_what_the_core_raises_is_raised_to_the_caller(make: Make) -> None:
    bus = make()
    with pytest.raises(BusNotRunning, match=r"call start\(\)"):
        bus.publish("a")
    with pytest.raises(TransportError):
        bus.ledger()
    bus.start()
    with pytest.raises(InvalidTopic):
        bus.publish("not a topic")
    with pytest.raises(UnknownSubscription):
        bus.pause("nobody")
    with pytest.raises(TimeoutError):
        bus.subscribe("slow", lambda message: threading.Event().wait(0.5), name="slow")
        bus.publish("slow")
        bus.drain(timeout=0.01)
    bus.stop()
    with pytest.raises(BusNotRunning, match="stopped"):
        bus.publish("a")


# Subscribing


def test_subscribing_as_a_call_or_as_a_decorator_before_or_after_the_start(make: Make) -> None:
    bus, got = make(), []

    @bus.subscribe("a", name="first")
    def first(message: Message) -> None:
        got.append(("first", message.payload))

    bus.start()

    @bus.subscribe("a", name="second")
    async def second(message: Message) -> None:
        got.append(("second", message.payload))

    bus.publish("a", 1)
    bus.drain(timeout=30)
    assert sorted(got) == [("first", 1), ("second", 1)]
    assert bus.subscribers == {"a": [first, second]}
    assert set(bus.queues) == {"first", "second"}


def test_one_handler_on_several_topics_has_several_names(make: Make) -> None:
    def handle(message: Message) -> None: ...

    bus = make()
    assert [bus.subscribe(topic, handle) for topic in ("a", "b")] == ["handle", "handle@b"]
    with pytest.raises(SubscriptionExists):
        bus.subscribe("b", handle)
    assert bus.subscribers == {"a": [handle], "b": [handle]}


def test_what_cannot_be_subscribed_leaves_nothing_behind(make: Make) -> None:
    bus = make()
    with pytest.raises(ConfigurationError):
        bus.subscribe("a", 7)  # type: ignore[call-overload]
    with pytest.raises(ConfigurationError):
        bus.subscribe("a..b", print)
    with pytest.raises(ConfigurationError):
        bus.subscribe("a", print, timeout=-1)
    assert bus.subscribers == {}


# Operating


def test_dead_letters_breakers_pauses_and_audit_as_plain_calls(make: Make) -> None:
    bus = make(max_retries=0)
    bus.subscribe("a", lambda message: 1 / 0, name="a")
    bus.start()
    bus.publish("a", {"n": 1})
    bus.drain(timeout=30)
    (letter,) = bus.dead_letters.list(subscription="a")
    assert (letter.attempts, letter.report.exception_type) == (1, "ZeroDivisionError")
    assert bus.dead_letters.get(letter.id).message.payload == {"n": 1}
    assert bus.dead_letters.replay(letter.id) == 1
    bus.drain(timeout=30)
    assert bus.dead_letters.discard(*[letter.id for letter in bus.dead_letters.list()]) == 1

    bus.pause("a")
    bus.publish("a")
    assert bus.drain(timeout=30).reasons == {"a": "paused"}
    bus.resume("a")
    breaker = bus.breakers["a"]
    breaker.force_open()
    assert breaker.state == "FORCED_OPEN"
    breaker.disable()
    breaker.reset()
    assert (breaker.state, list(bus.breakers), len(bus.breakers)) == ("closed", ["a"], 1)
    assert bus.audit().ok
    bus.drain(timeout=30)
    assert bus.forget("a") >= 0
    assert bus.subscribe("a", lambda message: None, name="a") == "a", "a forgotten name is free again"


def test_it_can_be_started_again_and_counts_on(make: Make) -> None:
    bus, got = make(), []
    bus.subscribe("a", lambda message: got.append(message.payload))
    for number in range(3):
        bus.start()
        assert bus.start() is bus
        bus.publish("a", number)
        bus.drain(timeout=30)
        assert bus.stop()
        assert bus.stop(), "stopping is idempotent"
    assert got == [0, 1, 2]
    assert (bus.metrics["messages_published"], bus.metrics["messages_processed"]) == (3, 3)


def test_a_start_that_failed_can_be_made_again(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "store.db"
    folder.mkdir()
    bus = make(url=f"sqlite:///{folder}")
    with pytest.raises(GlassbusError):
        bus.start()
    assert not bus.running
    folder.rmdir()
    assert bus.start().running


# What would deadlock


def test_a_call_in_the_thread_of_a_running_loop_is_refused(make: Make) -> None:
    bus = make()
    bus.start()

    async def main() -> None:
        for call in (
            lambda: bus.publish("a"),
            bus.start,
            bus.stop,
            bus.drain,
            bus.dead_letters.list,
            lambda: bus.pause("a"),
        ):
            with pytest.raises(WouldBlockLoop, match="to_thread") as refused:
                call()
            assert isinstance(refused.value, RuntimeError)
        assert bus.get_health_status()["status"] == "healthy", "looking blocks nobody"
        assert (await asyncio.to_thread(bus.publish, "a")).subscriptions == ()

    asyncio.run(main())


def test_an_async_handler_is_refused_too_and_uses_the_core_instead(make: Make) -> None:
    bus, seen, ended = make(), [], threading.Event()

    async def handle(message: Message) -> None:
        with pytest.raises(WouldBlockLoop):
            bus.publish("next")
        seen.append((await bus.core.publish("next")).subscriptions)
        ended.set()

    bus.subscribe("a", handle)
    bus.start()
    bus.publish("a")
    assert ended.wait(30)
    assert seen == [()]


@pytest.mark.parametrize("what", ["stop", "drain"])
def test_a_handler_does_not_wait_for_itself(make: Make, what: str) -> None:
    bus, raised = make(), []

    def handle(message: Message) -> None:
        with pytest.raises(GlassbusError, match="wait for itself") as refused:
            getattr(bus, what)()
        raised.append(refused.value)

    bus.subscribe("a", handle)
    bus.start()
    bus.publish("a")
    assert bus.drain(timeout=30).complete
    assert len(raised) == 1


def test_a_stop_does_not_wait_for_a_loop_that_hangs(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from glassbus.blocking import bus as module

    monkeypatch.setattr(module, "_STOP_GRACE_S", 0.05)
    bus, leave, inside = make(), threading.Event(), threading.Event()

    async def hang(message: Message) -> None:
        inside.set()
        leave.wait(30)

    bus.subscribe("a", hang)
    bus.start()
    bus.publish("a")
    assert inside.wait(30)
    assert bus.stop(0.0) is False
    assert bus.get_health_status()["running"] is True
    leave.set()


def test_what_is_interrupted_here_is_cancelled_there(make: Make) -> None:
    bus = make()
    bus.start()
    begun, ended = threading.Event(), threading.Event()

    async def long() -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    with pytest.raises(TimeoutError):
        bus._loop.call(long, within_s=0.2)
    assert begun.is_set()
    assert ended.wait(30)


def test_who_waits_when_the_loop_ends_is_told(make: Make) -> None:
    bus = make()
    bus.start()

    async def forever() -> None:
        bus.core.hub  # noqa: B018 - it runs
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().stop)
        await asyncio.sleep(3600)

    with pytest.raises(GlassbusError, match="loop ended"):
        bus._loop.call(forever)


def test_an_exit_in_what_runs_on_the_loop_does_not_end_the_loop(make: Make) -> None:
    bus = make()
    bus.start()

    async def exits() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        bus._loop.call(exits)
    assert bus.publish("a").subscriptions == ()


def test_what_is_posted_runs_in_order_and_one_that_raises_ends_nothing(make: Make) -> None:
    bus, ran, told = make(), [], []
    bus.start()

    async def listen() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))

    bus._loop.call(listen)
    error = SystemExit()

    def raises() -> None:
        raise error

    for number in range(100):
        bus._loop.post(ran.append, number)
        bus._loop.post(raises)
    bus._loop.post(lambda: None)
    done = threading.Event()
    bus._loop.post(done.set)
    assert done.wait(30)
    assert (ran, told) == (list(range(100)), [error] * 100)


def test_too_much_that_waits_for_a_hanging_loop_is_counted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from glassbus.blocking import loop as module

    monkeypatch.setattr(module, "POSTED_MAX", 3)
    bus, leave = make(), threading.Event()
    bus.start()
    bus._loop.post(leave.wait, 30)
    for _ in range(10):
        bus._handle_connection_error("c", ConnectionError())
    assert bus.metrics["untold"] > 0
    leave.set()


# Leaving and forking


def run(program: str, folder: Path) -> str:
    warned_by_python = ["-W", "ignore::DeprecationWarning"]  # of forking with threads, which is what is tried
    ran = subprocess.run(
        [sys.executable, *warned_by_python, "-c", program], capture_output=True, text=True, timeout=60, cwd=folder
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


_SERVICE = """
import logging, os, sys
logging.getLogger("glassbus").addFilter(lambda record: "could not be stopped" in record.getMessage())
from glassbus import GlassbusError, ProductionMessageBus
from glassbus.facts import BusStopped, OwnerLost
class Watch:
    interests = {BusStopped, OwnerLost}
    def on_fact(self, fact): print(type(fact).__name__, flush=True)
bus = ProductionMessageBus({"url": "sqlite:///store.db", "telemetry": False, "observers": [Watch()]})
bus.subscribe("a", lambda message: print("handled", message.payload, flush=True), name="a")
bus.start()
"""


def test_a_program_that_just_ends_leaves_a_stopped_bus(tmp_path: Path) -> None:
    """By then asyncio's own executor takes no work, which the store needs to close."""
    assert run(_SERVICE + "bus.pause('a')\nbus.publish('a', 1)", tmp_path) == "BusStopped\n"
    ended = run(_SERVICE + "bus.resume('a')\nbus.drain()\nprint(bus.audit().ok)", tmp_path)
    assert ended == "handled 1\nTrue\nBusStopped\n"


def test_a_forked_child_is_told_and_the_parent_goes_on(tmp_path: Path) -> None:
    program = """
logging.disable(logging.CRITICAL)
pid = os.fork()
if not pid:
    for call in (lambda: bus.publish("a", 7), bus.start, bus.drain):
        try:
            call()
        except GlassbusError as error:
            print("forked" in str(error), flush=True)
    bus._handle_message_processing_error("m", ValueError())
    print(bus.get_health_status()["status"], bus.stop(), flush=True)
    sys.exit(0)
os.waitpid(pid, 0)
bus.publish("a", 1)
bus.drain()
"""
    assert run(_SERVICE + program, tmp_path) == "True\nTrue\nTrue\ncritical True\nhandled 1\nBusStopped\n"


# Configuration


def test_unknown_keys_are_kept_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {"log_dir": str(tmp_path), "broker_host": "x", 7: "odd"}
    with caplog.at_level(logging.WARNING, "glassbus"):
        bus = ProductionMessageBus(config)
        bus.get_health_status()
    assert bus.config is config
    (record,) = caplog.records
    assert "'broker_host', 7" in record.getMessage()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"url": "ftp://x"}, "ftp"),
        ({"name": "a b"}, "name"),
        ({"publish_timeout": -1}, "publish_timeout"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_retries": 1, "retry": Retry()}, "max_retries or retry"),
        ({"rules": 7}, "rules"),
        ({"stop_deadline": "soon"}, "stop_deadline"),
        ({"max_log_size": 0}, "max_log_size"),
        ({"retry_configs": 7}, "retry_configs"),
        ([], "dict"),
        ("url", "dict"),
    ],
)
def test_what_cannot_work_is_refused_by_name(config: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        ProductionMessageBus(config)


def test_defaults_of_subscriptions_come_from_the_configuration(make: Make) -> None:
    bus = make(timeout=7.0, max_retries=2, concurrency=3)
    bus.subscribe("a", print, name="a", concurrency=5)
    bus.start()
    (worker,) = bus.core.subscribers()
    subscription = worker.subscription
    assert (subscription.timeout, subscription.retry.max_attempts, subscription.concurrency) == (7.0, 3, 5)


def test_a_start_again_that_fails_leaves_no_bus_with_some_of_the_subscriptions(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make()
    got: list[Any] = []
    bus.subscribe("a.x", lambda message: got.append("a"), name="a")
    bus.subscribe("b.x", lambda message: got.append("b"), name="b")
    bus.start()
    bus.stop()
    real = MessageBus.subscribe

    def fails(self: MessageBus, pattern: str, **options: Any) -> Any:
        if pattern == "b.x":
            raise ConfigurationError("not now")
        return real(self, pattern, **options)

    with monkeypatch.context() as broken:
        broken.setattr(MessageBus, "subscribe", fails)
        with pytest.raises(ConfigurationError, match="not now"):
            bus.start()
        assert not bus.running
    bus.start()
    assert bus.publish("b.x", 1).subscriptions == ("b",)
    bus.drain(60)
    assert got == ["b"]


def test_a_subscription_that_could_not_be_forgotten_is_there_after_the_next_start(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make()
    bus.subscribe("a.x", lambda message: None, name="a")
    bus.start()

    async def fails(self: MessageBus, subscription: str) -> int:
        raise TransportError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(MessageBus, "forget", fails)
        with pytest.raises(TransportError, match="disk full"):
            bus.forget("a")
    bus.stop()
    bus.start()
    assert bus.publish("a.x", 1).subscriptions == ("a",)
    assert len(bus.subscribers["a.x"]) == 1
    bus.forget("a")
    assert bus.subscribers == {"a.x": []}
