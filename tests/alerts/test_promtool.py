"""Prometheus' own tool accepts the rules and runs their unit tests, and parses every query of the runbooks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.alerts.rulebook import NAMES, RULES_FILE, UNIT_TESTS, fenced, runbook
from tests.server_kit import REPOSITORY, need


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [need("promtool"), *arguments], capture_output=True, text=True, timeout=300, check=False, cwd=REPOSITORY
    )


def test_the_rules_are_valid_and_nothing_about_them_is_doubtful() -> None:
    checked = promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES_FILE))
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.name)
def test_each_alert_fires_holds_and_resolves(path: Path) -> None:
    tested = promtool("test", "rules", str(path))
    assert tested.returncode == 0, tested.stdout[-6000:] + tested.stderr[-6000:]


def test_every_query_of_every_runbook_parses(tmp_path: Path) -> None:
    queries = [query for name in NAMES for query in fenced(runbook(name), "promql")]
    rules = "".join(
        f"      - record: query:{at}\n        expr: |-\n          {query}\n" for at, query in enumerate(queries)
    )
    file = tmp_path / "queries.yml"
    file.write_text(f"groups:\n  - name: runbooks\n    rules:\n{rules}", "utf-8")
    checked = promtool("check", "rules", str(file))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(queries)} rules found" in checked.stdout
