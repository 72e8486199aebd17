"""What the state is made of: deliveries, subscriptions, owners; and the verdicts on operations."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from glassbus.config import Overflow
from glassbus.policy.delivery import State
from glassbus.transport import Hold, Stored, SubscriptionSpec
from glassbus.transport.nats import records as r
from glassbus.transport.nats.climbing import Line

#: `Row.suspect`: 0, or why the delivery is given again.
REDELIVERED = ("", "owner_died", "lease_expired")


class Dead(msgspec.Struct, gc=False, array_like=True):
    """What is known of a dead letter without reading it. Its report is operation `op` of the entry at `blob`.

    `blob` 0: the queue was full, and the report is made from what is here.
    """

    id: int
    reason: str
    died_at: float
    blob: int
    op: int
    category: str
    exception_type: str
    fingerprint: str
    capacity: int = 0
    by: int = -1


class Row:
    """One delivery. `blob`, `op` and `at` say where its message is in the stream; `content` is that, if it is at hand.

    `version` counts what happened to it. `place`, `position` and `kept` belong to the watcher.
    """

    __slots__ = (
        "at",
        "attempt",
        "blob",
        "book",
        "content",
        "d",
        "dead",
        "delay_s",
        "due_at",
        "expires_at",
        "first_failed_at",
        "id",
        "kept",
        "key",
        "moved_at",
        "op",
        "owner",
        "place",
        "position",
        "priority",
        "published_at",
        "recovering",
        "replays",
        "state",
        "suspect",
        "topic",
        "version",
    )

    def __init__(self, d: int, book: Book, sent: r.Sent, blob: int, op: int, at: int) -> None:
        self.d = d
        self.book = book
        self.id = sent.id
        self.topic = sent.topic
        self.priority = sent.priority
        self.key = sent.key
        self.published_at = sent.published_at
        self.due_at = sent.due_at
        self.expires_at = sent.expires_at
        self.content: r.Sent | None = sent
        self.blob = blob
        self.op = op
        self.at = at
        self.state = State.READY
        self.attempt = 0
        self.version = 0
        self.owner = ""
        self.suspect = 0
        self.first_failed_at = 0.0
        self.recovering: tuple[str, str] | None = None
        self.replays = 0
        self.delay_s = 0.0
        self.moved_at = 0.0
        self.dead: Dead | None = None
        self.place = 0
        self.kept = False
        self.position = d


class Book:
    """One subscription and its counts."""

    __slots__ = (
        "accepted",
        "consumers",
        "dead",
        "discarded",
        "expanded_until",
        "expired",
        "handled",
        "hold",
        "id",
        "in_flight",
        "lanes",
        "line",
        "name",
        "pending",
        "spec",
    )

    def __init__(self, id: int, name: str) -> None:  # noqa: A002 - what it is
        self.id = id
        self.name = name
        self.spec = SubscriptionSpec(name, ">", 0)
        self.hold = Hold()
        self.expanded_until = 0.0
        self.accepted = self.handled = self.expired = self.discarded = 0
        self.pending = self.in_flight = 0
        self.dead: dict[int, Row] = {}
        self.consumers: set[str] = set()
        self.line: Line | None = None  # while it is full
        self.lanes: Any = None  # the watcher's

    def declared(self, op: r.Declare) -> None:
        overflow = Overflow(displace=op.displace, expand=op.expand, expand_for=op.expand_for)
        self.spec = SubscriptionSpec(op.name, op.pattern, op.capacity, op.strict_key, overflow)


class Owner:
    """A process that writes. `rows` are the deliveries it has in flight, `seen` how far it has read."""

    __slots__ = ("consuming", "lease_s", "number", "parts", "rows", "seen", "token")

    def __init__(self, token: str, lease_s: float) -> None:
        self.token = token
        self.lease_s = lease_s
        self.number = 0
        self.seen = 0
        self.rows: set[int] = set()
        self.consuming: set[str] = set()
        self.parts: dict[int, list[tuple[int, int, list[r.Sent]]]] = {}


class Known(msgspec.Struct, gc=False, array_like=True):
    """An id that is recognised until a wall time, and what it stands for."""

    until: float
    digest: bytes
    routed: tuple[int, ...]


class Route(msgspec.Struct, gc=False, frozen=True):
    """Where the messages of one topic go."""

    books: tuple[Book, ...]
    destination: str
    stored: Stored
    ids: tuple[int, ...]


class Blob(msgspec.Struct, gc=False):
    """An entry that holds messages or reports: how many of them are needed yet, and bodies kept apart."""

    needed: int = 0
    places: tuple[tuple[str, int], ...] = ()


# Verdicts, where yes or no is not enough


class Accepted(msgspec.Struct, gc=False):
    """A publish that is stored; these queues `grew` for it, and these deliveries, `buried`, had no room."""

    stored: list[Stored]
    grew: list[Book]
    buried: list[Row]


class Conflicting(msgspec.Struct, gc=False):
    id: str


class Full(msgspec.Struct, gc=False):
    book: Book


class Incomplete(msgspec.Struct, gc=False):
    """Some of its parts were not stored."""


class Unknown(msgspec.Struct, gc=False):
    """No subscription of this name, or no dead letters of these ids."""

    what: list[str]


class Watcher(Protocol):
    """Told of each change, right after it."""

    def moved(self, row: Row, /) -> None: ...
    def gone(self, row: Row, /) -> None: ...
    def held(self, book: Book, /) -> None: ...
    def structured(self) -> None:
        """Subscriptions, their capacity or their consumers changed."""


class Unwatched:
    """For a state that is only looked at."""

    def moved(self, row: Row, /) -> None:
        """Nobody looks."""

    def gone(self, row: Row, /) -> None:
        """Nobody looks."""

    def held(self, book: Book, /) -> None:
        """Nobody looks."""

    def structured(self) -> None:
        """Nobody looks."""
