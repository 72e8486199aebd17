"""One breaker for each (component, category): what it admits, what it states, and what it never locks."""

from __future__ import annotations

import threading

import pytest

from glassbus.errors import ErrorCategory
from glassbus.facts import BreakerStateChanged, RecoveryConcluded, RecoveryStarted
from glassbus.observer import Hub
from glassbus.recovery.guard import ComponentBreakers, Permit
from glassbus.testing import FakeClock, RecordingObserver
from tests.facts_kit import DELIVERY

CONNECTION = ErrorCategory.CONNECTION_ERROR


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def seen() -> RecordingObserver:
    return RecordingObserver()


@pytest.fixture
def breakers(clock: FakeClock, seen: RecordingObserver) -> ComponentBreakers:
    return ComponentBreakers(Hub(clock.wall, [seen]), clock)


def admitted(breakers: ComponentBreakers) -> Permit:
    permit = breakers.admit("endpoint", CONNECTION)
    assert permit is not None
    return permit


def open_it(breakers: ComponentBreakers) -> None:
    for _ in range(5):
        breakers.failed(admitted(breakers), DELIVERY)


def test_five_failures_in_a_row_open_it_and_the_fact_names_their_causes(
    breakers: ComponentBreakers, seen: RecordingObserver
) -> None:
    for _ in range(4):
        breakers.failed(admitted(breakers))
    breakers.succeeded(admitted(breakers))
    open_it(breakers)
    assert breakers.admit("endpoint", CONNECTION) is None
    [opened] = seen.of(BreakerStateChanged)
    assert (opened.breaker, opened.kind, opened.subscription) == ("endpoint/connection_error", "component", "")
    assert (opened.from_state, opened.to_state) == ("closed", "open")
    assert len(opened.causes) == 5
    assert all(cause.envelope.body == b"" for cause in opened.causes), "no payload is kept"


def test_each_pair_has_its_own(breakers: ComponentBreakers) -> None:
    open_it(breakers)
    assert breakers.admit("endpoint", ErrorCategory.TIMEOUT_ERROR) is not None
    assert breakers.admit("queue", CONNECTION) is not None


def test_after_a_while_one_probe_is_admitted_and_its_result_decides(
    breakers: ComponentBreakers, clock: FakeClock, seen: RecordingObserver
) -> None:
    open_it(breakers)
    clock.advance(19)
    breakers.look()
    assert breakers.admit("endpoint", CONNECTION) is None
    clock.advance(1)
    breakers.look()
    assert breakers.state("endpoint", CONNECTION) == "half_open"
    probe = admitted(breakers)
    assert breakers.admit("endpoint", CONNECTION) is None
    breakers.failed(probe)
    assert breakers.state("endpoint", CONNECTION) == "open"
    clock.advance(20)
    breakers.succeeded(admitted(breakers))
    assert [f.to_state for f in seen.of(BreakerStateChanged)] == ["open", "half_open", "open", "half_open", "closed"]


def test_a_released_permit_says_nothing(breakers: ComponentBreakers, clock: FakeClock) -> None:
    open_it(breakers)
    clock.advance(20)
    breakers.release(admitted(breakers))
    assert breakers.state("endpoint", CONNECTION) == "half_open"
    breakers.succeeded(admitted(breakers))
    assert breakers.state("endpoint", CONNECTION) == "closed"


def test_forced_open_refuses_until_reset(breakers: ComponentBreakers, clock: FakeClock) -> None:
    breakers.force_open("endpoint", ErrorCategory.AUTHENTICATION_ERROR)
    clock.advance(1e6)
    breakers.look()
    assert breakers.admit("endpoint", ErrorCategory.AUTHENTICATION_ERROR) is None
    breakers.reset("endpoint", ErrorCategory.AUTHENTICATION_ERROR)
    assert breakers.admit("endpoint", ErrorCategory.AUTHENTICATION_ERROR) is not None


def test_what_telemetry_reads(breakers: ComponentBreakers) -> None:
    breakers.succeeded(admitted(breakers))
    open_it(breakers)
    breakers.admit("endpoint", CONNECTION)
    [view] = breakers.views()
    assert (view.name, view.kind, view.subscription, view.state) == (
        "endpoint/connection_error",
        "component",
        "",
        "open",
    )
    assert (view.succeeded_count, view.failed_count, view.refused) == (1, 5, 1)


def test_a_recovery_states_its_start_and_its_end_once(
    breakers: ComponentBreakers, clock: FakeClock, seen: RecordingObserver
) -> None:
    failed_at = clock.monotonic()
    clock.advance(2)
    recovery = breakers.begin(
        "endpoint", CONNECTION, "reconnect", "nats://a", error=OSError("gone"), attempt=3, first_failed_at=failed_at
    )
    assert recovery is not None
    clock.advance(1)
    recovery.succeeded()
    recovery.failed("too late to matter")
    [started] = seen.of(RecoveryStarted)
    [concluded] = seen.of(RecoveryConcluded)
    assert (started.action, started.target, started.attempt, started.error) == (
        "reconnect",
        "nats://a",
        3,
        "OSError: gone",
    )
    assert (concluded.outcome, concluded.attempt) == ("succeeded", 3)
    assert concluded.duration_s == pytest.approx(3.0)


def test_a_refused_recovery_states_that_alone(breakers: ComponentBreakers, seen: RecordingObserver) -> None:
    open_it(breakers)
    assert breakers.begin("endpoint", CONNECTION, "reconnect", "nats://a") is None
    assert seen.of(RecoveryStarted) == []
    [refused] = seen.of(RecoveryConcluded)
    assert refused.outcome == "refused"


def test_one_called_off_is_not_counted(breakers: ComponentBreakers, seen: RecordingObserver) -> None:
    for _ in range(10):
        recovery = breakers.begin("endpoint", CONNECTION, "reconnect", "nats://a")
        assert recovery is not None
        recovery.cancelled()
    assert breakers.state("endpoint", CONNECTION) == "closed"
    assert {f.outcome for f in seen.of(RecoveryConcluded)} == {"called_off"}


class HostileError(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


def test_a_hostile_exception_is_told_of_all_the_same(breakers: ComponentBreakers, seen: RecordingObserver) -> None:
    recovery = breakers.begin("endpoint", CONNECTION, "reconnect", "nats://a", error=HostileError())
    assert recovery is not None
    recovery.failed(HostileError())
    assert "HostileError" in seen.of(RecoveryConcluded)[0].error


def test_nothing_is_locked_while_a_recovery_runs_or_a_fact_is_shown(clock: FakeClock) -> None:
    """Another thread gets its permit while an observer of the opening still looks at it."""
    hub = Hub(clock.wall)
    breakers = ComponentBreakers(hub, clock, threshold=1)
    answered: list[object] = []

    class Slow:
        def on_fact(self, fact: object, /) -> None:
            other = threading.Thread(target=lambda: answered.append(breakers.admit("endpoint", CONNECTION)))
            other.start()
            other.join(10)

    hub.add(Slow())  # type: ignore[arg-type]
    breakers.failed(admitted(breakers))
    assert answered == [None]


def test_permits_from_many_threads_are_all_counted(breakers: ComponentBreakers) -> None:
    def work() -> None:
        for _ in range(200):
            breakers.succeeded(admitted(breakers))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert breakers.views()[0].succeeded_count == 800
