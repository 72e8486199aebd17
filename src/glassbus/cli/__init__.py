"""The command `glassbus`.

Exit status: 0 all well, 1 the answer is no (not balanced, lines skipped, not confirmed), 2 it could not be
done (one line on stderr says why), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper

from glassbus.config import redact
from glassbus.errors import GlassbusError, safe_text

#: Name, module and what it is for. A module is imported when its command is called, not before.
#: It has `configure(parser)`, which names the function to run as the default of `run`.
COMMANDS: tuple[tuple[str, str, str], ...] = (
    ("demo", "glassbus.cli.demo", "see a bus at work: what flows, fails, recovers, and that nothing is lost"),
    ("run", "glassbus.cli.run", "run the bus of a program of yours until a signal ends it"),
    ("publish", "glassbus.cli.publish", "publish JSON lines from a file or stdin"),
    ("health", "glassbus.cli.store", "how a store is: queues, holds, dead letters, consumers, ledger"),
    ("audit", "glassbus.cli.store", "recount a store and prove that its ledger balances"),
    ("faults", "glassbus.cli.faults", "what can be made to go wrong, and the demo with it: list, run"),
    (
        "errors",
        "glassbus.cli.errors",
        "what failed, and whether it is more than usual: list, show, stats, trends, report",
    ),
    ("explain", "glassbus.cli.explain", "the story of one message: what happened to it, why, and where it is"),
    ("dlq", "glassbus.cli.dlq", "list, show, replay and discard dead letters"),
    (
        "drill",
        "glassbus.cli.drill",
        "make alerts fire on real servers, and see them reach somebody and resolve",
    ),
    ("export", "glassbus.cli.export", "write out what ships: dashboards, alerts, the collector, the whole stack"),
    ("escalations", "glassbus.cli.escalations", "what somebody must know of: list, acknowledge, resolve"),
)

_INTERRUPTED = 130
_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what it has no character for must not end the command
            stream.reconfigure(errors="replace")
    try:
        status = _dispatch(words)
        sys.stdout.flush()
    except BrokenPipeError:
        return _pipe_closed()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except GlassbusError as error:
        print(f"glassbus: error: {redact(safe_text(error, 2000))}", file=sys.stderr)
        return 2
    return status


def _dispatch(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="glassbus", description="A message bus you can see through.", epilog="'glassbus COMMAND --help' says more."
    )
    parser.add_argument("--version", action="version", version=f"glassbus {_version()}")
    groups = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, module, purpose in COMMANDS:
        command = groups.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        if name == chosen:
            import_module(module).configure(command)
    try:
        arguments = parser.parse_args(words)
    except SystemExit as end:  # argparse has printed its help or what is wrong
        return int(end.code or 0)
    status: int = arguments.run(arguments)
    return status


def _pipe_closed() -> int:
    """Whoever read our output has gone: say nothing more, at exit either."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    return _BROKEN_PIPE


def _version() -> str:
    try:
        return version("glassbus")
    except PackageNotFoundError:
        return "unknown"
