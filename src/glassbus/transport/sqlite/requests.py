"""What the loop asks of the writer thread, and what the writer answers.

A request belongs to the loop until it is put in the inbox, then to the writer until
its answer is posted. Futures are resolved on the loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from glassbus.facts import Delivery, Fact
from glassbus.message import Envelope
from glassbus.policy.delivery import Decision
from glassbus.transport import Hold, Recorded

if TYPE_CHECKING:
    from glassbus.transport.sqlite.books import Queue
    from glassbus.transport.sqlite.transaction import Transaction


#: How long a publish waits at least for a store that fails, even if it would not wait for room; in seconds.
PATIENCE_S = 1.0


class Publish:
    """A batch to store, all or nothing. Times are monotonic seconds."""

    __slots__ = ("arrived", "batch", "deadline", "future", "slowed", "stored", "uncertain")

    def __init__(self, batch: Sequence[Envelope], future: asyncio.Future[Any], arrived: float, wait_s: float) -> None:
        self.batch = batch
        self.future = future
        self.arrived = arrived
        self.deadline = arrived + wait_s
        self.slowed: Queue | None = None  # the full queue it has to wait for
        self.stored: tuple[str, ...] = ()  # ids that were new, and now are stored
        self.uncertain: tuple[str, ...] = ()  # ids in a commit that failed in a way that may have stored them

    @property
    def give_up_at(self) -> float:
        return max(self.deadline, self.arrived + PATIENCE_S)


class Claim:
    """One delivery wanted."""

    __slots__ = ("future", "name")

    def __init__(self, name: str, future: asyncio.Future[Delivery]) -> None:
        self.name = name
        self.future = future


class Settlement:
    """Where a delivery goes next."""

    __slots__ = ("decision", "delivery", "recorded", "uncertain")

    def __init__(self, delivery: Delivery, decision: Decision, recorded: Recorded) -> None:
        self.delivery = delivery
        self.decision = decision
        self.recorded = recorded
        self.uncertain = False


class Call:
    """Any other work in a transaction. What it raises as a GlassbusError is its answer."""

    __slots__ = ("future", "work")

    def __init__(self, work: Callable[[Transaction], Any], future: asyncio.Future[Any]) -> None:
        self.work = work
        self.future = future


class Flush:
    """To be answered when every settlement before it is recorded."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[None]) -> None:
        self.future = future


class Remember:
    """The publisher was cancelled after it handed `publish` over: its ids must be known from now on."""

    __slots__ = ("publish",)

    def __init__(self, publish: Publish) -> None:
        self.publish = publish


class Close:
    """Record what is settled, give back the rest, and let go of the store. Without a future nobody waits for it."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[int] | None) -> None:
        self.future = future


Request = Publish | Claim | Settlement | Call | Flush | Remember | Close


class Answers:
    """What one transaction leads to on the loop, in the order in which it is told."""

    __slots__ = ("broken", "claimed", "facts", "failed", "holds", "recorded", "results")

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self.holds: list[tuple[str, Hold]] = []
        self.recorded: list[tuple[Settlement, bool]] = []
        self.claimed: list[tuple[asyncio.Future[Delivery], Delivery]] = []
        self.results: list[tuple[asyncio.Future[Any], Any]] = []
        self.failed: list[tuple[asyncio.Future[Any], BaseException]] = []
        self.broken: BaseException | None = None

    def __bool__(self) -> bool:
        return bool(
            self.results
            or self.recorded
            or self.claimed
            or self.facts
            or self.failed
            or self.holds
            or self.broken is not None
        )
