"""Trends: what is called rising, falling, new and gone, and that noise is called nothing."""

from __future__ import annotations

import random
from math import exp, factorial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus.record.analysis import trends_of
from glassbus.record.statistics import ErrorStatistics
from glassbus.record.trends import CHANCE_MAX, DIRECTIONS, NEW_WINDOWS, RISE_MIN, WINDOW_S, chance_of, judge

DAY = 86_400.0
NOW = 1_700_000_000.0

counts = st.integers(0, 5000)
windows = st.lists(counts, max_size=94)
exposures = st.floats(1.0, 4 / 3)


def poisson(chance: random.Random, mean: float) -> int:
    """How many arrive before `mean`, when one does on average in each unit. Exact, and quick for large means."""
    count, left = 0, mean
    while left > 16:
        ahead = int(left * 7 / 8)
        passed = chance.gammavariate(ahead, 1.0)  # when that many have arrived
        if passed > left:  # too far: each of those before the last came at any time until then
            return count + sum(chance.random() * passed < left for _ in range(ahead - 1))
        count, left = count + ahead, left - passed
    passed = chance.expovariate(1.0)
    while passed < left:
        count += 1
        passed += chance.expovariate(1.0)
    return count


@given(windows, counts, exposures)
def test_every_count_has_a_verdict_and_a_chance(before: list[int], recent: int, exposure: float) -> None:
    verdict = judge(before, recent, exposure)
    assert verdict.direction in DIRECTIONS
    assert 0 <= verdict.chance <= 1
    assert (verdict.usual is None) == (len(before) < NEW_WINDOWS)
    if verdict.direction in ("rising", "falling"):
        assert verdict.chance < CHANCE_MAX


@given(windows, counts, exposures, st.integers(1, 1000))
def test_more_errors_are_never_less_of_a_rise(before: list[int], recent: int, exposure: float, more: int) -> None:
    if judge(before, recent, exposure).direction == "rising":
        assert judge(before, recent + more, exposure).direction == "rising"
    if judge(before, recent + more, exposure).direction == "falling":
        assert judge(before, recent, exposure).direction in ("falling", "gone")


@given(st.integers(NEW_WINDOWS, 94), counts)
def test_the_same_as_always_is_steady(length: int, count: int) -> None:
    assert judge([count] * length, count).direction == "steady"


@given(st.lists(counts, min_size=NEW_WINDOWS, max_size=94), st.integers(1, 5000), st.randoms(use_true_random=False))
def test_the_order_of_past_windows_matters_only_for_silence(
    before: list[int], recent: int, chance: random.Random
) -> None:
    shuffled = before[:]
    chance.shuffle(shuffled)
    assert judge(before, recent) == judge(shuffled, recent)


@given(windows, st.integers(0, RISE_MIN - 1))
def test_a_handful_is_no_rise(before: list[int], recent: int) -> None:
    assert judge(before, recent).direction != "rising"


def test_what_was_never_seen_in_a_day_rises_with_the_fifth() -> None:
    assert judge([0] * 94, RISE_MIN - 1).direction == "steady"
    assert judge([0] * 94, RISE_MIN).direction == "rising"


@given(st.integers(RISE_MIN, 5000), st.integers(NEW_WINDOWS, 80))
def test_a_burst_like_those_that_come_every_hour_is_no_news(burst: int, length: int) -> None:
    before = [burst if n % 4 == 0 else 0 for n in range(length)]
    assert judge(before, burst).direction == "steady"


@given(windows)
def test_silence_is_gone_only_when_it_is_longer_than_rarity_explains(before: list[int]) -> None:
    verdict = judge(before, 0)
    if not any(before):
        assert verdict.direction in ("new", "steady")
    elif verdict.direction == "gone":
        assert verdict.chance < CHANCE_MAX


def test_a_rare_error_is_not_gone_after_an_hour_but_after_a_day() -> None:
    once_an_hour = [1, 0, 0, 0] * 12
    assert judge(once_an_hour, 0).direction == "steady"
    assert judge(once_an_hour + [0] * 40, 0).direction == "gone"
    assert judge([100, 90, 110, 95, 105], 0).direction == "gone"
    assert judge([500, 400], 0).direction == "gone"


@pytest.mark.parametrize("mean", [0.05, 0.5, 2, 8, 40, 400])
def test_noise_of_a_constant_rate_is_called_steady(mean: float) -> None:
    """A thousand windows of Poisson noise; one in a thousand may be called a change by the bound, hardly any is."""
    chance = random.Random(int(mean * 100))
    told = [judge([poisson(chance, mean) for _ in range(40)], poisson(chance, mean)).direction for _ in range(1000)]
    assert told.count("rising") + told.count("falling") <= 3
    assert told.count("new") == 0


@pytest.mark.parametrize("mean", [8, 40, 400])
def test_a_tripled_rate_is_found_and_so_is_one_that_fell_to_a_fifth(mean: float) -> None:
    chance = random.Random(1)
    rises = falls = 0
    for _ in range(200):
        before = [poisson(chance, mean) for _ in range(40)]
        rises += judge(before, poisson(chance, mean * 3)).direction == "rising"
        falls += judge(before, poisson(chance, mean / 5)).direction in ("falling", "gone")
    assert rises >= (190 if mean > 20 else 130)  # of eight an hour, three in four are told from noise
    assert falls >= (190 if mean > 20 else 0)


@given(st.integers(0, 10_000), st.floats(0, 10_000))
def test_the_chance_is_an_upper_bound_of_the_poisson_tail(count: int, expected: float) -> None:
    found = chance_of(count, expected)
    assert 0 <= found <= 1
    if expected > 0 and expected < 30 and count < 60:
        terms = [exp(-expected) * expected**k / factorial(k) for k in range(150)]
        tail = sum(terms[count:]) if count > expected else sum(terms[: count + 1])
        assert tail <= found + 1e-9


# From counted errors to trends


def counted(errors: ErrorStatistics, fingerprint: str, starts: float, ends: float, per_window: int) -> None:
    at = starts
    while at < ends:
        errors.error(at, "connection_error", "high", fingerprint, message="refused")
        at += WINDOW_S / per_window


def directions(errors: ErrorStatistics, now: float) -> dict[str, str]:
    return {trend.name: trend.direction for trend in trends_of(errors, now)}


@given(st.floats(0, 900))
def test_trends_tell_each_fingerprint_and_its_category_apart(shift: float) -> None:
    now = NOW + shift
    errors = ErrorStatistics(now - DAY)
    errors.tick(now)
    counted(errors, "steady", now - DAY, now, 10)
    counted(errors, "rising", now - DAY, now - 900, 2)
    counted(errors, "rising", now - 900, now, 60)
    counted(errors, "falling", now - DAY, now - 1500, 60)
    counted(errors, "falling", now - 1500, now, 4)
    counted(errors, "gone", now - DAY, now - 4000, 20)
    counted(errors, "new", now - 1800, now, 10)
    found = directions(errors, now)
    assert found.pop("connection_error") == "steady"
    assert found == {name: name for name in ("steady", "rising", "falling", "gone", "new")}
    assert [trend.direction for trend in trends_of(errors, now)] == [
        direction for direction in DIRECTIONS for trend in trends_of(errors, now) if trend.direction == direction
    ]


def test_windows_are_of_the_time_since_the_first_error() -> None:
    now = NOW
    errors = ErrorStatistics(now - DAY)
    counted(errors, "young", now - 4 * 3600, now, 15)
    by_name = {one.name: one for one in trends_of(errors, now)}
    young = by_name["young"]
    assert 14 <= len(young.windows) <= 15
    assert young.usual == 15
    assert 15 <= young.recent <= 20
    assert 900 <= young.recent_s < 1200
    assert sum(young.windows) + young.recent == young.count
    assert by_name["connection_error"].windows == young.windows
