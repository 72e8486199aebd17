"""Plots as SVG text, for a page that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import NamedTuple

from glassbus.record.analysis import BAR_S
from glassbus.record.wording import line

_WIDTH, _HEIGHT = 1000, 190
_LEFT, _TOP, _BOTTOM = 52, 8, 22
_LABEL_EVERY_S = 3 * 3600

#: Told apart by people who see colours differently, on light and on dark (after Okabe and Ito).
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a05195", "#8c8c8c")
_KNOWN = {
    "critical": "#8b1a1a",
    "high": "#d55e00",
    "medium": "#e69f00",
    "low": "#56b4e9",
    "succeeded": "#009e73",
    "failed": "#d55e00",
}


class Bars(NamedTuple):
    """Counts by name, in bars of a quarter of an hour that end with the one of wall time `now`."""

    series: Mapping[str, Sequence[int]]
    paint: Mapping[str, str]
    now: float


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name."""
    return {name: _KNOWN.get(name, _PALETTE[place % len(_PALETTE)]) for place, name in enumerate(names)}


def bars_svg(bars: Bars, title: str) -> str:
    """Stacked bars over time, with an axis in round numbers and hours in UTC. Each bar says what it is when hovered."""
    columns = list(zip(*bars.series.values(), strict=True))
    top = _round_up(max((sum(column) for column in columns), default=0))
    width = (_WIDTH - _LEFT) / max(1, len(columns))
    height = _HEIGHT - _TOP - _BOTTOM
    first = (int(bars.now // BAR_S) - len(columns) + 1) * BAR_S
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    parts = [f'<svg class="plot" {size} role="img" aria-label="{escape(title)}">']
    for share in (0, 0.5, 1):
        y = _TOP + height * (1 - share)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(top * share)}</text>')
    for place, column in enumerate(columns):
        begins = first + place * BAR_S
        x = _LEFT + place * width
        if begins % _LABEL_EVERY_S == 0:
            at = datetime.fromtimestamp(begins, UTC)
            parts.append(
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP + height}" y2="{_TOP + height + 5}"/>'
            )
            parts.append(f'<text x="{x + 3:.1f}" y="{_HEIGHT - 7}">{at:%H:%M}</text>')
        if any(column):
            parts.append(_bar(bars, column, x, width, height, top, begins))
    parts.append("</svg>")
    return "".join(parts)


def _bar(bars: Bars, column: Sequence[int], x: float, width: float, height: float, top: float, begins: float) -> str:
    parts, y = [], _TOP + height
    told = [f"{datetime.fromtimestamp(begins, UTC):%Y-%m-%d %H:%M}"]
    for name, count in zip(bars.series, column, strict=True):
        if not count:
            continue
        tall = max(0.6, height * count / top)
        y -= tall
        told.append(f"{line(name, 60)}: {count:,}")
        parts.append(
            f'<rect x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(0.5, width - 1):.1f}" height="{tall:.1f}" '
            f'fill="{bars.paint[name]}"/>'
        )
    return f"<g><title>{escape(chr(10).join(told))}</title>{''.join(parts)}</g>"


def spark_svg(counts: Sequence[int], width: int = 150, height: int = 26) -> str:
    """A small plot of `counts` without axes; the last bar is now, and time ends at the right edge."""
    most = max(counts, default=0)
    each = width / 96
    shown = list(counts)[-96:]
    start = width - each * len(shown)
    bars = "".join(
        f'<rect x="{start + place * each:.1f}" y="{height - max(1, height * count / most):.1f}" '
        f'width="{each:.1f}" height="{max(1, height * count / most):.1f}"/>'
        for place, count in enumerate(shown)
        if count
    )
    return f'<svg class="spark" viewBox="0 0 {width} {height}" width="{width}" height="{height}">{bars}</svg>'


def _round_up(most: float) -> float:
    """The next of 2, 4, 10, 20, 40, 100, …: its half is a round number too."""
    if most <= 2:
        return 2
    size = 10 ** math.floor(math.log10(most))
    return float(next(step * size for step in (1, 2, 4, 10) if step * size >= most))


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
