"""`glassbus faults`: what can be made to go wrong, and the demo with it."""

from __future__ import annotations

import argparse

from glassbus.cli.common import number, table
from glassbus.faults.scenarios import SCENARIOS, scenario_of
from glassbus.faults.target import PORTS, TARGETS

_NOTES = """\
'run' plays the demo with one of them, and says whether everything that must follow did: its exit status is 0 if so,
1 if not, 2 if it could not run. In tests of your own: from glassbus.faults import inject.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _NOTES
    commands = parser.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    listing = commands.add_parser("list", help="the scenarios, by name", description="The scenarios, by name.")
    listing.add_argument("--targets", action="store_true", help="the targets of inject(), and the faults that fit each")
    listing.set_defaults(run=print_list)
    running = commands.add_parser("run", help="play the demo with one", description="Play the demo with one.")
    running.add_argument("name", metavar="NAME", help="a scenario of 'glassbus faults list'")
    running.add_argument(
        "--seconds",
        type=number(1, 1e6),
        default=15.0,
        metavar="N",
        help="take messages in for N seconds; the fault is in place for 0.4 of them, at most 10 s (default: 15)",
    )
    running.add_argument(
        "--rate", type=number(0, 10_000, above=True), default=20.0, metavar="N", help="records a second"
    )
    running.add_argument("--url", metavar="URL", help="the demo's bus (default: a file in a fresh temporary folder)")
    running.add_argument("--seed", type=int, default=1, metavar="N", help="seed of all chance (default: 1)")
    running.add_argument("--live", action="store_true", help="a live screen instead of plain lines")
    running.add_argument("--allow-crash", action="store_true", help="allow 'crash', which kills this process")
    running.set_defaults(run=run)


def print_list(arguments: argparse.Namespace) -> int:
    if arguments.targets:
        rows = [[name, ", ".join(fault.__name__ for fault in PORTS[_kind(name)].faults)] for name in TARGETS]
        print(table(rows, ["target", "faults"]))
    else:
        rows = [[one.name, str(one.category or "-"), one.summary] for one in SCENARIOS.values()]
        print(table(rows, ["name", "category", "what goes wrong, and what follows"]))
    return 0


def _kind(target: str) -> str:
    return target if target in PORTS else target.partition(":")[0]


def run(arguments: argparse.Namespace) -> int:
    from glassbus.cli.demo.conductor import Options, conduct

    scenario_of(arguments.name)
    return conduct(
        Options(
            source=None,
            seconds=arguments.seconds,
            rate=arguments.rate,
            url=arguments.url,
            plain=not arguments.live,
            seed=arguments.seed,
            serve=None,
            fault=arguments.name,
            allow_crash=arguments.allow_crash,
        )
    )
