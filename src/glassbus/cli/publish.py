"""`glassbus publish`: JSON lines become messages, each line or none of it."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from glassbus.cli.common import (
    EXIT_INTERRUPTED,
    EXIT_NO,
    EXIT_OK,
    CommandError,
    add_url,
    count,
    number,
    opened_store,
    printable,
    url_of,
)
from glassbus.cli.jsonlines import Line, LineReader
from glassbus.errors import InvalidMessage, MessageConflict, PublishError, PublishUncertain, safe_text
from glassbus.message import Outgoing, Priority

if TYPE_CHECKING:
    from glassbus.bus import MessageBus
    from glassbus.message import Receipt

_BATCH_MAX = 256
#: A publish of unknown outcome is repeated so often, with the same ids.
_REPEATS = 3
_NAMED_MAX = 20

_NOTES = """\
Each line is one JSON value: the payload. Its topic is --topic, or else the text in the field that --topic-field names
(default: topic), behind --topic-prefix. The store must exist: a service that subscribes makes it.

    glassbus publish --topic orders.created orders.jsonl
    glassbus publish --topic-field event --topic-prefix github. --payload-field payload webhooks.jsonl

Lines are read strictly: UTF-8, no key twice in an object, no NaN, integers of 64 bits. A bad line ends it (all lines
before it are published); with --skip-bad it is named and left out.

With --id-field the message id comes from the line, so running the same input again within 10 minutes stores nothing
twice, whatever became of the first run.

Exit status: 0 all published, 1 some lines were left out, 2 it ended early, 130 interrupted.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _NOTES
    add_url(parser)
    parser.add_argument("file", nargs="?", default="-", metavar="FILE", help="JSON lines (default: -, stdin)")
    topic = parser.add_mutually_exclusive_group()
    topic.add_argument("--topic", metavar="T", help="the topic of every message")
    topic.add_argument("--topic-field", default="topic", metavar="F", help="the field that holds the topic")
    parser.add_argument("--topic-prefix", default="", metavar="P", help="put before the text of --topic-field")
    parser.add_argument("--payload-field", metavar="F", help="publish the value of this field instead of the whole")
    parser.add_argument("--key-field", metavar="F", help="the field that holds the ordering key, if the line has it")
    parser.add_argument("--id-field", metavar="F", help="the field that holds the message id")
    parser.add_argument(
        "--priority", type=_priority, default=Priority.NORMAL, metavar="P", help="low, normal, high or critical"
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave bad lines out and go on")
    parser.add_argument(
        "--wait",
        type=number(0, 1e7),
        default=30.0,
        metavar="S",
        help="seconds to wait for room in a full queue (default: 30)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    return asyncio.run(_publish(url_of(arguments), arguments))


class Counts(msgspec.Struct):
    """What became of the lines."""

    accepted: int = 0
    unrouted: int = 0
    duplicates: int = 0
    rejected: int = 0

    def add(self, receipts: list[Receipt]) -> None:
        for receipt in receipts:
            if receipt.duplicate:
                self.duplicates += 1
            elif receipt.subscriptions:
                self.accepted += 1
            else:
                self.unrouted += 1

    def __str__(self) -> str:
        return (
            f"{self.accepted:,} accepted, {self.unrouted:,} unrouted, "
            f"{count(self.duplicates, 'duplicate')}, {self.rejected:,} rejected"
        )


class BadLine(ValueError):
    """A line that cannot be a message."""


async def _publish(url: str, arguments: argparse.Namespace) -> int:
    from glassbus.cli.hosting import stop_signals

    reader = LineReader(arguments.file)
    interrupted = asyncio.Event()
    async with opened_store(url, publish_timeout=arguments.wait) as store:
        publisher = _Publisher(store, arguments, reader.name)
        with stop_signals(lambda _: interrupted.set()):
            try:
                while not interrupted.is_set() and not reader.exhausted:
                    lines = await reader.take(_BATCH_MAX, 0.2)
                    await publisher.publish(lines)
            except (CommandError, PublishError):
                print(publisher.counts, file=sys.stderr)
                raise
            finally:
                reader.close()
    print(publisher.counts)
    if interrupted.is_set():
        print(f"interrupted after line {publisher.last_line:,}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_NO if publisher.counts.rejected else EXIT_OK


class _Publisher:
    def __init__(self, store: MessageBus, arguments: argparse.Namespace, source: str) -> None:
        self.counts = Counts()
        self.last_line = 0
        self._store = store
        self._arguments = arguments
        self._source = source
        # Ids of our own where the lines have none, so that an uncertain batch can be repeated.
        self._run = f"publish-{secrets.token_hex(8)}"
        self._named = 0

    async def publish(self, lines: list[Line]) -> None:
        """Publish `lines` in order. Raises CommandError at the first bad one, all before it being published."""
        batch: list[tuple[int, Outgoing]] = []
        for line in lines:
            try:
                batch.append((line.number, self._message(line)))
            except BadLine as error:
                await self._send(batch)
                batch = []
                self._bad(line.number, str(error))
            self.last_line = line.number
        await self._send(batch)

    def _message(self, line: Line) -> Outgoing:
        if line.bad:
            raise BadLine(line.bad)
        options = self._arguments
        value = line.value
        key = _field(value, options.key_field, required=False) if options.key_field else None
        return Outgoing(
            topic=options.topic or options.topic_prefix + str(_field(value, options.topic_field)),
            payload=_payload(value, options.payload_field),
            message_id=_field(value, options.id_field) if options.id_field else f"{self._run}-{line.number}",
            key=key,
            priority=options.priority,
        )

    async def _send(self, batch: list[tuple[int, Outgoing]]) -> None:
        if not batch:
            return
        try:
            self.counts.add(await self._stored([message for _, message in batch]))
        except (InvalidMessage, MessageConflict) as error:
            if len(batch) == 1:
                self._bad(batch[0][0], safe_text(error))
                return
            # None of the batch was stored. One by one, to find out which line it is.
            for one in batch:
                await self._send([one])
        except PublishError as error:
            first, last = batch[0][0], batch[-1][0]
            where = f"line {first}" if first == last else f"lines {first} to {last}"
            raise CommandError(f"{self._source} {where}: {safe_text(error)}") from None

    async def _stored(self, messages: list[Outgoing]) -> list[Receipt]:
        for repeat in range(_REPEATS + 1):
            try:
                return await self._store.publish_many(messages)
            except PublishUncertain:
                if repeat == _REPEATS:
                    raise
                await asyncio.sleep(0.2 * 2**repeat)
        raise AssertionError("the loop returns or raises")

    def _bad(self, number: int, reason: str) -> None:
        told = f"{self._source} line {number}: {printable(reason, 500)}"
        self.counts.rejected += 1
        if not self._arguments.skip_bad:
            raise CommandError(f"{told} (--skip-bad leaves such lines out)")
        self._named += 1
        if self._named <= _NAMED_MAX:
            print(f"glassbus: left out: {told}", file=sys.stderr)
        elif self._named == _NAMED_MAX + 1:
            print(f"glassbus: left out: more than {count(_NAMED_MAX, 'line')}; the rest are counted", file=sys.stderr)


def _field(value: Any, name: str, *, required: bool = True) -> str | None:
    """The text in a field of a line; numbers count as text, so that ids may be either. Raises BadLine."""
    if not isinstance(value, dict):
        raise BadLine(f"not an object, so it has no field {name!r}")
    found = value.get(name)
    if found is None and not required:
        return None
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise BadLine(f"no text in field {name!r}" if name in value else f"no field {name!r}")
    return str(found)


def _payload(value: Any, name: str | None) -> Any:
    if name is None:
        return value
    if not isinstance(value, dict) or name not in value:
        raise BadLine(f"no field {name!r}")
    return value[name]


def _priority(text: str) -> Priority:
    try:
        return Priority[text.upper()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is none of low, normal, high, critical") from None
