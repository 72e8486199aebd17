"""What is promised, as ratios inside one run wherever the machine would otherwise decide."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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


def _ratio(group: str, row: str, floor: str = "") -> Callable[[Mapping[str, Result]], float | None]:
    def read(results: Mapping[str, Result]) -> float | None:
        return results[group].ratio(row, floor) if group in results else None

    return read


def _median(group: str, row: str, column: str = "") -> Callable[[Mapping[str, Result]], float | None]:
    def read(results: Mapping[str, Result]) -> float | None:
        found = results[group].rows.get(row) if group in results else None
        return found.median(column) if found is not None else None

    return read


def _beyond(group: str, row: str, base: str) -> Callable[[Mapping[str, Result]], float | None]:
    """Median over the rounds of `row` minus `base` in the same round."""

    def read(results: Mapping[str, Result]) -> float | None:
        if group not in results:
            return None
        mine, other = results[group].rows.get(row), results[group].rows.get(base)
        if mine is None or other is None or not mine.samples or not other.samples:
            return None
        return statistics.median(a - b for a, b in zip(mine.values(), other.values(), strict=False))

    return read


@dataclass(frozen=True)
class Target:
    """`limit` is the least value when `at_least`, else the most."""

    name: str
    limit: float
    unit: str
    at_least: bool
    read: Callable[[Mapping[str, Result]], float | None]

    def judge(self, results: Mapping[str, Result]) -> Verdict:
        sign = ">=" if self.at_least else "<="
        value = self.read(results)
        passed = None if value is None else (value >= self.limit if self.at_least else value <= self.limit)
        shown = "-" if value is None else f"{value:.3g}{self.unit}"
        return Verdict(self.name, f"{sign} {self.limit:g}{self.unit}", value, passed, shown)


TELEMETRY_ON = "glassbus, telemetry on"
BARE = "glassbus, bare"

TARGETS = (
    Target("telemetry on, publish, against the raw queue", 0.15, "x", True, _ratio("memory", TELEMETRY_ON)),
    Target("failed attempt handled and traced, p50", 25, " us", False, _median("errors", TELEMETRY_ON)),
    Target("failed attempt handled and traced, p99", 1000, " us", False, _median("errors", TELEMETRY_ON, "p99")),
    Target("telemetry's share of CPU, 100 us handler", 1.05, "x", False, _ratio("overhead", TELEMETRY_ON, BARE)),
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
