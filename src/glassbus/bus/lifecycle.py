"""Starting and stopping."""

from __future__ import annotations

import asyncio
import signal
from asyncio import get_running_loop
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from glassbus.bus.looking import Looking
from glassbus.bus.subscribing import Subscribing
from glassbus.config import Address, Spool
from glassbus.deadletters import DeadLetters
from glassbus.errors import ConfigurationError, GlassbusError, TransportError, shown
from glassbus.facts import BusStarted, BusStopped, EmergencyStopEnded, Fact, OverflowHandled
from glassbus.observer import safe_text
from glassbus.policy.failover import Reconnect
from glassbus.pulse import Pulse
from glassbus.recovery.credentials import CredentialsSource
from glassbus.recovery.emergency import DEADLINE_S
from glassbus.recovery.endpoint import EndpointSupervisor
from glassbus.transport import Hold, Listener, Transport
from glassbus.transport.factory import make_transport
from glassbus.worker import Worker

#: What the store gets to record its last settlements, even when the handlers took all of the deadline, in seconds.
_CLOSE_S = 1.0
#: What escalation channels get to be told of what just happened, in seconds.
_TELL_S = 2.0


class Lifecycle(Subscribing, Looking):
    """new -> starting -> running -> stopping -> stopped; a start that fails leads back to new."""

    _durability: str
    _spool: Spool | None
    _reconnect: Reconnect | None
    _credentials: CredentialsSource | None

    def _make_transport(self) -> Transport:
        return make_transport(
            self._addresses,
            settings=self.settings,
            clock=self.clock,
            durability=self._durability,
            supervise=self._supervise,
            spool=self._spool,
        )

    def _supervise(self, endpoints: Sequence[Address], listener: Listener) -> EndpointSupervisor:
        self._endpoint = EndpointSupervisor(
            endpoints,
            listener.state,
            breakers=self.component_breakers,
            clock=self.clock,
            uniform=self._random.random,
            settings=self._reconnect,
            credentials=self._credentials,
        )
        return self._endpoint

    async def start(self) -> None:
        """Open the store and start every subscription. Raises ConfigurationError or TransportError.

        A start that failed, or was cancelled, can be made again.
        """
        if self._state != "new":
            raise ConfigurationError(f"bus {self.name!r} is {self._state}; a bus starts once: make a new one")
        self._loop = get_running_loop()
        self._state = "starting"
        self._starting = asyncio.current_task()
        try:
            if not self.looks_only:
                await self.escalations.start()
                self.emergency.prepare()
            await self._transport.open(_Listener(self))
            await self.emergency.reconcile()
            await self._reconfiguration.recovery.start()
            for subscription in list(self._subscriptions.values()):
                await self._declare(subscription)
            self._learn()
        except BaseException:
            await self._take_back_start()
            if self.emergency.began and self._starting is not None:
                self._state = "stopped"
                self._starting.uncancel()
                why = f"bus {self.name!r} was stopped in an emergency while it started: {self.emergency.reason}"
                raise TransportError(why) from None
            raise
        self._starting = None
        self._state = "running"
        self.hub.state(BusStarted(at=self._wall(), bus=self.name, transport=self._transport.address))
        for worker in list(self._workers.values()):  # only now: their handlers may publish
            worker.start()
        self._pulse.start()

    async def _take_back_start(self) -> None:
        for worker in self._workers.values():
            worker.halt()
        self._workers.clear()
        try:
            await self._transport.close(_CLOSE_S)
        finally:
            self.escalations.abandon()
            self.emergency.abandon()
            self._transport = self._make_transport()  # one is opened once
            self.dead_letters = DeadLetters(self._transport, self.hub, self.clock)
            self.hub.remove(self._pulse)
            self._pulse = Pulse(self._workers, self._transport, self.hub, self.clock, self._turned, self)
            self.observe(self._pulse)
            self._state = "new"

    async def stop(self, deadline: float = 30.0) -> None:
        """End intake, let running handlers finish within `deadline` seconds, give the rest back.

        Nothing is lost on a durable transport. In memory what is left is saved to `spill_dir`,
        or else discarded, each with a fact. Idempotent. A handler cannot await it (it would wait
        for itself): let it start a task for it.
        """
        if self._state in ("new", "stopped"):
            self._state = "stopped"
            return
        if any(worker.runs(asyncio.current_task()) for worker in self._workers.values()):
            raise GlassbusError("a handler cannot await bus.stop(): it would wait for itself; start a task for it")
        if self._state == "stopping":
            while self._state == "stopping":  # noqa: ASYNC110 - another stop is at work, with its own deadline
                await asyncio.sleep(0.01)
            return
        self._state = "stopping"
        started = self._monotonic()
        self._pulse.stop()
        self._reconfiguration.recovery.stop()
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        try:
            await asyncio.gather(*(worker.stop(deadline) for worker in self._workers.values()))
        finally:
            for worker in self._workers.values():  # a stop that is cancelled may not have begun with them
                worker.halt()
            left_s = max(_CLOSE_S, deadline - (self._monotonic() - started))
            kept, discarded, within = 0, 0, False
            try:  # a stop may be cancelled here too, and must not leave the bus stopping for ever
                kept, discarded = await self._transport.close(left_s)
                within = self._monotonic() - started <= deadline + 0.5
                await self.emergency.closed()
                await self.escalations.stop(_TELL_S)
            finally:
                self.emergency.abandon()
                self._state = "stopped"
                self._publisher.tell()
                self.hub.state(
                    BusStopped(
                        at=self._wall(),
                        bus=self.name,
                        given_back=kept,
                        discarded=discarded,
                        within_deadline=within,
                    )
                )
                await self._close_journal()

    async def _close_journal(self) -> None:
        """The last to go: it has heard of the stop. On a thread, for it waits for the disk."""
        if not self.journal.settled:
            await get_running_loop().run_in_executor(None, self.clock.on_thread(self._end_journal))

    def _end_journal(self, within_s: float = 2.0) -> None:
        self.journal.close(within_s)

    async def emergency_stop(self, reason: str, deadline: float = DEADLINE_S) -> EmergencyStopEnded:
        """Stop at once and write down what is held, within `deadline` seconds; what the next start then restores.

        Intake ends, running handlers get half of the time, and what they hold is in a manifest in `state_dir` first.
        Idempotent, also while the bus starts or stops. A handler cannot await it; `emergency.request(reason)`
        may be called anywhere, also on other threads and in signal handlers.
        """
        if any(worker.runs(asyncio.current_task()) for worker in self._workers.values()):
            raise GlassbusError("a handler cannot await bus.emergency_stop(): call bus.emergency.request(reason)")
        return await self.emergency.stop(reason, deadline)

    def emergency_on_signals(self, *signals: int, deadline: float = DEADLINE_S) -> None:
        """Make an emergency stop when one of `signals` comes, from now on. On the loop of the main thread.

        Raises ConfigurationError where signals cannot be handled.
        """
        loop = get_running_loop()
        for number in signals:
            try:
                told = f"signal {signal.Signals(number).name}"
                loop.add_signal_handler(number, self.emergency.request, told, deadline)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                raise ConfigurationError(f"signal {shown(number)} cannot be handled here: {error}") from error

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _turned(self) -> None:
        """At each beat of the pulse."""
        self._learn()
        self.component_breakers.look()
        self._growth.look(self._transport.queues)
        self.intake.look()
        self.journal.look()
        self._reconfiguration.recovery.look()
        self.escalations.look()
        self.emergency.look()

    def _break(self, error: BaseException) -> None:
        """The store cannot go on: take nothing more, so that nothing more is at risk."""
        self._pulse.broken = f"{type(error).__name__}: {safe_text(error, 300)}"
        self._pulse.state_failure("store", error)
        self._pulse.look_at_health(self._state)
        if self._state == "running":
            self.emergency.begin("the store cannot go on", error=self._pulse.broken)


class Stopping:
    """What an emergency asks of its bus."""

    def __init__(self, bus: Lifecycle) -> None:
        self._bus = bus

    def state(self) -> str:
        return self._bus._state

    def transport(self) -> Transport:
        return self._bus._transport

    def workers(self) -> Mapping[str, Worker]:
        return self._bus._workers

    def refuse(self, reason: str) -> None:
        self._bus._pulse.broken = self._bus._pulse.broken or reason
        self._bus._bars.add(self)

    def end_start(self) -> None:
        if self._bus._starting is not None:
            self._bus._starting.cancel()

    async def stop(self, deadline_s: float) -> None:
        await self._bus.stop(deadline_s)

    def finish(self) -> None:
        self._bus._state = "stopped"
        self._bus.escalations.abandon()


class _Listener:
    """What the transport may tell the bus."""

    def __init__(self, bus: Lifecycle) -> None:
        self._bus = bus

    def state(self, fact: Fact, /) -> None:
        self._bus.hub.state(fact)
        if type(fact) is OverflowHandled:
            self._bus._growth.saw(fact)

    def held(self, subscription: str, hold: Hold, /) -> None:
        worker = self._bus._workers.get(subscription)
        if worker is not None:
            worker.gate.hold(hold)

    def broken(self, error: BaseException, /) -> None:
        self._bus._break(error)
