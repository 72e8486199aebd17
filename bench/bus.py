"""This bus's rows: bare, with telemetry on, durable, failing."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from prometheus_client import CollectorRegistry

from bench.durable import fresh
from bench.failing import by_difference, fail
from bench.peers import latency
from bench.rows import BURST, PAYLOAD, TOPIC, Row, Run, Sample, Stopwatch, Tally, Wrong, bursts, quantile
from bench.targets import BARE, TELEMETRY_ON
from glassbus import Delivery, Message, MessageBus, Outgoing, Retry

SAMPLED = 0.01
#: One message in so many fails: the most that the default retry budget lets through at once is one in five.
FAILING = 10
#: Fewer than the failures of one site that each have their spans (5,000), so that every one must be traced.
FAILURES = 2_000


class Nowhere(SpanExporter):
    """Counts spans by the first word of their name, and drops them."""

    def __init__(self) -> None:
        self.seen: collections.Counter[str] = collections.Counter()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.seen.update(span.name.partition(" ")[0] for span in spans)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing is held."""


@contextlib.asynccontextmanager
async def running(
    handler: Callable[..., Any], url: str = "memory://", *, telemetry: bool, **options: Any
) -> AsyncIterator[tuple[MessageBus, Nowhere]]:
    """A started bus with one subscription. Telemetry as a service would have it: 1 % of traces, a batch processor."""
    no_lines()
    exporter = Nowhere()
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(SAMPLED)))
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=100_000))
    registry = CollectorRegistry()
    bus = MessageBus(url, telemetry=telemetry, registry=registry, tracer_provider=provider)
    bus.subscribe(TOPIC, name="orders", **options)(handler)
    try:
        async with bus:
            yield bus, exporter
            if telemetry:
                _scraped(registry, bus)
    finally:
        provider.shutdown()


def no_lines() -> None:
    """The log observer works as always, but what it writes goes nowhere."""
    logger = logging.getLogger("glassbus")
    logger.propagate = False
    logger.handlers = [logging.NullHandler()]


def _scraped(registry: CollectorRegistry, bus: MessageBus) -> None:
    """Raises Wrong unless a scrape shows every handled delivery: telemetry that is not there costs nothing."""
    labels = {"bus": bus.name, "destination": TOPIC, "subscription": "orders", "result": "handled"}
    shown = registry.get_sample_value("glassbus_messages_settled_total", labels)
    handled = bus.ledger().total.handled
    if bus.observer_failures():
        raise Wrong(f"observers raised: {bus.observer_failures()}")
    if shown != handled:
        raise Wrong(f"a scrape shows {shown} messages handled, the ledger {handled}")


def balanced(bus: MessageBus, handled: int) -> None:
    """Raises Wrong unless the ledger says that `handled` deliveries were handled, and nothing is unaccounted."""
    ledger = bus.ledger()
    if ledger.total.handled != handled or ledger.unaccounted:
        raise Wrong(f"the ledger has {ledger.total}, not {handled} handled and 0 unaccounted")


def throughput(run: Run, *, telemetry: bool, many: int = 0) -> Sample:
    """Publish to handled, in bursts; `many` a call with `publish_many`."""
    return asyncio.run(_throughput(run.count(50_000, BURST), telemetry, many))


async def _throughput(total: int, telemetry: bool, many: int) -> Sample:
    tally = Tally()

    async def handler(_message: Message[Any]) -> None:
        tally.hit()

    async with running(handler, telemetry=telemetry) as (bus, _):

        async def send(size: int) -> None:
            for _ in range(size):
                await bus.publish(TOPIC, PAYLOAD)

        async def send_many(size: int) -> None:
            for _ in range(0, size, many):
                await bus.publish_many([Outgoing(TOPIC, PAYLOAD) for _ in range(many)])

        sample = await bursts(total, tally, send_many if many else send)
        await bus.drain()
        balanced(bus, total)
    return sample


def one_in_flight(run: Run, *, telemetry: bool) -> Sample:
    """From the call of publish to the handler's first line, with nothing else under way."""
    return asyncio.run(_one_in_flight(run.count(10_000), telemetry))


async def _one_in_flight(total: int, telemetry: bool) -> Sample:
    taken: list[float] = []
    answered = asyncio.Event()
    sent_at = 0.0

    async def handler(_message: Message[Any]) -> None:
        taken.append(time.perf_counter() - sent_at)
        answered.set()

    async with running(handler, telemetry=telemetry) as (bus, _):
        for _ in range(total):
            answered.clear()
            sent_at = time.perf_counter()
            await bus.publish(TOPIC, PAYLOAD)
            await answered.wait()
        await bus.drain()
        balanced(bus, total)
    return latency(taken)


_LOOPS = 0


def _work() -> None:
    """About 100 us of work, the same amount each time however busy the machine is."""
    for _ in range(_LOOPS):
        pass


def _calibrate() -> None:
    global _LOOPS
    if _LOOPS:
        return
    _LOOPS = 10_000
    best = min(_seconds(_work) for _ in range(20))
    _LOOPS = round(_LOOPS * 100e-6 / best)


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def handler_alone(run: Run) -> Sample:
    """The floor: the same handler awaited in a loop."""
    _calibrate()

    async def main() -> Sample:
        tally = Tally()

        async def handler() -> None:
            _work()
            tally.hit()

        count = run.count(5_000, BURST)
        with Stopwatch() as watch:
            for _ in range(count):
                await handler()
        return _per_message(watch, count)

    return asyncio.run(main())


def overhead(run: Run, *, telemetry: bool) -> Sample:
    """CPU time a message, with a handler that works for 100 us."""
    _calibrate()

    async def main() -> Sample:
        tally = Tally()

        async def handler(_message: Message[Any]) -> None:
            _work()
            tally.hit()

        async with running(handler, telemetry=telemetry) as (bus, _):
            count = run.count(5_000, BURST)

            async def send(size: int) -> None:
                for _ in range(size):
                    await bus.publish(TOPIC, PAYLOAD)

            with Stopwatch() as watch:
                await bursts(count, tally, send)
            await bus.drain()
            balanced(bus, count)
        return _per_message(watch, count)

    return asyncio.run(main())


def _per_message(watch: Stopwatch, count: int) -> Sample:
    return Sample(watch.cpu_s / count * 1e6, {"wall us/msg": watch.wall_s / count * 1e6})


def failed_attempt(run: Run, *, telemetry: bool, one_in: int = FAILING) -> Sample:
    """Every tenth message fails once, at depth 6, and is retried at once; all settings are the defaults.

    Where more fail (`one_in` of fewer), the retry budget lets all of them through.

    A gap runs from just before the handler raises to the next time it is entered; the
    median gap after a success is taken off. The mean is of the whole run against one
    with the same number of attempts and no failure.
    """
    failures = run.count(FAILURES, BURST // FAILING)
    total = failures * one_in
    failing, gaps = asyncio.run(_attempts(total, failures, telemetry, one_in))
    succeeding, _ = asyncio.run(_attempts(total + failures, 0, telemetry))
    return by_difference(failing, succeeding, failures, gaps)


async def _attempts(total: int, failures: int, telemetry: bool, one_in: int = FAILING) -> tuple[Stopwatch, list[float]]:
    tally = Tally()
    after_failure: list[float] = []
    after_success: list[float] = []
    gaps = after_success
    first_attempts, left_at = 0, 0.0

    async def handler(_message: Message[Any], delivery: Delivery) -> None:
        nonlocal first_attempts, left_at, gaps
        entered_at = time.perf_counter()
        if left_at:
            gaps.append(entered_at - left_at)
        if delivery.attempt == 1:
            first_attempts += 1
            if failures and first_attempts % one_in == 0:
                gaps = after_failure
                left_at = time.perf_counter()
                fail()
        gaps = after_success
        tally.hit()
        # Between two bursts the worker waits for the publisher, which is no gap of ours.
        left_at = time.perf_counter() if tally.count < tally.target else 0.0

    options: dict[str, Any] = {} if one_in >= FAILING else {"retry": Retry(budget=1.0)}
    async with running(handler, telemetry=telemetry, concurrency=1, **options) as (bus, exporter):

        async def send(size: int) -> None:
            for _ in range(size):
                await bus.publish(TOPIC, PAYLOAD)

        with Stopwatch() as watch:
            await bursts(total, tally, send)
            await bus.drain()
        balanced(bus, total)
    if len(after_failure) != failures:
        raise Wrong(f"{len(after_failure)} retries for {failures} failures")
    if telemetry and exporter.seen["error"] != failures:
        raise Wrong(f"{exporter.seen['error']} error spans for {failures} failures")
    usual = quantile(after_success, 0.5)
    return watch, [gap - usual for gap in after_failure]


def durable(
    run: Run, *, publishers: int, concurrency: int = 256, telemetry: bool = True, total: int = 20_000
) -> Sample:
    """Publish, stored on disk; attempt stored, handled, acknowledgement stored: the clock runs until the last one."""
    return asyncio.run(_durable(run, run.count(total, publishers), publishers, concurrency, telemetry))


async def _durable(run: Run, total: int, publishers: int, concurrency: int, telemetry: bool) -> Sample:
    tally = Tally()
    waited: list[float] = []

    async def handler(_message: Message[Any]) -> None:
        tally.hit()

    async def publish(bus: MessageBus, count: int) -> None:
        for _ in range(count):
            started = time.perf_counter()
            await bus.publish(TOPIC, PAYLOAD)
            waited.append(time.perf_counter() - started)

    with fresh(run) as folder:
        url = f"sqlite:///{folder.resolve() / 'bus.db'}"
        async with running(handler, url, telemetry=telemetry, concurrency=concurrency) as (bus, _):
            tally.expect(total)
            with Stopwatch() as watch:
                await asyncio.gather(*(publish(bus, total // publishers) for _ in range(publishers)))
                await bus.drain()
            tally.check(total)
            balanced(bus, total)
    ms = [seconds * 1e3 for seconds in waited]
    more = {"publish p50 ms": quantile(ms, 0.5), "publish p99 ms": quantile(ms, 0.99)}
    return Sample(total / watch.wall_s, {"CPU us/msg": watch.cpu_s / total * 1e6, **more})


MEMORY = (
    Row(BARE, partial(throughput, telemetry=False), "publish"),
    Row(f"{BARE}, publish_many", partial(throughput, telemetry=False, many=100), "100 a call"),
    Row(TELEMETRY_ON, partial(throughput, telemetry=True), "publish"),
    Row(f"{TELEMETRY_ON}, publish_many", partial(throughput, telemetry=True, many=100), "100 a call"),
)
LATENCY = (
    Row(BARE, partial(one_in_flight, telemetry=False)),
    Row(TELEMETRY_ON, partial(one_in_flight, telemetry=True)),
)
OVERHEAD = (
    Row("the handler alone", handler_alone),
    Row(BARE, partial(overhead, telemetry=False)),
    Row(TELEMETRY_ON, partial(overhead, telemetry=True)),
)
ERRORS = (
    Row(BARE, partial(failed_attempt, telemetry=False), "reported and retried, not traced"),
    Row(TELEMETRY_ON, partial(failed_attempt, telemetry=True), "reported, retried, every one traced"),
    Row(f"{BARE}, every second fails", partial(failed_attempt, telemetry=False, one_in=2), "all of it in the caches"),
    Row(f"{TELEMETRY_ON}, every second fails", partial(failed_attempt, telemetry=True, one_in=2)),
)
DURABLE = (
    Row("glassbus, 1 publisher", partial(durable, publishers=1, total=1_500), "concurrency 256, telemetry on"),
    Row("glassbus, 64 publishers", partial(durable, publishers=64), "concurrency 256, telemetry on"),
    Row("glassbus, 256 publishers", partial(durable, publishers=256), "concurrency 256, telemetry on"),
    Row("glassbus, 256 publishers, bare", partial(durable, publishers=256, telemetry=False), "telemetry off"),
    Row(
        "glassbus, 256 publishers, concurrency 1",
        partial(durable, publishers=256, concurrency=1, total=1_500),
        "the default: an attempt is stored before it runs, so one a commit",
    ),
)
