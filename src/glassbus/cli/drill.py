"""`glassbus drill`: make an alert fire on real servers, see people told, heal the fault, see it resolve."""

from __future__ import annotations

import argparse
import asyncio
import difflib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from glassbus.cli.common import EXIT_NO, EXIT_OK, CommandError, count, number, paint, print_json, printable, table

if TYPE_CHECKING:
    from glassbus.drill.rules import Rule
    from glassbus.drill.run import Drills, Outcome

_NOTES = """\
Starts Prometheus and Alertmanager (from PATH or $GLASSBUS_SERVERS) on free ports of the loopback, with the rules,
routes and inhibitions that ship, every duration in them divided by one factor. A drill passes when its alert fires,
a webhook is told, and after healing it resolves and the webhook is told that too. An alert with several tiers has a
drill for each: NAME/warning, NAME/critical, and of burn rates NAME/1h to NAME/3d, the last of which take 10 minutes.

Times are real seconds of this run: multiply them by the factor for what they would be in production.
Exit status: 0 all passed, 1 some did not, 2 they could not be played, 130 interrupted.
"""
_FACTOR = 60.0
_SHOWN_EVERY_S = 0.5
_STYLES = {"passed": "good", "failed": "bad", "playing": "warn"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _NOTES
    parser.add_argument("alerts", nargs="*", metavar="ALERT", help="such as GlassbusQueueOverflow; see --list")
    parser.add_argument("--all", action="store_true", help="every alert that ships")
    parser.add_argument("--list", action="store_true", help="list the alerts, their faults and how long they take")
    parser.add_argument(
        "--factor",
        type=number(1, 1000),
        default=_FACTOR,
        metavar="N",
        help="divide durations by N (default: 60); where the machine is too busy for that, they are divided by less",
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the servers' files and logs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from glassbus.drill.rules import rules_of, shipped_groups
    from glassbus.drill.table import BY_ALERT

    groups = shipped_groups()
    rules = {known: rule for known, rule in rules_of(groups).items() if known in BY_ALERT}
    if arguments.list:
        return _list(_chosen(arguments.alerts, rules) if arguments.alerts else rules, arguments)
    if bool(arguments.alerts) == arguments.all:
        raise CommandError("name the alerts to drill, or give --all; --list shows which there are")
    return _drill(rules if arguments.all else _chosen(arguments.alerts, rules), groups, arguments)


def _chosen(names: Iterable[str], rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rules by these names, of a tier or of all. Raises CommandError for a name that is none."""
    found: dict[str, Rule] = {}
    for name in names:
        mine = {known: rule for known, rule in rules.items() if name in (known, rule.alert)}
        if not mine:
            known = dict.fromkeys([*(rule.alert for rule in rules.values()), *rules])
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise CommandError(f"no alert is called {printable(name, 80)!r}{hint}; 'glassbus drill --list' lists them")
        found |= mine
    return found


def _list(rules: Mapping[str, Rule], arguments: argparse.Namespace) -> int:
    from glassbus.drill.table import BY_ALERT

    if arguments.json:
        print_json(
            [
                {
                    "alert": known,
                    "severity": rule.severity,
                    "fault": BY_ALERT[known].fault,
                    "summary": rule.summary,
                    "for_seconds": rule.for_s,
                    "fires_within_seconds": rule.fires_within_s,
                    "servers": sorted({"prometheus", "alertmanager", *BY_ALERT[known].needs}),
                }
                for known, rule in rules.items()
            ]
        )
        return EXIT_OK
    rows = [[known, rule.severity, BY_ALERT[known].fault] for known, rule in rules.items()]
    print(table(rows, ["alert", "severity", "what is made to go wrong"]))
    return EXIT_OK


def _drill(rules: Mapping[str, Rule], groups: list[dict[str, Any]], arguments: argparse.Namespace) -> int:
    from glassbus.drill.rules import shipped_routing
    from glassbus.drill.run import Drills
    from glassbus.drill.stack import Pace
    from glassbus.drill.table import PLAYS

    place = Path(tempfile.mkdtemp(prefix="glassbus-drill-"))
    drills, failed = None, True
    try:
        drills = Drills(
            rules,
            PLAYS.values(),
            groups=groups,
            routing=shipped_routing(),
            pace=Pace.shipped(arguments.factor),
            place=place,
        )
        outcomes = asyncio.run(_play(drills, quiet=arguments.json))
        failed = any(one.verdict != "passed" for one in outcomes)
    except KeyboardInterrupt:
        failed = False  # nothing to look into
        raise
    finally:
        # What a failure is looked into with; nothing was started where there are no drills.
        kept = arguments.keep or (failed and drills is not None)
        if kept:
            print(f"files and logs of the servers: {place}", file=sys.stderr)
        else:
            shutil.rmtree(place, ignore_errors=True)
    if arguments.json:
        print_json([msgspec.to_builtins(one) for one in outcomes])
    else:
        _tell(outcomes)
    return EXIT_NO if failed else EXIT_OK


async def _play(drills: Drills, *, quiet: bool) -> list[Outcome]:
    """Play them, on SIGTERM as on Ctrl-C ending what was started."""
    playing = asyncio.ensure_future(drills.run())
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, playing.cancel)
    showing = None if quiet else asyncio.create_task(_show(drills))
    try:
        return await playing
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        if showing is not None:
            showing.cancel()
            await asyncio.wait({showing})


async def _show(drills: Drills) -> None:
    """On a terminal one line that changes; elsewhere a line for each drill that is over."""
    live, began, told = sys.stdout.isatty(), time.monotonic(), set[str]()
    try:
        while True:
            outcomes = list(drills.outcomes.values())
            over = [one for one in outcomes if one.verdict in ("passed", "failed")]
            if live:
                waits = [one.alert for one in outcomes if one.verdict == "playing"]
                wide = shutil.get_terminal_size().columns - 1
                line = f"{time.monotonic() - began:4.0f} s  {len(over)} of {len(outcomes)} over: {', '.join(waits)}"
                print(f"\r\x1b[2K{line[:wide]}", end="", flush=True)
            else:
                for one in over:
                    if one.alert not in told:
                        told.add(one.alert)
                        print(f"{time.monotonic() - began:4.0f} s  {one.alert} {one.verdict}", flush=True)
            await asyncio.sleep(_SHOWN_EVERY_S)
    finally:
        if live:
            print("\r\x1b[2K", end="", flush=True)


def _tell(outcomes: list[Outcome]) -> None:
    rows = [
        [
            one.alert,
            one.fault,
            _seconds(one.fired_s),
            _seconds(one.reached_s),
            _seconds(one.resolved_s),
            _seconds(one.told_s),
            ", ".join(one.receivers),
            f"{one.factor:g}",
            one.verdict,
        ]
        for one in outcomes
    ]
    headings = ["alert", "fault", "fired", "reached", "resolved", "told", "who", "factor", "verdict"]
    lines = table(rows, headings, right=frozenset({2, 3, 4, 5, 7})).splitlines()
    print(lines[0])
    for line, one in zip(lines[1:], outcomes, strict=True):
        text = line.removesuffix(one.verdict)
        print(f"{text}{paint(one.verdict, _STYLES.get(one.verdict, ''))}")
    failed = [one for one in outcomes if one.verdict != "passed"]
    for one in failed:
        print(f"{paint('failed', 'bad')}  {one.alert}: {printable(one.why)}")
    print(f"{len(outcomes) - len(failed)} of {count(len(outcomes), 'drill')} passed")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
