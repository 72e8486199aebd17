"""Counts of errors: exact since the start, and by time over the last 24 hours, in constant memory."""

from __future__ import annotations

import heapq
import math
import threading
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from glassbus.errors import ErrorReport

MINUTE_S = 60.0
HOUR_S = 3600.0
DAY_S = 86400.0
#: Width of the slots in which fingerprints are counted, in seconds.
FINGERPRINT_SLOT_S = 300.0
OTHER = "_other"

_FINGERPRINTS_MAX = 2048
_NAMES_MAX = 200
_SAMPLE_CAP = 200


class Grid:
    """Counts by name and by time slot, over the last `slots` slots of `width_s` seconds.

    Not thread-safe.
    """

    __slots__ = ("_columns", "_empty", "_newest", "slots", "width_s")

    def __init__(self, width_s: float, slots: int, typecode: str = "Q") -> None:
        self.width_s = width_s
        self.slots = slots
        self._empty = array(typecode, [0] * slots)
        self._newest: int | None = None
        self._columns: dict[str, array[int]] = {}

    def place(self, at: float) -> int:
        """Where to count what happened at wall time `at`; -1 when that is too long ago."""
        slot = int(at // self.width_s)
        newest = self._newest
        if slot != newest:
            if newest is None or slot > newest:
                self._advance(slot)
            elif slot <= newest - self.slots:
                return -1
        return slot % self.slots

    def tick(self, now: float) -> None:
        """It is `now`. A clock that was set back by more than the whole span starts the grid anew."""
        slot = int(now // self.width_s)
        if self._newest is None or not self._newest - self.slots < slot <= self._newest:
            self._advance(slot)

    def _advance(self, slot: int) -> None:
        newest = self._newest
        self._newest = slot
        if newest is None or not newest < slot < newest + self.slots:
            for column in self._columns.values():
                column[:] = self._empty
            return
        places = [passed % self.slots for passed in range(newest + 1, slot + 1)]
        for column in self._columns.values():
            for place in places:
                column[place] = 0

    def column(self, name: str) -> array[int]:
        """The counts of `name`, to be added to at a `place` just asked for. It may be kept."""
        found = self._columns.get(name)
        if found is None:
            found = self._columns[name] = self._empty[:]
        return found

    def remove(self, name: str) -> None:
        self._columns.pop(name, None)

    def names(self) -> list[str]:
        return list(self._columns)

    def last(self, name: str, now: float, slots: int) -> list[int]:
        """Counts of `name` in the `slots` slots that end with that of `now`, oldest first."""
        column, newest = self._columns.get(name), self._newest
        if column is None or newest is None:
            return [0] * slots
        end = int(now // self.width_s)
        oldest = newest - self.slots
        return [column[slot % self.slots] if oldest < slot <= newest else 0 for slot in range(end - slots + 1, end + 1)]

    def since(self, name: str, now: float, seconds: float) -> int:
        """How many of `name` in the last `seconds`, to the slot."""
        return sum(self.last(name, now, min(self.slots, max(1, round(seconds / self.width_s)))))

    def memory_bytes(self) -> int:
        return len(self._columns) * (self._empty.itemsize * self.slots + 200)


class Fingerprint(msgspec.Struct):
    """One kind of failure. Times are wall seconds; texts are of its latest occurrence."""

    fingerprint: str
    category: str
    severity: str
    exception_type: str
    component: str
    subscription: str
    message: str
    first_seen: float
    last_seen: float
    count: int = 0


class _Run:
    """Errors of one kind within one minute, not yet added to what they count for: most errors come in runs."""

    __slots__ = ("at", "category", "count", "known", "message", "severity", "subscription", "until")

    def __init__(
        self, known: Fingerprint, category: str, severity: str, subscription: str, message: str, at: float
    ) -> None:
        self.known = known
        self.category = category
        self.severity = severity
        self.subscription = subscription
        self.message = message
        self.at = at
        self.until = (at // MINUTE_S + 1) * MINUTE_S
        self.count = 0


class ErrorStatistics:
    """Counts errors and recoveries. Thread-safe, constant in memory.

    Totals are exact. At most 2,048 fingerprints are told apart, the latest seen; the counts of those let go
    are in `other_fingerprints`.
    """

    def __init__(self, started_at: float, fingerprints_max: int = _FINGERPRINTS_MAX) -> None:
        self.started_at = started_at
        self._total = 0
        self._first_at = 0.0
        self._last_at = 0.0
        self._categories: Counter[str] = Counter()
        self._severities: Counter[str] = Counter()
        self._subscriptions: Counter[str] = Counter()
        self.recoveries: Counter[str] = Counter()
        self.recovered_s = 0.0
        self.other_fingerprints = 0
        self._fingerprints_max = fingerprints_max
        self._known: dict[str, Fingerprint] = {}
        self._runs: dict[str, _Run] = {}
        self._seen: dict[str, list[float]] = {}  # when each category was seen first and last
        self._names: dict[tuple[str, str], tuple[str, str, array[int], array[int], array[int]]] = {}
        self._minutes = Grid(MINUTE_S, round(DAY_S / MINUTE_S))
        # Four bytes each: there are many of them, and no fingerprint has 4 billion errors in 5 minutes.
        self._slots = Grid(FINGERPRINT_SLOT_S, round(DAY_S / FINGERPRINT_SLOT_S), "I")
        self._lock = threading.Lock()

    def tick(self, now: float) -> None:
        """It is `now`: to be told now and then, and first, where the times of errors are not those of a clock."""
        with self._lock:
            self._add_runs()
            self._minutes.tick(now)
            self._slots.tick(now)

    # Counting

    def report(self, report: ErrorReport, at: float, subscription: str = "") -> None:
        """Count a report, at wall time `at`."""
        category, severity = report.category, report.severity
        with self._lock:
            run = self._runs.get(report.fingerprint)
            if (
                run is not None
                and run.at <= at < run.until
                and category is run.category
                and severity is run.severity
                and subscription == run.subscription
            ):
                run.count += 1
                run.at = at
                run.message = report.message
                return
            known = self._count(
                at,
                category,
                severity,
                report.fingerprint,
                report.exception_type,
                report.component,
                report.message,
                subscription,
                1,
                at,
            )
            self._runs[report.fingerprint] = _Run(known, category, severity, subscription, report.message, at)

    def _add_runs(self) -> None:
        """Add all that is counted apart, before anybody reads."""
        for fingerprint in [name for name, run in self._runs.items() if run.count]:
            self._add_run(fingerprint)

    def _add_run(self, fingerprint: str) -> None:
        run = self._runs.pop(fingerprint, None)
        if run is not None and run.count:
            known = run.known
            self._count(
                run.at,
                run.category,
                run.severity,
                fingerprint,
                known.exception_type,
                known.component,
                run.message,
                run.subscription,
                run.count,
                run.at,
            )

    def error(
        self,
        at: float,
        category: str,
        severity: str,
        fingerprint: str,
        exception_type: str = "",
        component: str = "",
        message: str = "",
        subscription: str = "",
        count: int = 1,
        first_at: float | None = None,
    ) -> None:
        """Count `count` errors at wall time `at`. `first_at`: when the first of them was, if not then."""
        with self._lock:
            self._count(
                at,
                category,
                severity,
                fingerprint,
                exception_type,
                component,
                message,
                subscription,
                count,
                at if first_at is None else first_at,
            )

    def _count(
        self,
        at: float,
        category: str,
        severity: str,
        fingerprint: str,
        exception_type: str,
        component: str,
        message: str,
        subscription: str,
        count: int,
        began: float,
    ) -> Fingerprint:
        self._add_run(fingerprint)
        self._total += count
        if not self._first_at or began < self._first_at:
            self._first_at = began
        if at > self._last_at:
            self._last_at = at
        names = self._names.get((category, severity))
        if names is None:
            names = self._name(category, severity)
        self._categories[names[0]] += count
        self._severities[names[1]] += count
        seen = self._seen[names[0]]
        if began < seen[0]:
            seen[0] = began
        if at > seen[1]:
            seen[1] = at
        if subscription:
            self._subscriptions[bounded(self._subscriptions, subscription)] += count
        place = self._minutes.place(at)
        if place >= 0:
            total, by_category, by_severity = names[2:]
            total[place] += count
            by_category[place] += count
            by_severity[place] += count
        known = self._known.get(fingerprint)
        if known is None:
            if len(self._known) >= self._fingerprints_max:
                self._let_go()
            known = self._known[fingerprint] = Fingerprint(
                fingerprint, names[0], names[1], exception_type, component, subscription, "", began, at
            )
        known.count += count
        if began < known.first_seen:
            known.first_seen = began
        if at >= known.last_seen:
            known.last_seen = at
            known.message = message[:_SAMPLE_CAP]
        place = self._slots.place(at)
        if place >= 0:
            self._slots.column(fingerprint)[place] += count
        return known

    def _name(self, category: str, severity: str) -> tuple[str, str, array[int], array[int], array[int]]:
        """What a category and a severity are counted under, found once for each pair."""
        by_category = str(bounded(self._categories, category))
        by_severity = str(bounded(self._severities, severity))
        self._seen.setdefault(by_category, [math.inf, 0.0])
        column = self._minutes.column
        names = (
            by_category,
            by_severity,
            column("total"),
            column(f"category:{by_category}"),
            column(f"severity:{by_severity}"),
        )
        if OTHER not in names:
            self._names[category, severity] = names
        return names

    def _let_go(self) -> None:
        """Drop an eighth of the fingerprints, those not seen for longest, keeping their sum."""
        self._add_runs()
        oldest = heapq.nsmallest(max(1, self._fingerprints_max // 8), self._known.values(), key=lambda f: f.last_seen)
        for one in oldest:
            self.other_fingerprints += one.count
            del self._known[one.fingerprint]
            self._runs.pop(one.fingerprint, None)
            self._slots.remove(one.fingerprint)

    def recovery(self, outcome: str, duration_s: float, at: float, count: int = 1) -> None:
        """Count recoveries that succeeded, failed or were refused. `duration_s`: from first failures on, the sum."""
        with self._lock:
            self.recoveries[outcome] += count
            if outcome == "succeeded":
                self.recovered_s += duration_s
            place = self._minutes.place(at)
            if place >= 0:
                self._minutes.column(f"recovery:{outcome}")[place] += count

    # Reading

    @property
    def total(self) -> int:
        """Errors since the start."""
        with self._lock:
            self._add_runs()
            return self._total

    @property
    def categories(self) -> Counter[str]:
        """Errors by category. A copy."""
        with self._lock:
            self._add_runs()
            return self._categories.copy()

    @property
    def severities(self) -> Counter[str]:
        """Errors by severity. A copy."""
        with self._lock:
            self._add_runs()
            return self._severities.copy()

    @property
    def subscriptions(self) -> Counter[str]:
        """Errors by subscription. A copy."""
        with self._lock:
            self._add_runs()
            return self._subscriptions.copy()

    def fingerprints(self) -> list[Fingerprint]:
        """Those told apart, the most frequent first. Copies."""
        with self._lock:
            self._add_runs()
            found = [msgspec.structs.replace(one) for one in self._known.values()]
        return sorted(found, key=lambda one: (-one.count, -one.last_seen, one.fingerprint))

    def seen(self, category: str) -> tuple[float, float]:
        """When the first and the last error of a category were."""
        with self._lock:
            self._add_runs()
            first, last = self._seen.get(category, (0.0, 0.0))
            return first, last

    def slots_of(self, fingerprint: str, now: float, slots: int) -> list[int]:
        """Counts of a fingerprint in the last slots of 300 s, oldest first; the last is under way."""
        with self._lock:
            self._add_runs()
            return self._slots.last(fingerprint, now, slots)

    def minutes_of(self, name: str, now: float, minutes: int) -> list[int]:
        """Counts of `total`, `category:NAME`, `severity:NAME` or `recovery:OUTCOME` by minute, oldest first."""
        with self._lock:
            self._add_runs()
            return self._minutes.last(name, now, minutes)

    def snapshot(self, now: float, top: int = 10) -> dict[str, Any]:
        """All of it as JSON-ready values, at wall time `now`.

        `error_rate_1h` is errors a second over the last hour. `recovery_success_rate` is of the recoveries that
        succeeded or failed, 1.0 when there were none; `mttr_seconds` from first failure to success, None when none did.
        """
        with self._lock:
            self._add_runs()
            minutes = self._minutes
            recent = minutes.since("total", now, HOUR_S)
            succeeded, failed = self.recoveries["succeeded"], self.recoveries["failed"]
            ended = succeeded + failed
            counted: dict[str, Any] = {
                "total_errors": self._total,
                "recent_errors_1h": recent,
                "recent_errors_24h": minutes.since("total", now, DAY_S),
                "categories": {str(name): number for name, number in self._categories.items()},
                "severity_distribution": {str(name): number for name, number in self._severities.items()},
                "error_rate_1h": recent / HOUR_S,
                "recovery_success_rate": succeeded / ended if ended else 1.0,
                "recoveries": {"succeeded": succeeded, "failed": failed, "refused": self.recoveries["refused"]},
                "mttr_seconds": self.recovered_s / succeeded if succeeded else None,
                "categories_1h": _last_hour(minutes, "category:", now),
                "severities_1h": _last_hour(minutes, "severity:", now),
                "subscriptions": dict(self._subscriptions.most_common(20)),
                "fingerprints": len(self._known),
                "other_fingerprints": self.other_fingerprints,
                "first_error_at": self._first_at or None,
                "last_error_at": self._last_at or None,
                "since": self.started_at,
                "now": now,
            }
        counted["top_fingerprints"] = [msgspec.to_builtins(one) for one in self.fingerprints()[:top]]
        return counted

    def memory_bytes(self) -> int:
        """About how much memory this takes."""
        with self._lock:
            each = 1400  # a Fingerprint with its texts, its run and its places in the tables
            return self._minutes.memory_bytes() + self._slots.memory_bytes() + each * len(self._known) + 20_000


def bounded(counts: Counter[str], name: str) -> str:
    """`name`, or `_other` once too many are known: a name may come from users."""
    return name if name in counts or len(counts) < _NAMES_MAX else OTHER


def _last_hour(minutes: Grid, prefix: str, now: float) -> dict[str, int]:
    names = [name for name in minutes.names() if name.startswith(prefix)]
    counts = {name.removeprefix(prefix): minutes.since(name, now, HOUR_S) for name in names}
    return {name: number for name, number in counts.items() if number}


#: Numbers of `snapshot` that add up over processes.
_SUMS = ("total_errors", "recent_errors_1h", "recent_errors_24h", "error_rate_1h", "other_fingerprints")
_COUNTS = ("categories", "severity_distribution", "recoveries", "categories_1h", "severities_1h", "subscriptions")


def combined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Snapshots of several processes as one."""
    given = list(parts)
    made: dict[str, Any] = {name: sum(part.get(name) or 0 for part in given) for name in _SUMS}
    for name in _COUNTS:
        total: Counter[str] = Counter()
        for part in given:
            total.update(part.get(name) or {})
        made[name] = dict(total)
    succeeded, failed = made["recoveries"].get("succeeded", 0), made["recoveries"].get("failed", 0)
    made["recovery_success_rate"] = succeeded / (succeeded + failed) if succeeded + failed else 1.0
    spent_s = sum((part.get("mttr_seconds") or 0.0) * part.get("recoveries", {}).get("succeeded", 0) for part in given)
    made["mttr_seconds"] = spent_s / succeeded if succeeded else None
    firsts = [part["first_error_at"] for part in given if part.get("first_error_at")]
    lasts = [part["last_error_at"] for part in given if part.get("last_error_at")]
    made["first_error_at"], made["last_error_at"] = min(firsts, default=None), max(lasts, default=None)
    return made
