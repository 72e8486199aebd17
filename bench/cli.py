"""The command: what to run, and where the results go."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import report
from bench.groups import GROUPS
from bench.harness import measure
from bench.machine import describe
from bench.rows import Run
from bench.targets import judge


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 rounds at a quarter of the size, to see that all works")
    parser.add_argument("--rounds", type=int, help="rounds of every row (7; quick: 3)")
    parser.add_argument(
        "--only", action="append", metavar="GROUP", choices=[g.key for g in GROUPS], help="this group alone; repeatable"
    )
    parser.add_argument("--scale", type=float, help="multiplies the number of messages (1; quick: 0.25)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything, all samples included, here")
    parser.add_argument(
        "--folder", type=Path, default=Path(".cache"), help="where the durable rows keep their files (default: .cache)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and return the exit status: 1 when a row did not do its work, else 0, whatever the numbers."""
    options = _options(arguments)
    rounds = options.rounds or (3 if options.quick else 7)
    scale = options.scale or (0.25 if options.quick else 1.0)
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=options.folder))
    started = time.perf_counter()
    try:
        machine = describe(folder)
        groups = [group for group in GROUPS if not options.only or group.key in options.only]
        results = measure(groups, rounds, Run(scale, folder), _progress)
    finally:
        shutil.rmtree(folder)
    found = judge({result.group.key: result for result in results})

    lines = [f"{rounds} rounds, scale {scale:g}, {time.perf_counter() - started:.0f} s; median [min-max] of the rounds"]
    lines += [report.machine_line(machine), ""]
    for result in results:
        lines += [report.table(result), ""]
    lines += [report.verdicts(found)]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.json:
        written = report.as_json(machine, rounds, scale, results, found)
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return 1 if any(one.failed for result in results for one in result.rows.values()) else 0


def _progress(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
