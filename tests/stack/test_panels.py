"""Every panel shows data: the demo under faults, a real Prometheus, and each query of each board asked of it.

Two processes are watched: one on SQLite, and one on a NATS server that is away for a while.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from local_stack import SERVERS, Stack

from dashboards.build import BOARDS
from dashboards.promql import EXEMPLIFIED, FOREIGN
from tests import nats_kit
from tests.server_kit import Server, fetch, free_port, need, running
from tests.stack_kit import spans_of, until

#: Seconds within which every panel must show data: several times what it takes where nothing else runs.
WITHIN_S = 150.0
_STEP_S = 1
#: What is said of counters that are not named like one: the collector's, whose names are not ours to choose.
_NOT_OURS = re.compile(r"metric might not be a counter.*\"otelcol_")
#: All of everything, and what Grafana itself fills in at this step and this interval between scrapes.
ANY = {
    **dict.fromkeys(("datasource", "traces", "service"), ""),
    **dict.fromkeys(("job", "bus", "instance", "destination", "subscription"), ".*"),
    "__rate_interval": "4s",
    "__interval": f"{_STEP_S}s",
    "__range": "60s",
}
_DEMO = "import sys; from glassbus.cli import main; sys.exit(main())"


class Query(NamedTuple):
    """A query of a board, and what it is for."""

    of: str
    expr: str


def queries(board: dict[str, Any]) -> Iterator[Query]:
    """Of its panels and of the marks on its graphs."""
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield Query(f"{board['title']}: {panel['title']} ({target['refId']})", target["expr"])
    for mark in board["annotations"]["list"]:
        yield Query(f"{board['title']}: annotation {mark['name']}", mark["expr"])


def filled(expr: str, variables: dict[str, str]) -> str:
    """`expr` as Grafana would ask it. A variable that the board does not have is a failure."""

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        assert name in variables, f"no variable {name}: {expr}"
        return variables[name]

    return re.sub(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))", value, expr)


class Asked:
    """Prometheus, and since when it is asked."""

    def __init__(self, stack: Stack) -> None:
        self._url = stack.url("prometheus:9090")
        self._since = time.time()
        self.watched: list[Server] = []

    def series(self, expr: str) -> list[Any]:
        """What it has had since; an empty list where that is nothing but NaN. What it warns of is a failure."""
        now = time.time()
        given = {"query": expr, "start": str(self._since), "end": str(now), "step": str(_STEP_S)}
        answer = self._get("query_range", given)
        said = [*answer.get("warnings", []), *answer.get("infos", [])]
        assert not [one for one in said if not _NOT_OURS.search(one)], f"{said}: {expr}"
        return [one for one in answer["data"]["result"] if any(value != "NaN" for _, value in one["values"])]

    def values(self, selector: str, label: str) -> list[str]:
        """What a query variable would offer."""
        found: list[str] = self._get(f"label/{label}/values", {"match[]": selector})["data"]
        return found

    def exemplars(self, expr: str) -> list[Any]:
        """Those of all series in `expr`."""
        given = {"query": expr, "start": str(self._since), "end": str(time.time())}
        return [one for series in self._get("query_exemplars", given)["data"] for one in series["exemplars"]]

    def _get(self, api: str, given: dict[str, str]) -> dict[str, Any]:
        for server in self.watched:
            server.check()  # one that has died is the reason, and says why
        request = f"{self._url}/api/v1/{api}?{urllib.parse.urlencode(given)}"
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - what the tests started
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            pytest.fail(f"{error.read().decode()}: {given}")
        return found


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One of its own, with a second process to scrape."""
    for server in SERVERS:
        need(server)
    place = tmp_path_factory.mktemp("panels")
    made = Stack(place, tuned={"GLASSBUS_DECISION_WAIT": "1s", "GLASSBUS_SPANMETRICS_FLUSH": "1s"}, every="1s")
    made.at["second"] = f"127.0.0.1:{free_port()}"
    first = f'["{made.at["demo:9464"]}"]'
    configuration = place / "prometheus.yml"
    text = configuration.read_text("utf-8")
    assert first in text
    configuration.write_text(text.replace(first, f'["{made.at["demo:9464"]}", "{made.at["second"]}"]'), "utf-8")
    with made:
        yield made


@pytest.fixture(scope="module")
def asked(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """The demo on SQLite as it is, and another on NATS whose queue fills up."""
    place = tmp_path_factory.mktemp("demos")
    found = Asked(stack)
    with running(nats_kit.Server(place / "nats")) as nats, contextlib.ExitStack() as demos:
        options = ["demo", "--plain", "--url", nats.url, "--fault", "queue_overflow"]
        second = Server(
            [sys.executable, "-c", _DEMO, *options],
            f"http://{stack.at['second']}/readyz",
            place,
            name="second",
            environment={**stack.of_a_service("glassbus-demo"), "GLASSBUS_HTTP": stack.at["second"]},
        )
        for demo in (stack.demo(), second):
            demos.callback(demo.kill)
            found.watched.append(demo.start())
        until(lambda: found.series("glassbus_spool_messages"), within_s=WITHIN_S)
        nats.kill()
        until(lambda: found.series("glassbus_connection_up == 0"), within_s=WITHIN_S)
        nats.start()
        yield found


@pytest.mark.parametrize("board", [json.loads(board.to_json()) for board in BOARDS], ids=lambda board: board["uid"])
def test_every_panel_of_a_board_shows_data(asked: Asked, board: dict[str, Any]) -> None:
    assert {variable["name"] for variable in board["templating"]["list"]} <= ANY.keys()
    left = list(queries(board))

    def empty() -> list[Query]:
        left[:] = [query for query in left if not asked.series(filled(query.expr, ANY))]
        return left

    until(empty, lambda still: not still, within_s=WITHIN_S)
    assert not left, "no data:\n" + "\n".join(f"{query.of}: {query.expr}" for query in left)


@pytest.mark.parametrize("board", [json.loads(board.to_json()) for board in BOARDS], ids=lambda board: board["uid"])
def test_every_variable_of_a_board_has_something_to_choose(asked: Asked, board: dict[str, Any]) -> None:
    for variable in board["templating"]["list"]:
        if variable["type"] != "query":
            continue
        query = variable["query"]["query"]
        parts = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
        assert parts, query
        selector, label = filled(parts[1], ANY), parts[2]
        assert until(lambda: asked.values(selector, label), within_s=WITHIN_S), query  # noqa: B023 - called at once


def test_what_links_to_jaeger_search_for_is_found_there(stack: Stack, asked: Asked) -> None:
    """Each attribute; and each value that is written in a link."""
    wanted: set[tuple[str, str]] = set()
    for board in BOARDS:
        for panes in re.findall(r"/explore\?schemaVersion=1&orgId=1&panes=([^\"]+)", board.to_json()):
            search = json.loads(urllib.parse.unquote(panes))["g"]["queries"][0]
            assert search["service"] == "${service}"
            pairs = (pair.partition("=") for pair in search["tags"].split())
            wanted |= {(name, "" if value.startswith("${") else value) for name, _, value in pairs}
    assert len(wanted) >= 6

    def missing() -> set[tuple[str, str]]:
        url = f"{stack.url('jaeger:16686')}/api/traces?service=glassbus-demo&limit=500"
        spans = [span for trace in json.loads(fetch(url))["data"] for span in trace["spans"]]
        seen = {(tag["key"], value) for span in spans for tag in span["tags"] for value in ("", str(tag["value"]))}
        return wanted - seen

    assert until(missing, lambda left: not left, within_s=WITHIN_S) == set()


def test_exemplars_are_where_boards_ask_for_them_and_those_of_errors_lead_to_traces(stack: Stack, asked: Asked) -> None:
    def traces(metric: str) -> list[str]:
        exemplars = asked.exemplars(metric) or asked.exemplars(f"{metric}_bucket")
        return [example["labels"]["trace_id"] for example in exemplars]

    for metric in EXEMPLIFIED:
        assert until(lambda: traces(metric), within_s=WITHIN_S), metric  # noqa: B023 - called at once

    def stored() -> bool:
        return any(spans_of(stack, trace_id) for trace_id in traces("glassbus_errors_total")[:20])

    assert until(stored, within_s=WITHIN_S)


def test_what_other_programs_tell_is_told_by_them(asked: Asked) -> None:
    """A name of theirs that is wrong would be a 0 on a board for ever."""
    left = set(FOREIGN) - {
        # There from the first loss on: tests/stack/test_collector.py and the alerts' tests know these names too.
        "otelcol_exporter_send_failed_spans",
        "otelcol_exporter_enqueue_failed_spans",
    }

    def missing() -> set[str]:
        return {name for name in left if not asked.series(name)}

    assert until(missing, lambda names: not names, within_s=WITHIN_S) == set()


def test_a_panel_without_data_is_named(asked: Asked) -> None:
    """The check above can fail: nobody tells this metric, and a ratio of nothing is NaN alone."""
    assert asked.series("glassbus_nobody_tells_this") == []
    assert asked.series("vector(0) / vector(0)") == []
    with pytest.raises(AssertionError, match="no variable"):
        filled('up{job=~"$nobody"}', {})
