"""The shipped rules, runbooks and unit tests of alerts, as data for the checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.server_kit import REPOSITORY

ALERTS = REPOSITORY / "alerts"
RULES_FILE = ALERTS / "glassbus.rules.yml"
RUNBOOKS = ALERTS / "runbooks"
UNIT_TESTS = sorted((ALERTS / "tests").glob("*.yml"))
SEVERITIES = ("emergency", "critical", "warning", "info", "none")
RUNBOOK_BASE = "http://localhost:9464/runbooks/"
DASHBOARD_BASE = "http://localhost:3000/d/"


class Rule(NamedTuple):
    """A rule that alerts. Its labels tell rules of one name apart."""

    name: str
    expression: str
    labels: dict[str, str]
    annotations: dict[str, str]
    lasts: str

    @property
    def id(self) -> str:
        """The name, with what tells it from others of that name."""
        tier = self.labels.get("long_window") or self.labels["severity"]
        return f"{self.name}/{tier}" if sum(one.name == self.name for one in RULES) > 1 else self.name


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


_ALL: list[dict[str, Any]] = [rule for group in read(RULES_FILE)["groups"] for rule in group["rules"]]
RECORDED: dict[str, str] = {rule["record"]: rule["expr"] for rule in _ALL if "record" in rule}
RULES = [
    Rule(rule["alert"], rule["expr"], rule["labels"], rule["annotations"], rule.get("for", ""))
    for rule in _ALL
    if "alert" in rule
]
NAMES = sorted({rule.name for rule in RULES})


class Check(NamedTuple):
    """What a unit test expects of an alert at one moment: the labels of those that fire, none or more."""

    file: str
    test: str
    alert: str
    firing: tuple[dict[str, str], ...]


CHECKS = [
    Check(path.name, test["name"], one["alertname"], tuple(alert["exp_labels"] for alert in one["exp_alerts"]))
    for path in UNIT_TESTS
    for test in read(path)["tests"]
    for one in test.get("alert_rule_test", ())
]


def runbook(name: str) -> str:
    return (RUNBOOKS / f"{name}.md").read_text("utf-8")


def fenced(text: str, language: str) -> list[str]:
    """The lines in code blocks of `language`, without comments and empty ones."""
    lines = [
        line
        for block in re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def commands(text: str) -> list[str]:
    """Every call of `glassbus` in a runbook, in a code block or in a sentence."""
    shell = [re.split(r"\s+#|\s*[|;]", line)[0] for line in fenced(text, "sh")]
    inline = re.findall(
        r"`(glassbus [^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).replace("\n", " ")
    )
    return [re.sub(r"\s+", " ", one).strip() for one in (*shell, *inline) if one.startswith("glassbus ")]
