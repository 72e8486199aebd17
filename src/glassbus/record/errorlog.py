"""ErrorLogger: error reports as lines of a file, written before the call returns."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from glassbus.errors import ConfigurationError, ErrorReport, safe_text, shown
from glassbus.files import FSYNC_CHOICES, FSYNC_EVERY_S, Fsync
from glassbus.record.metricsfile import METRICS_EVERY_S, METRICS_NAME, MetricsFile
from glassbus.record.plain import described, fingerprint_of, plain_report
from glassbus.record.shared_lines import SharedLines
from glassbus.record.statistics import ErrorStatistics, bounded

LOG_NAME = "message_bus_errors.json"

_HISTORY_MAX = 1000
#: Lines kept for a disk that takes none, to be written when it does again.
_UNWRITTEN_MAX = 1000

#: How long callers do not try a disk that has just refused, in seconds: a lock that is held takes time to give up on.
_RETRY_S = 0.2

logger = logging.getLogger("glassbus")


class ErrorLogger:
    """Keeps error reports: each as one JSON line in `log_dir`/message_bus_errors.json, and the newest in memory.

    Any thread may use it; several instances and processes may share a folder. `log_dir` (default: `logs` in
    the current folder) is made at the first report. Past `max_log_size` bytes the file is renamed
    `message_bus_errors_TIME_PID_N.json` and a new one begun. Rotated files are removed, oldest first, only when there
    are more than 50 and they take more than 512 MiB (or 50 x `max_log_size`).

    `fsync` says when lines reach the disk itself: "interval" (default: within about a second; a killed process
    loses nothing, a power cut the last second), "always" (when `log_error` returns) or "never".

    Attributes: `error_log_file` and `metrics_file` (paths), `error_history` (the newest 1,000 reports, as plain
    values), `error_counts` (by category), `failures` (reports that could not be written when they came) and `lost`
    (those of them that were not written later either).

    Raises ConfigurationError for arguments that cannot work.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] = "logs",
        max_log_size: int = 10 * 1024 * 1024,
        *,
        fsync: Fsync = "interval",
        wall: Callable[[], float] = time.time,
    ) -> None:
        if type(max_log_size) is not int or max_log_size < 1:
            raise ConfigurationError(f"max_log_size is a number of bytes, 1 or more, not {shown(max_log_size)}")
        if fsync not in FSYNC_CHOICES:
            raise ConfigurationError(f"fsync is one of {', '.join(FSYNC_CHOICES)}, not {shown(fsync)}")
        try:
            self.log_dir = Path(log_dir).absolute()
        except (TypeError, ValueError):
            raise ConfigurationError(f"log_dir is a path, not {shown(log_dir)}") from None
        self.max_log_size = max_log_size
        self.error_log_file = self.log_dir / LOG_NAME
        self.metrics_file = self.log_dir / METRICS_NAME
        self.error_history: deque[ErrorReport] = deque(maxlen=_HISTORY_MAX)
        self.error_counts: Counter[str] = Counter()
        #: Which of `error_history` have their outcome counted when it is known, and those counts.
        self._outcome_follows: deque[bool] = deque(maxlen=_HISTORY_MAX)
        self._recoveries: Counter[bool] = Counter()
        self.failures = 0
        self.lost = 0
        self.statistics = ErrorStatistics(wall())
        self._wall = wall
        self._lines = SharedLines(self.error_log_file, max_log_size, fsync)
        self._metrics = MetricsFile(self.metrics_file)
        self._unwritten: deque[bytes] = deque()
        self._trouble = ""
        self._retry_at = 0.0
        self._lock = threading.Lock()
        self._metrics_lock = threading.Lock()
        self._metrics_due = 0.0
        self._changed = False
        self._keeper: threading.Thread | None = None
        self._wake = threading.Event()
        _live.add(self)

    def log_error(self, report: ErrorReport, *, outcome_follows: bool = False) -> bool:
        """Record `report`. True: its line is in the file. False: the disk did not take it.

        Then it is in memory, counted in `failures`, and written when the disk takes lines again (the newest 1,000
        of them). A report without a fingerprint is given one. With `outcome_follows` its recovery has begun, and how
        it ends is told to `recovery_ended`: its line cannot say that yet. Raises TypeError for what is no ErrorReport,
        and nothing else.
        """
        if not isinstance(report, ErrorReport):
            raise TypeError(f"log_error takes an ErrorReport, not {described(report)}")
        if type(report.fingerprint) is str and not report.fingerprint:
            report.fingerprint = fingerprint_of(report)
        kept = plain_report(report)
        line = msgspec.json.encode(kept)
        subscription = kept.context.get("subscription")
        now = self._wall()
        self.statistics.tick(now)
        self.statistics.report(kept, min(kept.timestamp, now), subscription if isinstance(subscription, str) else "")
        with self._lock:
            self.error_history.append(kept)
            self._outcome_follows.append(outcome_follows)
            self.error_counts[bounded(self.error_counts, str(kept.category))] += 1
            self._changed = True
            written = self._write(line)
            if self._keeper is None:
                self._start_keeper()
        if time.monotonic() >= self._metrics_due:
            self._write_metrics()
        return written

    def recovery_ended(self, report: ErrorReport | None, succeeded: bool) -> None:
        """A recovery has ended, of a report that was logged with `outcome_follows`: counted, and marked there.

        None is one that an earlier run, or another process, began.
        """
        if report is not None:
            report.recovery_attempted, report.recovery_successful = True, succeeded
        with self._lock:
            self._recoveries[succeeded] += 1
            self._changed = True
            if self._keeper is None:
                self._start_keeper()

    def get_error_statistics(self) -> dict[str, Any]:
        """Counts of what this logger was given.

        Among others `total_errors, recent_errors_1h, categories, severity_distribution, error_rate_1h` (errors
        a second) and `recovery_success_rate`: of the recoveries told to `recovery_ended`, and of the reports in
        `error_history` that say themselves how theirs went, those that succeeded; 1.0 when there are none.
        """
        with self._lock:
            told = list(zip(self.error_history, self._outcome_follows, strict=False))
            succeeded, failed = self._recoveries[True], self._recoveries[False]
            files = {"write_failures": self.failures, "lost": self.lost}
        for report, outcome_follows in told:
            if report.recovery_attempted and not outcome_follows:
                succeeded += bool(report.recovery_successful)
                failed += not report.recovery_successful
        counted = self.statistics.snapshot(self._wall())
        counted["recovery_success_rate"] = succeeded / (succeeded + failed) if succeeded + failed else 1.0
        counted["recoveries"] = {"succeeded": succeeded, "failed": failed}
        return {**counted, **files}

    def flush(self) -> bool:
        """Bring everything to the disk itself, metrics included; whether that worked."""
        with self._lock:
            self._retry()
            try:
                self._lines.sync()
            except OSError as error:
                self._troubled(error)
        return self._write_metrics() and not self._trouble

    def close(self) -> None:
        """`flush`, and release the files. A report logged later opens them again."""
        self.flush()
        with self._lock, suppress(OSError):  # the flush has told
            self._lines.close()
        self._wake.set()

    def __enter__(self) -> ErrorLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ErrorLogger({str(self.log_dir)!r}, {self.max_log_size})"

    # Writing; the lock is held

    def _write(self, line: bytes) -> bool:
        if self._unwritten and time.monotonic() >= self._retry_at:
            self._retry()
        if not self._unwritten:
            try:
                self._lines.append(line)
            except OSError as error:
                self._troubled(error)
            else:
                self._well()
                return True
        self.failures += 1
        self._unwritten.append(line)
        if len(self._unwritten) > _UNWRITTEN_MAX:
            self._unwritten.popleft()
            self.lost += 1
        return False

    def _retry(self) -> None:
        """Write what could not be written before, in its order."""
        try:
            while self._unwritten:
                self._lines.append(self._unwritten[0])
                self._unwritten.popleft()
        except OSError as error:
            self._troubled(error)
        else:
            self._well()

    def _troubled(self, error: OSError) -> None:
        """Tell once that the disk takes nothing, not for each report, and leave it alone for a moment."""
        self._retry_at = time.monotonic() + _RETRY_S
        if not self._trouble:
            self._trouble = safe_text(error, 300)
            logger.error("error log %s cannot be written, kept in memory: %s", self.error_log_file, self._trouble)

    def _well(self) -> None:
        if self._trouble:
            self._trouble = ""
            logger.warning("error log %s is written again; lost: %d", self.error_log_file, self.lost)

    # Beside the callers

    def _write_metrics(self) -> bool:
        """Write `metrics_file`; whether that worked. Another thread at it does it for us."""
        if not self._metrics_lock.acquire(blocking=False):
            return True
        try:
            self._metrics_due = time.monotonic() + METRICS_EVERY_S
            self._changed = False
            self._metrics.write(self.get_error_statistics())
        except OSError as error:
            self._changed = True
            if not self._trouble:
                logger.error("error metrics %s cannot be written: %s", self.metrics_file, safe_text(error, 300))
            return False
        finally:
            self._metrics_lock.release()
        return True

    def _start_keeper(self) -> None:
        self._keeper = threading.Thread(target=self._keep, name="glassbus-errorlog", daemon=True)
        self._keeper.start()

    def _keep(self) -> None:
        """A thread, while there is something left to sync or to write: it ends when all is on disk."""
        while True:
            self._wake.wait(FSYNC_EVERY_S)
            self._wake.clear()
            if self._changed and time.monotonic() >= self._metrics_due:
                self._write_metrics()
            with self._lock:
                if self._unwritten:
                    self._retry()
                try:
                    self._lines.sync()
                except OSError as error:
                    self._troubled(error)
                if not (self._changed or self._unwritten or self._lines.unsynced):
                    self._keeper = None
                    return

    def _after_fork(self) -> None:
        self._lock, self._metrics_lock = threading.Lock(), threading.Lock()
        self._wake = threading.Event()
        self._keeper = None
        self._metrics = MetricsFile(self.metrics_file)


_live: weakref.WeakSet[ErrorLogger] = weakref.WeakSet()


def _at_exit() -> None:
    for one in list(_live):
        if one._changed or one._unwritten or one._lines.unsynced:
            one.close()


def _forked() -> None:
    for one in list(_live):
        one._after_fork()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_forked)
