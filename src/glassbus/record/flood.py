"""What to write when the same failure comes a thousand times a second: some lines, then one that counts the rest."""

from __future__ import annotations

from glassbus.facts import FactType
from glassbus.record.entries import FloodLine, Record, report_line
from glassbus.record.statistics import OTHER

#: Kinds of failure that are told apart within a second.
_KINDS_MAX = 4096


class FloodGuard:
    """Lets `per_second` facts of a type and a fingerprint through in each second, and counts the rest.

    Facts about no failure go by their subscription instead. Bounded in memory.
    """

    def __init__(self, per_second: int) -> None:
        self.folded = 0
        self._per_second = per_second
        self.second = 0
        self._seen: dict[tuple[FactType, str, str], int] = {}
        self._over: dict[tuple[FactType, str, str], _Rest] = {}

    def passes(self, record: Record, outcome: str = "", duration_s: float = 0.0) -> bool:
        """Whether `record` is to be written; if not, it is counted. First ask `ended`."""
        report = record[6]
        key = (record[2], report.fingerprint if report is not None else record[4], outcome)
        seen = self._seen.get(key, 0)
        if not seen and len(self._seen) >= _KINDS_MAX:
            key = (record[2], OTHER, outcome)
            seen = self._seen.get(key, 0)
        self._seen[key] = seen + 1
        if seen < self._per_second:
            return True
        self.folded += 1
        rest = self._over.get(key)
        if rest is None:
            rest = self._over[key] = _Rest(record)
        rest.count += 1
        rest.duration_s += duration_s
        rest.last = record
        return False

    def ended(self, at: float) -> list[FloodLine]:
        """The lines of a second that has passed, if it has."""
        second = int(at)
        if second == self.second:
            return []
        self.second = second
        return self.rest()

    def rest(self) -> list[FloodLine]:
        """What was counted and not told yet."""
        self._seen = {}
        if not self._over:
            return []
        over, self._over = self._over, {}
        return [rest.line(outcome) for (_, _, outcome), rest in over.items()]


class _Rest:
    __slots__ = ("count", "duration_s", "last", "since")

    def __init__(self, first: Record) -> None:
        self.since = first[1]
        self.last = first
        self.count = 0
        self.duration_s = 0.0

    def line(self, outcome: str) -> FloodLine:
        _, at, kind, _, subscription, _, report, _, _, _, error, _ = self.last
        told = report_line(report) if report is not None else None
        return FloodLine(at, self.since, kind.__name__, self.count, subscription, told, error, outcome, self.duration_s)
