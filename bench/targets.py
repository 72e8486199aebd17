"""What is promised, as ratios inside one run wherever the machine would otherwise decide."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.blocking import RUNNING
from bench.harness import Result


@dataclass(frozen=True)
class Verdict:
    """One target. `measured` is None when its rows were not run, are not installed, or failed."""

    name: str
    target: str
    measured: float | None
    passed: bool | None
    shown: str

    @property
    def mark(self) -> str:
        return {True: "PASS", False: "MISS", None: "not measured"}[self.passed]


#: The values by round; empty when there are none.
Read = Callable[[Mapping[str, Result]], list[float]]


def _pairs(
    results: Mapping[str, Result], group: str, row: str, other: str, column: str = ""
) -> list[tuple[float, float]]:
    """`row` and `other` (the floor when empty) in the same rounds, by their main values or a further column."""
    if group not in results:
        return []
    result = results[group]
    mine, base = result.rows.get(row), result.rows.get(other or result.group.floor)
    if mine is None or base is None or mine.failed or base.failed:
        return []
    return list(zip(mine.values(column), base.values(column), strict=False))


def _ratio(group: str, row: str, floor: str = "") -> Read:
    return lambda results: [a / b for a, b in _pairs(results, group, row, floor)]


def _beyond(group: str, row: str, base: str, column: str = "") -> Read:
    return lambda results: [a - b for a, b in _pairs(results, group, row, base, column)]


def _of(group: str, row: str, column: str) -> Read:
    """A further column of a row as a share of its main value."""
    shares, whole = _values(group, row, column), _values(group, row)
    return lambda results: [a / b for a, b in zip(shares(results), whole(results), strict=False)]


def _values(group: str, row: str, column: str = "") -> Read:
    def read(results: Mapping[str, Result]) -> list[float]:
        found = results[group].rows.get(row) if group in results else None
        return found.values(column) if found is not None and not found.failed else []

    return read


@dataclass(frozen=True)
class Target:
    """`limit` is the least median when `at_least`, else the most."""

    name: str
    limit: float
    unit: str
    at_least: bool
    read: Read

    def judge(self, results: Mapping[str, Result]) -> Verdict:
        target = f"{'>=' if self.at_least else '<='} {self.limit:g}{self.unit}"
        values = self.read(results)
        if not values:
            return Verdict(self.name, target, None, None, "-")
        value, low, high = statistics.median(values), min(values), max(values)
        shown = f"{value:.3g}{self.unit} [{low:.3g}-{high:.3g}]"
        if low < self.limit < high:
            shown += ", too close to call: the limit lies within the rounds"
        return Verdict(self.name, target, value, value >= self.limit if self.at_least else value <= self.limit, shown)


TELEMETRY_ON = "glassbus, telemetry on"
BARE = "glassbus, bare"
# Rows of `bench.telemetry`, which imports this.
TAKES_ALL = "a collector that takes all"
DOWN = "a collector that is down"
SILENT = "a collector that never answers"
MEASURED = "by a run without it"
SAID = "as it says itself"
# Rows of `bench.scrape`.
BY_THE_CLIENT = "prometheus_client's encoder"
AT_WORK = "glassbus, all at work"


def _p99_beside(collector: str) -> Read:
    return _beyond("collector", collector, TAKES_ALL, "p99")


TARGETS = (
    Target("telemetry on, publish, against the raw queue", 0.2, "x", True, _ratio("memory", TELEMETRY_ON)),
    Target("latency that telemetry adds, one in flight, p50", 1, " us", False, _beyond("latency", TELEMETRY_ON, BARE)),
    Target("the same, p99", 5, " us", False, _beyond("latency", TELEMETRY_ON, BARE, "p99")),
    Target("failed attempt handled and traced, p50", 12, " us", False, _values("errors", TELEMETRY_ON)),
    Target("failed attempt handled and traced, p99", 40, " us", False, _values("errors", TELEMETRY_ON, "p99")),
    Target("error handed to the blocking face, p50", 100, " us", False, _values("blocking", RUNNING)),
    Target("error handed to the blocking face, p99", 10_000, " us", False, _values("blocking", RUNNING, "p99")),
    Target("telemetry's share of CPU, 100 us handler", 1.05, "x", False, _ratio("overhead", TELEMETRY_ON, BARE)),
    Target("publish beside a dead collector, p99 beyond a good one", 1000, " us", False, _p99_beside(DOWN)),
    Target("publish beside a silent collector, p99 beyond a good one", 1000, " us", False, _p99_beside(SILENT)),
    Target("telemetry's own account of its cost, against the truth", 0.9, "x", True, _of("self-cost", MEASURED, SAID)),
    Target("scrape of 500 subscriptions", 25, " ms", False, _values("scrape", AT_WORK)),
    Target("the event loop's longest gap beside it", 5, " ms", False, _values("scrape", AT_WORK, "longest gap ms")),
    Target(
        "durable full cycle, 256 publishers, against fsync", 8, "x", True, _ratio("durable", "glassbus, 256 publishers")
    ),
    Target(
        "import glassbus, beyond bare python", 200, " ms", False, _beyond("startup", "import glassbus", "bare python")
    ),
)


def judge(results: Mapping[str, Result]) -> list[Verdict]:
    """A verdict for every target."""
    return [target.judge(results) for target in TARGETS]
