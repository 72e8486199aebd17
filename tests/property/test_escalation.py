"""Escalations and the outbox of a channel, against any order of events."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glassbus.errors import ErrorSeverity
from glassbus.policy import escalation as e
from glassbus.policy.escalation import (
    LEGAL,
    RANK,
    SEVERITIES,
    Alarm,
    Book,
    Change,
    Ends,
    Escalated,
    EscalationState,
    IllegalTransition,
    moved,
)
from glassbus.policy.outbox import Bucket, Outbox

QUIET_S, RENOTIFY_S = 900.0, 3600.0
MEDIUM, HIGH, CRITICAL = ErrorSeverity.MEDIUM, ErrorSeverity.HIGH, ErrorSeverity.CRITICAL


def book() -> Book:
    return Book(renotify_s=RENOTIFY_S, quiet_s=QUIET_S)


def alarm(fingerprint: str = "f", severity: ErrorSeverity = HIGH, ends: Ends = Ends.QUIET, heals: str = "") -> Alarm:
    return Alarm(fingerprint, "Name", severity, "it broke", ends, heals)


def escalated(fingerprint: str = "f", severity: ErrorSeverity = HIGH) -> Escalated:
    return book().raised(alarm(fingerprint, severity), 0.0)[0].escalation


# The states


@given(st.sampled_from(EscalationState), st.sampled_from(EscalationState))
def test_every_move_is_legal_by_the_table_or_raises(from_: EscalationState, to: EscalationState) -> None:
    one = msgspec.structs.replace(escalated(), state=from_)
    if to in LEGAL[from_]:
        assert moved(one, to).state is to
    else:
        with pytest.raises(IllegalTransition):
            moved(one, to)


def test_resolved_is_the_end_and_everything_leads_there() -> None:
    assert LEGAL[EscalationState.RESOLVED] == frozenset()
    assert all(EscalationState.RESOLVED in LEGAL[state] for state in LEGAL if state is not EscalationState.RESOLVED)


# The book

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["raise", "heal", "told", "acknowledge", "resolve", "look"]),
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(SEVERITIES),
        st.sampled_from(Ends),
        st.floats(-7200, 7200),
    ),
    max_size=60,
)


@given(STEPS)
def test_whatever_comes_there_is_one_for_each_fingerprint_and_each_opens_and_ends_once(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    """The changes of a fingerprint are opened, then anything but opened or resolved, then resolved; and so on."""
    kept, now = book(), 1e6
    told: dict[str, list[str]] = {}
    for step, fingerprint, severity, ends, passes_s in steps:
        now += passes_s
        changes: list[Change] = []
        if step == "raise":
            changes = kept.raised(alarm(fingerprint, severity, ends, f"key-{fingerprint}"), now)
        elif step == "heal":
            changes = kept.healed(f"key-{fingerprint}", "well again")
            assert kept.get(fingerprint) is None
        elif step == "told":
            kept.told(fingerprint)
        elif step == "look":
            changes = kept.look(now)
        elif kept.get(fingerprint) is not None:
            change = kept.acknowledge(fingerprint, "mia") if step == "acknowledge" else kept.resolve(fingerprint, "so")
            changes = [change] if change is not None else []
        for change in changes:
            told.setdefault(change.escalation.fingerprint, []).append(change.event)
            assert (change.event == "resolved") == (change.escalation.state is EscalationState.RESOLVED)
    for fingerprint, events in told.items():
        is_open = False
        for event in events:
            assert (event == "opened") is not is_open or event in ("still_open", "acknowledged", "resolved")
            assert is_open or event == "opened"
            is_open = event != "resolved"
        assert is_open == (kept.get(fingerprint) is not None)
    assert [RANK[one.severity] for one in kept.open()] == sorted((RANK[o.severity] for o in kept.open()), reverse=True)


def test_the_same_failure_a_thousand_times_is_one_escalation_and_a_count() -> None:
    kept = book()
    changes = [change for n in range(1000) for change in kept.raised(alarm(), float(n))]
    assert [change.event for change in changes] == ["opened"]
    (one,) = kept.open()
    assert (one.seen, one.opened_at, one.seen_at) == (1000, 0.0, 999.0)


def test_one_that_gets_worse_is_resolved_and_opened_anew() -> None:
    kept = book()
    kept.raised(alarm(severity=MEDIUM), 0.0)
    kept.acknowledge("f", "mia")
    over, anew = kept.raised(alarm(severity=CRITICAL), 5.0)
    assert (over.event, over.escalation.severity, over.reason) == ("resolved", MEDIUM, "it got worse: critical now")
    assert (anew.event, anew.escalation.severity, anew.escalation.state) == ("opened", CRITICAL, EscalationState.OPEN)
    assert kept.raised(alarm(severity=MEDIUM), 6.0) == []


def test_it_is_told_again_until_somebody_has_it() -> None:
    kept = book()
    kept.raised(alarm(ends=Ends.PERSON), 0.0)
    times = [now for now in range(0, 40_000, 60) if [c.event for c in kept.look(float(now))] == ["still_open"]]
    assert times == [3600 * n for n in range(1, 12)]
    kept.acknowledge("f", "mia")
    assert kept.acknowledge("f", "ben") is None
    assert kept.open()[0].acknowledged_by == "mia"
    assert kept.look(1e6) == []


@pytest.mark.parametrize("ends", Ends)
def test_only_what_ends_by_quiet_does_and_an_acknowledgement_does_not_hinder_it(ends: Ends) -> None:
    kept = book()
    kept.raised(alarm(ends=ends), 0.0)
    kept.raised(alarm(ends=ends), 100.0)
    kept.acknowledge("f", "mia")
    assert kept.look(100.0 + QUIET_S - 1) == []
    changes = kept.look(100.0 + QUIET_S)
    assert [change.event for change in changes] == (["resolved"] if ends is Ends.QUIET else [])


def test_after_a_restart_what_nobody_can_say_is_healed_ends_by_quiet_and_what_comes_again_does_not() -> None:
    before = book()
    for fingerprint, ends in (("gone", Ends.HEALING), ("back", Ends.HEALING), ("ours", Ends.PERSON)):
        before.raised(alarm(fingerprint, ends=ends, heals=fingerprint), 0.0)
    after = book()
    assert after.inherit(before.open(), 5000.0) == 3
    assert after.raised(alarm("back", ends=Ends.HEALING, heals="back"), 5001.0) == []
    (over,) = [change for change in after.look(5000.0 + QUIET_S) if change.event == "resolved"]
    assert over.escalation.fingerprint == "gone"
    assert [change.escalation.fingerprint for change in after.healed("back", "well")] == ["back"]
    assert [one.fingerprint for one in after.open()] == ["ours"]


def test_a_clock_set_back_neither_ends_nor_delays_anything() -> None:
    kept = book()
    kept.raised(alarm("q"), 100_000.0)
    kept.raised(alarm("p", ends=Ends.PERSON), 100_000.0)
    assert kept.look(50_000.0) == []
    assert [c.event for c in kept.look(50_000.0 + QUIET_S)] == ["resolved"]
    assert [c.event for c in kept.look(50_000.0 + RENOTIFY_S)] == ["still_open"]


def test_more_than_can_be_kept_are_counted_and_one_stands_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e, "OPEN_MAX", 3)
    kept = book()
    names = [c.escalation.name for n in range(10) for c in kept.raised(alarm(str(n)), 0.0)]
    assert names == ["Name", "Name", "Name", "TooManyEscalations"]
    assert (len(kept), kept.refused) == (4, 7)
    kept.raised(alarm("1"), 1.0)
    assert kept.get("1") is not None
    assert kept.refused == 7


# The outbox


def outbox(per_minute: float = 60.0, burst: int = 100, batch: int = 100) -> Outbox:
    return Outbox(ErrorSeverity.LOW, Bucket(per_minute, burst), batch)


def change(event: str, fingerprint: str = "f", severity: ErrorSeverity = HIGH) -> Change:
    return Change(event, escalated(fingerprint, severity))  # type: ignore[arg-type]


@given(st.floats(0.1, 600), st.integers(1, 20), st.lists(st.floats(0, 30), max_size=200))
def test_a_bucket_lets_through_no_more_than_its_burst_and_its_rate(rate: float, burst: int, waits: list[float]) -> None:
    bucket, now, let_through = Bucket(rate, burst), 0.0, 0
    for wait in waits:
        now += wait
        let_through += bucket.take(now)
    assert let_through <= burst + rate / 60 * now + 1e-6
    assert let_through >= min(len(waits), burst)


def test_what_is_over_before_the_channel_was_asked_is_not_told() -> None:
    box = outbox()
    box.add(change("opened"))
    box.add(change("resolved"))
    assert box.take(0.0) == ([], [])


def test_what_the_channel_may_have_heard_it_hears_the_end_of() -> None:
    box = outbox()
    box.add(change("opened"))
    batch, _ = box.take(0.0)
    box.failed(batch, 0.0)
    box.add(change("resolved"))
    assert box.take(0.5) == ([], [])  # it failed a moment ago
    batch, _ = box.take(1.0)
    assert [c.event for c in batch] == ["resolved"]


def test_the_worst_goes_first_and_what_is_over_the_limit_waits_and_is_told_once() -> None:
    box = outbox(per_minute=60.0, burst=2)
    for fingerprint, severity in (("m", MEDIUM), ("c", CRITICAL), ("h", HIGH), ("l", ErrorSeverity.LOW)):
        box.add(change("opened", fingerprint, severity))
    batch, held = box.take(0.0)
    assert [c.escalation.fingerprint for c in batch] == ["c", "h"]
    assert {c.escalation.fingerprint for c in held} == {"m", "l"}
    box.sent(batch)
    assert box.ready is False
    assert box.take(0.5) == ([], [])
    batch, held = box.take(1.0)
    assert ([c.escalation.fingerprint for c in batch], held) == (["m"], [])


def test_a_failing_channel_is_left_alone_twice_as_long_each_time_up_to_a_minute() -> None:
    box, now, waits = outbox(burst=1000), 0.0, []
    box.add(change("opened"))
    for _ in range(9):
        batch, _ = box.take(now)
        box.failed(batch, now)
        waits.append(box.retry_at - now)
        now = box.retry_at
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    box.sent(box.take(now)[0])
    box.add(change("acknowledged"))
    assert [c.event for c in box.take(now)[0]] == ["acknowledged"]


@example([("opened", "a"), ("take", "a"), ("resolved", "a")])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["opened", "still_open", "acknowledged", "resolved", "take", "sent", "failed"]),
            st.sampled_from(["a", "b"]),
        ),
        max_size=60,
    )
)
def test_whatever_fails_a_channel_that_works_in_the_end_knows_how_things_are(steps: list[tuple[str, str]]) -> None:
    """What is open at the end was told as open last; what is over, as over, if the channel was ever asked about it."""
    box, now = outbox(per_minute=6000, burst=1000), 0.0
    is_open = {"a": False, "b": False}
    last: dict[str, str] = {}
    asked: set[str] = set()
    out: list[Change] | None = None

    def answer(fails: bool) -> None:
        nonlocal out
        assert out is not None
        if fails:
            box.failed(out, now)
        else:
            box.sent(out)
            last.update({c.escalation.fingerprint: c.event for c in out})
        out = None

    for step, fingerprint in steps:
        now += 100.0
        if step == "take" and out is None:
            out = box.take(now)[0] or None
            asked.update(c.escalation.fingerprint for c in out or ())
        elif step in ("sent", "failed") and out is not None:
            answer(step == "failed")
        elif (
            step in ("opened", "still_open", "acknowledged", "resolved") and (step == "opened") != is_open[fingerprint]
        ):
            is_open[fingerprint] = step != "resolved"
            box.add(change(step, fingerprint))
    for _ in range(5):
        now += 100.0
        if out is None:
            out = box.take(now)[0]
            asked.update(c.escalation.fingerprint for c in out)
        answer(fails=False)
    assert len(box) == 0
    for fingerprint, still in is_open.items():
        if still:
            assert last[fingerprint] != "resolved"
        elif fingerprint in asked:
            assert last[fingerprint] == "resolved"


def test_a_channel_is_told_only_of_what_is_bad_enough_for_it() -> None:
    box = Outbox(HIGH, Bucket(60, 10), 10)
    for severity in SEVERITIES:
        box.add(change("opened", severity.value, severity))
    assert [c.escalation.severity for c in box.take(0.0)[0]] == [CRITICAL, HIGH]
