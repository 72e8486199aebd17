"""The questions that health asks, each with its answer and a sentence for people.

Pure but for the views they are given: quick, and from any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from glassbus.errors import ErrorSeverity
from glassbus.policy.ledger import Account
from glassbus.recovery.connections import Connection
from glassbus.recovery.guard import BreakerView
from glassbus.recovery.health import Check, HealthStatus
from glassbus.transport import QueueState

#: Messages that could be handed out and are not, for so long, are stalled, in seconds.
STALLED_AFTER_S = 30.0
#: Beyond its own timeout, a subscription gets this long to show that it works, in seconds.
_GRACE_S = 10.0
#: Free space below which a store takes nothing new, where it does not say, in bytes.
RESERVE_BYTES = 32 * 1024 * 1024

_HEALTHY, _DEGRADED, _CRITICAL = HealthStatus.HEALTHY, HealthStatus.DEGRADED, HealthStatus.CRITICAL


class GateView(Protocol):
    @property
    def state(self) -> str: ...
    @property
    def state_name(self) -> str: ...
    @property
    def succeeded_count(self) -> int: ...
    @property
    def failed_count(self) -> int: ...


class ConsumerView(Protocol):
    """A subscription that this process runs."""

    @property
    def name(self) -> str: ...
    @property
    def timeout_s(self) -> float: ...
    @property
    def settled_count(self) -> int: ...
    @property
    def sheds(self) -> bool: ...
    @property
    def lost(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def gate(self) -> GateView: ...


def of_connections(views: Sequence[Connection]) -> Check:
    """One endpoint that is up is enough: the others of a failover set stand by."""
    if not views:
        return Check("connections", _HEALTHY, "the store is embedded: there is none to lose")
    up = [view.endpoint for view in views if view.up]
    spooled = max(view.spooled for view in views)
    waiting = f"; {spooled:,} messages wait in the spool" if spooled else ""
    if not up:
        names = ", ".join(view.endpoint for view in views)
        return Check("connections", _CRITICAL, f"no connection to {names}{waiting}")
    return Check("connections", _HEALTHY, f"connected to {', '.join(up)}{waiting}")


def of_breakers(consumers: Sequence[ConsumerView], others: Iterable[BreakerView]) -> Check:
    shut = [f"{one.name} {state}" for one in consumers if (state := _shut(one.gate))]
    everything = bool(consumers) and all(one.gate.state_name == "breaker_open" for one in consumers)
    shut += [f"{one.name} {one.state}" for one in others if one.state in ("open", "forced_open")]
    if not shut:
        return Check("breakers", _HEALTHY, "every subscription takes messages, and no breaker is open")
    return Check("breakers", _CRITICAL if everything else _DEGRADED, "; ".join(shut))


def _shut(gate: GateView) -> str:
    """Why a subscription is held back; empty when it is not. One that only probes is not well yet: each probe would
    say so, and each failed one take it back."""
    if gate.state_name == "running":
        return "half_open" if gate.state == "half_open" else ""
    return gate.state_name


def of_handlers(consumers: Sequence[ConsumerView]) -> Check:
    lost = {one.name: one.lost for one in consumers if one.lost}
    if not lost:
        return Check("handlers", _HEALTHY, "no handler is lost")
    dead = any(not one.limit for one in consumers)
    told = ", ".join(f"{name} {count}" for name, count in lost.items())
    return Check("handlers", _CRITICAL if dead else _DEGRADED, f"slots lost to handlers that do not return: {told}")


def of_disk(free_bytes: int | None, reserve_bytes: int) -> Check:
    """Below the reserve nothing new is taken; below a quarter of it acknowledgements are at risk too."""
    if free_bytes is None:
        return Check("disk", _HEALTHY, "no disk that is known of is used")
    told = f"{free_bytes // 2**20:,} MiB free, the reserve is {reserve_bytes // 2**20:,} MiB"
    if free_bytes >= reserve_bytes:
        return Check("disk", _HEALTHY, told)
    return Check("disk", _DEGRADED if free_bytes >= reserve_bytes / 4 else _CRITICAL, told)


def of_journal(trouble: str) -> Check:
    if trouble:
        return Check("journal", _DEGRADED, f"failures are kept in memory alone: {trouble}"[:300])
    return Check("journal", _HEALTHY, "failures are recorded")


def of_escalations(open_: Mapping[ErrorSeverity, int]) -> Check:
    total, critical = sum(open_.values()), open_.get(ErrorSeverity.CRITICAL, 0)
    if critical:
        return Check("escalations", _DEGRADED, f"{critical:,} critical of {total:,} are open")
    return Check("escalations", _HEALTHY, f"{total:,} open, none of them critical")


def of_intake(paused: str) -> Check:
    if paused:
        return Check("intake", _DEGRADED, f"publishes are refused for a while: {paused}"[:300])
    return Check("intake", _HEALTHY, "publishes are taken")


class Stalls:
    """Which subscriptions have messages that could be handed out, and get none done. Looked at about once a second."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[tuple[int, ...], float]] = {}
        self._check = Check("consumers", _HEALTHY, "nothing has been looked at yet")
        self._unconsumed: tuple[str, ...] = ()

    @property
    def check(self) -> Check:
        """As of the last look. Any thread."""
        return self._check

    def look(
        self, now: float, consumers: Sequence[ConsumerView], accounts: Mapping[str, Account], keyed: frozenset[str]
    ) -> None:
        """`now` is monotonic seconds. `keyed`: those of which a message may wait for another one."""
        stalled: dict[str, float] = {}
        busy = 0
        since: dict[str, tuple[tuple[int, ...], float]] = {}
        for one in consumers:
            account = accounts.get(one.name)
            if account is None or not self._could_work(one, account, keyed):
                continue
            busy += 1
            mark = (one.settled_count, one.gate.succeeded_count, one.gate.failed_count)
            before, at = self._since.get(one.name, (mark, now))
            since[one.name] = (mark, at if before == mark else now)
            idle_s = now - since[one.name][1]
            if idle_s >= max(STALLED_AFTER_S, one.timeout_s + _GRACE_S):
                stalled[one.name] = idle_s
        self._since = since
        if stalled:
            told = ", ".join(f"{name} for {idle_s:.0f} s" for name, idle_s in stalled.items())
            status = _CRITICAL if len(stalled) == busy else _DEGRADED
            self._check = Check("consumers", status, f"messages wait and none is done: {told}")
        elif self._unconsumed:
            told = ", ".join(self._unconsumed)
            self._check = Check("consumers", _DEGRADED, f"messages wait and no process consumes: {told}")
        else:
            self._check = Check("consumers", _HEALTHY, "no subscription is stalled")

    @staticmethod
    def _could_work(one: ConsumerView, account: Account, keyed: frozenset[str]) -> bool:
        held_by_key = one.name in keyed and account.retrying > 0
        return account.ready > 0 and one.gate.state_name == "running" and not one.sheds and not held_by_key

    def look_at_store(self, wall: float, queues: Mapping[str, QueueState], accounts: Mapping[str, Account]) -> None:
        """Subscriptions of the store that no process consumes, though something has waited in them."""
        self._unconsumed = tuple(
            name
            for name, state in queues.items()
            if not state.consumers
            and not state.hold.held
            and name in accounts
            and accounts[name].ready
            and state.oldest_at
            and wall - state.oldest_at >= STALLED_AFTER_S
        )
