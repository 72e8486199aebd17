"""Every example runs, warns of nothing, and prints exactly what its docstring says."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("[0-9]*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_what_it_says(example: Path, tmp_path: Path) -> None:
    says = (ast.get_docstring(ast.parse(example.read_text())) or "").partition("Prints:\n\n")[2]
    assert says, f"{example.name} does not say what it prints"
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(example)], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert ran.stdout == textwrap.dedent(says).rstrip() + "\n", ran.stderr
    assert (ran.returncode, ran.stderr) == (0, "")
    assert not list(tmp_path.iterdir()), "it leaves files behind"


def test_they_are_numbered_without_a_gap() -> None:
    assert [path.name[:3] for path in EXAMPLES] == [f"{n:02}_" for n in range(1, len(EXAMPLES) + 1)]
