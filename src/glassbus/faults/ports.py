"""Puts a fault upon its target; whoever does leaves how to take it away."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from glassbus.errors import ConfigurationError, EndpointUnreachable
from glassbus.faults import disk, handlers, transport, watchers
from glassbus.faults.acting import as_transport_error, check_clock, crash, disturbed, disturbed_in_thread
from glassbus.faults.kinds import MEMORY_MAX, ClockJump, Crash, DropConnection, MemoryPressure
from glassbus.faults.taps import tap
from glassbus.faults.wiring import on_loop

if TYPE_CHECKING:
    from glassbus.faults.injection import Injection


def install(injection: Injection, undo: ExitStack) -> None:
    """Put the fault upon its target. Raises ConfigurationError when the bus has no such thing."""
    kind, _, operation = injection.target.kind.partition(":")
    if kind == "transport":
        transport.stand_in(injection, transport.OPERATIONS if operation == "*" else (operation,), undo)
    else:
        _INSTALL[injection.target.kind](injection, undo)


# The configuration


def _configuration(injection: Injection, undo: ExitStack) -> None:
    source = injection.bus._reconfiguration.recovery._source
    if source is None:
        raise ConfigurationError("this bus was made without a configuration= to inject a fault into")
    clock = injection.bus.clock

    def wrap(read: Callable[[], Any]) -> Any:
        def faulty() -> Any:
            return disturbed_in_thread(injection, clock, read) if injection.strikes() else read()

        return faulty

    undo.callback(tap(source, "_read", wrap))


# A broker's endpoints


def _endpoint(injection: Injection, undo: ExitStack) -> None:
    supervisor, fault = injection.bus._endpoint, injection.fault
    dialer = getattr(supervisor, "_dialer", None)
    if supervisor is None or dialer is None:
        why = "start the bus first" if supervisor is not None else f"{injection.bus.transport}:// has none"
        raise ConfigurationError(f"no connection to a broker to inject a fault into: {why}")

    def wrap(dial: Callable[..., Awaitable[None]]) -> Any:
        async def faulty(*args: Any) -> None:
            if not injection.strikes():
                return await dial(*args)
            try:
                return await disturbed(injection, lambda: dial(*args), whole=False)
            except BaseException as error:
                raise as_transport_error(error) from error

        return faulty

    def break_now() -> None:
        if isinstance(fault, DropConnection):
            injection.struck()
        supervisor.lost(EndpointUnreachable("connection dropped (injected)"))

    if not isinstance(fault, DropConnection):
        undo.callback(tap(dialer, "dial", wrap))
    injection.once_active.append(lambda: on_loop(injection.bus, break_now))


# What is there from its injection on


def _clock(injection: Injection, undo: ExitStack) -> None:
    fault = injection.fault
    assert isinstance(fault, ClockJump)
    jump = check_clock(injection.bus.clock)
    undo.callback(jump, -fault.seconds)
    jump(fault.seconds)
    injection.struck()


def _process(injection: Injection, undo: ExitStack) -> None:
    fault = injection.fault
    if isinstance(fault, Crash):
        crash()
    assert isinstance(fault, MemoryPressure)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not 0 < fault.bytes <= min(MEMORY_MAX, free // 2):
        raise ConfigurationError(
            f"MemoryPressure of the process takes 1 to {min(MEMORY_MAX, free // 2):,} bytes now, not {fault.bytes:,}"
        )
    taken = [bytearray(fault.bytes)]
    taken[0][:: os.sysconf("SC_PAGE_SIZE")] = b"\1" * len(range(0, fault.bytes, os.sysconf("SC_PAGE_SIZE")))
    undo.callback(taken.clear)
    injection.struck()


_INSTALL: dict[str, Callable[[Any, ExitStack], None]] = {
    "handler": handlers.on_handlers,
    "topic": handlers.on_topics,
    "codec:decode": handlers.on_decoding,
    "codec:encode": handlers.on_encoding,
    "configuration": _configuration,
    "channel": watchers.on_channels,
    "endpoint": _endpoint,
    "disk": disk.on_disk,
    "clock": _clock,
    "telemetry": watchers.on_telemetry,
    "observer": watchers.on_observers,
    "process": _process,
}
