"""When a fault strikes: by how often its target was reached, or by the bus's clock. Pure."""

from __future__ import annotations

import math
from typing import assert_never, get_args

import msgspec

from glassbus.errors import ConfigurationError


class Always(msgspec.Struct, frozen=True):
    """From the moment it is injected."""


class After(msgspec.Struct, frozen=True):
    """Once its target was reached `calls` times unharmed."""

    calls: int

    def __post_init__(self) -> None:
        _check_count(self, self.calls, 0)


class First(msgspec.Struct, frozen=True):
    """The first `calls` times that its target is reached."""

    calls: int

    def __post_init__(self) -> None:
        _check_count(self, self.calls, 1)


class Every(msgspec.Struct, frozen=True):
    """Every `nth` time that its target is reached: with 3 the third, the sixth, …"""

    nth: int

    def __post_init__(self) -> None:
        _check_count(self, self.nth, 1)


class Between(msgspec.Struct, frozen=True):
    """From `start_s` to before `end_s` seconds after it was injected, on the bus's monotonic clock."""

    start_s: float
    end_s: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.start_s < self.end_s:
            raise ConfigurationError(f"Between needs 0 <= start_s < end_s, not {self.start_s!r} and {self.end_s!r}")


Schedule = Always | After | First | Every | Between
SCHEDULES: tuple[type[Schedule], ...] = get_args(Schedule)


def admits(schedule: Schedule, call: int, elapsed_s: float) -> bool:
    """Whether the fault may strike at call number `call` (from 1), `elapsed_s` after it was injected."""
    match schedule:
        case Always():
            return True
        case After():
            return call > schedule.calls
        case First():
            return call <= schedule.calls
        case Every():
            return call % schedule.nth == 0
        case Between():
            return schedule.start_s <= elapsed_s < schedule.end_s
    assert_never(schedule)


def _check_count(schedule: Schedule, count: object, least: int) -> None:
    if type(count) is not int or count < least:
        raise ConfigurationError(f"{type(schedule).__name__} needs a whole number, {least} or more, not {count!r}")
