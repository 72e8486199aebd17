"""A short run of the soak that measures what errors take in memory; the full one is a command.

`python -m tests.simulation.error_soak --errors 10000000`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.simulation import error_soak

MB = 2**20


def test_error_state_is_flat_and_small() -> None:
    """Measured by tracemalloc, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation.error_soak", "--errors", "20000", "--trace"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_checker_notices_what_is_too_much_and_what_grows() -> None:
    assert error_soak.problems_of([10 * MB] * 10) == []
    assert "20.0 MB, not below 20" in error_soak.problems_of([20 * MB] * 10)[0]
    assert error_soak.problems_of([n * MB for n in range(5, 15)]) == ["error state still grows in the second half"]
