"""Tools for tests, ours and yours: time that obeys, a record of the facts, and assertions on it.

`run_virtual` runs a scenario in virtual time: an hour of retries takes
milliseconds, and every run takes the same way. `FakeClock` is for code without a
loop. `RecordingObserver` and `expect_facts` say what a bus stated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from glassbus.testing.clocks import EPOCH, FakeClock, Gate, VirtualClock
from glassbus.testing.loop import VirtualTimeLoop, VirtualTimeStuckError
from glassbus.testing.recording import RecordingObserver, expect_facts

__all__ = [
    "EPOCH",
    "FakeClock",
    "Gate",
    "RecordingObserver",
    "VirtualClock",
    "VirtualTimeLoop",
    "VirtualTimeStuckError",
    "expect_facts",
    "run_virtual",
]

Result = TypeVar("Result")


def run_virtual(
    scenario: Callable[[VirtualClock], Coroutine[Any, Any, Result]],
    *,
    seed: int | None = None,
    limit_s: float = 86_400.0,
) -> Result:
    """Run `scenario(clock)` to its end in virtual time and return its result.

    Tasks that it leaves behind are cancelled, as `asyncio.run` does. Raises
    VirtualTimeStuckError when it can never end, or has not within `limit_s` virtual seconds.
    """
    loop = VirtualTimeLoop(seed=seed, limit_s=limit_s)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(scenario(VirtualClock(loop)))
