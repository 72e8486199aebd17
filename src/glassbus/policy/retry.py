"""When to try again: exponential backoff with full jitter, and a budget for the whole subscription."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from glassbus.errors import ConfigurationError


class Retry(msgspec.Struct, frozen=True):
    """How often and how soon a failed delivery is tried again.

    `max_attempts` counts every run of the handler, the first included. The first
    `immediate` retries have no delay. Later ones wait a random time between 0 and
    `base_delay` x `multiplier`^n seconds, capped at `max_delay` (full jitter:
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    `budget` bounds retries to that share of first attempts, over and above
    `budget_per_second`; a spent budget postpones a retry and never dead-letters.
    `dead_letter_on` names exception types that are not worth another attempt.
    """

    max_attempts: int = 5
    immediate: int = 1
    base_delay: float = 0.2
    multiplier: float = 2.0
    max_delay: float = 5.0
    budget: float = 0.2
    budget_per_second: float = 10.0
    dead_letter_on: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.max_attempts, int) and 1 <= self.max_attempts <= 1_000_000):
            raise ConfigurationError(f"Retry.max_attempts must be at least 1, not {self.max_attempts!r}")
        if not (isinstance(self.immediate, int) and self.immediate >= 0):
            raise ConfigurationError(f"Retry.immediate must be 0 or more, not {self.immediate!r}")
        for name in ("base_delay", "max_delay", "budget", "budget_per_second"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigurationError(f"Retry.{name} must be 0 or more and finite, not {getattr(self, name)!r}")
        if not 1 <= self.multiplier < float("inf"):
            raise ConfigurationError(f"Retry.multiplier must be at least 1 and finite, not {self.multiplier!r}")
        kinds = self.dead_letter_on
        if not (isinstance(kinds, tuple) and all(isinstance(k, type) and issubclass(k, BaseException) for k in kinds)):
            raise ConfigurationError(f"Retry.dead_letter_on must be a tuple of exception types, not {kinds!r}")

    def ceiling(self, attempt: int) -> float:
        """Longest delay in seconds after failed attempt number `attempt`."""
        delayed = attempt - 1 - self.immediate
        if delayed < 0:
            return 0.0
        try:
            return min(self.max_delay, self.base_delay * float(self.multiplier) ** delayed)
        except OverflowError:  # far above any max_delay
            return self.max_delay if self.base_delay else 0.0

    def delay(self, attempt: int, uniform: Callable[[], float]) -> float:
        """Delay in seconds after failed attempt number `attempt`; `uniform` gives chance in [0, 1)."""
        return self.ceiling(attempt) * uniform()


class RetryBudget:
    """A token bucket that first attempts fill and retries empty.

    It keeps the load of retries to a share of the load that caused them, so that a
    struggling dependency is not buried. Without tokens a retry is postponed.
    """

    __slots__ = ("_at", "_cap", "_per_second", "_share", "tokens")

    def __init__(self, share: float, per_second: float, now: float) -> None:
        self._share = share
        self._per_second = per_second
        self._cap = max(10.0, per_second * 10)
        self._at = now
        self.tokens = self._cap

    def earn(self, first_attempts: int) -> None:
        """Credit for `first_attempts` made since the last call."""
        self.tokens = min(self._cap, self.tokens + self._share * first_attempts)

    def spend(self, now: float) -> float:
        """Take one token. Seconds to postpone the retry by, at most 60: 0.0 when there was one.

        Tokens may go negative, so that each further retry is postponed behind the last.
        """
        tokens = self.tokens
        if now > self._at:
            tokens += (now - self._at) * self._per_second
        if tokens > self._cap:
            tokens = self._cap
        self._at = now
        self.tokens = tokens - 1
        if self.tokens >= 0:
            return 0.0
        return min(60.0, -self.tokens / self._per_second) if self._per_second > 0 else 60.0
