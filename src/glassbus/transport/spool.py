"""Store and forward: what is published while the broker is away is kept in a local file, and forwarded in order.

It stands before a broker's transport and passes everything on, but for publishes. One that finds the
connection down, or fails on it, or finds messages still waiting before it, goes into the spool; its
receipt says `disk`. Each message keeps its id, so the broker recognises what it had stored after all.

    publish --> nothing waits, connection up --> broker --> stored
                     |                             |
                     |                             +- refused: raised       +- unreachable, or nobody knows
                     +------------> spool file <----------------------------+
                                        |
                                        +- connection back --> broker, in order --> forgotten
                                                                 +- never to be taken: set aside, a dead letter
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from glassbus.classification import classify
from glassbus.clock import Clock
from glassbus.config import Address, Spool
from glassbus.errors import (
    EndpointUnreachable,
    ErrorReport,
    GlassbusError,
    InvalidMessage,
    MessageConflict,
    PublishRejected,
    PublishUncertain,
    SpoolFull,
    TransportError,
    UnknownDeadLetter,
    safe_text,
)
from glassbus.facts import (
    AttemptFailed,
    Delivery,
    DeliveryDeadLettered,
    MessageUnrouted,
    SpoolForwarded,
    transport_failed,
)
from glassbus.message import Envelope, Level
from glassbus.policy.ledger import Audit
from glassbus.policy.routing import destination, matches
from glassbus.transport import (
    DeadLetterFilter,
    DeadLetterRecord,
    Listener,
    Locates,
    Stored,
    Supervise,
    Supervisor,
    Transport,
    Whereabouts,
)
from glassbus.transport.locating import together
from glassbus.transport.spoolfile import SPOOL, SpoolFile, take_files, unwrap
from glassbus.transport.wrapper import TransportWrapper

#: Forwarded at once; the broker takes all of them or none.
BATCH = 64
#: With so few left to forward, a publish waits for them instead of going behind them, so that the spool runs empty.
_NEARLY_DONE = 4 * BATCH
_WAIT_S = 5.0
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)
#: A message that the broker refuses for no reason we know is set aside after so many tries.
_TRIES_MAX = 5
_MARK = "spool:"


class SpoolingTransport(TransportWrapper):
    """A broker's transport with a local spool before it. See the port for what each method promises.

    `make` makes the broker's transport, given how to supervise its connection. Files are in `folder`, named for `bus`.
    `features` are the broker's: a receipt from the spool tells its own level. Dead letters of the spool have ids
    that begin with "spool:", and are listed before the broker's.
    """

    def __init__(
        self,
        make: Callable[[Supervise], Transport],
        supervise: Supervise,
        settings: Spool,
        *,
        folder: str,
        bus: str,
        clock: Clock,
    ) -> None:
        self._supervise = supervise
        self._link: Supervisor | None = None
        self._endpoint = ""
        super().__init__(make(self._watch))
        self._settings = settings
        self._folder = folder
        self._bus = bus
        self._clock = clock
        self._files: list[SpoolFile] = []
        self._listener: Listener
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._forwarder: asyncio.Task[None] | None = None
        self._patterns: tuple[float, dict[str, str]] = (float("-inf"), {})
        self._tries: tuple[str, int] = ("", 0)
        self._open = False

    def _watch(self, addresses: Sequence[Address], listener: Listener) -> Supervisor:
        self._link = self._supervise(addresses, listener)
        self._endpoint = ", ".join(map(str, addresses))
        return self._link

    def _up(self) -> bool:
        return self._link is None or self._link.up()

    def spooled(self) -> int:
        """Messages that wait to be forwarded. May be called on any thread."""
        return sum(file.waiting for file in self._files)

    # Opening and closing

    async def open(self, listener: Listener, /) -> None:
        self._listener = listener
        self._files = take_files(self._folder, self._bus, self._clock)
        try:
            for file in self._files:
                await file.open(listener.state, self._broken)
            await self._inner.open(listener)
        except BaseException:
            await self._close_files(1.0)
            raise
        self._open = True
        self._look()
        self._forwarder = asyncio.create_task(self._forward_for_ever(), name="glassbus-spool")

    async def close(self, deadline_s: float, /) -> tuple[int, int]:
        """What still waits in the spool stays there for the next start; it is forwarded first if that takes no time."""
        if not self._open:
            return await self._inner.close(deadline_s)
        self._open = False
        until = self._clock.monotonic() + deadline_s
        if self._up() and self.spooled():
            await self._run_empty(min(1.0, deadline_s / 4))
        if self._forwarder is not None:
            self._forwarder.cancel()
            await asyncio.wait({self._forwarder}, timeout=1.0)
        try:
            return await self._inner.close(max(0.1, until - self._clock.monotonic() - 0.5))
        finally:
            await self._close_files(max(0.5, until - self._clock.monotonic()))

    async def _close_files(self, deadline_s: float) -> None:
        for file in self._files:
            await file.close(deadline_s)

    def _broken(self, file: SpoolFile, error: BaseException) -> None:
        """A file cannot go on. With messages in it, that were accepted, neither can the bus."""
        if file.waiting:
            self._listener.broken(error)
        else:
            self._listener.state(transport_failed(self._clock.wall(), "spool", error))

    # Publishing

    async def publish(self, batch: Sequence[Envelope], /, wait_s: float) -> Sequence[Stored]:
        waiting = self.spooled()
        if waiting and wait_s and waiting <= _NEARLY_DONE and self._up():
            await self._run_empty(min(wait_s, 1.0))
            waiting = self.spooled()
        if waiting or not self._up():
            return await self._spool(batch, None)
        try:
            return await self._inner.publish(batch, wait_s)
        except (TransportError, PublishUncertain) as error:
            return await self._spool(batch, error)

    def publish_now(self, envelope: Envelope, /) -> Stored | None:
        return None if self.spooled() or not self._up() else self._inner.publish_now(envelope)

    async def _spool(self, batch: Sequence[Envelope], because: Exception | None) -> Sequence[Stored]:
        """`because`: why the broker may or may not have stored it already."""
        file = self._files[0]
        try:
            self._check_room(file, batch)
            stored = await file.add(batch)
        except (PublishRejected, TransportError) as error:
            if because is not None and not isinstance(error, MessageConflict):
                raise because from error  # it is not certain that nothing was stored
            raise
        self._look()
        return [
            Stored(self._routes(envelope.topic), one.duplicate, Level.DISK)
            for envelope, one in zip(batch, stored, strict=True)
        ]

    def _check_room(self, file: SpoolFile, batch: Sequence[Envelope]) -> None:
        if file.broken is not None:
            raise EndpointUnreachable(f"there is no connection to {self.address}, and its spool is broken")
        waiting, size = self.spooled(), sum(f.bytes for f in self._files)
        most, most_bytes = self._settings.max_messages, self._settings.max_bytes
        if waiting + len(batch) > most or size + sum(len(envelope.body) for envelope in batch) > most_bytes:
            raise SpoolFull(
                f"{self.address} cannot be reached, and its spool is full ({waiting} messages of at most {most}, "
                f"{size} bytes of at most {most_bytes}); publish again when the connection is back"
            )

    def _routes(self, topic: str) -> tuple[str, ...]:
        """The subscriptions that want `topic`, as far as is known here."""
        return tuple(name for name, pattern in self._known().items() if matches(pattern, topic))

    def _known(self) -> dict[str, str]:
        now = self._clock.monotonic()
        read_at, patterns = self._patterns
        if now - read_at >= 1.0 or now < read_at:
            try:
                patterns = {name: state.spec.pattern for name, state in self._inner.queues().items()}
            except TransportError as error:  # the broker is away: what was known before is still the best answer
                self._listener.state(transport_failed(self._clock.wall(), "queues", error))
            self._patterns = (now, patterns)
        return patterns

    # Forwarding

    def _look(self) -> None:
        """Wake the forwarder when something waits, and those who wait until nothing does."""
        if self.spooled():
            self._filled.set()
            self._drained.clear()
        else:
            self._filled.clear()
            self._drained.set()

    async def _run_empty(self, within_s: float) -> None:
        waiting = asyncio.ensure_future(self._drained.wait())
        try:
            await asyncio.wait({waiting}, timeout=within_s)
        finally:
            waiting.cancel()

    async def _forward_for_ever(self) -> None:
        failures = 0
        while True:
            await self._filled.wait()
            if self._link is not None:
                await self._link.connected()
            try:
                await self._forward_some()
                failures = 0
            except Exception as error:  # noqa: BLE001 - whatever it is, what waits must go on being tried
                if not isinstance(error, GlassbusError):
                    self._listener.state(transport_failed(self._clock.wall(), "forward", error))
                await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
                failures += 1
            self._look()

    async def _forward_some(self) -> None:
        """Forward what comes next. Raises what kept it from the broker; it then waits in its place."""
        for file in [*self._files[1:], self._files[0]]:  # what dead processes left is older
            left = await file.take(BATCH)
            if left:
                try:
                    await self._forward(file, left)
                finally:
                    await file.give_back(left)
                return

    async def _forward(self, file: SpoolFile, left: list[Delivery]) -> None:
        """What is done is taken off `left`."""
        with contextlib.suppress(PublishRejected):  # one of them, perhaps: it is found below, and holds up nobody else
            await self._hand_over(file, left, len(left))
        while left:
            try:
                await self._hand_over(file, left, 1)
            except PublishRejected as error:
                await self._judge(file, left[0], error)
                del left[0]

    async def _hand_over(self, file: SpoolFile, left: list[Delivery], count: int) -> None:
        taken = left[:count]
        batch = [unwrap(delivery.envelope) for delivery in taken]
        stored = await self._inner.publish(batch, _WAIT_S)
        await file.forwarded(taken)
        del left[:count]
        for envelope, one in zip(batch, stored, strict=True):
            if not one.subscriptions and not one.duplicate:
                self._listener.state(
                    MessageUnrouted(
                        at=self._clock.wall(),
                        envelope=envelope,
                        destination=destination(envelope.topic, self._known().values()),
                        duration_s=max(0.0, self._clock.wall() - envelope.published_at),
                    )
                )
        self._listener.state(
            SpoolForwarded(at=self._clock.wall(), endpoint=self._endpoint, messages=count, remaining=self.spooled())
        )

    async def _judge(self, file: SpoolFile, one: Delivery, error: PublishRejected) -> None:
        """A message was refused: set it aside when that will not change. Raises `error` when it may."""
        known, tries = self._tries
        tries = tries + 1 if known == one.envelope.id else 1
        self._tries = (one.envelope.id, tries)
        final = isinstance(error, InvalidMessage | MessageConflict)
        if not final and (type(error) is not PublishRejected or tries < _TRIES_MAX):
            raise error
        envelope = unwrap(one.envelope)
        category, severity = classify(error)
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        report = ErrorReport(
            error_id=secrets.token_hex(8),
            timestamp=self._clock.wall(),
            category=category,
            severity=severity,
            message=safe_text(error),
            exception_type=kind,
            context={"message_id": envelope.id, "topic": envelope.topic, "spool": file.name},
            fingerprint=hashlib.sha256(f"spool:{kind}".encode()).hexdigest()[:16],
            component="endpoint",
        )
        await file.set_aside(one, report)
        label = destination(envelope.topic, self._known().values())
        delivery = Delivery(envelope, SPOOL, label, one.attempt)
        now = self._clock.wall()
        self._listener.state(AttemptFailed(at=now, delivery=delivery, report=report, duration_s=0.0))
        self._listener.state(DeliveryDeadLettered(at=now, delivery=delivery, report=report, reason="not_retryable"))

    # Dead letters: the spool's, then the broker's

    def _sources(self) -> list[tuple[str, Transport]]:
        """Each with the mark that its ids carry here."""
        return [*((f"{_MARK}{file.name}:", file.store) for file in self._files), ("", self._inner)]

    async def dead_letters(self, wanted: DeadLetterFilter, limit: int, /) -> list[DeadLetterRecord]:
        place = wanted.id or wanted.before or ""
        found: list[DeadLetterRecord] = []
        reached = not place
        for mark, source in self._sources():
            own = None
            if not reached and place.startswith(mark):
                reached, own = True, place.removeprefix(mark)
            if not reached or len(found) >= limit:
                continue
            asked = msgspec.structs.replace(
                wanted, id=own if wanted.id is not None else None, before=own if wanted.before is not None else None
            )
            found += [_marked(record, mark) for record in await source.dead_letters(asked, limit - len(found))]
            if wanted.id is not None:
                break
        return found

    async def locate(self, message_id: str, /) -> Whereabouts | None:
        """In the spool, under its one subscription, or where the broker has it."""
        sources = [(mark, source) for mark, source in self._sources() if isinstance(source, Locates)]
        return together([(mark, await source.locate(message_id)) for mark, source in sources])

    async def ids_like(self, beginning: str, limit: int, /) -> list[str]:
        sources = [source for _, source in self._sources() if isinstance(source, Locates)]
        return sorted({one for source in sources for one in await source.ids_like(beginning, limit)})[:limit]

    async def replay(self, ids: Sequence[str], /) -> list[DeadLetterRecord]:
        moved = await self._on_each(ids, lambda source, own: source.replay(own))
        self._look()
        return moved

    async def discard(self, ids: Sequence[str], /) -> list[DeadLetterRecord]:
        removed = await self._on_each(ids, lambda source, own: source.discard(own))
        for file in self._files:
            await file.count_bytes()
        return removed

    async def _on_each(
        self, ids: Sequence[str], work: Callable[[Transport, Sequence[str]], Awaitable[list[DeadLetterRecord]]]
    ) -> list[DeadLetterRecord]:
        """Do `work` where the dead letters are, the broker first: if it knows one of them not, nothing was done."""
        for one in ids:
            if one.startswith(_MARK) and not await self.dead_letters(DeadLetterFilter(id=one), 1):
                raise UnknownDeadLetter(f"no dead letter {one!r}")
        done: list[DeadLetterRecord] = []
        for mark, source in reversed(self._sources()):
            own = [one.removeprefix(mark) for one in ids if one.startswith(mark or _MARK) is bool(mark)]
            if own:
                done += [_marked(record, mark) for record in await work(source, own)]
        for file in self._files:
            file.recount()
        return done

    # What tells of both

    async def flush(self) -> None:
        """Also waits a while for the spool to run empty, if the connection is up."""
        await self._inner.flush()
        if self._open and self._up() and self.spooled():
            await self._run_empty(_WAIT_S)

    async def audit(self) -> Audit:
        """The broker's, with what is wrong in the spool besides."""
        audit = await self._inner.audit()
        problems = [
            f"{file.name}: {problem}" for file in self._files for problem in (await file.store.audit()).problems
        ]
        return msgspec.structs.replace(audit, problems=(*audit.problems, *problems))

    def disk_free_bytes(self) -> int | None:
        """Where the spool is."""
        return self._files[0].store.disk_free_bytes() if self._files else self._inner.disk_free_bytes()


def _marked(record: DeadLetterRecord, mark: str) -> DeadLetterRecord:
    if not mark:
        return record
    return msgspec.structs.replace(record, id=f"{mark}{record.id}", envelope=unwrap(record.envelope))
