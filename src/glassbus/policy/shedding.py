"""How many attempts may run at once while resources are short: halved on exhaustion, regained step by step.

    all ──exhausted──> half ──exhausted──> … ──> 1 ──exhausted──> 1, and shedding does not help
     ^                                                  │
     └── a step a second, once an attempt succeeded ────┘

Low priority is held back from the first shed until all is regained.
"""

from __future__ import annotations

from enum import StrEnum

#: Seconds without exhaustion before a step back, and between two steps; and how long the last slot is given to help.
STEP_S = 1.0
#: Without any attempt to tell, steps are taken after so many seconds all the same.
IDLE_S = 10.0
#: From one to all takes at most so many steps.
STEPS = 8


class Shed(StrEnum):
    """What an exhausted attempt led to."""

    NOTHING = "nothing"
    HALVED = "halved"
    AT_BOTTOM = "at_bottom"


class Shedding:
    """The load of one subscription. Times are monotonic seconds, never going back."""

    __slots__ = ("_exhausted_at", "_shed_at", "_stepped_at", "full", "limit", "low_held", "proven")

    def __init__(self, full: int) -> None:
        self.full = full
        self.limit = full
        self.low_held = False
        #: An attempt that began after the last exhaustion succeeded.
        self.proven = True
        self._shed_at = self._exhausted_at = self._stepped_at = float("-inf")

    @property
    def shed(self) -> bool:
        """Whether anything is held back."""
        return self.low_held or self.limit < self.full

    def resize(self, full: int) -> None:
        """All is `full` from now on."""
        at_rest = self.limit == self.full
        self.full = full
        self.limit = full if at_rest and not self.low_held else max(1, min(self.limit, full))

    def exhausted(self, started: float, now: float) -> Shed:
        """An attempt that began at `started` ran out of a resource.

        One that began before the last shed says nothing about what that achieved; nor does, with one slot left,
        one that began within a second of it.
        """
        self._exhausted_at = now
        self.proven = False
        at_bottom = self.limit == 1 and self.low_held
        if started < self._shed_at + (STEP_S if at_bottom else 0.0):
            return Shed.NOTHING
        self._shed_at = now
        if at_bottom:
            return Shed.AT_BOTTOM
        self.limit = max(1, self.limit // 2)
        self.low_held = True
        return Shed.HALVED

    def succeeded(self) -> None:
        """Attempts succeed again."""
        self.proven = True

    def regain(self, now: float) -> bool:
        """Take a step back towards all, if it is time; whether one was taken."""
        quiet_s = now - self._exhausted_at
        due = quiet_s >= STEP_S and now - self._stepped_at >= STEP_S and (self.proven or quiet_s >= IDLE_S)
        if not self.shed or not due:
            return False
        self._stepped_at = now
        if self.limit < self.full:
            self.limit = min(self.full, self.limit + max(1, -(-self.full // STEPS)))
        else:
            self.low_held = False
        return True
