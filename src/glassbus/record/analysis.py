"""From counts to what a person asks: what fails, is it more than usual, does it heal."""

from __future__ import annotations

import math
from typing import Any, Self

import msgspec

from glassbus.record.statistics import DAY_S, FINGERPRINT_SLOT_S, MINUTE_S, ErrorStatistics
from glassbus.record.trends import DIRECTIONS, WINDOW_S, Trend, judge

#: Width of a bar in the plots, and how many there are: a day.
BAR_S = 900.0
BARS = 96


class Analysis(msgspec.Struct, frozen=True):
    """All that a report shows, at wall time `now`. `source` says of what.

    `bars` are counts of 15 minutes over the last day, oldest first, the last one under way: of `total`, of each
    `category:NAME` and `severity:NAME`, and of `recovery:OUTCOME`. `notes` are sentences about what is missing.
    """

    now: float
    source: str
    statistics: dict[str, Any]
    trends: list[Trend]
    bars: dict[str, list[int]]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, errors: ErrorStatistics, now: float, *, source: str, notes: tuple[str, ...] = ()) -> Self:
        names = ["total"]
        names += [f"category:{name}" for name in sorted(map(str, errors.categories))]
        names += [f"severity:{name}" for name in sorted(map(str, errors.severities))]
        names += [f"recovery:{outcome}" for outcome in ("succeeded", "failed")]
        bars = {name: _grouped(errors, name, now, BAR_S, BARS) for name in names}
        return cls(now, source, errors.snapshot(now, top=20), trends_of(errors, now), bars, notes)


def _grouped(errors: ErrorStatistics, name: str, now: float, width_s: float, count: int) -> list[int]:
    """Counts by `width_s`, aligned with the clock, oldest first; the last of the `count` is under way."""
    each = round(width_s / MINUTE_S)
    under_way = int(now // MINUTE_S) % each + 1
    minutes = errors.minutes_of(name, now, (count - 1) * each + under_way)
    return [sum(minutes[start : start + each]) for start in range(0, len(minutes), each)]


def _slots(errors: ErrorStatistics, name: str, now: float) -> list[int]:
    return _grouped(errors, name, now, FINGERPRINT_SLOT_S, round(DAY_S / FINGERPRINT_SLOT_S))


def trends_of(errors: ErrorStatistics, now: float) -> list[Trend]:
    """How each category and each fingerprint goes; rising ones first, then by how many there are now."""
    found = [_of_category(errors, now, name, severity) for name, severity in _categories(errors)]
    for one in errors.fingerprints():
        slots = errors.slots_of(one.fingerprint, now, round(DAY_S / FINGERPRINT_SLOT_S))
        recent, recent_s, windows = _split(slots, now, one.first_seen)
        verdict = judge(windows, recent, recent_s / WINDOW_S)
        found.append(
            Trend(
                "fingerprint",
                one.fingerprint,
                verdict.direction,
                recent,
                recent_s,
                verdict.usual,
                _ratio(recent, verdict.usual, recent_s),
                verdict.chance,
                one.count,
                one.first_seen,
                one.last_seen,
                one.category,
                one.severity,
                one.exception_type,
                one.message,
                tuple(windows),
            )
        )
    return sorted(found, key=lambda trend: (DIRECTIONS.index(trend.direction), -trend.recent, -trend.count, trend.name))


def _categories(errors: ErrorStatistics) -> list[tuple[str, str]]:
    return [(str(name), "") for name in list(errors.categories)]


def _of_category(errors: ErrorStatistics, now: float, name: str, severity: str) -> Trend:
    first, last = errors.seen(name)
    recent, recent_s, windows = _split(_slots(errors, f"category:{name}", now), now, first)
    verdict = judge(windows, recent, recent_s / WINDOW_S)
    return Trend(
        "category",
        name,
        verdict.direction,
        recent,
        recent_s,
        verdict.usual,
        _ratio(recent, verdict.usual, recent_s),
        verdict.chance,
        errors.categories[name],
        first,
        last,
        name,
        severity,
        windows=tuple(windows),
    )


def _split(slots: list[int], now: float, first_seen: float) -> tuple[int, float, list[int]]:
    """(errors in the last window, seconds it has lasted, counts of the windows before it since `first_seen`).

    The last window is a whole one and the slot under way. The window of the first error counts from its beginning.
    """
    each = round(WINDOW_S / FINGERPRINT_SLOT_S)
    recent = slots[-each - 1 :]
    recent_s = WINDOW_S + now % FINGERPRINT_SLOT_S
    before = slots[: -each - 1]
    begins = now - recent_s
    known = max(0, math.ceil((begins - first_seen) / WINDOW_S))
    count = min(known, len(before) // each)
    used = before[len(before) - count * each :] if count else []
    return sum(recent), recent_s, [sum(used[start : start + each]) for start in range(0, len(used), each)]


def _ratio(recent: int, usual: float | None, recent_s: float) -> float | None:
    """How many times as many as usual in the same time; None where there is nothing to compare with."""
    return recent / (usual * recent_s / WINDOW_S) if usual else None
