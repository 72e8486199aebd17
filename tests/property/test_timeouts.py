"""A timeout that gives way and comes back: what holds whatever happens."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus.errors import ConfigurationError
from glassbus.policy.timeouts import HALF_LIFE_MIN_S, AdaptiveTimeout, TimeoutInForce

OWN = st.floats(1e-3, 1e4)
SETTINGS = st.builds(AdaptiveTimeout, factor=st.floats(1, 10), cap=st.floats(1, 50), half_life=st.floats(0, 100))
STEPS = st.lists(st.tuples(st.sampled_from(["timed_out", "needed", "passed"]), st.floats(0, 1)), max_size=60)


def walk(timeout: TimeoutInForce, steps: list[tuple[str, float]], *, until: float = 1e6) -> float:
    """Let `steps` happen; the time at the end."""
    now = 0.0
    for what, share in steps:
        if what == "timed_out":
            timeout.timed_out(timeout.in_force_s)
        elif what == "needed":
            timeout.needed(timeout.own_s + share * (timeout.in_force_s - timeout.own_s))
        else:
            now += share * until / 60
            timeout.pass_to(now)
    return now


@given(OWN, st.floats(1, 20), SETTINGS, STEPS)
def test_never_below_its_own_nor_above_its_cap_nor_past_half_of_abandon_after(
    own_s: float, abandon: float, settings: AdaptiveTimeout, steps: list[tuple[str, float]]
) -> None:
    timeout = TimeoutInForce(own_s, own_s * abandon, settings, 0.0)
    for until in range(len(steps)):
        walk(timeout, steps[until : until + 1])
        assert own_s <= timeout.in_force_s <= max(own_s, min(own_s * settings.cap, own_s * abandon / 2)) * (1 + 1e-12)


@given(OWN, SETTINGS, STEPS)
def test_it_returns_to_its_own_value_exactly(
    own_s: float, settings: AdaptiveTimeout, steps: list[tuple[str, float]]
) -> None:
    timeout = TimeoutInForce(own_s, own_s * 1000, settings, 0.0)
    now = walk(timeout, steps)
    half_life_s = max(HALF_LIFE_MIN_S, settings.half_life * own_s)
    for _ in range(200):
        now += half_life_s
        timeout.pass_to(now)
    assert timeout.in_force_s == own_s


@given(OWN, SETTINGS, STEPS, st.lists(st.floats(0, 1e3), max_size=10))
def test_time_alone_never_lengthens_it_and_a_timeout_never_shortens_it(
    own_s: float, settings: AdaptiveTimeout, steps: list[tuple[str, float]], passes: list[float]
) -> None:
    timeout = TimeoutInForce(own_s, own_s * 100, settings, 0.0)
    now = walk(timeout, steps)
    for passed_s in passes:
        before = timeout.in_force_s
        now += passed_s
        timeout.pass_to(now)
        assert timeout.in_force_s <= before
        before = timeout.in_force_s
        timeout.timed_out(before)
        assert timeout.in_force_s >= before


@given(st.integers(1, 500))
def test_attempts_that_time_out_side_by_side_stretch_it_once(together: int) -> None:
    timeout = TimeoutInForce(2.0, 20.0, AdaptiveTimeout(), 0.0)
    for _ in range(together):
        timeout.timed_out(2.0)
    assert timeout.in_force_s == 3.0


def test_each_attempt_of_a_slow_message_gets_more_up_to_the_cap() -> None:
    timeout = TimeoutInForce(2.0, 20.0, AdaptiveTimeout(), 0.0)
    had = []
    for _ in range(5):
        had.append(timeout.in_force_s)
        timeout.timed_out(timeout.in_force_s)
    assert had == [2.0, 3.0, 4.5, 6.75, 8.0]


def test_a_cap_of_one_keeps_it_as_it_is() -> None:
    timeout = TimeoutInForce(2.0, 20.0, AdaptiveTimeout(cap=1), 0.0)
    timeout.timed_out(2.0)
    assert timeout.in_force_s == 2.0


def test_what_was_added_is_halved_and_not_below_what_successes_needed() -> None:
    timeout = TimeoutInForce(2.0, 20.0, AdaptiveTimeout(half_life=2), 0.0)
    timeout.timed_out(2.0)
    timeout.pass_to(4.0)
    assert timeout.in_force_s == 2.5
    timeout.needed(2.4)
    assert timeout.in_force_s == pytest.approx(2.88), "with headroom"
    timeout.pass_to(8.0)
    assert 2.6 < timeout.in_force_s < 2.88
    timeout.pass_to(200.0)
    assert timeout.in_force_s == 2.0


def test_attempts_that_take_the_same_again_and_again_never_time_out_again() -> None:
    """One timeout teaches it; a success a while keeps it."""
    timeout, now = TimeoutInForce(2.0, 20.0, AdaptiveTimeout(), 0.0), 0.0
    timeout.timed_out(2.0)
    for _ in range(500):
        now += 2.5
        timeout.pass_to(now)
        assert timeout.in_force_s > 2.5
        timeout.needed(2.5)


def test_other_settings_hold_at_once() -> None:
    timeout = TimeoutInForce(2.0, 20.0, AdaptiveTimeout(), 0.0)
    timeout.timed_out(2.0)
    timeout.tune(2.0, 20.0, AdaptiveTimeout(cap=1.25))
    assert timeout.in_force_s == 2.5
    timeout.tune(1.0, 4.0, AdaptiveTimeout())
    assert (timeout.own_s, timeout.in_force_s) == (1.0, 1.0)


@pytest.mark.parametrize(
    "wrong", [{"factor": 0.9}, {"cap": 0}, {"half_life": -1}, {"cap": math.inf}, {"factor": math.nan}, {"cap": "4"}]
)
def test_settings_that_cannot_work_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        AdaptiveTimeout(**wrong)
