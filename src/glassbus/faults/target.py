"""Where a fault strikes, in words: `handler:charge`, `topic:orders.*`, `transport:publish`, `disk`, …"""

from __future__ import annotations

import msgspec

from glassbus.errors import ConfigurationError, InvalidPattern, shown
from glassbus.faults.kinds import (
    ClockJump,
    CorruptPayload,
    Crash,
    Delay,
    DiskFull,
    DropConnection,
    Fault,
    FaultType,
    Hang,
    MemoryPressure,
    Raise,
    Refuse,
    SlowDisk,
    TelemetryDown,
)
from glassbus.message import check_pattern

_CALL: tuple[FaultType, ...] = (Raise, Delay, Hang, DropConnection, Refuse, Crash)


class Target(msgspec.Struct, frozen=True):
    """A kind of port, and which one of them. `str` is how it was written."""

    kind: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.name else self.kind


class Port(msgspec.Struct, frozen=True):
    """Which faults can strike there; `named`: which one of several is told after a colon."""

    faults: tuple[FaultType, ...]
    named: bool = False


#: Every target there is.
PORTS: dict[str, Port] = {
    "handler": Port((*_CALL, MemoryPressure), named=True),
    "topic": Port((*_CALL, MemoryPressure), named=True),
    "transport:publish": Port((*_CALL, CorruptPayload)),
    "transport:claim": Port(_CALL),
    "transport:settle": Port(_CALL),
    "transport:probe": Port(_CALL),
    "transport:*": Port(_CALL),
    "codec:decode": Port((Raise, CorruptPayload, Crash)),
    "codec:encode": Port((Raise, CorruptPayload, Crash)),
    "endpoint": Port(_CALL),
    "channel": Port(_CALL, named=True),
    "configuration": Port((Raise, Delay, Hang, Crash)),
    "disk": Port((DiskFull, SlowDisk, Raise)),
    "clock": Port((ClockJump,)),
    "telemetry": Port((TelemetryDown,)),
    "observer": Port((Raise, Crash), named=True),
    "process": Port((MemoryPressure, Crash)),
}


def parse_target(text: object, fault: Fault) -> Target:
    """The target that `text` names. Raises ConfigurationError when there is none such, or `fault` cannot strike it."""
    if not isinstance(text, str):
        raise ConfigurationError(f"a target is a str such as 'handler:charge', not {shown(text)}")
    kind, _, name = (text, "", "") if text in PORTS else text.partition(":")
    known = PORTS.get(kind)
    if known is None or known.named != bool(name):
        raise ConfigurationError(f"unknown target {shown(text)}; there are {', '.join(TARGETS)}")
    if type(fault) not in known.faults:
        fitting = ", ".join(sorted(one.__name__ for one in known.faults))
        raise ConfigurationError(f"{type(fault).__name__} cannot strike {text!r}, which takes {fitting}")
    if kind == "topic":
        try:
            check_pattern(name)
        except InvalidPattern as error:
            raise ConfigurationError(f"target {text!r}: {error}") from None
    return Target(kind, name)


#: How each is written, for people.
TARGETS: tuple[str, ...] = tuple(
    f"{kind}:{'PATTERN' if kind == 'topic' else 'NAME'}" if port.named else kind for kind, port in PORTS.items()
)
