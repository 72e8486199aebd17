"""What a benchmark is made of: groups of rows, each measured once a round."""

from __future__ import annotations

import asyncio
import importlib
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: About 300 bytes as JSON, the size that the targets were set with.
PAYLOAD: dict[str, Any] = {
    "order_id": 1_729_000_017,
    "customer": "c-58f2a6d1-3b7e-4a64-9c55-0d7a1b2e8f90",
    "currency": "EUR",
    "total": 129.95,
    "items": [
        {"sku": "A-1001", "quantity": 2, "price": 24.99},
        {"sku": "B-2002", "quantity": 1, "price": 79.97},
    ],
    "address": {"street": "1 Example Street", "city": "Springfield", "postcode": "12345"},
    "tags": ["web", "first-order"],
}
TOPIC = "orders.created"

#: Messages published before the publisher waits for all of them to be handled.
BURST = 500


class NotInstalled(Exception):
    """A peer cannot be imported; its row says so."""


class Wrong(Exception):
    """A row did not do its work: messages lost, doubled, or not traced."""


def peer(module: str) -> Any:
    """The peer's module. Raises NotInstalled."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotInstalled(f"{module}: {error}") from error


@dataclass(frozen=True)
class Sample:
    """One row in one round. `value` is in the group's unit, `more` by column name."""

    value: float
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """How much to do. `scale` multiplies every row's number of messages; files go below `folder`."""

    scale: float
    folder: Path

    def count(self, full: int, step: int = 1) -> int:
        """`full` scaled, a multiple of `step`, at least one step."""
        return max(1, round(full * self.scale / step)) * step


@dataclass(frozen=True)
class Row:
    """One way to do the group's work. `measure` sets up, runs, checks, and tears down."""

    name: str
    measure: Callable[[Run], Sample]
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Rows that do the same work. `floor` names the row that ratios are taken to."""

    key: str
    title: str
    unit: str
    floor: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...] = ()


class Tally:
    """Counts handled messages, and wakes the publisher when all of a burst are handled."""

    __slots__ = ("_done", "_thread_done", "count", "target")

    def __init__(self, *, threads: bool = False) -> None:
        self.count = 0
        self.target = 0
        self._done = asyncio.Event()
        self._thread_done = threading.Event() if threads else None

    def hit(self) -> None:
        self.count += 1
        if self.count == self.target:
            if self._thread_done is not None:
                self._thread_done.set()
            else:
                self._done.set()

    def expect(self, more: int) -> None:
        self.target += more
        self._done.clear()
        if self._thread_done is not None:
            self._thread_done.clear()

    async def wait(self, seconds: float = 60.0) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._done.wait()
        except TimeoutError:
            raise Wrong(f"{self.target - self.count} of {self.target} messages not handled") from None

    def wait_thread(self, seconds: float = 60.0) -> None:
        if self._thread_done is None or not self._thread_done.wait(seconds):
            raise Wrong(f"{self.target - self.count} of {self.target} messages not handled")

    def check(self, total: int) -> None:
        """Raises Wrong unless exactly `total` messages were handled."""
        if self.count != total:
            raise Wrong(f"{self.count} messages handled, {total} published")


class Stopwatch:
    """Wall and CPU time (all threads) of a block."""

    def __enter__(self) -> Stopwatch:
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s = time.perf_counter() - self._wall
        self.cpu_s = time.process_time() - self._cpu

    def throughput(self, messages: int) -> Sample:
        return Sample(messages / self.wall_s, {"CPU us/msg": self.cpu_s / messages * 1e6})


async def bursts(total: int, tally: Tally, send: Callable[[int], Awaitable[None]], burst: int = BURST) -> Sample:
    """Throughput of `total` messages, given to `send` a burst at a time, each burst waited for."""
    with Stopwatch() as watch:
        for start in range(0, total, burst):
            size = min(burst, total - start)
            tally.expect(size)
            await send(size)
            await tally.wait()
    tally.check(total)
    return watch.throughput(total)


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of `values` lie (nearest rank)."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]
