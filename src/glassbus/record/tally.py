"""Plain counts of what goes well, kept by the core and read by telemetry.

The happy path builds no fact: it adds to these integers. They only grow, one
thread (the bus's loop) writes them, and any thread may read them: a reader sees
each number as it was at some recent moment. Failures are not counted here; they
are facts.
"""

from __future__ import annotations

from bisect import bisect_left
from math import inf

#: Upper bounds in seconds for handlers and publishes: from well under a millisecond to a minute.
DURATION_BOUNDS: tuple[float, ...] = (
    0.00001, 0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
#: Upper bounds in seconds for the age of a message when it is settled: up to a day.
AGE_BOUNDS: tuple[float, ...] = (
    0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 14400.0, 86400.0,
)  # fmt: skip


class Buckets:
    """A histogram. `counts[i]` is of values in (bounds[i-1], bounds[i]]; the last is the rest, `total` the sum."""

    __slots__ = ("_above", "_place", "_up_to", "bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = DURATION_BOUNDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self._find(0.0)

    def observe(self, value: float) -> None:
        # One value is mostly like the one before it, and a look at its bucket takes a third of a search.
        if not self._above < value <= self._up_to:
            self._find(value)
        self.counts[self._place] += 1
        self.total += value

    def _find(self, value: float) -> None:
        bounds = self.bounds
        place = self._place = bisect_left(bounds, value)
        self._above = bounds[place - 1] if place else -inf
        self._up_to = bounds[place] if place < len(bounds) else inf

    @property
    def count(self) -> int:
        return sum(self.counts)


class Tally:
    """Deliveries of `destination` that `subscription` handled in this process.

    `handled` includes the late ones. `duration` is of the handler, in time;
    `late_duration` of those that returned after their timeout; `age` runs from publish to the recorded
    acknowledgement. All seconds. `deadline_s` gets a bucket of its own in `age`.
    """

    __slots__ = ("age", "destination", "duration", "handled", "late", "late_duration", "subscription")

    def __init__(self, subscription: str, destination: str, deadline_s: float = 0.0) -> None:
        self.subscription = subscription
        self.destination = destination
        self.handled = 0
        self.late = 0
        self.duration = Buckets()
        self.late_duration = Buckets()
        with_deadline = {*AGE_BOUNDS, deadline_s} if deadline_s > 0 else AGE_BOUNDS
        self.age = Buckets(tuple(sorted(with_deadline)))


class PublishTally:
    """Messages of `destination` that were accepted and wanted; `duration` is of the whole publish, in seconds."""

    __slots__ = ("accepted", "destination", "duration")

    def __init__(self, destination: str) -> None:
        self.destination = destination
        self.accepted = 0
        self.duration = Buckets()
