"""What every board has: variables, annotations, links to the others, and its panels laid out row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from grafanalib import core

from dashboards import grafana
from dashboards.grafana import Json
from dashboards.look import BAD, CALM, CAUTION, GOOD
from dashboards.promql import Like, Other, Unknown, appeared, began, foreign, foreign_values, label_values, stepped
from glassbus.telemetry.catalogue import SPANS

#: {uid: title}, in the order in which they are read.
BOARDS = {
    "glassbus-overview": "Overview",
    "glassbus-errors": "Errors & recovery",
    "glassbus-breakers": "Breakers & connections",
    "glassbus-queues": "Queues & dead letters",
    "glassbus-telemetry": "Telemetry & overhead",
}
TAG = "glassbus"
_ACROSS = 24
_ATTRIBUTES = {name for span in SPANS for name in span.attributes}
#: Where the alerts say that their runbooks are.
RUNBOOKS = "http://localhost:9464/runbooks/"
#: Alerts of ours.
OURS = Like("Glassbus.+")


class Board(NamedTuple):
    """A board. `marks`: what is marked on its graphs from the start, being what explains them; all the others are one
    click away. `narrows`: whether its panels have a destination or subscription to choose."""

    uid: str
    says: str
    panels: Sequence[core.Panel]
    marks: tuple[str, ...]
    narrows: bool = True

    def to_json(self) -> str:
        return grafana.board(
            _laid_out(self.panels),
            _variables(self.narrows),
            _annotations(self.marks),
            title=f"Glassbus / {BOARDS[self.uid]}",
            uid=self.uid,
            description=self.says,
            tags=[TAG],
            links=[_link_to(uid) for uid in BOARDS if uid != self.uid],
            time=core.Time("now-1h", "now"),
            refresh="30s",
            version=1,
        )


#: In a link, what the cell of a table says.
CELL = "${__value.raw}"


def of(label: str) -> str:
    """In a link, what the label of a series says."""
    return f"${{__field.labels.{label}}}"


def to_board(uid: str) -> Json:
    """A link from a value to another board, with the same variables and time."""
    return _link(f"Open {BOARDS[uid]}", f"/d/{uid}?${{__url_time_range}}&${{__all_variables}}")


def to_board_of(uid: str, variable: str, value: str) -> Json:
    """The same, with `variable` set to `value` alone, which is `of(…)` or `CELL`."""
    kept = "&".join(f"${{{name}:queryparam}}" for name in ("datasource", "traces", "job", "bus"))
    return _link(f"Open {BOARDS[uid]} for it", f"/d/{uid}?${{__url_time_range}}&{kept}&var-{variable}={value}")


def to_traces(title: str, attributes: Mapping[str, str], *, slower_than: str = "") -> Json:
    """A link to the traces in Jaeger of which a span has these attributes, and lasts so long.

    Values may be `of(…)` or `CELL`. Raises Unknown for an attribute that no span has.
    """
    if unknown := attributes.keys() - _ATTRIBUTES:
        raise Unknown(f"no span has {sorted(unknown)}")
    wanted = " ".join(f"{name}={value}" for name, value in attributes.items())
    asked = {"refId": "A", "queryType": "search", "service": "${service}", "tags": wanted, "limit": 50}
    asked |= {"minDuration": slower_than} if slower_than else {}
    pane = {
        "datasource": "${traces}",
        "queries": [asked | {"datasource": {"type": "jaeger", "uid": "${traces}"}}],
        "range": {"from": "${__from}", "to": "${__to}"},
    }
    # Grafana fills the variables in before the browser sees the address, so they stay as they are.
    panes = json.dumps({"g": pane}, separators=(",", ":")).replace('"', "%22").replace(" ", "%20")
    return _link(title, f"/explore?schemaVersion=1&orgId=1&panes={panes}", new=True)


def runbook(alert: str) -> Json:
    """A link of a panel to what to do about an alert."""
    return _link(f"Runbook: {alert}", f"{RUNBOOKS}{alert}", new=True)


#: The runbook of the alert that a cell names.
RUNBOOK_OF_CELL = {"title": "Open its runbook", "url": f"{RUNBOOKS}{CELL}", "targetBlank": True}


def _link(title: str, url: str, *, new: bool = False) -> Json:
    return {"title": title, "url": url, "targetBlank": new}


def _link_to(uid: str) -> core.DashboardLink:
    title = BOARDS[uid]
    return core.DashboardLink(
        title=title, type="link", uri=f"/d/{uid}", icon="dashboard", includeVars=True, keepTime=True, tooltip=title
    )


def _variables(narrows: bool) -> list[Json]:
    def chosen(name: str, label: str, says: str, ask: str, *, shown: bool = True, every: str | None = ".*") -> Json:
        """`every` is what All stands for, so that what lacks the label is in; without it, all that there are."""
        hide = core.SHOW if shown else core.HIDE_VARIABLE
        return grafana.variable(name, label, says, ask, multi=True, includeAll=True, allValue=every, hide=hide)

    def source(name: str, label: str, says: str, kind: str) -> Json:
        return grafana.variable(name, label, says, kind, kind="datasource")

    ours = ("messages_published_total", "messages_settled_total")
    return [
        source("datasource", "Metrics", "The Prometheus that scrapes the buses.", "prometheus"),
        source("traces", "Traces", "The Jaeger that keeps their traces.", "jaeger"),
        chosen("job", "Job", "Scrape jobs of services with a bus.", label_values("job", "build_info"), every=None),
        chosen("bus", "Bus", "Buses, by name.", label_values("bus", "build_info", within="job")),
        chosen("instance", "Instance", "Processes.", label_values("instance", "build_info", within="job bus")),
        chosen(
            "destination",
            "Destination",
            "Declared topics and patterns. What has no destination is left out when one is chosen.",
            label_values("destination", *ours, within="job bus"),
            shown=narrows,
        ),
        chosen(
            "subscription",
            "Subscription",
            "Named handlers, each with its own queue.",
            label_values("subscription", "messages_settled_total", within="job bus"),
            shown=narrows,
        ),
        grafana.variable(
            "service",
            "Service in Jaeger",
            "The service that links to Jaeger search, as the collector's span metrics name it.",
            foreign_values("service_name", "traces_span_metrics_calls_total"),
        ),
    ]


def _annotations(shown: tuple[str, ...]) -> list[Json]:
    """Each marks the moment at which something began: what lasts would cover the graphs."""
    by, moved = "bus breaker from_state to_state", "breaker_transitions_total"
    name, on_bus = "{{breaker}}: {{from_state}} to {{to_state}}", "on bus {{bus}}"
    firing = foreign("ALERTS", alertname=OURS, alertstate="firing", severity=Other("info"))
    marks = {
        "Breakers that opened": (stepped(moved, by, from_state="closed", to_state="open"), name, on_bus, BAD),
        "Breakers that closed": (stepped(moved, by, to_state="closed"), name, on_bus, GOOD),
        "Alerts": (began(firing), "{{alertname}} fires", "{{severity}}: {{subscription}}", CAUTION),
        "Starts and deploys": (
            appeared("build_info", "bus instance version"), "{{instance}} runs {{version}}", on_bus, CALM,
        ),
    }  # fmt: skip
    if unknown := set(shown) - marks.keys():
        raise Unknown(f"no marks {sorted(unknown)}; there are {', '.join(marks)}")
    return [grafana.annotation(title, *mark, shown=title in shown) for title, mark in marks.items()]


def _laid_out(panels: Sequence[core.Panel]) -> list[core.Panel]:
    """Each panel to the right of the last where it fits, else below; a row stands alone."""
    x = y = high = 0
    for panel in panels:
        place = panel.gridPos
        if x + place.w > _ACROSS:
            x, y, high = 0, y + high, 0
        place.x, place.y = x, y
        x, high = x + place.w, max(high, place.h)
    return list(panels)
