"""The span queue never blocks, never grows past its bound, ends at its deadline, and says what it lost."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, TraceFlags

from glassbus.telemetry.pipeline import Entry, SpanQueue

#: Seconds within which what must happen has happened, however busy the machine is.
SOON_S = 30.0


class Exporter(SpanExporter):
    """Keeps what it is given; `gate` holds it up, `answer` is what it says or raises."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.answer: Callable[[], SpanExportResult] = lambda: SpanExportResult.SUCCESS
        self.shut = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.entered.set()
        self.gate.wait()
        self.batches.append([span.name for span in spans])
        return self.answer()

    def shutdown(self) -> None:
        self.shut.set()


def span(name: str = "one", sampled: bool = True) -> ReadableSpan:
    return ReadableSpan(name, SpanContext(1, 2, False, TraceFlags(int(sampled))), resource=None)


def queue(exporter: Exporter, **more: Any) -> SpanQueue:
    return SpanQueue("test", lambda: exporter, **{"capacity": 8, "batch_max": 4, "delay_s": 0.0, **more})


def test_spans_are_exported_in_order_in_batches_and_unsampled_ones_are_not() -> None:
    exporter = Exporter()
    spans = queue(exporter)
    exporter.gate.clear()
    for name in "abcdef":
        spans.on_end(span(name))
    spans.on_end(span("dark", sampled=False))
    exporter.gate.set()
    assert spans.flush(SOON_S)
    assert "".join(name for batch in exporter.batches for name in batch) == "abcdef"
    assert all(len(batch) <= 4 for batch in exporter.batches)
    assert spans.exported == 6
    assert spans.close(SOON_S)
    assert exporter.shut.is_set()


def test_a_full_queue_refuses_the_newcomer_and_counts_it_without_blocking() -> None:
    exporter = Exporter()
    spans = queue(exporter)
    exporter.gate.clear()
    spans.on_end(span("held"))
    assert exporter.entered.wait(SOON_S)
    for number in range(20):
        spans.on_end(span(str(number)))
    assert spans.dropped["queue_full"] == 12
    exporter.gate.set()
    assert spans.close(SOON_S)
    assert exporter.batches[1][0] == "0"


def test_flush_and_close_end_at_the_deadline_whatever_the_exporter_does() -> None:
    exporter = Exporter()
    spans = queue(exporter)
    exporter.gate.clear()
    for _ in range(5):
        spans.on_end(span())
    began = time.monotonic()
    assert not spans.flush(0.1)
    assert not spans.close(0.1)
    assert time.monotonic() - began < SOON_S
    assert spans.dropped["shut_down"] == 5
    spans.on_end(span())
    assert spans.dropped["shut_down"] == 6
    exporter.gate.set()
    assert exporter.shut.wait(SOON_S)


@pytest.mark.parametrize("answer", ["raises", "fails"])
def test_what_the_exporter_does_not_take_is_counted_and_the_queue_goes_on(answer: str) -> None:
    exporter = Exporter()

    def bad() -> SpanExportResult:
        if answer == "raises":
            raise RuntimeError("collector says no")
        return SpanExportResult.FAILURE

    exporter.answer = bad
    spans = queue(exporter)
    spans.on_end(span())
    assert not spans.flush(SOON_S)
    assert (spans.dropped["export_failed"], spans.export_failures) == (1, 1)
    exporter.answer = lambda: SpanExportResult.SUCCESS
    spans.on_end(span())
    assert spans.flush(SOON_S)
    spans.close(SOON_S)


def test_a_failure_that_cannot_be_made_into_spans_does_not_take_the_others_with_it() -> None:
    exporter = Exporter()
    spans = queue(exporter)

    def broken() -> list[Any]:
        raise ValueError("hostile")

    spans.put(Entry(broken, lambda data: span(), 3))
    spans.on_end(span("after"))
    assert spans.flush(SOON_S)
    assert spans.dropped["not_made"] == 3
    assert exporter.batches == [["after"]]
    spans.close(SOON_S)


def test_many_threads_lose_nothing_uncounted() -> None:
    exporter = Exporter()
    spans = queue(exporter, capacity=100, batch_max=50)

    def end_many() -> None:
        for _ in range(2000):
            spans.on_end(span())

    threads = [threading.Thread(target=end_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert spans.close(SOON_S)
    assert spans.exported + spans.dropped["queue_full"] == 8000


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_starts_empty_with_an_exporter_of_its_own() -> None:
    made: list[Exporter] = []

    def make() -> Exporter:
        made.append(Exporter())
        return made[-1]

    spans = SpanQueue("test", make, delay_s=60.0)
    spans.on_end(span("parent"))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            empty = len(spans) == 0
            spans.on_end(span("child"))
            code = 0 if empty and spans.flush(SOON_S) and made[-1].batches == [["child"]] and len(made) == 2 else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert spans.flush(SOON_S)
    assert made[0].batches == [["parent"]]
    spans.close(SOON_S)
