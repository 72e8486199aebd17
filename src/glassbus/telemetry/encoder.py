"""Writes a scrape as text: what prometheus_client's encoders write, byte for byte, in a fraction of their time.

The labels of a series are rendered once and kept as a template for as long as the
series is there. Between parts it lets other threads run, so that a scrape holds up the event loop
for no longer than the interpreter's switch interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from prometheus_client.utils import floatToGoString

from glassbus.telemetry.catalogue import METRICS, Metric
from glassbus.telemetry.counts import Labels
from glassbus.telemetry.scrape import Example, Histogram, Scrape, pause

#: Series between two pauses.
_SERIES_A_TURN = 200

#: The value of a series, its lines as a template, and as they were written.
_Written = tuple[float | Histogram, bytes, bytes]

_WHOLE = [b"%d.0" % number for number in range(1000)]


def go(value: float) -> str:
    """A number as Go prints it."""
    text: str = floatToGoString(value)  # type: ignore[no-untyped-call]
    return text


def _number(value: float) -> bytes:
    if 0 <= value < 1000:
        whole = int(value)
        # Below a million Go and Python print alike.
        return _WHOLE[whole] if whole == value else repr(float(value)).encode()
    return go(value).encode()


class _Family:
    """What was written of one metric: the values of its series in order, how each was rendered, and their lines."""

    __slots__ = ("lines", "values", "written")

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.written: dict[Labels, _Written] = {}
        self.lines: list[bytes] = []


class Writer:
    """Keeps what it wrote between scrapes. Not for two threads at once: the last one wins, and both are right."""

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}

    def parts(self, scrape: Scrape, openmetrics: bool) -> list[bytes]:
        """All families of `scrape` in pieces, without the end mark of OpenMetrics."""
        parts: list[bytes] = []
        examples = scrape.examples if openmetrics else {}
        exemplified = {name for name, _, _ in examples}
        turn = 0
        for metric in METRICS:
            name = metric.name
            parts.append(_header(metric, openmetrics).encode())
            series: dict[Labels, Any] = scrape.histograms[name] if metric.type == "histogram" else scrape.values[name]
            family = self._families.get(name) or _Family()
            turn += len(series) >> 3  # to look at them takes a small part of what to write them takes
            # In the same order, too. No pairs are made of them: they would be work for the garbage collector.
            if list(series.values()) != family.values or list(series) != list(family.written):
                family, turn = _render(metric, series, family.written, turn)
            self._families[name] = family
            if name in exemplified:
                parts += [_with_examples(entry, name, labels, examples) for labels, entry in family.written.items()]
            else:
                parts += family.lines
            turn = _rest(turn)
        return parts


def _render(
    metric: Metric, series: Mapping[Labels, Any], before: Mapping[Labels, _Written], turn: int
) -> tuple[_Family, int]:
    """Render what differs from `before`."""
    family = _Family()
    family.values = list(series.values())
    lines, written = family.lines, family.written
    for labels, value in series.items():
        entry = before.get(labels)
        if entry is None or entry[0] != value:
            template = _template(metric, labels, value) if entry is None else entry[1]
            entry = (value, template, template % _numbers(value))
            turn = _rest(turn + 1)
        written[labels] = entry
        lines.append(entry[2])
    return family, turn


def _rest(turn: int) -> int:
    """Let other threads run, when it is time."""
    if turn < _SERIES_A_TURN:
        return turn
    pause()
    return 0


def _template(metric: Metric, labels: Labels, value: float | Histogram) -> bytes:
    """The lines of a series, to be filled in by `%`: which is four times as fast for bytes as for text."""
    if isinstance(value, tuple):
        return _histogram(metric, labels, value[0]).encode()
    return f"{metric.full_name}{_braces(_pairs(metric, labels))} %s\n".encode()


def _numbers(value: float | Histogram) -> tuple[bytes, ...]:
    """The numbers of a series, in the order of its lines."""
    if not isinstance(value, tuple):
        return (_number(value),)
    _, counts, total = value
    running = [_WHOLE[count] if count < 1000 else go(count).encode() for count in accumulate(counts)]
    return (*running, running[-1], _number(total))


def _with_examples(
    entry: _Written, name: str, labels: Labels, examples: Mapping[tuple[str, Labels, int], Example]
) -> bytes:
    value, template, text = entry
    numbers = _numbers(value)
    shown = tuple(number + _example(examples.get((name, labels, at))) for at, number in enumerate(numbers))
    return text if shown == numbers else template % shown


def _header(metric: Metric, openmetrics: bool) -> str:
    name = metric.full_name
    if not openmetrics:
        return f"# HELP {name} {metric.help}\n# TYPE {name} {metric.type}\n"
    name = name.removesuffix("_total") if metric.type == "counter" else name
    unit = f"# UNIT {name} {metric.unit}\n" if metric.unit else ""
    return f"# HELP {name} {metric.help}\n# TYPE {name} {metric.type}\n{unit}"


def _pairs(metric: Metric, labels: Labels) -> dict[str, str]:
    return dict(zip(("bus", *metric.labels), labels, strict=True))


def _braces(pairs: dict[str, str]) -> str:
    """Labels as a template, in alphabetical order."""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(pairs.items())) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"").replace("%", "%%")


def _histogram(metric: Metric, labels: Labels, bounds: tuple[float, ...]) -> str:
    name, pairs = metric.full_name, _pairs(metric, labels)
    lines = [f"{name}_bucket{_braces({**pairs, 'le': le})} %s\n" for le in (*map(go, bounds), "+Inf")]
    plain = _braces(pairs)
    return "".join(lines) + f"{name}_count{plain} %s\n{name}_sum{plain} %s\n"


def _example(found: Example | None) -> bytes:
    """The exemplar of a sample, where there is one."""
    if found is None:
        return b""
    place, value, at = found
    return f' # {{span_id="{place.span_id:016x}",trace_id="{place.trace_id:032x}"}} {go(value)} {at}'.encode()
