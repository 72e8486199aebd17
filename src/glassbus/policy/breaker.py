"""Circuit breakers as a table and two rules for tripping.

    closed --tripped--> open --timer--> half_open --probes succeed--> closed
                          ^                 |
                          +--a probe fails--+
    any --force_open--> forced_open --reset--> closed
    any --disable-----> disabled    --reset--> closed

Pure but for one lock around the breaker's own state, which is never held during
a guarded call.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

import msgspec

from glassbus.errors import ConfigurationError


class BreakerState(StrEnum):
    """Where a breaker stands. Compares equal to its name in any case (`'CLOSED'`).

    It hashes as the text in lower case, so a dict or set whose keys are upper-case names does not find it:
    look its `name` up there (`{'OPEN': 1}[state.name]`).
    """

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    DISABLED = "disabled"

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other.lower()) if isinstance(other, str) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


_B = BreakerState

LEGAL: dict[BreakerState, frozenset[BreakerState]] = {
    _B.CLOSED: frozenset({_B.OPEN, _B.FORCED_OPEN, _B.DISABLED}),
    _B.OPEN: frozenset({_B.HALF_OPEN, _B.CLOSED, _B.FORCED_OPEN, _B.DISABLED}),
    _B.HALF_OPEN: frozenset({_B.OPEN, _B.CLOSED, _B.FORCED_OPEN, _B.DISABLED}),
    _B.FORCED_OPEN: frozenset({_B.CLOSED, _B.DISABLED}),
    _B.DISABLED: frozenset({_B.CLOSED, _B.FORCED_OPEN}),
}

Cause = TypeVar("Cause")


class Transition(msgspec.Struct, Generic[Cause], frozen=True):
    """One move of a breaker, and the failures that counted (newest last)."""

    from_state: BreakerState
    to_state: BreakerState
    reason: str
    causes: tuple[Cause, ...] = ()


class TripRule(Protocol[Cause]):
    """Decides when a closed breaker opens."""

    def succeeded(self, key: Hashable, now: float, count: int = 1, /) -> None: ...
    def failed(self, key: Hashable, cause: Cause, now: float, /) -> None: ...
    def tripped(self, now: float, /) -> str:
        """Why the breaker must open now; empty while it must not."""

    def causes(self) -> tuple[Cause, ...]: ...
    def reset(self) -> None: ...


class ConsecutiveFailures(Generic[Cause]):
    """Trips after `threshold` failures in a row."""

    def __init__(self, threshold: int = 5) -> None:
        if threshold < 1:
            raise ConfigurationError(f"failure_threshold must be at least 1, not {threshold}")
        self.threshold = threshold
        self.count = 0
        self._causes: deque[Cause] = deque(maxlen=16)

    def succeeded(self, key: Hashable, now: float, count: int = 1, /) -> None:
        self.reset()

    def failed(self, key: Hashable, cause: Cause, now: float, /) -> None:
        self.count += 1
        self._causes.append(cause)

    def tripped(self, now: float, /) -> str:
        return f"{self.count} failures in a row" if self.count >= self.threshold else ""

    def causes(self) -> tuple[Cause, ...]:
        return tuple(self._causes)

    def reset(self) -> None:
        self.count = 0
        self._causes.clear()


class DistinctFailures(Generic[Cause]):
    """Trips when enough *distinct* deliveries fail: at least `minimum` seen within `window_s`
    seconds, at least `ratio` of them failing at their latest attempt.

    Retries of one delivery count once, so a poison message pauses nobody. Successes
    are counted in slices of a sixtieth of the window; only failing deliveries are kept
    one by one, and at most `FAILING_MAX` of them.
    """

    FAILING_MAX = 4096
    SLICES = 60

    def __init__(self, window_s: float = 60.0, minimum: int = 20, ratio: float = 0.5) -> None:
        self.window_s = window_s
        self.minimum = minimum
        self.ratio = ratio
        self._slice_s = window_s / self.SLICES
        self._slices: deque[list[float]] = deque()  # [start, successes]
        self._successes = 0.0  # their sum
        self._failing: dict[Hashable, tuple[float, Cause]] = {}
        self._lapse_at = 0.0  # nothing leaves the window before then

    def succeeded(self, key: Hashable, now: float, count: int = 1, /) -> None:
        if self._failing:
            self._failing.pop(key, None)
        self._successes += count
        if self._slices and now < self._slices[-1][0] + self._slice_s:
            self._slices[-1][1] += count
        else:
            self._slices.append([now, count])
            self._forget(now)

    def failed(self, key: Hashable, cause: Cause, now: float, /) -> None:
        failing = self._failing
        if key in failing:
            del failing[key]  # re-inserted last, so that the dict stays in order of time
        failing[key] = (now, cause)
        if len(failing) > self.FAILING_MAX:
            del failing[next(iter(failing))]
        if now + self.window_s < self._lapse_at:
            self._lapse_at = now + self.window_s
        elif now >= self._lapse_at:
            self._forget(now)

    def _forget(self, now: float) -> None:
        self._lapse_at = now + self.window_s
        while self._slices:
            lapses_at = self._slices[0][0] + self._slice_s + self.window_s
            if lapses_at > now:
                self._lapse_at = min(self._lapse_at, lapses_at)
                break
            self._successes -= self._slices.popleft()[1]
        while self._failing:
            oldest = next(iter(self._failing))
            lapses_at = self._failing[oldest][0] + self.window_s
            if lapses_at > now:
                self._lapse_at = min(self._lapse_at, lapses_at)
                break
            del self._failing[oldest]

    def tripped(self, now: float, /) -> str:
        if now >= self._lapse_at:
            self._forget(now)
        failing = len(self._failing)
        seen = failing + int(self._successes)
        if seen >= self.minimum and failing >= self.ratio * seen:
            return f"{failing} of {seen} deliveries failing within {self.window_s:g} s"
        return ""

    def causes(self) -> tuple[Cause, ...]:
        return tuple(cause for _, cause in list(self._failing.values())[-32:])

    def reset(self) -> None:
        self._slices.clear()
        self._successes = 0.0
        self._failing.clear()


class Breaker(Generic[Cause]):
    """The state machine. Every method is atomic and returns the transition it made, if any.

    `open_for_s` is the wait before half-open; `probes` the calls admitted there, all of
    which must succeed. A probe's permit lapses after `probe_timeout_s`, so that a
    probe that never reports cannot hold the breaker half-open for ever. The result of a probe
    whose half-open period is over is not counted. `generation` is the number of transitions so far.
    """

    def __init__(
        self, rule: TripRule[Cause], *, open_for_s: float, probes: int = 1, probe_timeout_s: float = 60.0
    ) -> None:
        if not open_for_s >= 0 or probes < 1 or not probe_timeout_s > 0:
            raise ConfigurationError("a breaker needs open_for_s >= 0, probes >= 1 and probe_timeout_s > 0")
        self.rule = rule
        self.open_for_s = open_for_s
        self.probes = probes
        self.probe_timeout_s = probe_timeout_s
        self._lock = threading.Lock()
        self.state = BreakerState.CLOSED
        self.generation = 0
        self.opened_at = 0.0
        self._permits: dict[int, float] = {}
        self._next_permit = 0
        self._succeeded = 0

    def admit(self, now: float) -> int | None:
        """A permit to make one call now, or None when the breaker refuses.

        Give the permit to `succeeded`, `failed` or `release`. Outside half-open it is 0.
        """
        with self._lock:
            if self.state in (BreakerState.CLOSED, BreakerState.DISABLED):
                return 0
            if self.state is not BreakerState.HALF_OPEN:
                return None
            for permit in [p for p, until in self._permits.items() if until <= now]:
                del self._permits[permit]
            if len(self._permits) + self._succeeded >= self.probes:
                return None
            self._next_permit += 1
            self._permits[self._next_permit] = now + self.probe_timeout_s
            return self._next_permit

    def has_permits(self, now: float) -> bool:
        """Whether `admit` would give a permit in half-open now."""
        with self._lock:
            live = sum(until > now for until in self._permits.values())
            return live + self._succeeded < self.probes

    def release(self, permit: int) -> None:
        """Return a permit whose call was not made, or whose result means nothing (cancelled)."""
        with self._lock:
            self._permits.pop(permit, None)

    def succeeded(self, key: Hashable, now: float, permit: int = 0) -> Transition[Cause] | None:
        with self._lock:
            if self.state is BreakerState.CLOSED:
                if not permit:
                    self.rule.succeeded(key, now)
            elif self.state is BreakerState.HALF_OPEN and self._permits.pop(permit, None) is not None:
                self._succeeded += 1
                if self._succeeded >= self.probes:
                    self.rule.reset()
                    return self._move(BreakerState.CLOSED, f"{self._succeeded} probes succeeded")
            return None

    def count_successes(self, count: int, now: float) -> None:
        """`count` calls on keys that never failed succeeded; for callers that count in bulk."""
        with self._lock:
            if count and self.state is BreakerState.CLOSED:
                self.rule.succeeded(None, now, count)

    def failed(self, key: Hashable, cause: Cause, now: float, permit: int = 0) -> Transition[Cause] | None:
        with self._lock:
            if self.state is BreakerState.CLOSED:
                if permit:
                    return None
                self.rule.failed(key, cause, now)
                reason = self.rule.tripped(now)
                if reason:
                    self.opened_at = now
                    return self._move(BreakerState.OPEN, reason, self.rule.causes())
            elif self.state is BreakerState.HALF_OPEN and self._permits.pop(permit, None) is not None:
                self.opened_at = now
                return self._move(BreakerState.OPEN, "a probe failed", (cause,))
            return None

    def tick(self, now: float) -> Transition[Cause] | None:
        """Half-open when the wait is over. Called by a timer, not by the next call."""
        with self._lock:
            if self.state is BreakerState.OPEN and now >= self.opened_at + self.open_for_s:
                return self._move(BreakerState.HALF_OPEN, f"open for {self.open_for_s:g} s")
            return None

    def force_open(self) -> Transition[Cause] | None:
        return self._forced(BreakerState.FORCED_OPEN)

    def disable(self) -> Transition[Cause] | None:
        """Forced closed: admits everything and counts nothing."""
        return self._forced(BreakerState.DISABLED)

    def reset(self) -> Transition[Cause] | None:
        """Closed, with nothing counted; automatic again."""
        with self._lock:
            self.rule.reset()
            if self.state is BreakerState.CLOSED:
                return None
            return self._move(BreakerState.CLOSED, "reset")

    def _forced(self, state: BreakerState) -> Transition[Cause] | None:
        with self._lock:
            return None if self.state is state else self._move(state, "forced")

    def _move(self, to: BreakerState, reason: str, causes: tuple[Cause, ...] = ()) -> Transition[Cause]:
        if to not in LEGAL[self.state]:
            raise AssertionError(f"illegal breaker transition {self.state} -> {to}")
        moved = Transition(self.state, to, reason, causes)
        self.state = to
        self.generation += 1
        self._permits.clear()
        self._succeeded = 0
        return moved
