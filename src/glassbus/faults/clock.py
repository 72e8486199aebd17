"""A clock that can be made to jump."""

from __future__ import annotations

import time

from glassbus.clock import SystemClock


class JumpingClock(SystemClock):
    """The operating system's clocks, whose wall time `jump` moves, as an operator or NTP does.

    For `MessageBus(clock=JumpingClock())` where clock jumps are to be injected. Thread-safe.
    """

    def __init__(self) -> None:
        self._offset_s = 0.0

    def wall(self) -> float:
        return time.time() + self._offset_s

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward, or back, by `seconds`."""
        self._offset_s += seconds
