"""The journal's files, read from outside: while processes write them, and after they died."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from glassbus.files import open_regular
from glassbus.record.entries import (
    Entry,
    FactLine,
    FloodLine,
    LostLine,
    ReportLine,
    SiteLine,
    StartLine,
    decode,
    encode,
    entry_of_line,
)
from glassbus.record.journalfiles import journal_files
from glassbus.record.statistics import ErrorStatistics

_END_OF_TIME = 1e10  # wall seconds, in the year 2286
_COUNT_MAX = 10**9
_BLOCK_BYTES = 4 * 1024 * 1024
#: A longer line is none of ours: it is passed over, and counts as torn.
_LINE_BYTES_MAX = 16 * 1024 * 1024


class Selection(msgspec.Struct, frozen=True):
    """Which failures are asked for; what is not given does not matter. Times are wall seconds.

    `fingerprint` is one, or how it begins.
    """

    fingerprint: str = ""
    category: str = ""
    severity: str = ""
    subscription: str = ""
    message_id: str = ""
    since: float | None = None
    until: float | None = None

    def takes(self, line: FactLine | FloodLine) -> bool:
        report = line.report
        category = report.category if report is not None else getattr(line, "fields", {}).get("category", "")
        return (
            (self.since is None or line.at >= self.since)
            and (self.until is None or line.at <= self.until)
            and (not self.subscription or line.subscription == self.subscription)
            and (not self.message_id or (type(line) is FactLine and line.message_id == self.message_id))
            and (not self.category or category == self.category)
            and (not self.severity or (report is not None and report.severity == self.severity))
            and (not self.fingerprint or (report is not None and report.fingerprint.startswith(self.fingerprint)))
        )


class JournalReader:
    """Reads all files of `state_dir`, whoever wrote them, and counts what cannot be read.

    `torn` lines are no lines (a process died as it wrote), `lost` entries never reached the disk, `unreadable`
    files could not be opened.
    """

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.files = self.torn = self.lost = 0
        self.unreadable: list[str] = []
        self._stacks: dict[str, str] = {}

    def lines(self, since: float | None = None) -> Iterator[FactLine | FloodLine]:
        """Every line of every file that was written after `since`, file by file."""
        for path in journal_files(self.state_dir):
            for block in self._blocks(path, since):
                for raw in block.split(b"\n"):
                    line = self._decoded(raw)
                    if isinstance(line, FactLine | FloodLine):
                        yield line

    def story(self, message_id: str) -> list[Entry]:
        """All entries of one message, oldest first. Looks for its id, and decodes those lines alone."""
        needle = encode(message_id)
        found: list[Entry] = []
        for path in journal_files(self.state_dir):
            self._stacks.clear()
            for block in self._blocks(path, None):
                for raw in _lines_with(block, needle):
                    line = self._decoded(raw)
                    if isinstance(line, FactLine) and line.message_id == message_id:
                        found.append(entry_of_line(line, self._stack(line.report, path)))
        return sorted(found, key=lambda entry: (entry.at, entry.number))

    def found(self, *needles: bytes) -> Iterator[tuple[StartLine | None, FactLine | FloodLine]]:
        """The lines that hold one of `needles`, each with the first line of its file. Decodes those alone."""
        for path in journal_files(self.state_dir):
            self._stacks.clear()
            start: StartLine | None = None
            for number, block in enumerate(self._blocks(path, None)):
                if not number:
                    start = _start(block)
                at = {place for needle in needles for place in _places(block, needle)}
                if not block.endswith(b"\n"):  # a process died as it wrote it, or is just writing it
                    at.add((block.rfind(b"\n") + 1, len(block)))
                for begin, end in sorted(at):
                    line = self._decoded(block[begin:end])
                    if line is not None:
                        yield start, line

    def stack_of(self, fingerprint: str) -> str:
        """The stack of a fingerprint, from the lines read so far."""
        return self._stacks.get(fingerprint, "")

    def notes(self) -> tuple[str, ...]:
        """Sentences about what is missing."""
        made = []
        if self.lost:
            made.append(f"{self.lost:,} entries never reached the disk (it was full or gone, or they came too fast)")
        if self.torn:
            made.append(f"{self.torn:,} torn lines were passed over (a process died as it wrote them)")
        if self.unreadable:
            made.append(f"{len(self.unreadable):,} files could not be read: {', '.join(self.unreadable[:3])}")
        return tuple(made)

    def _stack(self, report: ReportLine | None, path: Path) -> str:
        """The stack of a report in the file at `path`, which has it once."""
        if report is None or not report.fingerprint:
            return ""
        if report.fingerprint not in self._stacks:
            self._stacks[report.fingerprint] = ""
            needle = b'"site","fingerprint":' + encode(report.fingerprint)
            for raw in (raw for block in self._blocks(path, None) for raw in _lines_with(block, needle)):
                self._decoded(raw)
        return self._stacks[report.fingerprint]

    def _decoded(self, raw: bytes) -> FactLine | FloodLine | None:
        if not raw:
            return None
        try:
            line = decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self.torn += 1
            return None
        if isinstance(line, SiteLine):
            self._stacks[line.fingerprint] = line.stack_trace
        elif isinstance(line, LostLine):
            self.lost += line.count
        elif not isinstance(line, StartLine) and not _sane(line):
            self.torn += 1
            return None
        return None if isinstance(line, SiteLine | LostLine | StartLine) else line

    def _blocks(self, path: Path, since: float | None) -> Iterator[bytes]:
        """Whole lines, some megabytes at a time. A file that is removed while it is read ends there."""
        try:
            descriptor = open_regular(path, os.O_RDONLY)
        except FileNotFoundError:  # removed to make room for newer ones
            return
        except OSError as error:
            self.unreadable.append(f"{path.name} ({error.strerror})")
            return
        with os.fdopen(descriptor, "rb") as file:
            if since is not None and os.fstat(descriptor).st_mtime < since:
                return
            self.files += 1
            rest, passing = b"", False
            while block := file.read(_BLOCK_BYTES):
                if passing:  # the rest of a line that is too long
                    _, separator, block = block.partition(b"\n")
                    passing = not separator
                whole, separator, rest = (rest + block).rpartition(b"\n")
                yield whole + separator
                if len(rest) > _LINE_BYTES_MAX:
                    self.torn += 1
                    rest, passing = b"", True
            if rest:
                yield rest


def _sane(line: FactLine | FloodLine) -> bool:
    """Whether its numbers can be counted with; a damaged line may hold any."""
    return 0 <= line.at < _END_OF_TIME and (
        isinstance(line, FactLine)
        or (0 < line.count <= _COUNT_MAX and 0 <= line.since <= line.at and 0 <= line.duration_s < math.inf)
    )


def _start(block: bytes) -> StartLine | None:
    try:
        line = decode(block[: block.find(b"\n")])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # then nobody knows whose file it is
        return None
    return line if isinstance(line, StartLine) else None


def _lines_with(block: bytes, needle: bytes) -> Iterator[bytes]:
    return (block[start:end] for start, end in _places(block, needle))


def _places(block: bytes, needle: bytes) -> Iterator[tuple[int, int]]:
    """Where the lines with `needle` begin and end."""
    at = block.find(needle)
    while at >= 0:
        start = block.rfind(b"\n", 0, at) + 1
        end = block.find(b"\n", at)
        end = len(block) if end < 0 else end
        yield start, end
        at = block.find(needle, end)


def read_story(state_dir: str | os.PathLike[str], message_id: str) -> list[Entry]:
    """What the journal in `state_dir` has of one message, of every process, oldest first. Needs no bus.

    Empty where there is no journal. Raises nothing for damaged files: what can be read is returned.
    """
    return JournalReader(Path(state_dir)).story(message_id)


def count_lines(
    lines: Iterable[FactLine | FloodLine], now: float, takes: Callable[[FactLine | FloodLine], bool]
) -> ErrorStatistics:
    """Statistics at wall time `now` of the lines that `takes` says yes to; later ones are left out."""
    errors = ErrorStatistics(now)
    errors.tick(now)
    for line in lines:
        if line.at > now or not takes(line):
            continue
        errors.started_at = min(errors.started_at, line.at)
        report, count = line.report, line.count if isinstance(line, FloodLine) else 1
        if line.error and report is not None:
            errors.error(
                line.at,
                report.category,
                report.severity,
                report.fingerprint,
                report.exception_type,
                report.component,
                report.message,
                line.subscription,
                count,
                line.since if isinstance(line, FloodLine) else None,
            )
        if line.fact in ("RecoveryEnded", "RecoveryConcluded"):
            if isinstance(line, FloodLine):
                errors.recovery(line.outcome, line.duration_s, line.at, count)
            else:
                outcome, duration_s = line.fields.get("outcome"), line.fields.get("duration_s")
                if isinstance(outcome, str) and isinstance(duration_s, int | float):
                    errors.recovery(outcome, duration_s, line.at)
    return errors
