"""One file of the local spool: messages in the order they came, kept by the SQLite transport.

The file is a Glassbus store with one subscription, so all that is proved of such a store (commits on disk, kills,
full disks, damage) holds for the spool, and `glassbus dlq --url` shows what could not be forwarded. One process has a
file at a time: the lock beside it says who, and falls when that process dies.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import msgspec

from glassbus.clock import Clock
from glassbus.config import Overflow
from glassbus.errors import ErrorReport, PublishRejected, StoreReadOnly, TransportError
from glassbus.facts import Delivery, Fact, TransportFailed, TransportRecovered
from glassbus.message import Envelope
from glassbus.policy.delivery import Decision, State
from glassbus.transport import Hold, Stored, SubscriptionSpec
from glassbus.transport.locating import SPOOL as SPOOL
from glassbus.transport.sqlite import SqliteTransport
from glassbus.transport.sqlite.books import Held

#: Carries what the spool's own order must not see: priority, key, times and whether to remember the id.
_HEADER = "glassbus-spool"
_ENDLESS = 2**31


class SpoolLock:
    """The lock of one spool file, held until `release`, or until the process dies."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _locks.add(self)

    @classmethod
    def take(cls, path: Path) -> SpoolLock | None:
        """None when another process, or another bus of this one, has it. Raises OSError."""
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        """Idempotent. In a forked child this leaves the parent's lock alone."""
        descriptor, self._descriptor = self._descriptor, -1
        _locks.discard(self)
        if descriptor >= 0:
            os.close(descriptor)


# A forked child shares the lock: it must let go, or it would keep a dead parent's spool from being adopted.
_locks: weakref.WeakSet[SpoolLock] = weakref.WeakSet()


def _after_fork() -> None:
    for lock in list(_locks):
        lock.release()


os.register_at_fork(after_in_child=_after_fork)


#: Told of a file that cannot go on, and why.
Broken = Callable[["SpoolFile", BaseException], None]


class SpoolFile:
    """One file, open. Belongs to the loop, except `waiting` and `bytes`, which any thread may read."""

    def __init__(self, path: Path, lock: SpoolLock, clock: Clock) -> None:
        self.path = path
        self.name = path.name.removesuffix(".db")
        #: Messages that wait, those on their way into the file included; `bytes` also counts what was set aside.
        self.bytes = 0
        self.broken: BaseException | None = None
        self._lock = lock
        self._store = SqliteTransport(path, clock=clock)
        self._stored = 0
        self._reserved = 0
        # What a dead process had taken comes first, one by one; until that is over, so is everything.
        self._one_by_one = True

    @property
    def waiting(self) -> int:
        return self._stored + self._reserved

    @property
    def store(self) -> SqliteTransport:
        """For its dead letters."""
        return self._store

    async def open(self, state: Callable[[Fact], None], broken: Broken) -> None:
        """Raises StoreCorrupt and the like, StoreReadOnly, or TransportError."""
        try:
            await self._store.open(_Listener(self, state, broken))
            spec = SubscriptionSpec(SPOOL, ">", _ENDLESS, overflow=Overflow(displace=False, expand=1.0))
            await self._store.declare(spec, consume=True)
            await self.count_bytes()
            self.recount()
        except BaseException:
            await self.close(0.0)
            raise

    async def close(self, deadline_s: float) -> None:
        try:
            await self._store.close(deadline_s)
        finally:
            self._lock.release()

    def recount(self) -> int:
        """Count what the file holds; how many of it are ready to be taken."""
        account = self._store.ledger().accounts[SPOOL]
        self._stored = account.pending + account.in_flight
        return account.ready

    async def count_bytes(self) -> None:
        self.bytes = await self._store.body_bytes()

    async def add(self, batch: Sequence[Envelope]) -> Sequence[Stored]:
        """Append a batch: all of it, or nothing. Raises what `Transport.publish` does; there is always room here."""
        size = sum(len(envelope.body) for envelope in batch)
        self._reserved += len(batch)
        self.bytes += size
        try:
            stored = await self._store.publish([_wrap(envelope) for envelope in batch], 0.0)
        except BaseException as error:
            if isinstance(error, PublishRejected):
                self.bytes -= size
            raise
        finally:
            self._reserved -= len(batch)
        self._stored += sum(not one.duplicate for one in stored)
        return stored

    async def take(self, most: int) -> list[Delivery]:
        """The next messages in order, at most `most`; none when nothing waits. Each must be ended by one of the next
        three before more are taken."""
        ready = self.recount()
        count = min(ready, 1 if self._one_by_one else most)
        if not count:
            return []
        # As many claims as there are messages: none is left waiting, to be cancelled with what it was just given.
        taken = list(await asyncio.gather(*(self._store.claim(SPOOL) for _ in range(count))))
        self._one_by_one = bool(taken[0].redelivered)
        taken.sort(key=lambda delivery: cast(Held, delivery.handle).id)
        return taken

    async def forwarded(self, taken: Sequence[Delivery]) -> None:
        """They have reached the broker: forget them."""
        await self._settle([(one, Decision(State.HANDLED, one.attempt)) for one in taken])
        self._stored -= len(taken)
        self.bytes -= sum(len(one.envelope.body) for one in taken)

    async def give_back(self, taken: Sequence[Delivery]) -> None:
        """They have not: each waits again in its old place."""
        await self._settle([(one, Decision(State.READY, one.attempt - 1)) for one in taken])

    async def set_aside(self, one: Delivery, report: ErrorReport) -> None:
        """The broker will never take it: it rests as a dead letter of the spool."""
        decision = Decision(State.DEAD_LETTERED, one.attempt, report=report, reason="not_retryable")
        await self._settle([(one, decision)])
        self._stored -= 1

    async def _settle(self, settlements: Sequence[tuple[Delivery, Decision]]) -> None:
        for delivery, decision in settlements:
            self._store.settle(delivery, decision, _recorded)
        await self._store.flush()


def _recorded(delivery: Delivery, decision: Decision, accepted: bool, /) -> None:
    """Nobody else may settle it: the file is ours alone."""


def _wrap(envelope: Envelope) -> Envelope:
    """`envelope` so that the store keeps it in plain order of arrival, with what was left out in a header."""
    kept = (envelope.priority, envelope.key, envelope.due_at, envelope.expires_at)
    return Envelope(
        envelope.id,
        envelope.topic,
        envelope.body,
        envelope.codec,
        {**envelope.headers, _HEADER: msgspec.json.encode(kept).decode()},
        published_at=envelope.published_at,
        remember=envelope.remember,
    )


def unwrap(envelope: Envelope) -> Envelope:
    """The message as it was published."""
    headers = dict(envelope.headers)
    kept = headers.pop(_HEADER, None)
    if kept is None:  # put there by somebody else
        return envelope
    priority, key, due_at, expires_at = msgspec.json.decode(kept, type=tuple[int, str | None, float, float])
    return msgspec.structs.replace(
        envelope, headers=headers, priority=priority, key=key, due_at=due_at, expires_at=expires_at, remember=True
    )


class _Listener:
    """Failures of the file are told; what its one subscription goes through is the spool's own affair."""

    def __init__(
        self, file: SpoolFile, state: Callable[[Fact], None], broken: Callable[[SpoolFile, BaseException], None]
    ) -> None:
        self._file = file
        self._state = state
        self._broken = broken

    def state(self, fact: Fact, /) -> None:
        if isinstance(fact, TransportFailed):
            self._state(msgspec.structs.replace(fact, operation=f"spool {fact.operation}"))
        elif isinstance(fact, TransportRecovered):
            self._state(fact)

    def held(self, subscription: str, hold: Hold, /) -> None:
        """Nobody pauses a spool."""

    def broken(self, error: BaseException, /) -> None:
        self._file.broken = error
        self._broken(self._file, error)


def take_files(folder: str, bus: str, clock: Clock) -> list[SpoolFile]:
    """The spool files of bus `bus` that no other process has, oldest first, and at least one.

    Those of dead processes are among them. Raises StoreReadOnly or TransportError.
    """
    place = Path(folder)
    pattern = re.compile(rf"spool-{re.escape(bus)}-(\d+)\.db")
    taken: list[tuple[int, SpoolLock]] = []
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        numbers = sorted(int(m[1]) for path in place.iterdir() if (m := pattern.fullmatch(path.name)))
        fresh = next(n for n in range(len(numbers) + 1) if n not in numbers)
        for number in numbers:
            lock = SpoolLock.take(_lock_path(place, bus, number))
            if lock is not None:
                taken.append((number, lock))
        while not taken:
            lock = SpoolLock.take(_lock_path(place, bus, fresh))
            if lock is not None:
                taken.append((fresh, lock))
            fresh += 1
    except OSError as error:
        for _, lock in taken:
            lock.release()
        if isinstance(error, PermissionError | FileExistsError | NotADirectoryError):
            raise StoreReadOnly(f"no spool can be kept in {folder}: {error.strerror}; make it writable") from error
        raise TransportError(f"no spool can be kept in {folder}: {error.strerror}") from error
    return [SpoolFile(place / f"spool-{bus}-{number}.db", lock, clock) for number, lock in taken]


def spooled_files(folder: Path) -> list[Path]:
    """The spool files of every bus in `folder`, whoever has them."""
    return sorted(path for path in folder.glob("spool-*.db") if re.fullmatch(r"spool-.+-\d+\.db", path.name))


def _lock_path(place: Path, bus: str, number: int) -> Path:
    return place / f"spool-{bus}-{number}.lock"
