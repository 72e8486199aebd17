"""Numbers, times and texts as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

_BLOCKS = "▁▂▃▄▅▆▇█"
ARROWS = {"rising": "▲", "new": "✱", "steady": "·", "falling": "▼", "gone": "○"}


def moment(at: float | None) -> str:
    """Wall time in UTC, to the second."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%SZ}" if at else "-"


def span(seconds: float) -> str:
    """A duration in one unit, or two."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def line(text: str, cap: int) -> str:
    """`text` on one line of at most `cap` characters, with nothing in it that a terminal would obey."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[: cap + 1])
    return shown if len(shown) <= cap else shown[: cap - 1] + "…"


def rate(per_second: float) -> str:
    """Errors a second, a minute or an hour: whichever reads best."""
    for number, unit in ((per_second, "s"), (per_second * 60, "min")):
        if number >= 1:
            return f"{number:,.1f}/{unit}"
    return f"{per_second * 3600:,.1f}/h" if per_second else "0"


def compared(recent: int, usual: float | None, ratio: float | None) -> str:
    """What is usual, and how many times as many there are now."""
    if usual is None:
        return "no past to compare with"
    if not usual:
        return "usually none in 15 min"
    times = "" if ratio is None or recent == 0 else f", x{ratio:,.1f}"
    return f"usually {usual:,.0f} in 15 min{times}"


def sparkline(counts: Sequence[int], width: int = 24) -> str:
    """`counts` as a row of blocks; sums of neighbours where there are more than `width`."""
    if not counts:
        return ""
    each = -(-len(counts) // width)
    offset = len(counts) % each
    groups = [sum(counts[:offset])] if offset else []
    groups += [sum(counts[start : start + each]) for start in range(offset, len(counts), each)]
    most = max(groups)
    if not most:
        return _BLOCKS[0] * len(groups)
    return "".join(
        " " if not number else _BLOCKS[min(len(_BLOCKS) - 1, number * len(_BLOCKS) // (most + 1))] for number in groups
    )
