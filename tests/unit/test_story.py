"""The story of one message: put together from journals and a store, whatever they hold."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from journal_kit import START, Kept, delivery, failed, report

from glassbus import Message, MessageBus, Priority, Retry, UnknownMessage
from glassbus import facts as f
from glassbus.cli.storytext import Places, story_text
from glassbus.errors import EndpointUnreachable, ErrorCategory
from glassbus.observer import ALL_FACTS
from glassbus.record.journalfiles import journal_files
from glassbus.record.reading import JournalReader
from glassbus.record.telling import told_by
from glassbus.story import Asked, Story, tell
from glassbus.testing import VirtualClock, run_virtual
from glassbus.transport import Hold, Located, QueueState, SubscriptionSpec, Whereabouts
from tests.facts_kit import sample


def told(folder: Path, message: str = "m-1", asked: Asked | None = None, **options: Any) -> Story:
    story = tell(message, told_by(JournalReader(folder), message), asked, START + 1000, **options)
    assert story is not None
    return story


def retried(at: float, attempt: int, message: str = "m-1", **fields: Any) -> f.RetryScheduled:
    known = {"action": "delayed_retry", "delay_s": 0.25, "max_attempts": 5, "immediate": 1, "ceiling_s": 0.4}
    return f.RetryScheduled(
        at=at,
        delivery=delivery(message, attempt=attempt),
        report=report(at),
        next_attempt=attempt + 1,
        **known | fields,
    )


def dead(at: float, attempt: int, reason: Any = "attempts_spent", **fields: Any) -> f.DeliveryDeadLettered:
    return f.DeliveryDeadLettered(
        at=at, delivery=delivery(attempt=attempt), report=report(at), reason=reason, **{"max_attempts": 5} | fields
    )


def moved(at: float, to: str, breaker: str = "charge", kind: Any = "subscription") -> f.BreakerStateChanged:
    name = "charge" if kind == "subscription" else ""
    return f.BreakerStateChanged(
        at=at, breaker=breaker, kind=kind, subscription=name, from_state="closed", to_state=to, reason="so many"
    )


def asked(*located: Located, hold: Hold | None = None, consumers: int = 1, **fields: Any) -> Asked:
    queue = QueueState(SubscriptionSpec("charge", "orders.*", 10), hold or Hold(), consumers)
    where = Whereabouts("m-1", "orders.created", START, deliveries=located, **fields) if located else None
    return Asked("sqlite:///orders.db", where, [], {"charge": queue})


# What was decided, and why


def test_each_attempt_is_told_with_its_decision_and_the_rule_that_made_it(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.state(
        failed(START + 1, attempt=1), retried(START + 1, 1, action="immediate_retry", delay_s=0.0, ceiling_s=0.0),
        failed(START + 2, attempt=2), retried(START + 2, 2),
        failed(START + 3, attempt=3), retried(START + 3, 3, postponed=True, delay_s=7.0),
        failed(START + 9, attempt=4), retried(START + 9, 4, immediate=0),
        failed(START + 12, attempt=5), dead(START + 12, 5),
    )  # fmt: skip
    kept.journal.close()
    (one,) = told(tmp_path).deliveries
    steps = [step for step in one.steps if step.kind != "attempt"]
    assert [(step.kind, step.attempt, step.why) for step in steps] == [
        ("retry", 1, "immediate retry 1 of 1"),
        ("retry", 2, "backoff: drawn from 0 to 400 ms"),
        ("retry", 3, "postponed: the retry budget of the subscription is spent"),
        ("retry", 4, "backoff: drawn from 0 to 400 ms; no retry is made at once for connection_error"),
        ("dead_lettered", 5, "all 5 attempts were made"),
    ]
    assert (steps[1].delay_s, steps[1].due_at) == (0.25, START + 2.25)
    first = one.steps[0]
    assert (first.kind, first.attempt, first.outcome, first.duration_s) == ("attempt", 1, "failed", 0.01)
    assert first.started_at == pytest.approx(START + 0.99)
    assert first.error is not None
    assert (first.error.category, first.error.severity, first.error.type) == (
        "connection_error", "high", "ConnectionRefusedError",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "fields", "why"),
    [
        ("attempts_spent", {"max_attempts": 1}, "the only attempt was made"),
        ("attempts_spent", {"max_attempts": 9}, "1 attempt was made, and the rule allows no more"),
        ("not_retryable", {}, "another attempt would not help: ConnectionRefusedError is not retried here"),
        ("abandoned", {}, "its handler still ran long past its timeout and could not be stopped (abandon_after)"),
        ("owner_died", {}, "its process died, or lost its lease, in its only attempt"),
        ("overflow", {}, "its queue was full: refused"),
    ],
)
def test_why_it_became_a_dead_letter(tmp_path: Path, reason: str, fields: dict[str, Any], why: str) -> None:
    kept = Kept(tmp_path)
    kept.state(dead(START, 1, reason, **fields))
    kept.journal.close()
    assert told(tmp_path).deliveries[0].steps[-1].why == why


def test_a_recovery_ends_the_story_well(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.state(
        failed(START + 1),
        retried(START + 1, 1),
        f.RecoveryEnded(
            at=START + 2, delivery=delivery(attempt=2, failed_at=START + 1), category=ErrorCategory.CONNECTION_ERROR,
            action="delayed_retry", outcome="succeeded", duration_s=1.0,
        ),
    )  # fmt: skip
    kept.journal.close()
    (one,) = told(tmp_path).deliveries
    assert (one.steps[-1].kind, one.steps[-1].outcome, one.now.state, one.now.certain) == (
        "attempt", "handled", "handled", True,
    )  # fmt: skip


# What was around it


def test_breakers_are_those_of_the_process_that_made_the_attempt_at_that_moment(tmp_path: Path) -> None:
    one, other = Kept(tmp_path), Kept(tmp_path)
    one.state(moved(START + 1, "open"), moved(START + 1.5, "open", "endpoint:nats", "endpoint"))
    other.state(failed(START + 2, attempt=1), retried(START + 2, 1))
    one.state(failed(START + 3, attempt=2), retried(START + 3, 2), moved(START + 3.5, "closed"))
    one.state(f.SubscriptionPaused(at=START + 4, subscription="charge"))
    other.state(f.LoadShed(at=START + 5, subscription="charge", limit=2, concurrency=8, low_priority_held=True))
    other.state(failed(START + 6, attempt=3), dead(START + 6, 3, max_attempts=3))
    one.journal.close()
    other.journal.close()
    (story,) = told(tmp_path).deliveries
    around = [step.around for step in story.steps if step.kind == "attempt"]
    first, second, third = [one for one in around if one is not None]
    assert first.calm
    assert (second.kill_switch, second.breakers, second.paused) == ("open", {"endpoint:nats": "open"}, False)
    assert (third.kill_switch, third.paused, third.load_limit) == ("closed", True, 2)
    # What moved meanwhile is told between the attempts, in its place.
    kinds = [step.kind for step in story.steps]
    assert kinds.index("paused") > kinds.index("retry")
    assert "breaker" in kinds


def test_a_start_begins_with_all_breakers_closed(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.state(moved(START + 1, "open"), f.BusStarted(at=START + 2, bus="orders", transport="memory"))
    kept.state(failed(START + 3))
    kept.journal.close()
    around = told(tmp_path).deliveries[0].steps[-1].around
    assert around is not None
    assert around.calm


def test_many_moves_are_folded_in_the_story_and_counted(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.state(failed(START, attempt=1), retried(START, 1, delay_s=100.0))
    kept.state(*(moved(START + 1 + n, ("open", "half_open")[n % 2]) for n in range(50)))
    kept.state(failed(START + 100, attempt=2), dead(START + 100, 2, max_attempts=2))
    kept.journal.close()
    steps = told(tmp_path).deliveries[0].steps
    assert [step.kind for step in steps].count("breaker") == 6
    (fold,) = [step for step in steps if step.kind == "moves"]
    assert fold.why.startswith("44 more moves until")


# What is missing


def test_attempts_that_are_not_told_are_named_and_a_flood_that_may_hold_them(tmp_path: Path) -> None:
    kept = Kept(tmp_path, flood_per_s=2)
    for n in range(4):
        kept.state(failed(START + n / 10, f"other-{n}"))
    kept.state(failed(START + 0.5, attempt=1), retried(START + 0.5, 1))
    kept.state(failed(START + 5, attempt=2), retried(START + 5, 2), failed(START + 9, attempt=3), dead(START + 9, 3))
    kept.journal.close()
    kept.journal.flush()
    story = told(tmp_path)
    assert [step.attempt for step in story.deliveries[0].steps if step.kind == "attempt"] == [2, 3]
    # The retry after attempt 1 came through: it says that the attempt was, but not how it ended.
    assert any("3 facts alike came too fast" in note for note in story.notes)


def test_a_gap_is_named(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.state(failed(START + 5, attempt=4), dead(START + 5, 4))
    kept.journal.close()
    (note,) = told(tmp_path).notes
    assert note.startswith("charge: attempts 1, 2, 3 have no lines of their own: in a summary of a flood")


def test_a_death_between_attempts_is_no_gap(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.state(f.DeliveryRedelivered(at=START, delivery=delivery(attempt=2), reason="owner_died"))
    kept.state(failed(START + 1, attempt=2), retried(START + 1, 2))
    kept.journal.close()
    story = told(tmp_path)
    assert story.notes == ()
    assert story.deliveries[0].steps[0].why == "attempt 1 has no end: its process died"


def test_what_the_store_counts_and_the_journal_does_not_tell_is_a_gap(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.state(failed(START), retried(START, 1))
    kept.journal.close()
    assert "attempt 2 has no lines of its own" in told(tmp_path, asked=asked(Located("charge", "retrying", 2))).notes[0]
    assert told(tmp_path, asked=asked(Located("charge", "in_flight", 2))).notes == ()


def test_damaged_lines_are_counted_and_passed_over(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.state(failed(START), retried(START, 1))
    kept.journal.close()
    (path,) = journal_files(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        b"".join([*lines[:-1], b'{"kind":"fact","message_id":"m-1","number":"x"}\n', b"\xff\xfe\n", lines[-1][:50]])
    )
    story = told(tmp_path)
    assert [step.kind for step in story.deliveries[0].steps] == ["attempt"]
    assert "2 torn lines were passed over" in story.notes[0]


def test_a_journal_of_before_is_read(tmp_path: Path) -> None:
    """Its lines name no rule, no trace and no start."""
    folder = tmp_path / "journal"
    folder.mkdir()
    lines: list[dict[str, Any]] = [
        {"kind": "start", "format": 1, "process": "p", "pid": 7, "bus": "b", "at": START},
        {"kind": "fact", "number": 1, "at": START, "fact": "AttemptFailed", "message_id": "m-1", "attempt": 1,
         "subscription": "charge", "fields": {"duration_s": 0.5}, "topic": "orders.created", "published_at": START},
        {"kind": "fact", "number": 2, "at": START, "fact": "RetryScheduled", "message_id": "m-1", "attempt": 1,
         "subscription": "charge", "fields": {"action": "delayed_retry", "delay_s": 1.0, "next_attempt": 2}},
    ]  # fmt: skip
    (folder / "p.000001.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    story = told(tmp_path)
    assert [(step.kind, step.why, step.process) for step in story.deliveries[0].steps] == [
        ("attempt", "", 7),
        ("retry", "backoff", 7),
    ]
    assert story.deliveries[0].now.text.startswith("waiting for attempt 2, due at")
    assert (story.traces, story.published.level) == ((), "")


@pytest.mark.parametrize("kind", sorted(ALL_FACTS, key=lambda one: one.__name__), ids=lambda one: one.__name__)
def test_whatever_is_in_a_journal_can_be_told(tmp_path: Path, kind: f.FactType) -> None:
    """Each fact, and each with its fields full of what no fact would hold."""
    kept = Kept(tmp_path)
    kept.state(failed(START - 1, "m-1"), sample(kind))
    kept.journal.close()
    assert "m-1" in story_text(told(tmp_path), Places("", ""))
    (path,) = journal_files(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for junk in (None, "\x1b[31m", [], {"a": 1}, 1e400, -5, True):
        for line in lines:
            line["fields"] = dict.fromkeys(line.get("fields", {}), junk)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        story = told(tmp_path, asked=asked(Located("charge", "ready", 1)))
        json.dumps(story.to_dict())
        assert "\x1b" not in story_text(story, Places("", ""))


# Where it is


@pytest.mark.parametrize(
    ("located", "options", "text"),
    [
        (Located("charge", "ready", 0), {}, "ready for attempt 1"),
        (Located("charge", "ready", 0), {"consumers": 0}, "ready for attempt 1; nobody consumes its subscription now"),
        (Located("charge", "ready", 0), {"hold": Hold(paused=True)}, "ready for attempt 1; its subscription is paused"),
        (
            Located("charge", "ready", 1, redelivered="owner_died"),
            {},
            "ready for attempt 2, to be given again (owner died)",
        ),
        (
            Located("charge", "ready", 0, waits_for_key=True),
            {},
            "ready for attempt 1, behind another message of its key",
        ),
        (
            Located("charge", "retrying", 2, due_at=START + 1060),
            {"hold": Hold(forced="forced_open")},
            "waiting for attempt 3, at 2023-11-14T22:31:00Z (in 1 min); its kill switch is forced open",
        ),
        (Located("charge", "scheduled", 0, due_at=START), {}, "waiting for its time, due now"),
        (
            Located("charge", "in_flight", 1, owner="process 7", owner_lives=True),
            {},
            "in flight: attempt 1 with process 7",
        ),
        (
            Located("charge", "in_flight", 1, owner="process 7", owner_lives=False),
            {},
            "in flight: attempt 1 with process 7, which is dead: given again when a bus next looks",
        ),
        (Located("charge", "dead_lettered", 3, dead_letter="9"), {}, "dead-lettered after 3 attempts"),
    ],
)
def test_where_it_is_now(tmp_path: Path, located: Located, options: dict[str, Any], text: str) -> None:
    now = told(tmp_path, asked=asked(located, **options)).deliveries[0].now
    assert (now.text, now.state, now.source, now.certain) == (text, located.state, "store", True)


def test_what_left_the_store_was_handled_unless_another_end_is_told(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.state(failed(START), retried(START, 1), f.DeliveryExpired(at=START + 9, delivery=delivery(attempt=1)))
    kept.state(failed(START, "m-2"), retried(START, 1, "m-2"))
    kept.journal.close()
    gone = Asked("sqlite:///orders.db", None, [], asked(Located("charge", "ready", 1)).queues)
    assert told(tmp_path, "m-1", gone).deliveries[0].now.state == "expired"
    inferred = told(tmp_path, "m-2", gone).deliveries[0].now
    assert (inferred.state, inferred.certain) == ("handled", False)
    forgotten = told(tmp_path, "m-2", gone._replace(queues={"other": gone.queues["charge"]})).deliveries[0].now
    assert forgotten.text == "its subscription is no longer in the store"


def test_nothing_known_is_no_story(tmp_path: Path) -> None:
    assert tell("m-1", told_by(JournalReader(tmp_path), "m-1"), asked(), START) is None


# A running bus


def test_a_running_bus_tells_a_message_in_memory_alone() -> None:
    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False)

        @bus.subscribe("orders.*", name="charge", retry=Retry(3, 1, base_delay=60.0))
        async def charge(message: Message[Any]) -> None:
            raise ValueError("card declined")

        @bus.subscribe("orders.*", name="audit")
        async def audit(message: Message[Any]) -> None:
            """Handles it."""

        async with bus:
            await bus.publish("orders.created", 1, message_id="m-1", priority=Priority.HIGH, key="k")
            while bus.ledger().accounts["charge"].retrying != 1:
                await asyncio.sleep(0.01)
            story = await bus.explain("m-1")
            (charged,) = story.deliveries
            assert (charged.subscription, charged.now.state, charged.now.attempt) == ("charge", "retrying", 2)
            assert [step.kind for step in charged.steps] == ["attempt", "retry", "attempt", "retry"]
            assert (story.published.topic, story.published.level, story.published.priority, story.published.key) == (
                "orders.created", "memory", "high", "k",
            )  # fmt: skip
            with pytest.raises(UnknownMessage, match="nothing is known of a message 'm-2'"):
                await bus.explain("m-2")

    run_virtual(scenario)


def test_a_store_that_does_not_answer_leaves_what_the_journal_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: Any) -> None:
        raise EndpointUnreachable("nobody answers")

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False)

        @bus.subscribe("orders.*", name="charge", retry=Retry(1))
        async def charge(message: Message[Any]) -> None:
            raise ValueError("card declined")

        async with bus:
            await bus.publish("orders.created", 1, message_id="m-1")
            await bus.drain()
            monkeypatch.setattr(bus.store, "locate", away)
            story = await bus.explain("m-1")
            assert story.deliveries[0].now.source == "journal"
            assert story.notes == ("the store could not be asked: nobody answers",)

    run_virtual(scenario)
