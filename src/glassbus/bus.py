"""MessageBus: publish, subscribe, and see what became of every message."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from glassbus.clock import Clock, SystemClock
from glassbus.codec import JSON, RAW
from glassbus.config import KillSwitch, Settings, addresses
from glassbus.deadletters import DeadLetters
from glassbus.errors import (
    BusNotRunning,
    ConfigurationError,
    GlassbusError,
    InvalidHeaders,
    InvalidPayload,
    PublishRejected,
    PublishUncertain,
    Rule,
    SubscriptionExists,
    UnknownSubscription,
    classify,
)
from glassbus.facts import (
    BusStarted,
    BusStopped,
    DuplicateRecognised,
    Fact,
    LedgerUnbalanced,
    MessagePublished,
    MessageUnrouted,
    PublishLeftUncertain,
    PublishRefused,
    SubscriptionDeclared,
    SubscriptionForgotten,
    SubscriptionPaused,
    SubscriptionResumed,
    TransportFailed,
    current_delivery,
)
from glassbus.handler import Handler
from glassbus.message import (
    KEY_LENGTH_MAX,
    MESSAGE_ID_LENGTH_MAX,
    Envelope,
    Outgoing,
    Priority,
    Receipt,
    check_headers,
    check_pattern,
    check_text,
    check_topic,
)
from glassbus.observer import Hub, Observer, Propagator, safe_text
from glassbus.policy.ledger import Ledger
from glassbus.policy.retry import Retry
from glassbus.policy.routing import OTHER, destination
from glassbus.record.fingerprint import FailureSites
from glassbus.record.journal import Journal
from glassbus.record.tally import PublishTally, Tally
from glassbus.recovery.health import Check, Health, HealthStatus, SuccessWindow, by_rate, worst
from glassbus.recovery.killswitch import Gate
from glassbus.switches import Breakers
from glassbus.transport import Hold, QueueState, Stored, SubscriptionSpec, Transport
from glassbus.transport.factory import make_transport
from glassbus.worker import Subscription, Worker

Function = TypeVar("Function", bound=Callable[..., Any])

#: Makes the observers that every bus has, registered by the package itself; False from `telemetry=` leaves them out.
default_observers: list[Callable[[MessageBus], Observer | None]] = []

_OUR_FILES = frozenset({__file__, Worker.__init__.__code__.co_filename, Handler.__init__.__code__.co_filename})
_TOPICS_MAX = 10_000
_TICK_S = 1.0
_PROBE_EVERY_S = 5.0
# Message ids end in 60 bits that run through every value once, in an order that looks random
# (a Weyl sequence: any odd step does). A leading 1 keeps them 16 hexadecimal digits long.
_ID_STEP = 0x9E3779B97F4A7C1
_ID_MASK = (1 << 60) - 1
_ID_TOP = 1 << 60


class Drained(frozenset[str]):
    """What `drain` left behind: the subscriptions that still hold messages. Empty when all is done.

    `reasons` says for each why it was left: paused, breaker_open or due_later.
    """

    reasons: Mapping[str, str]

    def __new__(cls, reasons: Mapping[str, str]) -> Self:
        made = super().__new__(cls, reasons)
        made.reasons = dict(reasons)
        return made


class MessageBus:
    """A message bus on one event loop.

    `url` chooses the transport: `memory://` or `sqlite:///path/to/file.db`. `name` labels its
    metrics. `telemetry=False` makes it without traces and metrics; making a bus installs
    no SDK and opens no port either way. All methods belong to the loop it was started
    on, except `health`, `ledger` and `queues`, which any thread may call.

    Durations are seconds. Raises ConfigurationError for what cannot work.
    """

    def __init__(
        self,
        url: str | Iterable[str] = "memory://",
        *,
        name: str = "default",
        telemetry: bool = True,
        publish_timeout: float = 5.0,
        payload_bytes_max: int = 1024 * 1024,
        capacity: int = 100_000,
        durability: str = "disk",
        spill_dir: str | os.PathLike[str] | None = None,
        observers: Iterable[Observer] = (),
        rules: Iterable[Rule] = (),
        clock: Clock | None = None,
        seed: int | None = None,
        registry: Any = None,
        tracer_provider: Any = None,
    ) -> None:
        self.settings = Settings(
            name=name,
            publish_timeout=publish_timeout,
            payload_bytes_max=payload_bytes_max,
            capacity=capacity,
            spill_dir=os.fspath(spill_dir) if spill_dir is not None else None,
        )
        self._addresses = addresses(url)
        self.clock: Clock = clock if clock is not None else SystemClock()
        self._monotonic, self._wall = self.clock.monotonic, self.clock.wall
        self._transport: Transport = make_transport(
            self._addresses, settings=self.settings, clock=self.clock, durability=durability
        )
        self._level = self._transport.features.level
        self._patience_s = publish_timeout
        self.journal = Journal()
        self.registry = registry
        self.tracer_provider = tracer_provider
        self.hub = Hub(self.clock.wall)
        self._random = random.Random(seed)  # noqa: S311 - chance for jitter, not for secrets
        self._sites = FailureSites(tuple(rules), _OUR_FILES)
        self._subscriptions: dict[str, Subscription] = {}
        self._workers: dict[str, Worker] = {}
        self._topics: dict[str, PublishTally] = {}
        self._patterns: list[str] = []
        self._tallies: dict[str, PublishTally] = {}
        self._propagators: tuple[Propagator, ...] = ()
        self._sampling: tuple[Observer, ...] = ()
        self._state = "new"
        self._broken: str = ""
        self._declaring: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._probing: asyncio.Task[None] | None = None
        self._window = SuccessWindow()
        self._started_at = 0.0
        self._turned_at = 0.0
        self._answered_at: float | None = None
        self._unbalanced: set[str] = set()
        self._refused = 0
        now = int(self._wall()) & 0xFFFFFFFF
        self._id_prefix = f"{now:08x}{secrets.token_hex(4)}"
        self._id_next = secrets.randbits(60)
        self.dead_letters = DeadLetters(self._transport, self.hub, self.clock)
        self.breakers = Breakers(self._workers, self._hold)
        self.observe(self.journal)
        for make in default_observers if telemetry else default_observers[:1]:
            observer = make(self)
            if observer is not None:
                self.observe(observer)
        for observer in observers:
            self.observe(observer)

    def __repr__(self) -> str:
        return f"MessageBus({self._transport.address!r}, name={self.name!r}, {self._state})"

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def transport(self) -> str:
        """The scheme of its transport."""
        return self._addresses[0].scheme

    @property
    def address(self) -> str:
        """Where its messages are, without credentials."""
        return self._transport.address

    @property
    def running(self) -> bool:
        return self._state == "running"

    def observe(self, observer: Observer) -> None:
        """Show facts to `observer` from now on. One with `inject` also writes message headers."""
        self.hub.add(observer)
        if isinstance(observer, Propagator):
            self._propagators = (*self._propagators, observer)
        if getattr(observer, "wants_sampled", False):
            self._sampling = (*self._sampling, observer)

    # Subscribing

    def subscribe(
        self,
        pattern: str,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: float = 30.0,
        abandon_after: float | None = None,
        concurrency: int = 1,
        capacity: int | None = None,
        strict_key: bool = False,
        kill_switch: KillSwitch | None = None,
    ) -> Callable[[Function], Function]:
        """Bind a handler to the topics that `pattern` matches (`*` one part, a last `>` one or more).

        A decorator: `bus.subscribe("orders.*")(handler)` is the call. `name` (default: the handler's
        qualified name) is what the subscription is known by: on a durable transport it
        collects messages from its first start on, also while no process runs it. The handler
        may be async or plain; what it takes is told by its annotation (see `Handler`). It
        is cancelled after `timeout`; if it goes on all the same it keeps its slot until
        `abandon_after` (default 10 x timeout), when its message is dead-lettered. At most `concurrency`
        attempts run at once, and at most `capacity` messages wait. `strict_key` holds back the messages of a
        key while one of them waits for a retry.

        Raises InvalidPattern, SubscriptionExists, ConfigurationError.
        """

        def bind(function: Function) -> Function:
            self._bind(
                Handler(function),
                check_pattern(pattern),
                name=name,
                retry=retry,
                timeout=timeout,
                abandon_after=abandon_after,
                concurrency=concurrency,
                capacity=capacity,
                strict_key=strict_key,
                kill_switch=kill_switch,
            )
            return function

        return bind

    def _bind(
        self,
        handler: Handler,
        pattern: str,
        *,
        name: str | None,
        retry: Retry | None,
        timeout: float,
        abandon_after: float | None,
        concurrency: int,
        capacity: int | None,
        strict_key: bool,
        kill_switch: KillSwitch | None,
    ) -> None:
        known_as = handler.name if name is None else name
        try:
            check_text("subscription name", known_as, 128)
        except InvalidHeaders as error:
            raise ConfigurationError(f"{error}; give it one with name=") from None
        if known_as in self._subscriptions:
            raise SubscriptionExists(f"bus {self.name!r} already has a subscription {known_as!r}; give one a name=")
        if self._state in ("stopping", "stopped"):
            raise ConfigurationError(f"bus {self.name!r} is {self._state}: subscribe before it stops")
        room = self.settings.capacity if capacity is None else capacity
        if room < 1:
            raise ConfigurationError(f"capacity must be at least 1, not {room}")
        subscription = Subscription(
            spec=SubscriptionSpec(known_as, pattern, room, strict_key),
            handler=handler,
            retry=retry if retry is not None else Retry(),
            timeout=timeout,
            abandon_after=abandon_after if abandon_after is not None else 10 * timeout,
            concurrency=concurrency,
            kill_switch=kill_switch if kill_switch is not None else KillSwitch(),
        )
        self._subscriptions[known_as] = subscription
        self._topics.clear()
        if self._state == "running":
            task = asyncio.get_running_loop().create_task(self._run(subscription))
            self._declaring.add(task)
            task.add_done_callback(self._declaring.discard)

    async def _run(self, subscription: Subscription) -> None:
        """Declare a subscription in the store and start its worker."""
        spec = subscription.spec
        hold = await self._transport.declare(spec, consume=True)
        worker = Worker(
            subscription,
            transport=self._transport,
            hub=self.hub,
            clock=self.clock,
            sites=self._sites,
            uniform=self._random.random,
        )
        worker.tally(destination(spec.pattern, (s.spec.pattern for s in self._subscriptions.values())))
        self._workers[spec.name] = worker
        self._look_for_patterns()
        worker.gate.hold(hold)
        self.hub.state(SubscriptionDeclared(at=self._wall(), subscription=spec.name, pattern=spec.pattern))
        worker.start()

    # Starting and stopping

    async def start(self) -> None:
        """Open the store and start every subscription. Raises ConfigurationError or TransportError."""
        if self._state != "new":
            raise ConfigurationError(f"bus {self.name!r} is {self._state}; a bus starts once: make a new one")
        self._state = "starting"
        listener = _Listener(self)
        try:
            await self._transport.open(listener)
            self._started_at = self._turned_at = self._monotonic()
            self._answered_at = self._started_at
            for subscription in list(self._subscriptions.values()):
                await self._run(subscription)
        except BaseException:
            self._state = "new"
            await self._transport.close(0.0)
            self._workers.clear()
            raise
        self._state = "running"
        self.hub.state(BusStarted(at=self._wall(), bus=self.name, transport=self._transport.address))
        self._tick()

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
        if self._timer is not None:
            self._timer.cancel()
        for task in (*self._declaring, *([self._probing] if self._probing else [])):
            task.cancel()
        given_back = 0
        try:
            given_back = sum(await asyncio.gather(*(worker.stop(deadline) for worker in self._workers.values())))
        finally:
            left_s = max(0.0, deadline - (self._monotonic() - started))
            _, discarded = await self._transport.close(left_s)
            within = self._monotonic() - started <= deadline + 0.5
            self._state = "stopped"
            self.hub.state(
                BusStopped(
                    at=self._wall(),
                    bus=self.name,
                    given_back=given_back,
                    discarded=discarded,
                    within_deadline=within,
                )
            )

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # Publishing

    async def publish(
        self,
        topic: str,
        payload: Any = None,
        *,
        message_id: str | None = None,
        key: str | None = None,
        priority: Priority = Priority.NORMAL,
        headers: dict[str, str] | None = None,
        delay: float = 0.0,
        expires_in: float | None = None,
    ) -> Receipt:
        """Store one message for every subscription that wants it, and say how safe it is.

        On return it is stored at the receipt's `level`. A full queue makes it wait, up to the bus's
        `publish_timeout`; inside a handler it does not wait. A second publish of the same `message_id` within
        10 minutes yields a `duplicate` receipt. `delay` and `expires_in` are seconds of wall time.

        Raises PublishRejected (certainly not stored; its subclasses say why) or PublishUncertain
        (may be stored: publish again with the same id).
        """
        started = self._monotonic()
        try:
            envelope = self._seal(topic, payload, message_id, key, priority, headers, delay, expires_in)
        except PublishRejected as error:
            self._state_refused(topic, message_id, error, started)
            raise
        if self._declaring:
            await asyncio.gather(*self._declaring)
        batch = (envelope,)
        try:
            stored = (await self._transport.publish(batch, 0.0 if current_delivery.get() else self._patience_s))[0]
        except BaseException as error:
            self._not_stored(batch, error, started)
            raise
        self._count(envelope, stored, self._monotonic() - started)
        return Receipt(envelope.id, self._level, stored.subscriptions, stored.duplicate)

    async def publish_many(self, messages: Iterable[Outgoing | tuple[str, Any]]) -> list[Receipt]:
        """Store a batch: all of it or nothing, with one receipt for each message in order.

        Takes `Outgoing` messages or pairs of topic and payload. Raises as `publish` does; a
        PublishUncertain names the first message, and all of the batch is to be published again, each with its id.
        """
        started = self._monotonic()
        sealed: list[Envelope] = []
        for message in messages:
            one = message if isinstance(message, Outgoing) else Outgoing(*message)
            try:
                sealed.append(
                    self._seal(
                        one.topic,
                        one.payload,
                        one.message_id,
                        one.key,
                        one.priority,
                        one.headers,
                        one.delay,
                        one.expires_in,
                    )
                )
            except PublishRejected as error:
                self._state_refused(one.topic, one.message_id, error, started)
                raise
        if not sealed:
            return []
        if self._declaring:
            await asyncio.gather(*self._declaring)
        try:
            stored = await self._transport.publish(sealed, 0.0 if current_delivery.get() else self._patience_s)
        except BaseException as error:
            self._not_stored(sealed, error, started)
            raise
        duration_s = self._monotonic() - started
        receipts = []
        for envelope, outcome in zip(sealed, stored, strict=True):
            self._count(envelope, outcome, duration_s)
            receipts.append(Receipt(envelope.id, self._level, outcome.subscriptions, outcome.duplicate))
        return receipts

    def _seal(
        self,
        topic: str,
        payload: Any,
        message_id: str | None,
        key: str | None,
        priority: Priority,
        headers: dict[str, str] | None,
        delay: float,
        expires_in: float | None,
    ) -> Envelope:
        """Check everything and make the envelope. Raises PublishRejected."""
        if self._state != "running":
            self._refuse_state()
        if topic not in self._topics:
            check_topic(topic)
        codec = RAW if type(payload) is bytes else JSON
        body = codec.encode(payload)
        if len(body) > self.settings.payload_bytes_max:
            raise InvalidPayload(
                f"payload takes {len(body)} bytes; at most {self.settings.payload_bytes_max} are allowed "
                "(payload_bytes_max): store it elsewhere and publish where it is"
            )
        carried = check_headers(headers) if headers else {}
        plain = message_id is None and key is None and expires_in is None and not delay
        if plain and priority is Priority.NORMAL:
            if self._propagators:
                self._inject(carried)
            return Envelope(self._next_id(), topic, body, codec.name, carried, 1, None, self._wall())
        remember = message_id is not None
        if message_id is None:
            message_id = self._next_id()
        else:
            check_text("message id", message_id, MESSAGE_ID_LENGTH_MAX)
        if key is not None:
            check_text("key", key, KEY_LENGTH_MAX)
        now = self._wall()
        due_at = expires_at = 0.0
        if delay:
            due_at = now + _seconds("delay", delay)
        if expires_in is not None:
            expires_at = now + _seconds("expires_in", expires_in)
        if type(priority) is not Priority:
            priority = _priority(priority)
        self._inject(carried)
        return Envelope(
            message_id, topic, body, codec.name, carried, priority.value, key, now, due_at, expires_at, remember
        )

    def _inject(self, headers: dict[str, str]) -> None:
        for propagator in self._propagators:
            try:
                propagator.inject(headers)
            except BaseException as error:  # noqa: BLE001 - a propagator may raise anything; the message goes out
                self.hub.failed(propagator, "inject", error)

    def _next_id(self) -> str:
        self._id_next = low = (self._id_next + _ID_STEP) & _ID_MASK
        return self._id_prefix + hex(low + _ID_TOP)[2:]

    def _refuse_state(self) -> None:
        if self._broken:
            raise BusNotRunning(f"bus {self.name!r} has stopped taking messages: {self._broken}")
        hint = "start it with 'async with bus' or 'await bus.start()'" if self._state == "new" else "it takes no more"
        raise BusNotRunning(f"bus {self.name!r} is {self._state}: {hint}")

    def _count(self, envelope: Envelope, stored: Stored, duration_s: float) -> None:
        """Count a stored message, and state what somebody asked to see."""
        tally = self._topics.get(envelope.topic) or self._tally(envelope.topic)
        if stored.duplicate or not stored.subscriptions:
            self._state_unusual(envelope, stored, tally.destination, duration_s)
            return
        tally.accepted += 1
        tally.duration.observe(duration_s)
        if self.hub.shows_happy or (envelope.headers and self._sampling):
            self._state_published(envelope, stored, tally.destination, duration_s)

    def _not_stored(self, batch: Sequence[Envelope], error: BaseException, started: float) -> None:
        """State what became of a publish that the store did not simply take."""
        if isinstance(error, PublishRejected):
            for envelope in batch:
                self._state_refused(envelope.topic, envelope.id, error, started)
        elif isinstance(error, asyncio.CancelledError):
            self._state_uncertain(batch, "the publish was cancelled", started)
        else:
            self._state_uncertain(batch, safe_text(error), started)

    def _tally(self, topic: str) -> PublishTally:
        """The counts for `topic`'s destination: declared topics and patterns only, so they are bounded."""
        if len(self._topics) >= _TOPICS_MAX:
            self._topics.clear()
        label = destination(topic, self._patterns)
        found = self._tallies.get(label)
        if found is None:
            found = self._tallies[label] = PublishTally(label)
        self._topics[topic] = found
        return found

    def _look_for_patterns(self) -> None:
        """Learn the stored subscriptions, also those that another process declared."""
        patterns = [state.spec.pattern for state in self._transport.queues().values()]
        if patterns != self._patterns:
            self._patterns = patterns
            self._topics.clear()

    def _state_published(self, envelope: Envelope, stored: Stored, label: str, duration_s: float) -> None:
        fact = MessagePublished(
            at=self._wall(),
            envelope=envelope,
            destination=label,
            level=self._transport.features.level,
            subscriptions=stored.subscriptions,
            duration_s=duration_s,
        )
        self.hub.state(fact)
        if envelope.headers:
            for observer in self._sampling:
                self.hub.show(observer, fact)

    def _state_unusual(self, envelope: Envelope, stored: Stored, label: str, duration_s: float) -> None:
        kind = DuplicateRecognised if stored.duplicate else MessageUnrouted
        self.hub.state(kind(at=self._wall(), envelope=envelope, destination=label, duration_s=duration_s))

    def _state_refused(self, topic: object, message_id: str | None, error: PublishRejected, started: float) -> None:
        known = self._topics.get(topic) if isinstance(topic, str) else None
        self._refused += 1
        self.hub.state(
            PublishRefused(
                at=self._wall(),
                topic=str(topic)[:80] if isinstance(topic, str) else type(topic).__name__,
                destination=known.destination if known is not None else OTHER,
                message_id=str(message_id)[:MESSAGE_ID_LENGTH_MAX] if message_id is not None else "",
                reason=error.reason,
                error=safe_text(error, 300),
                duration_s=self._monotonic() - started,
            )
        )

    def _state_uncertain(self, batch: Sequence[Envelope], error: str, started: float) -> None:
        for envelope in batch:
            self.hub.state(
                PublishLeftUncertain(
                    at=self._wall(),
                    envelope=envelope,
                    destination=(self._topics.get(envelope.topic) or self._tally(envelope.topic)).destination,
                    error=error,
                    duration_s=self._monotonic() - started,
                )
            )

    # Operating

    async def drain(self, timeout: float | None = None) -> Drained:  # noqa: ASYNC109 - raises, as asyncio.timeout would
        """Wait until the subscriptions that this bus runs have nothing left to do, waiting retries included.

        Those held by a pause or an open breaker, and messages due later (`delay`), are left and
        named in the result. Raises TimeoutError after `timeout` seconds, if given.
        """
        async with asyncio.timeout(timeout):
            while True:
                if self._declaring:
                    await asyncio.gather(*self._declaring)
                await self._transport.flush()
                busy, left = self._unfinished()
                if not busy:
                    return Drained(left)
                await self._progress()

    async def _progress(self) -> None:
        """Wait until something is settled here. Another process may do the work, so not for long."""
        settled = asyncio.Event()
        timer = asyncio.get_running_loop().call_later(0.05, settled.set)
        for worker in self._workers.values():
            worker.on_settled = settled.set
        await settled.wait()
        timer.cancel()
        for worker in self._workers.values():
            worker.on_settled = None

    def _unfinished(self) -> tuple[bool, dict[str, str]]:
        busy, left = False, {}
        accounts = self._transport.ledger().accounts
        for name, worker in self._workers.items():
            account = accounts.get(name)
            if account is None:
                continue
            waiting = account.ready + account.retrying + account.in_flight
            if worker.gate.state_name != "running" and not worker.in_flight:
                if waiting or account.scheduled:
                    left[name] = worker.gate.state_name
            elif waiting:
                busy = True
            elif account.scheduled:
                left[name] = "due_later"
        return busy, left

    def pause(self, subscription: str) -> asyncio.Future[None]:
        """Stop handing out messages of `subscription`, in every process, and keep them.

        Awaiting the result waits until that is stored. Raises UnknownSubscription.
        """
        return self._hold(subscription, paused=True)

    def resume(self, subscription: str) -> asyncio.Future[None]:
        """End a `pause`. Awaiting the result waits until that is stored."""
        return self._hold(subscription, paused=False)

    def _hold(self, subscription: str, *, paused: bool | None = None, forced: Any = None) -> asyncio.Future[None]:
        """Store a changed hold. It takes effect at once here, and stored it holds for all."""
        state = self._transport.queues().get(subscription)
        if state is None:
            raise UnknownSubscription(f"no subscription {subscription!r}; known are {sorted(self._transport.queues())}")
        hold = Hold(
            paused=state.hold.paused if paused is None else paused,
            forced=state.hold.forced if forced is None else forced,
        )
        worker = self._workers.get(subscription)
        if worker is not None:
            worker.gate.hold(hold)
        task = asyncio.get_running_loop().create_task(self._store_hold(subscription, state.hold, hold))
        self._declaring.add(task)
        task.add_done_callback(self._hold_stored)
        return task

    async def _store_hold(self, subscription: str, before: Hold, hold: Hold) -> None:
        await self._transport.set_hold(subscription, hold)
        if hold.paused != before.paused:
            kind = SubscriptionPaused if hold.paused else SubscriptionResumed
            self.hub.state(kind(at=self._wall(), subscription=subscription))

    def _hold_stored(self, task: asyncio.Task[None]) -> None:
        self._declaring.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._state_failed("hold", error)

    async def forget(self, subscription: str) -> int:
        """Remove a subscription from the store, with all it holds; how many deliveries were discarded.

        Raises UnknownSubscription.
        """
        worker = self._workers.pop(subscription, None)
        if worker is not None:
            await worker.stop(self.settings.publish_timeout)
            await self._transport.flush()
        self._subscriptions.pop(subscription, None)
        discarded = await self._transport.forget(subscription)
        self._topics.clear()
        self.hub.state(SubscriptionForgotten(at=self._wall(), subscription=subscription, discarded=discarded))
        return discarded

    # Looking

    def ledger(self) -> Ledger:
        """Where every accepted delivery is, as the store has it."""
        return self._transport.ledger()

    def queues(self) -> dict[str, QueueState]:
        """Every subscription in the store, run by this process or not."""
        return self._transport.queues()

    def health(self) -> Health:
        """How the bus is now. Never raises; what cannot be told is `unknown`."""
        now = self._monotonic()
        workers = list(self._workers.values())
        handled = sum(w.handled for w in workers)
        settled = sum(w.settled_count for w in workers)
        rate = self._window.rate(now, handled, settled)
        checks = (
            Check("running", *self._check_running()),
            Check(
                "success_rate", by_rate(rate), f"{rate:.4f} of the deliveries settled in the last 5 min were handled"
            ),
            Check("breakers", *_check_breakers([w.gate for w in workers])),
            Check("handlers", *_check_handlers(workers)),
            Check("ledger", *self._check_ledger()),
            Check("store", *self._check_store(now)),
        )
        status = worst(checks)
        return Health(
            status=status,
            ready=self.running and not self._broken and checks[-1].status is HealthStatus.HEALTHY,
            uptime_seconds=now - self._started_at if self._started_at else 0.0,
            success_rate=rate,
            messages_processed=handled,
            messages_failed=settled - handled,
            errors_recovered=sum(w.recovered for w in workers),
            checks=checks,
        )

    def _check_running(self) -> tuple[HealthStatus, str]:
        if self._broken:
            return HealthStatus.CRITICAL, self._broken
        if self._state == "running":
            return HealthStatus.HEALTHY, "running"
        return HealthStatus.UNKNOWN, self._state

    def _check_ledger(self) -> tuple[HealthStatus, str]:
        if self._unbalanced:
            return HealthStatus.CRITICAL, f"unaccounted deliveries in {', '.join(sorted(self._unbalanced))}"
        return HealthStatus.HEALTHY, "every accepted delivery is accounted for"

    def _check_store(self, now: float) -> tuple[HealthStatus, str]:
        if self._answered_at is None:
            return HealthStatus.UNKNOWN, "the store was never asked"
        age_s = now - self._answered_at
        if age_s > 3 * _PROBE_EVERY_S:
            return HealthStatus.CRITICAL, f"no round trip to the store for {age_s:.1f} s"
        return HealthStatus.HEALTHY, "the store answers"

    # What telemetry reads (see telemetry.source.Source)

    def tallies(self) -> list[Tally]:
        return [tally for worker in list(self._workers.values()) for tally in list(worker.tallies.values())]

    def publish_tallies(self) -> list[PublishTally]:
        return list(self._tallies.values())

    def subscribers(self) -> list[Worker]:
        return list(self._workers.values())

    def breaker_views(self) -> list[Gate]:
        return [worker.gate for worker in list(self._workers.values())]

    def observer_failures(self) -> dict[str, int]:
        return dict(self.hub.failures)

    def round_trip_age_s(self) -> float | None:
        return None if self._answered_at is None else self._monotonic() - self._answered_at

    def loop_age_s(self) -> float:
        """Seconds since the loop last turned; more than a few mean that something blocks it."""
        return self._monotonic() - self._turned_at

    def disk_free_bytes(self) -> int | None:
        free: int | None = getattr(self._transport, "disk_free_bytes", lambda: None)()
        return free

    def journal_dropped(self) -> int:
        return self.journal.dropped

    # Turning over

    def _tick(self) -> None:
        """About once a second: pass on counts, sample health, check the ledger, probe the store."""
        now = self._turned_at = self._monotonic()
        for worker in self._workers.values():
            worker.housekeep()
            worker.gate.look()
        workers = self._workers.values()
        self._window.sample(now, sum(w.handled for w in workers), sum(w.settled_count for w in workers))
        self._look_for_patterns()
        self._check_balance()
        if self._probing is None and (self._answered_at is None or now - self._answered_at >= _PROBE_EVERY_S):
            self._probing = asyncio.get_running_loop().create_task(self._probe())
        self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    async def _probe(self) -> None:
        try:
            await self._transport.probe()
            self._answered_at = self._monotonic()
        except GlassbusError as error:
            self._state_failed("probe", error)
        finally:
            self._probing = None

    def _check_balance(self) -> None:
        """State an account that does not balance, once, when it first does not."""
        for name, account in self._transport.ledger().accounts.items():
            if not account.unaccounted:
                self._unbalanced.discard(name)
            elif name not in self._unbalanced:
                self._unbalanced.add(name)
                self.hub.state(LedgerUnbalanced(at=self._wall(), subscription=name, unaccounted=account.unaccounted))

    def _state_failed(self, operation: str, error: BaseException) -> None:
        self.hub.state(
            TransportFailed(
                at=self._wall(),
                operation=operation,
                error=f"{type(error).__name__}: {safe_text(error)}",
                category=classify(error)[0],
                uncertain=False,
            )
        )

    def _break(self, error: BaseException) -> None:
        """The store cannot go on: take nothing more, so that nothing more is at risk."""
        self._broken = f"{type(error).__name__}: {safe_text(error, 300)}"
        self._state_failed("store", error)
        if self._state == "running":
            task = asyncio.get_running_loop().create_task(self.stop(5.0))
            self._declaring.add(task)
            task.add_done_callback(self._declaring.discard)


class _Listener:
    """What the transport may tell the bus."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus

    def state(self, fact: Fact, /) -> None:
        self._bus.hub.state(fact)

    def held(self, subscription: str, hold: Hold, /) -> None:
        worker = self._bus._workers.get(subscription)
        if worker is not None:
            worker.gate.hold(hold)

    def broken(self, error: BaseException, /) -> None:
        self._bus._break(error)


def _seconds(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10 * 365 * 86400:
        raise InvalidHeaders(f"{what} must be 0 or more seconds, and at most ten years, not {value!r}")
    return float(value)


def _priority(value: object) -> Priority:
    try:
        return Priority(value)  # type: ignore[arg-type]
    except ValueError:
        raise InvalidHeaders(f"priority must be one of {[p.name for p in Priority]}, not {value!r}") from None


def _check_breakers(gates: list[Gate]) -> tuple[HealthStatus, str]:
    shut = [f"{gate.name} {gate.state_name}" for gate in gates if gate.state_name != "running"]
    if not shut:
        return HealthStatus.HEALTHY, "every subscription takes messages"
    all_open = all(gate.state_name == "breaker_open" for gate in gates)
    return (HealthStatus.CRITICAL if all_open else HealthStatus.DEGRADED), "; ".join(shut)


def _check_handlers(workers: list[Worker]) -> tuple[HealthStatus, str]:
    lost = {w.name: w.subscription.concurrency - w.limit for w in workers}
    lost = {name: count for name, count in lost.items() if count}
    if not lost:
        return HealthStatus.HEALTHY, "no handler is lost"
    dead = any(not w.limit for w in workers)
    return (
        HealthStatus.CRITICAL if dead else HealthStatus.DEGRADED,
        "slots lost to handlers that do not return: " + ", ".join(f"{name} {count}" for name, count in lost.items()),
    )
