"""The committed boards: current, and as an operator may expect of each of them, whatever is on it."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest

from dashboards import look
from dashboards.build import BOARDS, FOLDER, rendered
from dashboards.frame import BOARDS as TITLES
from dashboards.frame import RUNBOOKS
from dashboards.look import Levels
from dashboards.promql import FOREIGN, Like, Other, Unknown, foreign, label_values, now, quantile, rate, select, under
from dashboards.slo import DEADLINE_S, OBJECTIVE
from glassbus.telemetry import catalogue
from glassbus.telemetry.catalogue import METRICS
from tests.server_kit import REPOSITORY

Json = dict[str, Any]

COMMITTED: dict[str, Json] = {path.name: json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))}
PANELS = [
    pytest.param(panel, id=f"{board['uid']}: {panel['title']}")
    for board in COMMITTED.values()
    for panel in board["panels"]
    if panel["type"] != "row"
]
each_board = pytest.mark.parametrize("board", COMMITTED.values(), ids=COMMITTED)
each_panel = pytest.mark.parametrize("panel", PANELS)

#: What may stand in brackets: $__rate_interval, all that is shown, and windows that are a comparison with another one.
WINDOWS = {"$__rate_interval", "$__range", "5m", "1h:30s"}


def exprs(panel: Json) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def test_what_is_committed_is_what_the_source_makes() -> None:
    assert {name: (FOLDER / name).read_text("utf-8") for name in COMMITTED} == rendered(), "run `make dashboards`"


def test_there_are_five_boards_in_the_order_of_their_links() -> None:
    assert [board.uid for board in BOARDS] == list(TITLES)


@each_board
def test_a_board_can_be_found_shared_and_not_edited_by_accident(board: Json) -> None:
    assert board["schemaVersion"] == 42
    assert board["uid"] in TITLES
    assert board["tags"] == ["glassbus"]
    assert board["version"] >= 1
    assert board["editable"] is False
    assert board["id"] is None, "an id is of one Grafana"
    assert board["description"]


@each_board
def test_no_datasource_is_hard_coded(board: Json) -> None:
    sources = set(re.findall(r'"uid": "([^"]*)"', json.dumps(board))) - {board["uid"]}
    assert sources <= {"${datasource}"}
    kinds = {variable["name"]: variable["query"] for variable in board["templating"]["list"][:2]}
    assert kinds == {"datasource": "prometheus", "traces": "jaeger"}


@each_board
def test_variables_choose_several_or_all_and_follow_the_time_range(board: Json) -> None:
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    for name in ("job", "bus", "instance", "destination", "subscription"):
        assert variables[name]["multi"] is True
        assert variables[name]["includeAll"] is True
        # All is what there is of jobs, so that those of other programs are out, and anything of the others.
        assert variables[name]["allValue"] == (None if name == "job" else ".*")
        assert variables[name]["refresh"] == 2
    assert all(variable["description"] for variable in variables.values())
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps([board["panels"], board["annotations"]])))
    assert used <= variables.keys()


@each_board
def test_links_to_the_other_boards_keep_variables_and_time(board: Json) -> None:
    assert {link["url"] for link in board["links"]} == {f"/d/{uid}" for uid in TITLES if uid != board["uid"]}
    assert all(link["includeVars"] and link["keepTime"] for link in board["links"])


@each_board
def test_breakers_alerts_and_deploys_are_marked_on_its_graphs(board: Json) -> None:
    marks = {mark["name"]: mark for mark in board["annotations"]["list"]}
    assert marks.keys() == {"Breakers that opened", "Breakers that closed", "Alerts", "Starts and deploys"}
    assert sum(mark["enable"] for mark in marks.values()) == 2, "what explains its graphs, the others at one click"


@each_board
def test_nothing_overlaps_and_nothing_sticks_out(board: Json) -> None:
    places = [panel["gridPos"] for panel in board["panels"]]
    taken = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(taken) == len(set(taken))
    assert all(0 <= x < 24 for x, _ in taken)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))


@each_board
def test_its_first_line_answers_whether_all_is_well(board: Json) -> None:
    first = list(itertools.takewhile(lambda panel: panel["type"] != "row", board["panels"]))
    assert {panel["type"] for panel in first} == {"stat"}
    assert all(panel["fieldConfig"]["defaults"]["thresholds"]["steps"] for panel in first)


@each_panel
def test_a_panel_says_what_it_shows_what_is_good_and_what_to_do(panel: Json) -> None:
    assert panel["title"]
    assert re.search(r"Good: .+ If not: .+", panel["description"], re.DOTALL), panel["description"]


@each_panel
def test_a_panel_has_a_unit_and_says_so_when_there_is_nothing(panel: Json) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    over_time = panel["type"] in ("heatmap", "state-timeline", "timeseries")
    assert over_time != ("noValue" in defaults), "over time it would fill gaps, as if something had been measured"


@each_panel
def test_queries_have_sound_windows_and_join_their_instances(panel: Json) -> None:
    for expr in exprs(panel):
        assert set(re.findall(r"\}?\[([^\].]+)\]", expr)) <= WINDOWS
        for counter in re.findall(r"(?:rate|increase)\(", expr):
            assert re.search(r"sum(?: by \([^)]*\))? ?\(?" + re.escape(counter), expr), f"not summed: {expr}"


@each_panel
def test_queries_name_only_what_is_declared(panel: Json) -> None:
    recorded = set(re.findall(r"record: (\S+)", (REPOSITORY / "alerts" / "glassbus.rules.yml").read_text("utf-8")))
    known = {metric.full_name for metric in METRICS}
    known |= {
        metric.full_name + end for metric in METRICS for end in ("_bucket", "_count") if metric.type == "histogram"
    }
    for name in re.findall(r"(?<![\w:])([a-zA-Z_:][\w:]*)\{", " ".join(exprs(panel))):
        assert name in known | recorded | FOREIGN.keys()


@each_panel
def test_runbooks_that_are_linked_are_of_alerts_that_there_are(panel: Json) -> None:
    rules = (REPOSITORY / "alerts" / "glassbus.rules.yml").read_text("utf-8")
    for link in panel.get("links", []):
        assert link["url"].startswith(RUNBOOKS)
        assert f"runbook_url: {link['url']}\n" in rules


def test_the_objective_is_the_alerts() -> None:
    rules = (REPOSITORY / "alerts" / "glassbus.rules.yml").read_text("utf-8")
    assert f"> 14.4 * {1 - OBJECTIVE:.3f}\n" in rules
    assert f'le=~"{DEADLINE_S:g}|{DEADLINE_S:g}[.]0"' in rules


def test_errors_latency_and_recovery_have_exemplars_and_lead_to_jaeger() -> None:
    for name, metric in ("errors", "errors_total"), ("overview", "process_duration_seconds_bucket"):
        targets = [target for panel in COMMITTED[f"{name}.json"]["panels"] for target in panel.get("targets", [])]
        assert any(target["exemplar"] and metric in target["expr"] for target in targets)
        assert "${traces}" in json.dumps(COMMITTED[f"{name}.json"])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: select("erors_total"),
        lambda: rate("errors_total", by="categry"),
        lambda: select("errors_total", categry="timeout_error"),
        lambda: select("errors_total", category="timeout"),
        lambda: select("errors_total", category=("timeout_error", "timeout")),
        lambda: select("errors_total", category=Other("timeout")),
        lambda: quantile(0.5, "errors_totl"),
        lambda: under(61, "message_age_seconds"),
        lambda: label_values("subscription", "errors_total"),
        lambda: foreign("down"),
        lambda: foreign("up", destination="x"),
    ],
)
def test_a_name_that_nobody_tells_is_an_error_when_boards_are_built(wrong: Any) -> None:
    with pytest.raises(Unknown):
        wrong()


def test_queries_are_narrowed_by_the_variables_that_their_metric_knows() -> None:
    scope = 'job=~"$job", instance=~"$instance", bus=~"$bus"'
    assert select("health_status") == f"glassbus_health_status{{{scope}}}"
    assert now("dead_letter_messages", by="subscription") == (
        f'max by (bus, subscription) (glassbus_dead_letter_messages{{{scope}, subscription=~"$subscription"}})'
    )
    assert select("messages_unaccounted", bus=Like("shop.*")) == (
        'glassbus_messages_unaccounted{job=~"$job", instance=~"$instance", bus=~"shop.*"}'
    )


def test_levels_colour_what_is_wrong_alone() -> None:
    assert [s["color"] for s in Levels(0.9, 0.5, low=True).steps("well")] == ["red", "orange", "well"]
    assert [s["color"] for s in Levels(1, 5).steps("well")] == ["well", "orange", "red"]
    assert [s["value"] for s in Levels(bad=3).steps("well")] == [None, 3]


def test_colours_are_of_the_values_that_there_are() -> None:
    assert look.PUBLISHED.keys() == set(catalogue.PUBLISH_OUTCOMES)
    assert look.SETTLED.keys() == set(catalogue.RESULTS)
    assert look.SEVERITIES.keys() == set(catalogue.SEVERITIES)
    assert look.OUTCOMES.keys() >= set(catalogue.ATTEMPT_OUTCOMES)
