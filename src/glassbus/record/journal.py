"""What went wrong lately, and the story of single messages: in memory for all, on disk from the first failure on."""

from __future__ import annotations

import itertools
import os
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from glassbus import facts as f
from glassbus.errors import ConfigurationError, ErrorCategory, ErrorReport, ErrorSeverity, shown
from glassbus.facts import Fact
from glassbus.files import FSYNC_CHOICES, Fsync
from glassbus.observer import ALL_FACTS, Observer, TraceOf
from glassbus.record.analysis import Analysis, trends_of
from glassbus.record.entries import LIFECYCLE, QUIET, Entry, Record, entry_of, record_of
from glassbus.record.failures import failure_of
from glassbus.record.flood import FloodGuard
from glassbus.record.journalfiles import JournalFiles
from glassbus.record.journalwriter import JournalWriter
from glassbus.record.memory import about_bytes
from glassbus.record.metricsfile import METRICS_EVERY_S, METRICS_NAME, MetricsFile
from glassbus.record.plain import plain_report
from glassbus.record.reading import JournalReader, read_story
from glassbus.record.report import text_report
from glassbus.record.report_html import html_report
from glassbus.record.statistics import ErrorStatistics
from glassbus.record.telling import AROUND, Process, Told, told_by
from glassbus.record.trends import Trend

_HAPPY = frozenset({f.MessagePublished, f.DeliveryHandled})
#: Messages that have not failed, whose few entries are kept in case they do.
_EARLY_MAX = 2048
_EARLY_EACH = 8
_PROLOGUE_MAX = 50


class JournalSettings(msgspec.Struct, frozen=True):
    """How much the journal keeps, where, and how safely.

    The newest `entries` facts are kept in memory. With a state directory, and unless `on_disk` is false, what
    failed is also written there: at most `files` files of `file_bytes`, all processes together. `fsync`: "interval"
    (lines survive the death of the process when they are written, about 20 ms after the fact, and a power cut
    about a second later), "always" (each batch of lines is synced), or "never". Above `flood_per_s` facts of a
    kind and a fingerprint in a second, the rest of that second is one line with their number. `metrics_every`: how
    often `error_metrics.json` is written, in seconds.

    Raises ConfigurationError for what cannot work.
    """

    entries: int = 10_000
    on_disk: bool = True
    file_bytes: int = 10 * 1024 * 1024
    files: int = 50
    fsync: Fsync = "interval"
    flood_per_s: int = 100
    metrics_every: float = METRICS_EVERY_S

    def __post_init__(self) -> None:
        wholes = {"entries": (1, 1_000_000), "files": (2, 10_000), "flood_per_s": (1, 1_000_000)}
        wholes["file_bytes"] = (64 * 1024, 2**40)
        for name, (least, most) in wholes.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ConfigurationError(
                    f"JournalSettings.{name} is a whole number from {least:,} to {most:,}, not {shown(value)}"
                )
        if self.fsync not in FSYNC_CHOICES:
            raise ConfigurationError(
                f"JournalSettings.fsync is one of {', '.join(FSYNC_CHOICES)}, not {shown(self.fsync)}"
            )
        if type(self.metrics_every) not in (int, float) or not 0.1 <= self.metrics_every <= 86_400:
            raise ConfigurationError(
                f"JournalSettings.metrics_every is from 0.1 to 86,400 seconds, not {shown(self.metrics_every)}"
            )
        if type(self.on_disk) is not bool:
            raise ConfigurationError(f"JournalSettings.on_disk is True or False, not {shown(self.on_disk)}")


class Journal(Observer):
    """An observer that keeps what failed, and how often.

    In memory: the newest facts other than the happy ones, and exact counts of errors. On disk, in
    `state_dir`/journal, written in the background: every failure, and from a message's first failure on all that was
    and will be stated about it. It holds strings and numbers only: never a frame, an exception, a payload or a header.

    `wall` tells the time in seconds; `state` takes the facts that the journal itself has to tell. Reading is
    safe on any thread.
    """

    interests = ALL_FACTS - _HAPPY

    def __init__(
        self,
        settings: JournalSettings | None = None,
        *,
        state_dir: str | None = None,
        bus: str = "default",
        level: str = "",
        wall: Callable[[], float] = lambda: 0.0,
        state: Callable[[Fact], None] = lambda _fact: None,
    ) -> None:
        self.settings = settings = settings if settings is not None else JournalSettings()
        self._wall = wall
        self._bus, self._level = bus, level
        self._state = state
        self._ring: deque[Record] = deque(maxlen=settings.entries)
        self._numbers = itertools.count(1)
        self._stated = 0
        self._errors = ErrorStatistics(wall())
        self._flood = FloodGuard(settings.flood_per_s)
        self._early: OrderedDict[str, list[Record]] = OrderedDict()
        self._prologue: deque[Record] | None = deque(maxlen=_PROLOGUE_MAX)
        self._told_failures = 0
        self._trace_of: TraceOf | None = None
        self._state_dir: Path | None = None
        self._writer: JournalWriter | None = None
        if state_dir is not None and settings.on_disk:
            self._state_dir = Path(state_dir).absolute()
            self._writer = JournalWriter(
                JournalFiles(self._state_dir, bus, settings.file_bytes, settings.files, settings.fsync),
                MetricsFile(self._state_dir / METRICS_NAME),
                self.statistics,
                queue_max=settings.entries,
                metrics_every_s=settings.metrics_every,
            )
            self._writer.files.level = level

    def trace_with(self, trace_of: TraceOf) -> None:
        """Keep from now on with each entry what `trace_of` says of its trace. It is asked where entries are read or
        written, not where they are stated."""
        self._trace_of = trace_of
        if self._writer is not None:
            self._writer.files.trace_of = trace_of

    # Being told

    def on_fact(self, fact: Fact, /) -> None:
        self._stated = number = next(self._numbers)
        kind = type(fact)
        if kind is f.AttemptFailed:
            report, error = fact.report, True  # type: ignore[union-attr]
        elif kind is f.RetryScheduled:
            report, error = fact.report, False  # type: ignore[union-attr]
        elif kind is f.ErrorReported:
            self._keep_reported(fact, number)  # type: ignore[arg-type]
            return
        else:
            report, error = self._look_closer(fact, number)
        record = record_of(number, fact, report, error)
        if error and report is not None:
            self._errors.report(report, record[1], record[4])
        self._ring.append(record)
        if self._writer is not None:
            self._keep(self._writer, fact, record)

    def _keep_reported(self, fact: f.ErrorReported, number: int) -> None:
        """A report that a program made: it may hold anything, say any time, and be changed later."""
        now = self._wall()
        report = msgspec.structs.replace(plain_report(fact.report))
        report.context = dict(report.context)
        at = report.timestamp if 0 < report.timestamp <= now else now
        about = [report.context.get(name) for name in ("message_id", "subscription")]
        message_id, subscription = (one if isinstance(one, str) else "" for one in about)
        record = record_of(number, f.ErrorReported(at=at, report=report), report, True)
        record = (*record[:3], message_id, subscription, *record[5:])
        self._errors.report(report, at, subscription)
        self._ring.append(record)
        if self._writer is not None:
            self._keep(self._writer, fact, record)

    def _look_closer(self, fact: Fact, number: int) -> tuple[ErrorReport | None, bool]:
        """The report that `fact` refers to, and whether it is the one to be counted."""
        if isinstance(fact, f.RecoveryEnded | f.RecoveryConcluded):
            self._errors.recovery(fact.outcome, fact.duration_s, fact.at)
        failure = failure_of(fact)
        if failure is None:
            return getattr(fact, "report", None), False
        if failure.report is not None:
            return failure.report, True
        fingerprint = failure.site.strip(":")
        return ErrorReport(
            error_id=f"{fingerprint}#{number}",
            timestamp=fact.at,
            category=ErrorCategory(failure.category),
            severity=ErrorSeverity(failure.severity),
            message=failure.message,
            exception_type=failure.kind,
            fingerprint=fingerprint,
            component=failure.component,
        ), True

    def _keep(self, writer: JournalWriter, fact: Fact, record: Record) -> None:
        """Have the record written, if it tells of something that failed; with what came before, the first time."""
        at, kind, message_id = record[1], record[2], record[3]
        flood = self._flood
        if int(at) != flood.second:
            for line in flood.ended(at):
                writer.put(line)
        if kind in QUIET and not _has_failed(fact):
            if message_id:
                self._remember(message_id, record)
            return
        if self._prologue is not None:
            if kind in LIFECYCLE:
                self._prologue.append(record)
                return
            before, self._prologue = self._prologue, None
            for earlier in before:
                writer.put(earlier)
        if not (flood.passes(record, *_ending(fact)) if kind in _ENDINGS else flood.passes(record)):
            return
        if self._early:
            for earlier in self._early.pop(message_id, ()):
                writer.put(earlier)
        writer.put(record)
        if not writer.stale:
            writer.changed()

    def _remember(self, message_id: str, record: Record) -> None:
        kept = self._early.get(message_id)
        if kept is None:
            if len(self._early) >= _EARLY_MAX:
                self._early.popitem(last=False)
            kept = self._early[message_id] = []
        if len(kept) < _EARLY_EACH:
            kept.append(record)

    def look(self) -> None:
        """Tell of floods that ended and of the disk's trouble: about once a second, where facts are stated."""
        now = self._wall()
        self._errors.tick(now)
        writer = self._writer
        if writer is None:
            return
        for line in self._flood.ended(now):
            writer.put(line)
        if writer.failures != self._told_failures:
            self._told_failures = writer.failures
            operation, error = writer.last_failure
            self._state(f.JournalFailed(at=now, operation=operation, error=error, dropped=self.dropped))

    @property
    def settled(self) -> bool:
        """Whether `close` has nothing to do: no file is open, and nothing waits for one."""
        return self._writer is None or self._writer.settled

    def flush(self, timeout_s: float = 2.0) -> bool:
        """Wait until all that was stated is on the disk; whether it is, within `timeout_s`. Blocks."""
        if self._writer is None:
            return True
        for line in self._flood.rest():
            self._writer.put(line)
        return self._writer.flush(timeout_s)

    def close(self, timeout_s: float = 2.0) -> bool:
        """`flush`, write `error_metrics.json` and release the files. Idempotent. Blocks."""
        if self._writer is None:
            return True
        for line in self._flood.rest():
            self._writer.put(line)
        return self._writer.close(timeout_s)

    # Looking

    @property
    def dropped(self) -> int:
        """Entries that are kept nowhere, and those that only a summary counts."""
        if self._writer is None:
            return self._stated - len(self._ring)
        return self._writer.dropped + self._writer.files.unwritable + self._flood.folded

    @property
    def trouble(self) -> str:
        """What keeps the journal from the disk now; empty when nothing does."""
        trouble = self._writer.trouble if self._writer is not None else None
        return f"{trouble[0]}: {trouble[1]}" if trouble is not None else ""

    @property
    def categories(self) -> Counter[str]:
        """Errors by category since the start."""
        return Counter(self._errors.categories)

    @property
    def severities(self) -> Counter[str]:
        """Errors by severity since the start."""
        return Counter(self._errors.severities)

    @property
    def fingerprints(self) -> Counter[str]:
        """Errors by fingerprint since the start, of those last seen."""
        return Counter({one.fingerprint: one.count for one in self._errors.fingerprints()})

    def entries(self, limit: int = 100) -> list[Entry]:
        """The newest entries in memory, oldest first."""
        return [entry_of(record, self._trace_of) for record in list(self._ring)[-limit:]]

    def reports(self, limit: int = 100) -> list[ErrorReport]:
        """The newest error reports in memory, oldest first."""
        failed = [record[6] for record in list(self._ring) if record[10]]
        return [report for report in failed if report is not None][-limit:]

    def story(self, message_id: str) -> list[Entry]:
        """All that is known of one message, oldest first: from memory, and from disk, of every process.

        Reads the journal's files: on a busy service call it from a thread (`asyncio.to_thread`).
        """
        story = [entry_of(record, self._trace_of) for record in list(self._ring) if record[3] == message_id]
        if self._state_dir is None or self._writer is None:
            return story
        ours = {(entry.at, entry.fact, entry.subscription, entry.number) for entry in story}
        stored = read_story(self._state_dir, message_id)
        story += [entry for entry in stored if (entry.at, entry.fact, entry.subscription, entry.number) not in ours]
        return sorted(story, key=lambda entry: (entry.at, entry.number))

    def told(self, message_id: str) -> Told:
        """All that is known of one message and of what was around it, from memory and from disk, of every process.

        Reads the journal's files: on a busy service call it from a thread.
        """
        writer = self._writer
        name = writer.files.process if writer is not None else str(os.getpid())
        here = Process(name, os.getpid(), self._bus, self._level)
        kept = [record for record in list(self._ring) if record[3] == message_id or record[2] in AROUND]
        found = {(name, record[0]): (entry_of(record, self._trace_of), here) for record in kept}
        if self._state_dir is None:
            return Told.of(found.values(), [], ())
        stored = told_by(JournalReader(self._state_dir), message_id)
        for entry, process in (*stored.entries, *stored.around):
            found.setdefault((process.name, entry.number), (entry, process))
        return Told.of(found.values(), stored.floods, stored.notes)

    def statistics(self) -> dict[str, Any]:
        """Counts since the start and over the last hour and day, as JSON-ready values; see ErrorStatistics.snapshot.

        `journal` says how the journal itself is: entries in memory, waiting for the disk, dropped or folded, trouble.
        """
        counted = self._errors.snapshot(self._wall())
        writer = self._writer
        counted["journal"] = {
            "entries": len(self._ring),
            "waiting": writer.memory_items() if writer is not None else 0,
            "dropped": self.dropped,
            "folded": self._flood.folded,
            "on_disk": writer is not None,
            "trouble": self.trouble,
        }
        return counted

    def trends(self) -> list[Trend]:
        """How each category and fingerprint goes, of what this process saw; see `trends.judge`."""
        return trends_of(self._errors, self._wall())

    def analysis(self) -> Analysis:
        """All that a report shows, of what this process saw."""
        return Analysis.of(self._errors, self._wall(), source="this process")

    def report_text(self) -> str:
        """Counts, trends and the most frequent failures, for people."""
        return text_report(self.analysis())

    def report_html(self) -> str:
        """The same with plots, as one HTML page that needs nothing else."""
        return html_report(self.analysis())

    def memory_bytes(self) -> int:
        """About how much memory all of this takes; cheap enough for a scrape."""
        writer = self._writer
        waiting = writer.memory_items() if writer is not None else 0
        # What waits is in the ring too, unless the ring is the shorter.
        return self._errors.memory_bytes() + about_bytes(self._ring, max(0, waiting - len(self._ring)))


def _has_failed(fact: Fact) -> bool:
    delivery = getattr(fact, "delivery", None)
    return delivery is not None and delivery.first_failed_at > 0


_ENDINGS = frozenset({f.RecoveryEnded, f.RecoveryConcluded})


def _ending(fact: Fact) -> tuple[str, float]:
    """How a recovery ended and how long it took, where `fact` tells that."""
    if isinstance(fact, f.RecoveryEnded | f.RecoveryConcluded):
        return fact.outcome, fact.duration_s
    return "", 0.0
