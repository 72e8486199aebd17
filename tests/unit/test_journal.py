"""The journal: what it keeps in memory and on disk, what it never keeps, and how it counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from journal_kit import START, Kept, delivery, ended, failed, lines_of, report, text_of

from glassbus import ConfigurationError, JournalSettings, Message, MessageBus, Retry
from glassbus import facts as f
from glassbus.errors import ErrorCategory
from glassbus.message import Envelope
from glassbus.observer import ALL_FACTS
from glassbus.record.entries import LIFECYCLE, QUIET, FactLine, FloodLine
from glassbus.record.reading import JournalReader, count_lines, read_story
from tests.facts_kit import sample

# What is kept of whom


def test_from_its_first_failure_on_the_whole_story_of_a_message_is_on_disk(tmp_path: Path) -> None:
    """Also what was stated about it before, when nothing was wrong."""
    kept = Kept(tmp_path)
    before = f.DuplicateRecognised(at=START - 5, envelope=delivery().envelope, destination="orders.*", duration_s=0.1)
    kept.state(before, failed(START))
    kept.state(ended(START + 1))
    kept.state(f.DeliveryGivenBack(at=START + 2, delivery=delivery(failed_at=START), reason="stopping"))
    assert kept.journal.flush()
    told = [entry.fact for entry in read_story(tmp_path, "m-1")]
    assert told == ["DuplicateRecognised", "AttemptFailed", "RecoveryEnded", "DeliveryGivenBack"]


def test_a_message_that_never_failed_leaves_nothing_on_disk(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    for kind in sorted(QUIET - {f.BackpressureApplied}, key=str):
        fields = {"delivery": delivery()} if "delivery" in kind.__struct_fields__ else {"envelope": delivery().envelope}
        kept.state(sample(kind, **fields))
    assert kept.journal.flush()
    assert not list(tmp_path.iterdir())
    assert len(kept.journal.story("m-1")) == len(QUIET) - 1


def test_a_bus_that_comes_and_goes_makes_no_folder_until_something_fails(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "state")
    for kind in sorted(LIFECYCLE, key=str):
        kept.state(sample(kind))
    assert kept.journal.settled
    assert kept.journal.close()
    assert not (tmp_path / "state").exists()
    kept.state(failed())
    assert kept.journal.flush()
    assert {line.fact for line in lines_of(tmp_path / "state")} == {kind.__name__ for kind in LIFECYCLE} | {
        "AttemptFailed"
    }


@pytest.mark.parametrize("kind", sorted(ALL_FACTS, key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_every_fact_is_kept_without_payload_or_header(tmp_path: Path, kind: f.FactType) -> None:
    kept = Kept(tmp_path)
    kept.state(failed(90.0, "m-1"), sample(kind))
    kept.journal.flush()
    entry = kept.journal.entries()[-1]
    assert entry.fact == kind.__name__
    told = text_of(tmp_path)
    assert "secret" not in told + str(kept.journal.entries())
    if kind not in QUIET:
        assert f'"fact":"{kind.__name__}"' in told
    json.dumps(entry.fields)


def test_the_statistics_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    """One sample of every fact: what the journal counts, a reader of its files counts too."""
    kept = Kept(tmp_path)
    for kind in sorted(kept.journal.interests, key=str):
        kept.state(sample(kind, at=START))
    assert kept.journal.flush()
    live = kept.journal.statistics()
    read = count_lines(JournalReader(tmp_path).lines(), START, lambda _line: True).snapshot(START)
    for name in ("total_errors", "categories", "severity_distribution", "recoveries", "mttr_seconds", "subscriptions"):
        assert read[name] == live[name], name
    assert live["total_errors"] > 10


def test_a_failure_that_has_no_report_gets_one(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.state(sample(f.TransportFailed, at=START, operation="commit", error="disk I/O error"))
    entry = kept.journal.entries()[-1]
    assert entry.error
    assert entry.report is not None
    assert (entry.report.fingerprint, entry.report.component) == ("endpoint:commit", "endpoint")
    assert kept.journal.reports() == [entry.report]


def test_nothing_is_counted_twice(tmp_path: Path) -> None:
    """The decision about a failure refers to its report, and is no failure of its own."""
    kept = Kept(tmp_path)
    first = failed()
    kept.state(first)
    kept.state(
        f.RetryScheduled(
            at=START, delivery=first.delivery, report=first.report, action="immediate_retry", delay_s=0, next_attempt=2
        ),
        f.DeliveryDeadLettered(at=START, delivery=first.delivery, report=first.report, reason="attempts_spent"),
    )
    assert kept.journal.statistics()["total_errors"] == 1
    kept.state(f.DeliveryDeadLettered(at=START, delivery=first.delivery, report=first.report, reason="owner_died"))
    assert kept.journal.statistics()["total_errors"] == 2


def test_memory_alone_holds_the_newest_and_counts_what_it_let_go() -> None:
    kept = Kept(None, entries=5)
    kept.state(*(failed(START + n, f"m-{n}") for n in range(8)))
    assert [entry.message_id for entry in kept.journal.entries()] == ["m-3", "m-4", "m-5", "m-6", "m-7"]
    assert kept.journal.dropped == 3
    assert kept.journal.statistics()["total_errors"] == 8
    assert kept.journal.flush()
    assert kept.journal.close()


def test_the_story_joins_memory_and_disk_and_tells_nothing_twice(tmp_path: Path) -> None:
    kept = Kept(tmp_path, entries=3)
    kept.state(*(failed(START + n, attempt=n) for n in range(1, 7)))
    kept.journal.flush()
    assert [entry.attempt for entry in kept.journal.story("m-1")] == [1, 2, 3, 4, 5, 6]


def test_a_reader_without_a_bus_gives_back_the_report_with_its_stack(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    told = failed(context={"attempt": 1})
    kept.state(told, failed(START + 1, "m-2"))
    kept.journal.close()
    (entry,) = read_story(tmp_path, "m-1")
    assert entry.report == told.report
    assert entry.topic == "orders.created"
    (second,) = read_story(tmp_path, "m-2")
    assert second.report is not None
    assert "line 7, in charge" in second.report.stack_trace
    assert text_of(tmp_path).count("line 7, in charge") == 1


def test_a_message_id_is_looked_for_as_it_is_and_not_as_a_pattern(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    ids = ["m-1", "m-11", 'm"1\\', "é", "m\n1"]
    kept.state(*(failed(message=one) for one in ids))
    kept.state(failed(message="other", context={"after": "m-1"}))
    kept.journal.flush()
    for one in ids:
        assert [entry.message_id for entry in read_story(tmp_path, one)] == [one]
    assert read_story(tmp_path, "m") == []
    assert read_story(tmp_path / "nowhere", "m-1") == []


# Floods


def test_above_the_rate_a_fingerprint_is_one_line_with_a_number(tmp_path: Path) -> None:
    kept = Kept(tmp_path, flood_per_s=100)
    kept.state(*(failed(START + n / 1000, f"m-{n}") for n in range(900)))
    kept.state(failed(START + 0.9, "other", fingerprint="another"))
    kept.clock.now = START + 5
    kept.journal.look()
    assert kept.journal.flush()
    lines = lines_of(tmp_path)
    assert sum(isinstance(line, FactLine) for line in lines) == 101
    (flood,) = [line for line in lines if isinstance(line, FloodLine)]
    assert (flood.count, flood.report.fingerprint, flood.subscription) == (800, "f00dcafe", "charge")
    assert (flood.since, flood.at) == (START + 0.1, START + 0.899)
    assert kept.journal.dropped == 800
    assert kept.journal.statistics()["journal"]["folded"] == 800


def test_a_flood_is_counted_by_readers_as_it_was(tmp_path: Path) -> None:
    kept = Kept(tmp_path, flood_per_s=10)
    for n in range(300):
        kept.state(
            failed(START + n / 100, f"m-{n}"), ended(START + n / 100, f"m-{n}", "failed" if n % 3 else "succeeded")
        )
    kept.journal.close()
    read = count_lines(JournalReader(tmp_path).lines(), START + 5, lambda _line: True).snapshot(START + 5)
    assert read["total_errors"] == 300
    assert read["recoveries"] == {"succeeded": 100, "failed": 200, "refused": 0}
    assert read["mttr_seconds"] == pytest.approx(1.5)
    assert read["top_fingerprints"][0]["count"] == 300


def test_more_kinds_than_can_be_told_apart_are_folded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glassbus.record.flood._KINDS_MAX", 5)
    kept = Kept(tmp_path, flood_per_s=10)
    kept.state(*(failed(START, f"m-{n}", fingerprint=f"print-{n}") for n in range(100)))
    assert len(kept.journal._flood._seen) <= 6
    kept.journal.close()
    read = count_lines(JournalReader(tmp_path).lines(), START + 5, lambda _line: True)
    assert read.total == 100


# Settings and the bus


@pytest.mark.parametrize(
    "wrong",
    [
        {"entries": 0},
        {"entries": True},
        {"files": 1},
        {"file_bytes": 10},
        {"file_bytes": 1e9},
        {"fsync": "sometimes"},
        {"flood_per_s": 0},
        {"metrics_every": 0},
        {"metrics_every": float("nan")},
        {"on_disk": "yes"},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        JournalSettings(**wrong)


def _failing_bus(store: Path, **options: Any) -> MessageBus:
    bus = MessageBus(f"sqlite:///{store}", telemetry=False, **options)

    @bus.subscribe("orders.*", name="charge", retry=Retry(max_attempts=2, base_delay=0.01))
    async def charge(message: Message[Any]) -> None:
        raise ConnectionError("payments are away")

    return bus


def test_a_bus_on_a_file_keeps_its_journal_beside_it_and_tells_its_own_end(tmp_path: Path) -> None:
    async def run() -> MessageBus:
        async with _failing_bus(tmp_path / "orders.db") as bus:
            await bus.publish("orders.created", {"card": "secret"}, message_id="m-1")
            await bus.drain()
            assert bus.error_memory_bytes() > 1000
        return bus

    bus = asyncio.run(run())
    assert bus.journal.settled
    state = tmp_path / "orders.db.state"
    told = [entry.fact for entry in read_story(state, "m-1")]
    assert told[0] == "AttemptFailed"
    assert told[-1] == "DeliveryDeadLettered"
    assert lines_of(state)[-1].fact == "BusStopped"
    assert "secret" not in text_of(state)
    metrics = json.loads((state / "error_metrics.json").read_text())
    assert metrics["total_errors"] == 2
    assert [one["running"] for one in metrics["processes"].values()] == [False]


def test_a_journal_may_be_kept_in_memory_alone(tmp_path: Path) -> None:
    async def run() -> MessageBus:
        async with _failing_bus(tmp_path / "orders.db", journal=JournalSettings(on_disk=False)) as bus:
            await bus.publish("orders.created", {}, message_id="m-1")
            await bus.drain()
        return bus

    assert asyncio.run(run()).journal.story("m-1")
    assert not (tmp_path / "orders.db.state" / "journal").exists()


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "state")
    old = os.umask(0)
    try:
        kept.state(failed())
        kept.journal.close()
    finally:
        os.umask(old)
    for path in [tmp_path / "state", *(tmp_path / "state").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_several_journals_of_one_folder_are_read_as_one_story(tmp_path: Path) -> None:
    first, second = Kept(tmp_path), Kept(tmp_path)
    first.state(failed(START + 1, attempt=1))
    second.state(failed(START + 2, attempt=2))
    first.state(failed(START + 3, attempt=3))
    first.journal.close()
    second.journal.close()
    assert [entry.attempt for entry in read_story(tmp_path, "m-1")] == [1, 2, 3]
    metrics = json.loads((tmp_path / "error_metrics.json").read_text())
    assert metrics["total_errors"] == 3
    assert len(metrics["processes"]) == 2


def test_reports_of_users_are_made_plain_before_they_are_written(tmp_path: Path) -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    kept = Kept(tmp_path)
    kept.state(
        failed(message="m-1", context={"error": ValueError("x"), "frame": Hostile(), "payload": b"secret", "n": 10**40})
    )
    assert kept.journal.flush()
    assert kept.journal.dropped == 0
    (entry,) = read_story(tmp_path, "m-1")
    assert entry.report is not None
    assert entry.report.context["payload"] == "<6 bytes>"
    assert "cannot be shown" in entry.report.context["frame"]


def test_a_report_that_a_program_made_is_kept_plain_and_belongs_to_its_message(tmp_path: Path) -> None:
    """It may hold anything, say any time, and be changed afterwards."""
    kept = Kept(tmp_path)
    wild: Any = report(category="of my own", severity=7, context={"message_id": "m-9", "error": ValueError("x")})
    for at in (None, "noon", float("nan"), 1e300, -1.0, START - 60):
        wild.timestamp = at
        kept.state(f.ErrorReported(at=at, report=wild))
    wild.context["later"] = ValueError("y")
    assert kept.journal.close()
    assert [entry.at for entry in read_story(tmp_path, "m-9")] == [START - 60, *[START] * 5]
    assert kept.journal.statistics()["categories"] == {"of my own": 6}
    for one in kept.journal.reports():
        assert one.context == {"message_id": "m-9", "error": "x"}


def test_refused_publishes_with_wild_ids_are_written(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.state(sample(f.PublishRefused, at=START, message_id="lone \ud800", topic="\x1b[31m"))
    assert kept.journal.flush()
    assert [line.fact for line in lines_of(tmp_path)] == ["PublishRefused"]


def test_early_entries_of_messages_that_do_not_fail_are_bounded(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    for n in range(3000):
        envelope = Envelope(f"m-{n % 2500}", "orders.created", b"", "json", {})
        kept.state(sample(f.MessageUnrouted, at=START, envelope=envelope))
    assert len(kept.journal._early) <= 2048
    kept.state(*(sample(f.MessageUnrouted, at=START, envelope=envelope) for _ in range(50)))
    assert max(map(len, kept.journal._early.values())) <= 8


def test_on_disk_a_loop_is_told_of_trouble_once(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("a file where the folder should be")
    kept = Kept(tmp_path)
    kept.state(failed())
    assert not kept.journal.flush(0.3)
    for _ in range(3):
        kept.journal.look()
    (told,) = kept.stated
    assert isinstance(told, f.JournalFailed)
    assert told.operation == "write"
    assert kept.journal.trouble.startswith("write: ")
    with contextlib.suppress(FileNotFoundError):  # for the writer, whose journal goes on
        (tmp_path / "journal").unlink()
    assert kept.journal.close(10.0)
    assert kept.journal.trouble == ""
    assert [entry.fact for entry in read_story(tmp_path, "m-1")] == ["AttemptFailed"]


def test_counts_by_category_severity_and_fingerprint_are_exact() -> None:
    kept = Kept(None)
    kept.state(failed(), failed(), failed(category=ErrorCategory.TIMEOUT_ERROR, fingerprint="other"))
    assert kept.journal.categories == {"connection_error": 2, "timeout_error": 1}
    assert kept.journal.severities == {"high": 3}
    assert kept.journal.fingerprints == {"f00dcafe": 2, "other": 1}
    assert [one.fingerprint for one in kept.journal.reports()] == ["f00dcafe", "f00dcafe", "other"]
    assert report().fingerprint == "f00dcafe"
