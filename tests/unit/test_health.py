"""What healthy means: the thresholds, each check, and that the answer is there whatever goes on."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus import KillSwitch, Message, MessageBus, Retry, TransportError
from glassbus import facts as f
from glassbus.errors import ErrorSeverity
from glassbus.policy.ledger import Account
from glassbus.recovery import checks
from glassbus.recovery.checks import Stalls
from glassbus.recovery.health import Check, HealthStatus, SuccessWindow, by_rate, deciding, worst
from glassbus.testing import RecordingObserver, VirtualClock, run_virtual
from glassbus.transport import Hold, QueueState, SubscriptionSpec

HEALTHY, DEGRADED, CRITICAL, UNKNOWN = HealthStatus


# The rate


@pytest.mark.parametrize(
    ("rate", "status"),
    [(1.0, HEALTHY), (0.951, HEALTHY), (0.95, DEGRADED), (0.801, DEGRADED), (0.8, CRITICAL), (0.0, CRITICAL)],
)
def test_healthy_above_95_degraded_above_80_else_critical(rate: float, status: HealthStatus) -> None:
    assert by_rate(rate) is status


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=900))
def test_the_rate_is_of_the_last_five_minutes(seconds: list[tuple[int, int]]) -> None:
    """However long it ran before: each second some were handled, and some failed."""
    window, handled, settled = SuccessWindow(), 0, 0
    window.sample(0.0, 0, 0)
    for now, (good, bad) in enumerate(seconds, 1):
        handled, settled = handled + good, settled + good + bad
        window.sample(float(now), handled, settled)
    recent = seconds[-300:]
    good, everything = sum(g for g, _ in recent), sum(g + b for g, b in recent)
    assert window.rate(float(len(seconds)), handled, settled) == (good / everything if everything else 1.0)


def test_the_worst_check_decides_and_is_named() -> None:
    found = (Check("a", HEALTHY, "fine"), Check("b", DEGRADED, "so so"), Check("c", DEGRADED, "meh"))
    assert worst(found) is DEGRADED
    assert deciding(found) == "b: so so; c: meh"
    assert worst((*found, Check("d", CRITICAL, "gone"))) is CRITICAL
    assert worst(()) is UNKNOWN
    assert deciding(found[:1]) == "all checks are healthy"


# The checks


@dataclass
class View:
    """Anything that a check looks at."""

    name: str = "s"
    endpoint: str = "nats://one"
    up: bool = True
    spooled: int = 0
    kind: str = "component"
    state: str = "closed"
    lost: int = 0
    limit: int = 1
    settled_count: int = 0
    timeout_s: float = 30.0
    sheds: bool = False
    gate: Any = None


@dataclass
class Gate:
    state_name: str = "running"
    state: str = "closed"
    succeeded_count: int = 0
    failed_count: int = 0


def consumer(state: str = "running", **fields: Any) -> View:
    return View(gate=Gate(state), **fields)


def test_one_connection_of_a_failover_set_is_enough() -> None:
    assert checks.of_connections([]).status is HEALTHY
    up, down = View(), View(endpoint="nats://two", up=False, spooled=7)
    assert checks.of_connections([up, down]) == Check(
        "connections", HEALTHY, "connected to nats://one; 7 messages wait in the spool"
    )
    check = checks.of_connections([down])
    assert (check.status, "no connection to nats://two; 7 messages wait" in check.detail) == (CRITICAL, True)


def test_breakers_degrade_and_all_subscriptions_shut_is_critical() -> None:
    assert checks.of_breakers([consumer()], [View()]).status is HEALTHY
    assert checks.of_breakers([consumer(), consumer("breaker_open")], []).status is DEGRADED
    assert checks.of_breakers([consumer("breaker_open"), consumer("breaker_open")], []).status is CRITICAL
    assert checks.of_breakers([consumer("paused")], []).status is DEGRADED
    probing = View(gate=Gate(state="half_open"))
    assert checks.of_breakers([probing], []) == Check("breakers", DEGRADED, "s half_open")
    assert checks.of_breakers([], [View(name="endpoint/x", state="forced_open")]) == Check(
        "breakers", DEGRADED, "endpoint/x forced_open"
    )
    assert checks.of_breakers([consumer()], [View(state="half_open")]).status is HEALTHY


def test_lost_slots_degrade_and_none_left_is_critical() -> None:
    assert checks.of_handlers([consumer()]).status is HEALTHY
    assert checks.of_handlers([consumer(lost=1, limit=3)]).status is DEGRADED
    assert checks.of_handlers([consumer(lost=1, limit=0)]).status is CRITICAL


@pytest.mark.parametrize(
    ("free", "status"), [(None, HEALTHY), (100, HEALTHY), (99, DEGRADED), (25, DEGRADED), (24, CRITICAL), (0, CRITICAL)]
)
def test_a_disk_below_its_reserve_degrades_and_below_a_quarter_of_it_is_critical(
    free: int | None, status: HealthStatus
) -> None:
    assert checks.of_disk(free, 100).status is status


def test_a_journal_in_trouble_a_paused_intake_and_critical_escalations_degrade() -> None:
    assert checks.of_journal("").status is checks.of_intake("").status is HEALTHY
    assert checks.of_journal("append: full").status is checks.of_intake("memory").status is DEGRADED
    assert checks.of_escalations({ErrorSeverity.HIGH: 3}).status is HEALTHY
    assert checks.of_escalations({ErrorSeverity.HIGH: 3, ErrorSeverity.CRITICAL: 1}).status is DEGRADED


# Stalls


@dataclass
class Watch:
    """Looks once a second at consumers of which the test says what they do."""

    stalls: Stalls = field(default_factory=Stalls)
    now: float = 0.0

    def seconds(self, count: int, consumers: list[View], ready: int, retrying: int = 0, keyed: bool = False) -> Check:
        accounts = {one.name: Account(accepted=99, ready=ready, retrying=retrying) for one in consumers}
        names = frozenset(one.name for one in consumers) if keyed else frozenset()
        for _ in range(count):
            self.now += 1.0
            self.stalls.look(self.now, consumers, accounts, names)
        return self.stalls.check


def test_messages_that_wait_while_none_is_done_are_a_stall_once_the_timeout_has_passed() -> None:
    watch, one = Watch(), consumer(timeout_s=60.0)
    assert watch.seconds(70, [one], ready=5).status is HEALTHY
    check = watch.seconds(1, [one], ready=5)
    assert (check.status, check.detail) == (CRITICAL, "messages wait and none is done: s for 70 s")
    one.settled_count += 1
    assert watch.seconds(1, [one], ready=5).status is HEALTHY


@pytest.mark.parametrize("progress", ["settled_count", "succeeded_count", "failed_count"])
def test_whatever_ends_is_progress(progress: str) -> None:
    watch, one = Watch(), consumer()
    for _ in range(10):
        holder = one if hasattr(one, progress) else one.gate
        setattr(holder, progress, getattr(holder, progress) + 1)
        assert watch.seconds(35, [one], ready=5).status is HEALTHY


def test_one_stalled_of_several_degrades() -> None:
    assert Watch().seconds(100, [consumer(name="a"), consumer(name="b")], ready=1).status is CRITICAL
    watch, a, b = Watch(), consumer(name="a"), consumer(name="b")
    for _ in range(100):
        a.settled_count += 1
        check = watch.seconds(1, [a, b], ready=1)
    assert check.status is DEGRADED
    assert "b for" in check.detail


def test_what_has_nothing_to_do_is_held_back_or_waits_for_its_key_is_no_stall() -> None:
    assert Watch().seconds(300, [consumer()], ready=0).status is HEALTHY
    assert Watch().seconds(300, [consumer("paused")], ready=5).status is HEALTHY
    assert Watch().seconds(300, [consumer(sheds=True)], ready=5).status is HEALTHY
    assert Watch().seconds(300, [consumer()], ready=5, retrying=1, keyed=True).status is HEALTHY
    assert Watch().seconds(300, [consumer()], ready=5, retrying=0, keyed=True).status is CRITICAL


def test_messages_that_no_process_consumes_degrade_after_a_while() -> None:
    watch, spec = Watch(), SubscriptionSpec("orphan", "a", 10)
    waiting, accounts = QueueState(spec, Hold(), 0, oldest_at=100.0), {"orphan": Account(accepted=1, ready=1)}
    for wall, consumers, hold, status in (
        (129.0, 0, Hold(), HEALTHY),
        (130.0, 0, Hold(), DEGRADED),
        (500.0, 1, Hold(), HEALTHY),
        (500.0, 0, Hold(paused=True), HEALTHY),
    ):
        waiting = QueueState(spec, hold, consumers, oldest_at=100.0)
        watch.stalls.look_at_store(wall, {"orphan": waiting}, accounts)
        assert watch.seconds(1, [], ready=0).status is status


# The bus


def test_each_move_of_health_is_a_fact_and_there_is_none_without_one(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        seen = RecordingObserver()
        bus = MessageBus(f"sqlite:///{tmp_path}/s.db", telemetry=False, observers=[seen])
        fails = True

        @bus.subscribe("a", name="s", retry=Retry(max_attempts=1), kill_switch=KillSwitch(enabled=False))
        async def handle(_: Message[Any]) -> None:
            if fails:
                raise ValueError("no")

        async with bus:
            await asyncio.sleep(60.0)
            assert seen.of(f.HealthChanged) == []
            for _ in range(10):
                await bus.publish("a", 1)
            await asyncio.sleep(2.0)
            assert (bus.health().status, bus.health_status) == (CRITICAL, "critical")
            fails = False
            for _ in range(90):
                await bus.publish("a", 1)
            await asyncio.sleep(2.0)
            assert bus.health().status is DEGRADED
            await asyncio.sleep(600.0)
            assert bus.health().status is HEALTHY
        moves = [(fact.from_status, fact.to_status) for fact in seen.of(f.HealthChanged)]
        assert moves == [("healthy", "critical"), ("critical", "degraded"), ("degraded", "healthy")]
        assert seen.of(f.HealthChanged)[0].detail.startswith("success_rate: 0.0000")

    run_virtual(run)


def test_its_keys_are_those_that_users_know_and_all_of_it_is_json(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        bus = MessageBus(f"sqlite:///{tmp_path}/s.db", telemetry=False)

        @bus.subscribe("a", name="s", retry=Retry(max_attempts=1))
        async def handle(_: Message[Any]) -> None:
            raise ValueError("no")

        before = bus.health().to_dict()
        assert (before["status"], before["ready"], before["active_connections"]) == ("unknown", False, 0)
        async with bus:
            await bus.publish("a", 1)
            await bus.drain()
            told = bus.health().to_dict()
        assert {
            "status",
            "uptime_seconds",
            "messages_processed",
            "messages_failed",
            "success_rate",
            "errors_recovered",
            "active_connections",
            "active_queues",
            "error_statistics",
            "circuit_breaker_status",
        } <= set(told)
        assert (told["active_connections"], told["active_queues"], told["messages_failed"]) == (1, 1, 1)
        assert told["circuit_breaker_status"]["s"] == "closed"
        assert told["error_statistics"]["total_errors"] == 1
        assert json.loads(json.dumps(told))["checks"]["store"]["status"] == "healthy"

    run_virtual(run)


def test_a_thousand_errors_in_a_tight_loop_and_health_is_known_at_each(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        bus = MessageBus(telemetry=False)
        statuses = []

        @bus.subscribe("a", name="s", retry=Retry(max_attempts=1), kill_switch=KillSwitch(enabled=False))
        async def handle(_: Message[Any]) -> None:
            statuses.append(bus.health().status)
            raise ValueError("no")

        async with bus:
            for n in range(1000):
                await bus.publish("a", n)
            await bus.drain()
            assert len(statuses) == 1000
            assert set(statuses[2:]) == {CRITICAL}
            assert bus.health().messages_failed == 1000

    run_virtual(run)


def test_ready_means_that_the_store_answered_lately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(clock: VirtualClock) -> None:
        bus = MessageBus(f"sqlite:///{tmp_path}/s.db", telemetry=False)
        async with bus:
            assert bus.health().ready
            gone = asyncio.Event()

            async def silent() -> float:
                await gone.wait()
                return 0.0

            monkeypatch.setattr(bus._transport, "probe", silent)
            await asyncio.sleep(14.0)
            assert bus.health().ready
            await asyncio.sleep(8.0)
            health = bus.health()
            assert (health.ready, health.status) == (False, CRITICAL)
            assert health.round_trip_age_seconds is not None
            assert health.round_trip_age_seconds > 15
            gone.set()
            await asyncio.sleep(1.0)
            assert bus.health().ready

    run_virtual(run)


def test_a_look_that_fails_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(clock: VirtualClock) -> None:
        seen = RecordingObserver()
        bus = MessageBus(f"sqlite:///{tmp_path}/s.db", telemetry=False, observers=[seen])
        async with bus:
            ledger, broken = bus._transport.ledger, [True]

            def failing() -> Any:
                if broken[0]:
                    raise TransportError("busy")
                return ledger()

            monkeypatch.setattr(bus._transport, "ledger", failing)
            await asyncio.sleep(20.0)
            assert bus.loop_age_s() <= 1.0
            assert {fact.operation for fact in seen.of(f.TransportFailed)} == {"pulse"}
            broken[0] = False
            await asyncio.sleep(3.0)
            assert bus.health().status is HEALTHY

    run_virtual(run)


def test_a_blocked_loop_is_seen_from_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(clock: VirtualClock) -> None:
        bus = MessageBus(telemetry=False)
        async with bus:
            bus._pulse.turned_at -= 30.0
            health = await asyncio.to_thread(bus.health)
            assert (health.status, health.ready) == (CRITICAL, False)
            assert "has blocked the event loop for 30 s" in deciding(health.checks)

    run_virtual(run)


def test_open_critical_escalations_degrade_it_until_somebody_resolves_them() -> None:
    async def run(clock: VirtualClock) -> None:
        bus = MessageBus(telemetry=False)
        async with bus:
            bus.hub.state(f.LedgerUnbalanced(at=clock.wall(), subscription="s", unaccounted=1))
            await asyncio.sleep(0.1)
            assert bus.health().status is DEGRADED
            assert bus.health().ready
            bus.escalations.resolve(bus.escalations.open()[0].fingerprint, reason="a test")
            assert bus.health().status is HEALTHY

    run_virtual(run)


def test_a_start_that_failed_does_not_leave_the_next_one_without_its_ears(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        path = tmp_path / "s.db"
        path.write_text("not a database, " * 1000)
        bus = MessageBus(f"sqlite:///{path}", telemetry=False)
        with pytest.raises(TransportError):
            await bus.start()
        path.unlink()
        async with bus:
            bus.hub.state(f.transport_failed(clock.wall(), "commit", OSError("gone")))
            assert bus.health().status is CRITICAL

    run_virtual(run)
