"""`glassbus errors`: what failed, how often and whether it is more than usual, from the journal of a store."""

from __future__ import annotations

import argparse
import heapq
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from glassbus.cli.common import (
    EXIT_OK,
    CommandError,
    add_url,
    count,
    existing_store,
    moment,
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
from glassbus.config import default_state_dir
from glassbus.errors import ErrorCategory, ErrorSeverity
from glassbus.files import replace_file
from glassbus.record.analysis import Analysis, trends_of
from glassbus.record.entries import FactLine, FloodLine, ReportLine
from glassbus.record.journalfiles import FOLDER
from glassbus.record.reading import JournalReader, Selection, count_lines
from glassbus.record.report import named, recovery_text, text_report
from glassbus.record.report_html import html_report
from glassbus.record.trends import Trend
from glassbus.record.wording import ARROWS, compared, rate, sparkline

#: Characters of an error in a table on a terminal. Elsewhere it is whole.
_ERROR_MAX = 90
_SHOWN_MAX = 5
_PREFIX_MIN = 4
_STYLES = {"critical": "bad", "high": "bad", "medium": "warn", "rising": "bad", "new": "bad", "falling": "good"}

_NOTES = """\
Reads the journal beside a store (sqlite:///orders.db: orders.db.state), or that of --state-dir, of all processes,
while they run and after they died; it changes nothing. Times are in UTC.
"""
_TREND_NOTES = """\
rising, falling: in the last 15 minutes by half at least more or fewer than usual (the median quarter of an hour of the
day before), by more than chance explains, and outside of what nine in ten quarters of an hour held.
new: first seen less than an hour ago. gone: none now, and not only because they are rare.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    listing = verbs.add_parser("list", help="the newest, that match", description="List errors, newest first.")
    listing.add_argument("--limit", type=whole, default=50, metavar="N", help="at most N (default: 50)")
    listing.set_defaults(run=list_them)

    show = verbs.add_parser(
        "show",
        help="one kind of failure, or one error, whole",
        description="Show a fingerprint (or how it begins): how often, since when, where in the code, the latest. "
        "Or the errors of a message id or an error id.",
    )
    show.add_argument("id", metavar="FINGERPRINT|ID")
    show.set_defaults(run=show_it)

    stats = verbs.add_parser("stats", help="how many, of what", description="Count errors and recoveries.")
    stats.set_defaults(run=stats_of)

    trends = verbs.add_parser(
        "trends", help="what becomes more or fewer", description="Compare now with the day before."
    )
    trends.epilog = _TREND_NOTES
    trends.add_argument("--limit", type=whole, default=40, metavar="N", help="at most N (default: 40)")
    trends.set_defaults(run=trends_now)

    report = verbs.add_parser("report", help="all of it, for people", description="Report on errors as text or HTML.")
    report.add_argument("--html", metavar="FILE", help="write an HTML page with plots to FILE (-: to stdout)")
    report.set_defaults(run=report_all)

    for one in verbs.choices.values():
        one.formatter_class = argparse.RawDescriptionHelpFormatter
        one.epilog = f"{one.epilog or ''}{_NOTES}"
        add_url(one)
        one.add_argument("--state-dir", metavar="DIR", help="the state directory itself, instead of --url")
        one.add_argument("--json", action="store_true", help="JSON instead of text")
        _add_filters(one)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    which = parser.add_argument_group("filters")
    which.add_argument("--subscription", metavar="NAME")
    which.add_argument("--message-id", metavar="ID")
    which.add_argument("--category", choices=[category.value for category in ErrorCategory], metavar="CATEGORY")
    which.add_argument("--severity", choices=[severity.value for severity in ErrorSeverity], metavar="SEVERITY")
    which.add_argument("--fingerprint", metavar="F", help="a fingerprint, or how it begins")
    which.add_argument("--since", type=when, metavar="TIME", help="ISO 8601, or how long ago: 90s, 10m, 2h, 1d")
    which.add_argument("--until", type=when, metavar="TIME", help="look back from then instead of from now")


class _Source(NamedTuple):
    """Where the journal is, what it is called, and what is asked of it."""

    reader: JournalReader
    name: str
    selection: Selection
    now: float

    def lines(self) -> Iterator[FactLine | FloodLine]:
        return self.reader.lines(self.selection.since)

    def errors(self) -> Iterator[FactLine | FloodLine]:
        takes = self.selection.takes
        return (line for line in self.lines() if line.error and takes(line))


def _source(arguments: argparse.Namespace) -> _Source:
    """Raises CommandError when there is nothing that could have a journal."""
    folder, name = _state_dir(arguments)
    selection = Selection(
        fingerprint=arguments.fingerprint or "",
        category=arguments.category or "",
        severity=arguments.severity or "",
        subscription=arguments.subscription or "",
        message_id=arguments.message_id or "",
        since=arguments.since,
        until=arguments.until,
    )
    now = time.time()
    return _Source(
        JournalReader(folder), name, selection, now if arguments.until is None else min(now, arguments.until)
    )


def _state_dir(arguments: argparse.Namespace) -> tuple[Path, str]:
    if arguments.state_dir is not None:
        if arguments.url:
            raise CommandError("give --url or --state-dir, not both")
        folder = Path(arguments.state_dir)
        if not folder.is_dir():
            raise CommandError(f"there is no folder {arguments.state_dir}; a bus makes it at its first error")
        return folder, str(folder)
    address = existing_store(url_of(arguments))
    beside = default_state_dir([address])
    if beside is None:
        raise CommandError(f"{address} has no folder beside it: give --state-dir, as the bus was given state_dir")
    return Path(beside), str(address)


def _nothing(source: _Source) -> str:
    if not (source.reader.state_dir / FOLDER).is_dir():
        return f"no errors: {source.reader.state_dir / FOLDER} is made at the first one"
    return "no errors" + (" match" if source.selection != Selection() else "")


def _print_notes(source: _Source) -> None:
    for note in source.reader.notes():
        print(f"note: {printable(note)}", file=sys.stderr)


# list


def list_them(arguments: argparse.Namespace) -> int:
    source = _source(arguments)
    found = heapq.nlargest(arguments.limit, source.errors(), key=lambda line: line.at)
    if arguments.json:
        print_json([_as_json(line) for line in found])
    elif not found:
        print(_nothing(source))
    else:
        print(_table(found))
        if len(found) == arguments.limit:
            print(
                paint(f"there may be more: --until {moment(found[-1].at)} goes on, --limit shows more at once", "dim")
            )
    _print_notes(source)
    return EXIT_OK


def _table(lines: list[FactLine | FloodLine]) -> str:
    cut: Callable[[str], str] = printable
    if sys.stdout.isatty():
        cut = _cut
    rows = []
    for line in lines:
        report = line.report
        assert report is not None
        rows.append(
            [
                moment(line.at),
                printable(report.severity, 60),
                printable(report.category, 60),
                printable(line.subscription or report.component),
                printable(line.message_id) if isinstance(line, FactLine) else f"({line.count:,} more alike)",
                str(line.attempt or "-") if isinstance(line, FactLine) else "-",
                printable(report.fingerprint),
                cut(_text(report)),
            ]
        )
    headings = ["at", "severity", "category", "where", "message", "attempt", "fingerprint", "error"]
    return table(rows, headings, frozenset({5}))


def _cut(text: str) -> str:
    return shortened(text, _ERROR_MAX)


def _text(report: ReportLine) -> str:
    return f"{report.exception_type.removeprefix('glassbus.errors.')}: {report.message}"


def _as_json(line: FactLine | FloodLine) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(line)
    return {"kind": made.pop("kind"), "count": 1, **made}


# show


def show_it(arguments: argparse.Namespace) -> int:
    source = _source(arguments)
    wanted = arguments.id
    found: list[FactLine | FloodLine] = []
    stacks: dict[str, str] = {}
    for line in source.errors():
        report = line.report
        if report is not None and _is_meant(line, report, wanted):
            found.append(line)
            stacks.setdefault(report.fingerprint, source.reader.stack_of(report.fingerprint))
    if not found:
        raise CommandError(f"no error of {printable(wanted, 100)}; 'errors list' shows fingerprints and message ids")
    names = sorted(stacks)
    if len(names) > 1 and all(name.startswith(wanted) for name in names):
        raise CommandError(f"{printable(wanted, 100)} begins several fingerprints: {', '.join(names[:10])}")
    found.sort(key=lambda line: -line.at)
    errors = count_lines(found, source.now, lambda _line: True)
    trends = [trend for trend in trends_of(errors, source.now) if trend.kind == "fingerprint"]
    if arguments.json:
        print_json(
            {
                "fingerprints": [{**_trend_json(one), "stack_trace": stacks[one.name]} for one in trends],
                "errors": [_as_json(line) for line in found[:100]],
            }
        )
    else:
        print("\n\n".join(_whole_text(one, stacks[one.name], found) for one in trends))
    _print_notes(source)
    return EXIT_OK


def _is_meant(line: FactLine | FloodLine, report: ReportLine, wanted: str) -> bool:
    if report.fingerprint == wanted or (len(wanted) >= _PREFIX_MIN and report.fingerprint.startswith(wanted)):
        return True
    return isinstance(line, FactLine) and wanted in (line.message_id, report.error_id)


def _whole_text(trend: Trend, stack: str, found: list[FactLine | FloodLine]) -> str:
    same = [line for line in found if line.report is not None and line.report.fingerprint == trend.name]
    where = sorted({line.subscription or line.report.component for line in same if line.report is not None})
    facts = [
        ("fingerprint", printable(trend.name)),
        ("error", printable(named(trend), 500)),
        ("kind", printable(f"{trend.category}, severity {trend.severity}", 200)),
        ("where", printable(", ".join(where), 300)),
        ("count", f"{trend.count:,}; first {moment(trend.first_seen)}, last {moment(trend.last_seen)}"),
        ("trend", f"{trend.direction}: {trend.recent:,} now; {compared(trend.recent, trend.usual, trend.ratio)}"),
        ("last day", f"|{sparkline([*trend.windows, trend.recent], 96)}|"),
    ]
    lines = [f"{paint(f'{name:<12}', 'bold')} {value}" for name, value in facts]
    if stack:
        lines += [paint("stack trace", "bold"), printable_lines(stack)]
    lines += [paint("the latest", "bold"), _table(same[:_SHOWN_MAX])]
    return "\n".join(lines)


# stats and trends


def stats_of(arguments: argparse.Namespace) -> int:
    source = _source(arguments)
    counted = count_lines(source.lines(), source.now, source.selection.takes).snapshot(source.now)
    if arguments.json:
        print_json({**counted, "notes": source.reader.notes()})
        return EXIT_OK
    if not counted["total_errors"]:
        print(_nothing(source))
    else:
        analysis = Analysis(source.now, source.name, counted, [], {})
        print(f"{paint('last hour', 'bold')}      {counted['recent_errors_1h']:,} ({rate(counted['error_rate_1h'])})")
        print(f"{paint('last 24 hours', 'bold')}  {counted['recent_errors_24h']:,}")
        print(
            f"{paint('in all', 'bold')}         {counted['total_errors']:,} since {moment(counted['first_error_at'])}"
        )
        print(f"{paint('recovery', 'bold')}       {recovery_text(analysis)}")
        for title, name in (
            ("category", "categories"),
            ("severity", "severity_distribution"),
            ("subscription", "subscriptions"),
        ):
            ordered = sorted(counted[name].items(), key=lambda pair: -pair[1])
            if ordered:
                rows = [[printable(one), f"{number:,}"] for one, number in ordered]
                print("\n" + table(rows, [title, "errors"], frozenset({1})))
        print("\n" + _frequent(counted["top_fingerprints"]))
    _print_notes(source)
    return EXIT_OK


def _frequent(top: list[dict[str, Any]]) -> str:
    rows = [
        [
            printable(one["fingerprint"]),
            f"{one['count']:,}",
            printable(one["severity"], 60),
            moment(one["last_seen"]),
            _cut(f"{one['exception_type'].removeprefix('glassbus.errors.')}: {one['message']}"),
        ]
        for one in top
    ]
    return table(rows, ["fingerprint", "errors", "severity", "last", "error"], frozenset({1}))


def trends_now(arguments: argparse.Namespace) -> int:
    source = _source(arguments)
    trends = trends_of(count_lines(source.lines(), source.now, source.selection.takes), source.now)
    if arguments.json:
        print_json([_trend_json(one) for one in trends])
        return EXIT_OK
    if not trends:
        print(_nothing(source))
    for title, kind in (("category", "category"), ("fingerprint", "fingerprint")):
        same = [one for one in trends if one.kind == kind]
        if same:
            print(_trend_table(same[: arguments.limit], title))
            if len(same) > arguments.limit:
                print(paint(f"and {count(len(same) - arguments.limit, title)} more: --limit shows them", "dim"))
            print()
    _print_notes(source)
    return EXIT_OK


def _trend_table(trends: list[Trend], title: str) -> str:
    last = "error" if title == "fingerprint" else ""
    rows = [
        [
            f"{ARROWS[one.direction]} {one.direction}",
            printable(one.name),
            f"{one.recent:,}",
            "-" if one.usual is None else f"{one.usual:,.0f}",
            moment(one.first_seen if one.direction == "new" else one.last_seen),
            sparkline([*one.windows, one.recent], 24).rjust(24),
            _cut(named(one)) if last else "",
        ]
        for one in trends
    ]
    headings = ["trend", title, "now", "usual", "first/last", "last 24 hours", last]
    lines = table(rows, headings, frozenset({2, 3})).splitlines()
    styled = [paint(text, _STYLES.get(one.direction, "")) for text, one in zip(lines[1:], trends, strict=True)]
    return "\n".join([lines[0], *styled])


def _trend_json(trend: Trend) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(trend)
    return made


# report


def report_all(arguments: argparse.Namespace) -> int:
    source = _source(arguments)
    errors = count_lines(source.lines(), source.now, source.selection.takes)
    analysis = Analysis.of(errors, source.now, source=source.name, notes=source.reader.notes())
    if arguments.html == "-":
        print(html_report(analysis), end="")
    elif arguments.html:
        target = Path(arguments.html)
        try:
            replace_file(target.absolute(), html_report(analysis).encode(), "report")
        except OSError as error:
            raise CommandError(f"cannot write {target}: {error.strerror or error}") from None
        print(f"wrote {target}")
    elif arguments.json:
        print_json(msgspec.to_builtins(analysis))
    else:
        print(text_report(analysis), end="")
    return EXIT_OK
