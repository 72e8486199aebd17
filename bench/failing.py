"""The failing handler that every row of the error path runs, and the peers' rows."""

from __future__ import annotations

import time
import traceback
from typing import Any

from bench.peers import dramatiq_broker
from bench.rows import PAYLOAD, Row, Run, Sample, Stopwatch, Tally, Wrong, peer, quantile

DEPTH = 6
_SCALE_US = 1e6


def fail(depth: int = DEPTH) -> None:
    """Raises ValueError `depth` calls down: a known failure site, as a handler's would be."""
    if depth <= 1:
        raise ValueError("order 17 has no customer")
    fail(depth - 1)


def by_difference(failing: Stopwatch, succeeding: Stopwatch, failures: int, gaps_s: list[float]) -> Sample:
    """Each failure's cost: p50 and p99 from `gaps_s`, the mean from the two runs' difference.

    Both runs make the same number of attempts, so all that differs is that `failures` of them failed.
    """
    gaps = [gap * _SCALE_US for gap in gaps_s]
    return Sample(
        quantile(gaps, 0.5),
        {
            "p99": quantile(gaps, 0.99),
            "mean by difference": (failing.wall_s - succeeding.wall_s) / failures * _SCALE_US,
            "CPU by difference": (failing.cpu_s - succeeding.cpu_s) / failures * _SCALE_US,
        },
    )


def _timed(attempt: Any, count: int) -> Sample:
    """`attempt(True)` fails, `attempt(False)` succeeds; each failure timed alone."""
    gaps = []
    with Stopwatch() as failing:
        for _ in range(count):
            started = time.perf_counter()
            attempt(True)
            gaps.append(time.perf_counter() - started)
    with Stopwatch() as succeeding:
        for _ in range(count):
            started = time.perf_counter()
            attempt(False)
            time.perf_counter()
    return by_difference(failing, succeeding, count, gaps)


def plain_except(run: Run) -> Sample:
    """The floor: raise at depth 6, and catch it."""

    def attempt(fails: bool) -> None:
        try:
            if fails:
                fail()
        except ValueError:
            return

    return _timed(attempt, run.count(2_000))


def format_exception(run: Run) -> Sample:
    """What it costs to write the stack down each time, before anybody is told of it."""

    def attempt(fails: bool) -> None:
        try:
            if fails:
                fail()
        except ValueError as error:
            traceback.format_exception(error)

    return _timed(attempt, run.count(1_000))


def sdk_span(run: Run) -> Sample:
    """An OpenTelemetry SDK span for each attempt, always sampled, that records the exception itself."""
    trace = peer("opentelemetry.sdk.trace")
    export = peer("opentelemetry.sdk.trace.export")
    seen = 0

    class Nowhere(export.SpanExporter):  # type: ignore[misc, name-defined]
        def export(self, spans: Any) -> Any:
            nonlocal seen
            seen += len(spans)
            return export.SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            """Nothing is held."""

    provider = trace.TracerProvider()
    provider.add_span_processor(export.BatchSpanProcessor(Nowhere(), max_queue_size=100_000))
    tracer = provider.get_tracer("bench")

    def attempt(fails: bool) -> None:
        try:
            with tracer.start_as_current_span("process orders.created"):
                if fails:
                    fail()
        except ValueError:
            return

    count = run.count(1_000)
    sample = _timed(attempt, count)
    provider.shutdown()
    if seen != 2 * count:
        raise Wrong(f"{seen} spans exported, {2 * count} made")
    return sample


def dramatiq_retries(run: Run) -> Sample:
    """Every message fails once and is retried 1 ms later, so only CPU time can be compared."""
    cpu = {}
    count = run.count(600)
    for failures in (1, 0):
        with dramatiq_broker(retries=True) as (dramatiq, broker):
            tally = Tally(threads=True)
            attempts: dict[int, int] = {}

            def handler(
                number: int,
                _payload: dict[str, Any],
                attempts: dict[int, int] = attempts,
                tally: Tally = tally,
                failures: int = failures,
            ) -> None:
                attempts[number] = attempts.get(number, 0) + 1
                if attempts[number] <= failures:
                    fail()
                tally.hit()

            actor = dramatiq.actor(handler, broker=broker, actor_name="orders", queue_name="orders", max_retries=3)
            with Stopwatch() as watch:
                tally.expect(count)
                for number in range(count):
                    actor.send(number, PAYLOAD)
                tally.wait_thread()
            tally.check(count)
            if sum(attempts.values()) != count * (1 + failures):
                raise Wrong(f"{sum(attempts.values())} attempts for {count} messages")
            cpu[failures] = watch.cpu_s
    spent = (cpu[1] - cpu[0]) / count * _SCALE_US
    return Sample(spent, {"CPU by difference": spent})


FLOOR = Row("try/except", plain_except, "nothing recorded")
PEERS = (
    Row("try/except + format_exception", format_exception, "stack text each time"),
    Row("OpenTelemetry SDK span", sdk_span, "a span for each attempt, 100 % sampled"),
    Row("dramatiq Retries", dramatiq_retries, "CPU; includes the second attempt; nothing traced"),
)
