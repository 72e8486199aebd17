"""The bus's pulse: about once a second it passes on counts, samples health, checks the ledger and probes the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from glassbus.clock import Clock
from glassbus.errors import ErrorSeverity, GlassbusError, StorageFull
from glassbus.facts import (
    ConnectionLost,
    ConnectionRestored,
    Fact,
    FactType,
    HealthChanged,
    LedgerUnbalanced,
    PublishRefused,
    TransportFailed,
    TransportRecovered,
    transport_failed,
)
from glassbus.observer import Hub, Observer
from glassbus.policy.ledger import Account
from glassbus.recovery import checks as look_at
from glassbus.recovery.checks import Stalls
from glassbus.recovery.connections import Connection
from glassbus.recovery.guard import BreakerView
from glassbus.recovery.health import Check, Health, HealthStatus, SuccessWindow, by_rate, deciding, worst
from glassbus.transport import Transport
from glassbus.worker import Worker

_BEAT_S = 1.0
_PROBE_EVERY_S = 5.0
#: Without a round trip for so long, the store counts as gone.
_SILENCE_MAX_S = 15.0
#: A loop that has not turned for so long is stuck, and so nothing that it looks after can be known.
_STUCK_S = 10.0


class Records(Protocol):
    """The journal, as health sees it."""

    @property
    def trouble(self) -> str: ...
    def statistics(self) -> dict[str, Any]: ...


class People(Protocol):
    """The escalations, as health sees them."""

    def open_by_severity(self) -> dict[ErrorSeverity, int]: ...


class Pausing(Protocol):
    """The intake, as health sees it."""

    @property
    def paused(self) -> str: ...


class Surroundings(Protocol):
    """What health asks of the rest of the bus. Any thread."""

    @property
    def journal(self) -> Records: ...
    @property
    def escalations(self) -> People: ...
    @property
    def intake(self) -> Pausing: ...
    def connections(self) -> Sequence[Connection]: ...
    def breaker_views(self) -> Sequence[BreakerView]: ...


class Pulse(Observer):
    """Looks after a running bus. `turned` is called at each beat, first."""

    interests: frozenset[FactType] = frozenset(
        {TransportFailed, TransportRecovered, ConnectionLost, ConnectionRestored, PublishRefused}
    )

    def __init__(
        self,
        workers: Mapping[str, Worker],
        transport: Transport,
        hub: Hub,
        clock: Clock,
        turned: Callable[[], None],
        around: Surroundings,
    ) -> None:
        self.answered_at: float | None = None
        self.turned_at = clock.monotonic()
        self.broken = ""
        self._workers = workers
        self._transport = transport
        self._hub = hub
        self._clock = clock
        self._turned = turned
        self._around = around
        self._stalls = Stalls()
        self._looked_at_store = float("-inf")
        #: At the last look.
        self.status = HealthStatus.HEALTHY
        self._started_at: float | None = None
        self._window = SuccessWindow()
        self._unbalanced: frozenset[str] = frozenset()
        self._failing = ""  # what the store failed at last, until a round trip succeeds
        self._failing_since = 0.0
        self._lost = ""  # the connection to a broker, until there is one again
        self._full_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._probing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """The store has just been opened: the first round trip."""
        self._started_at = self.answered_at = self.turned_at = self._clock.monotonic()
        # A turn later: what the start itself healed is then known to be.
        self._timer = asyncio.get_running_loop().call_later(0.0, self._beat)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._probing is not None:
            self._probing.cancel()

    def _beat(self) -> None:
        now = self.turned_at = self._clock.monotonic()
        try:
            self._look(now)
        except Exception as error:  # noqa: BLE001 - whatever one look fails at, the next must be made
            if not self._failing:
                self.state_failure("pulse", error)
        finally:
            self._timer = asyncio.get_running_loop().call_later(_BEAT_S, self._beat)

    def _look(self, now: float) -> None:
        self._turned()
        workers = list(self._workers.values())
        for worker in workers:
            worker.look()
        self._window.sample(now, *self._totals())
        late = self.answered_at is None or now - self.answered_at >= _PROBE_EVERY_S
        if self._probing is None and (late or self._failing) and not self._lost:
            self._probing = asyncio.get_running_loop().create_task(self._probe())
        accounts = self._transport.ledger().accounts
        self._check_balance(accounts)
        if now - self._looked_at_store >= _PROBE_EVERY_S:
            self._looked_at_store = now
            self._stalls.look_at_store(self._clock.wall(), self._transport.queues(), accounts)
        keyed = frozenset(worker.name for worker in workers if worker.subscription.spec.strict_key)
        self._stalls.look(now, workers, accounts, keyed)
        self.look_at_health("running")

    def look_at_health(self, state: str) -> None:
        """State it when health has moved. On the loop."""
        health = self.health(state)
        before, self.status = self.status, health.status
        if health.status is not before:
            self._hub.state(
                HealthChanged(
                    at=self._clock.wall(),
                    from_status=before.value,
                    to_status=health.status.value,
                    detail=deciding(health.checks),
                )
            )

    def _totals(self) -> tuple[int, int]:
        workers = list(self._workers.values())
        return sum(w.handled for w in workers), sum(w.settled_count for w in workers)

    async def _probe(self) -> None:
        try:
            await self._transport.probe()
            self.answered_at = self._clock.monotonic()
            if self._failing:  # the store itself has not said so: it did not notice
                after_s = self._clock.monotonic() - self._failing_since
                self._hub.state(TransportRecovered(at=self._clock.wall(), after_s=after_s))
            self._failing = ""
        except GlassbusError as error:
            if not self._failing and not self._lost:  # told once, not every second
                self.state_failure("probe", error)
        finally:
            self._probing = None

    def _check_balance(self, accounts: Mapping[str, Account]) -> None:
        """State an account that does not balance, once, when it first does not."""
        before = self._unbalanced
        self._unbalanced = frozenset(name for name, account in accounts.items() if account.unaccounted)
        for name, account in accounts.items():
            if name in self._unbalanced - before:
                self._hub.state(
                    LedgerUnbalanced(at=self._clock.wall(), subscription=name, unaccounted=account.unaccounted)
                )

    def on_fact(self, fact: Fact, /) -> None:
        """Failures of the store count at once, not only when the next probe finds them."""
        if isinstance(fact, TransportFailed):
            if not self._failing:
                self._failing_since = self._clock.monotonic()
            self._failing = fact.error[:200]
        elif isinstance(fact, TransportRecovered):
            self._failing = ""
        elif isinstance(fact, ConnectionLost):
            self._lost = f"no connection to {fact.endpoint}: {fact.error}"[:300]
        elif isinstance(fact, ConnectionRestored):
            self._lost = ""
        elif isinstance(fact, PublishRefused) and fact.reason == StorageFull.reason:
            self._full_at = self._clock.monotonic()

    def state_failure(self, operation: str, error: BaseException) -> None:
        self._hub.state(transport_failed(self._clock.wall(), operation, error))

    # Health

    def health(self, state: str) -> Health:
        """How the bus is, given its `state`. Any thread, and quick however much fails."""
        now = self._clock.monotonic()
        workers = list(self._workers.values())
        handled, settled = self._totals()
        rate = self._window.rate(now, handled, settled)
        store = self._check_store(now)
        running = self._check_running(state, now)
        breakers = self._around.breaker_views()
        connections = self._around.connections()
        paused = self._around.intake.paused
        checks = (
            running,
            Check("success_rate", by_rate(rate), f"{rate:.4f} of what was settled in the last 5 min was handled"),
            look_at.of_breakers(workers, [one for one in breakers if one.kind != "subscription"]),
            look_at.of_handlers(workers),
            self._stalls.check,
            look_at.of_intake(paused),
            self._check_ledger(),
            store,
            look_at.of_connections(connections),
            look_at.of_disk(*self._disk()),
            look_at.of_journal(self._around.journal.trouble),
            look_at.of_escalations(self._around.escalations.open_by_severity()),
        )
        answers = store.status is not HealthStatus.CRITICAL
        return Health(
            status=worst(checks),
            ready=running.status is HealthStatus.HEALTHY and answers and not paused,
            uptime_seconds=0.0 if self._started_at is None else now - self._started_at,
            success_rate=rate,
            messages_processed=handled,
            messages_failed=settled - handled,
            errors_recovered=sum(w.recovered for w in workers),
            checks=checks,
            round_trip_age_seconds=None if self.answered_at is None else now - self.answered_at,
            active_connections=sum(c.up for c in connections) if connections else int(answers and state == "running"),
            active_queues=len(workers),
            circuit_breaker_status={one.name: one.state for one in breakers},
            ask_statistics=self._around.journal.statistics,
        )

    def _disk(self) -> tuple[int | None, int]:
        try:
            free = self._transport.disk_free_bytes()
        except OSError:
            free = None  # its place is gone: the store says so
        return free, getattr(self._transport, "reserve_bytes", look_at.RESERVE_BYTES)

    def _check_running(self, state: str, now: float) -> Check:
        if self.broken:
            return Check("running", HealthStatus.CRITICAL, self.broken)
        if state == "running" and now - self.turned_at > _STUCK_S:
            stuck_s = now - self.turned_at
            return Check("running", HealthStatus.CRITICAL, f"something has blocked the event loop for {stuck_s:.0f} s")
        return Check("running", HealthStatus.HEALTHY if state == "running" else HealthStatus.UNKNOWN, state)

    def _check_ledger(self) -> Check:
        if self._unbalanced:
            names = ", ".join(sorted(self._unbalanced))
            return Check("ledger", HealthStatus.CRITICAL, f"unaccounted deliveries in {names}")
        return Check("ledger", HealthStatus.HEALTHY, "every accepted delivery is accounted for")

    def _check_store(self, now: float) -> Check:
        if self.answered_at is None:
            return Check("store", HealthStatus.UNKNOWN, "the store was never asked")
        if self._lost or self._failing:
            return Check("store", HealthStatus.CRITICAL, self._lost or self._failing)
        if now - self._full_at < _SILENCE_MAX_S:
            return Check("store", HealthStatus.DEGRADED, "publishes were refused for want of disk space")
        age_s = now - self.answered_at
        if age_s > _SILENCE_MAX_S:
            return Check("store", HealthStatus.CRITICAL, f"no round trip to the store for {age_s:.1f} s")
        return Check("store", HealthStatus.HEALTHY, "the store answers")
