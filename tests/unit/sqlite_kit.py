"""What the tests of the SQLite transport share: short words, a store that fails on demand, a look into the file."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw

from glassbus.clock import Clock, SystemClock
from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity
from glassbus.facts import Delivery
from glassbus.message import Envelope
from glassbus.policy.delivery import Decision, State
from glassbus.policy.ledger import Account
from glassbus.testing import RecordingObserver, VirtualClock, run_virtual
from glassbus.transport import DeadLetterFilter, DeadLetterRecord, Hold, SubscriptionSpec
from glassbus.transport.sqlite import SqliteTransport
from glassbus.transport.sqlite.store import Store

#: Seconds within which what must come has come: virtual ones, and real ones on a busy machine.
SOON_S = 5.0
SOON_FOR_REAL_S = 60.0
REPORT = ErrorReport(
    error_id="e-1",
    timestamp=1.0,
    category=ErrorCategory.TIMEOUT_ERROR,
    severity=ErrorSeverity.HIGH,
    message="it went wrong",
    exception_type="TimeoutError",
    fingerprint="f-1",
)


class Ears:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.recorder = RecordingObserver()
        self.state = self.recorder.on_fact
        self.holds: list[tuple[str, Hold]] = []
        self.errors: list[BaseException] = []

    def held(self, subscription: str, hold: Hold, /) -> None:
        self.holds.append((subscription, hold))

    def broken(self, error: BaseException, /) -> None:
        self.errors.append(error)


class FaultyStore(Store):
    """A store whose commits and openings fail as `plan` says, one entry each; None lets one through.

    "lost" fails without storing, "kept" stores and then fails, as an interrupted sync
    does; any exception is raised instead of committing.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path, durability="process", **options)
        self.plan: list[str | Exception | None] = []
        self.openings: list[Exception | None] = []
        self.commits = 0

    def commit(self) -> None:
        self.commits += 1
        fault = self.plan.pop(0) if self.plan else None
        if fault == "lost":
            self.rollback()
            raise apsw.IOError("IOError: disk I/O error (injected)")
        if isinstance(fault, Exception):
            raise fault
        super().commit()
        if fault == "kept":
            raise apsw.IOError("IOError: disk I/O error (injected)")

    def open(self) -> None:
        fault = self.openings.pop(0) if self.openings else None
        if fault is not None:
            raise fault
        super().open()


class Desk:
    """One open transport and short words for what tests do with it."""

    def __init__(self, path: Path, clock: Clock, **options: Any) -> None:
        self.path = path
        self.clock = clock
        self.ears = Ears()
        options.setdefault("durability", "process")
        self.transport = SqliteTransport(path, clock=clock, **options)
        self._ids = itertools.count(1)

    async def open(self) -> Desk:
        await self.transport.open(self.ears)
        return self

    async def declare(self, name: str = "s", pattern: str = "orders.*", consume: bool = True, **spec: Any) -> Hold:
        spec.setdefault("capacity", 1000)
        return await self.transport.declare(SubscriptionSpec(name, pattern, **spec), consume=consume)

    def envelope(self, **fields: Any) -> Envelope:
        fields.setdefault("id", f"{id(self):x}-{next(self._ids)}")
        fields.setdefault("topic", "orders.created")
        fields.setdefault("body", b"{}")
        fields.setdefault("published_at", self.clock.wall())
        return Envelope(codec="json", headers={}, **fields)

    async def publish(self, *bodies: bytes, wait_s: float = 0.0, **fields: Any) -> Any:
        batch = [self.envelope(body=body, **fields) for body in bodies or (b"{}",)]
        stored = await self.transport.publish(batch, wait_s)
        return stored[0] if len(stored) == 1 else stored

    async def claim(self, name: str = "s", within_s: float = 0.0) -> Delivery:
        """The next delivery, which must come soon."""
        async with asyncio.timeout(within_s or (SOON_FOR_REAL_S if isinstance(self.clock, SystemClock) else SOON_S)):
            return await self.transport.claim(name)

    async def nothing(self, name: str = "s", within_s: float = 1.0) -> None:
        """Assert that nothing can be claimed for a while."""
        claiming = asyncio.ensure_future(self.transport.claim(name))
        await asyncio.sleep(within_s)
        assert not claiming.done(), f"claimed {claiming.result()!r}"
        claiming.cancel()
        await asyncio.gather(claiming, return_exceptions=True)

    async def settle(self, delivery: Delivery, state: State = State.HANDLED, **decision: Any) -> bool:
        answers: list[bool] = []
        decision.setdefault("attempt", delivery.attempt)
        if state is State.DEAD_LETTERED:
            decision = {"report": REPORT, "reason": "attempts_spent", **decision}
        self.transport.settle(delivery, Decision(state, **decision), lambda _d, _s, ok: answers.append(ok))
        await self.transport.flush()
        assert len(answers) == 1
        return answers[0]

    async def dead_letters(self, **wanted: Any) -> list[DeadLetterRecord]:
        return await self.transport.dead_letters(DeadLetterFilter(**wanted), 1000)

    def account(self, name: str = "s") -> Account:
        return self.transport.ledger().accounts[name]

    def stated(self) -> list[str]:
        return self.ears.recorder.names()

    async def proven(self) -> None:
        """Every row is where the ledger says."""
        audit = await self.transport.audit()
        assert audit.ok, audit.problems
        assert audit.ledger == audit.recounted
        assert not self.ears.errors

    def die(self) -> None:
        """What a SIGKILL leaves: rows in flight, and a lock that the system has dropped."""
        lock = self.transport._member._lock
        assert lock is not None
        lock.forsake()
        self.transport._writer.abandon()
        self.transport._writer.join(10.0)

    async def close(self) -> int:
        return (await self.transport.close(30.0))[0]


def play(scenario: Callable[[VirtualClock], Awaitable[None]], **options: Any) -> None:
    """Run `scenario` in virtual time."""

    async def run(clock: VirtualClock) -> None:
        await scenario(clock)

    run_virtual(run, **options)


def peek(path: Path, sql: str, *values: Any) -> list[Any]:
    """Ask or change the file behind the transport's back."""
    with closing(apsw.Connection(str(path))) as connection:
        return connection.execute(sql, values).fetchall()
