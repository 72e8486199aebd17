"""What the bus's loop asks of the NATS thread, and what the thread answers.

A request belongs to the loop until it is put in the inbox, then to the thread until
its answer is posted. Futures are resolved on the loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from glassbus.facts import Delivery, Fact
from glassbus.message import Envelope
from glassbus.policy.delivery import Decision
from glassbus.transport import Hold, Recorded, Stored
from glassbus.transport.nats import records as r
from glassbus.transport.nats.model import Book


class Publish(msgspec.Struct, eq=False):
    """A batch to store, all or nothing. Times are monotonic seconds.

    `sent` is the batch as it is written, made once. `slowed`: the full queue it has to wait for. `uncertain`:
    its publisher was told that it may be stored. `forsaken`: its publisher was cancelled. `stored`: for certain.
    """

    batch: Sequence[Envelope]
    future: asyncio.Future[Any]
    arrived: float
    deadline: float
    sent: list[r.Sent] | None = None
    slowed: Book | None = None
    uncertain: bool = False
    forsaken: bool = False
    stored: bool = False


class Claim(msgspec.Struct, eq=False):
    """One delivery wanted."""

    name: str
    future: asyncio.Future[Delivery]


class Settlement(msgspec.Struct, eq=False):
    """Where a delivery goes next."""

    delivery: Delivery
    decision: Decision
    recorded: Recorded


class Call(msgspec.Struct, eq=False):
    """Any other operation. `finish` makes the answer of the verdict on it, or raises; on the thread."""

    op: r.Op
    future: asyncio.Future[Any]
    finish: Callable[[Any], Any]


class Flush(msgspec.Struct, eq=False):
    """To be answered when every settlement before it is recorded."""

    future: asyncio.Future[None]


class Forsake(msgspec.Struct, eq=False):
    """The publisher was cancelled after it handed `publish` over: its ids must be known from now on."""

    publish: Publish


class Close(msgspec.Struct, eq=False):
    """Record what is settled, give back the rest, and let go of the store. Without a future nobody waits for it."""

    future: asyncio.Future[int] | None


Request = Publish | Claim | Settlement | Call | Flush | Forsake | Close


class Held(msgspec.Struct, frozen=True, gc=False):
    """A delivery in flight: what it takes to settle it."""

    d: int
    version: int
    owner: str


class Answers:
    """What the thread tells the loop, in the order in which it is told."""

    __slots__ = ("broken", "claimed", "facts", "failed", "holds", "lost", "recorded", "refused", "results")

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self.holds: list[tuple[str, Hold]] = []
        self.recorded: list[Settlement] = []
        self.refused: list[Settlement] = []
        self.claimed: list[tuple[asyncio.Future[Delivery], Delivery]] = []
        self.results: list[tuple[asyncio.Future[Any], Any]] = []
        self.failed: list[tuple[asyncio.Future[Any], BaseException]] = []
        self.lost: BaseException | None = None
        self.broken: BaseException | None = None

    def __bool__(self) -> bool:
        return bool(
            self.recorded
            or self.claimed
            or self.results
            or self.facts
            or self.refused
            or self.failed
            or self.holds
            or self.lost is not None
            or self.broken is not None
        )


#: Names of queues, as a receipt tells them.
Outcome = Sequence[Stored]
