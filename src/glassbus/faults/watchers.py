"""Faults of those who are told what happens: observers, exporters of telemetry, channels of escalations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from glassbus.errors import ConfigurationError
from glassbus.faults.acting import disturbed_in_thread, failure
from glassbus.faults.kinds import TelemetryDown
from glassbus.faults.taps import tap
from glassbus.observer import Observer

if TYPE_CHECKING:
    from glassbus.faults.injection import Injection


def on_observers(injection: Injection, undo: ExitStack) -> None:
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


def on_telemetry(injection: Injection, undo: ExitStack) -> None:
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


# Escalation channels


def on_channels(injection: Injection, undo: ExitStack) -> None:
    name, lanes = injection.target.name, injection.bus.escalations._lanes
    wanted = [lane for lane in lanes if fnmatchcase(lane.name, name)]
    if not wanted:
        raise ConfigurationError(
            f"no channel {name!r} to inject a fault into; there are {[lane.name for lane in lanes]}"
        )
    for lane in wanted:
        undo.callback(tap(lane, "_channel", lambda channel: _FaultyChannel(injection, channel)))


class _FaultyChannel:
    """A channel that is struck; a frozen one cannot be changed in place."""

    def __init__(self, injection: Injection, channel: Any) -> None:
        self._injection = injection
        self._channel = channel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def send(self, notices: Any, /) -> None:
        if self._injection.strikes():
            clock = self._injection.bus.clock
            disturbed_in_thread(self._injection, clock, lambda: self._channel.send(notices))
        else:
            self._channel.send(notices)
