"""Faults of the disk that messages are kept on: at SQLite's commits, or at a stand-in for another transport."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from glassbus.errors import ConfigurationError
from glassbus.faults.kinds import DiskFull, Raise, SlowDisk
from glassbus.faults.taps import tap
from glassbus.faults.transport import FaultyTransport, stand_in

if TYPE_CHECKING:
    from glassbus.faults.injection import Injection

_WRITES = ("publish", "settle", "probe")


def on_disk(injection: Injection, undo: ExitStack) -> None:
    """Put a fault upon the disk of the injection's bus."""
    transport: Any = injection.bus._transport
    if isinstance(transport, FaultyTransport):
        transport = transport.real
    fault = injection.fault
    if injection.bus.transport != "sqlite":
        if isinstance(fault, Raise):
            raise ConfigurationError("Raise at 'disk' needs SQLite: strike transport:publish or another of its calls")
        stand_in(injection, ("publish",) if isinstance(fault, DiskFull) else _WRITES, undo)
    elif isinstance(fault, DiskFull):
        undo.callback(tap(transport._store, "free_space", lambda measure: _no_space(injection, measure)))
        undo.callback(tap(transport, "disk_free_bytes", lambda ask: lambda: 0 if injection.active else ask()))
        if fault.entirely:
            undo.callback(tap(transport._store, "commit", lambda commit: _full(injection, transport._store, commit)))
    elif isinstance(fault, Raise):
        undo.callback(tap(transport._store, "commit", lambda commit: _failing(injection, transport._store, commit)))
    elif injection.bus.clock.real(1.0) is None:  # virtual time stands still while the writer works
        stand_in(injection, _WRITES, undo)
    else:
        undo.callback(tap(transport._store, "commit", lambda commit: _slow(injection, commit)))


# On the thread of the store's writer


def _no_space(injection: Injection, measure: Callable[..., int]) -> Callable[..., int]:
    def faulty(*args: Any) -> int:
        return 0 if injection.strikes() else measure(*args)

    return faulty


def _full(injection: Injection, store: Any, commit: Callable[[], None]) -> Callable[[], None]:
    def faulty() -> None:
        if injection.strikes():
            import apsw

            store.rollback()
            raise apsw.FullError("FullError: database or disk is full (injected)")
        commit()

    return faulty


def _failing(injection: Injection, store: Any, commit: Callable[[], None]) -> Callable[[], None]:
    fault = injection.fault
    assert isinstance(fault, Raise)

    def faulty() -> None:
        if injection.strikes():
            store.rollback()
            raise fault.make()
        commit()

    return faulty


def _slow(injection: Injection, commit: Callable[[], None]) -> Callable[[], None]:
    fault = injection.fault
    assert isinstance(fault, SlowDisk)

    def faulty() -> None:
        if injection.strikes():
            time.sleep(fault.seconds)
        commit()

    return faulty
