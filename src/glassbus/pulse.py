"""The bus's pulse: about once a second it passes on counts, samples health, checks the ledger and probes the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from glassbus.clock import Clock
from glassbus.errors import GlassbusError, StorageFull
from glassbus.facts import (
    ConnectionLost,
    ConnectionRestored,
    Fact,
    FactType,
    LedgerUnbalanced,
    PublishRefused,
    TransportFailed,
    TransportRecovered,
    transport_failed,
)
from glassbus.observer import Hub, Observer
from glassbus.recovery.health import Check, Health, HealthStatus, SuccessWindow, by_rate, worst
from glassbus.recovery.killswitch import Gate
from glassbus.transport import Transport
from glassbus.worker import Worker

_BEAT_S = 1.0
_PROBE_EVERY_S = 5.0
#: Without a round trip for so long, the store counts as gone.
_SILENCE_MAX_S = 15.0


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
    ) -> None:
        self.answered_at: float | None = None
        self.turned_at = clock.monotonic()
        self.broken = ""
        self._workers = workers
        self._transport = transport
        self._hub = hub
        self._clock = clock
        self._turned = turned
        self._started_at: float | None = None
        self._window = SuccessWindow()
        self._unbalanced: set[str] = set()
        self._failing = ""  # what the store failed at last, until a round trip succeeds
        self._failing_since = 0.0
        self._lost = ""  # the connection to a broker, until there is one again
        self._full_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._probing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """The store has just been opened: the first round trip."""
        self._started_at = self.answered_at = self._clock.monotonic()
        self._beat()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._probing is not None:
            self._probing.cancel()

    def _beat(self) -> None:
        now = self.turned_at = self._clock.monotonic()
        self._turned()
        for worker in self._workers.values():
            worker.look()
        self._window.sample(now, *self._totals())
        self._check_balance()
        late = self.answered_at is None or now - self.answered_at >= _PROBE_EVERY_S
        if self._probing is None and (late or self._failing) and not self._lost:
            self._probing = asyncio.get_running_loop().create_task(self._probe())
        self._timer = asyncio.get_running_loop().call_later(_BEAT_S, self._beat)

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

    def _check_balance(self) -> None:
        """State an account that does not balance, once, when it first does not."""
        for name, account in self._transport.ledger().accounts.items():
            if not account.unaccounted:
                self._unbalanced.discard(name)
            elif name not in self._unbalanced:
                self._unbalanced.add(name)
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
        """How the bus is, given its `state`."""
        now = self._clock.monotonic()
        workers = list(self._workers.values())
        handled, settled = self._totals()
        rate = self._window.rate(now, handled, settled)
        store = self._check_store(now)
        checks = (
            self._check_running(state),
            Check("success_rate", by_rate(rate), f"{rate:.4f} of what was settled in the last 5 min was handled"),
            _check_breakers([w.gate for w in workers]),
            _check_handlers(workers),
            self._check_ledger(),
            store,
        )
        return Health(
            status=worst(checks),
            ready=state == "running" and not self.broken and store.status is not HealthStatus.CRITICAL,
            uptime_seconds=0.0 if self._started_at is None else now - self._started_at,
            success_rate=rate,
            messages_processed=handled,
            messages_failed=settled - handled,
            errors_recovered=sum(w.recovered for w in workers),
            checks=checks,
        )

    def _check_running(self, state: str) -> Check:
        if self.broken:
            return Check("running", HealthStatus.CRITICAL, self.broken)
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


def _check_breakers(gates: list[Gate]) -> Check:
    shut = [f"{gate.name} {gate.state_name}" for gate in gates if gate.state_name != "running"]
    if not shut:
        return Check("breakers", HealthStatus.HEALTHY, "every subscription takes messages")
    all_open = all(gate.state_name == "breaker_open" for gate in gates)
    return Check("breakers", HealthStatus.CRITICAL if all_open else HealthStatus.DEGRADED, "; ".join(shut))


def _check_handlers(workers: list[Worker]) -> Check:
    lost = {w.name: w.lost for w in workers if w.lost}
    if not lost:
        return Check("handlers", HealthStatus.HEALTHY, "no handler is lost")
    dead = any(not w.limit for w in workers)
    return Check(
        "handlers",
        HealthStatus.CRITICAL if dead else HealthStatus.DEGRADED,
        "slots lost to handlers that do not return: " + ", ".join(f"{name} {count}" for name, count in lost.items()),
    )
