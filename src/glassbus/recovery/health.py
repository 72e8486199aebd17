"""Is the bus well? Decided from what it counts, over a sliding window."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import msgspec

#: Success rate is taken over this many seconds.
WINDOW_S = 300.0
HEALTHY_ABOVE = 0.95
DEGRADED_ABOVE = 0.8


class HealthStatus(StrEnum):
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    CRITICAL = "critical"
    UNKNOWN = "unknown"


_WORSE = (HealthStatus.HEALTHY, HealthStatus.UNKNOWN, HealthStatus.DEGRADED, HealthStatus.CRITICAL)


class Check(msgspec.Struct, frozen=True):
    """One question asked, its answer, and a sentence for people."""

    name: str
    status: HealthStatus
    detail: str


class Health(msgspec.Struct, frozen=True):
    """How the bus is. `ready`: it takes messages and hands them out. Rates are of the last 5 minutes.

    `round_trip_age_seconds`: since the store last answered, None before it ever did. `active_connections` are those
    to brokers that are up, or 1 for an embedded store that answers; `active_queues` the subscriptions that this process
    runs; `circuit_breaker_status` the state of each breaker by its name.
    """

    status: HealthStatus
    ready: bool
    uptime_seconds: float
    success_rate: float
    messages_processed: int
    messages_failed: int
    errors_recovered: int
    checks: tuple[Check, ...]
    round_trip_age_seconds: float | None = None
    active_connections: int = 0
    active_queues: int = 0
    circuit_breaker_status: dict[str, str] = {}
    #: Yields `error_statistics`, which takes longer than all the rest.
    ask_statistics: Callable[[], dict[str, Any]] = dict

    @property
    def error_statistics(self) -> dict[str, Any]:
        """What the journal counted, as of now; see `Journal.statistics`."""
        return self.ask_statistics()

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-ready values."""
        return {
            "status": self.status.value,
            "ready": self.ready,
            "uptime_seconds": self.uptime_seconds,
            "messages_processed": self.messages_processed,
            "messages_failed": self.messages_failed,
            "success_rate": self.success_rate,
            "errors_recovered": self.errors_recovered,
            "round_trip_age_seconds": self.round_trip_age_seconds,
            "active_connections": self.active_connections,
            "active_queues": self.active_queues,
            "error_statistics": self.error_statistics,
            "circuit_breaker_status": dict(self.circuit_breaker_status),
            "checks": {c.name: {"status": c.status.value, "detail": c.detail} for c in self.checks},
        }


class SuccessWindow:
    """Handled and settled deliveries over the last `WINDOW_S`, from totals sampled about once a second."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, int]] = deque()

    def sample(self, now: float, handled: int, settled: int) -> None:
        self._samples.append((now, handled, settled))
        while len(self._samples) > 1 and self._samples[1][0] <= now - WINDOW_S:
            self._samples.popleft()

    def rate(self, now: float, handled: int, settled: int) -> float:
        """Handled over settled within the window; 1.0 without traffic."""
        while len(self._samples) > 1 and self._samples[1][0] <= now - WINDOW_S:
            self._samples.popleft()
        _, handled_then, settled_then = self._samples[0] if self._samples else (0.0, 0, 0)
        settled_since = settled - settled_then
        return (handled - handled_then) / settled_since if settled_since > 0 else 1.0


def by_rate(rate: float) -> HealthStatus:
    if rate > HEALTHY_ABOVE:
        return HealthStatus.HEALTHY
    return HealthStatus.DEGRADED if rate > DEGRADED_ABOVE else HealthStatus.CRITICAL


def deciding(checks: tuple[Check, ...]) -> str:
    """The checks that make it what it is, for people; of all that are healthy, none."""
    status = worst(checks)
    if status is HealthStatus.HEALTHY:
        return "all checks are healthy"
    return "; ".join(f"{check.name}: {check.detail}" for check in checks if check.status is status)[:500]


def worst(checks: tuple[Check, ...]) -> HealthStatus:
    return max((check.status for check in checks), key=_WORSE.index, default=HealthStatus.UNKNOWN)
