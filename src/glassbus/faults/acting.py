"""What a fault does to a call that it strikes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from glassbus.clock import Clock
from glassbus.errors import (
    ConfigurationError,
    EndpointRefused,
    EndpointUnreachable,
    GlassbusError,
    TransportError,
    safe_text,
    type_name,
)
from glassbus.faults.kinds import (
    CorruptPayload,
    Crash,
    Delay,
    DropConnection,
    Fault,
    Hang,
    MemoryPressure,
    Raise,
    Refuse,
)

Result = TypeVar("Result")


class Striking(Protocol):
    """A fault that strikes now."""

    fault: Fault

    async def healed(self, *, stubborn: bool = False) -> None: ...
    def healed_in_thread(self) -> None: ...


def failure(fault: Fault) -> BaseException | None:
    """What a call that `fault` strikes raises; None where it does not. Does not return from a Crash."""
    match fault:
        case Raise():
            return fault.make()
        case Refuse():
            return ConnectionRefusedError("connection refused (injected)")
        case DropConnection():
            return ConnectionResetError("connection dropped before the answer (injected)")
        case MemoryPressure():
            return MemoryError("out of memory (injected)")
        case Crash():
            crash()
    return None


def crash() -> None:
    """End this process as the kernel's out-of-memory killer does: at once, with nothing cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


async def disturbed(striking: Striking, call: Callable[[], Awaitable[Result]], *, whole: bool = True) -> Result:
    """`call` with the fault upon it. `whole`: a dropped connection lets it do its work first."""
    fault = striking.fault
    error = failure(fault)
    if isinstance(fault, DropConnection) and whole:
        await call()
    if error is not None:
        raise error
    if isinstance(fault, Delay):
        await asyncio.sleep(fault.seconds)
    elif isinstance(fault, Hang):
        await striking.healed(stubborn=fault.stubborn)
    return await call()


def disturbed_in_thread(striking: Striking, clock: Clock, call: Callable[[], Result]) -> Result:
    """As `disturbed`, for a call on a thread that may block. It takes no notice of cancellation."""
    fault = striking.fault
    error = failure(fault)
    if isinstance(fault, DropConnection):
        call()
    if error is not None:
        raise error
    if isinstance(fault, Delay):
        pause: Callable[[float], None] = getattr(clock, "sleep", time.sleep)  # virtual clocks have one of their own
        pause(fault.seconds)
    elif isinstance(fault, Hang):
        striking.healed_in_thread()
    return call()


def as_transport_error(error: BaseException) -> BaseException:
    """`error` as a transport may raise it: foreign ones are put into Glassbus's words, as a real store's are."""
    if isinstance(error, GlassbusError) or not isinstance(error, Exception):
        return error
    kinds: tuple[tuple[type[Exception], type[TransportError]], ...] = (
        (ConnectionResetError, TransportError),  # it broke on the way: what was sent may have arrived
        (ConnectionError, EndpointUnreachable),
        (PermissionError, EndpointRefused),
    )
    kind = next((ours for theirs, ours in kinds if isinstance(error, theirs)), TransportError)
    told = kind(f"{type_name(type(error))}: {safe_text(error, 300)}")
    told.__cause__ = error
    return told


def corrupt(fault: CorruptPayload, body: bytes, chance: random.Random) -> bytes:
    """`body`, damaged."""
    if fault.how == "truncate" and len(body) > 1:
        return body[: len(body) // 2]
    damaged = bytearray(body or b"\xff")
    for _ in range(1 + len(damaged) // 16):
        damaged[chance.randrange(len(damaged))] = 0xFF
    return bytes(damaged)


def check_clock(clock: Clock) -> Callable[[float], None]:
    """What makes `clock` jump. Raises ConfigurationError."""
    jump: Callable[[float], None] | None = getattr(clock, "jump", None)
    if jump is None:
        raise ConfigurationError(
            f"{type_name(type(clock))} cannot be made to jump: make the bus with clock=glassbus.faults.JumpingClock()"
        )
    return jump
