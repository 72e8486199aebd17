"""Results as an aligned table, as JSON, and against the targets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.harness import Measured, Result
from bench.targets import Verdict


def number(value: float) -> str:
    """Three significant digits, with thousands as `k` and millions as `M`."""
    for limit, size, unit in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= limit:
            return f"{float(f'{value / size:.3g}'):g}{unit}"
    return f"{float(f'{value:.3g}'):g}"


def _cell(one: Measured, column: str = "") -> str:
    values = one.values(column)
    if not values:
        return "-"
    return f"{number(statistics.median(values))} [{number(min(values))}-{number(max(values))}]"


def _status(one: Measured) -> str:
    if one.failed:
        return f"FAILED: {one.failed}"
    return f"not installed ({one.missing})" if one.missing else ""


def table(result: Result) -> str:
    """One group, a row a line: median [min-max], ratio to the floor, further columns."""
    group = result.group
    header = [group.title, group.unit, "ratio", *group.columns, ""]
    lines = [header]
    for name, one in result.rows.items():
        ratio = result.ratio(name)
        if _status(one):
            lines.append([name, _status(one)])
            continue
        shown = "floor" if name == group.floor else ("-" if ratio is None else f"{ratio:.3g}x")
        lines.append([name, _cell(one), shown, *(_cell(one, column) for column in group.columns), one.row.note])
    whole = [line for line in lines if len(line) == len(header)]
    widths = [max(len(line[at]) for line in whole) for at in range(len(header))]
    widths[0] = max(len(line[0]) for line in lines)
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def machine_line(machine: dict[str, str]) -> str:
    return "; ".join(f"{key} {value}" for key, value in machine.items())


def verdicts(found: Sequence[Verdict]) -> str:
    """The targets, a line each."""
    width = max(len(verdict.name) for verdict in found)
    lines = [
        f"{verdict.mark:<12}  {verdict.name.ljust(width)}  {verdict.target:<10}  measured {verdict.shown}"
        for verdict in found
    ]
    return "\n".join(["Targets", "-------", *lines])


def as_json(
    machine: dict[str, str], rounds: int, scale: float, results: Sequence[Result], found: Sequence[Verdict]
) -> dict[str, Any]:
    """Everything, the samples of every round included."""
    return {
        "machine": machine,
        "rounds": rounds,
        "scale": scale,
        "groups": [
            {
                "key": result.group.key,
                "title": result.group.title,
                "unit": result.group.unit,
                "floor": result.group.floor,
                "rows": [
                    {
                        "name": name,
                        "note": one.row.note,
                        "missing": one.missing,
                        "failed": one.failed,
                        "median": one.median(),
                        "ratio": result.ratio(name),
                        "samples": [{"value": s.value, **s.more} for s in one.samples],
                    }
                    for name, one in result.rows.items()
                ],
            }
            for result in results
        ],
        "targets": [{"name": v.name, "target": v.target, "measured": v.measured, "passed": v.passed} for v in found],
    }
