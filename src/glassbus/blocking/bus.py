"""ProductionMessageBus: the same bus, for programs of threads."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from msgspec.structs import replace

from glassbus.blocking.attempt import described
from glassbus.blocking.breaker import CircuitBreaker
from glassbus.blocking.feed import ErrorFeed
from glassbus.blocking.handling import Handling
from glassbus.blocking.loop import LoopThread
from glassbus.blocking.manager import ErrorRecoveryManager
from glassbus.blocking.reported import Reported
from glassbus.blocking.settings import read
from glassbus.blocking.views import BlockingBreakers, BlockingDeadLetters
from glassbus.bus import Drained, MessageBus
from glassbus.errors import BusNotRunning, ConfigurationError, GlassbusError, TransportError, WouldBlockLoop, shown
from glassbus.facts import current_delivery
from glassbus.handler import Handler
from glassbus.message import Outgoing, Priority, Receipt
from glassbus.policy.breaker import BreakerState
from glassbus.policy.ledger import Audit, Ledger
from glassbus.record.errorlog import ErrorLogger
from glassbus.record.fingerprint import FailureSites
from glassbus.recovery.emergency import DEADLINE_S
from glassbus.recovery.health import Health, HealthStatus, SuccessWindow, by_rate
from glassbus.recovery.resting import NAME, PREFIX

logger = logging.getLogger("glassbus")

Function = TypeVar("Function", bound=Callable[..., Any])

#: What the end of a program waits for a bus that still runs, in seconds.
_EXIT_S = 5.0
#: How much longer than its deadline a stop is waited for, in seconds: a loop that hangs does not answer.
_STOP_GRACE_S = 5.0
_SAMPLE_EVERY_S = 5.0
_WORSE = (HealthStatus.HEALTHY, HealthStatus.UNKNOWN, HealthStatus.DEGRADED, HealthStatus.CRITICAL)


class ProductionMessageBus(Handling):
    """A message bus whose methods block, usable from any thread.

    It is a `MessageBus` on one event loop in one daemon thread, which starts when it is first needed. `config` may
    be empty. It is kept as `config`, and what it may hold is:

    - every argument of `MessageBus` by its name (`url`, `name`, `publish_timeout`, `capacity`, `rules`, …);
    - every option of `MessageBus.subscribe` but its name (`timeout`, `retry`, `concurrency`, …), as the default of
      `subscribe`, and `max_retries`, which is `retry=Retry(max_attempts=max_retries + 1)`;
    - `retry_configs` and `circuit_breaker` of `ErrorRecoveryManager`;
    - `log_dir`, `max_log_size` and `log_fsync` of `ErrorLogger`;
    - `stop_deadline`, in seconds, of `stop` (30).

    Other keys are named in one warning of the log, and ignored. Raises ConfigurationError for values that cannot work.

    A method that needs the loop raises WouldBlockLoop in a thread that runs a loop (an `async` handler among them:
    let it await the methods of `core`), and GlassbusError in a forked child. A bus can be started again after
    it was stopped. One that still runs when the program ends is stopped then.

    Attributes: `core` (the `MessageBus`), `error_logger`, `recovery_manager`, `dead_letters`, `breakers`, `connections`
    (a dict of the program's own), `subscribers` (handlers by topic).
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        if config is not None and not isinstance(config, Mapping):
            raise ConfigurationError(f"the configuration of a ProductionMessageBus is a dict, not {shown(config)}")
        self.config: Mapping[str, Any] = {} if config is None else config
        self._settings = read(self.config)
        super().__init__(FailureSites(self._settings.rules, frozenset({__file__}), self._rule_failed))
        self.error_logger = ErrorLogger(**self._settings.log)
        self._feed = ErrorFeed(self.error_logger)
        self.recovery_manager = ErrorRecoveryManager(self.config, state=self._state, keep=self._keep)
        self._make_core()
        self._reported = Reported(self._core.settings.state_dir)
        self._loop = LoopThread(self._core.name)
        # The loop of a bus that nobody holds ends; at the end of the program it is still needed, to stop the bus.
        weakref.finalize(self, self._loop.close, 0.0).atexit = False
        self.connections: dict[Any, Any] = {}
        self.subscribers: dict[str, list[Callable[..., Any]]] = {}
        self._subscribed: list[tuple[str, Callable[..., Any], dict[str, Any]]] = []
        self._changing = threading.RLock()  # around start and stop; a signal handler may stop what starts
        #: What the buses of earlier starts counted: handled, failed, published, recovered.
        self._before = (0, 0, 0, 0)
        self._metrics: dict[str, Any] = {}
        self._queues: dict[str, Any] = {}
        self._window = SuccessWindow()
        self._sampled_at = float("-inf")
        self._sample(0, 0)
        _buses.add(self)

    def _rule_failed(self, rule: Any, error: BaseException) -> None:
        self._tell(self._core.hub.failed, rule, f"rule {shown(rule)}", error)

    def _after_fork(self) -> None:
        """In the child: threads that held these locks are not there to release them."""
        self._changing = threading.RLock()
        self._feed.after_fork()
        self._reported.after_fork()
        self._make_locks()

    def _make_core(self) -> None:
        self._core = MessageBus(**self._settings.bus)
        self._core.observe(self._feed)
        self._feed.escalates = self._core.escalations.asked_by
        self._core.further_breakers = self.recovery_manager.breaker_views

    def __repr__(self) -> str:
        return f"Production{self._core!r}"

    # Starting and stopping

    def start(self) -> Self:
        """Open the store and start every subscription. Nothing when it runs.

        Raises ConfigurationError or TransportError; it can be started again then.
        """
        with self._changing:
            self._loop.check("start")
            if not self._core.running:
                if self._core.stopped:
                    self._renew()
                self._loop.call(self._core.start)
                _running.add(self)
                self._reported.restore()
                self._loop.call(self._catch_up, self._core)
                self._loop.post(self._beat, self._core)
        return self

    async def _catch_up(self, core: MessageBus) -> None:
        """Escalate and keep what came while the bus did not run."""
        self._escalate_held()
        if NAME in core.queues():
            try:
                await core.resting.begin()  # a replay, or what a killed process left on its way
            except TransportError:
                return  # stated by the store; the next message kept begins it again
        await self._reported.store(core)

    def _renew(self) -> None:
        """A bus starts once, so starting again takes a new one, with all of the subscriptions or not at all."""
        stopped, counted = self._core, self._counted()
        try:
            self._make_core()
            for topic, handler, options in self._subscribed:
                self._core.subscribe(topic, **options)(handler)
        except BaseException:
            self._core = stopped
            raise
        self._before = counted

    def stop(self, deadline: float | None = None) -> bool:
        """End intake, let running handlers finish within `deadline` seconds, give the rest back; see `MessageBus.stop`.

        Whether it has stopped: False when the loop hangs, and is left to itself. Idempotent.
        """
        within_s = self._settings.stop_deadline if deadline is None else deadline
        if not self._loop.alive:
            return True
        _not_in_handler("stop")
        self._loop.check("stop")
        with self._changing:
            try:
                if self._reported.waiting:
                    with contextlib.suppress(TimeoutError):  # what is held stays so
                        self._loop.call(self._reported.store, self._core, within_s=_STOP_GRACE_S)
                self._loop.call(self._core.stop, within_s, within_s=within_s + _STOP_GRACE_S)
            except TimeoutError:
                return False
        _running.discard(self)
        self._feed.flush(_STOP_GRACE_S)
        if self.error_logger.error_counts:  # else there is not even a folder to write to
            self.error_logger.flush()
        return True

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Messages

    def publish(
        self,
        topic: str,
        message: Any = None,
        *,
        message_id: str | None = None,
        key: str | None = None,
        priority: Priority = Priority.NORMAL,
        headers: dict[str, str] | None = None,
        delay: float = 0.0,
        expires_in: float | None = None,
    ) -> Receipt:
        """Store one message for every subscription that wants it, and return its receipt; see `MessageBus.publish`.

        Raises PublishRejected (certainly not stored) or PublishUncertain (may be: publish again with the same id).
        """
        with self._needs_start():
            return self._loop.call(
                self._core.publish,
                topic,
                message,
                message_id=message_id,
                key=key,
                priority=priority,
                headers=headers,
                delay=delay,
                expires_in=expires_in,
            )

    def publish_many(self, messages: Iterable[Outgoing | tuple[str, Any]]) -> list[Receipt]:
        """Store a batch: all of it or nothing, with one receipt for each message in order."""
        with self._needs_start():
            return self._loop.call(self._core.publish_many, messages)

    @contextlib.contextmanager
    def _needs_start(self) -> Any:
        """Say how this bus is started where the core would say how it is."""
        try:
            yield
        except BusNotRunning as error:
            if self._core.running or self._core.stopped:
                raise
            raise BusNotRunning(f"bus {self._core.name!r} is not started: call start(), or use 'with bus'") from error

    @overload
    def subscribe(self, topic: str, handler: Callable[..., Any], **options: Any) -> str: ...
    @overload
    def subscribe(self, topic: str, **options: Any) -> Callable[[Function], Function]: ...
    def subscribe(self, topic: str, handler: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Have `handler` called with every message whose topic `topic` matches; returns the subscription's name.

        Without a handler it is a decorator. `options` are those of `MessageBus.subscribe`. Without `name` the
        subscription is known by the handler's name; where that is taken, by `NAME@TOPIC`. Raises as that does.
        """
        if handler is None:

            def bind(function: Function) -> Function:
                self.subscribe(topic, function, **options)
                return function

            return bind
        given = {**self._settings.subscription, **options}
        with self._changing:
            if given.get("name") is None:
                given["name"] = self._free_name(topic, handler)
            self._on_loop(lambda: self._core.subscribe(topic, **given)(handler))
            self._subscribed.append((topic, handler, given))
            self.subscribers.setdefault(topic, []).append(handler)
        return given["name"]

    def _free_name(self, topic: str, handler: Callable[..., Any]) -> str:
        name = Handler(handler).name
        taken = {options["name"] for _, _, options in self._subscribed}
        return f"{name}@{topic}" if name in taken else name

    def _on_loop(self, function: Callable[[], Any]) -> Any:
        """Call `function` on the loop where that runs, else here."""
        if not self._core.running:
            return function()

        async def call() -> Any:
            return function()

        return self._loop.call(call)

    # Operating

    def drain(self, timeout: float | None = None) -> Drained:
        """Wait until its subscriptions have nothing left to do; see `MessageBus.drain`. Raises TimeoutError."""
        _not_in_handler("drain")
        return self._loop.call(self._core.drain, timeout)

    def pause(self, subscription: str) -> None:
        """Stop handing out messages of `subscription`, in every process, and keep them."""
        self._await(lambda: self._core.pause(subscription))

    def resume(self, subscription: str) -> None:
        """End a `pause`."""
        self._await(lambda: self._core.resume(subscription))

    def forget(self, subscription: str) -> int:
        """Remove a subscription from the store, with all it holds; how many deliveries were discarded."""
        with self._changing:  # not while it waits: a handler that it waits for may subscribe
            gone = [one for one in self._subscribed if one[2]["name"] == subscription]
            self._subscribed = [one for one in self._subscribed if one not in gone]
        try:
            discarded = self._loop.call(self._core.forget, subscription)
        except BaseException:
            with self._changing:
                self._subscribed += gone
            raise
        with self._changing:
            for topic, handler, _ in gone:
                self.subscribers[topic].remove(handler)
        return discarded

    def reload(self) -> None:
        """Read the configuration source again; see `MessageBus.reload`."""
        self._loop.call(self._core.reload)

    def _await(self, begin: Callable[[], Any]) -> None:
        async def whole() -> None:
            await begin()

        self._loop.call(whole)

    # Looking: any thread, and also while the loop hangs

    @property
    def core(self) -> MessageBus:
        """The bus itself. Its methods belong to its loop, except those that any thread may call."""
        return self._core

    @property
    def running(self) -> bool:
        return self._core.running

    @property
    def dead_letters(self) -> BlockingDeadLetters:
        return BlockingDeadLetters(self._core, self._loop)

    @property
    def breakers(self) -> BlockingBreakers:
        return BlockingBreakers(self._core, self._loop)

    def health(self) -> Health:
        """How the bus is now, as `MessageBus.health` tells it."""
        return self._core.health()

    def ledger(self) -> Ledger:
        """Where every accepted delivery is. Raises TransportError before the first start."""
        return self._core.ledger()

    def audit(self) -> Audit:
        """Recount every row of the store against its ledger."""
        return self._loop.call(self._core.audit)

    @property
    def queues(self) -> dict[str, Any]:
        """Every subscription in the store with its state, and what else the program has put here."""
        with contextlib.suppress(TransportError):  # before the first start there are none to see
            self._queues.update(self._core.queues())
        return self._queues

    @property
    def metrics(self) -> dict[str, Any]:
        """Counts since this object was made, as they are now; what else the program has put here stays."""
        handled, failed, published, recovered = self._counted()
        self._metrics.update(
            messages_published=published,
            messages_processed=handled,
            messages_failed=failed + self.messages_failed,
            errors_total=sum(self.error_logger.error_counts.values()),
            errors_recovered=recovered + self.errors_recovered,
            handling_failures=self.handling_failures,
            untold=self._loop.dropped + self._feed.dropped,
            unsaved=self._reported.refused + self.recovery_manager.unsaved,
        )
        return self._metrics

    def _counted(self) -> tuple[int, int, int, int]:
        """What buses counted: messages handled, failed and published, and errors recovered."""
        health = self._core.health()
        # What it keeps itself was published by nobody.
        programs = [t for t in self._core.publish_tallies() if not t.destination.startswith(PREFIX)]
        published = sum(tally.accepted for tally in programs)
        now = (health.messages_processed, health.messages_failed, published, health.errors_recovered)
        handled, failed, published, recovered = (before + more for before, more in zip(self._before, now, strict=True))
        return handled, failed, published, recovered

    def get_health_status(self) -> dict[str, Any]:
        """How the bus is, as plain values; never blocks and never raises.

        `status` is `healthy`, `degraded`, `critical` or `unknown`: that of `health()`, and not better than what the
        share of handled messages over the last 5 minutes says, errors that were handed to the bus included. Before the
        first start that share alone decides. `ready` says whether it takes messages.
        """
        # The statistics of the error log, which has both the bus's failures and those that were handed to it.
        health = replace(self._core.health(), ask_statistics=self.error_logger.get_error_statistics)
        metrics = self.metrics
        processed, failed = metrics["messages_processed"], metrics["messages_failed"]
        rate = self._sample(processed, failed)
        return {
            **health.to_dict(),
            "status": self._status(health, rate).value,
            "running": self.running,
            "messages_processed": processed,
            "messages_failed": failed,
            "success_rate": rate,
            "errors_recovered": metrics["errors_recovered"],
            "active_connections": health.active_connections + len(self.connections),
            "active_queues": len(self.queues),
            "circuit_breaker_status": self._breaker_states(health),
        }

    def _breaker_states(self, health: Health) -> dict[str, str]:
        """Each breaker once, those of recovering by their category; a state is equal to its name in any case."""
        recovering = dict(self.recovery_manager.circuit_breakers)
        ours = {one.name for one in recovering.values() if isinstance(one, CircuitBreaker)}
        others = {name: state for name, state in health.circuit_breaker_status.items() if name not in ours}
        for category, breaker in recovering.items():
            others[str(category)] = getattr(breaker, "state", "unknown")
        return {name: _breaker_state(state) for name, state in others.items()}

    def _status(self, health: Health, rate: float) -> HealthStatus:
        if not (self._core.running or self._core.stopped):
            return by_rate(rate)
        return max(health.status, by_rate(rate), key=_WORSE.index)

    def _beat(self, core: MessageBus) -> None:
        """Sample while `core` runs, also when nobody asks, so that the window is one of 5 minutes. On the loop."""
        if core.running:
            handled, failed, _, _ = self._counted()
            self._sample(handled, failed + self.messages_failed)
            self._escalate_held()
            self._store_held()
            asyncio.get_running_loop().call_later(_SAMPLE_EVERY_S, self._beat, core)

    def _sample(self, processed: int, failed: int) -> float:
        """The share of messages handled lately."""
        now = time.monotonic()
        with self._counting:
            if now - self._sampled_at >= 1.0:
                self._sampled_at = now
                self._window.sample(now, processed, processed + failed)
            return self._window.rate(now, processed, processed + failed)

    # Emergencies

    def _emergency_shutdown(self, reason: str = "asked for by the program") -> bool:
        """Stop at once and save what is held; see `MessageBus.emergency_stop`. Whether it has ended. Idempotent.

        Where waiting is not possible (in a handler, or a thread that runs a loop), it is begun, and False returned. A
        bus that never ran has nothing to stop.
        """
        if not self._loop.alive:
            return self._reported.save() or self._core.settings.state_dir is None
        text = reason if type(reason) is str else shown(reason)
        self._core.emergency.request(text)
        if current_delivery.get() is not None:
            return False
        try:
            self._loop.call(self._core.emergency_stop, text, within_s=DEADLINE_S + _STOP_GRACE_S)
        except (WouldBlockLoop, TimeoutError):
            return False
        _running.discard(self)
        self._reported.save()
        return True

    def flush_facts(self, timeout: float = 5.0) -> bool:
        """Wait until observers have been told of all that was reported so far; whether they have, in `timeout` seconds.

        In the thread of a running loop nothing is waited for.
        """
        told = threading.Event()
        if not self._loop.alive:
            return True  # they were told at once
        if self._loop.here or not self._loop.post(told.set):
            return False
        return told.wait(timeout)


def _breaker_state(state: object) -> str:
    """As a BreakerState, where it is one by its text in any case; else as text."""
    text = str(getattr(state, "value", state))
    try:
        return BreakerState(text.lower())
    except ValueError:
        return text


def _not_in_handler(what: str) -> None:
    if current_delivery.get() is not None:
        raise GlassbusError(f"a handler cannot call {what}(): it would wait for itself; start a thread for it")


#: Those that run: kept although nobody else may hold them, and stopped when the program ends.
_running: set[ProductionMessageBus] = set()
_buses: weakref.WeakSet[ProductionMessageBus] = weakref.WeakSet()


def _at_exit() -> None:
    for bus in list(_running):
        try:
            bus.stop(_EXIT_S)
        except Exception as error:  # noqa: BLE001 - the program ends whatever comes; only the log is left to tell
            logger.error("%r could not be stopped at the end of the program: %s", bus, described(error))


def _after_fork() -> None:
    _running.clear()
    for bus in list(_buses):
        bus._after_fork()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)
