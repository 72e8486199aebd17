"""Runs rows interleaved, so that what disturbs the machine disturbs them all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.rows import Group, NotInstalled, Row, Run, Sample


@dataclass
class Measured:
    """A row's samples, one a round, or why there are none."""

    row: Row
    samples: list[Sample] = field(default_factory=list)
    missing: str = ""
    failed: str = ""

    def values(self, column: str = "") -> list[float]:
        """The main values by round, or those of a further column."""
        if not column:
            return [sample.value for sample in self.samples]
        return [sample.more[column] for sample in self.samples if column in sample.more]

    def median(self, column: str = "") -> float | None:
        values = self.values(column)
        return statistics.median(values) if values else None


@dataclass
class Result:
    """One group, measured."""

    group: Group
    rows: dict[str, Measured]

    def ratio(self, name: str, to: str = "") -> float | None:
        """Median over the rounds of this row's value to that of row `to` (the floor) in the same round."""
        mine, floor = self.rows.get(name), self.rows.get(to or self.group.floor)
        if mine is None or floor is None or not mine.samples or not floor.samples:
            return None
        return statistics.median(a / b for a, b in zip(mine.values(), floor.values(), strict=False))


Progress = Callable[[str], None]


def measure(groups: Sequence[Group], rounds: int, run: Run, progress: Progress) -> list[Result]:
    """Every row once a round, groups one after the other, the first row another one each round.

    A round before the first, at a tenth of the size, warms up and finds what is not installed.
    """
    results = []
    for group in groups:
        measured = {row.name: Measured(row) for row in group.rows}
        warm = Run(run.scale / 10, run.folder)
        for number in range(-1, rounds):
            started = time.perf_counter()
            live = [m for m in measured.values() if not m.missing and not m.failed]
            first = max(number, 0) * 2 % len(live) if live else 0
            for one in live[first:] + live[:first]:
                _once(one, warm if number < 0 else run, keep=number >= 0)
            what = "warm-up" if number < 0 else f"round {number + 1} of {rounds}"
            progress(f"{group.key}: {what}, {time.perf_counter() - started:.1f} s")
        results.append(Result(group, measured))
    return results


def _once(one: Measured, run: Run, *, keep: bool) -> None:
    gc.collect()
    try:
        sample = one.row.measure(run)
    except NotInstalled as error:
        one.missing = str(error)
    except Exception as error:  # noqa: BLE001 - one broken peer must not end the whole table
        one.failed = f"{type(error).__name__}: {error}"
    else:
        if keep:
            one.samples.append(sample)
