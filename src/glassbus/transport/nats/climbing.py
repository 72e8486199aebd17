"""Full queues: who gives way, and by how much a queue grows. Decided on the state alone, so the same everywhere."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from glassbus.policy.delivery import PENDING, State
from glassbus.policy.overflow import Rung, Step, capacity_now, climb, left_out, may_grow_to

if TYPE_CHECKING:
    from glassbus.transport.nats.model import Book, Row

_COMPACT_MIN = 1000


class Line:
    """The pending deliveries of a queue by priority, the last in line first. Kept only while it is full."""

    __slots__ = ("_limit", "_ready", "_rows", "_size", "_timed")

    def __init__(self, rows: dict[int, Row], book: Book) -> None:
        self._rows = rows
        self._limit = 0
        self._gather([row for row in rows.values() if row.book is book and row.state in PENDING])

    def _gather(self, rows: Sequence[Row]) -> None:
        self._ready: tuple[list[tuple[int, int]], ...] = ([], [], [], [])
        self._timed: tuple[list[tuple[int, int]], ...] = ([], [], [], [])
        for row in rows:
            (self._ready if row.state is State.READY else self._timed)[row.priority].append((-row.d, row.version))
        for heap in (*self._ready, *self._timed):
            heapq.heapify(heap)
        self._size = len(rows)
        self._limit = 2 * len(rows) + _COMPACT_MIN

    def add(self, row: Row) -> None:
        heap = (self._ready if row.state is State.READY else self._timed)[row.priority]
        heapq.heappush(heap, (-row.d, row.version))
        self._size += 1
        if self._size > self._limit:
            slots = [slot for heap in (*self._ready, *self._timed) for slot in heap]
            self._gather([self._rows[-slot[0]] for slot in slots if self._holds(slot)])

    def _holds(self, slot: tuple[int, int]) -> bool:
        row = self._rows.get(-slot[0])
        return row is not None and row.version == slot[1]

    def last(self, below: int, wanted: int, *, strict_key: bool) -> list[Row]:
        """Up to `wanted` deliveries of priorities under `below`, the lowest first, then the newest.

        What waits for a retry or for its time comes after what is ready. With `strict_key` a
        delivery that was tried stays, because it holds its key.
        """
        found: list[Row] = []
        for priority in range(below):
            for heap in (self._ready[priority], self._timed[priority]):
                passed: list[tuple[int, int]] = []
                while heap and len(found) < wanted:
                    slot = heapq.heappop(heap)
                    if not self._holds(slot):
                        self._size -= 1
                        continue
                    passed.append(slot)
                    row = self._rows[-slot[0]]
                    if not (strict_key and row.key is not None and row.attempt):
                        found.append(row)
                for slot in passed:
                    heapq.heappush(heap, slot)
        return found


class Plan(NamedTuple):
    """What one publish leads to in one queue."""

    book: Book
    incoming: Sequence[int]  # priorities
    step: Step
    victims: list[Row]

    @property
    def left_out(self) -> set[int]:
        """Which of the incoming are dead-lettered instead, by their place among them."""
        return left_out(self.incoming, self.step.leave_out)

    @property
    def refused(self) -> bool:
        return self.step.rung is Rung.REFUSE

    def by(self) -> list[int]:
        """The priorities for which the victims give way, each beside its own."""
        return sorted(self.incoming)[len(self.incoming) - len(self.victims) :]


def capacity(book: Book, now: float) -> int:
    """Up to how many pending deliveries `book` admits at wall time `now`."""
    spec = book.spec
    return (
        capacity_now(spec.capacity, spec.overflow, book.expanded_until, now) if book.expanded_until else spec.capacity
    )


def plan(rows: dict[int, Row], book: Book, incoming: Sequence[int], now: float, *, may_grow: bool) -> Plan:
    """What to do for a publish that need not, or may not, wait for `book` any longer. Changes nothing."""
    overflow = book.spec.overflow
    room = capacity(book, now)
    able: list[Row] = []
    if overflow.displace and book.pending + len(incoming) > room and max(incoming) > 0:
        if book.line is None:
            book.line = Line(rows, book)
        able = book.line.last(max(incoming), len(incoming), strict_key=book.spec.strict_key)
    step = climb(
        pending=book.pending,
        incoming=incoming,
        capacity=room,
        expanded=may_grow_to(book.spec.capacity, overflow, book.expanded_until, allowed=may_grow),
        consumed=bool(book.consumers),
        lower=[row.priority for row in able],
    )
    return Plan(book, incoming, step, able[: step.displace])
