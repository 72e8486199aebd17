"""The SQLite transport as the bus sees it, on its event loop."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from glassbus.clock import Clock
from glassbus.errors import BusNotRunning, ConfigurationError, TransportError
from glassbus.facts import Delivery
from glassbus.message import Envelope, Level
from glassbus.policy.delivery import Decision, State
from glassbus.policy.ledger import Audit, Ledger
from glassbus.transport import (
    DeadLetterFilter,
    DeadLetterRecord,
    Features,
    Forced,
    Hold,
    Listener,
    QueueState,
    Recorded,
    Stored,
    SubscriptionSpec,
    Whereabouts,
)
from glassbus.transport.sqlite import admin
from glassbus.transport.sqlite.membership import Membership
from glassbus.transport.sqlite.owners import LEASE_S
from glassbus.transport.sqlite.reading import Reader
from glassbus.transport.sqlite.requests import (
    Answers,
    Call,
    Claim,
    Close,
    Flush,
    Publish,
    Remember,
    Request,
    Settlement,
)
from glassbus.transport.sqlite.store import Store, disk_free
from glassbus.transport.sqlite.transaction import Transaction
from glassbus.transport.sqlite.writer import Writer

#: Free disk space below which nothing new is accepted, so that acknowledgements stay possible; in bytes.
RESERVE_BYTES = 32 * 1024 * 1024

Result = TypeVar("Result")
Durability = Literal["disk", "process"]


class SqliteTransport:
    """The transport of `sqlite:///path`. See the port for what each method promises.

    Several processes may have one file open: each is an owner of the deliveries it
    claims, until it settles them, closes, dies, or gives no sign for `lease_s` seconds.
    Use a local disk, and leave the file and its `-wal`, `-shm` and `-owners` alone while it is open. A
    forked child must open a transport of its own; using its parent's raises TransportError.

    `durability`: "disk" syncs each commit, "process" survives a killed process but not
    power loss. `boot_id` is for tests that play a restart of the machine.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        clock: Clock,
        durability: Durability = "disk",
        free_space_reserve_bytes: int = RESERVE_BYTES,
        lease_s: float = LEASE_S,
        busy_timeout_s: float = 5.0,
        boot_id: str | None = None,
        ask_free_space: Callable[[str], int] = disk_free,
        store: Store | None = None,
    ) -> None:
        if durability not in ("disk", "process"):
            raise ConfigurationError(f"durability must be 'disk' or 'process', not {durability!r}")
        if not os.fspath(path):
            raise ConfigurationError("a sqlite URL needs a path: sqlite:///path/to/file.db")
        if lease_s <= 0 or busy_timeout_s <= 0 or free_space_reserve_bytes < 0:
            raise ConfigurationError(
                "lease_s and busy_timeout_s must be more than 0, free_space_reserve_bytes 0 or more"
            )
        level = Level.DISK if durability == "disk" else Level.PROCESS
        self.features = Features(durable=True, multi_process=True, level=level, ladder=True)
        self.address = f"sqlite:///{os.fspath(path)}"
        self._place = os.fspath(path)
        #: Free disk space below which nothing new is accepted.
        self.reserve_bytes = free_space_reserve_bytes
        self._clock = clock
        self._store = store or Store(path, durability, busy_timeout_s)
        self._member = Membership(lease_s=lease_s, boot=boot_id)
        self._writer = Writer(
            self._store,
            clock,
            self._member,
            self._post,
            lambda: self._loop.is_closed(),
            reserve_bytes=free_space_reserve_bytes,
            ask_space=ask_free_space,
        )
        self._reader: Reader | None = None
        self._listener: Listener
        self._loop: asyncio.AbstractEventLoop
        self._process = 0
        self._waking = False
        self._state: Literal["new", "open", "closed"] = "new"
        self._last: tuple[Ledger, dict[str, QueueState]] | None = None

    @property
    def may_grow(self) -> bool:
        """Whether full queues may grow for publishers of this process. Any thread."""
        return self._writer.may_grow

    @may_grow.setter
    def may_grow(self, allowed: bool) -> None:
        self._writer.may_grow = allowed

    # Opening and closing

    async def open(self, listener: Listener, /) -> None:
        if self._state != "new":
            raise TransportError(f"{self.address} was opened before; make a new transport")
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._process = os.getpid()
        self._state = "open"
        opened: asyncio.Future[None] = self._loop.create_future()
        self._writer.start(opened)
        try:
            await opened
        except asyncio.CancelledError:
            self._state = "closed"
            self._writer.abandon()
            raise
        except BaseException:
            self._state = "closed"
            raise
        self._reader = Reader(str(self._store.path), self._store.name, self._clock.wall)

    async def close(self, deadline_s: float, /) -> tuple[int, int]:
        if self._state != "open" or self._process != os.getpid():
            return 0, 0
        self._state = "closed"
        closed: asyncio.Future[int] = self._loop.create_future()
        self._put(Close(closed))
        try:
            await asyncio.wait({closed}, timeout=max(0.0, deadline_s))
        finally:
            if not closed.done():
                self._writer.abandon()
        if self._reader is not None:
            reader, self._reader = self._reader, None
            self._last = await self._loop.run_in_executor(None, _last_look, reader)
        self._writer.join(1.0)
        return (closed.result() if closed.done() else 0), 0

    def _check(self) -> None:
        if self._state != "open":
            raise TransportError(f"{self.address} is not open")
        if self._process != os.getpid():
            raise TransportError(
                f"{self.address} was opened by process {self._process}; a forked child must open a bus of its own"
            )

    # Requests to the writer, and its answers

    def _put(self, request: Request) -> None:
        """Hand `request` over, and wake the writer once this turn of the loop is over.

        So what one turn brings goes into one commit: a settlement and the next claim of the
        same slot, and all that the last answers set going.
        """
        self._writer.put(request)
        if not self._waking:
            self._waking = True
            try:
                self._loop.call_soon(self._wake)
            except RuntimeError:  # the loop is closed, and takes nothing more
                self._wake()

    def _wake(self) -> None:
        self._waking = False
        self._writer.mailbox.wake()

    def _post(self, answers: Answers) -> bool:
        """Take answers to the loop. On the writer's thread; False when the loop is closed."""
        try:
            self._loop.call_soon_threadsafe(self._deliver, answers)
        except RuntimeError:
            return False
        return True

    def _deliver(self, answers: Answers) -> None:
        for fact in answers.facts:
            self._listener.state(fact)
        for name, hold in answers.holds:
            self._listener.held(name, hold)
        self._tell(answers.recorded, accepted=True)
        self._tell(answers.refused, accepted=False)
        for claimer, delivery in zip(answers.claimers, answers.deliveries, strict=True):
            if claimer.done():  # cancelled
                self._give_back(delivery)
            else:
                claimer.set_result(delivery)
        for publisher, stored in zip(answers.publishers, answers.stored, strict=True):
            if not publisher.done():
                publisher.set_result(stored)
        for future, result in answers.results:
            if not future.done():
                future.set_result(result)
        for future, failure in answers.failed:
            if not future.done():
                future.set_exception(failure)
        if answers.broken is not None:
            self._listener.broken(answers.broken)

    def _tell(self, settlements: Sequence[Settlement], *, accepted: bool) -> None:
        for settlement in settlements:
            try:
                settlement.recorded(settlement.delivery, settlement.decision, accepted)
            except Exception as error:  # noqa: BLE001 - the other answers must still be told
                self._loop.call_exception_handler({"message": "recorded() raised", "exception": error})

    # Subscriptions

    async def declare(self, spec: SubscriptionSpec, /, *, consume: bool) -> Hold:
        return await self._call(lambda txn: self._writer.declare(txn, spec, consume=consume))

    async def forget(self, name: str, /) -> int:
        return await self._call(lambda txn: admin.forget(txn, name))

    async def set_hold(self, name: str, /, *, paused: bool | None = None, forced: Forced | None = None) -> Hold:
        return await self._call(lambda txn: admin.set_hold(txn, name, paused, forced))

    def hold_back_low(self, name: str, held: bool, /) -> None:
        if self._state != "open" or self._process != os.getpid():
            return
        self._writer.hold_back_low(name, held)
        future: asyncio.Future[None] = self._loop.create_future()
        # A transaction now; should it fail, the next one does as well.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._put(Call(lambda txn: None, future))

    async def _call(self, work: Callable[[Transaction], Result]) -> Result:
        self._check()
        future: asyncio.Future[Result] = self._loop.create_future()
        self._put(Call(work, future))
        return await future

    # Publishing

    async def publish(self, batch: Sequence[Envelope], /, wait_s: float) -> Sequence[Stored]:
        if self._state != "open":
            raise BusNotRunning(f"{self.address} is not open; this message was not stored")
        self._check()
        future: asyncio.Future[Sequence[Stored]] = self._loop.create_future()
        now = self._clock.monotonic()
        request = Publish(batch, future, now, now + wait_s)
        self._put(request)
        try:
            return await future
        except asyncio.CancelledError:
            self._put(Remember(request))
            raise

    def publish_now(self, envelope: Envelope, /) -> Stored | None:
        """Never at once: a commit takes a sync of the disk."""
        return None

    # Claiming and settling

    def claim_now(self, name: str, /) -> Delivery | None:
        """Never at once: the attempt is counted by a commit."""
        return None

    async def claim(self, name: str, /) -> Delivery:
        self._check()
        future: asyncio.Future[Delivery] = self._loop.create_future()
        self._put(Claim(name, future))
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._give_back(future.result())  # it came, and we were cancelled before we could take it
            raise

    def _give_back(self, delivery: Delivery) -> None:
        decision = Decision(
            State.READY,
            delivery.attempt - 1,
            recovering=delivery.recovering,
            first_failed_at=delivery.first_failed_at,
        )
        self._put(Settlement(delivery, decision, _nobody_asks))

    def handled_now(self, delivery: Delivery, /) -> bool:
        return False

    def settle(self, delivery: Delivery, decision: Decision, recorded: Recorded, /) -> None:
        if self._process != os.getpid():
            recorded(delivery, decision, False)  # a forked child settles nothing of its parent's
            return
        self._put(Settlement(delivery, decision, recorded))

    async def flush(self) -> None:
        if self._state != "open":
            return
        self._check()
        future: asyncio.Future[None] = self._loop.create_future()
        self._put(Flush(future))
        await future

    # Looking

    def ledger(self) -> Ledger:
        if self._reader is None:
            return self._looked()[0]
        self._check()
        return self._reader.ledger()

    def queues(self) -> dict[str, QueueState]:
        if self._reader is None:
            return self._looked()[1]
        self._check()
        return self._reader.queues()

    def _looked(self) -> tuple[Ledger, dict[str, QueueState]]:
        """What the store held when it was closed."""
        if self._last is None:
            raise TransportError(f"{self.address} is not open")
        return self._last

    async def body_bytes(self) -> int:
        """The size of all payloads stored, dead letters included. Reads every message's header."""
        return await self._read(lambda reader: reader.body_bytes())

    async def audit(self) -> Audit:
        return await self._read(lambda reader: reader.audit())

    async def find(self, wanted: Sequence[tuple[str, str]], /) -> set[tuple[str, str]]:
        return await self._read(lambda reader: reader.find(wanted))

    async def locate(self, message_id: str, /) -> Whereabouts | None:
        now = self._clock.monotonic()
        return await self._read(lambda reader: reader.locate(message_id, now))

    async def ids_like(self, beginning: str, limit: int, /) -> list[str]:
        return await self._read(lambda reader: reader.ids_like(beginning, limit))

    async def dead_letters(self, wanted: DeadLetterFilter, limit: int, /) -> list[DeadLetterRecord]:
        return await self._read(lambda reader: reader.dead_letters(wanted, limit))

    async def _read(self, look: Callable[[Reader], Result]) -> Result:
        self._check()
        reader = self._reader
        if reader is None:
            raise TransportError(f"{self.address} is not open")
        return await self._loop.run_in_executor(None, look, reader)

    async def probe(self) -> float:
        started = time.perf_counter()
        await self._call(admin.probe)
        return time.perf_counter() - started

    def disk_free_bytes(self) -> int | None:
        try:
            return disk_free(os.path.dirname(self._place) or ".")  # noqa: PTH120 - a path or a name in this folder
        except OSError:
            return None  # the folder is gone: that is told elsewhere

    # Dead letters

    async def replay(self, ids: Sequence[str], /) -> list[DeadLetterRecord]:
        return await self._call(lambda txn: admin.replay(txn, ids))

    async def discard(self, ids: Sequence[str], /) -> list[DeadLetterRecord]:
        return await self._call(lambda txn: admin.discard(txn, ids))


def _nobody_asks(delivery: Delivery, decision: Decision, accepted: bool, /) -> None:
    """A delivery that nobody took goes back unseen."""


def _last_look(reader: Reader) -> tuple[Ledger, dict[str, QueueState]] | None:
    """What the store holds now, for those who ask after `close`."""
    try:
        return reader.ledger(), reader.queues()
    except TransportError:
        return None
    finally:
        reader.close()
