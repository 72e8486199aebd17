"""Whether failures become more or fewer: a window of time against those before it, with a guard against noise.

Pure: counts in, verdicts out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Literal

import msgspec

Direction = Literal["rising", "new", "steady", "falling", "gone"]
#: As they concern who is on call, most first.
DIRECTIONS: tuple[Direction, ...] = ("rising", "new", "steady", "falling", "gone")

#: Width of a window, in seconds.
WINDOW_S = 900.0
#: With fewer windows before it than this, what happens now cannot be compared: it is new.
NEW_WINDOWS = 4
#: A change must be larger than chance makes once in a thousand windows,
CHANCE_MAX = 0.001
#: and so much larger or smaller than usual,
RATIO_MIN = 1.5
#: and a rise is of so many at least.
RISE_MIN = 5


class Verdict(msgspec.Struct, frozen=True):
    """`usual`: what a window held before, its median; None where there were too few.

    `chance`: at most how likely it is that the same rate gave the latest count; 1.0 where nothing was compared.
    """

    direction: Direction
    usual: float | None
    chance: float = 1.0


class Trend(msgspec.Struct, frozen=True):
    """How a fingerprint or a category goes. `recent` errors in the last `recent_s` seconds.

    `windows` are counts of 15 minutes each, oldest first, ending where the recent ones begin. Times are wall seconds.
    """

    kind: Literal["fingerprint", "category"]
    name: str
    direction: Direction
    recent: int
    recent_s: float
    usual: float | None
    ratio: float | None
    chance: float
    count: int
    first_seen: float
    last_seen: float
    category: str
    severity: str = ""
    exception_type: str = ""
    message: str = ""
    windows: tuple[int, ...] = ()


def judge(windows: Sequence[int], recent: int, exposure: float = 1.0) -> Verdict:
    """How `recent` errors in the last `exposure` windows compare to `windows`, the counts since the first error.

    gone: none now, and not only because they are rare. new: fewer than 4 windows to compare with. rising, falling: by
    half at least, by more than chance explains (a Poisson bound of 1 in 1,000), and outside of what nine in ten
    windows held, so that a burst which comes every hour is no news. steady: none of these.
    """
    total = sum(windows)
    if recent == 0 and total and _silence(windows, exposure) < CHANCE_MAX:
        return Verdict("gone", _usual(windows), _silence(windows, exposure))
    if len(windows) < NEW_WINDOWS:
        return Verdict("new", None)
    usual = _usual(windows)
    low, high = _quantile(windows, 0.1) * exposure, _quantile(windows, 0.9) * exposure
    # What was never seen in n windows may still happen once in the next n.
    expected = max(median(windows), (_sum_of_lower(windows, 0.9) + 1) / (len(windows) + 1)) * exposure
    if recent >= max(RISE_MIN, expected * RATIO_MIN) and recent > high:
        chance = chance_of(recent, expected)
        if chance < CHANCE_MAX:
            return Verdict("rising", usual, chance)
    expected = median(windows) * exposure
    if recent * RATIO_MIN <= expected and recent < low:
        chance = chance_of(recent, expected)
        if chance < CHANCE_MAX:
            return Verdict("falling", usual, chance)
    return Verdict("steady", usual)


def chance_of(count: int, expected: float) -> float:
    """At most how likely a Poisson count of mean `expected` is as far off as `count` (Chernoff's bound)."""
    if count == expected:
        return 1.0
    if expected <= 0:
        return 0.0
    if count == 0:
        return math.exp(-expected)
    return math.exp(min(0.0, count - expected - count * math.log(count / expected)))


def _silence(windows: Sequence[int], exposure: float) -> float:
    """How likely so long a silence would be if errors went on as while there were some."""
    active = len(windows)
    while not windows[active - 1]:
        active -= 1
    quiet = len(windows) - active + exposure
    return math.exp(-quiet * sum(windows) / active)


def _usual(windows: Sequence[int]) -> float | None:
    return float(median(windows)) if len(windows) >= NEW_WINDOWS else None


def _quantile(windows: Sequence[int], share: float) -> int:
    ordered = sorted(windows)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _sum_of_lower(windows: Sequence[int], share: float) -> int:
    """Of the lower `share` of the windows, so that a past burst does not hide a rise now."""
    return sum(sorted(windows)[: math.ceil(share * len(windows))])
