"""What can be made to go wrong: typed, frozen, and checked when it is written down.

Nothing here does anything; `acting.py` does. Durations are seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal, get_args

import msgspec

from glassbus.errors import ConfigurationError, shown, type_name

#: How much memory one fault may take at most, in bytes.
MEMORY_MAX = 1024**3
_SECONDS_MAX = 10 * 365 * 86400.0


class _Fault(msgspec.Struct, frozen=True):
    """One kind of fault. `kind` is its name in facts, spans and on the command line."""

    kind: ClassVar[str] = ""

    def __str__(self) -> str:
        """Its kind, with what is not as it is by default."""
        fields = msgspec.structs.fields(self)
        values = [getattr(self, field.name) for field in fields if getattr(self, field.name) != field.default]
        given = [f"{value:g}" if type(value) is float else str(value) for value in values]
        return f"{self.kind}({', '.join(given)})" if given else self.kind


class Raise(_Fault, frozen=True):
    """The target raises: `error` is an exception type, or a function without arguments that makes an exception.

    A type is made with `message`, or without arguments where that is empty. At a transport an exception
    that the port does not promise is handed on inside the TransportError that a real store would make of it.
    """

    kind: ClassVar[str] = "raise"

    error: Callable[..., BaseException]
    message: str = ""

    def __post_init__(self) -> None:
        if not callable(self.error):
            raise ConfigurationError(f"Raise takes an exception type or a function, not {shown(self.error)}")
        try:
            made = self.make()
        except BaseException as error:
            raise ConfigurationError(
                f"Raise cannot make its exception ({type_name(type(error))}); give it a function that does"
            ) from error
        if not isinstance(made, BaseException):
            raise ConfigurationError(f"Raise takes what makes an exception; this makes a {type_name(type(made))}")

    def make(self) -> BaseException:
        """A new one each time: an exception that is raised again gathers old frames."""
        return self.error(self.message) if self.message else self.error()

    def __str__(self) -> str:
        named = type_name(self.error) if isinstance(self.error, type) else type_name(type(self.make()))
        return f"{self.kind}({named})"


class Delay(_Fault, frozen=True):
    """The target takes `seconds` longer, and then does what it does."""

    kind: ClassVar[str] = "delay"

    seconds: float

    def __post_init__(self) -> None:
        _check_seconds(self)


class Hang(_Fault, frozen=True):
    """The target does nothing until the fault is healed, and then what it does. `stubborn`: it ignores cancellation."""

    kind: ClassVar[str] = "hang"

    stubborn: bool = False


class DropConnection(_Fault, frozen=True):
    """The connection breaks before the answer: the target does its work, and then raises.

    ConnectionResetError from a handler or channel; from a transport TransportError, which a publisher sees as
    PublishUncertain. A claim, a settlement and a probe are cut off before they do anything.
    """

    kind: ClassVar[str] = "drop_connection"


class Refuse(_Fault, frozen=True):
    """The connection is refused: ConnectionRefusedError, or EndpointUnreachable from a transport, which a
    publisher sees as BrokerUnreachable. Nothing was done."""

    kind: ClassVar[str] = "refuse"


class CorruptPayload(_Fault, frozen=True):
    """`garble`: bytes of the payload become 0xFF, which no JSON text holds. `truncate`: its second half is missing.

    At `codec:decode` they are damaged as they are read: what is stored stays whole. At `codec:encode` and
    `transport:publish` they are damaged before they are stored, for good.
    """

    kind: ClassVar[str] = "corrupt_payload"

    how: Literal["garble", "truncate"] = "garble"

    def __post_init__(self) -> None:
        _check_choice(self, "how", ("garble", "truncate"))


class DiskFull(_Fault, frozen=True):
    """No free space where messages are kept.

    On SQLite the *measure* of free space is faked (0 bytes), so that publishes meet the store's own reserve, and are
    refused with StorageFull; `entirely`: commits fail as well, with SQLite's own error, so that acknowledgements
    wait too. No disk is really filled. On a transport without a disk of its own each publish is refused with
    StorageFull by a stand-in for the transport, and `entirely` has no meaning.
    """

    kind: ClassVar[str] = "disk_full"

    entirely: bool = False


class SlowDisk(_Fault, frozen=True):
    """Each commit takes `seconds` longer.

    On SQLite in real time the writer's thread really waits before each commit. Elsewhere, and in virtual
    time (where that thread cannot wait for time to pass), publishes, settlements and probes wait at a stand-in
    for the transport.
    """

    kind: ClassVar[str] = "slow_disk"

    seconds: float

    def __post_init__(self) -> None:
        _check_seconds(self)


class ClockJump(_Fault, frozen=True):
    """Wall time jumps by `seconds` (back when negative), and back again when healed. Monotonic time goes on.

    The bus's clock must be able to: `JumpingClock`, or a clock of `glassbus.testing`.
    """

    kind: ClassVar[str] = "clock_jump"

    seconds: float

    def __post_init__(self) -> None:
        if not (isinstance(self.seconds, int | float) and 0 < abs(self.seconds) <= _SECONDS_MAX):
            raise ConfigurationError(f"ClockJump needs seconds other than 0, at most ten years, not {self.seconds!r}")


class MemoryPressure(_Fault, frozen=True):
    """Memory runs out. At a handler: MemoryError is raised, and nothing is really taken.

    At `process` (which needs `allow_crash`): `bytes` are really taken and touched, and given back when healed; never
    more than 1 GiB, nor more than half of what is free.
    """

    kind: ClassVar[str] = "memory_pressure"

    bytes: int = 0

    def __post_init__(self) -> None:
        if type(self.bytes) is not int or not 0 <= self.bytes <= MEMORY_MAX:
            raise ConfigurationError(f"MemoryPressure takes 0 to {MEMORY_MAX:,} bytes, not {self.bytes!r}")


class TelemetryDown(_Fault, frozen=True):
    """Nobody takes telemetry. `raise`: the bus's telemetry observer and the exporters of spans raise; `hang`: the
    exporters take spans and do not return (an observer may not block, so that is left alone).

    The exporters are those of `glassbus.telemetry.configure`, which all buses of the process share.
    """

    kind: ClassVar[str] = "telemetry_down"

    how: Literal["raise", "hang"] = "raise"

    def __post_init__(self) -> None:
        _check_choice(self, "how", ("raise", "hang"))


class Crash(_Fault, frozen=True):
    """This process kills itself with SIGKILL, where the target is reached. Needs `allow_crash`."""

    kind: ClassVar[str] = "crash"


Fault = (
    Raise
    | Delay
    | Hang
    | DropConnection
    | Refuse
    | CorruptPayload
    | DiskFull
    | SlowDisk
    | ClockJump
    | MemoryPressure
    | TelemetryDown
    | Crash
)
FaultType = type[Fault]
ALL_FAULTS: tuple[FaultType, ...] = get_args(Fault)


def _check_seconds(fault: Delay | SlowDisk) -> None:
    seconds = fault.seconds
    if not (isinstance(seconds, int | float) and math.isfinite(seconds) and 0 <= seconds <= _SECONDS_MAX):
        raise ConfigurationError(f"{type(fault).__name__} needs 0 or more seconds, not {seconds!r}")


def _check_choice(fault: CorruptPayload | TelemetryDown, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(fault, name)
    if value not in choices:
        raise ConfigurationError(f"{type(fault).__name__}.{name} must be one of {', '.join(choices)}, not {value!r}")
