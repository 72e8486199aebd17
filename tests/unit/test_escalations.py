"""From facts to people: who is told of what, when, and what it takes to keep them from knowing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from glassbus import facts as f
from glassbus.config import Settings
from glassbus.errors import ConfigurationError, ErrorReport, ErrorSeverity, UnknownEscalation
from glassbus.facts import Fact
from glassbus.observer import ALL_FACTS, Hub
from glassbus.policy.triggers import HEALINGS, NAMES, TRIGGERS, Triggers
from glassbus.recovery import escalation_file, lane
from glassbus.recovery.channels import Channel, Notice
from glassbus.recovery.escalation import Escalation, Escalations
from glassbus.recovery.escalation_file import Order, carry_out, look
from glassbus.testing import RecordingObserver, VirtualClock, run_virtual
from glassbus.transport import sealed
from tests.facts_kit import DELIVERY, REPORT, sample

LOW, MEDIUM, HIGH, CRITICAL = ErrorSeverity


class Phone:
    """A channel that keeps what it was told, and does what the test wants."""

    refresh_s = 0.0
    batch = 10

    def __init__(self, name: str = "phone", at_least: ErrorSeverity = LOW) -> None:
        self.name = name
        self.at_least = at_least
        self.told: list[tuple[str, str, int]] = []
        self.act: Callable[[], None] = lambda: None

    def send(self, notices: Sequence[Notice], /) -> None:
        self.act()
        self.told += [(n.event, n.escalation.name, n.notification) for n in notices]

    @property
    def events(self) -> list[str]:
        return [event for event, _, _ in self.told]


class Desk:
    """Escalations with a hub, and a beat once a second."""

    def __init__(
        self, clock: VirtualClock, config: Escalation, state_dir: Path | None = None, bus: str = "shop"
    ) -> None:
        self.clock = clock
        self.hub = Hub(clock.wall)
        self.seen = RecordingObserver()
        settings = Settings(name=bus, state_dir=str(state_dir) if state_dir is not None else None)
        self.escalations = Escalations(config, settings, self.hub, clock)
        self.hub.add(self.seen)
        self.hub.add(self.escalations)

    async def __aenter__(self) -> Desk:
        await self.escalations.start()
        self._beat = asyncio.create_task(self._beats())
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._beat.cancel()
        await self.escalations.stop(2.0)

    async def _beats(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.escalations.look()

    def state(self, kind: type[Fact], **fields: Any) -> None:
        self.hub.state(sample(kind, **fields))

    def notified(self, channel: str = "phone") -> list[tuple[str, str]]:
        return [(n.event, n.outcome) for n in self.seen.of(f.EscalationNotified) if n.channel == channel]


def report(severity: ErrorSeverity = MEDIUM, fingerprint: str = "f00d") -> ErrorReport:
    return ErrorReport(
        error_id="1",
        timestamp=1.0,
        category=REPORT.category,
        severity=severity,
        message="refused",
        exception_type="OSError",
        fingerprint=fingerprint,
    )


def dead(fingerprint: str = "f00d", severity: ErrorSeverity = MEDIUM) -> dict[str, Any]:
    return {"kind": f.DeliveryDeadLettered, "report": report(severity, fingerprint)}


def scenario(
    tell: Callable[[Desk], Awaitable[None]],
    *channels: Channel,
    state_dir: Path | None = None,
    **config: Any,
) -> Desk:
    """Run `tell` on a desk with these channels, in virtual time."""

    async def run(clock: VirtualClock) -> Desk:
        desk = Desk(clock, Escalation(channels=channels, **config), state_dir)
        async with desk:
            await tell(desk)
        return desk

    return run_virtual(run, limit_s=10 * 86400.0)


# The table


#: A fact that somebody must know of, by the name and the severity of what it opens.
URGENT: list[tuple[str, ErrorSeverity, dict[str, Any]]] = [
    ("CriticalFailure", CRITICAL, {"kind": f.AttemptFailed, "report": report(CRITICAL)}),
    ("CriticalFailure", CRITICAL, {"kind": f.ErrorReported, "report": report(CRITICAL)}),
    ("MessageDeadLettered", MEDIUM, dead()),
    ("MessageDeadLettered", HIGH, dead(severity=HIGH)),
    ("RecoveryFailed", HIGH, {"kind": f.RecoveryConcluded, "attempt": 3}),
    ("RecoveryFailed", HIGH, {"kind": f.RecoveryConcluded, "component": "configuration", "attempt": 1}),
    (
        "RecoveryFailed",
        HIGH,
        {"kind": f.RecoveryConcluded, "component": "resources", "outcome": "refused", "attempt": 3},
    ),
    (
        "RecoveryFailed",
        CRITICAL,
        {"kind": f.RecoveryConcluded, "attempt": 1, "category": f.ErrorCategory.AUTHENTICATION_ERROR},
    ),
    ("BreakerOpen", HIGH, {"kind": f.BreakerStateChanged}),
    ("KillSwitchOpen", HIGH, {"kind": f.BreakerStateChanged, "of": "subscription"}),
    ("SubscriptionPaused", HIGH, {"kind": f.SubscriptionPaused, "reason": "bad configuration"}),
    ("IntakePaused", CRITICAL, {"kind": f.IntakePaused}),
    ("LedgerUnbalanced", CRITICAL, {"kind": f.LedgerUnbalanced}),
    ("RecordsFailed", HIGH, {"kind": f.JournalFailed}),
    ("EmergencyStop", CRITICAL, {"kind": f.EmergencyStopBegan}),
    ("MessagesMissing", CRITICAL, {"kind": f.EmergencyReconciled}),
    ("ManifestQuarantined", CRITICAL, {"kind": f.ManifestQuarantined}),
]


def fact_of(kind: type[Fact], /, of: str = "", **fields: Any) -> Fact:
    made = sample(kind, **fields)
    return msgspec.structs.replace(made, kind=of) if of else made


def fact_from(described: dict[str, Any]) -> Fact:
    return fact_of(described["kind"], **{name: value for name, value in described.items() if name != "kind"})


@pytest.mark.parametrize(("name", "severity", "fact"), URGENT)
def test_what_somebody_must_know_of(name: str, severity: ErrorSeverity, fact: dict[str, Any]) -> None:
    (alarm,) = Triggers(MEDIUM).alarms(fact_from(fact))
    assert (alarm.name, alarm.severity) == (name, severity)
    assert len(alarm.fingerprint) >= 4
    assert 0 < len(alarm.summary) <= 300


def test_every_row_of_the_table_is_shown_above() -> None:
    assert {name for name, _, _ in URGENT} == {trigger.name for trigger in TRIGGERS} <= set(NAMES)


@pytest.mark.parametrize(
    "fact",
    [
        {"kind": f.AttemptFailed, "report": report(HIGH)},  # it will be retried, or dead-lettered
        dead(severity=LOW),
        {"kind": f.RecoveryConcluded, "attempt": 2, "component": "resources"},  # shed once more
        {"kind": f.RecoveryConcluded, "attempt": 9, "outcome": "called_off"},
        {"kind": f.RecoveryConcluded, "attempt": 2},  # a connection that comes back soon
        {"kind": f.RecoveryConcluded, "attempt": 9, "outcome": "succeeded"},
        {"kind": f.RecoveryConcluded, "attempt": 9, "component": "queue"},  # what a full queue does is its dead letters
        {"kind": f.BreakerStateChanged, "to_state": "half_open"},
        {"kind": f.BreakerStateChanged, "of": "subscription", "to_state": "forced_open"},  # an operator did it
        {"kind": f.SubscriptionPaused, "reason": ""},  # an operator did it
        {"kind": f.EmergencyReconciled, "missing": 0},
        {"kind": f.ConnectionLost},
        {"kind": f.HealthChanged},
    ],
)
def test_what_nobody_need_know_of(fact: dict[str, Any]) -> None:
    assert Triggers(MEDIUM).alarms(fact_from(fact)) == []


#: What opens, and the fact that says it is over.
HEALED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kind": f.RecoveryConcluded, "attempt": 3}, {"kind": f.ConnectionRestored}),
    ({"kind": f.RecoveryConcluded, "attempt": 3}, {"kind": f.RecoveryConcluded, "outcome": "succeeded"}),
    (
        {"kind": f.RecoveryConcluded, "component": "configuration"},
        {"kind": f.RecoveryConcluded, "component": "configuration", "outcome": "succeeded"},
    ),
    (
        {"kind": f.RecoveryConcluded, "component": "resources", "target": "s", "attempt": 3},
        {
            "kind": f.LoadRegained,
            "subscription": "s",
            "limit": 4,
            "concurrency": 4,
            "low_priority_held": False,
        },
    ),
    ({"kind": f.BreakerStateChanged}, {"kind": f.BreakerStateChanged, "from_state": "open", "to_state": "closed"}),
    ({"kind": f.BreakerStateChanged, "of": "subscription"}, {"kind": f.SubscriptionForgotten}),
    (
        {"kind": f.BreakerStateChanged, "of": "subscription"},
        {"kind": f.BreakerStateChanged, "of": "subscription", "to_state": "disabled"},
    ),
    ({"kind": f.SubscriptionPaused, "reason": "x"}, {"kind": f.SubscriptionResumed}),
    ({"kind": f.SubscriptionPaused, "reason": "x"}, {"kind": f.SubscriptionForgotten}),
    ({"kind": f.IntakePaused}, {"kind": f.IntakeResumed}),
    ({"kind": f.EmergencyStopBegan}, {"kind": f.BusStarted}),
]


@pytest.mark.parametrize(("broken", "healed"), HEALED)
def test_what_heals_resolves_what_it_heals_and_nothing_else(broken: dict[str, Any], healed: dict[str, Any]) -> None:
    if broken["kind"] is f.BreakerStateChanged and healed["kind"] is f.SubscriptionForgotten:
        broken, healed = {**broken, "breaker": "s", "subscription": "s"}, {**healed, "subscription": "s"}

    async def tell(desk: Desk) -> None:
        desk.hub.state(fact_from(broken))
        desk.state(f.LedgerUnbalanced)
        await asyncio.sleep(0.1)
        assert len(desk.escalations.open()) == 2
        desk.hub.state(fact_from(healed))
        await asyncio.sleep(0.1)
        assert [one.name for one in desk.escalations.open()] == ["LedgerUnbalanced"]

    desk = scenario(tell, phone := Phone())
    assert phone.events == ["opened", "opened", "resolved"]
    assert len(desk.seen.of(f.EscalationResolved)) == 1


def test_every_healing_is_shown_above() -> None:
    assert {healing.fact for healing in HEALINGS} == {healed["kind"] for _, healed in HEALED}


def test_no_fact_makes_it_raise() -> None:
    triggers = Triggers(MEDIUM)
    for kind in ALL_FACTS:
        triggers.alarms(sample(kind))
        triggers.healed(sample(kind))


# Telling


def test_a_dead_letter_opens_one_that_is_told_and_ends_by_quiet() -> None:
    async def tell(desk: Desk) -> None:
        for _ in range(3):
            desk.hub.state(fact_from(dead()))
            await asyncio.sleep(1.0)
        await asyncio.sleep(895.0)
        assert desk.escalations.open_by_severity() == {LOW: 0, MEDIUM: 1, HIGH: 0, CRITICAL: 0}
        await asyncio.sleep(10.0)
        assert desk.escalations.open() == []

    desk = scenario(tell, phone := Phone())
    assert phone.told == [("opened", "MessageDeadLettered", 1), ("resolved", "MessageDeadLettered", 2)]
    assert [type(fact).__name__ for fact in desk.seen.facts if "Escalation" in type(fact).__name__] == [
        "EscalationOpened",
        *["EscalationNotified"] * 2,
        "EscalationResolved",
        *["EscalationNotified"] * 2,
    ]
    assert desk.notified("log") == [("opened", "sent"), ("resolved", "sent")]
    assert desk.seen.of(f.EscalationResolved)[0].after_s == pytest.approx(902, abs=3)


def test_it_is_told_again_until_acknowledged_and_then_only_that_it_is_over() -> None:
    async def tell(desk: Desk) -> None:
        desk.state(f.LedgerUnbalanced)
        await asyncio.sleep(3 * 600 + 10)
        (one,) = desk.escalations.open()
        assert desk.escalations.acknowledge(one.fingerprint, by="mia") is True
        assert desk.escalations.acknowledge(one.fingerprint, by="ben") is False
        await asyncio.sleep(3 * 600)
        desk.escalations.resolve(one.fingerprint, reason="a bug, mended")
        await asyncio.sleep(1.0)

    desk = scenario(tell, phone := Phone(), renotify=600.0)
    assert phone.events == ["opened", "still_open", "still_open", "still_open", "acknowledged", "resolved"]
    assert desk.seen.of(f.EscalationAcknowledged)[0].by == "mia"
    assert desk.seen.of(f.EscalationResolved)[0].reason == "a bug, mended"


def test_a_person_is_told_what_is_not_open() -> None:
    async def tell(desk: Desk) -> None:
        with pytest.raises(UnknownEscalation):
            desk.escalations.acknowledge("nothing", by="mia")
        with pytest.raises(UnknownEscalation):
            desk.escalations.resolve("nothing", reason="")

    scenario(tell)


def test_each_channel_is_told_what_is_bad_enough_for_it() -> None:
    async def tell(desk: Desk) -> None:
        desk.hub.state(fact_from(dead("1", MEDIUM)))
        desk.state(f.IntakePaused)
        await asyncio.sleep(1.0)

    scenario(tell, everything := Phone(), worst := Phone("pager", CRITICAL))
    assert len(everything.told) == 2
    assert worst.told == [("opened", "IntakePaused", 1)]


def test_a_flood_is_told_at_the_rate_that_people_can_read() -> None:
    async def tell(desk: Desk) -> None:
        for n in range(100):
            desk.hub.state(fact_from(dead(f"{n:04}", HIGH if n == 99 else MEDIUM)))
        await asyncio.sleep(0.5)
        assert [name for _, name, _ in phone.told] == ["MessageDeadLettered"] * 5
        assert desk.notified().count(("opened", "suppressed")) == 95
        assert desk.seen.of(f.EscalationNotified)[-1].severity is MEDIUM
        assert [n.severity for n in desk.seen.of(f.EscalationNotified) if n.outcome == "sent"].count(HIGH) == 2
        await asyncio.sleep(120.0)
        assert len(phone.told) == pytest.approx(5 + 20, abs=1)
        assert desk.notified().count(("opened", "suppressed")) == 95

    scenario(tell, phone := Phone(), burst=5, per_minute=10.0)


def test_a_channel_that_fails_is_counted_retried_and_hears_the_newest() -> None:
    def fail() -> None:
        raise OSError("unreachable")

    async def tell(desk: Desk) -> None:
        phone.act = fail
        desk.state(f.IntakePaused)
        await asyncio.sleep(100.0)
        assert phone.told == []
        assert well.events == ["opened"]
        view = next(one for one in desk.escalations.channels() if one.name == "phone")
        assert view.failing == "OSError: unreachable"
        assert view.failed == len(desk.notified()) == 7  # after 1, 2, 4, 8, 16, 32, …
        phone.act = lambda: None
        desk.state(f.IntakeResumed)
        await asyncio.sleep(61.0)
        assert phone.events == ["resolved"]
        assert (view.failing, view.sent) == ("", 1)

    desk = scenario(tell, phone := Phone(), well := Phone("well"))
    assert desk.notified()[:2] == [("opened", "failed")] * 2


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit])
def test_whatever_a_channel_raises_it_is_a_failure_and_no_more(raised: type[BaseException]) -> None:
    class Hostile(raised):  # type: ignore[misc, valid-type]
        def __str__(self) -> str:
            raise raised

    def act() -> None:
        raise Hostile

    async def tell(desk: Desk) -> None:
        phone.act = act
        desk.state(f.IntakePaused)
        await asyncio.sleep(0.5)
        assert desk.notified() == [("opened", "failed")]
        assert well.events == ["opened"]

    scenario(tell, phone := Phone(), well := Phone("well"))


def test_a_channel_that_hangs_is_told_of_once_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    hung = threading.Event()

    async def tell(desk: Desk) -> None:
        phone.act = lambda: assert_(hung.wait(60))
        desk.state(f.IntakePaused)
        await asyncio.sleep(lane.STUCK_S + 60)
        for n in range(50):
            desk.hub.state(fact_from(dead(str(n))))
        await asyncio.sleep(30.0)
        assert len(well.told) == 51
        assert desk.notified() == [("opened", "failed")]
        assert next(one for one in desk.escalations.channels() if one.name == "phone").waiting == 50
        hung.set()

    scenario(tell, phone := Phone(), well := Phone("well"), burst=1000)


def assert_(value: bool) -> None:
    assert value


def test_a_refreshed_channel_is_shown_all_that_is_open_every_minute_and_what_is_over_a_few_times() -> None:
    class Manager(Phone):
        refresh_s = 60.0

    async def tell(desk: Desk) -> None:
        desk.state(f.IntakePaused)
        desk.state(f.LedgerUnbalanced)
        await asyncio.sleep(200.0)
        assert sorted(manager.events) == ["opened"] * 2 + ["still_open"] * 6
        manager.told.clear()
        desk.state(f.IntakeResumed)
        await asyncio.sleep(0.5)
        assert manager.events == ["resolved"]
        await asyncio.sleep(600.0)
        assert manager.events.count("resolved") == 1 + 4
        assert manager.events.count("still_open") == 10

    desk = scenario(tell, manager := Manager())
    # A refresh is not another notification: nobody is told anything new.
    assert desk.notified() == [("opened", "sent"), ("opened", "sent"), ("resolved", "sent")]


def test_more_facts_than_can_be_looked_at_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glassbus.recovery.escalation._WAITING_MAX", 10)

    async def tell(desk: Desk) -> None:
        for n in range(25):
            desk.hub.state(fact_from(dead(str(n))))
        assert desk.escalations.overflowed == 15
        await asyncio.sleep(0.1)
        assert len(desk.escalations.open()) == 10

    scenario(tell)


def test_a_report_of_a_program_is_escalated_whatever_its_severity() -> None:
    async def tell(desk: Desk) -> None:
        mine = report(LOW, "")
        desk.escalations.escalate(mine)
        assert mine.escalated
        await asyncio.sleep(0.1)
        (one,) = desk.escalations.open()
        assert (one.name, one.severity, one.summary) == ("Reported", LOW, "OSError: refused")

    scenario(tell)


def test_what_came_before_the_start_is_told_after_it() -> None:
    async def run(clock: VirtualClock) -> None:
        desk = Desk(clock, Escalation(channels=(phone := Phone(),)))
        desk.state(f.IntakePaused)
        async with desk:
            await asyncio.sleep(0.1)
            assert phone.events == ["opened"]

    run_virtual(run)


def test_facts_from_any_thread_are_taken() -> None:
    async def tell(desk: Desk) -> None:
        await asyncio.to_thread(desk.state, f.IntakePaused)
        await asyncio.sleep(0.1)
        (one,) = desk.escalations.open()
        await asyncio.to_thread(desk.escalations.acknowledge, one.fingerprint, by="mia")
        await asyncio.sleep(0.1)
        assert phone.events == ["opened", "acknowledged"]

    scenario(tell, phone := Phone())


def test_a_stop_tells_what_happened_last_and_waits_for_a_hanging_channel_only_so_long() -> None:
    hung = threading.Event()

    async def run(clock: VirtualClock) -> None:
        phone, slow = Phone(), Phone("slow")
        slow.act = lambda: assert_(hung.wait(60))
        desk = Desk(clock, Escalation(channels=(phone, slow)))
        async with desk:
            desk.state(f.EmergencyStopBegan)
            before = clock.monotonic()
        assert clock.monotonic() - before == pytest.approx(2.0, abs=0.1)
        assert phone.events == ["opened"]
        hung.set()

    run_virtual(run)


# Across restarts


def test_what_is_open_survives_a_restart_is_not_told_anew_and_can_end(tmp_path: Path) -> None:
    async def first(desk: Desk) -> None:
        desk.state(f.LedgerUnbalanced)
        desk.hub.state(fact_from(dead()))
        await asyncio.sleep(1.0)
        desk.escalations.acknowledge("f00d", by="mia")

    async def second(desk: Desk) -> None:
        await asyncio.sleep(1.0)
        assert [(one.name, one.state) for one in desk.escalations.open()] == [
            ("LedgerUnbalanced", "notified"),
            ("MessageDeadLettered", "acknowledged"),
        ]
        assert phone.told == []
        desk.hub.state(fact_from(dead()))
        await asyncio.sleep(1000.0)
        assert [one.name for one in desk.escalations.open()] == ["LedgerUnbalanced"]
        desk.escalations.resolve(desk.escalations.open()[0].fingerprint, reason="x")

    async def third(desk: Desk) -> None:
        assert desk.escalations.open() == []

    scenario(first, Phone(), state_dir=tmp_path)
    scenario(second, phone := Phone(), state_dir=tmp_path)
    assert phone.events == ["resolved", "resolved"]
    scenario(third, state_dir=tmp_path)


def test_what_no_channel_could_be_told_is_told_after_the_restart(tmp_path: Path) -> None:
    async def first(clock: VirtualClock) -> None:
        desk = Desk(clock, Escalation(), tmp_path)
        await desk.escalations.start()
        desk.state(f.IntakePaused)
        desk.escalations._lanes.clear()  # it dies before it tells anybody
        await asyncio.sleep(0.1)
        await desk.escalations.stop(0.0)

    async def second(desk: Desk) -> None:
        await asyncio.sleep(0.1)

    run_virtual(first)
    scenario(second, phone := Phone(), state_dir=tmp_path)
    assert phone.events == ["opened"]


def test_the_file_is_for_its_owner_alone_and_holds_no_leftovers(tmp_path: Path) -> None:
    async def tell(desk: Desk) -> None:
        desk.state(f.IntakePaused)
        await asyncio.sleep(0.1)
        folder = tmp_path / "state" / "escalations" / "shop"
        assert sorted(path.name for path in folder.iterdir()) == ["0.json", "0.lock"]
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())
        assert folder.stat().st_mode & 0o777 == (tmp_path / "state").stat().st_mode & 0o777 == 0o700

    scenario(tell, state_dir=tmp_path / "state")


def test_nothing_is_written_while_nothing_is_open(tmp_path: Path) -> None:
    async def tell(desk: Desk) -> None:
        await asyncio.sleep(300.0)

    scenario(tell, state_dir=tmp_path / "state")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(b"critical", b"lowlevel"),
        lambda text: b"",
        lambda text: b"\x00" * 100,
    ],
    ids=["cut", "changed", "empty", "zeros"],
)
def test_a_damaged_file_is_put_aside_told_of_and_does_not_keep_the_bus_from_starting(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    async def first(desk: Desk) -> None:
        desk.state(f.IntakePaused)

    async def second(desk: Desk) -> None:
        await asyncio.sleep(0.1)
        (quarantined,) = desk.seen.of(f.ManifestQuarantined)
        assert quarantined.manifest == "escalations/0.json"
        assert (path.parent / quarantined.moved_to).read_bytes() == damaged
        assert [one.name for one in desk.escalations.open()] == ["ManifestQuarantined"]

    scenario(first, state_dir=tmp_path)
    path = tmp_path / "escalations" / "shop" / "0.json"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    scenario(second, state_dir=tmp_path)


def test_a_disk_that_cannot_be_written_is_told_of_once_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [True]
    whole = sealed.write

    def write(path: Path, lines: Sequence[bytes]) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        whole(path, lines)

    monkeypatch.setattr(sealed, "write", write)

    async def tell(desk: Desk) -> None:
        for n in range(3):
            desk.hub.state(fact_from(dead(str(n))))
            await asyncio.sleep(5.0)
        assert phone.events == ["opened"] * 4
        (failed,) = desk.seen.of(f.JournalFailed)
        assert (failed.operation, "No space left" in failed.error) == ("escalations", True)
        full[0] = False
        await asyncio.sleep(65.0)
        assert [one.name for one in desk.escalations.open()] == ["MessageDeadLettered"] * 3
        assert len(look(tmp_path)[0].escalations) == 3

    scenario(tell, phone := Phone(), state_dir=tmp_path)


def test_processes_of_one_store_have_a_file_each_and_see_each_others_in_the_count(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        one, two = Desk(clock, Escalation(), tmp_path), Desk(clock, Escalation(), tmp_path)
        async with one:
            one.state(f.IntakePaused)
            await asyncio.sleep(0.1)
            async with two:
                two.state(f.IntakePaused)
                two.state(f.LedgerUnbalanced)
                await asyncio.sleep(5.0)
                assert [(kept.number, kept.live, len(kept.escalations)) for kept in look(tmp_path)] == [
                    (0, True, 1),
                    (1, True, 2),
                ]
                assert one.escalations.open_by_severity() == two.escalations.open_by_severity()
                assert one.escalations.open_by_severity()[CRITICAL] == 2
        # Both are gone: one that starts takes over what both left.
        three = Desk(clock, Escalation(), tmp_path)
        async with three:
            await asyncio.sleep(0.1)
            assert {e.name for e in three.escalations.open()} == {"IntakePaused", "LedgerUnbalanced"}
            assert [(kept.number, len(kept.escalations)) for kept in look(tmp_path)] == [(0, 2)]

    run_virtual(run)


def test_buses_of_other_names_in_one_folder_do_not_touch_each_others(tmp_path: Path) -> None:
    async def run(clock: VirtualClock) -> None:
        async with Desk(clock, Escalation(), tmp_path, "shop") as shop:
            shop.state(f.IntakePaused)
            await asyncio.sleep(0.1)
        async with Desk(clock, Escalation(), tmp_path, "mill") as mill:
            await asyncio.sleep(5.0)
            assert mill.escalations.open() == []
        assert [kept.bus for kept in look(tmp_path)] == ["shop"]

    run_virtual(run)


def test_orders_from_outside_are_carried_out_by_a_living_bus_and_done_at_once_for_a_dead_one(tmp_path: Path) -> None:
    async def alive(desk: Desk) -> None:
        desk.state(f.LedgerUnbalanced)
        desk.hub.state(fact_from(dead()))
        await asyncio.sleep(0.1)
        (kept,) = look(tmp_path)
        assert carry_out(kept, Order("acknowledge", "f00d", "mia")) is False
        (other,) = [e.fingerprint for e in kept.escalations if e.fingerprint != "f00d"]
        assert carry_out(kept, Order("resolve", other, "mended")) is False
        assert carry_out(kept, Order("resolve", "gone", "x")) is False  # ended a moment ago: nothing comes of it
        await asyncio.sleep(3.0)
        assert [(e.fingerprint, e.acknowledged_by) for e in desk.escalations.open()] == [("f00d", "mia")]
        assert phone.events == ["opened", "opened", "acknowledged", "resolved"] or len(phone.told) == 4

    scenario(alive, phone := Phone(), state_dir=tmp_path)
    (kept,) = look(tmp_path)
    assert (kept.live, [e.fingerprint for e in kept.escalations]) == (False, ["f00d"])
    assert carry_out(kept, Order("resolve", "f00d", "mended")) is True
    assert look(tmp_path) == []
    assert not list((tmp_path / "escalations" / "shop").glob("*.order"))


def test_a_damaged_order_is_put_aside(tmp_path: Path) -> None:
    async def tell(desk: Desk) -> None:
        desk.state(f.IntakePaused)
        await asyncio.sleep(0.1)
        (tmp_path / "escalations" / "shop" / "0.f00.order").write_text("resolve everything")
        await asyncio.sleep(3.0)
        assert len(desk.seen.of(f.ManifestQuarantined)) == 1
        assert not list((tmp_path / "escalations" / "shop").glob("*.order"))

    scenario(tell, state_dir=tmp_path)


def test_a_forked_child_does_not_keep_the_place_of_its_parent(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    lock = escalation_file.lock_place(folder, 0)
    assert lock is not None
    from glassbus.recovery import places

    places._after_fork()
    assert places.lock_place(folder, 0) is not None


# Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"renotify": 0.0},
        {"quiet": float("inf")},
        {"per_minute": "30"},
        {"burst": 0},
        {"minimum": "medium"},
        {"channels": Phone()},
        {"channels": (object(),)},
        {"channels": (Phone(), Phone())},
        {"channels": (Phone("log"),)},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Escalation(**wrong)


def test_delivery_of_the_samples_names_its_subscription() -> None:
    (alarm,) = Triggers(MEDIUM).alarms(fact_from(dead()))
    assert DELIVERY.subscription in alarm.summary


def test_the_page_for_people_names_each_of_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "escalation.md").read_text()
    assert [name for name in NAMES if f"| `{name}` |" not in page] == []


def test_an_order_that_is_no_file_is_told_of_once_and_keeps_no_other_waiting(tmp_path: Path) -> None:
    async def run(desk: Desk) -> None:
        desk.state(f.IntakePaused)
        await asyncio.sleep(3.0)
        (kept,) = look(tmp_path)
        (kept.folder / f"{kept.number}.0000.order").mkdir()
        for escalated in kept.escalations:
            carry_out(kept, Order("resolve", escalated.fingerprint, "mended"))
        await asyncio.sleep(10.0)
        assert [one.name for one in desk.escalations.open()] == ["ManifestQuarantined"]
        assert len(desk.seen.of(f.ManifestQuarantined)) == 1

    scenario(run, state_dir=tmp_path)


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "escalations").symlink_to(tmp_path / "other")

    async def run(desk: Desk) -> None:
        desk.state(f.IntakePaused)
        await asyncio.sleep(3.0)
        assert "symbolic link" in desk.seen.of(f.JournalFailed)[0].error

    scenario(run, state_dir=tmp_path)
    assert list((tmp_path / "other").iterdir()) == []
