"""Counts of errors: exact in all, right in every window, and bounded, whatever comes."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity
from glassbus.record.plain import plain, plain_report
from glassbus.record.statistics import DAY_S, OTHER, ErrorStatistics, Grid, combined

NOW = 1_700_000_000.0


@given(
    st.lists(st.tuples(st.floats(-500, 500), st.sampled_from(["a", "b"]), st.integers(1, 5)), max_size=60),
    st.integers(1, 30),
)
def test_a_grid_counts_as_a_list_would(events: list[tuple[float, str, int]], slots: int) -> None:
    """Against the naive model: all events kept, those within the span of the newest slot counted."""
    grid = Grid(10.0, slots)
    kept: list[tuple[int, str, int]] = []
    newest: int | None = None
    for shift, name, count in events:
        at = NOW + shift
        column, place, slot = grid.column(name), grid.place(at), int(at // 10)
        newest = slot if newest is None else max(newest, slot)
        if place >= 0:
            column[place] += count
            kept.append((slot, name, count))
        assert (place >= 0) == (slot > newest - slots)
    for now in (NOW, NOW + 500, NOW + 5000):
        end = int(now // 10)
        for name in ("a", "b"):
            wanted = [
                sum(
                    n
                    for slot, one, n in kept
                    if one == name and slot == s and newest is not None and s > newest - slots
                )
                for s in range(end - slots + 1, end + 1)
            ]
            assert grid.last(name, now, slots) == wanted


def test_a_clock_set_far_back_starts_a_grid_anew_and_a_small_jump_does_not() -> None:
    grid = Grid(60.0, 10)
    grid.column("a")[grid.place(NOW)] += 5
    grid.tick(NOW - 300)
    assert sum(grid.last("a", NOW, 10)) == 5
    assert grid.place(NOW - 3600) == -1
    grid.tick(NOW - 3600)
    assert sum(grid.last("a", NOW - 3600, 10)) == 0
    grid.column("a")[grid.place(NOW - 3600)] += 2
    assert sum(grid.last("a", NOW - 3600, 10)) == 2


@given(
    st.lists(
        st.tuples(
            st.integers(0, 40),
            st.sampled_from(list(ErrorCategory)),
            st.sampled_from(list(ErrorSeverity)),
            st.integers(1, 3),
        ),
        max_size=120,
    )
)
def test_totals_are_exact_however_many_fingerprints_are_let_go(errors: list[tuple[int, Any, Any, int]]) -> None:
    kept = ErrorStatistics(NOW, fingerprints_max=8)
    for number, (fingerprint, category, severity, count) in enumerate(errors):
        kept.error(NOW + number, category, severity, f"print-{fingerprint}", count=count)
        assert len(kept.fingerprints()) <= 8
    found = kept.snapshot(NOW + len(errors))
    total = sum(count for *_, count in errors)
    assert found["total_errors"] == found["recent_errors_24h"] == total
    assert sum(one.count for one in kept.fingerprints()) + found["other_fingerprints"] == total
    wanted: Counter[str] = Counter()
    for _, category, _, count in errors:
        wanted[category.value] += count
    assert found["categories"] == wanted
    assert sum(found["severity_distribution"].values()) == total
    json.dumps(found)


@given(
    st.lists(
        st.tuples(
            st.integers(-90, 400),
            st.integers(0, 2),
            st.sampled_from([ErrorCategory.TIMEOUT_ERROR, ErrorCategory.CONNECTION_ERROR]),
            st.sampled_from(["", "charge", "ship"]),
            st.booleans(),
        ),
        max_size=60,
    )
)
def test_reports_that_come_in_runs_count_as_each_by_itself(told: list[tuple[int, int, Any, str, bool]]) -> None:
    """`report` counts a run apart; whoever looks, and whenever, sees what `error` would have made of each."""
    runs, each = ErrorStatistics(NOW), ErrorStatistics(NOW)
    for number, (after, site, category, subscription, looks) in enumerate(told):
        at, name = NOW + after, f"print-{site}"
        report = ErrorReport(f"e{number}", at, category, ErrorSeverity.HIGH, f"message {number}", fingerprint=name)
        runs.report(report, at, subscription)
        each.error(at, category, ErrorSeverity.HIGH, name, "", "handler", f"message {number}", subscription)
        if looks:
            assert runs.fingerprints() == each.fingerprints()
    runs.tick(NOW + 400)
    each.tick(NOW + 400)
    assert runs.snapshot(NOW + 400) == each.snapshot(NOW + 400)
    assert runs.minutes_of("total", NOW + 400, 10) == each.minutes_of("total", NOW + 400, 10)
    assert runs.slots_of("print-0", NOW + 400, 4) == each.slots_of("print-0", NOW + 400, 4)
    assert runs.seen("timeout_error") == each.seen("timeout_error")


@given(st.lists(st.tuples(st.sampled_from(["succeeded", "failed", "refused"]), st.floats(0, 100)), max_size=50))
def test_recoveries_are_rated_by_those_that_ended(endings: list[tuple[str, float]]) -> None:
    kept = ErrorStatistics(NOW)
    for outcome, took_s in endings:
        kept.recovery(outcome, took_s, NOW)
    found = kept.snapshot(NOW)
    good = [took_s for outcome, took_s in endings if outcome == "succeeded"]
    bad = sum(outcome == "failed" for outcome, _ in endings)
    assert found["recovery_success_rate"] == (len(good) / (len(good) + bad) if good or bad else 1.0)
    assert found["mttr_seconds"] == (pytest.approx(sum(good) / len(good)) if good else None)


def test_the_latest_fingerprints_are_those_that_are_kept() -> None:
    kept = ErrorStatistics(NOW, fingerprints_max=16)
    for number in range(100):
        kept.error(NOW + number, "timeout_error", "high", f"print-{number}")
        kept.error(NOW + number, "timeout_error", "high", "always")
    names = {one.fingerprint for one in kept.fingerprints()}
    assert {"always", "print-99", "print-98"} <= names
    assert next(one for one in kept.fingerprints() if one.fingerprint == "always").count == 100
    assert kept.memory_bytes() < 2_000_000


def test_names_of_users_are_bounded() -> None:
    kept = ErrorStatistics(NOW)
    for number in range(1000):
        kept.error(NOW, f"kind-{number}", f"how-{number}", "same", subscription=f"sub-{number}")
    assert len(kept.categories) == len(kept.severities) == len(kept.subscriptions) == 201
    assert kept.categories[OTHER] == 800
    assert len(kept._names) <= 201


def test_snapshots_of_several_processes_add_up() -> None:
    first, second = ErrorStatistics(NOW), ErrorStatistics(NOW)
    first.error(NOW, "timeout_error", "high", "a", count=3)
    first.recovery("succeeded", 2.0, NOW)
    second.error(NOW + 9, "queue_overflow", "low", "b")
    second.recovery("succeeded", 4.0, NOW)
    second.recovery("failed", 9.0, NOW)
    whole = combined([first.snapshot(NOW + 10), second.snapshot(NOW + 10)])
    assert whole["total_errors"] == 4
    assert whole["categories"] == {"timeout_error": 3, "queue_overflow": 1}
    assert whole["recovery_success_rate"] == pytest.approx(2 / 3)
    assert whole["mttr_seconds"] == pytest.approx(3.0)
    assert (whole["first_error_at"], whole["last_error_at"]) == (NOW, NOW + 9)
    assert combined([])["recovery_success_rate"] == 1.0


def test_a_day_later_the_windows_are_empty_and_the_totals_are_not() -> None:
    kept = ErrorStatistics(NOW)
    kept.error(NOW, "timeout_error", "high", "a", count=7)
    later = NOW + DAY_S + 120
    kept.tick(later)
    found = kept.snapshot(later)
    assert (found["total_errors"], found["recent_errors_24h"], found["recent_errors_1h"]) == (7, 0, 0)
    assert found["categories_1h"] == {}


# Plain values

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=50)
    | st.binary(max_size=20)
    | st.builds(object)
    | st.builds(ValueError, st.text()),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(st.characters(), max_size=10) | st.integers(), inner, max_size=5)
        | st.tuples(inner, inner)
    ),
    max_leaves=20,
)


def holds_only_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(name) is str for name in value) and all(map(holds_only_plain, value.values()))
    if isinstance(value, list):
        return all(map(holds_only_plain, value))
    return value is None or type(value) in (str, int, float, bool)


@given(anything)
@example(float("nan"))
@example([float("inf"), 2**63, "lone \ud800"])
def test_whatever_is_given_becomes_plain_bounded_json(value: Any) -> None:
    made = plain(value)
    assert holds_only_plain(made)
    assert len(msgspec.json.encode(made)) < 500_000
    assert plain(made) == made
    assert msgspec.json.decode(msgspec.json.encode(made)) == made


@given(anything, anything, anything, anything, anything)
@example({"lone \ud800": None}, None, None, None, None)
def test_whatever_a_report_is_made_of_it_can_be_written_and_read(a: Any, b: Any, c: Any, d: Any, e: Any) -> None:
    given_report = ErrorReport(
        error_id=a,
        timestamp=b,
        category=c,
        severity=d,
        message=e,
        context=a,
        retry_count=b,
        fingerprint=c,
        recovery_attempted=d,
    )
    made = plain_report(given_report)
    back = msgspec.json.decode(msgspec.json.encode(made))
    assert back["message"] == made.message
    assert plain_report(made) == made


words = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@given(words, st.dictionaries(words, st.integers(-(2**60), 2**60) | words, max_size=5))
def test_a_report_that_is_plain_already_is_not_copied(message: str, context: dict[str, Any]) -> None:
    one = ErrorReport(
        error_id="e",
        timestamp=NOW,
        category=ErrorCategory.TIMEOUT_ERROR,
        severity=ErrorSeverity.LOW,
        message=message,
        context=context,
        fingerprint="f",
    )
    assert plain_report(one) is one
