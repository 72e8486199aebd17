"""Writes the journal in the background, so that stating a fact costs no system call."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from glassbus.errors import safe_text
from glassbus.files import FSYNC_EVERY_S
from glassbus.record.entries import LostLine
from glassbus.record.journalfiles import Item, JournalFiles
from glassbus.record.metricsfile import MetricsFile

#: How long lines are gathered before they are written together, in seconds.
_GATHER_S = 0.02
#: A thread with nothing to do for so long ends; the next entry starts another.
_LINGER_S = 30.0
#: Entries written in one go.
_TOGETHER_MAX = 1000
_RETRY_FIRST_S, _RETRY_MAX_S = 0.1, 5.0
_CLOSE_S = 2.0


class JournalWriter:
    """A bounded queue, and a thread that empties it into files and writes the metrics on an interval.

    `put` may be called on any thread, and only appends. What finds the queue full is counted in `dropped`, and told
    by a line of its own once the disk takes lines again. While the disk takes none, the queue waits.
    """

    def __init__(
        self,
        files: JournalFiles,
        metrics: MetricsFile,
        snapshot: Callable[[], dict[str, Any]],
        *,
        queue_max: int,
        metrics_every_s: float,
    ) -> None:
        self.files = files
        self.dropped = 0
        #: What failed and how, while it does: operation and error.
        self.trouble: tuple[str, str] | None = None
        #: Whether the statistics have changed since their file was written.
        self.stale = False
        #: What failed last, and how often something began to fail.
        self.last_failure = ("", "")
        self.failures = 0
        self._metrics = metrics
        self._metrics_every_s = metrics_every_s
        self._snapshot = snapshot
        self._queue_max = queue_max
        self._reset()
        _live.add(self)

    def _reset(self) -> None:
        self._queue: deque[Item | threading.Event] = deque()
        self._pending: deque[Item] = deque()
        self._told = self.dropped  # of the dropped, those that a line tells of
        self.stale = False
        self._metrics_due = time.monotonic() + self._metrics_every_s
        self._retry_s = 0.0
        self._closing = self._closed = False
        self._wake, self._hurry = threading.Event(), threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, item: Item) -> None:
        if len(self._queue) >= self._queue_max:
            self.dropped += 1
            return
        self._queue.append(item)
        if not self._wake.is_set():
            self._rouse()

    def changed(self) -> None:
        """The statistics have changed: their file is to be written when it is due."""
        self.stale = True
        self._rouse()

    def _rouse(self) -> None:
        self._wake.set()
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="glassbus-journal", daemon=True)
                    self._thread.start()

    def flush(self, timeout_s: float = _CLOSE_S) -> bool:
        """Wait until all that was put is written and synced; whether it was, within `timeout_s`."""
        done = threading.Event()
        self._queue.append(done)
        self._hurry.set()
        self._rouse()
        return done.wait(timeout_s)

    def close(self, timeout_s: float = _CLOSE_S) -> bool:
        """`flush`, write the metrics for the last time and release the file. A later `put` opens anew."""
        if self.settled:
            return True
        self._closing = True
        self.stale = True
        return self.flush(timeout_s)

    @property
    def settled(self) -> bool:
        """Whether nothing was put since the last `close`, if ever."""
        return self._thread is None and not self._work_left()

    def memory_items(self) -> int:
        return len(self._queue) + len(self._pending)

    # The thread

    def _run(self) -> None:
        idle_since = time.monotonic()
        self._closed = False
        while True:
            if self._retry_s:  # the disk takes nothing: new entries are no reason to ask it at once
                self._hurry.wait(self._retry_s)
            elif self._wake.wait(self._patience_s(idle_since)):
                idle_since = time.monotonic()
                if not self._closing:
                    time.sleep(_GATHER_S)
            self._hurry.clear()
            self._wake.clear()
            self._turn()
            if self._may_end(idle_since):
                return

    def _may_end(self, idle_since: float) -> bool:
        lingers = not self._closed and time.monotonic() - idle_since < _LINGER_S
        if self._work_left() or lingers:
            return False
        with self._starting:
            self._thread = None
        if self._queue or self.stale:  # put between the two looks
            self._rouse()
        return True

    def _work_left(self) -> bool:
        return bool(self._queue or self._pending or self.stale or self.files.unsynced)

    def _patience_s(self, idle_since: float) -> float:
        """How long to sleep when nobody wakes us."""
        now = time.monotonic()
        waits = [max(0.0, _LINGER_S - (now - idle_since))]
        if self.files.unsynced:
            waits.append(FSYNC_EVERY_S)
        if self.stale:
            waits.append(max(0.0, self._metrics_due - now))
        return min(waits)

    def _turn(self) -> None:
        """Write all that is queued; then the barriers that waited for it are released."""
        while True:
            barrier = self._gather()
            wrote = self._write()
            if barrier is not None:
                if wrote and self._closing:
                    wrote = self._finish()
                if wrote:
                    barrier.set()
                else:
                    self._queue.appendleft(barrier)
            if self.stale and time.monotonic() >= self._metrics_due:
                self._write_metrics(running=True)
            if not (wrote and self._queue):
                return

    def _gather(self) -> threading.Event | None:
        """Move what is queued to `_pending`, up to the first barrier, which is returned."""
        lost = self.dropped - self._told
        if lost:
            self._told += lost
            last = self._pending[-1] if self._pending else None
            if isinstance(last, LostLine):  # the disk takes nothing for long: one line tells it all
                self._pending.pop()
                lost += last.count
            self._pending.append(LostLine(time.time(), lost))
        while self._queue and len(self._pending) < _TOGETHER_MAX:
            item = self._queue.popleft()
            if isinstance(item, threading.Event):
                return item
            self._pending.append(item)
        return None

    def _write(self) -> bool:
        try:
            if self._pending:
                self.files.write(self._pending)
            elif self.files.unsynced:
                self.files.sync()
        except OSError as error:
            self._failed("write", error)
            return False
        if self.trouble is not None and self.trouble[0] != "metrics":
            self.trouble = None
        self._retry_s = 0.0
        return True

    def _failed(self, operation: str, error: OSError) -> None:
        if self.trouble is None:
            self.failures += 1
        self.trouble = self.last_failure = (operation, f"{type(error).__name__}: {safe_text(error, 300)}")
        self._retry_s = min(_RETRY_MAX_S, max(_RETRY_FIRST_S, self._retry_s * 2))

    def _finish(self) -> bool:
        try:
            self.files.sync()
            if self.stale:
                self._write_metrics(running=False)
            self.files.close()
        except OSError as error:
            self._failed("close", error)
            return False
        self._closing, self._closed = False, True
        return True

    def _write_metrics(self, *, running: bool) -> None:
        self.stale = False
        self._metrics_due = time.monotonic() + self._metrics_every_s
        try:
            self._metrics.write(self._snapshot(), running=running)
        except OSError as error:
            self.stale = not self._closing
            if self.trouble is None:
                self._failed("metrics", error)
        else:
            if self.trouble is not None and self.trouble[0] == "metrics":
                self.trouble = None

    def after_fork(self) -> None:
        """In the child: no thread came along, and what is queued is the parent's to write."""
        self.files.after_fork()
        self._metrics = MetricsFile(self._metrics.path)
        self._reset()


_live: weakref.WeakSet[JournalWriter] = weakref.WeakSet()


def _forked() -> None:
    for writer in list(_live):
        writer.after_fork()


def _at_exit() -> None:
    for writer in list(_live):
        writer.close()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_forked)
