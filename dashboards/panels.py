"""One call for each kind of panel. The eye is to land on what is wrong: what is well has no colour of its own.

Every panel says in `says` what it shows, what is good, and what to do when it is not; `queries` are {legend: PromQL}.
`w` and `h` are in Grafana's grid, 24 across.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grafanalib import core

from dashboards.grafana import METRICS, Json, query
from dashboards.look import BAD, CALM, CLEAR, COUNT, NO_UNIT, PER_SECOND, Levels, State, step

Queries = Mapping[str, str]


class Column(NamedTuple):
    """A column of numbers in a table."""

    expr: str
    unit: str
    levels: Levels = Levels()


def tile(
    title: str,
    says: str,
    expr: str,
    unit: str = COUNT,
    levels: Levels | None = None,
    *,
    states: Sequence[State] = (),
    none: str = "0",
    links: Sequence[Json] = (),
    runbook: Json | None = None,
    w: int = 4,
    h: int = 4,
    **defaults: Any,
) -> core.Panel:
    """One number (or, with `states`, one word), coloured all over when it is not well. `none` is shown without any."""
    steps = (levels or Levels()).steps(CLEAR)
    return core.Stat(
        **_common(title, says, {"": expr}, w, h, runbook),
        format=NO_UNIT if states else unit,
        colorMode="background",
        graphMode="none" if states else "area",
        reduceCalc="lastNotNull",
        textMode="value",
        noValue=none,
        thresholds=steps,
        mappings=[_words(states)] if states else [],
        extraJson=_fields(color={"mode": "thresholds"}, links=list(links), **defaults)
        | {"options": {"text": {"valueSize": 34}, "wideLayout": True}},
    )


def graph(
    title: str,
    says: str,
    queries: Queries,
    unit: str,
    *,
    colours: Mapping[str, str] | None = None,
    stacked: bool = False,
    bars: bool = False,
    line: float | None = None,
    log: bool = False,
    top: float | None = None,
    links: Sequence[Json] = (),
    runbook: Json | None = None,
    w: int = 8,
    h: int = 8,
) -> core.Panel:
    """Lines (or bars) over time, from 0 up. `line` is where values are not to go.

    `colours` are by legend or /regular expression/. There is no value for "none": Grafana would draw gaps with it.
    """
    extra = _fields(
        # Without colours of their own, the higher line is the more purple: red and green keep their meaning.
        color={"mode": "palette-classic"} if colours else {"mode": "continuous-BlPu", "seriesBy": "max"},
        links=list(links),
        min=None if log else 0,
        max=top,
        custom={"axisBorderShow": False, "thresholdsStyle": {"mode": "off" if line is None else "dashed"}},
    )
    extra["options"] = {
        "legend": {"showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return core.TimeSeries(
        **_common(title, says, queries, w, h, runbook, exemplars=True),
        unit=unit,
        drawStyle="bars" if bars else "line",
        fillOpacity=80 if bars else 30 if stacked else 0,
        lineWidth=0 if bars else 1,
        showPoints="never",
        stacking={"mode": "normal", "group": "A"} if stacked else {"mode": "none"},
        scaleDistributionType="log" if log else "linear",
        scaleDistributionLog=10,
        thresholds=[step(None, CLEAR)] if line is None else [step(None, CLEAR), step(line, BAD)],
        overrides=[
            _override(name, color={"mode": "fixed", "fixedColor": colour}) for name, colour in (colours or {}).items()
        ],
        extraJson=extra,
    )


def timeline(
    title: str,
    says: str,
    queries: Queries,
    states: Sequence[State],
    *,
    runbook: Json | None = None,
    links: Sequence[Json] = (),
    w: int = 12,
    h: int = 8,
) -> core.Panel:
    """Which state each thing was in, over time."""
    return core.StateTimeline(
        **_common(title, says, queries, w, h, runbook),
        # Not by thresholds, which would hide the colours of the words.
        colorMode="fixed",
        fillOpacity=85,
        rowHeight=0.8,
        showValue="never",
        thresholds=[step(None, CLEAR)],
        mappings=[_words(states)],
        extraJson=_fields(links=list(links), unit=NO_UNIT)
        | {"options": {"legend": {"showLegend": True}, "tooltip": {"mode": "single"}}},
    )


def bars(
    title: str,
    says: str,
    queries: Queries,
    unit: str,
    levels: Levels | None = None,
    *,
    top: float | None = None,
    links: Sequence[Json] = (),
    runbook: Json | None = None,
    w: int = 8,
    h: int = 8,
) -> core.Panel:
    """One bar for each value now, the length by value."""
    return core.BarGauge(
        **_common(title, says, queries, w, h, runbook),
        displayMode="basic",
        orientation="horizontal",
        thresholds=(levels or Levels()).steps(CALM),
        # Named, because Grafana leaves a single bar without its name.
        extraJson=_fields(
            displayName="${__series.name}",
            unit=unit,
            decimals=1,
            min=0,
            max=top,
            noValue="none",
            links=list(links),
            color={"mode": "thresholds"},
        )
        | {"options": {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}},
    )


def heatmap(
    title: str,
    says: str,
    buckets: str,
    unit: str,
    *,
    runbook: Json | None = None,
    w: int = 12,
    h: int = 8,
) -> core.Panel:
    """How many observations came into each bucket of a histogram, over time."""
    return core.Heatmap(
        **_common(title, says, {"{{le}}": buckets}, w, h, runbook, form="heatmap", exemplars=True),
        options={
            "calculate": False,
            "cellGap": 1,
            "cellValues": {"unit": PER_SECOND},
            "color": {"mode": "scheme", "scheme": "Blues", "steps": 32, "exponent": 0.5, "reverse": False},
            "exemplars": {"color": "rgba(184,119,217,0.8)"},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "auto"},
            "showValue": "never",
            "tooltip": {"mode": "single", "show": True, "yHistogram": False},
            "yAxis": {"axisPlacement": "left", "unit": unit},
        },
        extraJson=_fields(unit=unit),
    )


def table(
    title: str,
    says: str,
    columns: Mapping[str, Column],
    *,
    first: Sequence[str],
    links: Mapping[str, Sequence[Json]] | None = None,
    widths: Mapping[str, int] | None = None,
    colours: Mapping[str, str] | None = None,
    runbook: Json | None = None,
    w: int = 24,
    h: int = 9,
) -> core.Panel:
    """One row for each combination of the labels `first`, sorted by the first of the columns.

    `links` and `widths` (pixels) are by label; `colours` are of the texts that the first label may have.
    """
    refs = dict(zip(string.ascii_uppercase, columns.items(), strict=False))
    values = {f"Value #{ref}" if len(refs) > 1 else "Value": name for ref, (name, _) in refs.items()}
    overrides = [_override(name, **_cells(column)) for name, column in columns.items()]
    overrides += [_override(label, links=list(to)) for label, to in (links or {}).items()]
    overrides += [_override(label, **{"custom.width": width}) for label, width in (widths or {}).items()]
    overrides += [_override(first[0], **_tinted(colours))] if colours else []
    common = _common(title, says, {name: column.expr for name, column in columns.items()}, w, h, runbook, form="table")
    return core.Table(
        **common,
        overrides=overrides,
        sortBy=[core.TableSortByField(next(iter(columns)), True)],
        thresholds=[step(None, CLEAR)],
        transformations=[
            {"id": "merge", "options": {}},
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"Time": True},
                    "indexByName": {name: at for at, name in enumerate([*first, *values])},
                    "renameByName": values,
                },
            },
        ],
        extraJson=_fields(unit=NO_UNIT, noValue="-", custom={"cellOptions": {"type": "auto"}, "minWidth": 80})
        | {"options": {"cellHeight": "sm", "footer": {"show": False}}},
    )


def row(title: str) -> core.Panel:
    """A headline across the board; what follows is below it."""
    return core.RowPanel(title=title, gridPos=core.GridPos(1, 24, 0, 0))


def _common(
    title: str,
    says: str,
    queries: Queries,
    w: int,
    h: int,
    runbook: Json | None,
    *,
    form: str = "time_series",
    exemplars: bool = False,
) -> Json:
    refs = zip(string.ascii_uppercase, queries.items(), strict=False)
    return {
        "title": title,
        "description": says,
        "dataSource": METRICS,
        "gridPos": core.GridPos(h, w, 0, 0),
        "links": [runbook] if runbook else [],
        "targets": [query(expr, legend, ref, form=form, exemplars=exemplars) for ref, (legend, expr) in refs],
    }


def _fields(**defaults: Any) -> Json:
    return {"fieldConfig": {"defaults": defaults}}


def _words(states: Sequence[State]) -> Json:
    options = {str(s.rank): {"text": s.name, "color": s.colour, "index": at} for at, s in enumerate(states)}
    return {"type": "value", "options": options}


def _override(name: str, **properties: Any) -> Json:
    """For a series or column of this name, or of a name that fits a /regular expression/."""
    return {
        "matcher": {"id": "byRegexp" if name.startswith("/") else "byName", "options": name},
        "properties": [{"id": key, "value": value} for key, value in properties.items()],
    }


def _tinted(colours: Mapping[str, str]) -> Json:
    options = {text: {"color": colour, "index": at} for at, (text, colour) in enumerate(colours.items())}
    return {"mappings": [{"type": "value", "options": options}], "custom.cellOptions": {"type": "color-text"}}


def _cells(column: Column) -> Json:
    steps = column.levels.steps(CLEAR)
    coloured = {"custom.cellOptions": {"type": "color-background", "mode": "basic"}} if len(steps) > 1 else {}
    return {
        "unit": column.unit,
        "decimals": 0 if column.unit == COUNT else 2,
        "thresholds": {"mode": "absolute", "steps": steps},
        **coloured,
    }
