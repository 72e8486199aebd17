"""The transport port: what keeps messages, and exactly what it promises.

A transport stores deliveries and hands them out. It decides nothing about
failures: the worker does, and tells it where each delivery goes next. The same
contract suite (`tests/contract/`) runs on every one; ADR 0004 maps each
operation onto SQLite, JetStream and RabbitMQ.

All methods belong to the bus's event loop unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import msgspec

from glassbus.config import Address, Credentials, Overflow
from glassbus.errors import ErrorReport
from glassbus.facts import Delivery, Fact
from glassbus.message import Envelope, Level
from glassbus.policy.delivery import Decision
from glassbus.policy.ledger import Audit, Ledger


class Features(msgspec.Struct, frozen=True):
    """What differs between transports, as data for the contract suite and for users.

    `ladder`: a full queue displaces and expands before it refuses, each as `policy.overflow` says.
    """

    durable: bool
    multi_process: bool
    level: Level
    order_with_key: bool = True
    priorities: bool = True
    delay: bool = True
    duplicates: bool = True
    reports_full: bool = True
    ladder: bool = False


class SubscriptionSpec(msgspec.Struct, frozen=True):
    """A subscription as it is stored. `capacity` bounds its pending deliveries; what more comes meets `overflow`."""

    name: str
    pattern: str
    capacity: int
    strict_key: bool = False
    overflow: Overflow = Overflow()


Forced = Literal["", "forced_open", "disabled"]


class Hold(msgspec.Struct, frozen=True):
    """What operators stored about a subscription; it holds for every process.

    While `paused`, or `forced` is "forced_open", claims of it wait.
    """

    paused: bool = False
    forced: Forced = ""

    @property
    def held(self) -> bool:
        return self.paused or self.forced == "forced_open"

    def changed(self, paused: bool | None, forced: Forced | None) -> Hold:
        """With the parts given; None leaves one as it is."""
        return Hold(self.paused if paused is None else paused, self.forced if forced is None else forced)


class Stored(msgspec.Struct, frozen=True):
    """The outcome of one publish: the queues it went to, or that the id was known.

    `spooled`: it is in a local spool for now, stored at this level; the queues are those last known.
    """

    subscriptions: tuple[str, ...]
    duplicate: bool = False
    spooled: Level | None = None


class QueueState(msgspec.Struct, frozen=True):
    """A subscription at this moment. Times are wall seconds; `oldest_at` is 0.0 when nothing waits.

    `expanded_to` is the capacity it has grown to for now, 0 when it has not; `expanded_until`, when that
    ends, stays until all that is pending fits into `spec.capacity` again (0.0: not expanded).
    """

    spec: SubscriptionSpec
    hold: Hold
    consumers: int
    oldest_at: float = 0.0
    dead_letter_oldest_at: float = 0.0
    expanded_to: int = 0
    expanded_until: float = 0.0

    @property
    def capacity(self) -> int:
        """Up to how many pending deliveries are admitted now."""
        return self.expanded_to or self.spec.capacity


class DeadLetterRecord(msgspec.Struct, frozen=True):
    """A delivery at rest in the dead-letter queue. `id` is unique in its store."""

    id: str
    envelope: Envelope
    subscription: str
    destination: str
    attempts: int
    report: ErrorReport
    reason: str
    died_at: float
    first_failed_at: float = 0.0
    replays: int = 0


class DeadLetterFilter(msgspec.Struct, frozen=True):
    """Which dead letters; None means any. Times are wall seconds. Newest first, `before` pages on.

    `exception_type` is the qualified name or the bare one.
    """

    subscription: str | None = None
    topic: str | None = None
    message_id: str | None = None
    category: str | None = None
    exception_type: str | None = None
    fingerprint: str | None = None
    since: float | None = None
    until: float | None = None
    before: str | None = None
    id: str | None = None


#: Told once, on the loop, whether the store took a settlement. False: the lease had
#: passed to another owner, so the decision is void.
Recorded = Callable[[Delivery, Decision, bool], None]


class Listener(Protocol):
    """What a transport tells the bus. Called on the loop; never raises."""

    def state(self, fact: Fact, /) -> None: ...
    def held(self, subscription: str, hold: Hold, /) -> None:
        """The stored hold of a subscription changed, here or in another process."""

    def broken(self, error: BaseException, /) -> None:
        """The store cannot go on (corrupt, or gone): the bus must stop."""


class Grows(Protocol):
    """What a transport may also be able to do: see `Features.ladder`."""

    #: Whether full queues may grow for publishers of this process. May be set on any thread.
    may_grow: bool


def let_grow(transport: object, allowed: bool) -> None:
    """Have `transport` take the rung "expand" of the overflow ladder, if it has one, or leave it out."""
    if hasattr(transport, "may_grow"):
        transport.may_grow = allowed


class HoldsBackLow(Protocol):
    """What a transport may be able to do besides."""

    def hold_back_low(self, name: str, held: bool, /) -> None:
        """Hand this process no LOW message of `name` from now on, or hand them out again. Does not block or raise."""


def hold_back_low(transport: object, name: str, held: bool) -> bool:
    """Have `transport` keep LOW messages of `name` waiting, or hand them out again; False when it cannot."""
    ask = getattr(transport, "hold_back_low", None)
    if ask is None:
        return False
    ask(name, held)
    return True


class Transport(Protocol):
    """Keeps messages. Every method that stores is atomic: all of it, or none."""

    features: Features
    #: Name and place without credentials, for logs and errors.
    address: str

    async def open(self, listener: Listener, /) -> None:
        """Make ready, creating or migrating the store and restoring what an earlier run left.

        Raises StoreCorrupt, StoreLocked, StoreReadOnly, StoreTooNew or TransportError.
        """

    async def close(self, deadline_s: float, /) -> tuple[int, int]:
        """Record settlements handed over, release what is held, and let go of the store.

        Returns (given back, discarded): deliveries kept for the next start, and those
        that went with the memory (each stated as DeliveryDiscarded). Idempotent.
        """

    async def declare(self, spec: SubscriptionSpec, /, *, consume: bool) -> Hold:
        """Create or update a subscription; it collects messages from now on. Idempotent.

        `consume`: this process takes deliveries of it from now on, until `close`.
        Returns the stored hold.
        """

    async def forget(self, name: str, /) -> int:
        """Remove a subscription and discard all it holds; how many. Raises UnknownSubscription."""

    async def publish(self, batch: Sequence[Envelope], /, wait_s: float) -> Sequence[Stored]:
        """Store each message for every subscription that wants it: the whole batch, or nothing.

        On return the batch is stored at `features.level`. A full queue makes it wait up to `wait_s`, the
        highest priority first (a batch has that of its highest message), then climb the ladder
        (`policy.overflow`), each rung stated. Raises PublishRejected (QueueFull, StorageFull, MessageConflict):
        certainly not stored; PublishUncertain: may be stored. When cancelled, the outcome
        is uncertain too, and the ids are remembered.
        """

    def publish_now(self, envelope: Envelope, /) -> Stored | None:
        """Store one message if that takes no waiting; None, and nothing done, when `publish` must."""

    def claim_now(self, name: str, /) -> Delivery | None:
        """Take the next delivery if that takes no waiting; None when `claim` must."""

    async def claim(self, name: str, /) -> Delivery:
        """Wait for the next delivery of `name` and take it, its attempt counted and stored.

        Order: due first attempts by priority turn, then by acceptance; one at a time for a
        key. When cancelled nothing is claimed, or what was is given back uncharged.
        """

    def handled_now(self, delivery: Delivery, /) -> bool:
        """Record that `delivery` was handled, if that takes no waiting; False, and nothing done, when `settle` must."""

    def settle(self, delivery: Delivery, decision: Decision, recorded: Recorded, /) -> None:
        """Hand over where `delivery` goes next. Does not block and does not raise.

        The transport keeps it through transient failures until it is stored, then calls
        `recorded` once on the loop (perhaps before this returns).
        """

    async def flush(self) -> None:
        """Return when every settlement handed over so far has been recorded."""

    async def set_hold(self, name: str, /, *, paused: bool | None = None, forced: Forced | None = None) -> Hold:
        """Change what is stored about `name` for every process; None leaves that part as it is.

        Returns what was stored before. Raises UnknownSubscription.
        """

    def ledger(self) -> Ledger:
        """The counts as stored. One short read; may be called on any thread."""

    def queues(self) -> dict[str, QueueState]:
        """Every stored subscription. One short read; may be called on any thread."""

    async def audit(self) -> Audit:
        """Recount everything against the ledger. Reads all of the store."""

    async def dead_letters(self, wanted: DeadLetterFilter, limit: int, /) -> list[DeadLetterRecord]: ...

    async def replay(self, ids: Sequence[str], /) -> list[DeadLetterRecord]:
        """Move dead letters back to ready with attempts 0 and replays + 1; they expire no more.

        Returns those moved. Raises UnknownDeadLetter, moving none, when one is unknown.
        """

    async def discard(self, ids: Sequence[str], /) -> list[DeadLetterRecord]:
        """Remove dead letters for good. Returns them. Raises UnknownDeadLetter, removing none."""

    async def probe(self) -> float:
        """A round trip to the store; seconds. Raises TransportError."""

    def disk_free_bytes(self) -> int | None:
        """Free space where messages are stored; None when there is no disk. May be called on any thread."""


@runtime_checkable
class Spools(Protocol):
    """What a transport with a local spool before it can say besides."""

    def spooled(self) -> int:
        """Messages that wait there to be forwarded. May be called on any thread."""


@runtime_checkable
class Spills(Protocol):
    """What a transport that holds its messages in memory can do besides. On the loop."""

    @property
    def spill_path(self) -> Path | None:
        """Where `close` saves what is left, and whence `open` restores it; None: nowhere."""

    def keep_in(self, path: Path, /) -> None:
        """Save to `path` from now on."""

    def held(self) -> list[Delivery | DeadLetterRecord]:
        """Everything that `close` would save now."""


@runtime_checkable
class Finds(Protocol):
    """What a transport that can look single messages up can do besides."""

    async def find(self, wanted: Sequence[tuple[str, str]], /) -> set[tuple[str, str]]:
        """Those of `wanted`, pairs of message id and subscription, that are pending, in flight or dead-lettered."""


class Located(msgspec.Struct, frozen=True):
    """One delivery of a message as the store has it now. Times are wall seconds, 0.0 for none.

    `state` is ready, scheduled, retrying, in_flight or dead_lettered; `due_at` is when one that waits for its time is
    ready. `attempt` counts those that were begun. `action` is that of the recovery under way. `redelivered`: why it is
    given again. `owner` names who has it in flight, and `owner_lives` whether that is so; None: it cannot be told.
    """

    subscription: str
    state: str
    attempt: int
    replays: int = 0
    due_at: float = 0.0
    expires_at: float = 0.0
    first_failed_at: float = 0.0
    action: str = ""
    waits_for_key: bool = False
    redelivered: str = ""
    owner: str = ""
    owner_lives: bool | None = None
    dead_letter: str = ""


class Whereabouts(msgspec.Struct, frozen=True):
    """Where a message is: each delivery that is not settled for good.

    It went to `fanout` subscriptions (0: nobody knows any more): `routed`, None where not all of them are known.
    """

    message_id: str
    topic: str
    published_at: float
    priority: int = 1
    key: str | None = None
    fanout: int = 0
    routed: tuple[str, ...] | None = None
    deliveries: tuple[Located, ...] = ()


@runtime_checkable
class Locates(Protocol):
    """What a transport that can tell where single messages are can do besides. Changes nothing."""

    async def locate(self, message_id: str, /) -> Whereabouts | None:
        """Where `message_id` is; None when the store has nothing of it."""

    async def ids_like(self, beginning: str, limit: int, /) -> list[str]:
        """Ids of messages in the store that begin so, at most `limit`, sorted."""


class Dialer(Protocol):
    """What the connection of a broker's transport offers to its supervisor. For the bus's loop.

    It never reconnects by itself: it tells `Supervisor.lost`, and waits to be dialled again.
    """

    async def dial(self, address: Address, credentials: Credentials | None, /) -> None:
        """Connect to `address` and make the transport ready on it; None: with the credentials of its URL.

        Bounded in time by itself. Raises EndpointUnreachable or EndpointRefused, which another try or
        another endpoint may mend, or another TransportError or ConfigurationError, which none will.
        """

    async def hang_up(self) -> None:
        """Let go of the connection, if there is one. Idempotent; nobody is told of a loss."""

    async def probe(self) -> float:
        """A round trip to the store; seconds. Raises TransportError."""


class Supervisor(Protocol):
    """What keeps a broker's transport connected: which endpoint, when, and what is stated of it."""

    async def start(self, dialer: Dialer, /) -> None:
        """Return once connected. Raises TransportError when that cannot be done in time."""

    def lost(self, error: BaseException, /) -> None:
        """The connection is gone. On the loop; may be called any number of times for one loss."""

    async def connected(self) -> None:
        """Wait until there is a connection."""

    def up(self) -> bool: ...

    async def stop(self) -> None:
        """Dial no more, and hang up. Idempotent."""


#: Makes the supervisor of a failover set; it states facts to the listener.
Supervise = Callable[[Sequence[Address], Listener], Supervisor]
