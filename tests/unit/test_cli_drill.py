"""The command `glassbus drill`, but for the drills themselves: those are in tests/stack/test_drills.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cli_kit import Command

from glassbus.cli import drill
from glassbus.drill.run import Drills, Outcome
from glassbus.drill.table import BY_ALERT


def test_the_list_has_every_alert_and_its_fault(glassbus: Command) -> None:
    assert glassbus("drill", "--list") == 0
    lines = glassbus.out.splitlines()
    assert len(lines) == 1 + len(BY_ALERT)
    assert any("GlassbusQueueOverflow" in line and "a full queue refuses" in line for line in lines)


def test_the_list_can_be_of_some_and_in_json(glassbus: Command) -> None:
    assert glassbus("drill", "GlassbusSpoolFilling", "--list", "--json") == 0
    listed = json.loads(glassbus.out)
    assert [one["alert"] for one in listed] == ["GlassbusSpoolFilling/warning", "GlassbusSpoolFilling/critical"]
    assert listed[0]["servers"] == ["alertmanager", "nats-server", "prometheus"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["GlassbusQueueOverflo"], "did you mean GlassbusQueueOverflow"),
        (["GlassbusConnectionDown/warnin"], "did you mean GlassbusConnectionDown/warning"),
        (["nonsense"], "no alert is called 'nonsense'; 'glassbus drill --list' lists them"),
        ([], "name the alerts to drill, or give --all"),
        (["Watchdog", "--all"], "name the alerts to drill, or give --all"),
        (["Watchdog", "--factor", "500"], "the factor must be from 1 to 150"),
    ],
)
def test_what_cannot_be_drilled_is_said_with_what_could(glassbus: Command, words: list[str], said: str) -> None:
    assert glassbus("drill", *words) == 2
    assert said in glassbus.err
    assert "Traceback" not in glassbus.err


def test_missing_servers_are_named_with_what_to_install(
    glassbus: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GLASSBUS_SERVERS", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert glassbus("drill", "Watchdog") == 2
    assert "prometheus is not installed" in glassbus.err
    assert "scripts/servers.sh prometheus" in glassbus.err
    assert list(tmp_path.glob("glassbus-drill-*")) == []  # nothing to look into


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Replaces the playing: `played(verdict=…)` says how each drill went."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("glassbus.drill.run.find_server", lambda name: name)

    def replace(**values: Any) -> None:
        async def run(self: Drills) -> list[Outcome]:
            for name, one in self.outcomes.items():
                self.outcomes[name] = msgspec.structs.replace(one, **values)
            return list(self.outcomes.values())

        monkeypatch.setattr(Drills, "run", run)

    return replace


def test_the_table_tells_how_long_steps_took(glassbus: Command, played: Callable[..., None], tmp_path: Path) -> None:
    times = {"fired_s": 1.04, "reached_s": 1.5, "resolved_s": 10.0, "told_s": 12.0}
    played(verdict="passed", factor=60.0, receivers=("critical",), **times)
    assert glassbus("drill", "GlassbusConsumerStalled") == 0
    rows = [line.split() for line in glassbus.out.splitlines() if line.startswith("Glassbus")]
    assert [row[0] for row in rows] == ["GlassbusConsumerStalled/warning", "GlassbusConsumerStalled/critical"]
    for row in rows:
        assert row[-11:] == ["1.0", "s", "1.5", "s", "10.0", "s", "12.0", "s", "critical", "60", "passed"]
    assert "2 of 2 drills passed" in glassbus.out
    assert list(tmp_path.iterdir()) == []


def test_a_failed_drill_says_why_keeps_its_files_and_exits_with_1(
    glassbus: Command, played: Callable[..., None], tmp_path: Path
) -> None:
    played(verdict="failed", why="it did not fire within 46 s: its expression yields nothing")
    assert glassbus("drill", "GlassbusQueueOverflow") == 1
    assert "failed  GlassbusQueueOverflow: it did not fire within 46 s" in glassbus.out
    assert "0 of 1 drill passed" in glassbus.out
    (kept,) = tmp_path.iterdir()
    assert f"files and logs of the servers: {kept}" in glassbus.err


def test_json_is_nothing_but_json(glassbus: Command, played: Callable[..., None]) -> None:
    played(verdict="passed", fired_s=0.5, factor=60.0)
    assert glassbus("drill", "Watchdog", "--json") == 0
    (one,) = json.loads(glassbus.out)
    assert (one["alert"], one["verdict"], one["fired_s"], one["told_s"]) == ("Watchdog", "passed", 0.5, None)


def test_the_help_says_what_a_drill_is(glassbus: Command) -> None:
    assert glassbus("drill", "--help") == 0
    assert "A drill passes when its alert fires" in glassbus.out
    assert drill.__doc__
