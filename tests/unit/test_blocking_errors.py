"""Errors handed to a ProductionMessageBus by the names that its users know: true answers, and nothing raised."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from glassbus import (
    BreakerOpen,
    CircuitBreaker,
    ErrorCategory,
    ErrorLogger,
    ErrorRecoveryManager,
    ErrorReport,
    ErrorSeverity,
    Fact,
    Message,
    Priority,
    ProductionMessageBus,
)
from glassbus.errors import StoreCorrupt
from glassbus.facts import ErrorReported, EscalationOpened, RecoveryConcluded
from glassbus.testing import RecordingObserver

C, S = ErrorCategory, ErrorSeverity
Make = Callable[..., ProductionMessageBus]

HEALTH_KEYS = {
    "status", "uptime_seconds", "messages_processed", "messages_failed", "success_rate", "errors_recovered",
    "active_connections", "active_queues", "error_statistics", "circuit_breaker_status",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("glassbus").setLevel(logging.CRITICAL + 1)
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


def logged(bus: ProductionMessageBus) -> list[dict[str, Any]]:
    return [json.loads(line) for line in bus.error_logger.error_log_file.read_text().splitlines()]


def test_a_program_written_against_the_earlier_bus_uses_every_name_it_knows(tmp_path: Path) -> None:
    """One program, as its users wrote it: no name is missing, and each does what it says."""
    config = {"log_dir": str(tmp_path), "max_log_size": 1_000_000, "timeout": 5}
    bus = ProductionMessageBus(config)
    assert bus.config is config
    assert (bus.running, dict(bus.connections), dict(bus.queues), dict(bus.subscribers)) == (False, {}, {}, {})
    assert isinstance(bus.metrics, dict)
    assert isinstance(bus.error_logger, ErrorLogger)
    assert isinstance(bus.recovery_manager, ErrorRecoveryManager)

    # Its handlers work before the start, with plain strings as messages.
    assert bus._handle_message_processing_error("message-1", ValueError("bad"), {"attempt": 1}) is True
    assert bus._handle_connection_error("broker-1", ConnectionError("gone")) is False
    assert bus._handle_queue_overflow("orders", "message-2") is True

    received: list[Any] = []
    bus.subscribe("orders", lambda message: received.append(message.payload))
    bus.start()
    assert bus.running
    bus.publish("orders", {"id": 1})
    bus.drain(30)
    assert received == [{"id": 1}]
    assert list(bus.subscribers) == ["orders"]
    assert len(bus.queues) == 2, "orders, and what was handed over"
    assert {letter.message.payload for letter in bus.dead_letters.list()} == {"message-1", "message-2"}

    assert bus._categorize_error(ConnectionError()) == C.CONNECTION_ERROR
    assert bus._categorize_error(pickle.PicklingError()) == C.SERIALIZATION_ERROR
    assert bus._assess_severity(TimeoutError(), {}) == S.HIGH
    assert bus._assess_severity(MemoryError(), {}) == S.CRITICAL
    assert bus._assess_severity(ValueError()) == S.MEDIUM
    assert bus._assess_severity(Exception("?"), None) == S.LOW
    assert bus._assess_connection_severity("broker-1", ConnectionError()) == S.HIGH
    assert bus._is_unrecoverable_error(ValueError()) is False

    report = ErrorReport(
        error_id="e-1",
        timestamp=time.time(),
        category=C.TIMEOUT_ERROR,
        severity=S.CRITICAL,
        message="late",
        exception_type="TimeoutError",
        stack_trace="",
        context={},
        recovery_attempted=False,
        recovery_successful=False,
        retry_count=0,
        escalated=False,
    )
    assert bus.recovery_manager.attempt_recovery(report, {}) is False
    assert set(bus.recovery_manager.recovery_strategies) == set(bus.recovery_manager.retry_configs) == set(C)
    breaker = bus.recovery_manager.circuit_breakers[C.TIMEOUT_ERROR]
    assert isinstance(breaker, CircuitBreaker)
    assert (breaker.state, breaker.failure_count) == ("CLOSED", 1)
    assert breaker.last_failure_time is not None
    with pytest.raises(RuntimeError):
        breaker.call(lambda: (_ for _ in ()).throw(BreakerOpen("another one refuses")))
    assert bus._escalate_critical_error(report) is True
    assert report.escalated

    bus.error_logger.log_error(report)
    assert bus.error_logger.get_error_statistics()["total_errors"] == 4
    assert bus.error_logger.error_log_file.name == "message_bus_errors.json"
    assert bus.error_logger.metrics_file.name == "error_metrics.json"
    assert len(bus.error_logger.error_history) == 4
    assert sum(bus.error_logger.error_counts.values()) == 4

    status = bus.get_health_status()
    assert set(status) >= HEALTH_KEYS
    assert status["status"] in ("healthy", "degraded", "critical")
    assert (status["messages_processed"], status["messages_failed"]) == (1, 2)
    json.dumps(status)
    assert bus._emergency_shutdown() is True
    assert not bus.running
    assert bus.stop()


# What is answered


def test_a_message_that_a_manager_takes_is_recovered(make: Make) -> None:
    class Queue:
        taken: list[Any] = []  # noqa: RUF012 - one instance

        def requeue_message(self, message: Any) -> bool:
            self.taken.append(message)
            return True

    bus, queue = make(), Queue()
    assert bus._handle_message_processing_error("m", ValueError(), {"message_queue": queue}) is True
    assert queue.taken == ["m"]
    (line,) = logged(bus)
    assert (line["recovery_attempted"], line["recovery_successful"], line["retry_count"]) == (True, True, 1)
    assert (bus.metrics["messages_failed"], bus.metrics["errors_recovered"]) == (0, 1)


def test_a_message_whose_topic_is_known_is_published_again_once_it_runs(make: Make) -> None:
    bus, got = make(), []
    bus.subscribe("orders", lambda message: got.append((message.payload, message.priority)))
    error = ConnectionError("down")
    assert bus._handle_message_processing_error({"id": 1}, error, {"topic": "orders"}) is True, "kept: it does not run"
    bus.start()
    assert bus._handle_message_processing_error({"id": 2}, error, {"topic": "orders"}) is True
    assert bus._handle_message_processing_error({"id": 3}, ValueError(), {"topic": "orders"}) is True
    assert bus._handle_message_processing_error({"id": 4}, ValueError(), {"topic": "nobody.wants.it"}) is True
    message = Message("m", "orders", {"id": 5}, {}, Priority.HIGH)
    assert bus._handle_message_processing_error(message, ValueError()) is True
    bus.drain(30)
    assert sorted(letter.message.payload["id"] for letter in bus.dead_letters.list()) == [1, 4]
    assert sorted(got, key=str) == [
        ({"id": 2}, Priority.NORMAL),
        ({"id": 3}, Priority.NORMAL),
        ({"id": 5}, Priority.HIGH),
    ]


def test_a_connection_of_the_programs_own_is_asked_to_reconnect(make: Make) -> None:
    class Connection:
        calls = 0

        def __init__(self, answer: Any) -> None:
            self.answer = answer

        def connect(self) -> Any:
            self.calls += 1
            if isinstance(self.answer, BaseException):
                raise self.answer
            return self.answer

    async def later() -> bool:
        return True

    bus = make(retry_configs={"connection_error": {"max_retries": 1}})
    for answer, truth in ((None, True), (True, True), (False, False), (OSError(), False)):
        bus.connections["c"] = Connection(answer)
        assert bus._handle_connection_error("c", ConnectionError()) is truth
        assert bus.connections["c"].calls == 1
    bus.connections["c"] = Connection(later())
    assert bus._handle_connection_error("c", ConnectionError()) is False, "a coroutine has connected nothing"
    assert bus._handle_connection_error(["unhashable"], ConnectionError()) is False
    assert bus.get_health_status()["active_connections"] == 1


def test_its_own_connection_is_well_when_its_store_answers(make: Make) -> None:
    bus = make()
    assert bus._handle_connection_error(bus.core.address, ConnectionError()) is False
    bus.start()
    assert bus._handle_connection_error(bus.core.address, ConnectionError()) is True


def test_the_fifth_failure_of_a_connection_in_a_row_is_critical(make: Make) -> None:
    bus = make()
    for _ in range(5):
        bus._handle_connection_error("c", ConnectionError())
    bus._handle_connection_error("other", ConnectionError())
    assert [line["severity"] for line in logged(bus)] == ["high"] * 4 + ["critical", "high"]
    assert bus._assess_connection_severity(ConnectionError(), "c") is S.CRITICAL
    assert bus._assess_connection_severity(MemoryError()) is S.CRITICAL
    bus.connections["c"] = type("Fine", (), {"reconnect": lambda self: True})()
    bus.recovery_manager.circuit_breakers[C.CONNECTION_ERROR].reset()
    assert bus._handle_connection_error("c", ConnectionError()) is True
    assert bus._assess_connection_severity("c", ConnectionError()) is S.HIGH


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (ValueError(), C.CONNECTION_ERROR),
        (TimeoutError(), C.CONNECTION_ERROR),
        (PermissionError(), C.AUTHENTICATION_ERROR),
        (ImportError(), C.CONFIGURATION_ERROR),
    ],
)
def test_what_fails_on_a_connection_is_recovered_as_a_connection(make: Make, error: BaseException, category: C) -> None:
    bus = make()
    bus._handle_connection_error("c", error)
    assert logged(bus)[0]["category"] == category


def test_a_queue_of_the_bus_slows_its_publishers(make: Make) -> None:
    bus = make()
    bus.subscribe("orders", print, name="orders")
    bus.start()
    assert bus._handle_queue_overflow("orders", "m") is True
    assert bus._handle_queue_overflow("nobody", None) is False, "nothing made room, and there is nothing to save"
    assert bus._handle_queue_overflow("nobody", "m") is True
    assert bus.dead_letters.list()[0].message.payload == "m"
    assert [line["category"] for line in logged(bus)] == ["queue_overflow"] * 3


def test_a_fallback_serialization_is_put_into_the_callers_context(make: Make) -> None:
    class Serializer:
        def fallback_serialize(self, data: Any) -> bytes:
            return repr(data).encode()

    context: dict[str, Any] = {"serializer": Serializer()}
    assert make()._handle_message_processing_error({"a"}, pickle.PicklingError(), context) is True
    assert context["serialized_data"] == b"{'a'}"


def test_rules_of_the_configuration_come_first(make: Make) -> None:
    def rule(error: BaseException) -> Any:
        if isinstance(error, ZeroDivisionError):
            return C.CONFIGURATION_ERROR, S.LOW
        if isinstance(error, KeyError):
            raise SystemExit
        return None

    bus = make(rules=[rule])
    assert (bus._categorize_error(ZeroDivisionError()), bus._assess_severity(ZeroDivisionError())) == (
        C.CONFIGURATION_ERROR,
        S.LOW,
    )
    assert bus._categorize_error(KeyError()) is C.MESSAGE_PROCESSING_ERROR
    assert bus.core.observer_failures() == {"function": 1}, "a rule that raises is counted"


def test_a_severity_in_the_context_is_believed(make: Make) -> None:
    bus = make()
    assert bus._assess_severity(ValueError(), {"severity": "critical"}) is S.CRITICAL
    assert bus._assess_severity(ValueError(), {"severity": "no such"}) is S.MEDIUM


def test_a_report_holds_plain_values_and_no_payload(make: Make) -> None:
    bus = make()
    context = {
        "attempt": 3,
        "topic": "t",
        "data": "secret",
        "manager": object(),
        "message": "secret",
        "long": "x" * 999,
    }
    bus._handle_message_processing_error("the secret itself", ValueError(), context)
    bus._handle_message_processing_error(Message("m-1", "t", "secret", {}), ValueError())
    first, second = (line["context"] for line in logged(bus))
    assert first == {"attempt": 3, "topic": "t", "long": "x" * 200, "message_type": "str"}
    assert second == {"message_id": "m-1", "topic": "t"}
    assert "secret" not in bus.error_logger.error_log_file.read_text()


def test_failures_of_the_buss_own_handlers_are_in_the_error_log_too(make: Make) -> None:
    bus = make(max_retries=0)
    bus.subscribe("a", lambda message: 1 / 0)
    with bus:
        bus.publish("a")
        bus.drain(30)
    assert [line["exception_type"] for line in logged(bus)] == ["ZeroDivisionError"]
    assert bus.get_health_status()["error_statistics"]["total_errors"] == 1


# Whatever it is given


class Hostile:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class HostileError(Exception):
    def __str__(self) -> str:
        raise SystemExit("no text")

    @property
    def response(self) -> Any:
        raise GeneratorExit


class HostileContext(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise SystemExit

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError

    def __len__(self) -> int:
        raise RuntimeError


ANYTHING: list[Callable[[], Any]] = [
    lambda: None,
    lambda: 7,
    lambda: "text",
    lambda: b"\xff",
    lambda: [[]],
    lambda: {"a": {}},
    lambda: "x" * 10_000_000,
    lambda: "\ud800",
    Hostile,
    HostileError,
    HostileContext,
    lambda: ExceptionGroup("g", [ValueError(), MemoryError()]),
]


def test_any_input_is_handled_and_nothing_is_raised(make: Make) -> None:
    bus = make()
    for running in (False, True):
        if running:
            bus.start()
        for first in ANYTHING:
            for second in ANYTHING:
                for message, answer in (
                    (first(), bus._handle_message_processing_error(first(), second(), first())),
                    (second(), bus._handle_queue_overflow(first(), second(), first())),
                ):
                    large = type(message) is str and len(message) > bus.core.settings.payload_bytes_max
                    assert answer is (message is not None and not large), "kept, where there is something to keep"
                assert bus._handle_connection_error(first(), second(), first()) is False
                assert isinstance(bus._categorize_error(first()), ErrorCategory)
                assert isinstance(bus._assess_severity(first(), second()), ErrorSeverity)
                assert isinstance(bus._assess_connection_severity(first(), second()), ErrorSeverity)
            assert bus._is_unrecoverable_error(first()) is False
            assert bus._escalate_critical_error(first()) is False
        assert set(bus.get_health_status()) >= HEALTH_KEYS
    assert bus.running


def test_a_failing_error_log_changes_no_answer(make: Make, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    bus = make()
    assert bus._handle_message_processing_error("m", ValueError()) is True
    assert bus.error_logger.failures == 1
    assert bus.get_health_status()["error_statistics"]["write_failures"] == 1


def test_handling_that_fails_itself_is_counted_and_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bus, told = make(observers=[recorder := RecordingObserver()]), []

    def log_error(report: ErrorReport) -> bool:
        raise SystemExit

    monkeypatch.setattr(bus.error_logger, "log_error", log_error)
    assert bus._handle_message_processing_error("m", ValueError()) is False
    assert bus.metrics["handling_failures"] == 1
    told = [fact.during for fact in recorder.facts if type(fact).__name__ == "ObserverFailed"]
    assert told == ["error handling"]


def test_in_a_thread_that_runs_a_loop_they_answer_without_waiting(make: Make) -> None:
    bus = make()
    bus.subscribe("orders", print)
    bus.start()

    async def main() -> None:
        assert bus._handle_message_processing_error("m", ValueError(), {"topic": "orders"}) is True
        assert bus._handle_connection_error("c", ConnectionError()) is False
        assert bus.get_health_status()["status"] in ("degraded", "critical")

    asyncio.run(main())
    eventually(lambda: [letter.message.payload for letter in bus.dead_letters.list()] == ["m"])


def test_a_thousand_errors_in_a_tight_loop_leave_its_health_known(make: Make) -> None:
    """The time that each takes is measured by bench/bench_blocking.py, not here."""
    for started in (False, True):
        bus = make(log_dir=str(Path(make().error_logger.log_dir) / str(started)))
        if started:
            bus.start()
        for number in range(1000):
            assert bus._handle_message_processing_error(f"message-{number}", ValueError(f"bad {number}"), {}) is True
        status = bus.get_health_status()
        assert (status["status"], status["messages_failed"], status["success_rate"]) == ("critical", 1000, 0.0)
        assert status["error_statistics"]["total_errors"] == 1000
        breakers = status["circuit_breaker_status"]
        assert breakers["message_processing_error"] == "OPEN"
        assert "recovery/message_processing_error" not in breakers, "no breaker twice"
        assert all(state in ("CLOSED", "OPEN", "HALF_OPEN") for state in breakers.values())
        assert len(logged(bus)) == 1000


def test_many_threads_report_at_once_and_every_error_is_in_the_log(make: Make) -> None:
    bus = make()
    bus.start()

    def report(number: int) -> None:
        for n in range(50):
            bus._handle_message_processing_error(f"{number}-{n}", ValueError(), {"n": n})
            bus._handle_connection_error(f"c{number}", ConnectionError())
            bus.get_health_status()

    threads = [threading.Thread(target=report, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(logged(bus)) == 800
    assert len({line["error_id"] for line in logged(bus)}) == 800
    assert bus.metrics["messages_failed"] == 400


def test_memory_is_flat_whatever_is_reported(make: Make) -> None:
    """Everything that is kept has its bound: nothing here grows with the number of connections or errors."""
    bus = make()
    for number in range(1500):
        bus._handle_connection_error(f"c{number}", ConnectionError())
    assert len(bus._failing) <= 1000
    assert len(bus.error_logger.error_history) <= 1000
    assert len(bus._window._samples) <= 3
    assert not bus.recovery_manager._reconnecting


# What is told


def facts(recorder: RecordingObserver, kind: type[Fact]) -> list[Any]:
    return [fact for fact in recorder.facts if isinstance(fact, kind)]


def eventually(true: Callable[[], object]) -> None:
    patience = threading.Event()
    for _ in range(3000):
        if true():
            return
        patience.wait(0.01)
    raise AssertionError("it never became true")


@pytest.mark.parametrize("started", [False, True])
def test_what_was_reported_and_tried_is_told(make: Make, started: bool) -> None:
    recorder = RecordingObserver()
    bus = make(observers=[recorder])
    if started:
        bus.start()
    bus._handle_message_processing_error("m", ValueError("bad"), {})
    eventually(lambda: facts(recorder, ErrorReported))
    (reported,) = facts(recorder, ErrorReported)
    (concluded,) = facts(recorder, RecoveryConcluded)
    assert (reported.report.category, reported.report.component) == (C.MESSAGE_PROCESSING_ERROR, "handler")
    assert (concluded.component, concluded.outcome) == ("handler", "failed")


def test_a_critical_error_reaches_people(make: Make) -> None:
    recorder = RecordingObserver()
    bus = make(observers=[recorder])
    bus.start()
    bus._handle_message_processing_error("m", MemoryError("none left"))
    eventually(lambda: facts(recorder, EscalationOpened))
    assert facts(recorder, EscalationOpened)[0].severity is S.CRITICAL
    assert bus.running, "a handler's exception stops nobody"


def test_only_a_damaged_store_is_unrecoverable_and_never_in_a_handler(make: Make) -> None:
    bus = make()
    damaged = sqlite3.DatabaseError("malformed")
    damaged.sqlite_errorcode = 11
    assert bus._is_unrecoverable_error(StoreCorrupt()) is True
    assert bus._is_unrecoverable_error(damaged) is True
    assert bus._is_unrecoverable_error(MemoryError()) is False
    report = ErrorReport(error_id="e", timestamp=0.0, category=C.CONNECTION_ERROR, severity=S.CRITICAL, message="m")
    assert bus._is_unrecoverable_error(report) is False
    report.component = "endpoint"
    assert bus._is_unrecoverable_error(report) is False, "a connection that keeps failing is not a damaged store"
    report.exception_type = "glassbus.errors.StoreCorrupt"
    assert bus._is_unrecoverable_error(report) is True
    bus.start()
    assert bus._escalate_critical_error(report) is True
    assert not bus.running, "that is an emergency"


def test_an_emergency_shutdown_stops_it_saves_what_is_held_and_can_be_asked_for_again(
    make: Make, tmp_path: Path
) -> None:
    bus = make(url=f"sqlite:///{tmp_path}/store.db")
    bus.subscribe("a", print, name="a")
    assert bus._emergency_shutdown() is True, "nothing runs yet"
    bus.start()
    bus.pause("a")
    bus.publish("a", 1)
    assert bus._emergency_shutdown("the disk smells") is True
    assert bus._emergency_shutdown() is True
    assert not bus.running
    bus.start()
    assert bus.ledger().total.pending == 1


def test_an_emergency_shutdown_from_a_handler_or_a_loop_is_begun_and_not_waited_for(make: Make) -> None:
    bus, answers = make(), []
    bus.subscribe("a", lambda message: answers.append(bus._emergency_shutdown()))
    bus.start()
    bus.publish("a")
    eventually(lambda: not bus.running)
    assert answers == [False]

    other = make()
    other.start()

    async def main() -> bool:
        return other._emergency_shutdown()

    assert asyncio.run(main()) is False
    eventually(lambda: not other.running)
