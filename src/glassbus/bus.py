"""MessageBus: publish, subscribe, and see what became of every message."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from asyncio import get_running_loop
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from glassbus.classification import Rule
from glassbus.clock import Clock, default_clock
from glassbus.codec import JSON, Codec, check_codecs
from glassbus.config import Address, KillSwitch, Overflow, Settings, Spool, addresses, default_state_dir
from glassbus.deadletters import DeadLetters
from glassbus.errors import (
    BrokerUnreachable,
    BusNotRunning,
    BusOverloaded,
    ConfigurationError,
    EndpointRefused,
    EndpointUnreachable,
    GlassbusError,
    InvalidMessage,
    PublishRejected,
    PublishUncertain,
    SubscriptionExists,
    TransportError,
    UnknownMessage,
    UnknownSubscription,
    shown,
)
from glassbus.facts import (
    BusStarted,
    BusStopped,
    EmergencyStopEnded,
    Fact,
    OverflowHandled,
    SubscriptionDeclared,
    SubscriptionForgotten,
    SubscriptionPaused,
    SubscriptionResumed,
    current_delivery,
)
from glassbus.handler import Handler
from glassbus.message import (
    Envelope,
    Outgoing,
    Priority,
    Receipt,
    check_pattern,
    check_patterns,
)
from glassbus.observer import Hub, Observer, safe_text
from glassbus.policy.failover import Reconnect
from glassbus.policy.ledger import Audit, Ledger
from glassbus.policy.retry import Retry
from glassbus.policy.timeouts import AdaptiveTimeout
from glassbus.publisher import Publisher
from glassbus.pulse import Pulse
from glassbus.record.fingerprint import FailureSites
from glassbus.record.journal import Journal, JournalSettings
from glassbus.record.tally import PublishTally, Tally
from glassbus.record.telling import Told
from glassbus.recovery.connections import Connection
from glassbus.recovery.credentials import CredentialsSource, check_source
from glassbus.recovery.emergency import DEADLINE_S, Emergency
from glassbus.recovery.endpoint import EndpointSupervisor
from glassbus.recovery.escalation import Escalation, Escalations
from glassbus.recovery.guard import BreakerView, ComponentBreakers
from glassbus.recovery.handler import Shared
from glassbus.recovery.health import Health
from glassbus.recovery.queue import Growth
from glassbus.recovery.resources import Intake
from glassbus.recovery.resting import Resting
from glassbus.recovery.sources import Source
from glassbus.story import FORGETS, Story, ask, tell
from glassbus.subscription import Subscription, make_subscription
from glassbus.switches import Breakers
from glassbus.transport import Forced, Hold, Listener, QueueState, Spools, Stored, Transport, let_grow
from glassbus.transport.factory import make_transport
from glassbus.tuning import Reconfiguration
from glassbus.worker import Worker

Function = TypeVar("Function", bound=Callable[..., Any])

#: Make the observers that every bus has; the package registers them, so that the bus need not know them.
default_observers: list[Callable[[MessageBus], Observer]] = []
#: Those that `telemetry=False` leaves out.
telemetry_observers: list[Callable[[MessageBus], Observer]] = []

#: What the store gets to record its last settlements, even when the handlers took all of the deadline, in seconds.
_CLOSE_S = 1.0
#: What escalation channels get to be told of what just happened, in seconds.
_TELL_S = 2.0
_OUR_FILES = frozenset(
    {
        __file__,
        Worker.__init__.__code__.co_filename,
        Handler.__init__.__code__.co_filename,
        JSON.encode.__code__.co_filename,
    }
)


class Drained(frozenset[str]):
    """What `drain` left behind: the subscriptions that still hold messages, none when all is done.

    `complete` says whether all is done. `reasons` says for each why it was left: paused,
    breaker_open, due_later or stopped.
    """

    reasons: Mapping[str, str]

    def __new__(cls, reasons: Mapping[str, str]) -> Self:
        made = super().__new__(cls, reasons)
        made.reasons = dict(reasons)
        return made

    @property
    def complete(self) -> bool:
        return not self


class MessageBus:
    """A message bus on one event loop.

    `url` chooses the transport: `memory://`, `sqlite:///path/to/file.db` or `nats://host:port/name` (a list of
    those is a failover set). `name` labels its metrics. `telemetry=False` makes it without traces and
    metrics; making a bus installs no SDK and opens no port either way. All methods belong to the loop it was
    started on, except `health`, `ledger` and `queues`, which any thread may call.

    Durations are seconds. `publish_timeout` bounds the wait for room in a full queue, and `capacity` is how
    many messages may wait for a subscription, where `subscribe` says nothing else. `durability` of
    SQLite is "disk" (survives power loss) or "process" (faster; survives SIGKILL). `spill_dir` is where a
    bus in memory saves what is left when it stops. `state_dir` is where everything else that must outlive
    the process is kept (journal, open escalations, spool, manifests, the last known good configuration). It is made
    at the first need, and by default stands beside an SQLite store as `FILE.state`. In memory and on NATS there is
    none unless it is given: all that is then kept in memory alone, and there is no spool.

    `observers` see every fact; `rules` classify exceptions before the built-in ones. `codecs` is an explicit list:
    the first that can encodes a payload (JSON where none is given; bytes go as they are), and handlers are given what
    another of the list can read. `configuration` is a callable, or a TOML or JSON file, with settings that `reload`
    changes while the bus runs (see `glassbus.tuning`). For a broker: `credentials` is a function (plain or async) that
    gives new ones when those in use are refused, `reconnect` says how its connection is watched and made again, and
    `spool` how much is kept in `state_dir` while it is away. `escalation` says who must be told of what (see
    `Escalation`). `journal` says how much of what fails is kept, where and how safely. `registry` and
    `tracer_provider` replace the global ones. `untrusted` are the topics (patterns) that strangers may write to: traces
    of theirs are linked to and never continued, and what is sampled is decided here; give every process of a store
    the same. `clock` and `seed` are for tests.

    Attributes: `dead_letters` (list, get, replay, discard), `breakers` (by subscription), `journal`
    (recent failures and single messages' stories), `escalations` (what somebody must know of), `emergency` (an
    emergency stop, asked for from anywhere), `hub` (the observers).

    Raises ConfigurationError for what cannot work.
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
        state_dir: str | os.PathLike[str] | None = None,
        observers: Iterable[Observer] = (),
        rules: Iterable[Rule] = (),
        codecs: Iterable[Codec] | None = None,
        configuration: Source | None = None,
        credentials: CredentialsSource | None = None,
        reconnect: Reconnect | None = None,
        spool: Spool | None = None,
        escalation: Escalation | None = None,
        journal: JournalSettings | None = None,
        clock: Clock | None = None,
        seed: int | None = None,
        registry: Any = None,
        tracer_provider: Any = None,
        untrusted: Iterable[str] = (),
    ) -> None:
        self._addresses = addresses(url)
        self.settings = Settings(
            name=name,
            publish_timeout=publish_timeout,
            payload_bytes_max=payload_bytes_max,
            capacity=capacity,
            spill_dir=os.fspath(spill_dir) if spill_dir is not None else None,
            state_dir=os.fspath(state_dir) if state_dir is not None else default_state_dir(self._addresses),
            untrusted=check_patterns("untrusted", untrusted),
        )
        self._codecs = () if codecs is None else check_codecs(codecs)
        self.clock: Clock = clock if clock is not None else default_clock()
        self._monotonic, self._wall = self.clock.monotonic, self.clock.wall
        self._durability = durability
        self._spool = spool
        self._reconnect = reconnect
        self._credentials = check_source(credentials)
        self._endpoint: EndpointSupervisor | None = None
        self._transport = self._make_transport()
        self._level = self._transport.features.level
        self._patience_s = publish_timeout
        self.registry = registry
        self.tracer_provider = tracer_provider
        self.hub = Hub(self._wall)
        self.journal = Journal(
            journal,
            state_dir=self.settings.state_dir,
            bus=name,
            level=self._level.value,
            wall=self._wall,
            state=self.hub.state,
        )
        self.journal.trace_with(self.hub.trace_of)
        self._publisher = Publisher(self.settings, self._level, self.hub, self.clock, self._codecs or (JSON,))
        self.component_breakers = ComponentBreakers(self.hub, self.clock)
        #: Breakers of a program's own, to be shown with the others.
        self.further_breakers: Callable[[], Sequence[BreakerView]] = tuple
        self.escalations = Escalations(escalation or Escalation(), self.settings, self.hub, self.clock)
        self.escalations.journal_trouble = lambda: self.journal.trouble
        self.emergency = Emergency(_Stopping(self), self.settings, self.hub, self.clock)
        self.emergency.last.append(self._end_journal)
        #: For messages of errors that a program hands over, with what nothing recovered.
        self.resting = Resting(
            lambda: self._transport, self._publish_sealed, self._in_background, self._learn, self.hub, self.clock
        )
        self._starting: asyncio.Task[Any] | None = None
        #: A command's bus: it takes over neither escalations nor what an emergency left, for it is soon gone.
        self.looks_only = False
        self._growth = Growth(self.component_breakers, lambda allowed: let_grow(self._transport, allowed))
        self._random = random.Random(seed)  # noqa: S311 - chance for jitter, not for secrets
        self._sites = FailureSites(tuple(rules), _OUR_FILES, self._rule_failed)
        self._subscriptions: dict[str, Subscription] = {}
        self._workers: dict[str, Worker] = {}
        self.intake = Intake(self.hub, self.clock, self._look_at_intake)
        self._reconfiguration = Reconfiguration(
            configuration,
            self.settings,
            self._subscriptions,
            self._workers,
            hub=self.hub,
            clock=self.clock,
            breakers=self.component_breakers,
            declare=lambda spec: self._transport.declare(spec, consume=True),
            bus_wide=self._set_bus_wide,
            in_background=self._in_background,
        )
        self._pulse = Pulse(self._workers, self._transport, self.hub, self.clock, self._turned, self)
        self._state = "new"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._declaring: set[asyncio.Task[None]] = set()
        # What keeps publishes from going straight to the store: those, and a paused intake.
        self._bars: set[object] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.dead_letters = DeadLetters(self._transport, self.hub, self.clock)
        self.breakers = Breakers(self._workers, self._hold)
        self.observe(self.journal)
        self.observe(self._pulse)
        self.observe(self.escalations)
        self.observe(self.emergency)
        for make in (*default_observers, *(telemetry_observers if telemetry else ())):
            self.observe(make(self))
        for observer in observers:
            self.observe(observer)

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

    def _rule_failed(self, rule: Rule, error: BaseException) -> None:
        self.hub.failed(rule, f"rule {shown(rule)}", error)

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
    def store(self) -> Transport:
        """What keeps its messages, for commands that look at it."""
        return self._transport

    @property
    def untrusted(self) -> tuple[str, ...]:
        """The topics, as patterns, whose messages come from strangers."""
        return self.settings.untrusted

    @property
    def running(self) -> bool:
        return self._state == "running"

    @property
    def stopped(self) -> bool:
        """Whether it takes nothing more, ever: it has stopped, or is about to."""
        return self._state in ("stopping", "stopped")

    def observe(self, observer: Observer) -> None:
        """Show facts to `observer` from now on. One with `inject` also writes message headers."""
        self.hub.add(observer)
        self._publisher.adopt(observer)

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
        overflow: Overflow | None = None,
        kill_switch: KillSwitch | None = None,
        adaptive_timeout: AdaptiveTimeout | None = None,
        codecs: Iterable[Codec] | None = None,
    ) -> Callable[[Function], Function]:
        """Bind a handler to the topics that `pattern` matches (`*` one part, a last `>` one or more).

        A decorator: `bus.subscribe("orders.*")(handler)` is the call. `name` (default: the handler's
        qualified name) is what the subscription is known by: on a durable transport it
        collects messages from its first start on, also while no process runs it. The handler
        may be async or plain; what it takes is told by its annotation (see `Handler`). It
        is cancelled after `timeout`; if it goes on all the same it keeps its slot until
        `abandon_after` (default 10 x timeout), when its message is dead-lettered. At most `concurrency`
        attempts run at once, and at most `capacity` messages wait; `overflow` says what a full queue does after its
        publishers have waited (see `Overflow`). A `kill_switch` is on by default
        (`KillSwitch(enabled=False)` turns it off): it pauses a subscription whose deliveries mostly fail.
        `strict_key` holds back the messages of a key while one of them waits for a retry. After an attempt
        timed out later ones get more, for a while (`AdaptiveTimeout(cap=1)` turns that off). `codecs` are tried in
        their order on a payload that is not what its message declares; by default those given to the bus.

        Raises InvalidPattern, SubscriptionExists, ConfigurationError.
        """

        known = self._codecs if codecs is None else check_codecs(codecs)
        check_pattern(pattern)  # here and not at the handler: `@bus.subscribe` without a pattern is found at once

        def bind(function: Function) -> Function:
            self._bind(
                make_subscription(
                    Handler(function, known),
                    pattern,
                    name=name,
                    retry=retry,
                    timeout=timeout,
                    abandon_after=abandon_after,
                    concurrency=concurrency,
                    capacity=self.settings.capacity if capacity is None else capacity,
                    strict_key=strict_key,
                    overflow=overflow,
                    kill_switch=kill_switch,
                    adaptive_timeout=adaptive_timeout,
                )
            )
            return function

        return bind

    def _bind(self, subscription: Subscription) -> None:
        known_as = subscription.spec.name
        if known_as in self._subscriptions:
            raise SubscriptionExists(f"bus {self.name!r} already has a subscription {known_as!r}; give one a name=")
        if self._state in ("stopping", "stopped"):
            raise ConfigurationError(f"bus {self.name!r} is {self._state}: subscribe before it stops")
        self._subscriptions[known_as] = subscription
        if self._state == "running":
            task = self._in_background("declare", self._run_late(subscription))
            for waits in (self._declaring, self._bars):
                waits.add(task)
                task.add_done_callback(waits.discard)

    def _in_background(self, what: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` as a task that is kept, and whose failure is stated."""

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            error = None if task.cancelled() else task.exception()
            if error is not None:
                self._pulse.state_failure(what, error)

        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task

    async def _declare(self, subscription: Subscription) -> Worker:
        """Declare a subscription in the store, and make its worker."""
        subscription = self._reconfiguration.effective(subscription)
        spec = subscription.spec
        hold = await self._transport.declare(spec, consume=True)
        worker = Worker(
            subscription,
            transport=self._transport,
            hub=self.hub,
            clock=self.clock,
            sites=self._sites,
            uniform=self._random.random,
            shared=Shared(self.hub, self.clock, self.component_breakers, self.intake, self._reconfiguration.recovery),
        )
        worker.own_failure = self.emergency.error_handling_failed
        worker.tally(spec.pattern)
        self._workers[spec.name] = worker
        worker.gate.hold(hold)
        self.hub.state(SubscriptionDeclared(at=self._wall(), subscription=spec.name, pattern=spec.pattern))
        self._reconfiguration.prepare(worker)
        return worker

    async def _run_late(self, subscription: Subscription) -> None:
        (await self._declare(subscription)).start()
        self._learn()

    def _learn(self) -> None:
        """Take over the stored subscriptions, also those that another process declared."""
        self._publisher.learn([state.spec.pattern for state in self._transport.queues().values()])

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

    def _look_at_intake(self) -> None:
        (self._bars.add if self.intake.paused else self._bars.discard)(self.intake)

    def _set_bus_wide(self, settings: Settings) -> None:
        self._patience_s = settings.publish_timeout
        self._publisher.bytes_max = settings.payload_bytes_max

    # Starting and stopping

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
        `publish_timeout`, the highest priority first; inside a handler it does not wait. Then lower priorities
        may give way to it, or the queue may grow for a while (`subscribe(overflow=…)`), or it is refused. A second
        publish of the same `message_id` within 10 minutes yields a `duplicate` receipt. `delay` and `expires_in` are
        seconds of wall time.

        Raises PublishRejected (certainly not stored; its subclasses say why) or PublishUncertain
        (may be stored: publish again with the same id).
        """
        if self._state != "running" or self._bars or get_running_loop() is not self._loop:
            await self._make_ready(topic, message_id)
        started = self._monotonic()
        try:
            envelope = self._publisher.seal(topic, payload, message_id, key, priority, headers, delay, expires_in)
        except PublishRejected as error:
            self._publisher.refused(topic, message_id, error, started)
            raise
        stored = self._transport.publish_now(envelope)
        if stored is None:
            stored = (await self._store((envelope,), started))[0]
        self._publisher.stored(envelope, stored, self._monotonic() - started)
        return Receipt(envelope.id, stored.spooled or self._level, stored.subscriptions, stored.duplicate)

    async def publish_many(self, messages: Iterable[Outgoing | tuple[str, Any]]) -> list[Receipt]:
        """Store a batch: all of it or nothing, with one receipt for each message in order.

        Takes `Outgoing` messages or pairs of topic and payload. Raises as `publish` does; a
        PublishUncertain names all of them (`message_ids`): publish the whole batch again, each message with its id.
        """
        sealed: list[Envelope] = []
        for message in _each(messages):
            one = message if isinstance(message, Outgoing) else Outgoing(*message)
            if self._state != "running" or self._bars or get_running_loop() is not self._loop:
                await self._make_ready(one.topic, one.message_id)
            started = self._monotonic()
            try:
                sealed.append(
                    self._publisher.seal(
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
                self._publisher.refused(one.topic, one.message_id, error, started)
                raise
        if not sealed:
            return []
        started = self._monotonic()
        stored = await self._store(sealed, started)
        duration_s = self._monotonic() - started
        receipts = []
        for envelope, outcome in zip(sealed, stored, strict=True):
            self._publisher.stored(envelope, outcome, duration_s)
            level = outcome.spooled or self._level
            receipts.append(Receipt(envelope.id, level, outcome.subscriptions, outcome.duplicate))
        return receipts

    async def _publish_sealed(self, envelope: Envelope) -> Stored:
        """Store one message that the bus itself has made. Raises as `publish` does."""
        if self._state != "running" or self._bars:
            await self._make_ready(envelope.topic, envelope.id)
        started = self._monotonic()
        stored = (await self._store((envelope,), started))[0]
        self._publisher.stored(envelope, stored, self._monotonic() - started)
        return stored

    async def _store(self, batch: Sequence[Envelope], started: float) -> Sequence[Stored]:
        """Have the transport store `batch`, waiting for room except inside a handler, which would wait for itself."""
        try:
            return await self._transport.publish(batch, 0.0 if self._inside_handler() else self._patience_s)
        except (EndpointUnreachable, EndpointRefused) as error:
            rejected = BrokerUnreachable(f"{safe_text(error, 300)}; publish again later, or give the bus a state_dir")
            self._publisher.not_stored(batch, rejected, started)
            raise rejected from error
        except (TransportError, PublishUncertain) as error:
            known = error if isinstance(error, PublishUncertain) else None
            uncertain = known or PublishUncertain(batch[0].id, safe_text(error, 300))
            uncertain.message_ids = tuple(envelope.id for envelope in batch)
            self._publisher.not_stored(batch, uncertain, started)
            raise uncertain from (error.__cause__ if known else error)
        except BaseException as error:
            self._publisher.not_stored(batch, error, started)
            raise

    def _inside_handler(self) -> bool:
        """Whether a handler of ours runs here. A task that it left behind inherits its context, but holds no slot."""
        delivery = current_delivery.get()
        worker = self._workers.get(delivery.subscription) if delivery is not None else None
        return worker is not None and worker.holds(delivery)

    async def _make_ready(self, topic: object, message_id: str | None) -> None:
        """Wait for subscriptions that are being declared. Raises BusNotRunning or BusOverloaded."""
        elsewhere = self._loop is not None and get_running_loop() is not self._loop
        if self._state == "running" and not elsewhere and not self._pulse.broken:
            if self.intake.paused:
                why = f"bus {self.name!r} takes nothing now, try again later: {self.intake.paused}"
                overloaded = BusOverloaded(why)
                self._publisher.refused(topic, message_id, overloaded, self._monotonic())
                raise overloaded
            await asyncio.wait(self._declaring)
            return
        if self._state == "stopping" and not elsewhere and not self.emergency.began and self._inside_handler():
            return  # what runs may finish, and that takes what it publishes
        if elsewhere:
            why = "runs on another event loop: hand the call to it with asyncio.run_coroutine_threadsafe"
        elif self._pulse.broken:
            why = f"has stopped taking messages: {self._pulse.broken}"
        elif self._state == "new":
            why = "is not started: use 'async with bus' or 'await bus.start()'"
        elif self._state == "starting":
            why = "is starting: publish when start() has returned"
        else:
            why = f"is {self._state}: it takes no more messages"
        error = BusNotRunning(f"bus {self.name!r} {why}")
        self._publisher.refused(topic, message_id, error, self._monotonic())
        raise error

    # Operating

    async def drain(self, timeout: float | None = None) -> Drained:  # noqa: ASYNC109 - raises, as asyncio.timeout would
        """Wait until the subscriptions that this bus runs have nothing left to do, waiting retries included.

        Those held by a pause or an open breaker, and messages due later (`delay`), are left and
        named in the result; when the bus stops, all that still hold messages are. Raises
        TimeoutError after `timeout` seconds, if given.
        """
        self._check_started()
        async with asyncio.timeout(timeout):
            while self._state == "running":
                if self._declaring:
                    await asyncio.wait(self._declaring)
                await self._transport.flush()
                busy, left = self._unfinished()
                if not busy:
                    await self._transport.flush()  # what the store has taken last is told too
                    return Drained(left)
                await self._progress()
        while self._state == "stopping":  # noqa: ASYNC110 - the stop at work has a deadline of its own
            await asyncio.sleep(0.01)
        accounts = self._transport.ledger().accounts
        return Drained({name: "stopped" for name in self._workers if name in accounts and accounts[name].pending})

    async def _progress(self) -> None:
        """Wait until something is settled here. Another process may do the work, so not for long."""
        settled = asyncio.Event()
        timer = asyncio.get_running_loop().call_later(0.05, settled.set)
        workers = list(self._workers.values())
        for worker in workers:
            worker.on_settled.add(settled.set)
        try:
            await settled.wait()
        finally:
            timer.cancel()
            for worker in workers:
                worker.on_settled.discard(settled.set)

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

    def _check_started(self) -> None:
        if self._state in ("new", "starting"):
            raise TransportError(f"bus {self.name!r} is not started: its store is not open yet")

    def pause(self, subscription: str) -> asyncio.Future[None]:
        """Stop handing out messages of `subscription`, in every process, and keep them.

        Awaiting the result waits until that is stored. Raises UnknownSubscription.
        """
        return self._hold(subscription, paused=True)

    def resume(self, subscription: str) -> asyncio.Future[None]:
        """End a `pause`, also one that the bus made here. Awaiting the result waits until that is stored."""
        self._reconfiguration.resume(subscription)
        return self._hold(subscription, paused=False)

    async def reload(self) -> tuple[str, ...]:
        """Read the configuration again and put it in force: all of it at once, without a restart.

        Returns the subscriptions that it names and this bus does not have: another bus may, or they are misspelt.
        Raises ConfigurationError, naming each key that cannot work, and TransportError; then nothing is changed.
        """
        if self._state != "running":
            raise ConfigurationError(f"bus {self.name!r} is {self._state}: it reloads while it runs")
        return await self._reconfiguration.reload()

    def _hold(
        self, subscription: str, *, paused: bool | None = None, forced: Forced | None = None
    ) -> asyncio.Future[None]:
        """Store a changed hold. It takes effect at once here, and stored it holds for all."""
        asyncio.get_running_loop()  # fails on another thread, before anything is changed
        self._check_started()
        known = self._transport.queues()
        if subscription not in known:
            raise UnknownSubscription(f"no subscription {subscription!r}; known are {sorted(known)}")
        worker = self._workers.get(subscription)
        if worker is not None:
            worker.gate.hold(worker.gate.held.changed(paused, forced))
        return self._in_background("hold", self._store_hold(subscription, paused, forced))

    async def _store_hold(self, subscription: str, paused: bool | None, forced: Forced | None) -> None:
        try:
            before = await self._transport.set_hold(subscription, paused=paused, forced=forced)
        except BaseException:
            stored = self._transport.queues().get(subscription)
            worker = self._workers.get(subscription)
            if worker is not None and stored is not None:
                worker.gate.hold(stored.hold)
            raise
        if paused is not None and paused != before.paused:
            kind = SubscriptionPaused if paused else SubscriptionResumed
            self.hub.state(kind(at=self._wall(), subscription=subscription))

    async def reconnect(self) -> None:
        """Dial the broker anew at once, endpoints that refused us included: for when what was wrong is mended.

        Returns once connected, at once where that is so already. Raises TransportError, which says why not.
        """
        self._check_started()
        if self._endpoint is None:
            raise ConfigurationError(f"bus {self.name!r} has no broker to connect to: its store is {self.address}")
        await self._endpoint.reconnect()

    async def forget(self, subscription: str) -> int:
        """Remove a subscription from the store, with all it holds; how many deliveries were discarded.

        Raises UnknownSubscription. What fails leaves it as it was, and running.
        """
        running = self._workers.get(subscription)
        if running is not None and running.runs(asyncio.current_task()):
            raise GlassbusError("a handler cannot await forget() of its own subscription; start a task for it")
        worker = self._workers.pop(subscription, None)
        try:
            if worker is not None:
                await worker.stop(self.settings.publish_timeout)
                await self._transport.flush()
            discarded = await self._transport.forget(subscription)
        except BaseException:
            kept = self._subscriptions.get(subscription)
            if worker is not None and kept is not None and self._state == "running":
                self._in_background("declare", self._run_late(kept))
            raise
        self._subscriptions.pop(subscription, None)
        self._learn()
        self.hub.state(SubscriptionForgotten(at=self._wall(), subscription=subscription, discarded=discarded))
        return discarded

    # Looking

    def ledger(self) -> Ledger:
        """Where every accepted delivery is, as the store has it; after a stop, as it was left.

        Raises TransportError before the bus is started.
        """
        self._check_started()
        return self._transport.ledger()

    def queues(self) -> dict[str, QueueState]:
        """Every subscription in the store, run by this process or not. Raises as `ledger` does."""
        self._check_started()
        return self._transport.queues()

    async def audit(self) -> Audit:
        """Recount every row of the store against its ledger. Reads all of it: not for a tight loop."""
        return await self._transport.audit()

    async def explain(self, message_id: str) -> Story:
        """All that is known of one message: where it is, each attempt and decision and why, and in which traces.

        From the journal, of every process that shares the state directory, and from the store. A message that never
        failed has no lines in the journal: of it, only where it waits is known. Reads files, on a thread.
        Raises UnknownMessage, and TransportError before the bus is started.
        """
        self._check_started()
        found: list[Told] = []
        read = self.clock.on_thread(lambda: found.append(self.journal.told(message_id)))
        await get_running_loop().run_in_executor(None, read)
        told, asked = found[0], None
        try:
            asked = await ask(self._transport, message_id) if self._state == "running" else None
        except TransportError as error:  # a broker that is away: what the journal knows is told all the same
            told = told._replace(notes=(*told.notes, f"the store could not be asked: {safe_text(error, 300)}"))
        story = tell(message_id, told, asked, self._wall())
        if story is None:
            raise UnknownMessage(f"nothing is known of a message {shown(message_id)}: {FORGETS}")
        return story

    def health(self) -> Health:
        """How the bus is now. Rates are of the last 5 minutes; what cannot be told is `unknown`."""
        return self._pulse.health(self._state)

    @property
    def health_status(self) -> str:
        """What `health` said at the last look, about a second ago. Asks nothing."""
        return self._pulse.status.value if self._state == "running" else "unknown"

    # What telemetry reads (see telemetry.source.Source)

    def tallies(self) -> list[Tally]:
        """Counts of what subscriptions of this process handled, by destination."""
        return [tally for worker in list(self._workers.values()) for tally in list(worker.tallies.values())]

    def publish_tallies(self) -> list[PublishTally]:
        """Counts of what was published here, by destination."""
        return list(self._publisher.tallies.values())

    def subscribers(self) -> list[Worker]:
        """The subscriptions that this process runs, as they are now."""
        return list(self._workers.values())

    def breaker_views(self) -> list[BreakerView]:
        """Their breakers and those of recovering components, as they are now."""
        endpoints = self._endpoint.breaker_views() if self._endpoint is not None else []
        gates = (worker.gate for worker in list(self._workers.values()))
        return [*gates, *self.component_breakers.views(), *endpoints, *self.further_breakers()]

    def connections(self) -> list[Connection]:
        """Each endpoint of a broker as it is now; none where the store is embedded."""
        if self._endpoint is None:
            return []
        return self._endpoint.connections(self._transport.spooled() if isinstance(self._transport, Spools) else 0)

    def escalation_channels(self) -> list[str]:
        """The channels by which people are told."""
        return [lane.name for lane in self.escalations.channels()]

    def escalations_open(self) -> dict[str, int]:
        """Escalations that are not resolved, by severity."""
        return {severity.value: count for severity, count in self.escalations.open_by_severity().items()}

    def observer_failures(self) -> dict[str, int]:
        """How often each observer raised, by its name."""
        return dict(self.hub.failures)

    def round_trip_age_s(self) -> float | None:
        """Seconds since the store last answered; None before it ever did."""
        answered_at = self._pulse.answered_at
        return None if answered_at is None else self._monotonic() - answered_at

    def loop_age_s(self) -> float:
        """Seconds since the loop last turned; more than a few mean that something blocks it."""
        return self._monotonic() - self._pulse.turned_at

    def disk_free_bytes(self) -> int | None:
        """Free space where the store is; None when it has no disk."""
        return self._transport.disk_free_bytes()

    def journal_dropped(self) -> int:
        """Entries that the journal keeps nowhere, or only as a number in a summary."""
        return self.journal.dropped

    def error_memory_bytes(self) -> int:
        """About how much memory the records of errors take: journal, statistics, stacks of failure sites."""
        return self.journal.memory_bytes() + self._sites.memory_bytes()

    def _break(self, error: BaseException) -> None:
        """The store cannot go on: take nothing more, so that nothing more is at risk."""
        self._pulse.broken = f"{type(error).__name__}: {safe_text(error, 300)}"
        self._pulse.state_failure("store", error)
        self._pulse.look_at_health(self._state)
        if self._state == "running":
            self.emergency.begin("the store cannot go on", error=self._pulse.broken)


class _Stopping:
    """What an emergency asks of its bus."""

    def __init__(self, bus: MessageBus) -> None:
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

    def __init__(self, bus: MessageBus) -> None:
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


def _each(messages: object) -> Iterable[Outgoing | tuple[str, Any]]:
    """The messages of a batch, their form checked. Raises InvalidMessage."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Iterable):
        raise InvalidMessage(f"publish_many takes an iterable of messages, not {type(messages).__name__}")
    for message in messages:
        if not isinstance(message, Outgoing) and not (isinstance(message, tuple) and len(message) == 2):
            raise InvalidMessage(f"publish_many takes Outgoing or (topic, payload) tuples, not {repr(message)[:80]}")
        yield message
