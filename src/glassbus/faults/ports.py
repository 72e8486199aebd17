"""Puts faults upon the ports of a bus, one function a kind of target; each leaves how to take them away."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import msgspec

from glassbus.bus import MessageBus
from glassbus.errors import (
    ConfigurationError,
    InvalidPayload,
    PayloadUndecodable,
    UnknownSubscription,
    safe_text,
    type_name,
)
from glassbus.facts import current_delivery
from glassbus.faults import disk, transport
from glassbus.faults.acting import check_clock, corrupt, crash, disturbed, disturbed_in_thread, failure
from glassbus.faults.kinds import MEMORY_MAX, ClockJump, CorruptPayload, Crash, MemoryPressure, TelemetryDown
from glassbus.faults.taps import tap
from glassbus.message import Envelope
from glassbus.observer import Observer
from glassbus.policy.routing import matches

if TYPE_CHECKING:
    from glassbus.faults.injection import Injection


def install(injection: Injection, undo: ExitStack) -> None:
    """Put the fault upon its target. Raises ConfigurationError when the bus has no such thing."""
    kind, _, operation = injection.target.kind.partition(":")
    if kind == "transport":
        transport.stand_in(injection, transport.OPERATIONS if operation == "*" else (operation,), undo)
    else:
        _INSTALL[injection.target.kind](injection, undo)


# Handlers


def _handlers(injection: Injection, undo: ExitStack) -> None:
    name, known = injection.target.name, sorted(injection.bus._subscriptions)
    if not known or not any(fnmatchcase(one, name) for one in known):
        raise UnknownSubscription(f"no subscription {name!r} to inject a fault into; known are {known}")
    _wrap_handlers(injection, undo, lambda subscription: fnmatchcase(subscription, name), _always)


def _topics(injection: Injection, undo: ExitStack) -> None:
    pattern = injection.target.name

    def is_meant() -> bool:
        delivery = current_delivery.get()
        return delivery is not None and matches(pattern, delivery.envelope.topic)

    _wrap_handlers(injection, undo, lambda subscription: True, is_meant)


def _always() -> bool:
    return True


def _wrap_handlers(
    injection: Injection, undo: ExitStack, wanted: Callable[[str], bool], is_meant: Callable[[], bool]
) -> None:
    bus = injection.bus
    undo.callback(_tell_workers, bus)
    for name, subscription in bus._subscriptions.items():
        if wanted(name):
            wrap = _async_handler if subscription.handler.is_async else _plain_handler
            undo.callback(tap(subscription.handler, "function", functools.partial(wrap, injection, is_meant)))
    _tell_workers(bus)


def _async_handler(injection: Injection, is_meant: Callable[[], bool], function: Callable[..., Any]) -> Any:
    @functools.wraps(function)
    async def faulty(*args: Any) -> Any:
        if is_meant() and injection.strikes():
            return await disturbed(injection, lambda: function(*args))
        return await function(*args)

    return faulty


def _plain_handler(injection: Injection, is_meant: Callable[[], bool], function: Callable[..., Any]) -> Any:
    clock = injection.bus.clock

    @functools.wraps(function)
    def faulty(*args: Any) -> Any:
        if is_meant() and injection.strikes():
            return disturbed_in_thread(injection, clock, lambda: function(*args))
        return function(*args)

    return faulty


def _tell_workers(bus: MessageBus) -> None:
    """Workers keep what they call at hand: have them take what their handlers have now."""
    for worker in bus.subscribers():
        handler = worker.subscription.handler
        worker._function = handler.function
        if worker._argument != handler.argument:
            worker._argument = handler.argument


# Payloads


def _decoding(injection: Injection, undo: ExitStack) -> None:
    fault = injection.fault

    def wrap(argument: Callable[[Envelope], Any]) -> Any:
        def faulty(envelope: Envelope) -> Any:
            if injection.strikes():
                if isinstance(fault, CorruptPayload):
                    damaged = corrupt(fault, envelope.body, injection.chance)
                    return argument(msgspec.structs.replace(envelope, body=damaged))
                _raise_as(fault, PayloadUndecodable)
            return argument(envelope)

        return faulty

    undo.callback(_tell_workers, injection.bus)
    for subscription in injection.bus._subscriptions.values():
        undo.callback(tap(subscription.handler, "argument", wrap))
    _tell_workers(injection.bus)


def _encoding(injection: Injection, undo: ExitStack) -> None:
    fault = injection.fault

    def wrap(seal: Callable[..., Envelope]) -> Any:
        def faulty(*args: Any) -> Envelope:
            envelope = seal(*args)
            if injection.strikes():
                if isinstance(fault, CorruptPayload):
                    return msgspec.structs.replace(envelope, body=corrupt(fault, envelope.body, injection.chance))
                _raise_as(fault, InvalidPayload)
            return envelope

        return faulty

    undo.callback(tap(injection.bus._publisher, "seal", wrap))


def _raise_as(fault: Any, kind: type[Exception]) -> None:
    """Raise what `fault` says, as the codec port may: inside `kind`, where it is something else."""
    error = failure(fault)
    assert error is not None
    if isinstance(error, kind):
        raise error
    raise kind(f"{type_name(type(error))}: {safe_text(error, 300)}") from error


# Observers


def _observers(injection: Injection, undo: ExitStack) -> None:
    name = injection.target.name
    _wrap_observers(injection, undo, [o for o in injection.bus.hub.observers if fnmatchcase(type(o).__name__, name)])


def _wrap_observers(injection: Injection, undo: ExitStack, observers: list[Observer]) -> None:
    if not observers:
        known = ", ".join(type(observer).__name__ for observer in injection.bus.hub.observers)
        raise ConfigurationError(f"no observer fits {str(injection.target)!r}; the bus has {known}")

    def wrap(method: Callable[..., Any]) -> Any:
        def faulty(*args: Any) -> Any:
            if injection.strikes():
                raise failure(injection.fault) or ConnectionError("telemetry is down (injected)")
            return method(*args)

        return faulty

    hub = injection.bus.hub
    undo.callback(lambda: hub._set(hub.observers))
    for observer in observers:
        for method in ("on_fact", "scope", "inject"):
            inherited = method == "scope" and getattr(type(observer), method, None) is Observer.scope
            if hasattr(observer, method) and not inherited:
                undo.callback(tap(observer, method, wrap))
    hub._set(hub.observers)  # it keeps some of their methods at hand


def _telemetry(injection: Injection, undo: ExitStack) -> None:
    fault = injection.fault
    assert isinstance(fault, TelemetryDown)
    observers = [o for o in injection.bus.hub.observers if type(o).__module__.startswith("glassbus.telemetry.")]
    # Looked up and not imported: faults and telemetry do not know each other, and it may not be in use.
    setup = sys.modules.get("glassbus.telemetry.setup")
    queues = setup.active_queues() if setup is not None else ()
    if not (queues if fault.how == "hang" else (observers or queues)):
        raise ConfigurationError(
            f"{fault} finds no telemetry to strike: "
            + ("call glassbus.telemetry.configure() first" if observers else "the bus was made with telemetry=False")
        )

    def wrap(export: Callable[..., Any]) -> Any:
        def faulty(*args: Any) -> Any:
            if injection.strikes():
                if fault.how == "raise":
                    raise ConnectionError("nobody takes telemetry (injected)")
                injection.healed_in_thread(virtual=False)
            return export(*args)

        return faulty

    for queue in queues:
        undo.callback(tap(queue._exporter, "export", wrap))
    if fault.how == "raise" and observers:
        _wrap_observers(injection, undo, observers)


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
    "handler": _handlers,
    "topic": _topics,
    "codec:decode": _decoding,
    "codec:encode": _encoding,
    "disk": disk.put_upon,
    "clock": _clock,
    "telemetry": _telemetry,
    "observer": _observers,
    "process": _process,
}
