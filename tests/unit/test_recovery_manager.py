"""ErrorRecoveryManager: what it asks of a program's managers, and that what it answers is true."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from glassbus.blocking import ErrorRecoveryManager, timer
from glassbus.errors import ConfigurationError, ErrorCategory, ErrorReport, ErrorSeverity
from glassbus.facts import BreakerStateChanged, Fact, RecoveryConcluded, RecoveryStarted
from glassbus.telemetry import catalogue

C = ErrorCategory


class Manager:
    """A manager of a program: answers as told, and remembers what it was asked."""

    def __init__(self, **answers: Any) -> None:
        self._answers = answers
        self.asked: list[tuple[Any, ...]] = []
        self.called = threading.Event()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or name not in self._answers:
            raise AttributeError(name)

        def method(*arguments: Any) -> Any:
            self.asked.append((name, *arguments))
            self.called.set()
            answer = self._answers[name]
            if isinstance(answer, list):
                answer = answer.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            return answer() if isinstance(answer, type(lambda: 0)) else answer

        return method


def report(category: ErrorCategory, retry_count: int = 0, **context: Any) -> ErrorReport:
    return ErrorReport(
        error_id="e",
        timestamp=1.0,
        category=category,
        severity=ErrorSeverity.HIGH,
        message="it failed",
        context=context,
        retry_count=retry_count,
    )


def quick(**more: Any) -> ErrorRecoveryManager:
    """A manager whose delayed retries are due at once."""
    return ErrorRecoveryManager({"retry_configs": {c: {"backoff_factor": 0.001} for c in C}, **more})


def eventually(true: Callable[[], bool]) -> None:
    """Wait for another thread; fails loudly when it never comes."""
    patience = threading.Event()
    for _ in range(3000):
        if true():
            return
        patience.wait(0.01)
    raise AssertionError("it never became true")


# What is asked of whom


def test_the_defaults_are_those_its_users_know() -> None:
    manager = ErrorRecoveryManager({})
    shown = {c: tuple(manager.retry_configs[c].values()) for c in C}
    assert shown[C.CONNECTION_ERROR] == (3, 2.0)
    assert shown[C.MESSAGE_PROCESSING_ERROR] == (2, 1.0)
    assert shown[C.TIMEOUT_ERROR] == (2, 1.5)
    assert shown[C.SERIALIZATION_ERROR] == (1, 0.5)
    assert set(manager.recovery_strategies) == set(manager.circuit_breakers) == set(C)
    assert manager.recovery_strategies["timeout_error"] is manager.recovery_strategies[C.TIMEOUT_ERROR]  # type: ignore[index]
    assert all(breaker.state == "CLOSED" for breaker in manager.circuit_breakers.values())


CASES: list[tuple[ErrorCategory, dict[str, Any], dict[str, Any], list[tuple[Any, ...]]]] = [
    (
        C.CONNECTION_ERROR,
        {"connection_manager": {"reconnect": True}},
        {"connection_id": "c1"},
        [("reconnect", "c1")],
    ),
    (
        C.MESSAGE_PROCESSING_ERROR,
        {"message_queue": {"requeue_message": None}},
        {"message": "m1"},
        [("requeue_message", "m1")],
    ),
    (
        C.SERIALIZATION_ERROR,
        {"serializer": {"fallback_serialize": b"{}"}},
        {"data": {"a": 1}},
        [("fallback_serialize", {"a": 1})],
    ),
    (
        C.QUEUE_OVERFLOW,
        {"queue_manager": {"apply_backpressure": None, "can_expand_capacity": True, "expand_capacity": None}},
        {"queue_name": "q1"},
        [("apply_backpressure", "q1"), ("can_expand_capacity", "q1"), ("expand_capacity", "q1", 1.5)],
    ),
    (
        C.TIMEOUT_ERROR,
        {"timeout_manager": {"increase_timeout": None}},
        {"operation": "charge"},
        [("increase_timeout", "charge", 1.5)],
    ),
    (
        C.AUTHENTICATION_ERROR,
        {"credential_manager": {"refresh_credentials": None}, "connection_manager": {"reconnect": True}},
        {"connection_id": "c1"},
        [("refresh_credentials", "c1"), ("reconnect", "c1")],
    ),
    (C.RESOURCE_EXHAUSTION, {"resource_manager": {"reduce_load": None}}, {}, [("reduce_load", 0.5)]),
    (C.CONFIGURATION_ERROR, {"configuration_manager": {"reload": None}}, {}, [("reload",)]),
]


def managed(managers: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    made = {name: Manager(**answers) for name, answers in managers.items()}
    asked: list[Any] = []
    for one in made.values():
        one.asked = asked
    return {**made, **about}, asked


@pytest.mark.parametrize(("category", "managers", "about", "expected"), CASES, ids=[case[0].value for case in CASES])
def test_each_category_is_recovered_by_its_managers(
    category: C, managers: Mapping[str, Any], about: Mapping[str, Any], expected: list[Any]
) -> None:
    context, asked = managed(managers, about)
    failed = report(category)
    assert ErrorRecoveryManager({}).attempt_recovery(failed, context) is True
    assert asked == expected
    assert (failed.recovery_attempted, failed.recovery_successful) == (True, True)


@pytest.mark.parametrize(("category", "managers", "about", "expected"), CASES, ids=[case[0].value for case in CASES])
@pytest.mark.parametrize(
    "answer",
    [False, ValueError("no"), SystemExit(), lambda: time.sleep, 0],
    ids=["False", "raises", "exits", "callable", "0"],
)
def test_a_manager_that_refuses_or_raises_is_an_attempt_that_failed(
    category: C, managers: Mapping[str, Any], about: Mapping[str, Any], expected: list[Any], answer: Any
) -> None:
    """Truthy oddities count as done; everything else is False, marked, and counted by the breaker."""
    recovers = ErrorRecoveryManager({})
    context, _ = managed({name: dict.fromkeys(answers, answer) for name, answers in managers.items()}, about)
    failed = report(category)
    expected_truth = callable(answer) or (category is C.SERIALIZATION_ERROR and answer == 0 and answer is not False)
    assert recovers.attempt_recovery(failed, context) is expected_truth
    assert failed.recovery_attempted
    assert failed.recovery_successful is expected_truth
    assert recovers.circuit_breakers[category].failure_count == int(not expected_truth)


@pytest.mark.parametrize("category", list(C))
@pytest.mark.parametrize("context", [None, {}, {"message": None}, "nonsense", 7, [1]], ids=repr)
def test_without_managers_nothing_is_claimed(category: C, context: Any) -> None:
    failed = report(category)
    assert ErrorRecoveryManager({}).attempt_recovery(failed, context) is False
    assert (failed.recovery_attempted, failed.recovery_successful) == (True, False)


def test_nothing_is_no_answer_to_a_question() -> None:
    context = {"connection_manager": Manager(reconnect=None), "connection_id": "c"}
    recovers = quick()
    assert recovers.attempt_recovery(report(C.CONNECTION_ERROR, 2), context) is False
    queue = Manager(apply_backpressure=False, can_expand_capacity=None, expand_capacity=True)
    assert recovers.attempt_recovery(report(C.QUEUE_OVERFLOW), {"queue_manager": queue}) is False
    assert ("expand_capacity", None, 1.5) not in queue.asked


def test_an_async_manager_has_done_nothing() -> None:
    class Async:
        async def requeue_message(self, message: object) -> bool:
            return True

        async def add_message(self, message: object, report: object) -> bool:
            return True

    context = {"message_queue": Async(), "dead_letter_queue": Async(), "message": "m"}
    assert ErrorRecoveryManager({}).attempt_recovery(report(C.MESSAGE_PROCESSING_ERROR), context) is False


def test_what_a_serializer_made_is_in_the_context() -> None:
    context: dict[str, Any] = {"serializer": Manager(fallback_serialize=b"7"), "data": 7}
    assert ErrorRecoveryManager({}).attempt_recovery(report(C.SERIALIZATION_ERROR), context) is True
    assert context["serialized_data"] == b"7"


def test_what_it_is_about_may_stand_in_the_report() -> None:
    connections = Manager(reconnect=True)
    failed = report(C.CONNECTION_ERROR, connection_id="c9")
    assert ErrorRecoveryManager({}).attempt_recovery(failed, {"connection_manager": connections}) is True
    assert connections.asked == [("reconnect", "c9")]


# Retries


def test_a_message_is_retried_as_often_as_the_settings_say_then_dead_lettered() -> None:
    queue, dead = Manager(requeue_message=True), Manager(add_message=True)
    context = {"message_queue": queue, "dead_letter_queue": dead, "message": "m"}
    recovers, failed = quick(), report(C.MESSAGE_PROCESSING_ERROR)
    assert [recovers.attempt_recovery(failed, context) for _ in range(3)] == [True] * 3
    assert recovers.close()
    assert queue.asked == [("requeue_message", "m")] * 2
    assert dead.asked == [("add_message", "m", failed)]
    assert failed.retry_count == 2


def test_without_a_dead_letter_queue_spent_retries_are_a_failure() -> None:
    queue = Manager(requeue_message=True)
    context = {"message_queue": queue, "message": "m"}
    assert ErrorRecoveryManager({}).attempt_recovery(report(C.MESSAGE_PROCESSING_ERROR, 2), context) is False
    assert queue.asked == []


def test_a_delayed_requeue_that_fails_goes_to_the_dead_letter_queue_it_was_given() -> None:
    queue, dead = Manager(requeue_message=ValueError("gone")), Manager(add_message=None)
    context = {"message_queue": queue, "dead_letter_queue": dead, "message": "m"}
    failed = report(C.MESSAGE_PROCESSING_ERROR, 1)
    assert quick().attempt_recovery(failed, context) is True
    assert dead.called.wait(30)
    assert dead.asked == [("add_message", "m", failed)]


def test_what_fails_later_everywhere_is_marked_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    queue, dead = Manager(requeue_message=ValueError("gone")), Manager(add_message=SystemExit())
    context = {"message_queue": queue, "dead_letter_queue": dead, "message": "m"}
    recovers, failed = quick(), report(C.MESSAGE_PROCESSING_ERROR, 1)
    assert recovers.attempt_recovery(failed, context) is True
    assert recovers.close()
    assert failed.recovery_successful is False
    assert recovers.circuit_breakers[C.MESSAGE_PROCESSING_ERROR].failure_count == 1
    assert recovers.unsaved == 1
    (told,) = [record for record in caplog.records if record.name == "glassbus"]
    assert told.levelname == "ERROR"
    assert "ValueError: gone" in told.getMessage()
    assert "SystemExit" in told.getMessage()


def test_one_failure_of_a_connection_costs_its_message_one_retry() -> None:
    queue = Manager(requeue_message=None)
    failed = report(C.CONNECTION_ERROR)
    context = {"connection_manager": Manager(reconnect=[False, True]), "message_queue": queue, "connection_id": "c"}
    recovers = ErrorRecoveryManager({})
    assert recovers.attempt_recovery(failed, {**context, "message": "m"}) is True
    assert (failed.retry_count, queue.asked) == (1, [("requeue_message", "m")])
    assert recovers.close()


def test_it_sleeps_in_nobodys_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    recovers = ErrorRecoveryManager({"retry_configs": {c: {"backoff_factor": 3600.0} for c in C}})
    for category, managers, about, _ in CASES:
        for retry_count in range(4):
            context, _ = managed({name: dict.fromkeys(answers, False) for name, answers in managers.items()}, about)
            dead = {"message": "m", "dead_letter_queue": Manager(add_message=True)}
            recovers.attempt_recovery(report(category, retry_count), {**dead, **context})
    assert not slept
    recovers.close()


def test_a_delay_without_a_dead_letter_queue_would_risk_the_message_so_it_is_requeued_at_once() -> None:
    queue = Manager(requeue_message=True)
    recovers = ErrorRecoveryManager({"retry_configs": {"message_processing_error": {"backoff_factor": 3600.0}}})
    failed = report(C.MESSAGE_PROCESSING_ERROR, 1)
    assert recovers.attempt_recovery(failed, {"message_queue": queue, "message": "m"}) is True
    assert queue.asked == [("requeue_message", "m")]


def test_backoff_doubles_from_its_factor_within_its_jitter_and_is_capped() -> None:
    recovers = ErrorRecoveryManager({})
    assert recovers.backoff_s(C.CONNECTION_ERROR, 0) == 0.0
    for retry, most in ((1, 2.0), (2, 4.0), (3, 8.0), (10_000, 30.0)):
        for _ in range(50):
            assert most / 2 <= recovers.backoff_s(C.CONNECTION_ERROR, retry) <= most


def test_a_connection_that_does_not_come_at_once_is_tried_again_later() -> None:
    connections = Manager(reconnect=[False, ConnectionError(), True])
    recovers, failed = quick(), report(C.CONNECTION_ERROR)
    context = {"connection_manager": connections, "connection_id": "c1"}
    assert recovers.attempt_recovery(failed, context) is False, "it was not connected when this returned"
    eventually(lambda: failed.recovery_successful)
    assert connections.asked == [("reconnect", "c1")] * 3
    assert failed.retry_count == 3


def test_a_connection_that_never_comes_is_not_tried_for_ever_nor_twice_at_a_time() -> None:
    connections = Manager(reconnect=False)
    recovers = quick()
    context = {"connection_manager": connections, "connection_id": "c1"}
    first = report(C.CONNECTION_ERROR)
    for failed in (first, report(C.CONNECTION_ERROR)):
        assert recovers.attempt_recovery(failed, context) is False
    eventually(lambda: first.retry_count == 3 and not recovers._reconnecting)
    assert recovers.close()
    assert len(connections.asked) == 4
    assert recovers.attempt_recovery(first, context) is False
    assert len(connections.asked) == 4, "its retries are spent"


def test_settings_that_the_program_changes_hold_from_then_on() -> None:
    recovers, queue = ErrorRecoveryManager({}), Manager(requeue_message=True)
    recovers.retry_configs[C.MESSAGE_PROCESSING_ERROR]["max_retries"] = 0
    context = {"message_queue": queue, "message": "m"}
    assert recovers.attempt_recovery(report(C.MESSAGE_PROCESSING_ERROR), context) is False
    recovers.retry_configs[C.MESSAGE_PROCESSING_ERROR] = "nonsense"  # type: ignore[assignment]
    assert recovers.attempt_recovery(report(C.MESSAGE_PROCESSING_ERROR), context) is True, "back to the defaults"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"retry_configs": 7}, "retry_configs"),
        ({"retry_configs": {"no_such": {}}}, "no_such"),
        ({"retry_configs": {"timeout_error": 7}}, "timeout_error"),
        ({"retry_configs": {"timeout_error": {"max_retries": -1}}}, "max_retries"),
        ({"retry_configs": {"timeout_error": {"backoff_factor": "soon"}}}, "backoff_factor"),
        ({"circuit_breaker": {"failure_threshold": 0}}, "failure_threshold"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        ErrorRecoveryManager(config)


# Breakers


def test_an_open_breaker_asks_nobody_and_still_saves_the_message() -> None:
    recovers = ErrorRecoveryManager({"circuit_breaker": {"failure_threshold": 2, "recovery_timeout": 60.0}})
    queue = Manager(requeue_message=False)
    context: dict[str, Any] = {"message_queue": queue, "message": "m"}
    for _ in range(4):
        assert recovers.attempt_recovery(report(C.MESSAGE_PROCESSING_ERROR), context) is False
    assert len(queue.asked) == 2
    assert recovers.circuit_breakers[C.MESSAGE_PROCESSING_ERROR].state == "OPEN"
    dead = Manager(add_message=None)
    assert recovers.attempt_recovery(report(C.MESSAGE_PROCESSING_ERROR), {**context, "dead_letter_queue": dead}) is True
    assert len(queue.asked) == 2
    assert len(dead.asked) == 1
    assert recovers.circuit_breakers[C.TIMEOUT_ERROR].state == "CLOSED", "each category has its own"


def test_a_breaker_of_the_programs_own_is_used_whatever_it_does() -> None:
    class Odd:
        def __init__(self, answer: Any) -> None:
            self.answer = answer

        def call(self, f: Callable[..., Any], *_: Any) -> Any:
            if isinstance(self.answer, BaseException):
                raise self.answer
            return self.answer

    recovers = ErrorRecoveryManager({})
    for answer in (None, True, ValueError(), SystemExit()):
        recovers.circuit_breakers[C.TIMEOUT_ERROR] = Odd(answer)  # type: ignore[assignment]
        assert recovers.attempt_recovery(report(C.TIMEOUT_ERROR), {}) is False
    del recovers.circuit_breakers[C.TIMEOUT_ERROR]
    context = {"timeout_manager": Manager(increase_timeout=True)}
    assert recovers.attempt_recovery(report(C.TIMEOUT_ERROR), context) is True


# Strategies of the program's own


class Touchy:
    def __bool__(self) -> bool:
        raise RuntimeError("no truth here")


async def coroutine(*_: Any) -> bool:
    return True


@pytest.mark.parametrize(
    ("answer", "truth"),
    [(True, True), (False, False), (None, False), (1, True), ("yes", True), ("", False), (Touchy(), False)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_answer_of_a_strategy_is_a_plain_truth(answer: Any, truth: bool) -> None:
    recovers = ErrorRecoveryManager({})
    recovers.recovery_strategies[C.TIMEOUT_ERROR] = lambda report, context: answer
    failed = report(C.TIMEOUT_ERROR)
    assert recovers.attempt_recovery(failed, {}) is truth
    assert failed.recovery_successful is truth


def test_a_strategy_that_raises_is_async_or_missing_recovers_nothing() -> None:
    recovers = ErrorRecoveryManager({})

    def raises(*_: Any) -> bool:
        raise GeneratorExit

    for strategy in (raises, coroutine, None, 7):
        recovers.recovery_strategies[C.TIMEOUT_ERROR] = strategy  # type: ignore[assignment]
        assert recovers.attempt_recovery(report(C.TIMEOUT_ERROR), {}) is False


def test_a_built_in_strategy_can_be_called_by_another() -> None:
    recovers = ErrorRecoveryManager({})
    usual = recovers.recovery_strategies[C.TIMEOUT_ERROR]
    seen: list[Any] = []

    def mine(report: Any, context: Any) -> Any:
        seen.append(report)
        return usual(report, context)

    recovers.recovery_strategies[C.TIMEOUT_ERROR] = mine
    context = {"timeout_manager": Manager(increase_timeout=True)}
    assert recovers.attempt_recovery(report(C.TIMEOUT_ERROR), context) is True
    assert len(seen) == 1


# Whatever it is given


class Hostile:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class Frozen:
    __slots__ = ()
    category = "TIMEOUT_ERROR"


@pytest.mark.parametrize(
    ("make", "is_timeout"),
    [
        (lambda: None, False),
        (lambda: 7, False),
        (lambda: "report", False),
        (dict, False),
        (lambda: {"category": "timeout_error"}, True),
        (Hostile, False),
        (Frozen, True),
    ],
)
def test_anything_may_be_reported_and_nothing_is_raised(make: Callable[[], Any], is_timeout: bool) -> None:
    context = {"timeout_manager": Manager(increase_timeout=True), "message_queue": Hostile(), "dead_letter_queue": 7}
    assert ErrorRecoveryManager({}).attempt_recovery(make(), context) is is_timeout


def test_a_plain_dict_is_a_report_too_and_is_marked() -> None:
    failed = {"category": "timeout_error"}
    assert ErrorRecoveryManager({}).attempt_recovery(failed, {"timeout_manager": Manager(increase_timeout=1)}) is True  # type: ignore[arg-type]
    assert failed == {
        "category": "timeout_error",
        "recovery_attempted": True,
        "recovery_successful": True,
        "retry_count": 1,
    }


def test_the_person_at_the_keyboard_is_heard() -> None:
    context = {"timeout_manager": Manager(increase_timeout=KeyboardInterrupt())}
    recovers = ErrorRecoveryManager({})
    with pytest.raises(KeyboardInterrupt):
        recovers.attempt_recovery(report(C.TIMEOUT_ERROR), context)
    assert recovers.circuit_breakers[C.TIMEOUT_ERROR].failure_count == 0


def test_many_threads_at_once_get_the_truth_each() -> None:
    recovers = quick()
    queue, dead = Manager(requeue_message=True), Manager(add_message=True)
    answers: list[bool] = []

    def work() -> None:
        for n in range(200):
            context = {"message_queue": queue, "dead_letter_queue": dead, "message": n}
            answers.append(recovers.attempt_recovery(report(C.MESSAGE_PROCESSING_ERROR, n % 3), context))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert recovers.close(30)
    assert answers == [True] * 1600
    assert len(queue.asked) + len(dead.asked) == 1600, "each message was given back or laid to rest, once"


# Facts


def test_what_it_does_is_told() -> None:
    told: list[Fact] = []
    recovers = ErrorRecoveryManager({"circuit_breaker": {"failure_threshold": 1}}, state=told.append)
    assert recovers.attempt_recovery(report(C.TIMEOUT_ERROR), {"timeout_manager": Manager(increase_timeout=True)})
    assert not recovers.attempt_recovery(report(C.CONNECTION_ERROR, 3), {"connection_id": "c1"})
    assert not recovers.attempt_recovery(report(C.CONNECTION_ERROR, 3), {"connection_id": "c1"})
    shown = [
        (type(fact).__name__, getattr(fact, "component", ""), getattr(fact, "action", ""), getattr(fact, "outcome", ""))
        for fact in told
    ]
    assert shown == [
        ("RecoveryStarted", "handler", "increase_timeout", ""),
        ("RecoveryConcluded", "handler", "increase_timeout", "succeeded"),
        ("RecoveryStarted", "endpoint", "reconnect", ""),
        ("BreakerStateChanged", "", "", ""),
        ("RecoveryConcluded", "endpoint", "none", "failed"),
        ("RecoveryConcluded", "endpoint", "reconnect", "refused"),
    ]
    assert isinstance(told[3], BreakerStateChanged)
    assert told[3].breaker == "recovery/connection_error"
    assert isinstance(told[4], RecoveryConcluded)
    assert told[4].target == "c1"


def test_a_scheduled_retry_is_concluded_when_it_ends() -> None:
    told: list[Fact] = []
    recovers = ErrorRecoveryManager(
        {"retry_configs": {"message_processing_error": {"backoff_factor": 0.001}}}, state=told.append
    )
    context = {
        "message_queue": Manager(requeue_message=True),
        "dead_letter_queue": Manager(add_message=True),
        "message": "m",
    }
    assert recovers.attempt_recovery(report(C.MESSAGE_PROCESSING_ERROR, 1), context)
    assert recovers.close()
    assert [type(fact) for fact in told] == [RecoveryStarted, RecoveryConcluded]
    assert isinstance(told[1], RecoveryConcluded)
    assert (told[1].action, told[1].outcome) == ("delayed_retry", "succeeded")


def test_every_action_it_tells_is_declared() -> None:
    told: list[Fact] = []
    recovers = ErrorRecoveryManager({"circuit_breaker": {"failure_threshold": 100}}, state=told.append)
    for category, managers, about, _ in CASES:
        for answer in (True, False):
            for retry_count in (0, 9):
                context, _ = managed({n: dict.fromkeys(a, answer) for n, a in managers.items()}, about)
                recovers.attempt_recovery(report(category, retry_count), context)
                recovers.attempt_recovery(report(category, retry_count), {"message": "m", **context})
    recovers.recovery_strategies[C.TIMEOUT_ERROR] = lambda *_: True
    recovers.attempt_recovery(report(C.TIMEOUT_ERROR), {})
    recovers.close()
    actions = {fact.action for fact in told if isinstance(fact, RecoveryStarted | RecoveryConcluded)}
    assert actions <= set(catalogue.ACTIONS)
    assert len(actions) > 8


# The timer


def test_a_job_that_hangs_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "HANGING_AFTER_S", 0.05)
    late = timer.Timer("test")
    leave, done = threading.Event(), threading.Event()

    def hang() -> None:
        leave.wait(30)

    assert late.schedule(0.0, hang)
    assert late.schedule(0.0, done.set)
    assert done.wait(30)
    leave.set()
    assert late.close(30)


def test_jobs_run_in_the_order_they_are_due() -> None:
    late = timer.Timer("test")
    ran: list[int] = []
    for number in (3, 1, 2):
        late.schedule(number * 0.02, lambda number=number: ran.append(number))  # type: ignore[misc]
    eventually(lambda: len(ran) == 3)
    assert ran == [1, 2, 3]
    assert late.close()


def test_a_timer_that_holds_all_it_may_refuses_and_the_message_is_saved_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timer, "PENDING_MAX", 1)
    recovers = ErrorRecoveryManager({"retry_configs": {"message_processing_error": {"backoff_factor": 3600.0}}})
    queue, dead = Manager(requeue_message=True), Manager(add_message=True)
    for message in "ab":
        context = {"message_queue": queue, "dead_letter_queue": dead, "message": message}
        assert recovers.attempt_recovery(report(C.MESSAGE_PROCESSING_ERROR, 1), context) is True
    assert queue.asked == [("requeue_message", "b")]
    assert recovers.close()
    assert queue.asked == [("requeue_message", "b"), ("requeue_message", "a")], "closing runs what waits at once"


_LEAVES = """
from glassbus.blocking import ErrorRecoveryManager
from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity
class Queue:
    def requeue_message(self, message): print("back", message, flush=True)
    def add_message(self, message, report): print("dead", message, flush=True)
manager = ErrorRecoveryManager({"retry_configs": {"message_processing_error": {"backoff_factor": 3600.0}}})
report = ErrorReport(error_id="e", timestamp=0.0, category=ErrorCategory.MESSAGE_PROCESSING_ERROR,
                     severity=ErrorSeverity.LOW, message="", retry_count=1)
queue = Queue()
assert manager.attempt_recovery(report, {"message_queue": queue, "dead_letter_queue": queue, "message": "m"}) is True
"""


def test_a_program_that_ends_gives_back_what_waited() -> None:
    ran = subprocess.run([sys.executable, "-c", _LEAVES], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("back m\n", "", 0)


_FORKS = """
import os
pid = os.fork()
if pid:
    os.waitpid(pid, 0)
else:
    report.retry_count = 1
    context = {"message_queue": queue, "dead_letter_queue": queue, "message": "c"}
    assert manager.attempt_recovery(report, context) is True
    manager.close()
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(sys, "getswitchinterval") or sys.platform == "win32", reason="needs fork")
def test_a_forked_child_runs_its_own_and_not_what_waits_in_the_parent() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _LEAVES + _FORKS],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("back c\nback m\n", "", 0)
