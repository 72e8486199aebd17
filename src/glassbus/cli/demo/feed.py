"""What the demo publishes: records of an input, or its own; and now and then something odd of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Protocol

from glassbus.cli.common import CommandError
from glassbus.cli.demo.service import Order, priority_of, repository_of
from glassbus.cli.jsonlines import Line, LineReader
from glassbus.errors import InvalidHeaders, InvalidTopic
from glassbus.message import KEY_LENGTH_MAX, Outgoing, check_text, check_topic

#: Records of an input that are kept, so that it can be replayed; beyond that it is read once.
_KEPT_MAX = 20_000
_KEPT_BYTES_MAX = 64 * 1024 * 1024


class Feed(Protocol):
    """Where messages come from. `name` says so to people."""

    name: str
    #: Records that could not be used, and what was wrong with the first.
    bad: int
    first_bad: str
    #: How often the input was begun anew.
    rounds: int

    async def take(self, count_max: int, wait_s: float) -> list[Outgoing]:
        """At most `count_max` messages; fewer when there are no more within `wait_s`."""

    @property
    def ended(self) -> bool: ...
    def close(self) -> None: ...


def topic_of(record: dict[str, Any]) -> tuple[str, Any]:
    """(topic, payload) of an input record: a GitHub webhook, a record with a topic, or anything else."""
    event = record.get("event")
    if set(record) == {"event", "payload"} and _is_topic(f"github.{event}"):
        return f"github.{event}", record["payload"]
    topic = record.get("topic")
    return (str(topic) if _is_topic(topic) else "input.record"), record


def _is_topic(topic: Any) -> bool:
    try:
        check_topic(topic)
    except InvalidTopic:
        return False
    return True


def outgoing(record: dict[str, Any]) -> Outgoing:
    topic, payload = topic_of(record)
    key = repository_of(payload)
    try:
        key = check_text("key", key, KEY_LENGTH_MAX) if key is not None else None
    except InvalidHeaders:
        key = None
    return Outgoing(topic, payload, key=key, priority=priority_of(topic.partition(".")[2]))


class InputFeed:
    """JSON lines of a file or of stdin; with `replay`, again from the start when they end."""

    def __init__(self, source: str, *, replay: bool) -> None:
        self._reader = LineReader(source)
        self._replay = replay
        self._kept: list[Outgoing] = []
        self._kept_bytes = 0
        self._at = 0
        self._read = 0
        self.name = self._reader.name
        self.bad = 0
        self.first_bad = ""
        self.rounds = 0

    async def take(self, count_max: int, wait_s: float) -> list[Outgoing]:
        if self._reader.exhausted:
            return self._again(count_max)
        messages = [m for line in await self._reader.take(count_max, wait_s) if (m := self._message(line))]
        if self._reader.exhausted and not self._read:
            raise CommandError(f"no JSON object in {self.name}" + (f"; {self.first_bad}" if self.bad else ""))
        return messages

    @property
    def ended(self) -> bool:
        return self._reader.exhausted and not (self._replay and self._kept)

    def close(self) -> None:
        self._reader.close()

    def _message(self, line: Line) -> Outgoing | None:
        bad = line.bad or ("" if isinstance(line.value, dict) else "not a JSON object")
        if bad:
            self.bad += 1
            self.first_bad = self.first_bad or f"line {line.number}: {bad}"
            return None
        self._read += 1
        message = outgoing(line.value)
        if self._replay:
            self._keep(message, line.size)
        return message

    def _keep(self, message: Outgoing, size: int) -> None:
        self._kept.append(message)
        self._kept_bytes += size
        if len(self._kept) > _KEPT_MAX or self._kept_bytes > _KEPT_BYTES_MAX:
            self._replay = False
            self._kept.clear()

    def _again(self, count_max: int) -> list[Outgoing]:
        if self.ended:
            return []
        self.rounds += self._at == 0
        messages = self._kept[self._at : self._at + count_max]
        self._at = (self._at + len(messages)) % len(self._kept)
        return messages


class MadeUpFeed:
    """Webhooks and web shop orders without end, the same for the same `seed`."""

    rounds = 0
    bad = 0
    first_bad = ""
    ended = False

    def __init__(self, seed: int) -> None:
        self.name = f"made up (seed {seed})"
        self._records = _made_up(random.Random(seed))  # noqa: S311 - made-up data needs no secrecy

    async def take(self, count_max: int, wait_s: float) -> list[Outgoing]:
        return [next(self._records) for _ in range(count_max)]

    def close(self) -> None:
        """Nothing is held."""


_REPOSITORIES = [f"{owner}/{name}" for owner in ("acme", "globex", "initech") for name in ("web", "api", "docs", "cli")]
_EVENTS = {"push": 8, "pull_request": 5, "issues": 4, "workflow_job": 4, "star": 3, "release": 1, "sponsorship": 1}
_ITEMS = ["mug", "t-shirt", "sticker", "hoodie", "poster"]
_CUSTOMERS = ["ada", "barbara", "carol", "donald", "edsger", "frances", "grace"]


def _made_up(chance: random.Random) -> Iterator[Outgoing]:
    number = 0
    while True:
        number += 1
        if chance.random() < 0.6:
            event = chance.choices(list(_EVENTS), list(_EVENTS.values()))[0]
            repository = chance.choice(_REPOSITORIES)
            payload = {
                "action": "created",
                "repository": {"full_name": repository},
                "sender": {"login": chance.choice(_CUSTOMERS)},
                "delivery": number,
            }
            yield Outgoing(f"github.{event}", payload, key=repository, priority=priority_of(event))
        else:
            customer = chance.choice(_CUSTOMERS)
            quantity = chance.randint(1, 4)
            order = Order("", customer, chance.choice(_ITEMS), quantity, quantity * chance.randint(300, 4500))
            yield Outgoing("orders.created", order, key=customer)


class Spiced:
    """A feed with something odd in it now and then, as in real life, and an id for each message.

    The ids are ours, so a publish of unknown outcome can be repeated and is not stored twice.
    """

    def __init__(self, feed: Feed, run: str) -> None:
        self.feed = feed
        self._run = run
        self.records = 0
        self.added = 0
        #: Patterns of topics that the input has brought.
        self.patterns: set[str] = set()

    async def take(self, count_max: int, wait_s: float) -> list[Outgoing]:
        messages: list[Outgoing] = []
        for message in await self.feed.take(count_max, wait_s):
            self.records += 1
            root, dot, _ = message.topic.partition(".")
            self.patterns.add(f"{root}.>" if dot else root)
            named = with_id(message, f"{self._run}-{self.records}")
            messages.append(named)
            if self.records % 50 == 10:
                messages.append(named)  # webhooks are delivered twice at times: it must be stored once
            odd = self._odd()
            if odd is not None:
                self.added += 1
                messages.append(with_id(odd, f"{self._run}-odd-{self.added}"))
        return messages

    def _odd(self) -> Outgoing | None:
        number = self.records
        if number % 400 == 40:  # breaks the handler every time
            return Outgoing("orders.created", Order("", "globex/web", "void", quantity=0, cents=0))
        if number % 600 == 70:  # does not fit the handler's type
            return Outgoing("orders.created", {"customer": "initech/api", "item": "mug", "quantity": "three"})
        if number % 60 == 20:  # nobody listens
            return Outgoing("support.feedback", {"text": "Nice demo.", "number": number})
        return None


def with_id(message: Outgoing, message_id: str) -> Outgoing:
    return Outgoing(message.topic, message.payload, message_id, message.key, message.priority)
