"""The failover set: which endpoint is dialled next, and when. Pure, so every schedule can be played."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassbus.errors import ConfigurationError
from glassbus.policy.breaker import BreakerState
from glassbus.policy.failover import LEGAL, Dial, FailoverSet, Link, Reconnect

SETTINGS = Reconnect()


def half() -> float:
    return 0.5


def made(count: int = 1, settings: Reconnect = SETTINGS, now: float = 0.0) -> FailoverSet:
    found = FailoverSet(count, settings, half)
    found.start(now)
    return found


def until_dial(failover: FailoverSet, now: float) -> tuple[Dial, float]:
    for _ in range(1000):
        step = failover.next(now)
        if isinstance(step, Dial):
            return step, now
        assert step > now or failover.next(step) != step
        now = step
    raise AssertionError("it never dials")


def connected(failover: FailoverSet, now: float) -> float:
    _, now = until_dial(failover, now)
    failover.connected(now)
    return now


def test_a_lost_endpoint_is_dialled_first_and_the_others_a_second_later() -> None:
    failover = made(3)
    now = connected(failover, 0.0)
    failover.lost(now + 60)
    dialled: list[int] = []
    now += 60
    lost_at = now
    while len(set(dialled)) < 3:
        step, now = until_dial(failover, now)
        if step.endpoint != 0:
            assert now >= lost_at + SETTINGS.failover_after
        dialled.append(step.endpoint)
        failover.failed(now)
    assert dialled[0] == 0
    assert dialled.count(0) > 1, "the endpoint in use gets a few tries of its own"
    assert [e for e in dialled if e] == [1, 2], "then the others, in the order of the list"


def test_it_stays_where_it_is_after_a_failover_and_goes_round_from_there() -> None:
    failover = made(3)
    now = connected(failover, 0.0)
    failover.lost(now + 60)
    now += 60
    while True:
        step, now = until_dial(failover, now)
        if step.endpoint == 1:
            break
        failover.failed(now)
    failover.connected(now)
    assert failover.current == 1
    now += 600
    failover.lost(now)
    order: list[int] = []
    while len(order) < 3:
        step, now = until_dial(failover, now)
        failover.failed(now)
        if step.endpoint not in order:
            order.append(step.endpoint)
    assert order == [1, 2, 0]


def test_a_breaker_opens_after_failures_in_a_row_and_each_probe_is_paced() -> None:
    failover = made(1)
    now, times = 0.0, []
    for _ in range(20):
        _, now = until_dial(failover, now)
        times.append(now)
        failover.failed(now)
    states = [moved.transition.to_state for moved in failover.take_moves()]
    assert states[0] is BreakerState.OPEN
    assert states[1:3] == [BreakerState.HALF_OPEN, BreakerState.OPEN]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(gap >= SETTINGS.open_for for gap in gaps[SETTINGS.failures - 1 :])
    assert gaps[-1] == pytest.approx(SETTINGS.open_for + 0.5), "spread, so that many do not dial together"


def test_a_refusing_endpoint_is_left_alone_for_minutes_and_then_looked_at_once() -> None:
    failover = made(1)
    _, now = until_dial(failover, 0.0)
    failover.refused(now)
    assert failover.link is Link.REFUSED
    assert failover.breaker(0).state is BreakerState.FORCED_OPEN
    step, later = until_dial(failover, now)
    assert step.trial
    assert later - now >= SETTINGS.refused_again
    failover.connected(later)
    assert failover.breaker(0).state is BreakerState.CLOSED


def test_it_is_never_looked_at_again_when_so_configured_but_for_an_operator() -> None:
    failover = made(1, Reconnect(refused_again=math.inf))
    _, now = until_dial(failover, 0.0)
    failover.refused(now)
    assert failover.next(now + 1e9) == math.inf
    failover.reset(now + 1e9)
    assert failover.next(now + 1e9) == Dial(0)


def test_a_refused_endpoint_does_not_go_before_others_that_may_work() -> None:
    failover = made(2)
    _, now = until_dial(failover, 0.0)
    failover.refused(now)
    step, now = until_dial(failover, now)
    assert step == Dial(1)
    failover.connected(now)
    now += 10_000
    failover.lost(now)
    step, now = until_dial(failover, now)
    assert step == Dial(1)


def test_a_connection_that_does_not_hold_is_dialled_ever_more_slowly() -> None:
    failover = made(1)
    now, gaps = 0.0, []
    for _ in range(12):
        lost_at = now
        _, now = until_dial(failover, now)
        gaps.append(now - lost_at)
        failover.connected(now)
        now += 0.01
        failover.lost(now)
    assert gaps[-1] == pytest.approx(SETTINGS.max_delay / 2)
    assert gaps[2] < gaps[6]
    _, now = until_dial(failover, now)
    failover.connected(now)
    now += SETTINGS.steady_after
    failover.lost(now)
    assert isinstance(failover.next(now + SETTINGS.base_delay), Dial), "one that held starts anew"


def test_credentials_may_be_refreshed_again_only_after_a_connection_that_held() -> None:
    failover = made(1)
    now = connected(failover, 0.0)
    failover.refreshed = True
    failover.lost(now + 0.1)
    assert failover.refreshed
    now = connected(failover, now + 0.1)
    failover.lost(now + SETTINGS.steady_after)
    assert not failover.refreshed


Step = st.sampled_from(["connected", "failed", "refused", "put_off"])


@settings(max_examples=300)
@given(
    count=st.integers(1, 5),
    steps=st.lists(st.tuples(Step, st.floats(0, 20), st.floats(0, 0.999)), max_size=60),
)
def test_whatever_happens_it_dials_soon_never_two_at_once_and_moves_legally(
    count: int, steps: list[tuple[str, float, float]]
) -> None:
    """Unless all refuse: an endpoint is dialled within the longest delay, whatever was before."""
    chance = [0.0]
    failover = FailoverSet(count, SETTINGS, lambda: chance[0])
    now = 0.0
    before = failover.link
    failover.start(now)
    for what, passes, drawn in steps:
        chance[0] = drawn
        all_refuse = all(failover.breaker(n).state is BreakerState.FORCED_OPEN for n in range(count))
        assert (failover.link is Link.REFUSED) == all_refuse
        asked_at = now
        step, now = until_dial(failover, now)
        assert failover.link is Link.DIALLING
        assert step.trial == (failover.breaker(step.endpoint).state is BreakerState.FORCED_OPEN)
        if not all_refuse and not step.trial:
            assert now - asked_at <= max(SETTINGS.max_delay, SETTINGS.open_for + 1.0) + 1e-3
        before = failover.link
        if what == "connected":
            failover.connected(now)
            assert failover.current == step.endpoint
            now += passes
            failover.lost(now)
            assert failover.attempts == 0
        elif what == "failed":
            failover.failed(now)
        elif what == "refused":
            failover.refused(now)
            assert failover.breaker(step.endpoint).state is BreakerState.FORCED_OPEN
        elif not step.trial:
            failover.put_off(now)
        else:
            failover.failed(now)
        assert failover.link in LEGAL[before] | {before} | LEGAL[Link.UP]
    failover.stop()


def test_an_illegal_move_raises() -> None:
    failover = made(1)
    with pytest.raises(AssertionError, match="illegal move"):
        failover.connected(0.0)
    failover.stop()
    with pytest.raises(AssertionError):
        failover.next(0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"failures": 0},
        {"failures": 1.5},
        {"failures": True},
        {"base_delay": 0},
        {"dial_timeout": math.inf},
        {"probe_every": math.nan},
        {"start_timeout": "10"},
        {"base_delay": 3.0},
        {"refused_again": -1.0},
        {"open_for": True},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="Reconnect"):
        Reconnect(**wrong)  # type: ignore[arg-type]


def test_a_set_has_an_endpoint() -> None:
    with pytest.raises(ConfigurationError):
        FailoverSet(0, SETTINGS, half)
