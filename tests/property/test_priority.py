"""Weighted turns: exact shares, evenly spread, nobody starves, no turn is lost on an empty queue."""

from __future__ import annotations

import itertools
from collections import Counter, deque

from hypothesis import given
from hypothesis import strategies as st

from glassbus.message import Priority
from glassbus.policy.priority import CYCLE, WEIGHTS, PriorityTurn

TOTAL = sum(WEIGHTS.values())


def test_the_weights_are_as_documented() -> None:
    assert WEIGHTS == {Priority.CRITICAL: 8, Priority.HIGH: 4, Priority.NORMAL: 2, Priority.LOW: 1}


def test_shares_over_a_cycle_are_exactly_the_weights() -> None:
    assert Counter(CYCLE) == Counter({int(p): w for p, w in WEIGHTS.items()})


@given(st.integers(0, 200))
def test_any_window_of_a_cycle_holds_the_exact_shares(skip: int) -> None:
    turn = PriorityTurn()
    for _ in range(skip):
        turn.order()
    firsts = Counter(turn.order()[0] for _ in range(TOTAL))
    assert firsts == Counter({int(p): w for p, w in WEIGHTS.items()})


def test_turns_are_spread_and_not_bunched() -> None:
    doubled = CYCLE * 2
    for priority, weight in WEIGHTS.items():
        at = [i for i, p in enumerate(doubled) if p == priority]
        longest = max(b - a for a, b in itertools.pairwise(at))
        assert longest <= 2 * TOTAL / weight


def test_every_order_names_each_priority_once_with_the_rest_descending() -> None:
    turn = PriorityTurn()
    for _ in range(TOTAL):
        first, *rest = turn.order()
        assert sorted([first, *rest]) == [0, 1, 2, 3]
        assert rest == sorted(rest, reverse=True)


@given(st.lists(st.sampled_from(list(Priority)), min_size=1, max_size=60))
def test_nothing_that_waits_is_passed_over_for_longer_than_a_cycle(waiting: list[Priority]) -> None:
    """Each claim takes something, and a waiting LOW goes within one cycle, however much waits above it."""
    lanes = {int(p): deque(i for i, w in enumerate(waiting) if w is p) for p in Priority}
    turn = PriorityTurn()
    taken: list[int] = []
    while any(lanes.values()):
        for priority in turn.order():
            if lanes[priority]:
                taken.append(priority)
                lanes[priority].popleft()
                break
        else:
            raise AssertionError("a claim found nothing although something waits")
    low = [i for i, p in enumerate(taken) if p == Priority.LOW]
    assert all(b - a <= TOTAL for a, b in zip([-1, *low], low, strict=False))
