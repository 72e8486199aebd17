"""One fault in place: when it strikes, who waits for its end, and how it is taken away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self, get_args

from glassbus.bus import MessageBus
from glassbus.errors import ConfigurationError, shown
from glassbus.facts import FaultHealed, FaultInjected
from glassbus.faults.kinds import Crash, Fault
from glassbus.faults.ports import install
from glassbus.faults.schedule import SCHEDULES, Always, Schedule, admits
from glassbus.faults.target import Target, parse_target

#: Set to 1 it allows crashes, and faults of the whole process, wherever they are asked for.
ALLOW_CRASH_VARIABLE = "GLASSBUS_FAULTS_ALLOW_CRASH"


class HasCore(Protocol):
    """A face over a bus, such as ProductionMessageBus."""

    @property
    def core(self) -> MessageBus: ...


def inject(
    bus: MessageBus | HasCore,
    fault: Fault,
    target: str,
    *,
    probability: float = 1.0,
    schedule: Schedule = Always(),  # noqa: B008 - frozen, so it may be shared
    limit: int | None = None,
    seed: int = 0,
    allow_crash: bool = False,
) -> Injection:
    """A context manager, sync and async, in which `fault` strikes `target` of `bus`.

    It strikes each time that the target is reached, when `schedule` admits it, with `probability`, at most
    `limit` times. The same `seed` makes the same calls be struck. It is taken away when the block ends, however it
    ends: what hangs then goes on. Both are stated, as FaultInjected and FaultHealed. `allow_crash` (or the variable
    GLASSBUS_FAULTS_ALLOW_CRASH=1) allows Crash, and what befalls the whole process.

    Targets: `handler:NAME` (a subscription; `*` and `?` stand for any), `topic:PATTERN` (every handler, for messages of
    these topics), `transport:publish|claim|settle|probe|*`, `codec:decode|encode`, `endpoint` (of a broker: its
    connection is lost, and what is dialled is struck), `channel:NAME` (of escalations), `configuration` (its source),
    `disk`, `clock`, `telemetry`, `observer:NAME` (by its class), `process`. Most may be injected before the bus is
    started; handlers that are subscribed later are not touched. Use it on the bus's loop or, for a bus on another
    thread, from any thread.

    Raises ConfigurationError for what cannot be, naming what could.
    """
    core = bus if isinstance(bus, MessageBus) else getattr(bus, "core", None)
    if not isinstance(core, MessageBus):
        raise ConfigurationError(f"faults are injected into a MessageBus, not {shown(bus)}")
    if not isinstance(fault, get_args(Fault)):
        raise ConfigurationError(f"{shown(fault)} is not one of the faults of glassbus.faults")
    where = parse_target(target, fault)
    if not (isinstance(probability, int | float) and 0 <= probability <= 1):
        raise ConfigurationError(f"probability must be from 0 to 1, not {shown(probability)}")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ConfigurationError(f"limit must be a whole number, 1 or more, not {shown(limit)}")
    if not isinstance(schedule, SCHEDULES):
        raise ConfigurationError(f"schedule must be one of {', '.join(s.__name__ for s in SCHEDULES)}")
    if where.kind in ("clock", "process") and (probability != 1 or schedule != Always() or limit is not None):
        raise ConfigurationError(f"a fault of {target!r} is there from its injection on: it takes no schedule")
    allowed = allow_crash is True or os.environ.get(ALLOW_CRASH_VARIABLE) == "1"
    if (isinstance(fault, Crash) or where.kind == "process") and not allowed:
        raise ConfigurationError(
            f"{fault} at {target!r} befalls this whole process: pass allow_crash=True, "
            f"or set {ALLOW_CRASH_VARIABLE}=1, where that is meant"
        )
    return Injection(core, fault, where, probability, schedule, limit, seed)


class Injection:
    """A fault on its way in, in place, or healed. Made by `inject`; good for one use.

    `calls`: how often the target was reached meanwhile; `hits`: how often the fault struck. Any thread may read them.
    """

    def __init__(
        self,
        bus: MessageBus,
        fault: Fault,
        target: Target,
        probability: float,
        schedule: Schedule,
        limit: int | None,
        seed: int,
    ) -> None:
        self.bus = bus
        self.fault = fault
        self.target = target
        self.chance = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
        self.calls = self.hits = 0
        self.active = False
        #: What a port does as soon as the fault is in place.
        self.once_active: list[Callable[[], None]] = []
        self._probability = probability
        self._schedule = schedule
        self._limit = limit
        self._counting = threading.Lock()
        self._used = self._placed = False
        self._healed = False
        self._started_at = 0.0
        self._undo = contextlib.ExitStack()
        self._waiting: set[Callable[[], None]] = set()

    def __repr__(self) -> str:
        state = "in place" if self.active else "healed" if self._healed else "not in place"
        return f"<{self.fault} at {self.target}, {state}, struck {self.hits} of {self.calls} calls>"

    # In and out

    def begin(self) -> Self:
        """Put the fault in place. What `with` does; end it with `heal`. Raises ConfigurationError."""
        if self._used:
            raise ConfigurationError("an injection is good for one use: call inject() again")
        self._used = True
        with contextlib.ExitStack() as undo:
            install(self, undo)
            self._undo = undo.pop_all()
        self._placed = True
        self._started_at = self.bus.clock.monotonic()
        self.bus.hub.state(FaultInjected(at=self.bus.clock.wall(), fault=str(self.fault), target=str(self.target)))
        self.active = True
        for job in self.once_active:
            job()
        return self

    def heal(self) -> None:
        """Take the fault away and let go whoever waits for that. Idempotent."""
        with self._counting:
            if not self._placed or self._healed:
                return
            self._healed = True
            self.active = False
        try:
            self._undo.close()
        finally:
            self._let_go()
            self.bus.hub.state(
                FaultHealed(at=self.bus.clock.wall(), fault=str(self.fault), target=str(self.target), hits=self.hits)
            )

    def __enter__(self) -> Self:
        return self.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.heal()

    async def __aenter__(self) -> Self:
        return self.begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.heal()
        await asyncio.sleep(0)  # what hung is on its way when the block has ended

    # What the ports ask

    def strikes(self) -> bool:
        """Count that the target is reached; whether the fault strikes now. Any thread."""
        with self._counting:
            if not self.active:
                return False
            self.calls += 1
            # Drawn at every call, so that whether one is struck depends on its number alone.
            drawn = self._probability >= 1 or self.chance.random() < self._probability
            if not drawn or (self._limit is not None and self.hits >= self._limit):
                return False
            if not admits(self._schedule, self.calls, self.bus.clock.monotonic() - self._started_at):
                return False
            self.hits += 1
            return True

    def struck(self) -> None:
        """Count a fault that is there from its injection on."""
        with self._counting:
            self.calls += 1
            self.hits += 1

    async def healed(self, *, stubborn: bool = False) -> None:
        """Wait until the fault is taken away. `stubborn`: cancellation does not end that."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()

        def wake() -> None:
            # The loop may be gone, with all who waited on it.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_set, waiter)

        if self._wait_for_end(wake):
            try:
                while not waiter.done():
                    try:
                        await asyncio.wait({waiter})
                    except asyncio.CancelledError:
                        if not stubborn:
                            raise
            finally:
                self._waiting.discard(wake)

    def healed_in_thread(self, *, virtual: bool = True) -> None:
        """Block this thread until the fault is taken away. `virtual`: virtual time stands still while it works, and
        so has to be told that it waits."""
        make_gate = getattr(self.bus.clock, "gate", None) if virtual else None
        if make_gate is not None:
            gate = make_gate()
            if self._wait_for_end(gate.open):
                gate.wait()
            return
        over = threading.Event()
        if self._wait_for_end(over.set):
            over.wait()

    def _wait_for_end(self, wake: Callable[[], None]) -> bool:
        """Have `wake` called when the fault is taken away; False when it is gone already."""
        with self._counting:
            if not self.active:
                return False
            self._waiting.add(wake)
            return True

    def _let_go(self) -> None:
        with self._counting:
            waiting, self._waiting = self._waiting, set()
        for wake in waiting:
            wake()


def _set(waiter: asyncio.Future[Any]) -> None:
    if not waiter.done():
        waiter.set_result(None)
