"""`glassbus explain MESSAGE_ID`: the story of one message, from the journal and the store, whoever runs or died."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from glassbus.cli.common import (
    EXIT_NO,
    EXIT_OK,
    URL_VARIABLE,
    CommandError,
    add_url,
    existing_store,
    opened_store,
    print_json,
    printable,
    shortened,
)
from glassbus.cli.storytext import Places, story_text
from glassbus.config import Address, addresses, default_state_dir
from glassbus.errors import GlassbusError, redact, safe_text
from glassbus.record.reading import JournalReader
from glassbus.record.telling import Told, ids_like, ids_of_trace, told_by
from glassbus.story import FORGETS, Asked, Story, ask, tell
from glassbus.transport import Whereabouts
from glassbus.transport.locating import together

JAEGER_VARIABLE = "GLASSBUS_JAEGER"
#: A shorter beginning of an id is not looked for.
_PREFIX_MIN = 4
_LISTED_MAX = 20
_TRACE_ID = re.compile(r"[0-9a-f]{32}")
_NOTES = """\
Reads the journal beside a store (sqlite:///orders.db: orders.db.state) or that of --state-dir, of all processes, and
asks the store where the message is now; it changes nothing. With --state-dir alone no store is asked. A beginning of an
id is enough where it is the only one; the id of an error or of a trace is taken too. Times are in UTC.
Exit status: 0 told, 1 nobody knows the message (or several begin so), 2 neither journal nor store can be read.
"""

Result = TypeVar("Result")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _NOTES
    parser.add_argument("message_id", metavar="MESSAGE_ID", help="its id, or how that begins")
    add_url(parser)
    parser.add_argument("--state-dir", metavar="DIR", help="the state directory, where it is not beside the store")
    parser.add_argument(
        "--jaeger",
        metavar="URL",
        default=os.environ.get(JAEGER_VARIABLE, ""),
        help=f"where traces can be seen, for links: http://localhost:16686 (default: ${JAEGER_VARIABLE})",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.set_defaults(run=explain)


class _Source(NamedTuple):
    """Where the journal is (None: nowhere) and which store to ask (None: none)."""

    journal: Path | None
    store: Address | None
    url: str

    @property
    def named(self) -> str:
        return " and ".join(str(one) for one in (self.store, self.journal) if one is not None)


def explain(arguments: argparse.Namespace) -> int:
    source = _source(arguments)
    wanted: str = arguments.message_id
    if arguments.jaeger and not re.fullmatch(r"https?://\S+", arguments.jaeger):
        raise CommandError(
            f"--jaeger takes a URL, such as http://localhost:16686, not {shortened(arguments.jaeger, 80)}"
        )
    unread: list[str] = []
    story = _story(source, wanted, arguments.jaeger, unread)
    if story is None:
        meant = _meant(source, wanted)
        if len(meant) != 1:
            _say_no(source, wanted, meant, unread)
            return EXIT_NO
        print(f"{printable(wanted, 100)}: found {printable(meant[0])}", file=sys.stderr)
        story = _story(source, meant[0], arguments.jaeger, unread)
        if story is None:  # it went between the two looks
            _say_no(source, wanted, [], unread)
            return EXIT_NO
    if arguments.json:
        print_json(story.to_dict())
    else:
        print(story_text(story, _places(arguments)))
    return EXIT_OK


def _say_no(source: _Source, wanted: str, found: list[str], unread: list[str]) -> None:
    if len(found) > 1:
        more = " or more" if len(found) >= _LISTED_MAX else ""
        print(f"{printable(wanted, 100)} begins the ids of {len(found)}{more} messages:", file=sys.stderr)
        for one in found[:_LISTED_MAX]:
            print(f"  {printable(one)}", file=sys.stderr)
        return
    print(
        f"glassbus: nothing is known of a message {shortened(wanted, 100)} in {source.named}.\n"
        f"Either its id or the store is another, or it is forgotten: {FORGETS}.",
        file=sys.stderr,
    )
    for note in unread:
        print(f"note: {printable(note)}", file=sys.stderr)
    if source.journal is None:
        print("This store has no journal beside it: --state-dir names that of its services.", file=sys.stderr)


# Where to look


def _source(arguments: argparse.Namespace) -> _Source:
    """Raises CommandError when there is neither a store nor a journal to look at."""
    journal: Path | None = None
    if arguments.state_dir is not None:
        journal = Path(arguments.state_dir)
        if not journal.is_dir():
            raise CommandError(f"there is no folder {arguments.state_dir}; a bus makes it at its first error")
    url = arguments.url or ("" if journal is not None else os.environ.get(URL_VARIABLE, ""))
    if not url and journal is None:
        raise CommandError(
            f"no store named: give --url sqlite:///path/to/file.db, or set {URL_VARIABLE}, or give --state-dir"
        )
    if not url:
        return _Source(journal, None, "")
    store = addresses(url)[0] if journal is not None else existing_store(url)
    if journal is None:
        beside = default_state_dir([store])
        journal = Path(beside) if beside is not None else None
    return _Source(journal, store, url)


def _places(arguments: argparse.Namespace) -> Places:
    store = ""
    if arguments.url:
        store = f" --url {shlex.quote(arguments.url)}" if redact(arguments.url) == arguments.url else " --url URL"
    journal = f" --state-dir {shlex.quote(arguments.state_dir)}" if arguments.state_dir is not None else store
    return Places(store, journal)


def _story(source: _Source, message_id: str, jaeger: str, unread: list[str]) -> Story | None:
    """What is known; None, and in `unread` what of the journal cannot be read. Raises CommandError when nothing is
    known and the store could not be asked."""
    told = Told([], [], [])
    if source.journal is not None:
        told = told_by(JournalReader(source.journal), message_id)
    troubles: list[str] = []
    asked = _asked(source, lambda store: ask(store, message_id), troubles)
    spooled = _spooled(source, message_id, troubles)
    if spooled is not None:
        known = asked or Asked(f"the spool in {source.journal}", None, (), {})
        asked = known._replace(where=together([("", spooled), ("", known.where)]))
    notes = (*told.notes, *troubles)
    if source.journal is None:
        notes = (*notes, "this store has no journal beside it, so nothing is told of attempts: --state-dir names it")
    if source.store is None and spooled is None:
        notes = (*notes, "no store was asked where it is now: --url names it")
    story = tell(message_id, told._replace(notes=notes), asked, time.time(), traces_at=jaeger)
    if story is None:
        unread[:] = told.notes
    if story is None and troubles:
        raise CommandError(f"the journal tells nothing of it, and {troubles[0]}")
    return story


def _meant(source: _Source, wanted: str) -> list[str]:
    """The messages whose id begins so, or that an error's or a trace's id leads to."""
    found: set[str] = set()
    if len(wanted) >= _PREFIX_MIN:
        found.update(_asked(source, lambda store: store.ids_like(wanted, _LISTED_MAX), []) or ())
    if source.journal is not None:
        reader = JournalReader(source.journal)
        if len(wanted) >= _PREFIX_MIN:
            found.update(ids_like(reader, wanted, _LISTED_MAX))
        if not found and _TRACE_ID.fullmatch(wanted):
            found.update(ids_of_trace(reader, wanted, _LISTED_MAX))
        of_error = wanted.rsplit(":", 2)[0]  # message:subscription:replays.attempt
        if not found and of_error != wanted and told_by(reader, of_error).entries:
            found.add(of_error)
    return sorted(found)


# Asking the store


def _asked(source: _Source, look: Callable[[Any], Awaitable[Result]], troubles: list[str]) -> Result | None:
    """What `look` makes of the store; None, and one of `troubles` more, where it cannot be asked."""
    store = source.store
    if store is None:
        return None
    try:
        if store.scheme == "sqlite":
            return asyncio.run(_in_file(Path(store.path[1:]), look))
        return asyncio.run(_on_bus(source.url, look))
    except (GlassbusError, OSError) as error:
        troubles.append(f"the store could not be asked: {safe_text(error, 300)}")
        return None


def _spooled(source: _Source, message_id: str, troubles: list[str]) -> Whereabouts | None:
    """What waits in the state directory until a broker is back, whatever that broker says."""
    if source.journal is None or (source.store is not None and source.store.scheme == "sqlite"):
        return None
    from glassbus.transport.spoolfile import spooled_files  # which needs the database engine

    found = []
    for path in spooled_files(source.journal):
        try:
            found.append((f"spool:{path.stem}:", asyncio.run(_in_file(path, lambda store: store.locate(message_id)))))
        except (GlassbusError, OSError) as error:
            troubles.append(f"the spool {path.name} could not be read: {safe_text(error, 300)}")
    return together(found)


async def _in_file(path: Path, look: Callable[[Any], Awaitable[Result]]) -> Result:
    from glassbus.transport.sqlite.looking import LooksOnly

    store = LooksOnly(str(path))
    try:
        return await look(store)
    finally:
        store.close()


async def _on_bus(url: str, look: Callable[[Any], Awaitable[Result]]) -> Result:
    async with opened_store(url) as bus:
        return await look(bus.store)
