"""`glassbus dlq`: the dead letters of a store: list, show, replay, discard."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from glassbus.cli.common import (
    EXIT_NO,
    EXIT_OK,
    CommandError,
    add_url,
    count,
    error_text,
    moment,
    opened_store,
    paint,
    print_json,
    printable,
    printable_lines,
    shortened,
    table,
    url_of,
    when,
    whole,
)
from glassbus.cli.hosting import exported_traces
from glassbus.errors import ErrorCategory, UnknownDeadLetter

if TYPE_CHECKING:
    from glassbus.bus import MessageBus
    from glassbus.deadletters import DeadLetter

_PAGE = 500
#: Characters of an error in a table on a terminal. Elsewhere it is whole.
_ERROR_MAX = 100
#: And of a message id, which `glassbus explain` knows by its beginning too.
_ID_MAX = 16
_FILTERS = ("subscription", "topic", "message_id", "category", "exception_type", "fingerprint", "since", "until")


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    listing = verbs.add_parser("list", help="the newest, that match", description="List dead letters, newest first.")
    _add_filters(listing)
    listing.add_argument("--limit", type=whole, default=50, metavar="N", help="at most N (default: 50)")
    listing.add_argument("--before", metavar="ID", help="those older than this one: the next page")
    listing.set_defaults(run=list_them)

    show = verbs.add_parser("show", help="one of them, whole", description="Show a dead letter with its payload.")
    show.add_argument("ids", nargs="+", metavar="ID")
    show.set_defaults(run=show_them)

    for verb, purpose in (
        ("replay", "Put dead letters back in their queues as new, attempts at 0."),
        ("discard", "Remove dead letters for good."),
    ):
        act = verbs.add_parser(verb, help=f"{purpose[0].lower()}{purpose[1:-1]}", description=purpose)
        act.epilog = "With OTEL_EXPORTER_OTLP_ENDPOINT set, the spans that tell of it are exported there."
        act.add_argument("ids", nargs="*", metavar="ID")
        act.add_argument("--all", action="store_true", help="all that match the filters, or all there are")
        act.add_argument("--yes", action="store_true", help="do not ask")
        _add_filters(act)
        act.set_defaults(run=act_on_them, verb=verb)

    for one in verbs.choices.values():
        add_url(one)
        one.add_argument("--json", action="store_true", help="JSON instead of text")


def _add_filters(parser: argparse.ArgumentParser) -> None:
    which = parser.add_argument_group("filters")
    which.add_argument("--subscription", metavar="NAME")
    which.add_argument("--topic", metavar="TOPIC")
    which.add_argument("--message-id", metavar="ID")
    which.add_argument("--category", choices=[category.value for category in ErrorCategory], metavar="CATEGORY")
    which.add_argument("--exception-type", metavar="TYPE", help="such as ValueError; bare or with its module")
    which.add_argument("--fingerprint", metavar="F")
    which.add_argument("--since", type=when, metavar="TIME", help="ISO 8601, or how long ago: 90s, 10m, 2h, 1d")
    which.add_argument("--until", type=when, metavar="TIME")


# list and show


def list_them(arguments: argparse.Namespace) -> int:
    found = asyncio.run(_list(url_of(arguments), _filters(arguments), arguments.limit, arguments.before))
    if arguments.json:
        print_json([_as_json(letter, whole=False) for letter in found])
        return EXIT_OK
    if not found:
        print("no dead letters" + (" match" if _filters(arguments) else ""))
        return EXIT_OK
    terminal = sys.stdout.isatty()
    rows = [
        [
            letter.id,
            moment(letter.died_at),
            letter.subscription,
            letter.message.topic,
            printable(letter.message.id[: _ID_MAX if terminal else None]),
            str(letter.attempts),
            letter.report.fingerprint,
            shortened(error_text(letter.report), _ERROR_MAX) if terminal else printable(error_text(letter.report)),
        ]
        for letter in found
    ]
    columns = ["id", "died", "subscription", "topic", "message", "attempts", "fingerprint", "error"]
    print(table(rows, columns, frozenset({5})))
    if len(found) == arguments.limit:
        print(paint(f"there may be more: --before {found[-1].id} goes on, --limit shows more at once", "dim"))
    return EXIT_OK


async def _list(url: str, filters: dict[str, Any], limit: int, before: str | None) -> list[DeadLetter]:
    async with opened_store(url) as store:
        _check_subscription(store, filters)
        return await store.dead_letters.list(limit, before=before, **filters)


def show_them(arguments: argparse.Namespace) -> int:
    found = asyncio.run(_show(url_of(arguments), arguments.ids))
    if arguments.json:
        print_json([_as_json(letter, whole=True) for letter in found])
        return EXIT_OK
    for number, letter in enumerate(found):
        print("\n" * bool(number) + _whole_text(letter))
    return EXIT_OK


async def _show(url: str, ids: list[str]) -> list[DeadLetter]:
    async with opened_store(url) as store:
        return [await store.dead_letters.get(one) for one in ids]


def _whole_text(letter: DeadLetter) -> str:
    message, report = letter.message, letter.report
    facts = [
        ("dead letter", letter.id),
        ("message", f"{message.id} on {message.topic}, published {moment(message.published_at)}"),
        ("priority", message.priority.name.lower() + (f", key {printable(message.key)}" if message.key else "")),
        ("subscription", letter.subscription),
        ("died", f"{moment(letter.died_at)}, after {count(letter.attempts, 'attempt')}: {_reason(letter.reason)}"),
        ("first failed", moment(letter.first_failed_at)),
        ("replayed", count(letter.replays, "time")),
        ("error", printable(error_text(report))),
        ("category", f"{report.category.value}, severity {report.severity.value}, fingerprint {report.fingerprint}"),
    ]
    if "trace_id" in report.context:
        facts.append(("trace", printable(str(report.context["trace_id"]))))
    facts += [("header", f"{name}: {printable(value)}") for name, value in sorted(message.headers.items())]
    lines = [f"{paint(f'{name:<13}', 'bold')} {value}" for name, value in facts]
    if report.stack_trace:
        lines += [paint("stack trace", "bold"), printable_lines(report.stack_trace)]
    lines += [paint("payload", "bold"), _payload_text(message.payload)]
    return "\n".join(lines)


def _reason(reason: str) -> str:
    return reason.replace("_", " ")


def _payload_text(payload: Any) -> str:
    if isinstance(payload, bytes):
        return f"{count(len(payload), 'raw byte')}: {payload[:2000]!r}"
    return printable_lines(json.dumps(payload, indent=2, default=str))


def _as_json(letter: DeadLetter, *, whole: bool) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(letter)
    if not whole:
        for name in ("payload", "headers"):
            made["message"].pop(name, None)
        made["report"].pop("stack_trace", None)
    return made


# replay and discard


def act_on_them(arguments: argparse.Namespace) -> int:
    filters = _filters(arguments)
    if arguments.ids and (arguments.all or filters):
        raise CommandError("give ids, or --all with filters, not both")
    if not arguments.ids and not arguments.all:
        raise CommandError(f"say which: ids, or --all (with filters) to {arguments.verb} all that match")
    if not arguments.yes and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise CommandError(
            f"nobody is here to confirm it: {arguments.verb} needs --yes when it is not run in a terminal"
        )
    # What is replayed goes on below the span of its replay: that must be where the other spans are.
    with exported_traces("glassbus") as traces:
        status = asyncio.run(_act(url_of(arguments), arguments, filters, telemetry=bool(traces.told)))
    if traces.told:
        print(f"traces: {traces.told}", file=sys.stderr)
    return status


async def _act(url: str, arguments: argparse.Namespace, filters: dict[str, Any], *, telemetry: bool) -> int:
    verb, done = arguments.verb, {"replay": "replayed", "discard": "discarded"}[arguments.verb]
    async with opened_store(url, telemetry=telemetry) as store:
        _check_subscription(store, filters)
        ids = await _matching(store, filters) if arguments.all else list(dict.fromkeys(arguments.ids))
        if not ids:
            print("no dead letters match" if filters else "no dead letters")
            return EXIT_OK
        if not arguments.yes and not await asyncio.to_thread(_confirmed, f"{verb} {count(len(ids), 'dead letter')}?"):
            print("nothing was done")
            return EXIT_NO
        act = store.dead_letters.replay if verb == "replay" else store.dead_letters.discard
        moved = 0
        if not arguments.all:
            moved = await act(*ids)  # all of those named, or none
        else:
            for start in range(0, len(ids), _PAGE):
                moved += await _page(act, ids[start : start + _PAGE])
    gone = len(ids) - moved
    if arguments.json:
        print_json({done: moved, "gone": gone})
    else:
        print(f"{done} {count(moved, 'dead letter')}" + (f"; {gone:,} were gone already" if gone else ""))
    return EXIT_OK


def _check_subscription(store: MessageBus, filters: dict[str, Any]) -> None:
    """A name that is misspelt must not look like a queue without dead letters. Raises CommandError."""
    name, known = filters.get("subscription"), sorted(store.queues())
    if name is not None and name not in known:
        raise CommandError(f"no subscription {name!r} in this store; it has {', '.join(known) or 'none'}")


async def _matching(store: MessageBus, filters: dict[str, Any]) -> list[str]:
    ids: list[str] = []
    before = None
    while page := await store.dead_letters.list(_PAGE, before=before, **filters):
        ids += [letter.id for letter in page]
        before = page[-1].id
    return ids


async def _page(act: Any, ids: list[str]) -> int:
    """Act on `ids`; those that somebody else has taken meanwhile are passed over."""
    try:
        return int(await act(*ids))
    except UnknownDeadLetter:
        if len(ids) == 1:
            return 0
        middle = len(ids) // 2
        return await _page(act, ids[:middle]) + await _page(act, ids[middle:])


def _confirmed(question: str) -> bool:
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


# Arguments


def _filters(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in _FILTERS if (value := getattr(arguments, name)) is not None}
