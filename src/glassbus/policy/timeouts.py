"""A timeout that gives way when attempts need longer, and comes back when they do not.

    own ──an attempt timed out──> factor x what that attempt had, up to the cap
     ^                                           │
     └──── halved again and again as time passes ┘   not below what recent successes needed

Each timed-out attempt asks for a multiple of the timeout *it* had: a hundred that time out side by
side stretch it once, not a hundred times, and one poison message reaches the cap at most, for a while.
"""

from __future__ import annotations

import math

import msgspec

from glassbus.errors import ConfigurationError, shown

#: Halving is not faster than this, in seconds: a timeout of milliseconds must not come and go between two messages.
HALF_LIFE_MIN_S = 2.0
#: What successes needed is remembered so many times longer than the stretch itself.
_MEMORY = 3.0
#: A success took this share of the timeout that it is to have next time.
_HEADROOM = 1.2
#: So close to its own value, the timeout is at rest.
_REST = 0.01


class AdaptiveTimeout(msgspec.Struct, frozen=True):
    """How far a subscription's timeout gives way.

    After an attempt timed out, later ones get `factor` times what it had, at most `cap` times the
    subscription's own timeout and half of its `abandon_after`. What was added is halved every `half_life` x the
    own timeout (at least 2 s). `cap=1` keeps the timeout as it is.
    """

    factor: float = 1.5
    cap: float = 4.0
    half_life: float = 2.0

    def __post_init__(self) -> None:
        for name, least in (("factor", 1.0), ("cap", 1.0), ("half_life", 0.0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not least <= value < math.inf:
                raise ConfigurationError(
                    f"AdaptiveTimeout.{name} must be at least {least:g} and finite, not {shown(value)}"
                )


class TimeoutInForce:
    """The timeout of one subscription now. Times are monotonic seconds, never going back."""

    __slots__ = ("_half_life_s", "_needed_s", "_now", "cap_s", "factor", "in_force_s", "own_s")

    def __init__(self, own_s: float, abandon_after_s: float, settings: AdaptiveTimeout, now: float) -> None:
        self._now = now
        self.own_s = self.in_force_s = own_s
        self.tune(own_s, abandon_after_s, settings)

    def tune(self, own_s: float, abandon_after_s: float, settings: AdaptiveTimeout) -> None:
        """Other settings hold from now on. With another own timeout, what was stretched before is forgotten."""
        if own_s != self.own_s:
            self.in_force_s = own_s
        self.own_s = own_s
        self.factor = settings.factor
        self.cap_s = max(own_s, min(own_s * settings.cap, abandon_after_s / 2))
        self._half_life_s = max(HALF_LIFE_MIN_S, settings.half_life * own_s)
        self._needed_s = own_s
        self.in_force_s = min(self.in_force_s, self.cap_s)

    def timed_out(self, had_s: float) -> None:
        """An attempt ran past the timeout of `had_s` that it had."""
        self.in_force_s = max(self.in_force_s, min(self.cap_s, had_s * self.factor))

    def needed(self, took_s: float) -> None:
        """An attempt succeeded that the own timeout would have ended: the stretch was right, and is kept a while."""
        self._needed_s = max(self._needed_s, min(self.cap_s, took_s * _HEADROOM))
        self.in_force_s = max(self.in_force_s, self._needed_s)

    def pass_to(self, now: float) -> None:
        """Time passes to `now`: what was added is halved every half-life."""
        passed_s, self._now = max(0.0, now - self._now), max(now, self._now)
        if self.in_force_s == self.own_s:
            return
        own_s = self.own_s
        self._needed_s = own_s + (self._needed_s - own_s) * 0.5 ** (passed_s / (_MEMORY * self._half_life_s))
        decayed_s = own_s + (self.in_force_s - own_s) * 0.5 ** (passed_s / self._half_life_s)
        self.in_force_s = min(self.in_force_s, max(decayed_s, self._needed_s))
        if self.in_force_s < own_s * (1 + _REST):
            self.in_force_s = self._needed_s = own_s
