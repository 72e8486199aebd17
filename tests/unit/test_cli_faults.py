"""`glassbus faults`, and the demo with a fault: it strikes, the bus recovers, and the account says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import Command

from glassbus.faults.scenarios import SCENARIOS
from glassbus.faults.target import TARGETS


def test_the_list_names_every_scenario_and_every_target(glassbus: Command) -> None:
    assert glassbus("faults", "list") == 0
    for one in SCENARIOS.values():
        assert f"{one.name} " in glassbus.out
        assert one.summary in glassbus.out
    assert glassbus("faults", "list", "--targets") == 0
    assert [line.split()[0] for line in glassbus.out.splitlines()[1:]] == list(TARGETS)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["faults", "run", "nonsense"], "there are connection_error"),
        (["faults", "run", "crash"], "give --allow-crash too"),
        (["faults", "run", "crash", "--allow-crash", "--url", "memory://"], "outlives it"),
        (["demo", "--fault", "nonsense"], "there are connection_error"),
    ],
)
def test_what_cannot_be_is_one_clear_line(glassbus: Command, words: list[str], why: str) -> None:
    assert glassbus(*words) == 2
    assert why in glassbus.err
    assert glassbus.err.count("\n") == 1


@pytest.mark.parametrize("name", ["message_processing_error", "disk_full", "clock_jump"])
def test_the_demo_recovers_from_a_fault_and_says_so(glassbus: Command, name: str) -> None:
    assert glassbus("faults", "run", name, "--seconds", "4", "--rate", "60") == 0, glassbus.out
    for part in (
        "fault injected: ",
        "fault healed: ",
        f"fault      {name}: ",
        "✓ everything that must be stated was",
        "✓ balanced",
        "✓ every row recounted",
    ):
        assert part in glassbus.out


def test_consequences_that_do_not_come_are_status_1(glassbus: Command) -> None:
    """With so few messages none fails."""
    assert glassbus("faults", "run", "message_processing_error", "--seconds", "1", "--rate", "0.5") == 1
    assert "✗ not stated: AttemptFailed, RetryScheduled, RecoveryEnded(outcome=succeeded)" in glassbus.out
    assert "✓ balanced" in glassbus.out


def test_a_crash_is_taken_up_by_the_next_run(glassbus: Command, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'demo.db'}"
    words = ["demo", "--plain", "--fault", "crash", "--allow-crash", "--seconds", "5", "--rate", "60", "--url", url]
    killed = subprocess.run(
        [sys.executable, "-c", "import sys; from glassbus.cli import main; sys.exit(main())", *words],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert killed.returncode == -9
    assert "this process kills itself now" in killed.stdout
    assert glassbus("audit", "--url", url) == 0
    assert glassbus("demo", "--plain", "--seconds", "0.5", "--rate", "60", "--url", url) == 0, glassbus.out
    assert "of an earlier run taken up" in glassbus.out
    assert "pending 0 + in flight 0" in glassbus.out
