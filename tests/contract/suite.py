"""What the contract suite runs on: every transport, made the same way, in virtual time.

To add a transport, add one `Backend`: how to make it on a given place, and its
`Features`. Every test then runs on it, or says by its features why it does not apply.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glassbus.bus import MessageBus
from glassbus.clock import Clock
from glassbus.config import Overflow, Settings, addresses
from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity
from glassbus.facts import Delivery, Fact
from glassbus.message import Envelope, Level
from glassbus.policy.delivery import Decision, State
from glassbus.policy.ledger import Account
from glassbus.testing import RecordingObserver, VirtualClock, run_virtual
from glassbus.transport import DeadLetterFilter, DeadLetterRecord, Features, Hold, Stored, SubscriptionSpec, Transport
from glassbus.transport.factory import make_transport
from tests import nats_kit
from tests.patient import Patient

#: Virtual seconds within which what must come has come, and after which what has not come will not.
SOON_S = 5.0

WHOLE_LADDER = Overflow()
#: A full queue that slows its publishers and then refuses, with no rung between.
NO_LADDER = Overflow(displace=False, expand=1.0)


@dataclass(frozen=True)
class Backend:
    """One transport: its URL at a place, and what it can do."""

    name: str
    features: Features
    url: Callable[[Path], str]
    #: Whether what it holds at a close is there again at the next open of the same place.
    keeps: bool
    #: Whether the disk that its messages are on is ours to see.
    disk: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, clock: Clock, place: Path) -> Transport:
        settings = Settings(spill_dir=str(place) if self.name == "memory+spill" else None)
        return make_transport(
            addresses(self.url(place)), settings=settings, clock=clock, supervise=Patient, **self.options
        )


MEMORY = Features(durable=False, multi_process=False, level=Level.MEMORY, ladder=True)
BACKENDS = [
    Backend("memory", MEMORY, lambda place: "memory://", keeps=False),
    Backend("memory+spill", MEMORY, lambda place: "memory://", keeps=True),
    Backend(
        "sqlite",
        Features(durable=True, multi_process=True, level=Level.PROCESS, ladder=True),
        lambda place: f"sqlite:///{place / 'store.db'}",
        keeps=True,
        disk=True,
        options={"durability": "process"},
    ),
    Backend(
        "nats",
        Features(durable=True, multi_process=True, level=Level.PROCESS, ladder=True),
        lambda place: f"{nats_kit.shared().url}/{nats_kit.store_name(place)}",
        keeps=True,
    ),
]


class Ears:
    """The listener of a transport: what it was told, in order."""

    def __init__(self) -> None:
        self.recorder = RecordingObserver()
        self.holds: list[tuple[str, Hold]] = []
        self.errors: list[BaseException] = []

    def state(self, fact: Fact, /) -> None:
        self.recorder.on_fact(fact)

    def held(self, subscription: str, hold: Hold, /) -> None:
        self.holds.append((subscription, hold))

    def broken(self, error: BaseException, /) -> None:
        self.errors.append(error)


def report(message: str = "it went wrong", category: ErrorCategory = ErrorCategory.TIMEOUT_ERROR) -> ErrorReport:
    return ErrorReport(
        error_id="e-1",
        timestamp=1.0,
        category=category,
        severity=ErrorSeverity.HIGH,
        message=message,
        exception_type="TimeoutError",
        stack_trace="File 'x', line 1",
        context={"topic": "orders.created"},
        fingerprint=f"f-{message}",
    )


class Desk:
    """An open transport, and short words for what tests do with it."""

    def __init__(self, backend: Backend, clock: VirtualClock, place: Path) -> None:
        self.backend = backend
        self.features = backend.features
        self.clock = clock
        self.place = place
        self.ears = Ears()
        self.transport = backend.make(clock, place)
        self.is_open = True
        self._ids = itertools.count(1)

    async def open(self) -> Desk:
        await self.transport.open(self.ears)
        return self

    async def reopened(self) -> Desk:
        """A new transport on the same place. Close this one first."""
        return await Desk(self.backend, self.clock, self.place).open()

    # Publishing

    async def declare(
        self,
        name: str = "s",
        pattern: str = "orders.*",
        *,
        capacity: int = 1000,
        strict_key: bool = False,
        overflow: Overflow = WHOLE_LADDER,
        consume: bool = True,
    ) -> Hold:
        spec = SubscriptionSpec(name, pattern, capacity, strict_key, overflow)
        return await self.transport.declare(spec, consume=consume)

    def envelope(self, body: bytes | str = b"{}", **fields: Any) -> Envelope:
        fields.setdefault("id", f"m{next(self._ids)}")
        fields.setdefault("topic", "orders.created")
        fields.setdefault("published_at", self.clock.wall())
        return Envelope(body=body.encode() if isinstance(body, str) else body, codec="json", headers={}, **fields)

    async def publish(self, *bodies: bytes | str | Envelope, wait_s: float = 0.0, **fields: Any) -> Sequence[Stored]:
        batch = [b if isinstance(b, Envelope) else self.envelope(b, **fields) for b in bodies]
        return await self.transport.publish(batch, wait_s)

    # Claiming and settling

    async def claim(self, name: str = "s", within_s: float = SOON_S) -> Delivery:
        """The next delivery, which must come soon."""
        async with asyncio.timeout(within_s):
            return await self.transport.claim(name)

    async def nothing(self, name: str = "s", within_s: float = SOON_S) -> None:
        """Assert that nothing can be claimed for a while."""
        try:
            async with asyncio.timeout(within_s):
                delivery = await self.transport.claim(name)
        except TimeoutError:
            return
        raise AssertionError(f"claimed {delivery!r}, though nothing was due")

    async def settle(self, delivery: Delivery, decision: Decision) -> bool:
        """Whether the store took it. Checks that `recorded` is called once, on the loop, with what was handed over."""
        answers: list[bool] = []
        home = asyncio.get_running_loop()

        def recorded(settled: Delivery, decided: Decision, accepted: bool) -> None:
            assert asyncio.get_running_loop() is home
            assert settled is delivery
            assert decided is decision
            answers.append(accepted)

        self.transport.settle(delivery, decision, recorded)
        await self.transport.flush()
        assert len(answers) == 1
        return answers[0]

    async def handled(self, delivery: Delivery) -> bool:
        return await self.settle(delivery, Decision(State.HANDLED, delivery.attempt))

    async def retrying(self, delivery: Delivery, delay_s: float) -> bool:
        return await self.settle(
            delivery,
            Decision(
                State.RETRYING,
                delivery.attempt,
                delay_s=delay_s,
                recovering=("timeout_error", "delayed_retry"),
                first_failed_at=delivery.first_failed_at or self.clock.wall(),
            ),
        )

    async def given_back(self, delivery: Delivery) -> bool:
        return await self.settle(
            delivery,
            Decision(
                State.READY,
                delivery.attempt - 1,
                recovering=delivery.recovering,
                first_failed_at=delivery.first_failed_at,
                reason="stopping",
            ),
        )

    async def dead(self, delivery: Delivery, why: str = "it went wrong") -> bool:
        return await self.settle(
            delivery,
            Decision(
                State.DEAD_LETTERED,
                delivery.attempt,
                first_failed_at=self.clock.wall(),
                report=report(why),
                reason="attempts_spent",
            ),
        )

    async def dead_letter(self, body: bytes | str = b"{}", why: str = "it went wrong", **fields: Any) -> str:
        """Publish, claim and bury one message; the id of its dead letter."""
        envelope = self.envelope(body, **fields)
        await self.publish(envelope)
        delivery = await self.claim()
        assert delivery.envelope.id == envelope.id
        assert await self.dead(delivery, why)
        (record,) = [r for r in await self.dead_letters() if r.envelope.id == envelope.id]
        return record.id

    async def dead_letters(self, limit: int = 1000, **wanted: Any) -> list[DeadLetterRecord]:
        return await self.transport.dead_letters(DeadLetterFilter(**wanted), limit)

    # Looking

    def account(self, name: str = "s") -> Account:
        return self.transport.ledger().accounts[name]

    def stated(self) -> list[str]:
        return self.ears.recorder.names()

    async def balanced(self) -> None:
        """The ledger balances, and a recount of everything agrees with it."""
        ledger = self.transport.ledger()
        assert ledger.balanced, ledger
        audit = await self.transport.audit()
        assert audit.ok, audit.problems
        assert audit.ledger == audit.recounted
        assert not self.ears.errors

    async def close(self) -> tuple[int, int]:
        self.is_open = False
        return await self.transport.close(SOON_S)


class Store:
    """A place for one backend's store, and the way to run a scenario on it."""

    def __init__(self, backend: Backend, place: Path) -> None:
        self.backend = backend
        self.features = backend.features
        self.place = place
        self._fresh = itertools.count(1)

    def fresh(self) -> Store:
        """The same backend on a new, empty place."""
        place = self.place / f"fresh{next(self._fresh)}"
        place.mkdir()
        return Store(self.backend, place)

    def run(self, scenario: Callable[[Desk], Awaitable[None]], *, seed: int | None = None) -> None:
        """Run `scenario` on an open transport in virtual time; at its end everything must balance."""

        async def whole(clock: VirtualClock) -> None:
            desk = await Desk(self.backend, clock, self.place).open()
            try:
                await scenario(desk)
                if desk.is_open:
                    await desk.balanced()
            finally:
                await desk.close()

        run_virtual(whole, seed=seed)

    def run_bus(self, scenario: Callable[[House], Awaitable[None]], *, seed: int | None = None) -> None:
        """Run `scenario` with buses on this store in virtual time; at its end every message must be accounted for."""

        async def whole(clock: VirtualClock) -> None:
            house = House(self, clock)
            try:
                await scenario(house)
                for bus in house.buses:
                    if bus.running:
                        assert bus.ledger().balanced, bus.ledger()
            finally:
                for bus in house.buses:
                    await bus.stop(1.0)
            assert "LedgerUnbalanced" not in house.seen.names()
            assert not any(bus.hub.failures for bus in house.buses)

        run_virtual(whole, seed=seed)


class House:
    """Makes buses on one store, all watched by one recorder."""

    def __init__(self, store: Store, clock: VirtualClock) -> None:
        self.store = store
        self.clock = clock
        self.seen = RecordingObserver()
        self.buses: list[MessageBus] = []

    def bus(self, **options: Any) -> MessageBus:
        backend = self.store.backend
        options = {"telemetry": False, "observers": [self.seen], "seed": 7, **backend.options, **options}
        if backend.name == "memory+spill":
            options.setdefault("spill_dir", self.store.place)
        made = MessageBus(backend.url(self.store.place), clock=self.clock, **options)
        self.buses.append(made)
        return made
