"""What the store says about its subscriptions, cached between transactions.

The cache is right while no other connection commits, which `PRAGMA data_version`
tells; so inside a write transaction, once `refresh` has run, it is the truth.
Changes are made here first and written once, by `save`, in the same transaction.
"""

from __future__ import annotations

from typing import NamedTuple

import apsw
import msgspec

from glassbus.config import Overflow
from glassbus.errors import UnknownSubscription
from glassbus.message import Envelope
from glassbus.policy.priority import PriorityTurn
from glassbus.policy.routing import ByTopic, destination, matches
from glassbus.transport import Hold, Stored, SubscriptionSpec
from glassbus.transport.sqlite.schema import COUNTS
from glassbus.transport.sqlite.sql import select, value


class Queue:
    """One subscription: what is stored of it, and the turn of its priorities in this process."""

    __slots__ = (
        *COUNTS,
        "capacity",
        "consumers",
        "expanded_until",
        "hold",
        "id",
        "keyed",
        "name",
        "spec",
        "suspects",
        "turn",
    )

    def __init__(self, id: int, name: str) -> None:  # noqa: A002 - the column's name
        self.id = id
        self.name = name
        self.spec = SubscriptionSpec(name, ">", 0)
        self.hold = Hold()
        self.turn = PriorityTurn()
        self.consumers = 0
        self.capacity = 0  # how many pending deliveries are admitted in this transaction
        self.expanded_until = 0.0
        self.accepted = self.ready = self.scheduled = self.retrying = self.in_flight = 0
        self.handled = self.dead_lettered = self.expired = self.discarded = 0
        self.keyed = self.suspects = 0

    @property
    def pending(self) -> int:
        return self.ready + self.scheduled + self.retrying

    @property
    def claimable(self) -> int:
        """Ready deliveries that do not wait for their key."""
        return self.ready - self.keyed


class Route(NamedTuple):
    """Where the messages of one topic go."""

    queues: tuple[Queue, ...]
    destination: str
    stored: Stored
    alone: tuple[Stored]
    ids: str


class Owner(NamedTuple):
    """A process that has the store open."""

    id: int
    token: str
    boot_id: str
    lease_until: float


_LOAD = f"""
SELECT id, name, pattern, capacity, strict_key, displace, expand, expand_for, expanded_until, paused, forced,
  {", ".join(COUNTS)}, keyed, suspects
FROM subscriptions
"""  # noqa: S608 - constant names
_SAVE = f"UPDATE subscriptions SET {', '.join(f'{c} = ?' for c in COUNTS)}, keyed = ?, suspects = ? WHERE id = ?"  # noqa: S608


class Books:
    """Subscriptions, owners and counters. Belongs to the writer thread."""

    def __init__(self) -> None:
        self.queues: dict[str, Queue] = {}
        self.by_id: dict[int, Queue] = {}
        self.owners: dict[int, Owner] = {}
        self.changed_holds: dict[str, Hold] = {}
        self.dirty: set[Queue] = set()
        #: Subscriptions of which this process takes no LOW messages for now. Set by the loop, read by the writer.
        self.low_held_back: set[str] = set()
        self.expanded: set[Queue] = set()
        self.next_id = 1
        self.watermark = 0
        self.watermark_until = 0.0
        self._saved_id = 1
        self._generation = -1
        self._version = -1
        self._routes: ByTopic[Route] = ByTopic()

    def invalidate(self) -> None:
        """Forget that the cache is right: a transaction failed after changing it."""
        self._version = -1
        self._generation = -1
        self.dirty.clear()

    def stale(self, connection: apsw.Connection) -> bool:
        """Whether another connection has committed since the last `refresh`."""
        version: int = value(connection, "PRAGMA data_version")
        return version != self._version

    def refresh(self, connection: apsw.Connection) -> bool:
        """Read again what others changed; whether they did. In a transaction."""
        version: int = value(connection, "PRAGMA data_version")
        if version == self._version:
            return False
        meta = dict(select(connection, "SELECT key, value FROM meta"))
        self.next_id = self._saved_id = meta["next_id"]
        self.watermark, self.watermark_until = meta["watermark"], meta["watermark_until"]
        self._load_queues(connection)
        if meta["generation"] != self._generation:
            self._routes.clear()
        consumers = dict(select(connection, "SELECT subscription, count(*) FROM consumers GROUP BY subscription"))
        for queue in self.queues.values():
            queue.consumers = consumers.get(queue.id, 0)
        owners = select(connection, "SELECT id, token, boot_id, lease_until FROM owners")
        self.owners = {row[0]: Owner(*row) for row in owners}
        self._generation, self._version = meta["generation"], version
        return True

    def _load_queues(self, connection: apsw.Connection) -> None:
        before, self.queues, self.by_id = self.by_id, {}, {}
        self.expanded.clear()
        for row in select(connection, _LOAD):
            id_, name, pattern, capacity, strict_key, displace, expand, expand_for, until, paused, forced, *counts = row
            queue = before.get(id_) or Queue(id_, name)
            overflow = overflow_of(queue.spec.overflow, displace, expand, expand_for)
            queue.spec = SubscriptionSpec(name, pattern, capacity, bool(strict_key), overflow)
            queue.capacity, queue.expanded_until = capacity, until
            if until:
                self.expanded.add(queue)
            self._hold(queue, Hold(bool(paused), forced), known=id_ in before)
            for column, count in zip((*COUNTS, "keyed", "suspects"), counts, strict=True):
                setattr(queue, column, count)
            self.queues[name] = self.by_id[id_] = queue

    def _hold(self, queue: Queue, hold: Hold, *, known: bool) -> None:
        if known and hold != queue.hold:
            self.changed_holds[queue.name] = hold
        queue.hold = hold

    def restructured(self, connection: apsw.Connection) -> None:
        """Subscriptions were added, changed or removed in this transaction: read them anew, here and elsewhere."""
        self.save(connection)
        connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'generation'")
        self._version = -1
        self.refresh(connection)

    def save(self, connection: apsw.Connection) -> None:
        """Write the counts that changed. In the transaction that changed them."""
        for queue in self.dirty:
            values = [getattr(queue, column) for column in COUNTS]
            connection.execute(_SAVE, (*values, queue.keyed, queue.suspects, queue.id))
        self.dirty.clear()
        if self.next_id != self._saved_id:
            connection.execute("UPDATE meta SET value = ? WHERE key = 'next_id'", (self.next_id,))
            self._saved_id = self.next_id

    def need(self, name: str) -> Queue:
        """The subscription called `name`. Raises UnknownSubscription."""
        try:
            return self.queues[name]
        except KeyError:
            raise UnknownSubscription(f"no subscription {name!r}; known are {sorted(self.queues)}") from None

    def route(self, topic: str) -> Route:
        found = self._routes.get(topic)
        if found is None:
            queues = tuple(q for q in self.queues.values() if matches(q.spec.pattern, topic))
            label = destination(topic, (q.spec.pattern for q in queues))
            stored = Stored(tuple(q.name for q in queues))
            found = Route(queues, label, stored, (stored,), ",".join(str(q.id) for q in queues))
            return self._routes.keep(topic, found, (label, stored.subscriptions))
        return found

    def names(self, ids: str | None) -> tuple[str, ...]:
        """The names of the subscriptions in a stored list of ids; forgotten ones are left out."""
        found = (self.by_id.get(int(i)) for i in (ids or "").split(",") if i)
        return tuple(queue.name for queue in found if queue is not None)

    def watermarked(self, now: float) -> int:
        """Messages up to this one are remembered when they end, because an owner died; 0: none."""
        return self.watermark if now < self.watermark_until else 0


def overflow_of(known: Overflow, displace: int, expand: float, expand_for: float) -> Overflow:
    """The options that are stored; `known` if they are those."""
    if (known.displace, known.expand, known.expand_for) == (displace, expand, expand_for):
        return known
    return Overflow(bool(displace), expand, expand_for)


# Neither kind can be part of a reference cycle, so the collector need not look at them.
class Held(msgspec.Struct, eq=False, gc=False):
    """A delivery in flight in this process: what it takes to settle it."""

    id: int
    seq: int
    queue: Queue
    owner: int
    attempt: int
    key: str | None
    suspect: int
    remember: bool


class Fresh(msgspec.Struct, eq=False, gc=False):
    """A delivery that this transaction adds, before it is written."""

    id: int
    seq: int
    envelope: Envelope
    queue: Queue
    route: Route
    state: int = 0
    lane: int = 0
    attempt: int = 0
    owner: int | None = None
    due: float | None = None
