"""What an import costs: time beyond a bare interpreter, and memory."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial

from bench.rows import NotInstalled, Row, Run, Sample, Wrong

# VmRSS, not ru_maxrss: on Linux the latter starts from the parent's size.
_RSS = """
import sys
try:
    with open("/proc/self/status") as status:
        kb = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
except OSError:
    import resource
    kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
sys.stdout.write(str(kb))
"""


def imported(statement: str, run: Run) -> Sample:
    """Milliseconds from start to end of an interpreter that runs `statement`, and its RSS."""
    module = statement.partition(" ")[2].partition(",")[0]
    started = time.perf_counter()
    child = _python(statement)
    wall_ms = (time.perf_counter() - started) * 1e3
    if child.returncode:
        if f"No module named '{module.partition('.')[0]}" in child.stderr:
            raise NotInstalled(module)
        raise Wrong(child.stderr.strip().splitlines()[-1])
    rss = _python(statement + "\n" + _RSS)
    return Sample(wall_ms, {"RSS MB": float(rss.stdout) / 1024})


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own interpreter on our own text
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )


def _row(name: str, statement: str, note: str = "") -> Row:
    return Row(name, partial(imported, statement), note)


BARE = "bare python"
OURS = "import glassbus"
ROWS = (
    _row(BARE, "pass"),
    _row("import asyncio, sqlite3", "import asyncio, sqlite3"),
    _row(OURS, "import glassbus"),
    _row("import glassbus.telemetry", "import glassbus.telemetry"),
    _row("OpenTelemetry SDK + prometheus_client", "import opentelemetry.sdk.trace, prometheus_client"),
    _row("import dramatiq", "import dramatiq"),
    _row("import taskiq", "import taskiq"),
    _row("import bubus", "import bubus"),
)
