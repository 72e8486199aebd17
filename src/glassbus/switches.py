"""The breakers of a bus, for operators."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Protocol

from glassbus.errors import UnknownSubscription
from glassbus.policy.breaker import BreakerState
from glassbus.transport import Forced
from glassbus.worker import Worker


class StoreHold(Protocol):
    def __call__(
        self, subscription: str, *, paused: bool | None = None, forced: Forced | None = None
    ) -> asyncio.Future[None]: ...


class KillSwitchHandle:
    """One subscription's kill switch. Forced states are stored and hold for every process."""

    def __init__(self, worker: Worker, hold: StoreHold) -> None:
        self._worker = worker
        self._hold = hold

    @property
    def state(self) -> BreakerState:
        return self._worker.gate.breaker.state

    def force_open(self) -> asyncio.Future[None]:
        """Stop handing out messages until `reset`. Awaiting the result waits until that is stored."""
        return self._hold(self._worker.name, forced="forced_open")

    def disable(self) -> asyncio.Future[None]:
        """Forced closed: never trips, until `reset`."""
        return self._hold(self._worker.name, forced="disabled")

    def reset(self) -> asyncio.Future[None]:
        """Closed and automatic again, with nothing counted."""
        self._worker.gate.reset()
        return self._hold(self._worker.name, forced="")


class Breakers(Mapping[str, KillSwitchHandle]):
    """Kill switches by the name of their subscription, for those that this bus runs."""

    def __init__(self, workers: Mapping[str, Worker], hold: StoreHold) -> None:
        self._workers = workers
        self._store_hold = hold

    def __getitem__(self, subscription: str) -> KillSwitchHandle:
        worker = self._workers.get(subscription)
        if worker is None:
            raise UnknownSubscription(f"this bus runs no subscription {subscription!r}")
        return KillSwitchHandle(worker, self._store_hold)

    def __iter__(self) -> Iterator[str]:
        return iter(self._workers)

    def __len__(self) -> int:
        return len(self._workers)
