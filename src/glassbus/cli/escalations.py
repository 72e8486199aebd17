"""`glassbus escalations`: what somebody must know of, whoever runs on the store: list, ack, resolve."""

from __future__ import annotations

import argparse
import getpass
from pathlib import Path
from typing import Any

from glassbus.cli.common import (
    EXIT_NO,
    EXIT_OK,
    CommandError,
    add_url,
    count,
    existing_store,
    moment,
    paint,
    print_json,
    printable,
    shortened,
    table,
    url_of,
)
from glassbus.config import addresses, default_state_dir
from glassbus.errors import ErrorSeverity
from glassbus.policy.escalation import RANK, Escalated, EscalationState
from glassbus.recovery.channels import described
from glassbus.recovery.escalation_file import Kept, Order, carry_out, look

_SUMMARY_MAX = 80
_NOTES = """\
What is open is kept in the state directory of the buses that opened it. A bus that runs carries an order out within
two seconds; of one that does not run, what is kept is changed at once.
Exit status: 0 done, 1 when some escalation is critical and nobody has acknowledged it (list) or none has such a
fingerprint (ack, resolve), 2 when the state directory cannot be read or changed.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _NOTES
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    listing = verbs.add_parser("list", help="what is open, the worst first", description="List open escalations.")
    listing.add_argument("--json", action="store_true", help="JSON instead of text")
    listing.set_defaults(run=list_them)
    ack = verbs.add_parser("ack", help="somebody has it", description="Acknowledge: it is not told again.")
    ack.add_argument("--by", metavar="NAME", default="", help="who has it (default: the user of this shell)")
    ack.set_defaults(run=act_on_them, do="acknowledge")
    resolve = verbs.add_parser(
        "resolve", help="it is over", description="Resolve: the channels are told that it is over."
    )
    resolve.add_argument("--reason", metavar="TEXT", default="", help="why (default: the user of this shell said so)")
    resolve.set_defaults(run=act_on_them, do="resolve")
    for verb in (ack, resolve):
        verb.add_argument("fingerprints", nargs="+", metavar="FINGERPRINT", help="whole, or its first characters")
    for verb in verbs.choices.values():
        add_url(verb)
        verb.add_argument("--state-dir", metavar="DIR", help="the state directory itself, instead of that of a store")


def _state_dir(arguments: argparse.Namespace) -> str:
    given: str | None = arguments.state_dir
    if given is None:
        url = url_of(arguments)
        given = default_state_dir(addresses(url))
        if given is None:
            raise CommandError("that store is no file, so it has no state directory by default: give --state-dir DIR")
        if not Path(given).is_dir():
            existing_store(url)  # a path that was misspelt must not read as "nothing is open"
    elif not Path(given).is_dir():
        raise CommandError(f"there is no folder {given}")
    return given


def _look(arguments: argparse.Namespace) -> list[Kept]:
    try:
        return look(_state_dir(arguments))
    except OSError as error:
        raise CommandError(f"the state directory cannot be read: {error.strerror}") from error


def list_them(arguments: argparse.Namespace) -> int:
    places = _look(arguments)
    found = [(kept, escalation) for kept in places for escalation in kept.escalations]
    found.sort(key=lambda pair: (-RANK[pair[1].severity], pair[1].opened_at))
    damaged = [f"{kept.bus}/{kept.number}.json: {kept.error}" for kept in places if kept.error]
    if arguments.json:
        print_json({"escalations": [_json(*pair) for pair in found], "damaged": damaged})
    else:
        _print(found)
        for line in damaged:
            print(paint(f"damaged: {printable(line)}; its bus moves it aside when it starts", "bad"))
    urgent = any(_urgent(escalation) for _, escalation in found)
    return EXIT_NO if urgent else EXIT_OK


def _urgent(escalation: Escalated) -> bool:
    return escalation.severity is ErrorSeverity.CRITICAL and escalation.state is not EscalationState.ACKNOWLEDGED


def _json(kept: Kept, escalation: Escalated) -> dict[str, Any]:
    return {"bus": kept.bus, "live": kept.live, **described(escalation)}


def _print(found: list[tuple[Kept, Escalated]]) -> None:
    if not found:
        print(paint("no escalation is open", "good"))
        return
    rows = [
        [
            escalation.fingerprint,
            escalation.severity.value,
            escalation.state.value
            + (f" by {printable(escalation.acknowledged_by, 20)}" * bool(escalation.acknowledged_by)),
            escalation.name,
            f"{escalation.seen:,}",
            moment(escalation.opened_at),
            kept.bus if kept.live else f"{kept.bus} (not running)",
            shortened(escalation.summary, _SUMMARY_MAX),
        ]
        for kept, escalation in found
    ]
    headings = ["FINGERPRINT", "SEVERITY", "STATE", "NAME", "SEEN", "OPENED", "BUS", "SUMMARY"]
    print(table(rows, headings, frozenset({4})))


def act_on_them(arguments: argparse.Namespace) -> int:
    places = _look(arguments)
    who = _user()
    missed = 0
    for prefix in arguments.fingerprints:
        fingerprint = _whole(prefix, places)
        if fingerprint is None:
            print(paint(f"no escalation {printable(prefix, 40)} is open", "bad"))
            missed += 1
            continue
        by = (arguments.by or who) if arguments.do == "acknowledge" else (arguments.reason or f"{who} said so")
        order = Order(arguments.do, fingerprint, by)
        having = [kept for kept in places if any(e.fingerprint == fingerprint for e in kept.escalations)]
        try:
            done = [carry_out(kept, order) for kept in having]
        except OSError as error:
            raise CommandError(f"the state directory cannot be changed: {error.strerror}") from error
        word = "acknowledged" if arguments.do == "acknowledge" else "resolved"
        handed_on = done.count(False)
        if handed_on:
            print(f"{fingerprint}: {count(handed_on, 'running bus', 'running buses')} will have it {word} within 2 s")
        if any(done):
            print(f"{fingerprint}: {word}")
    return EXIT_NO if missed else EXIT_OK


def _whole(prefix: str, places: list[Kept]) -> str | None:
    """The one open fingerprint that begins with `prefix`; None for none. Raises CommandError for several."""
    known = {e.fingerprint for kept in places for e in kept.escalations}
    if prefix in known:
        return prefix
    found = sorted(one for one in known if one.startswith(prefix)) if prefix else []
    if len(found) > 1:
        raise CommandError(f"{prefix!r} begins {len(found)} fingerprints: {', '.join(found[:5])}")
    return found[0] if found else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "somebody"
