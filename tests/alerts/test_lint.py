"""Every alert has what an operator needs of it, and names only what is exported."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from glassbus.cli import COMMANDS
from glassbus.drill import table
from tests.alerts.promql import problems
from tests.alerts.rulebook import (
    CHECKS,
    DASHBOARD_BASE,
    NAMES,
    RECORDED,
    RULES,
    RUNBOOK_BASE,
    RUNBOOKS,
    SEVERITIES,
    UNIT_TESTS,
    Rule,
    commands,
    fenced,
    read,
    runbook,
)
from tests.server_kit import REPOSITORY

BOARDS = {
    board["uid"]: board
    for path in (REPOSITORY / "dashboards" / "json").glob("*.json")
    for board in [json.loads(path.read_text("utf-8"))]
}
SECTIONS = ["Meaning", "Impact", "Diagnosis", "Mitigation", "Reproduce"]
#: What a reader of a runbook replaces.
PLACEHOLDERS = frozenset({"BUS", "SUB", "CATEGORY", "ACTION"})

each_rule = pytest.mark.parametrize("rule", RULES, ids=[rule.id for rule in RULES])
each_alert = pytest.mark.parametrize("name", NAMES)


def test_no_two_rules_are_taken_for_one_another() -> None:
    assert len({rule.id for rule in RULES}) == len(RULES)


@each_rule
def test_a_rule_says_what_who_and_where(rule: Rule) -> None:
    assert rule.name == "Watchdog" or re.fullmatch(r"Glassbus[A-Z][A-Za-z]+", rule.name)
    assert rule.labels["severity"] in SEVERITIES
    assert set(rule.annotations) == {"summary", "description", "runbook_url", "dashboard_url"}
    assert rule.annotations["runbook_url"] == RUNBOOK_BASE + rule.name
    assert "source" not in rule.labels, "that is how what the bus itself pushes is told from rules"


@each_rule
def test_its_dashboard_is_there_with_the_variables_that_are_set(rule: Rule) -> None:
    found = re.fullmatch(re.escape(DASHBOARD_BASE) + r"([\w-]+)(\?.+)?", rule.annotations["dashboard_url"])
    assert found is not None
    variables = {one["name"] for one in BOARDS[found[1]]["templating"]["list"]}
    assert set(re.findall(r"var-(\w+)=", found[2] or "")) <= variables


@each_rule
def test_it_names_only_what_is_exported(rule: Rule) -> None:
    assert problems(rule.expression, set(RECORDED)) == []


@pytest.mark.parametrize("name", RECORDED)
def test_recording_rules_do_so_too_and_are_named_by_level_metric_and_operation(name: str) -> None:
    assert re.fullmatch(r"bus(_subscription)?:glassbus_[a-z_]+:[a-z0-9_]+", name)
    assert problems(RECORDED[name], set(RECORDED)) == []


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_series_is_read_by_somebody(name: str) -> None:
    shown = " ".join(path.read_text("utf-8") for path in (REPOSITORY / "dashboards" / "json").glob("*.json"))
    read_by = [rule.expression for rule in RULES] + list(RECORDED.values()) + [runbook(one) for one in NAMES] + [shown]
    assert any(re.search(rf"{re.escape(name)}(?!\w)", one) for one in read_by)


def test_queries_are_lifted_from_a_runbook_with_all_that_they_name() -> None:
    text = '```promql\nup\nsum by (job) (x{a="b"})\n```\n```sh\nglassbus health   # all\n```\n'
    assert fenced(text, "promql") == ["up", 'sum by (job) (x{a="b"})']
    assert commands(text + "so `glassbus dlq list\n--limit 3` helps") == [
        "glassbus health",
        "glassbus dlq list --limit 3",
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        "glassbus_erors_total",
        "rate(glassbus_errors_total{categry='x'}[5m])",
        "glassbus_errors_total{category='timeout'}",
        "glassbus_errors_total{category=~'timeout_error|timeout'}",
        "glassbus_error_handling_seconds",
        "glassbus_errors_total_count",
        "sum by (subscripton) (glassbus_handlers_limit)",
        "glassbus_handlers_limit / on (instanz) glassbus_handlers_in_flight",
        "bus:glassbus_unrecorded:sum",
        "{__name__=~'otelcol_exporter_lost_spans(_total)?'}",
        "glassbus_handlers_limit and on (bus) node_load1",
    ],
)
def test_the_check_of_names_finds(wrong: str) -> None:
    assert problems(wrong, set(RECORDED)) != []


@each_alert
def test_its_runbook_has_every_section_in_order_and_something_in_each(name: str) -> None:
    text = runbook(name)
    assert text.startswith(f"# {name}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    for section in re.split(r"^## .+$", text, flags=re.MULTILINE)[1:]:
        assert len(section.split()) >= 3
    assert text.endswith(f"## Reproduce\n\n```sh\nglassbus drill {name}\n```\n")


def test_no_runbook_is_of_an_alert_that_is_gone() -> None:
    assert sorted(path.stem for path in RUNBOOKS.glob("*.md")) == NAMES


@each_alert
def test_the_queries_of_its_runbook_name_only_what_is_exported(name: str) -> None:
    queries = fenced(runbook(name), "promql")
    assert queries, "a runbook has queries to paste"
    assert [said for query in queries for said in problems(query, set(RECORDED), PLACEHOLDERS)] == []


@each_alert
def test_the_alerts_that_its_runbook_leads_to_exist(name: str) -> None:
    pushed = {"GlassbusMessageDeadLettered", "GlassbusBreakerOpen"}  # docs/escalation.md
    assert set(re.findall(r"\bGlassbus[A-Z]\w+", runbook(name))) <= set(NAMES) | pushed


@each_alert
def test_the_commands_of_its_runbook_are_understood(name: str) -> None:
    for command in commands(runbook(name)):
        assert understood(command), command


@pytest.mark.parametrize(
    "wrong",
    [
        "glassbus dlq list --subscripton x",
        "glassbus dlq replay --subscription x",
        "glassbus errors trend",
        "glassbus audits",
    ],
)
def test_the_check_of_commands_finds(wrong: str) -> None:
    assert not understood(wrong)


def understood(command: str) -> bool:
    """Whether `glassbus` takes these arguments. Nothing is run."""
    _, name, *words = shlex.split(command.replace("CATEGORY", "timeout_error"))
    module = {known: path for known, path, _ in COMMANDS}.get(name)
    if module is None:
        return False
    parser = argparse.ArgumentParser(prog=name)
    importlib.import_module(module).configure(parser)
    if not words:  # the sentence names the command as such
        return True
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            taken = parser.parse_args(words)
        except SystemExit as end:
            # A verb in a sentence may stand without what it is to act on.
            return len(words) == 1 and end.code == 2 and _is_verb(parser, words[0])
    # Without ids these ask for --all, which the parser itself does not know.
    return len(words) == 1 or bool(getattr(taken, "ids", True) or getattr(taken, "all", False))


def _is_verb(parser: argparse.ArgumentParser, word: str) -> bool:
    return any(isinstance(one, argparse._SubParsersAction) and word in one.choices for one in parser._actions)


@each_rule
def test_a_unit_test_sees_it_fire_and_the_same_one_sees_it_not_fire(rule: Rule) -> None:
    tests = {(check.file, check.test) for check in CHECKS if any(_is_of(rule, labels) for labels in check.firing)}
    assert tests, "no unit test sees it fire"
    if rule.name == "Watchdog":
        return
    quiet = {
        (check.file, check.test)
        for check in CHECKS
        if check.alert == rule.name and not any(_is_of(rule, labels) for labels in check.firing)
    }
    assert tests & quiet, "no unit test sees it both fire and not fire"


def _is_of(rule: Rule, labels: dict[str, str]) -> bool:
    fixed = {key: value for key, value in rule.labels.items() if "{{" not in value}
    return fixed.items() <= labels.items() and any(
        check.alert == rule.name and labels in check.firing for check in CHECKS
    )


def test_unit_tests_name_only_alerts_that_exist() -> None:
    # A misspelt name with exp_alerts: [] would pass.
    assert {check.alert for check in CHECKS} == set(NAMES)


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.name)
def test_unit_tests_feed_only_what_is_exported(path: Path) -> None:
    fed = {one["series"] for test in read(path)["tests"] for one in test["input_series"]}
    made_up = {"something_else"}
    wrong = [said for series in fed for said in problems(series, set(RECORDED)) if not any(m in said for m in made_up)]
    # A collector may be set up so that its counters end in _total.
    assert [one for one in wrong if not re.fullmatch(r"nobody exports otelcol_\w+_spans_total", one)] == []


@each_rule
def test_it_has_a_drill(rule: Rule) -> None:
    assert rule.id in table.BY_ALERT


def test_no_drill_is_of_a_rule_that_is_gone() -> None:
    assert set(table.BY_ALERT) == {rule.id for rule in RULES}


@each_alert
def test_it_is_in_the_table_of_the_documentation(name: str) -> None:
    assert re.search(
        rf"^\| \[`{name}`\]\(../alerts/runbooks/{name}\.md\) \|",
        (REPOSITORY / "docs" / "alerting.md").read_text("utf-8"),
        re.MULTILINE,
    )
