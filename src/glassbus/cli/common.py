"""What the commands share: the URL, a store seen from outside, and how things are written."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassbus.config import Address, addresses
from glassbus.errors import ErrorReport, GlassbusError
from glassbus.policy.ledger import Account

if TYPE_CHECKING:
    from glassbus.bus import MessageBus

EXIT_OK = 0
EXIT_NO = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

URL_VARIABLE = "GLASSBUS_URL"

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class CommandError(GlassbusError):
    """A command cannot do what it was asked; the text says why and what would help."""


# The store


def add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        metavar="URL",
        help="where the messages are: three slashes for a path from the current folder, sqlite:///orders.db, four for "
        f"one from the root, sqlite:////var/lib/orders.db (default: ${URL_VARIABLE})",
    )


def url_of(arguments: argparse.Namespace) -> str:
    """The URL given, or that of the environment. Raises CommandError when there is neither."""
    url: str = arguments.url or os.environ.get(URL_VARIABLE, "")
    if not url:
        raise CommandError(f"no store named: give --url sqlite:///path/to/file.db, or set {URL_VARIABLE}")
    return url


def existing_store(url: str) -> Address:
    """The address of a store that can be looked at from outside. Raises CommandError.

    A command that only looks must not make an empty store because a path was misspelt.
    """
    address = addresses(url)[0]
    if address.scheme == "memory":
        raise CommandError("memory:// lives inside the process of its bus: there is nothing to see from outside")
    if address.scheme == "sqlite" and not address.host and not Path(address.path[1:]).exists():
        raise CommandError(f"there is no store at {address}; a service that subscribes makes one when it starts")
    return address


@asynccontextmanager
async def opened_store(url: str, *, publish_timeout: float = 5.0, telemetry: bool = False) -> AsyncIterator[MessageBus]:
    """A bus on an existing store that consumes nothing. Raises CommandError or TransportError."""
    from glassbus.bus import MessageBus
    from glassbus.policy.failover import Reconnect

    existing_store(url)
    # What the commands do they print themselves; the log would say it twice.
    for name in ("glassbus", "opentelemetry"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    # A person waits: a broker that is not there is said to be so soon.
    soon = Reconnect(start_timeout=2.0)
    bus = MessageBus(url, telemetry=telemetry, publish_timeout=publish_timeout, reconnect=soon)
    bus.looks_only = True
    await bus.start()
    try:
        yield bus
    finally:
        await bus.stop(5.0)


# The command itself


def own_command() -> str:
    """How this command is called from this shell: by its name where the PATH has it, else by its path."""
    if shutil.which("glassbus"):
        return "glassbus"
    called = sys.argv[0]
    if Path(called).name != "glassbus":
        called = str(Path(sys.executable).with_name("glassbus"))
    return shlex.quote(called)


# Arguments


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """A type for argparse: a number from `low` (or `above` it) to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (above and value == low):
            least = f"above {low:g}" if above else f"{low:g} or more"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number, {least} and at most {high:,.0f}")
        return value

    return read


def whole(text: str) -> int:
    """A type for argparse: how many."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 100,000")
    return int(text)


def when(text: str) -> float:
    """A type for argparse: wall seconds from `10m` (ago), ISO 8601 (local unless it has an offset) or Unix seconds."""
    ago = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if ago:
        return time.time() - float(ago[1]) * _UNITS[ago[2]]
    if re.fullmatch(r"\d{9,11}(?:\.\d+)?", text):
        return float(text)
    try:
        return datetime.fromisoformat(text).astimezone(UTC).timestamp()
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time: write 2026-01-31T12:00, or 10m for 10 minutes ago"
        ) from None


# Writing


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def printable(text: str, cap: int = 10_000) -> str:
    """`text` on one line with nothing in it that a terminal would obey."""
    shown = "".join(char if char.isprintable() else _escape(char) for char in text[: cap + 1])
    return shown if len(shown) <= cap else shown[: cap - 1] + "…"


def shortened(text: str, cap: int) -> str:
    """`text` on one line of at most `cap` characters; what is left out is in the middle, for the end tells most."""
    shown = printable(text)
    if len(shown) <= cap:
        return shown
    tail = cap // 2
    return f"{shown[: cap - tail - 1]}…{shown[-tail:]}"


def error_text(report: ErrorReport) -> str:
    """The type and the text of a failure, for people: errors of our own go by their bare names."""
    return f"{report.exception_type.removeprefix('glassbus.errors.')}: {report.message}"


def printable_lines(text: str) -> str:
    """`text` with its line breaks kept and every other control character escaped."""
    return "\n".join(printable(line) for line in text.expandtabs(4).splitlines())


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def equation(account: Account) -> str:
    """The conservation law with the numbers of `account`."""
    return (
        f"accepted {account.accepted:,} = pending {account.pending:,} + in flight {account.in_flight:,} "
        f"+ handled {account.handled:,} + dead-lettered {account.dead_lettered:,} "
        f"+ expired {account.expired:,} + discarded {account.discarded:,}"
    )


def duration(seconds: float) -> str:
    """A duration for people, in at most two units."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def moment(at: float) -> str:
    """Wall time `at` in UTC, to the second, in a form that --since takes."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%SZ}" if at else "-"


def count(number: int, one: str, many: str = "") -> str:
    """`1 message`, `2,000 messages`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


_STYLES = {"good": "32", "warn": "33", "bad": "31;1", "dim": "2", "bold": "1"}


def paint(text: str, style: str) -> str:
    """`text` in a style, if it is one, where stdout is a terminal that wants it (NO_COLOR: https://no-color.org)."""
    if style not in _STYLES or not colours():
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def table(rows: list[list[str]], headings: list[str], right: frozenset[int] = frozenset()) -> str:
    """Columns under headings; those numbered in `right` are aligned to the right."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    lines = []
    for row in [headings, *rows]:
        cells = [cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
