"""CircuitBreaker: what it counts, when it refuses, and that it never stands in the way of a call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from glassbus.blocking import CircuitBreaker
from glassbus.errors import BreakerOpen, ConfigurationError
from glassbus.policy.breaker import BreakerState
from glassbus.testing import FakeClock


class Boom(Exception):
    """What the guarded calls raise."""


def boom() -> None:
    raise Boom


def fail(breaker: CircuitBreaker, times: int, error: type[BaseException] = Boom) -> None:
    def raises() -> None:
        raise error

    for _ in range(times):
        with pytest.raises(error):
            breaker.call(raises)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def breaker(clock: FakeClock) -> CircuitBreaker:
    return CircuitBreaker(3, 60.0, clock=clock)


def test_the_defaults_are_those_its_users_know() -> None:
    breaker = CircuitBreaker()
    assert (breaker.failure_threshold, breaker.recovery_timeout) == (5, 60.0)
    assert (breaker.state, breaker.failure_count, breaker.last_failure_time) == ("CLOSED", 0, None)


def test_it_passes_arguments_and_results_through(breaker: CircuitBreaker) -> None:
    assert breaker.call(divmod, 7, 2) == (3, 1)
    assert breaker.call(int, "11", base=2) == 3
    assert breaker.call(lambda **given: given, f=1, self=2) == {"f": 1, "self": 2}


def test_it_opens_after_failures_in_a_row_and_makes_no_call_then(breaker: CircuitBreaker, clock: FakeClock) -> None:
    fail(breaker, 2)
    breaker.call(lambda: None)
    assert breaker.failure_count == 0
    fail(breaker, 3)
    assert (breaker.state, breaker.failure_count, breaker.last_failure_time) == ("OPEN", 3, clock.wall())
    called: list[int] = []
    with pytest.raises(BreakerOpen) as refused:
        breaker.call(called.append, 1)
    assert isinstance(refused.value, RuntimeError)
    assert not called


@pytest.mark.parametrize("name", ["OPEN", "open", "Open", BreakerState.OPEN])
def test_its_state_is_equal_to_its_name_in_any_case(breaker: CircuitBreaker, name: str) -> None:
    fail(breaker, 3)
    assert breaker.state == name
    assert breaker.state != "CLOSED"


def test_time_alone_half_opens_it_and_one_success_closes_it(breaker: CircuitBreaker, clock: FakeClock) -> None:
    fail(breaker, 3)
    clock.advance(59.9)
    assert breaker.state == "OPEN"
    clock.advance(0.2)
    assert breaker.state == "HALF_OPEN"
    assert breaker.call(lambda: 7) == 7
    assert (breaker.state, breaker.failure_count) == ("CLOSED", 0)


def test_a_failing_probe_opens_it_for_as_long_again(breaker: CircuitBreaker, clock: FakeClock) -> None:
    fail(breaker, 3)
    clock.advance(61)
    fail(breaker, 1)
    assert breaker.state == "OPEN"
    clock.advance(59)
    with pytest.raises(BreakerOpen):
        breaker.call(boom)
    clock.advance(2)
    assert breaker.state == "HALF_OPEN"


def test_setting_the_last_failure_back_lets_time_pass(breaker: CircuitBreaker) -> None:
    fail(breaker, 3)
    assert breaker.last_failure_time is not None
    breaker.last_failure_time -= 61
    assert breaker.state == "HALF_OPEN"


def test_of_many_threads_one_alone_probes(clock: FakeClock) -> None:
    breaker = CircuitBreaker(1, 10.0, clock=clock)
    fail(breaker, 1)
    clock.advance(11)
    start, inside, leave = threading.Barrier(16), threading.Event(), threading.Event()
    outcomes: list[str] = []

    def probe() -> str:
        inside.set()
        assert leave.wait(30)
        return "probed"

    def race() -> None:
        start.wait(30)
        try:
            outcomes.append(breaker.call(probe))
        except BreakerOpen:
            outcomes.append("refused")
            if outcomes.count("refused") == 15:
                leave.set()

    threads = [threading.Thread(target=race) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == ["probed"] + ["refused"] * 15
    assert breaker.state == "CLOSED"


def test_calls_run_side_by_side_and_see_the_breaker(breaker: CircuitBreaker) -> None:
    """The lock is not held during a call: all eight are inside at once, and may ask it anything."""
    together = threading.Barrier(8)

    def inside() -> str:
        together.wait(30)
        return f"{breaker.state} {breaker.failure_count} {breaker.call(lambda: 1)}"

    seen: list[str] = []
    threads = [threading.Thread(target=lambda: seen.append(breaker.call(inside))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == ["closed 0 1"] * 8


def test_a_hanging_probe_does_not_hold_it_for_ever(clock: FakeClock) -> None:
    breaker = CircuitBreaker(1, 10.0, clock=clock)
    fail(breaker, 1)
    clock.advance(11)
    leave, inside = threading.Event(), threading.Event()

    def hang() -> None:
        inside.set()
        leave.wait(30)

    hanging = threading.Thread(target=breaker.call, args=(hang,))
    hanging.start()
    assert inside.wait(30)
    with pytest.raises(BreakerOpen):
        breaker.call(boom)
    clock.advance(61)
    assert breaker.call(lambda: "through") == "through"
    leave.set()
    hanging.join(30)


@pytest.mark.parametrize("flow", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, BreakerOpen])
def test_control_flow_is_no_failure_and_gives_its_permit_back(
    breaker: CircuitBreaker, clock: FakeClock, flow: type[BaseException]
) -> None:
    fail(breaker, 10, flow)
    assert (breaker.state, breaker.failure_count) == ("CLOSED", 0)
    fail(breaker, 3)
    clock.advance(61)
    fail(breaker, 2, flow)  # the second is let in: the first has given its permit back
    assert breaker.state == "HALF_OPEN"


def test_any_other_exception_counts_whatever_its_root(breaker: CircuitBreaker) -> None:
    class Odd(BaseException):
        def __str__(self) -> str:
            raise SystemExit

    fail(breaker, 3, Odd)
    assert breaker.state == "OPEN"


def test_an_async_call_counts_when_it_ends(breaker: CircuitBreaker) -> None:
    async def works(value: int) -> int:
        await asyncio.sleep(0)
        return value

    async def fails() -> None:
        await asyncio.sleep(0)
        raise Boom

    async def main() -> None:
        assert await breaker.call(works, 7) == 7
        for _ in range(3):
            with pytest.raises(Boom):
                await breaker.call(fails)
        assert breaker.state == "OPEN"
        with pytest.raises(BreakerOpen):
            await breaker.call(works, 7)

    asyncio.run(main())


def test_a_cancelled_async_call_is_no_failure(breaker: CircuitBreaker) -> None:
    async def main() -> None:
        task = asyncio.create_task(breaker.call(asyncio.sleep, 3600))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert breaker.failure_count == 0


def test_a_late_failure_from_before_it_opened_says_nothing_about_its_probe(clock: FakeClock) -> None:
    breaker = CircuitBreaker(1, 10.0, clock=clock)
    release, inside = threading.Event(), threading.Event()

    def slow() -> None:
        inside.set()
        release.wait(30)
        raise Boom

    def call() -> None:
        with pytest.raises(Boom):
            breaker.call(slow)

    late = threading.Thread(target=call)
    late.start()
    assert inside.wait(30)
    fail(breaker, 1)
    clock.advance(11)
    assert breaker.state == "HALF_OPEN"
    release.set()
    late.join(30)
    assert breaker.state == "HALF_OPEN"


def test_each_move_is_told_once_and_outside_the_lock(clock: FakeClock) -> None:
    moves: list[tuple[str, str]] = []
    told: Callable[[Any], None] = lambda moved: moves.append((moved.from_state, breaker.state))  # noqa: E731
    breaker = CircuitBreaker(1, 10.0, clock=clock, on_transition=told)
    fail(breaker, 1)
    clock.advance(11)
    breaker.call(lambda: None)
    breaker.force_open()
    breaker.reset()
    assert moves == [
        ("closed", "open"),
        ("open", "half_open"),
        ("half_open", "closed"),
        ("closed", "forced_open"),
        ("forced_open", "closed"),
    ]


@pytest.mark.parametrize(
    ("threshold", "timeout"),
    [(0, 1), (-1, 1), (1.5, 1), (True, 1), ("5", 1), (5, -1), (5, float("nan")), (5, float("inf")), (5, "60")],
)
def test_what_cannot_work_is_refused_by_name(threshold: Any, timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"failure_threshold|recovery_timeout"):
        CircuitBreaker(threshold, timeout)


def test_it_shows_its_state() -> None:
    assert repr(CircuitBreaker(name="cards")) == "<CircuitBreaker 'cards' closed, 0 failures in a row>"
