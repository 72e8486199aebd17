"""A bounded queue of ended spans and the daemon thread that exports them.

It differs from the SDK's batch processor where that one breaks our promises: what
does not fit is counted, a flush ends at its deadline whatever the exporter does,
and it says what became of the spans.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable

from opentelemetry.context import Context, attach, set_value
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

try:
    from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY
except ImportError:  # a later API may rename it; exporting then shows in traces of instrumented HTTP clients
    _SUPPRESS_INSTRUMENTATION_KEY = "suppress_instrumentation"

from glassbus.telemetry.outlet import SpanData

_log = logging.getLogger(__name__)


class Unopened(ReadableSpan):
    """A sampled span whose contents are worked out when they are looked at, which a queue does not."""


class Entry:
    """Spans that are made when it is their turn to be exported: on the exporter's thread, not on the loop."""

    __slots__ = ("finish", "make", "size")

    def __init__(
        self, make: Callable[[], Iterable[SpanData]], finish: Callable[[SpanData], ReadableSpan], size: int
    ) -> None:
        self.make = make
        self.finish = finish
        self.size = size


class SpanQueue(SpanProcessor):
    """Takes ended spans and exports them in the background. Thread-safe; never blocks the one who ends a span.

    An entry is a span, or the spans of one failure. A full queue refuses the newcomer: the first
    failures of a flood explain the rest. `make_exporter` is called once now, and again in a forked
    child, which starts with an empty queue.
    """

    def __init__(
        self,
        name: str,
        make_exporter: Callable[[], SpanExporter],
        *,
        capacity: int = 2048,
        batch_max: int = 512,
        delay_s: float = 5.0,
    ) -> None:
        if not 1 <= batch_max <= capacity or delay_s < 0:
            raise ValueError(f"span queue {name!r} needs 1 <= batch_max <= capacity and delay_s >= 0")
        self.name = name
        self.capacity = capacity
        #: Spans that were not exported, by reason: queue_full, export_failed, shut_down, not_made.
        self.dropped: Counter[str] = Counter()
        self.exported = 0
        self.export_failures = 0
        #: CPU time that making and exporting spans took, on the thread that does it.
        self.seconds = 0.0
        self._batch_max = batch_max
        self._delay_s = delay_s
        self._make_exporter = make_exporter
        self._exporter = make_exporter()
        self._spans: deque[ReadableSpan | Entry] = deque()
        self._closed = False
        self._begin()
        again = weakref.WeakMethod(self._after_fork)
        os.register_at_fork(after_in_child=lambda: (method := again()) and method())

    def _begin(self) -> None:
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._some = threading.Event()  # there is something to export
        self._hurry = threading.Event()  # do not wait for a batch to gather
        self._changed = threading.Condition()
        self._leaving = False
        self._busy = False
        self._held = 0  # spans that the exporter has in hand

    def _after_fork(self) -> None:
        # The parent exports what was queued; its thread, its locks and its connection are not ours.
        self._spans.clear()
        self._begin()
        self._exporter = self._make_exporter()

    def __len__(self) -> int:
        return len(self._spans)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Only ended spans matter here."""

    def on_end(self, span: ReadableSpan) -> None:
        if not isinstance(span, Unopened):
            context = span.context
            if context is None or not context.trace_flags.sampled:
                return
        self.put(span)

    def put(self, entry: ReadableSpan | Entry) -> None:
        """Take a span, or what makes the spans of one failure."""
        if self._closed:
            self.dropped["shut_down"] += _size(entry)
            return
        waiting = len(self._spans)
        if waiting >= self.capacity:
            self.dropped["queue_full"] += _size(entry)
            return
        self._spans.append(entry)
        if not self._some.is_set():
            if self._thread is None:
                self._start()
            self._some.set()
        elif waiting >= self._batch_max and not self._hurry.is_set():
            self._hurry.set()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"glassbus-spans-{self.name}", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
        while True:
            self._some.wait()
            self._hurry.wait(self._delay_s)
            self._hurry.clear()
            # Cleared before the queue is emptied: a span that comes in between sets it again.
            self._some.clear()
            began = time.thread_time()
            while self._spans:
                self._export()
            self.seconds += time.thread_time() - began
            with self._changed:
                self._changed.notify_all()
                if self._leaving:
                    break
        try:
            self._exporter.shutdown()
        except BaseException as error:  # noqa: BLE001 - it has nothing of ours any more, and this thread ends
            _log.warning("the exporter of queue %r raised %s at its end", self.name, type(error).__name__)
        with self._changed:
            self._thread = None
            self._changed.notify_all()

    def _export(self) -> None:
        batch: list[ReadableSpan] = []
        self._busy = True  # before the queue looks empty
        with contextlib.suppress(IndexError):  # fewer than a batch
            while len(batch) < self._batch_max:
                entry = self._spans.popleft()
                if isinstance(entry, Entry):
                    batch.extend(self._opened(entry))
                else:
                    batch.append(entry)
        self._held = len(batch)
        taken = not batch or self._delivered(batch)
        if taken:
            self.exported += len(batch)
        else:
            self.export_failures += 1
            self.dropped["export_failed"] += len(batch)
        self._held = 0
        self._busy = False  # last: `flush` then looks at the counts

    def _delivered(self, batch: list[ReadableSpan]) -> bool:
        try:
            return self._exporter.export(batch) is SpanExportResult.SUCCESS
        except BaseException as error:  # noqa: BLE001 - an exporter may raise anything; the caller counts it
            _log.warning("exporting %d spans of queue %r raised %s", len(batch), self.name, type(error).__name__)
            return False

    def _opened(self, entry: Entry) -> list[ReadableSpan]:
        try:
            return [entry.finish(span) for span in entry.make()]
        except BaseException as error:  # noqa: BLE001 - one failure that cannot be shown must not take the others with it
            self.dropped["not_made"] += entry.size
            _log.warning("a failure could not be made into spans: %s", type(error).__name__)
            return []

    def hurry(self) -> None:
        """Export what is queued now, without waiting for a batch to gather. Returns at once."""
        if self._spans:
            self._hurry.set()
            self._some.set()

    def flush(self, deadline_s: float) -> bool:
        """Export what is queued, waiting at most `deadline_s`. True when nothing is left and nothing was lost."""
        lost = self.dropped["export_failed"]
        until = time.monotonic() + deadline_s
        with self._changed:
            while (self._spans or self._busy) and self._thread is not None:
                self._hurry.set()
                self._some.set()
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    return False
        return not self._spans and self.dropped["export_failed"] == lost

    def close(self, deadline_s: float) -> bool:
        """Flush, then take no more spans and let go of the exporter; all within `deadline_s`. Idempotent.

        What an exporter that hangs still holds at the deadline is lost, and counted as `shut_down`.
        """
        if self._closed:
            return True
        until = time.monotonic() + deadline_s
        flushed = self.flush(deadline_s)
        self._closed = True
        self._start()  # it is the thread that lets go of the exporter, which may hang
        with self._changed:
            self._leaving = True
            self._hurry.set()
            self._some.set()
            while self._thread is not None and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
        left_over = len(self._spans) + self._held
        if left_over:
            self.dropped["shut_down"] += self._held + sum(map(_size, list(self._spans)))
            self._spans.clear()
        return flushed and not left_over

    def shutdown(self) -> None:
        self.close(5.0)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self.flush(timeout_millis / 1000)


def _size(entry: ReadableSpan | Entry) -> int:
    return entry.size if isinstance(entry, Entry) else 1


class Switch(SpanProcessor):
    """The one processor of the provider that `configure` installs: a provider cannot be replaced, its queue can."""

    def __init__(self) -> None:
        self.queue: SpanQueue | None = None

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Only ended spans matter here."""

    def on_end(self, span: ReadableSpan) -> None:
        if self.queue is not None:
            self.queue.on_end(span)

    def shutdown(self) -> None:
        if self.queue is not None:
            self.queue.close(5.0)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self.queue is None or self.queue.flush(timeout_millis / 1000)
