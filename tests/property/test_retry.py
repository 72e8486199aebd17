"""When a failed delivery is tried again, and what bounds the load of retries."""

from __future__ import annotations

import itertools
import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus.errors import ConfigurationError
from glassbus.policy.retry import Retry, RetryBudget

FINITE = st.floats(0, 1e300, allow_nan=False)
RETRY = st.builds(
    Retry,
    max_attempts=st.integers(1, 1_000_000),
    immediate=st.integers(0, 10),
    base_delay=FINITE,
    multiplier=st.floats(1, 1e300),
    max_delay=FINITE,
)


@given(RETRY, st.integers(1, 1_000_000), st.floats(0, 1, exclude_max=True))
def test_a_delay_is_never_negative_nor_above_its_ceiling_and_cap(retry: Retry, attempt: int, chance: float) -> None:
    ceiling = retry.ceiling(attempt)
    assert 0 <= ceiling <= retry.max_delay
    assert 0 <= retry.delay(attempt, lambda: chance) <= ceiling
    if attempt <= retry.immediate:
        assert ceiling == 0


@given(RETRY, st.integers(1, 5000))
def test_ceilings_never_shrink(retry: Retry, attempt: int) -> None:
    assert retry.ceiling(attempt) <= retry.ceiling(attempt + 1)


def test_the_ceilings_are_exponential_up_to_the_cap() -> None:
    retry = Retry(immediate=1, base_delay=0.2, multiplier=2, max_delay=5)
    assert [retry.ceiling(n) for n in range(1, 9)] == pytest.approx([0, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])


def test_jitter_is_full() -> None:
    """Delays fill the whole range from 0 to the ceiling, evenly."""
    retry = Retry(immediate=0, base_delay=1.0, max_delay=1.0)
    chance = random.Random(7)
    delays = sorted(retry.delay(1, chance.random) for _ in range(4000))
    assert all(abs(delay - i / 4000) < 0.04 for i, delay in enumerate(delays))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"max_attempts": 1.5},
        {"immediate": -1},
        {"base_delay": -0.1},
        {"base_delay": math.nan},
        {"max_delay": math.inf},
        {"multiplier": 0.5},
        {"multiplier": math.inf},
        {"multiplier": math.nan},
        {"budget": -1},
        {"budget_per_second": math.nan},
        {"dead_letter_on": ValueError},
        {"dead_letter_on": [ValueError]},
        {"dead_letter_on": ("ValueError",)},
    ],
)
def test_what_cannot_work_is_refused_when_it_is_made(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        Retry(**wrong)  # type: ignore[arg-type]


@given(
    share=st.floats(0, 2),
    per_second=st.floats(0, 100),
    steps=st.lists(st.tuples(st.floats(0, 5), st.integers(0, 50), st.integers(0, 30)), max_size=40),
)
def test_retries_at_once_never_exceed_the_budget(
    share: float, per_second: float, steps: list[tuple[float, int, int]]
) -> None:
    """At most the initial tokens, the share of first attempts, and the rate times the time that passed."""
    now = first_attempts = at_once = 0.0
    budget = RetryBudget(share, per_second, now)
    cap = budget.tokens
    for passed_s, firsts, retries in steps:
        now += passed_s
        budget.earn(firsts)
        first_attempts += firsts
        for _ in range(retries):
            postponed_s = budget.spend(now)
            assert 0 <= postponed_s <= 60
            at_once += postponed_s == 0
        assert budget.tokens <= cap
        assert at_once <= cap + share * first_attempts + per_second * now + 1e-6


@given(st.floats(1, 100), st.integers(1, 500))
def test_postponed_retries_are_spread_at_the_rate(per_second: float, retries: int) -> None:
    """A storm at one moment comes back no faster than the rate allows, as far as a minute reaches."""
    budget = RetryBudget(0.2, per_second, 0.0)
    free = int(budget.tokens)
    at = [budget.spend(0.0) for _ in range(free + retries)][free:]
    within = [t for t in at if t < 60]
    assert all(b - a >= 1 / per_second - 1e-6 for a, b in itertools.pairwise(within))


def test_the_defaults_are_as_documented() -> None:
    assert msgspec.structs.asdict(Retry()) == {
        "max_attempts": 5,
        "immediate": 1,
        "base_delay": 0.2,
        "multiplier": 2.0,
        "max_delay": 5.0,
        "budget": 0.2,
        "budget_per_second": 10.0,
        "dead_letter_on": (),
    }
    assert Retry(max_attempts=1, multiplier=1).max_attempts == 1
    assert Retry(max_attempts=1_000_000).max_attempts == 1_000_000
    with pytest.raises(ConfigurationError):
        Retry(max_attempts=1_000_001)


def test_a_budget_counts_to_the_token() -> None:
    budget = RetryBudget(share=0.5, per_second=20.0, now=0.0)
    assert budget.tokens == 200  # ten seconds' worth at first, and never more
    budget.earn(1000)
    assert budget.tokens == 200
    assert [budget.spend(0.0) for _ in range(200)] == [0.0] * 200
    assert budget.spend(0.0) == 1 / 20
    assert budget.spend(0.0) == 2 / 20
    budget.earn(4)  # two tokens: what was overdrawn
    assert budget.tokens == 0
    assert budget.spend(0.5) == 0.0  # half a second brought ten
    assert budget.tokens == 9
    budget.spend(1000.0)
    assert budget.tokens == 199


def test_a_budget_without_a_rate_has_ten_tokens_and_then_a_minute() -> None:
    budget = RetryBudget(share=0.0, per_second=0.0, now=0.0)
    assert [budget.spend(float(n)) for n in range(11)] == [0.0] * 10 + [60.0]
    slow = RetryBudget(share=0.0, per_second=0.5, now=0.0)
    assert [slow.spend(0.0) for _ in range(50)][9:] == [0.0, *(min(60.0, n * 2.0) for n in range(1, 41))]


def test_time_that_goes_back_earns_nothing() -> None:
    budget = RetryBudget(0.2, 10.0, 100.0)
    budget.spend(100.0)
    left = budget.tokens
    budget.spend(50.0)
    assert budget.tokens == left - 1
