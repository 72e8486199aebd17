"""Faults on purpose: to see in a test, a drill or the demo what a service does when something fails.

    with inject(bus, Refuse(), "handler:charge", schedule=First(3)) as injection:
        ...
    assert injection.hits == 3

A fault stands before a port of one bus (its handlers, transport, codec, clock, observers) and
is gone without a trace when the block ends; with none in place, nothing of this is in the way of
a message, and the core does not even import it. `glassbus.testing.expect_facts` says what is to be stated meanwhile.
"""

from __future__ import annotations

from glassbus.faults.clock import JumpingClock
from glassbus.faults.injection import ALLOW_CRASH_VARIABLE, Injection, inject
from glassbus.faults.kinds import (
    ClockJump,
    CorruptPayload,
    Crash,
    Delay,
    DiskFull,
    DropConnection,
    Fault,
    Hang,
    MemoryPressure,
    Raise,
    Refuse,
    SlowDisk,
    TelemetryDown,
)
from glassbus.faults.proxy import FaultyProxy
from glassbus.faults.schedule import After, Always, Between, Every, First, Schedule
from glassbus.faults.target import TARGETS

__all__ = [
    "ALLOW_CRASH_VARIABLE",
    "TARGETS",
    "After",
    "Always",
    "Between",
    "ClockJump",
    "CorruptPayload",
    "Crash",
    "Delay",
    "DiskFull",
    "DropConnection",
    "Every",
    "Fault",
    "FaultyProxy",
    "First",
    "Hang",
    "Injection",
    "JumpingClock",
    "MemoryPressure",
    "Raise",
    "Refuse",
    "Schedule",
    "SlowDisk",
    "TelemetryDown",
    "inject",
]
