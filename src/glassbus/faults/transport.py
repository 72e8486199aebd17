"""A stand-in for a bus's transport while faults are upon it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import msgspec

from glassbus.bus import MessageBus
from glassbus.errors import StorageFull, TransportError
from glassbus.facts import Delivery, transport_failed
from glassbus.faults.acting import as_transport_error, corrupt, disturbed, failure
from glassbus.faults.kinds import CorruptPayload, Delay, DiskFull, Hang, SlowDisk
from glassbus.faults.wiring import exchange, on_loop
from glassbus.message import Envelope
from glassbus.policy.delivery import Decision
from glassbus.transport import Recorded, Stored, Transport

if TYPE_CHECKING:
    from glassbus.faults.injection import Injection

_Call = Callable[..., Awaitable[Any]]

#: How soon a settlement that a fault held up is tried again, in seconds.
_AGAIN_S = 1.0
OPERATIONS = ("publish", "claim", "settle", "probe")


def stand_in(injection: Injection, operations: Sequence[str], undo: ExitStack) -> None:
    """Put a stand-in before the transport of the injection's bus, and the fault upon these of its operations."""
    bus = injection.bus
    present: Any = bus._transport
    if isinstance(present, FaultyTransport):
        faulty = present
    else:
        faulty = _stand_in_for(present)(present, bus)
        undo.callback(faulty.leave)  # in case the exchange fails half-way
        exchange(bus, present, faulty)
    faulty.upon.append((injection, tuple(operations)))
    undo.callback(faulty.take_away, injection)


def _stand_in_for(real: Transport) -> type[FaultyTransport]:
    """A class that has what `real` has beyond the port too: what a transport can do besides is asked of its class."""

    def passed_on(name: str) -> property:
        return property(lambda self: getattr(self.real, name), lambda self, value: setattr(self.real, name, value))

    besides = {name for name in dir(real) if not name.startswith("_")} - set(dir(FaultyTransport))
    return type("FaultyTransport", (FaultyTransport,), {name: passed_on(name) for name in sorted(besides)})


class _Held:
    """A settlement that waits for a fault to let it through."""

    __slots__ = ("by", "decision", "delivery", "recorded", "timer")

    def __init__(self, by: Injection, delivery: Delivery, decision: Decision, recorded: Recorded) -> None:
        self.by = by
        self.delivery = delivery
        self.decision = decision
        self.recorded = recorded
        self.timer: asyncio.TimerHandle | None = None


class FaultyTransport:
    """Keeps the promises of the port, with the faults upon it: a settlement never raises and is never lost, what
    fails is a TransportError. Everything else is the real transport's."""

    def __init__(self, real: Transport, bus: MessageBus) -> None:
        self.real = real
        self.upon: list[tuple[Injection, tuple[str, ...]]] = []
        self._bus = bus
        self._held: list[_Held] = []
        self._flushing: set[asyncio.Future[None]] = set()
        self._failing = False  # settlements fail, and that was told

    def __getattr__(self, name: str) -> Any:
        """What is private to the real one, for those who know it."""
        return getattr(self.real, name)

    # Coming and going

    def take_away(self, injection: Injection) -> None:
        self.upon = [one for one in self.upon if one[0] is not injection]
        on_loop(self._bus, lambda: self._release([held for held in self._held if held.by is injection]))
        self.leave()

    def leave(self) -> None:
        """Give everybody the real transport again, if no fault is left."""
        if not self.upon:
            exchange(self._bus, self, self.real)

    # The operations

    async def publish(self, batch: Sequence[Envelope], /, wait_s: float) -> Sequence[Stored]:
        stored: Sequence[Stored] = await self._through("publish", self.real.publish)(batch, wait_s)
        return stored

    def publish_now(self, envelope: Envelope, /) -> Stored | None:
        """Never at once while a fault is upon publishing: `publish` is asked then."""
        return None if self._upon("publish") else self.real.publish_now(envelope)

    async def claim(self, name: str, /) -> Delivery:
        delivery: Delivery = await self._through("claim", self.real.claim)(name)
        return delivery

    def claim_now(self, name: str, /) -> Delivery | None:
        """As `publish_now`."""
        return None if self._upon("claim") else self.real.claim_now(name)

    async def probe(self) -> float:
        """While settlements fail it does too: the pulse, which tells of a recovery, must not find the store well."""
        if self._failing:
            raise TransportError("settlements fail (injected)")
        took_s: float = await self._through("probe", self.real.probe)()
        return took_s

    def _upon(self, operation: str) -> list[Injection]:
        """The faults on `operation`, the newest first."""
        return [injection for injection, operations in reversed(self.upon) if operation in operations]

    def _through(self, operation: str, call: _Call) -> _Call:
        """`call` behind the faults on `operation`: the newest is met first."""
        for injection in reversed(self._upon(operation)):
            call = _behind(injection, call, whole=operation == "publish")
        return call

    # Settlements: handed over, never refused

    def handled_now(self, delivery: Delivery, /) -> bool:
        """As `publish_now`."""
        return not self._upon("settle") and not self._failing and self.real.handled_now(delivery)

    def settle(self, delivery: Delivery, decision: Decision, recorded: Recorded, /) -> None:
        for injection in self._upon("settle"):
            if injection.strikes():
                self._hold(injection, delivery, decision, recorded)
                return
        self.real.settle(delivery, decision, recorded)
        self._failing = self._failing and bool(self._held)

    def _hold(self, injection: Injection, delivery: Delivery, decision: Decision, recorded: Recorded) -> None:
        fault = injection.fault
        held = _Held(injection, delivery, decision, recorded)
        self._held.append(held)
        if isinstance(fault, Hang):
            return  # until it is healed
        if isinstance(fault, Delay | SlowDisk):
            held.timer = asyncio.get_running_loop().call_later(fault.seconds, self._pass, held)
            return
        error = failure(fault)
        assert error is not None
        if not self._failing:
            self._failing = True
            told = as_transport_error(error)
            self._bus.hub.state(transport_failed(self._bus.clock.wall(), "settle", told))
        held.timer = asyncio.get_running_loop().call_later(_AGAIN_S, self._release, [held])

    def _pass(self, held: _Held) -> None:
        """Hand a settlement to the real transport, whatever is upon it."""
        self._drop(held)
        self.real.settle(held.delivery, held.decision, held.recorded)
        self._tell_flushed()

    def _release(self, these: list[_Held]) -> None:
        """Try settlements again: another fault, or the same, may hold them up once more."""
        for held in these:
            self._drop(held)
            self.settle(held.delivery, held.decision, held.recorded)
        self._tell_flushed()

    def _drop(self, held: _Held) -> None:
        if held.timer is not None:
            held.timer.cancel()
        if held in self._held:
            self._held.remove(held)

    def _tell_flushed(self) -> None:
        if not self._held:
            waiting, self._flushing = self._flushing, set()
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(None)

    async def flush(self) -> None:
        while self._held:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._flushing.add(waiter)
            await waiter
        await self.real.flush()

    async def close(self, deadline_s: float, /) -> tuple[int, int]:
        """What is still held up cannot be recorded any more, as with a store that fails to the end: it stays with
        the real transport as in flight, which gives it back."""
        for held in list(self._held):
            self._drop(held)
        self._tell_flushed()
        return await self.real.close(deadline_s)


def _behind(injection: Injection, call: _Call, *, whole: bool) -> _Call:
    """`call`, struck when the fault has its turn. `whole`: a dropped connection lets it do its work."""
    fault = injection.fault

    async def faulty(*args: Any) -> Any:
        if not injection.strikes():
            return await call(*args)
        if isinstance(fault, CorruptPayload):
            batch, *rest = args
            return await call([_damaged(injection, fault, envelope) for envelope in batch], *rest)
        if isinstance(fault, DiskFull):
            raise StorageFull("no space left where messages are kept (injected)")
        if isinstance(fault, SlowDisk):
            await asyncio.sleep(fault.seconds)
            return await call(*args)
        try:
            return await disturbed(injection, lambda: call(*args), whole=whole)
        except BaseException as error:
            raised = as_transport_error(error)
            if raised is error:
                raise
            raise raised from error

    return faulty


def _damaged(injection: Injection, fault: CorruptPayload, envelope: Envelope) -> Envelope:
    return msgspec.structs.replace(envelope, body=corrupt(fault, envelope.body, injection.chance))
