"""The JetStream transport as the bus sees it, on its event loop."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from glassbus.clock import Clock
from glassbus.config import Address, Credentials
from glassbus.errors import BusNotRunning, ConfigurationError, TransportError, UnknownDeadLetter
from glassbus.facts import Delivery, DeliveryDiscarded
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
    Supervise,
    Supervisor,
    Whereabouts,
)
from glassbus.transport.nats import looking
from glassbus.transport.nats import records as r
from glassbus.transport.nats.engine import Engine
from glassbus.transport.nats.model import Row, Unknown
from glassbus.transport.nats.requests import (
    Answers,
    Call,
    Claim,
    Close,
    Flush,
    Forsake,
    Publish,
    Request,
    Settlement,
)
from glassbus.transport.nats.rounds import nobody_asks, uncharged
from glassbus.transport.nats.stream import Place

Result = TypeVar("Result")

#: For how long a process that gives no sign keeps its deliveries, in seconds.
LEASE_S = 15.0
#: At most so many deliveries of a forgotten subscription have a fact each; its count tells of all.
FORGOTTEN_FACTS_MAX = 10_000

_NAME = re.compile(r"[A-Za-z0-9_\-]{1,64}")
_OPTIONS = ("level", "replicas", "max_bytes", "lease", "tls", "tls_ca")


#: How long a close waits for a lost connection, to store what was settled meanwhile, in seconds.
_RECONNECT_S = 3.0


class NatsTransport:
    """The transport of `nats://host:port/name`. See the port for what each method promises.

    A bus is one JetStream stream, `glassbus-name`; several processes may use it. Each is an owner of the
    deliveries it claims until it settles them, closes, or gives no sign for `lease_s` seconds.
    Several addresses are servers that serve the same stream. A forked child must open a transport of its own.

    JetStream acknowledges before it syncs its disk, so the level is `process`. `level` in the URL says
    otherwise on the operator's word: `disk` where the server runs with `sync_interval: always`, `quorum` where
    the stream has replicas as well.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        *,
        clock: Clock,
        supervise: Supervise,
        name: str = "default",
        lease_s: float | None = None,
    ) -> None:
        place, level, lease = _settings(addresses)
        self.features = Features(durable=True, multi_process=True, level=level, ladder=True)
        self.address = ",".join(str(address) for address in addresses)
        self._addresses = list(addresses)
        self._clock = clock
        self._engine = Engine(
            place,
            clock,
            self._post,
            lambda: self._loop.is_closed(),
            lease_s=lease if lease_s is None else lease_s,
            name=f"glassbus {name}",
        )
        self._supervise = supervise
        self._supervisor: Supervisor | None = None
        self._listener: Listener
        self._loop: asyncio.AbstractEventLoop
        self._process = 0
        self._waking = False
        self._state: Literal["new", "open", "closed"] = "new"

    # Opening and closing

    async def open(self, listener: Listener, /) -> None:
        if self._state != "new":
            raise TransportError(f"{self.address} was opened before; make a new transport")
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._process = os.getpid()
        self._state = "open"
        self._engine.start()
        self._supervisor = self._supervise(self._addresses, listener)
        try:
            await self._supervisor.start(_Line(self))
        except BaseException:
            self._state = "closed"
            try:
                await self._stop_supervising()
            finally:
                self._engine.abandon()
            raise

    async def _stop_supervising(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            await supervisor.stop()

    async def close(self, deadline_s: float, /) -> tuple[int, int]:
        if self._state != "open" or self._process != os.getpid():
            return 0, 0
        self._state = "closed"
        closed: asyncio.Future[int] = self._loop.create_future()
        self._put(Close(closed))
        if self._supervisor is not None and not self._supervisor.up():
            deadline_s = min(deadline_s, _RECONNECT_S)  # what is not stored comes back when our owner record ends
        try:
            await asyncio.wait({closed}, timeout=max(0.0, deadline_s))
        finally:
            try:
                await self._stop_supervising()
            finally:
                self._engine.abandon()
        self._engine.join(1.0)
        return (closed.result() if closed.done() else 0), 0

    def _check(self) -> None:
        if self._state != "open":
            raise TransportError(f"{self.address} is not open")
        if self._process != os.getpid():
            raise TransportError(
                f"{self.address} was opened by process {self._process}; a forked child must open a bus of its own"
            )

    # Requests to the thread, and its answers

    def _put(self, request: Request) -> None:
        """Hand `request` over, and wake the thread once this turn of the loop is over.

        So one entry takes what one turn brings.
        """
        self._engine.put(request)
        if not self._waking:
            self._waking = True
            try:
                self._loop.call_soon(self._wake)
            except RuntimeError:  # the loop is closed, and takes nothing more
                self._wake()

    def _wake(self) -> None:
        self._waking = False
        self._engine.mailbox.wake()

    def _post(self, answers: Answers) -> bool:
        """Take answers to the loop. On the thread; False when the loop is closed."""
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
        for claimer, delivery in answers.claimed:
            if claimer.done():  # cancelled
                self._give_back(delivery)
            else:
                claimer.set_result(delivery)
        for future, result in answers.results:
            if not future.done():
                future.set_result(result)
        for future, failure in answers.failed:
            if not future.done():
                future.set_exception(failure)
        if answers.lost is not None and self._supervisor is not None and self._state == "open":
            self._supervisor.lost(answers.lost)
        if answers.broken is not None and self._state == "open":
            self._listener.broken(answers.broken)

    def _tell(self, settlements: Sequence[Settlement], *, accepted: bool) -> None:
        for settlement in settlements:
            try:
                settlement.recorded(settlement.delivery, settlement.decision, accepted)
            except Exception as error:  # noqa: BLE001 - the other answers must still be told
                self._loop.call_exception_handler({"message": "recorded() raised", "exception": error})

    async def _run(self, make: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Have the thread do something beside its entries."""
        running = self._engine.run(make)
        answer = asyncio.wrap_future(running, loop=self._loop)
        # Added behind wrap_future's own callback, so the answer is on its way before time may move.
        running.add_done_callback(lambda _: self._engine.mailbox.end())
        return await answer

    async def _call(self, op: r.Op, finish: Callable[[Any], Result]) -> Result:
        self._check()
        future: asyncio.Future[Result] = self._loop.create_future()
        self._put(Call(op, future, finish))
        return await future

    # Subscriptions

    async def declare(self, spec: SubscriptionSpec, /, *, consume: bool) -> Hold:
        overflow = spec.overflow
        op = r.Declare(
            spec.name,
            spec.pattern,
            spec.capacity,
            spec.strict_key,
            consume,
            overflow.displace,
            overflow.expand,
            overflow.expand_for,
        )
        hold: Hold = await self._call(op, _as_it_is)
        return hold

    async def forget(self, name: str, /) -> int:
        rows: list[Row] = await self._call(r.Forget(name), _as_it_is)
        told = [row for row in rows if row.state is not State.DEAD_LETTERED][:FORGOTTEN_FACTS_MAX]
        wall = self._clock.wall()
        for delivery in await self._run(lambda: looking.deliveries(self._engine, told)):
            self._listener.state(DeliveryDiscarded(at=wall, delivery=delivery, reason="forgotten"))
        return len(rows)

    async def set_hold(self, name: str, /, *, paused: bool | None = None, forced: Forced | None = None) -> Hold:
        before: Hold = await self._call(r.SetHold(name, paused, forced), _as_it_is)
        return before

    def hold_back_low(self, name: str, held: bool, /) -> None:
        """See `HoldsBackLow`."""
        if self._state == "open" and self._process == os.getpid():
            self._engine.hold_back_low(name, held)

    @property
    def may_grow(self) -> bool:
        """See `Grows`."""
        return self._engine.may_grow

    @may_grow.setter
    def may_grow(self, allowed: bool) -> None:
        self._engine.may_grow = allowed

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
            self._put(Forsake(request))
            raise

    def publish_now(self, envelope: Envelope, /) -> Stored | None:
        """Never at once: to store takes a round trip."""
        return None

    # Claiming and settling

    def claim_now(self, name: str, /) -> Delivery | None:
        """Never at once: the attempt is counted in the stream."""
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
        self._put(Settlement(delivery, uncharged(delivery), nobody_asks))

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
        self._check_looking()
        return looking.ledger(self._engine)

    def queues(self) -> dict[str, QueueState]:
        self._check_looking()
        return looking.queues(self._engine, self._clock.wall())

    def _check_looking(self) -> None:
        """What was read last may be looked at after a close."""
        if self._state == "new":
            raise TransportError(f"{self.address} is not open")
        if self._process != os.getpid():
            self._check()

    async def locate(self, message_id: str, /) -> Whereabouts | None:
        self._check_looking()
        return looking.locate(self._engine, message_id)

    async def ids_like(self, beginning: str, limit: int, /) -> list[str]:
        self._check_looking()
        return looking.ids_like(self._engine, beginning, limit)

    async def audit(self) -> Audit:
        self._check()
        return await self._run(lambda: looking.audit(self._engine))

    async def probe(self) -> float:
        started = time.perf_counter()
        await self._call(r.Renew(0), _as_it_is)
        return time.perf_counter() - started

    def disk_free_bytes(self) -> int | None:
        """The server's disk is not ours to see."""
        return None

    # Dead letters

    async def dead_letters(self, wanted: DeadLetterFilter, limit: int, /) -> list[DeadLetterRecord]:
        self._check()
        return await self._run(lambda: looking.dead_letters(self._engine, wanted, limit))

    async def replay(self, ids: Sequence[str], /) -> list[DeadLetterRecord]:
        return await self._move(ids, r.Replay)

    async def discard(self, ids: Sequence[str], /) -> list[DeadLetterRecord]:
        return await self._move(ids, r.Discard)

    async def _move(self, ids: Sequence[str], kind: type[r.Replay | r.Discard]) -> list[DeadLetterRecord]:
        self._check()
        wanted = list(dict.fromkeys(ids))
        if not wanted:
            return []
        letters = [_number(letter) for letter in wanted]
        records = await self._run(lambda: looking.records(self._engine, letters))
        missing = [letter for letter, record in zip(wanted, records, strict=True) if record is None]
        if missing:
            raise UnknownDeadLetter(f"no dead letter {', '.join(map(repr, missing))}")
        await self._call(kind(letters), _none_unknown)
        return [record for record in records if record is not None]


class _Line:
    """What the supervisor gets to see of the transport."""

    def __init__(self, transport: NatsTransport) -> None:
        self._transport = transport
        self._engine = transport._engine

    async def dial(self, address: Address, credentials: Credentials | None, /) -> None:
        await self._transport._run(lambda: self._engine.dial(address, credentials))

    async def hang_up(self) -> None:
        try:
            await self._transport._run(self._engine.hang_up)
        except TransportError:
            return  # the thread has ended, and its connection with it

    async def probe(self) -> float:
        return await self._transport.probe()


def _as_it_is(verdict: Any) -> Any:
    return verdict


def _none_unknown(verdict: Unknown | None) -> None:
    if verdict is not None:
        raise UnknownDeadLetter(f"no dead letter {', '.join(map(repr, verdict.what))}")


def _number(letter: str) -> int:
    """The number that a dead letter's id names; -1 for what was never an id."""
    return int(letter) if letter.isascii() and letter.isdigit() and len(letter) <= 18 else -1


class _Options(msgspec.Struct, frozen=True):
    """The options of a nats URL, as text."""

    level: str = "process"
    replicas: str = "1"
    max_bytes: str = "0"
    lease: str = str(LEASE_S)
    tls: str = ""
    tls_ca: str = ""


def _settings(addresses: Sequence[Address]) -> tuple[Place, Level, float]:
    """Where and how, which all addresses of a failover set must agree on. Raises ConfigurationError."""
    found: list[tuple[Place, Level, float]] = [_setting(address) for address in addresses]
    if any(one != found[0] for one in found):
        raise ConfigurationError(
            "the servers of a failover set serve one stream: give them all the same name and options"
        )
    return found[0]


def _setting(address: Address) -> tuple[Place, Level, float]:
    unknown = sorted(set(address.options) - set(_OPTIONS))
    if unknown:
        raise ConfigurationError(
            f"unknown option {unknown[0]!r} in the URL of {address}; known are {', '.join(_OPTIONS)}"
        )
    options = _Options(**address.options)
    name = address.path.strip("/") or "default"
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{address} names the store {name!r}; write nats://host:4222/name with 1 to 64 letters, digits, '-' or '_'"
        )
    if options.level not in ("process", "disk", "quorum"):
        raise ConfigurationError(f"level must be 'process', 'disk' or 'quorum', not {options.level!r}")
    replicas, max_bytes = _whole("replicas", options.replicas, 1, 5), _whole("max_bytes", options.max_bytes, 0, 2**62)
    if options.level == "quorum" and replicas < 3:
        raise ConfigurationError("level=quorum needs replicas=3 or more in the URL")
    try:
        lease_s = float(options.lease)
    except ValueError:
        lease_s = -1.0
    if not 0.5 <= lease_s <= 3600:
        raise ConfigurationError(f"lease must be 0.5 to 3600 seconds, not {options.lease!r}")
    return Place(name, replicas, max_bytes), Level(options.level), lease_s


def _whole(what: str, text: str, least: int, most: int) -> int:
    if text.isascii() and text.isdigit() and least <= int(text) <= most:
        return int(text)
    raise ConfigurationError(f"{what} must be a whole number from {least} to {most}, not {text!r}")
