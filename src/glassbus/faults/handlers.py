"""Faults of handlers, and of the payloads that they are given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from glassbus.bus import MessageBus
from glassbus.errors import InvalidPayload, PayloadUndecodable, UnknownSubscription, safe_text, type_name
from glassbus.facts import current_delivery
from glassbus.faults.acting import corrupt, disturbed, disturbed_in_thread, failure
from glassbus.faults.kinds import CorruptPayload, Fault
from glassbus.faults.taps import tap
from glassbus.handler import Handler
from glassbus.message import Envelope
from glassbus.policy.routing import matches

if TYPE_CHECKING:
    from glassbus.faults.injection import Injection


def on_handlers(injection: Injection, undo: ExitStack) -> None:
    name, known = injection.target.name, sorted(injection.bus._subscriptions)
    if not known or not any(fnmatchcase(one, name) for one in known):
        raise UnknownSubscription(f"no subscription {name!r} to inject a fault into; known are {known}")
    _wrap_handlers(injection, undo, lambda subscription: fnmatchcase(subscription, name), _always)


def on_topics(injection: Injection, undo: ExitStack) -> None:
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


def on_decoding(injection: Injection, undo: ExitStack) -> None:
    undo.callback(_tell_workers, injection.bus)
    for subscription in injection.bus._subscriptions.values():
        wrap = functools.partial(_faulty_argument, injection, subscription.handler)
        undo.callback(tap(subscription.handler, "argument", wrap))
    _tell_workers(injection.bus)


def _faulty_argument(injection: Injection, handler: Handler, argument: Callable[[Envelope], Any]) -> Any:
    fault = injection.fault

    def faulty(envelope: Envelope) -> Any:
        if not injection.strikes():
            return argument(envelope)
        if not isinstance(fault, CorruptPayload):
            _raise_as(fault, PayloadUndecodable)
        told = handler.fell_back
        handler.fell_back = lambda _, used: told(envelope, used)  # it is known by its own envelope
        try:
            return argument(msgspec.structs.replace(envelope, body=corrupt(fault, envelope.body, injection.chance)))
        finally:
            handler.fell_back = told

    return faulty


def on_encoding(injection: Injection, undo: ExitStack) -> None:
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


def _raise_as(fault: Fault, kind: type[Exception]) -> NoReturn:
    """Raise what `fault` says, as the codec port may: inside `kind`, where it is something else."""
    error = failure(fault)
    assert error is not None
    if isinstance(error, kind):
        raise error
    raise kind(f"{type_name(type(error))}: {safe_text(error, 300)}") from error
