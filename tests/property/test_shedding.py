"""Load shed on exhaustion and regained step by step: what holds whatever happens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from glassbus.policy.shedding import IDLE_S, STEP_S, STEPS, Shed, Shedding

FULL = st.integers(1, 10_000)
HAPPENINGS = st.lists(
    st.tuples(st.sampled_from(["exhausted", "stale", "succeeded", "regain", "resize"]), st.floats(0, 20)), max_size=80
)


@given(FULL, HAPPENINGS)
def test_between_one_and_all_always_and_all_again_after_quiet(full: int, happenings: list[tuple[str, float]]) -> None:
    load, now = Shedding(full), 0.0
    for what, passed_s in happenings:
        now += passed_s
        before = load.limit
        if what == "exhausted":
            load.exhausted(now, now)
            assert max(1, before // 2) <= load.limit <= before
            assert load.low_held
        elif what == "stale":
            assert load.exhausted(float("-inf"), now) in Shed
        elif what == "succeeded":
            load.succeeded()
        elif what == "regain":
            stepped = load.regain(now)
            assert load.limit >= before
            assert stepped or load.limit == before
        else:
            load.resize(max(1, int(passed_s)))
        assert 1 <= load.limit <= load.full
    now += IDLE_S
    for _ in range(STEPS + 2):
        load.regain(now)
        now += STEP_S
    assert not load.shed
    assert load.limit == load.full


def test_halved_down_to_one_and_then_it_does_not_help() -> None:
    load = Shedding(8)
    found = [(load.exhausted(float(n), float(n)), load.limit) for n in range(5)]
    assert found == [(Shed.HALVED, 4), (Shed.HALVED, 2), (Shed.HALVED, 1), (Shed.AT_BOTTOM, 1), (Shed.AT_BOTTOM, 1)]


def test_the_last_slot_is_given_a_second_each_time_to_help() -> None:
    load = Shedding(1)
    found = [n for n in range(31) if load.exhausted(n / 10, n / 10) is Shed.AT_BOTTOM]
    assert found == [10, 20, 30]


def test_with_one_slot_low_priority_is_what_can_be_shed() -> None:
    load = Shedding(1)
    assert load.exhausted(0, 0) is Shed.HALVED
    assert (load.limit, load.low_held, load.shed) == (1, True, True)
    assert load.exhausted(1, 1) is Shed.AT_BOTTOM


def test_attempts_that_fail_side_by_side_shed_once() -> None:
    load = Shedding(64)
    assert load.exhausted(0.0, 10.0) is Shed.HALVED
    assert [load.exhausted(float(n), 10.5) for n in range(9)] == [Shed.NOTHING] * 9
    assert load.limit == 32


def test_a_step_a_second_once_an_attempt_succeeded_and_low_priority_last() -> None:
    load = Shedding(16)
    for n in range(5):
        load.exhausted(float(n), float(n))
    assert not load.regain(4 + STEP_S)
    load.succeeded()
    regained = [(load.limit, load.low_held) for n in range(20) if load.regain(4 + STEP_S + n)]
    assert regained == [(n, True) for n in range(3, 16, 2)] + [(16, True), (16, False)]


def test_without_any_attempt_to_tell_it_is_tried_after_a_while() -> None:
    load = Shedding(2)
    load.exhausted(0, 0)
    assert not load.regain(IDLE_S - 0.1)
    assert load.regain(IDLE_S)


def test_steps_are_not_taken_faster_than_one_a_second() -> None:
    load = Shedding(8)
    load.exhausted(0, 0)
    load.succeeded()
    assert [load.regain(n / 4) for n in range(4, 13)] == [n % 4 == 0 for n in range(4, 13)]
