"""MessageBus: publish, subscribe, and see what became of every message."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from glassbus.bus.lifecycle import Lifecycle, Stopping
from glassbus.bus.looking import Looking
from glassbus.bus.operating import Operating
from glassbus.bus.parts import Parts
from glassbus.bus.publishing import Publishing
from glassbus.bus.subscribing import Subscribing
from glassbus.classification import Rule
from glassbus.clock import Clock, default_clock
from glassbus.codec import JSON, Codec, check_codecs
from glassbus.config import Settings, Spool, addresses, default_state_dir
from glassbus.deadletters import DeadLetters
from glassbus.errors import shown
from glassbus.handler import Handler
from glassbus.message import check_patterns
from glassbus.observer import Hub, Observer
from glassbus.policy.failover import Reconnect
from glassbus.publisher import Publisher
from glassbus.pulse import Pulse
from glassbus.record.fingerprint import FailureSites
from glassbus.record.journal import Journal, JournalSettings
from glassbus.recovery.credentials import CredentialsSource, check_source
from glassbus.recovery.emergency import Emergency
from glassbus.recovery.endpoint import EndpointSupervisor
from glassbus.recovery.escalation import Escalation, Escalations
from glassbus.recovery.guard import BreakerView, ComponentBreakers
from glassbus.recovery.queue import Growth
from glassbus.recovery.resources import Intake
from glassbus.recovery.resting import Resting
from glassbus.recovery.sources import Source
from glassbus.subscription import Subscription
from glassbus.switches import Breakers
from glassbus.transport import let_grow
from glassbus.tuning import Reconfiguration
from glassbus.worker import Worker

#: Make the observers that every bus has; the package registers them, so that the bus need not know them.
default_observers: list[Callable[[MessageBus], Observer]] = []
#: Those that `telemetry=False` leaves out.
telemetry_observers: list[Callable[[MessageBus], Observer]] = []

_OUR_FILES = frozenset(
    {
        __file__,
        *(part.__code__.co_filename for part in (Lifecycle.start, Looking.health, Operating.drain, Publishing.publish)),
        Subscribing.subscribe.__code__.co_filename,
        Parts._learn.__code__.co_filename,
        Worker.__init__.__code__.co_filename,
        Handler.__init__.__code__.co_filename,
        JSON.encode.__code__.co_filename,
    }
)


class MessageBus(Lifecycle, Publishing, Operating):
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
        self.emergency = Emergency(Stopping(self), self.settings, self.hub, self.clock)
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

    def _rule_failed(self, rule: Rule, error: BaseException) -> None:
        self.hub.failed(rule, f"rule {shown(rule)}", error)

    def __repr__(self) -> str:
        return f"MessageBus({self._transport.address!r}, name={self.name!r}, {self._state})"

    def _look_at_intake(self) -> None:
        (self._bars.add if self.intake.paused else self._bars.discard)(self.intake)

    def _set_bus_wide(self, settings: Settings) -> None:
        self._patience_s = settings.publish_timeout
        self._publisher.bytes_max = settings.payload_bytes_max
