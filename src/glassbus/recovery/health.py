"""Is the bus well? Decided from what it counts, over a sliding window."""

from __future__ import annotations

from collections import deque
from enum import StrEnum

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
    """How the bus is. `ready`: it takes messages and hands them out. Rates are of the last 5 minutes."""

    status: HealthStatus
    ready: bool
    uptime_seconds: float
    success_rate: float
    messages_processed: int
    messages_failed: int
    errors_recovered: int
    checks: tuple[Check, ...]


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


def worst(checks: tuple[Check, ...]) -> HealthStatus:
    return max((check.status for check in checks), key=_WORSE.index, default=HealthStatus.UNKNOWN)
