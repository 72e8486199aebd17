"""What grafanalib lacks of today's Grafana, in one place.

grafanalib makes the panels; `extraJson` lays over them what it does not know. Its queries, variables and boards take no
such thing, so what is missing is added to their JSON here. What Grafana no longer reads is taken out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from grafanalib import core
from grafanalib._gen import DashboardEncoder

from dashboards.promql import EXEMPLIFIED

SCHEMA = 42
#: The datasource that each board chooses by its variable.
METRICS = {"type": "prometheus", "uid": "${datasource}"}

Json = dict[str, Any]

_OF_A_QUERY = ("datasource", "expr", "format", "hide", "instant", "legendFormat", "refId")
_OF_A_VARIABLE = ("allValue", "current", "hide", "includeAll", "label", "multi", "name", "options", "query", "refresh")
_NO_LONGER_READ = {
    "cacheTimeout", "editable", "error", "height", "hideTimeOverride", "maxDataPoints", "maxPerRow", "minSpan",
    "repeatDirection", "span", "columns", "fontSize", "color", "mappings", "cards", "dataFormat", "heatmap",
    "hideZeroBuckets", "highlightCards", "legend", "reverseYBuckets", "tooltip", "xAxis", "xBucketNumber",
    "xBucketSize", "yAxis", "yBucketBound", "yBucketNumber", "yBucketSize",
    "__inputs", "gnetId", "hideControls", "rows", "sharedCrosshair", "style",
}  # fmt: skip


def query(expr: str, legend: str, ref: str, *, form: str = "time_series", exemplars: bool = False) -> Json:
    """A query of a panel: of tables for one moment, else for the range; with exemplars, where there can be any."""
    instant = form == "table"
    exemplars = exemplars and any(name in expr for name in EXEMPLIFIED)
    made = core.Target(expr=expr, legendFormat=legend, refId=ref, instant=instant, format=form, datasource=METRICS)
    known = made.to_json_data()
    return {key: known[key] for key in _OF_A_QUERY} | {
        "editorMode": "code",
        "exemplar": exemplars,
        "range": not instant,
    }


def variable(name: str, label: str, description: str, ask: str, *, kind: str = "query", **known: Any) -> Json:
    """A template variable. `ask` is a PromQL `label_values(…)`, or the type of datasource to choose from."""
    refresh = core.REFRESH_ON_TIME_RANGE_CHANGE
    made = core.Template(name=name, label=label, query=ask, type=kind, refresh=refresh, **known).to_json_data()
    kept = {key: made[key] for key in _OF_A_VARIABLE}
    kept |= {"type": kind, "description": description, "skipUrlSync": False}
    kept["current"] = {"selected": True, "text": ["All"], "value": ["$__all"]} if made["includeAll"] else {}
    if kind == "datasource":
        return kept
    return kept | {
        "datasource": METRICS,
        "definition": ask,
        "query": {"qryType": 1, "query": ask, "refId": f"variable-{name}"},
        "sort": core.SORT_ALPHA_ASC,
    }


def annotation(name: str, expr: str, title: str, text: str, colour: str, *, shown: bool) -> Json:
    """Marks on every graph of a board, where `expr` has a value."""
    return {
        "name": name,
        "datasource": METRICS,
        "enable": shown,
        "expr": expr,
        "hide": False,
        "iconColor": colour,
        "step": "15s",
        "textFormat": text,
        "titleFormat": title,
        "useValueForTime": False,
    }


def board(panels: Sequence[core.Panel], variables: Sequence[Json], annotations: Sequence[Json], **known: Any) -> str:
    """The JSON of a board, as it is committed."""
    made = core.Dashboard(
        panels=list(panels),
        templating=core.Templating(list=list(variables)),
        annotations=core.Annotations(list=list(annotations)),
        schemaVersion=SCHEMA,
        editable=False,
        graphTooltip=core.GRAPH_TOOLTIP_MODE_SHARED_CROSSHAIR,
        timezone="browser",
        **known,
    )
    plain: Json = json.loads(json.dumps(made.auto_panel_ids().to_json_data(), cls=DashboardEncoder))
    plain["panels"] = [_panel(panel) for panel in plain["panels"]]
    plain = _tidy(plain) | {"editable": False, "id": None, "fiscalYearStartMonth": 0, "liveNow": False}
    return json.dumps(plain, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _panel(of: Json) -> Json:
    if of["type"] == "row":
        return {key: of[key] for key in ("collapsed", "gridPos", "id", "panels", "title", "type")}
    of["options"].pop("fieldOptions", None)
    return _tidy(of)


def _tidy(of: Json) -> Json:
    return {key: value for key, value in of.items() if key not in _NO_LONGER_READ and value is not None}
