"""What the loop asks of the writer thread, and what the writer answers.

A request belongs to the loop until it is put in the inbox, then to the writer until
its answer is posted. Futures are resolved on the loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from glassbus.facts import Delivery, Fact
from glassbus.message import Envelope
from glassbus.policy.delivery import Decision
from glassbus.transport import Hold, Recorded, Stored

if TYPE_CHECKING:
    from glassbus.transport.sqlite.books import Queue
    from glassbus.transport.sqlite.transaction import Transaction


#: How long a publish waits at least for a store that fails, even if it would not wait for room; in seconds.
PATIENCE_S = 1.0


class Publish(msgspec.Struct, eq=False):
    """A batch to store, all or nothing. Times are monotonic seconds.

    `slowed` is the full queue it has to wait for; `waits` is false when no live consumer can make room, so
    that waiting is no use. `priority` is that of its highest message, -1 before it is needed. `stored`: its ids
    that were new and now are stored. `uncertain`: ids in a commit that failed in a way that may have stored them.
    """

    batch: Sequence[Envelope]
    future: asyncio.Future[Any]
    arrived: float
    deadline: float
    slowed: Queue | None = None
    waits: bool = True
    priority: int = -1
    stored: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()

    @property
    def give_up_at(self) -> float:
        return max(self.deadline, self.arrived + PATIENCE_S)


class Claim(msgspec.Struct, eq=False):
    """One delivery wanted."""

    name: str
    future: asyncio.Future[Delivery]


class Settlement(msgspec.Struct, eq=False):
    """Where a delivery goes next. `uncertain`: a commit that held it failed, and may have stored it."""

    delivery: Delivery
    decision: Decision
    recorded: Recorded
    uncertain: bool = False


class Call(msgspec.Struct, eq=False):
    """Any other work in a transaction. What it raises as a GlassbusError is its answer."""

    work: Callable[[Transaction], Any]
    future: asyncio.Future[Any]


class Flush(msgspec.Struct, eq=False):
    """To be answered when every settlement before it is recorded."""

    future: asyncio.Future[None]


class Remember(msgspec.Struct, eq=False):
    """The publisher was cancelled after it handed `publish` over: its ids must be known from now on."""

    publish: Publish


class Close(msgspec.Struct, eq=False):
    """Record what is settled, give back the rest, and let go of the store. Without a future nobody waits for it."""

    future: asyncio.Future[int] | None


Request = Publish | Claim | Settlement | Call | Flush | Remember | Close


class Answers:
    """What one transaction leads to on the loop, in the order in which it is told.

    Where every message has an entry, pairs are kept as two lists: a tuple each would be
    one more object for the collector to look at.
    """

    __slots__ = (
        "broken",
        "claimers",
        "deliveries",
        "facts",
        "failed",
        "holds",
        "publishers",
        "recorded",
        "refused",
        "results",
        "stored",
    )

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self.holds: list[tuple[str, Hold]] = []
        self.recorded: list[Settlement] = []
        self.refused: list[Settlement] = []
        self.claimers: list[asyncio.Future[Delivery]] = []
        self.deliveries: list[Delivery] = []
        self.publishers: list[asyncio.Future[Any]] = []
        self.stored: list[Sequence[Stored]] = []
        self.results: list[tuple[asyncio.Future[Any], Any]] = []
        self.failed: list[tuple[asyncio.Future[Any], BaseException]] = []
        self.broken: BaseException | None = None

    def __bool__(self) -> bool:
        return bool(
            self.publishers
            or self.recorded
            or self.claimers
            or self.facts
            or self.results
            or self.refused
            or self.failed
            or self.holds
            or self.broken is not None
        )
