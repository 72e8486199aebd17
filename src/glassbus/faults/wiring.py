"""Who in a bus holds its transport, and how all of them are given another.

A bus hands its transport to every part that needs it. Rather than have each of them ask for
it through one more step on every call, faults look for the references and exchange them: so
no fault costs anything while none is in place.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import msgspec

from glassbus.bus import MessageBus
from glassbus.slots import Slot
from glassbus.worker import Worker

#: Rooms that hold no transport, but may hold very many other things.
_NOT_IN = ("glassbus.record.", "glassbus.telemetry.", "glassbus.testing.", "glassbus.faults.", "glassbus.transport.")


def exchange(bus: MessageBus, old: object, new: object) -> int:
    """Put `new` wherever a part of `bus` holds `old`, or a method of it; how many places that were."""
    places = list(_holders(bus, old))
    for owner, name in places:
        value = vars(owner)[name]
        setattr(owner, name, new if value is old else getattr(new, value.__func__.__name__))
    refresh_slots(bus)
    return len(places)


def _holders(bus: MessageBus, sought: object) -> Iterator[tuple[object, str]]:
    """Each (object, attribute) of the bus and its parts that is `sought`, or a bound method of it."""
    seen = {id(bus)}
    waiting: list[object] = [bus]
    while waiting:
        owner = waiting.pop()
        for name, value in list(vars(owner).items()):
            if value is sought or (isinstance(value, MethodType) and value.__self__ is sought):
                yield owner, name
                continue
            for part in _parts(value):
                if id(part) not in seen:
                    seen.add(id(part))
                    waiting.append(part)


def _parts(value: Any) -> Iterator[object]:
    """`value`, or what it holds, where that is a part of a bus that may hold others."""
    if isinstance(value, dict):
        candidates: list[Any] = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        candidates = list(value)
    elif isinstance(value, MethodType):
        candidates = [value.__self__]
    else:
        candidates = [value]
    for part in candidates:
        module = type(part).__module__
        if (
            module.startswith("glassbus.")
            and not module.startswith(_NOT_IN)
            and not isinstance(part, msgspec.Struct)
            and hasattr(part, "__dict__")
        ):
            yield part


def refresh_slots(bus: MessageBus) -> None:
    """Have the slots of every worker look up the methods of the transport again.

    They keep them at hand while they run. An idle slot is cancelled, which costs it nothing, and
    starts again 50 ms later; a busy one is when it is idle.
    """

    def refresh() -> None:
        for worker in bus.subscribers():
            _Refresh(worker).look()

    if bus._loop is not None:
        on_loop(bus, refresh)


def on_loop(bus: MessageBus, job: Callable[[], None]) -> None:
    """Do `job` on the loop of `bus`: now where that runs here, else soon; not at all when it is closed."""
    loop = bus._loop
    if loop is None or _runs_here(loop):
        job()
    else:
        with contextlib.suppress(RuntimeError):  # closed: nothing of the bus is left there
            loop.call_soon_threadsafe(job)


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:  # no loop runs in this thread
        return False


class _Refresh:
    """Waits for the slots of one worker to be idle, and starts each anew."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._stale: dict[Slot, asyncio.Task[None]] = {
            slot: slot.task for slot in worker._slots.all if slot.task is not None and not slot.task.done()
        }

    def look(self) -> None:
        for slot, task in list(self._stale.items()):
            if slot.task is not task or task.done():
                del self._stale[slot]
            elif slot.delivery is None:
                task.cancel()
                del self._stale[slot]
        if self._stale:
            self._worker.on_settled.add(self._told)
        else:
            self._worker.on_settled.discard(self._told)

    def _told(self) -> None:
        """Something was settled; its slot is idle a moment later."""
        asyncio.get_running_loop().call_soon(self.look)
