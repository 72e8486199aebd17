"""What this process makes of the state: what is due by its own clocks, and which delivery it would claim next."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from enum import IntEnum
from typing import Any

from glassbus.clock import Clock
from glassbus.message import Priority
from glassbus.policy.delivery import State
from glassbus.policy.ledger import Account
from glassbus.policy.priority import PriorityTurn
from glassbus.transport.nats.model import Book, Row
from glassbus.transport.nats.state import Fold

NEVER = float("inf")
#: What expires within this many seconds is expired together; a claim never hands it out, to the moment.
EXPIRY_GROUP_S = 0.05
#: How much of the messages that wait is kept at hand; what is beyond it is read from the stream when it is claimed.
AT_HAND_BYTES = 64 * 1024 * 1024
_ROW_BYTES = 200
_COMPACT_MIN = 1000


class Place(IntEnum):
    """Where this process has a delivery. KEYED waits for its key; TAKEN is asked for in an entry under way."""

    NOWHERE = 0
    READY = 1
    KEYED = 2
    SUSPECT = 3
    SCHEDULED = 4
    RETRYING = 5
    TAKEN = 6


_READY = frozenset({Place.READY})
_ANYWHERE = frozenset(Place) - {Place.NOWHERE}
_UNDATED = _ANYWHERE - {Place.SCHEDULED}


class Slots:
    """Deliveries by a sort key, first ones first. One that has moved on since it was put in is passed over."""

    __slots__ = ("_limit", "_places", "_rows", "_slots")

    def __init__(self, rows: dict[int, Row], places: frozenset[Place]) -> None:
        self._rows = rows
        self._places = places
        self._slots: list[tuple[Any, int, int]] = []
        self._limit = _COMPACT_MIN

    def _holds(self, slot: tuple[Any, int, int]) -> bool:
        row = self._rows.get(slot[1])
        return row is not None and row.version == slot[2] and row.place in self._places

    def push(self, by: Any, row: Row) -> None:
        heapq.heappush(self._slots, (by, row.d, row.version))
        if len(self._slots) > self._limit:  # a head that stays would let what is passed over pile up behind it
            self._slots = [slot for slot in self._slots if self._holds(slot)]
            heapq.heapify(self._slots)
            self._limit = 2 * len(self._slots) + _COMPACT_MIN

    def first(self) -> Any:
        """The sort key of the first one, NEVER when there is none."""
        slots = self._slots
        while slots:
            if self._holds(slots[0]):
                return slots[0][0]
            heapq.heappop(slots)
        return NEVER

    def peek(self) -> Row | None:
        return None if self.first() is NEVER else self._rows[self._slots[0][1]]

    def pop(self) -> Row | None:
        found = self.peek()
        if found is not None:
            heapq.heappop(self._slots)
        return found


class Lanes:
    """What waits in one subscription, in the order in which this process would take it."""

    __slots__ = ("keyed", "oldest", "ready", "retrying", "scheduled", "suspects", "suspects_waiting", "turn", "waiting")

    def __init__(self, rows: dict[int, Row]) -> None:
        self.ready = tuple(Slots(rows, _READY) for _ in range(4))
        self.suspects = Slots(rows, frozenset({Place.SUSPECT}))
        self.keyed: dict[str, Slots] = {}
        self.oldest = Slots(rows, _UNDATED)
        self.turn = PriorityTurn()
        self.waiting = 0  # READY and SUSPECT: what a claim may find
        self.suspects_waiting = 0
        self.scheduled = 0
        self.retrying = 0


class View:
    """A fold and what this process makes of it. `woken`: subscriptions that may have something to give."""

    def __init__(self, clock: Clock, on_held: Callable[[Book], None]) -> None:
        self.fold = Fold(self)
        #: Whether entries are read as they come; while catching up, delays began in the past.
        self.live = False
        self.woken: set[Book] = set()
        #: Changes with subscriptions, their capacity and their consumers.
        self.generation = 0
        self._at_hand = 0
        self._clock = clock
        self._on_held = on_held
        rows = self.fold.rows
        self._retries = Slots(rows, frozenset({Place.RETRYING}))
        self._scheduled = Slots(rows, frozenset({Place.SCHEDULED}))
        self._expiring = Slots(rows, _ANYWHERE - {Place.TAKEN})

    # Told by the fold

    def moved(self, row: Row, /) -> None:
        lanes = self.lanes(row.book)
        was = row.place
        self._leave(row, lanes)
        if was == Place.NOWHERE and row.version == 0:
            self._keep_at_hand(row)
        match row.state:
            case State.READY:
                self._ready(row, lanes)
            case State.SCHEDULED:
                row.place = Place.SCHEDULED
                lanes.scheduled += 1
                self._scheduled.push(row.due_at, row)
            case State.RETRYING:
                row.place = Place.RETRYING
                lanes.retrying += 1
                self._retries.push(self._clock.monotonic() + self._rest_of_delay(row), row)
            case state:
                row.place = Place.NOWHERE
                if state is State.DEAD_LETTERED and row.attempt:  # it may rest there for long
                    self._let_go(row)
                    row.content = None
        if row.place:
            if row.expires_at:
                self._expiring.push(row.expires_at, row)
            if row.place != Place.SCHEDULED:
                lanes.oldest.push(row.published_at, row)
        if was == Place.NOWHERE or row.state is not State.IN_FLIGHT:
            self._free_key(row, lanes)

    def gone(self, row: Row, /) -> None:
        lanes = self.lanes(row.book)
        self._leave(row, lanes)
        row.place = Place.NOWHERE
        self._let_go(row)
        self._free_key(row, lanes)

    def held(self, book: Book, /) -> None:
        self.woken.add(book)
        self._on_held(book)

    def structured(self) -> None:
        self.generation += 1

    def lanes(self, book: Book) -> Lanes:
        if book.lanes is None:
            book.lanes = Lanes(self.fold.rows)
        lanes: Lanes = book.lanes
        return lanes

    def _rest_of_delay(self, row: Row) -> float:
        if self.live:
            return row.delay_s
        return max(0.0, min(row.delay_s, row.moved_at + row.delay_s - self._clock.wall()))

    def _keep_at_hand(self, row: Row) -> None:
        if row.content is None:
            return
        size = len(row.content.body) + _ROW_BYTES
        if self._at_hand + size > AT_HAND_BYTES:
            row.content = None
        else:
            self._at_hand += size
            row.kept = True

    def _let_go(self, row: Row) -> None:
        if row.kept and row.content is not None:
            row.kept = False
            self._at_hand -= len(row.content.body) + _ROW_BYTES

    # Places

    def _ready(self, row: Row, lanes: Lanes) -> None:
        lanes.waiting += 1
        if row.suspect:
            row.place = Place.SUSPECT
            lanes.suspects_waiting += 1
            lanes.suspects.push(-row.priority, row)
        else:
            row.place = Place.READY
            lanes.ready[row.priority].push(row.position, row)
        self.woken.add(row.book)

    @staticmethod
    def _leave(row: Row, lanes: Lanes) -> None:
        match row.place:
            case Place.READY:
                lanes.waiting -= 1
            case Place.SUSPECT:
                lanes.waiting -= 1
                lanes.suspects_waiting -= 1
            case Place.SCHEDULED:
                lanes.scheduled -= 1
            case Place.RETRYING:
                lanes.retrying -= 1

    def _free_key(self, row: Row, lanes: Lanes) -> None:
        """If the key of `row` is free, who waits for it first is ready."""
        if row.key is None or not lanes.keyed:
            return
        waiting = lanes.keyed.get(row.key)
        if waiting is None:
            return
        found = waiting.peek()
        if found is None:
            del lanes.keyed[row.key]
        elif not self.fold.key_is_busy(found):
            waiting.pop()
            self._ready(found, lanes)

    def _wait_for_key(self, row: Row, lanes: Lanes) -> None:
        assert row.key is not None
        row.place = Place.KEYED
        waiting = lanes.keyed.get(row.key)
        if waiting is None:
            waiting = lanes.keyed[row.key] = Slots(self.fold.rows, frozenset({Place.KEYED}))
        waiting.push((-row.priority, row.position), row)

    # Claiming

    def take(
        self, book: Book, wanted: int, running: list[Row], overdue: list[Row], least: int = Priority.LOW
    ) -> list[Row]:
        """Up to `wanted` deliveries to ask for, each in its turn; they are TAKEN until they move or are put back.

        `running` are those in flight in this process. What has expired is added to `overdue`. What is of a priority
        lower than `least` is left. None means that none is to be had: nobody asks again before something has changed.
        """
        lanes = self.lanes(book)
        if not lanes.waiting or book.hold.held:
            return []
        if any(row.suspect and row.book is book for row in running):
            return []
        if lanes.suspects_waiting:
            # After an owner died its deliveries run one at a time, and nothing of the same subscription beside them.
            if any(row.suspect or row.book is book for row in running):
                return []
            found = self._next(lanes, lanes.suspects, set(), overdue)
            if found is not None:
                return [found]
            # All of them have expired or wait for their keys, and that keeps nobody else waiting.
        taken: list[Row] = []
        keys: set[str] = set()
        while len(taken) < wanted:
            found = None
            for priority in lanes.turn.order():
                if priority < least:
                    continue
                found = self._next(lanes, lanes.ready[priority], keys, overdue)
                if found is not None:
                    break
            if found is None:
                break
            taken.append(found)
        return taken

    def _next(self, lanes: Lanes, lane: Slots, keys: set[str], overdue: list[Row]) -> Row | None:
        wall = self._clock.wall()
        while (row := lane.pop()) is not None:
            self._leave(row, lanes)
            row.place = Place.TAKEN
            if 0 < row.expires_at <= wall:
                overdue.append(row)
                continue
            if row.key is not None:
                if row.key in keys or self.fold.key_is_busy(row):
                    self._wait_for_key(row, lanes)
                    continue
                keys.add(row.key)
            return row
        return None

    def put_back(self, row: Row) -> None:
        """A delivery that was TAKEN to claim it was not had: it is ready again."""
        if row.place == Place.TAKEN and self.fold.rows.get(row.d) is row:
            row.place = Place.NOWHERE
            lanes = self.lanes(row.book)
            self._ready(row, lanes)
            self._free_key(row, lanes)  # it may be held back from now on, and then the next of its key must not wait

    def put_back_overdue(self, row: Row) -> None:
        """A delivery that was TAKEN to expire it is there yet."""
        if row.place == Place.TAKEN and self.fold.rows.get(row.d) is row:
            self.moved(row)

    # Time

    def next_due(self) -> tuple[float, float]:
        """When something is due next, by the monotonic clock and by the wall clock; NEVER for nothing."""
        return self._retries.first(), min(self._scheduled.first(), self._expiring.first() + EXPIRY_GROUP_S)

    def promote(self) -> None:
        """Make ready what is due."""
        monotonic, wall = self._clock.monotonic(), self._clock.wall()
        while self._retries.first() <= monotonic and (row := self._retries.pop()) is not None:
            # To the back: in an outage the probes then go round, and no message spends its attempts alone.
            row.position = self.fold.next_row
            self._promoted(row)
        while self._scheduled.first() <= wall and (row := self._scheduled.pop()) is not None:
            lanes = self._promoted(row)
            lanes.oldest.push(row.published_at, row)

    def _promoted(self, row: Row) -> Lanes:
        lanes = self.lanes(row.book)
        self._leave(row, lanes)
        self._ready(row, lanes)
        return lanes

    def overdue(self) -> list[Row]:
        """What has waited past its expiry; TAKEN from now on."""
        wall, found = self._clock.wall(), []
        while self._expiring.first() <= wall and (row := self._expiring.pop()) is not None:
            self._leave(row, self.lanes(row.book))
            row.place = Place.TAKEN
            found.append(row)
        return found

    # Looking

    def account(self, book: Book) -> Account:
        lanes = self.lanes(book)
        return Account(
            accepted=book.accepted,
            ready=book.pending - lanes.scheduled - lanes.retrying,
            scheduled=lanes.scheduled,
            retrying=lanes.retrying,
            in_flight=book.in_flight,
            handled=book.handled,
            dead_lettered=len(book.dead),
            expired=book.expired,
            discarded=book.discarded,
        )

    def oldest_at(self, book: Book) -> float:
        """When the oldest message was published that waits, for a consumer or for its retry."""
        at: float = self.lanes(book).oldest.first()
        return 0.0 if at == NEVER else at
