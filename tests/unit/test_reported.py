"""Messages handed over with an error: none is lost, whether the bus runs, not yet, no more, or not at all."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glassbus import (
    BreakerState,
    ConfigurationError,
    ErrorCategory,
    ErrorReport,
    ErrorSeverity,
    KillSwitch,
    Message,
    MessageBus,
    Priority,
    ProductionMessageBus,
    Retry,
)
from glassbus.blocking import reported as module
from glassbus.facts import DeliveryDeadLettered, ErrorReported, RecoveryConcluded
from glassbus.record.failures import failure_of
from glassbus.testing import RecordingObserver, expect_facts

C, S = ErrorCategory, ErrorSeverity
Make = Callable[..., ProductionMessageBus]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("glassbus").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("glassbus").setLevel(logging.NOTSET)


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
        bus._reported.after_fork()  # nothing is left for the end of this program


def eventually(true: Callable[[], object]) -> None:
    patience = threading.Event()
    for _ in range(3000):
        if true():
            return
        patience.wait(0.01)
    raise AssertionError("it never became true")


def payloads(bus: ProductionMessageBus) -> list[Any]:
    return [letter.message.payload for letter in bus.dead_letters.list()]


def logged(bus: ProductionMessageBus) -> list[dict[str, Any]]:
    return [json.loads(line) for line in bus.error_logger.error_log_file.read_text().splitlines()]


# Kept


def test_a_running_bus_has_it_among_its_dead_letters_when_it_answers(make: Make, tmp_path: Path) -> None:
    recorder = RecordingObserver()
    bus = make(url=f"sqlite:///{tmp_path}/store.db", observers=[recorder])
    bus.start()
    context = {"topic": "orders.created", "attempt": 2}
    assert bus._handle_message_processing_error({"id": 7}, ValueError("bad"), context) is True
    (letter,) = bus.dead_letters.list()
    assert (letter.subscription, letter.message.topic) == ("reported", "glassbus.reported.orders.created")
    assert (letter.message.payload, letter.attempts, letter.reason) == ({"id": 7}, 1, "not_retryable")
    assert (letter.report.exception_type, letter.report.message) == ("ValueError", "bad")
    assert letter.report.context["attempt"] == 2
    assert bus.audit().ok
    assert bus.ledger().unaccounted == 0
    assert (bus.ledger().total.accepted, bus.ledger().total.dead_lettered) == (1, 1)
    assert len(recorder.of(DeliveryDeadLettered)) == 1
    assert bus.metrics["messages_published"] == 0, "the program has published nothing"


def test_before_the_start_it_is_held_and_stored_by_the_start(make: Make) -> None:
    bus = make()
    message = Message("m-1", "orders", b"\xff\x00", {"h": "v"}, Priority.HIGH, "k")
    assert bus._handle_message_processing_error(message, ValueError(), {}) is True
    assert bus._handle_queue_overflow("q", "second") is True
    bus.start()
    second, first = (letter.message for letter in bus.dead_letters.list())
    assert (first.payload, first.topic, first.priority, first.key) == (
        b"\xff\x00", "glassbus.reported.orders", Priority.HIGH, "k",
    )  # fmt: skip
    assert first.headers["h"] == "v"
    assert (second.payload, second.topic) == ("second", "glassbus.reported._")
    assert bus._reported.waiting == 0


def test_after_a_stop_it_is_held_for_the_next_start(make: Make) -> None:
    bus = make()
    bus.start()
    bus.stop()
    assert bus._handle_message_processing_error("late", ValueError()) is True
    bus.start()
    assert payloads(bus) == ["late"]


def test_a_program_that_ends_without_a_start_writes_it_down_for_the_next(tmp_path: Path) -> None:
    program = """
import logging, sys
from glassbus import ProductionMessageBus
logging.getLogger("glassbus").setLevel(logging.CRITICAL)
bus = ProductionMessageBus({"url": "sqlite:///store.db", "telemetry": False})
if sys.argv[1] == "hand":
    print(bus._handle_message_processing_error("kept", ValueError("bad"), {}))
else:
    with bus:
        print([(letter.message.payload, letter.report.message) for letter in bus.dead_letters.list()])
"""
    for argument, said in (("hand", "True\n"), ("look", "[('kept', 'bad')]\n"), ("look", "[('kept', 'bad')]\n")):
        ran = subprocess.run(
            [sys.executable, "-c", program, argument], capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
        assert (ran.stdout, ran.stderr, ran.returncode) == (said, "", 0)
        kept = list((tmp_path / "store.db.state").glob("reported-*.json"))
        assert len(kept) == (argument == "hand")
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in kept)


def test_an_emergency_before_the_start_writes_it_down(make: Make, tmp_path: Path) -> None:
    bus = make(state_dir=str(tmp_path / "state"))
    bus._handle_message_processing_error("kept", ValueError())
    assert bus._emergency_shutdown() is True
    assert len(list((tmp_path / "state").glob("reported-*.json"))) == 1
    bus.start()
    assert payloads(bus) == ["kept"]
    assert list((tmp_path / "state").glob("reported-*.json")) == []


def test_a_damaged_file_is_moved_aside_and_stops_nothing(make: Make, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "reported-1.json").write_text("[{")
    bus = make(state_dir=str(state))
    bus.start()
    assert payloads(bus) == []
    assert [path.name for path in state.glob("reported*")] == ["reported-1.damaged"]


def test_a_store_that_takes_nothing_now_gets_it_later(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from glassbus import StorageFull

    bus = make()
    bus.start()

    async def refuse(envelope: object) -> None:
        raise StorageFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(bus.core.resting, "keep", refuse)
        assert bus._handle_message_processing_error("kept", ValueError()) is True
        assert bus._reported.waiting == 1
    assert bus.stop()
    assert bus._reported.waiting == 0, "a stop stores it"
    bus.start()


def test_an_async_handler_hands_over_without_waiting(make: Make) -> None:
    bus, answers = make(), []

    async def handle(message: Message) -> None:
        answers.append(bus._handle_message_processing_error(message.payload, ValueError()))

    bus.subscribe("a", handle)
    bus.start()
    bus.publish("a", "inner")
    eventually(lambda: payloads(bus) == ["inner"])
    assert answers == [True]


def test_what_does_not_fit_is_not_claimed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_MAX", 2)
    bus = make(payload_bytes_max=1000)
    assert bus._handle_message_processing_error("x" * 2000, ValueError()) is False
    answers = [bus._handle_message_processing_error(n, ValueError()) for n in range(3)]
    assert answers == [True, True, False]
    assert bus.metrics["unsaved"] == 2


def test_managers_of_the_programs_own_come_first_and_the_bus_when_they_fail(make: Make) -> None:
    class Dead:
        def __init__(self, *, works: bool) -> None:
            self.works = works

        def add_message(self, message: Any, report: Any) -> bool:
            return self.works

    bus = make()
    bus.start()
    assert bus._handle_message_processing_error("theirs", ValueError(), {"dead_letter_queue": Dead(works=True)})
    assert payloads(bus) == []
    assert bus._handle_message_processing_error("ours", ValueError(), {"dead_letter_queue": Dead(works=False)})
    assert payloads(bus) == ["ours"]


def test_what_managers_promised_for_later_and_did_not_do_is_kept_by_the_bus(make: Make) -> None:
    class Fails:
        def requeue_message(self, message: Any) -> None:
            raise OSError

        def add_message(self, message: Any, report: Any) -> None:
            raise OSError

    bus = make(retry_configs={"message_processing_error": {"max_retries": 3, "backoff_factor": 0.001}})
    bus.start()
    context = {"message_queue": Fails(), "dead_letter_queue": Fails(), "retry_count": 1}
    assert bus._handle_message_processing_error("m", ValueError(), context) is True
    eventually(lambda: payloads(bus) == ["m"])
    assert bus.recovery_manager.unsaved == 0


def test_no_subscription_of_a_program_is_given_it(make: Make) -> None:
    bus, got = make(), []
    bus.subscribe(">", lambda message: got.append(message.topic), name="all")
    bus.subscribe("*.reported.*", lambda message: got.append(message.topic), name="some")
    bus.start()
    bus._handle_message_processing_error("m", ValueError())
    bus.drain(30)
    assert got == []
    assert len(payloads(bus)) == 1


def test_a_replay_hands_it_to_its_topic_where_somebody_wants_it(make: Make) -> None:
    bus, got = make(), []
    bus.subscribe("orders", lambda message: got.append((message.payload, dict(message.headers))), name="orders")
    message = Message("m", "orders", 1, {"h": "v"})
    assert bus._handle_message_processing_error(message, ValueError()) is True, "before the start: it cannot be retried"
    bus._handle_message_processing_error("nobody's", ValueError())
    bus.start()
    letters = bus.dead_letters.list()
    assert bus.dead_letters.replay(*[letter.id for letter in letters]) == 2
    eventually(lambda: got == [(1, {"h": "v"})])
    eventually(lambda: payloads(bus) == ["nobody's"])
    assert bus.dead_letters.list()[0].replays == 1
    assert bus.audit().ok


# Counted


def test_an_error_handed_over_is_counted_once_and_nothing_is_invented(make: Make) -> None:
    recorder = RecordingObserver()
    bus = make(observers=[recorder])
    bus.start()
    bus._handle_message_processing_error("m", ValueError("bad"))
    bus._handle_connection_error("c", ConnectionError("gone"))
    bus._handle_queue_overflow("q", "m")
    assert bus.flush_facts()
    told = [failure_of(fact) for fact in recorder.facts if type(fact) is not DeliveryDeadLettered]
    assert [failure.report.message for failure in told if failure is not None and failure.report] == [
        "bad", "gone", logged(bus)[2]["message"],
    ]  # fmt: skip
    assert sum(failure is not None for failure in told) == 3
    assert len(recorder.of(RecoveryConcluded)) == 3
    assert bus.core.journal.statistics()["total_errors"] == 3


@pytest.mark.parametrize("transient", [False, True])
def test_the_error_logs_recoveries_are_those_of_the_core(make: Make, transient: bool) -> None:
    bus = make(retry=Retry(max_attempts=2, base_delay=0.0), kill_switch=KillSwitch(enabled=False))
    seen: set[str] = set()

    def handle(message: Message) -> None:
        if not transient or message.id not in seen:
            seen.add(message.id)
            raise ConnectionError("down")

    bus.subscribe("a", handle)
    with bus:
        for _ in range(10):
            bus.publish("a")
        bus.drain(30)
        assert bus._feed.flush(30)
        ours, core = bus.error_logger.get_error_statistics(), bus.core.journal.statistics()
    names = ("total_errors", "recovery_success_rate")
    assert [ours[name] for name in names] == [core[name] for name in names]
    assert ours["recovery_success_rate"] == float(transient)
    assert ours["recoveries"]["failed"] == core["recoveries"]["failed"] == 10 * (not transient)
    assert json.loads(bus.error_logger.metrics_file.read_text())["recovery_success_rate"] == float(transient)
    firsts = [line for line in logged(bus) if line["context"]["attempt"] == 1]
    assert all(line["recovery_attempted"] for line in firsts)
    assert all(line["escalated"] for line in logged(bus) if line["context"]["attempt"] == 2), "the dead letters"
    assert not any(line["escalated"] for line in firsts)


# Told to people


def test_a_critical_error_calls_the_programs_own_escalation_and_its_line_says_so(make: Make, tmp_path: Path) -> None:
    called: list[str] = []

    class Own(ProductionMessageBus):
        def _escalate_critical_error(self, report: Any) -> bool:
            called.append(report.exception_type)
            return super()._escalate_critical_error(report)

    bus = Own({"log_dir": str(tmp_path / "own"), "telemetry": False})
    with bus:
        bus._handle_message_processing_error("m", MemoryError())
        bus._handle_connection_error("c", ConnectionError())
        assert called == ["MemoryError"]
        assert [line["escalated"] for line in logged(bus)] == [True, False]
        eventually(bus.core.escalations.open)
        (escalation,) = bus.core.escalations.open()
        assert (escalation.name, escalation.severity) == ("CriticalFailure", S.CRITICAL)


def test_what_is_escalated_while_it_does_not_run_is_logged_at_once_and_opens_when_it_runs(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make()
    for rounds in (1, 2):  # before the first start, and after a stop
        report = ErrorReport(f"e{rounds}", 1.0, C.CONNECTION_ERROR, S.CRITICAL, "on fire", fingerprint=str(rounds))
        assert bus._escalate_critical_error(report) is True
        assert report.escalated
        told = [record.levelname for record in caplog.records if "only the log is told" in record.getMessage()]
        assert told == ["CRITICAL"] * rounds
        bus.start()
        eventually(lambda: [one.summary for one in bus.core.escalations.open()] == [": on fire"])
        bus.stop()


def test_expect_facts_takes_the_blocking_bus(make: Make) -> None:
    bus = make()
    for _ in range(2):
        with expect_facts(bus, ErrorReported) as seen:
            bus._handle_message_processing_error("m", ValueError())
        assert len(seen.of(ErrorReported)) == 1
        bus.start()


# As documented


def test_a_report_takes_its_first_twelve_fields_by_position() -> None:
    given: tuple[Any, ...] = ("e", 1.0, C.TIMEOUT_ERROR, S.LOW, "m", "X", "st", {"a": 1}, True, True, 3, True)
    report = ErrorReport(*given)
    names = (
        "error_id", "timestamp", "category", "severity", "message", "exception_type", "stack_trace", "context",
        "recovery_attempted", "recovery_successful", "retry_count", "escalated",
    )  # fmt: skip
    assert tuple(getattr(report, name) for name in names) == given
    assert report == ErrorReport(**dict(zip(names, given, strict=True)))


def test_the_name_of_a_breakers_state_is_the_key_to_upper_case_tables() -> None:
    assert {state.name: 1 for state in BreakerState}[BreakerState.HALF_OPEN.name] == 1
    assert all(state == state.name for state in BreakerState)


@pytest.mark.parametrize(
    ("config", "named"),
    [({"timeout": -1}, "timeout"), ({"concurrency": 0}, "concurrency"), ({"retry": 3}, "retry")],
)
def test_defaults_that_no_subscription_can_have_are_refused_at_once(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        ProductionMessageBus(config)


def test_what_was_published_there_by_hand_rests_with_what_can_be_said(tmp_path: Path) -> None:
    from glassbus.message import Envelope

    async def main() -> None:
        async with MessageBus(telemetry=False) as bus:
            await bus.resting.keep(Envelope("e", "glassbus.reported._", b"1", "json", {}, published_at=1.0))
            (letter,) = await bus.dead_letters.list()
            assert letter.report.message == "the report of its error cannot be read"
            await bus.forget("reported")
            await bus.resting.keep(Envelope("f", "glassbus.reported._", b"1", "json", {}, published_at=1.0))
            assert [letter.message.id for letter in await bus.dead_letters.list()] == ["f"]

    asyncio.run(main())
