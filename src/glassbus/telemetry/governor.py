"""Keeps telemetry bounded: label values, and the spans of a flood of failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: The value that stands for all beyond the cap.
OTHER = "_other"
LABEL_VALUES_MAX = 200

_SITES_MAX = 1024


class LabelCap:
    """Lets the first `values_max` values of a label through; the rest become `_other`, counted. Thread-safe."""

    def __init__(self, values_max: int = LABEL_VALUES_MAX) -> None:
        self._values_max = values_max
        self._known: set[str] = {"", OTHER}
        #: Times that a value did not fit.
        self.overflowed = 0

    def bound(self, value: str) -> str:
        if value in self._known:
            return value
        if len(self._known) < self._values_max + 2:
            self._known.add(value)
            return value
        self.overflowed += 1
        return OTHER


class _Site:
    __slots__ = ("at", "first", "skipped", "tokens")

    def __init__(self, first: int, at: float) -> None:
        self.first = first
        self.tokens = 0.0
        self.at = at
        self.skipped = 0


class FloodBudget:
    """How many failures of one site get spans of their own: the first `first`, then `per_second`.

    What is beyond is only counted, and the next failure with spans carries the count.
    A site that rests for a minute gets its first ones again. Thread-safe; keeps 1,024 sites.
    """

    REST_S = 60.0

    def __init__(
        self, first: int = 5000, per_second: float = 200.0, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._first = first
        self._per_second = per_second
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._sites: dict[str, _Site] = {}

    def after_fork(self) -> None:
        """In the child: a thread that held the lock is not there to release it."""
        self._lock = threading.Lock()

    def admit(self, name: str) -> int:
        """-1 when this failure is only counted; else how many were, since the last that was not."""
        now = self._monotonic()
        with self._lock:
            site = self._sites.get(name)
            if site is None:
                site = self._sites[name] = _Site(self._first, now)
                if len(self._sites) > _SITES_MAX:
                    del self._sites[next(iter(self._sites))]
            elif now - site.at > self.REST_S:
                site.first = self._first
            rested_s, site.at = now - site.at, now
            if site.first > 0:
                site.first -= 1
            else:
                site.tokens = min(self._per_second, site.tokens + rested_s * self._per_second)
                if site.tokens < 1.0:
                    site.skipped += 1
                    return -1
                site.tokens -= 1.0
            skipped, site.skipped = site.skipped, 0
            return skipped
