"""What telemetry says that it costs against what it costs, and what a publish costs beside a collector of no use."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from prometheus_client import CollectorRegistry

from bench.bus import FAILING, FAILURES, Nowhere, balanced, no_lines
from bench.failing import fail
from bench.rows import BURST, PAYLOAD, TOPIC, Row, Run, Sample, Stopwatch, Tally, Wrong, bursts, quantile
from bench.targets import DOWN, MEASURED, SAID, SILENT, TAKES_ALL
from glassbus import Delivery, Message, MessageBus
from glassbus.telemetry import configure


@contextlib.contextmanager
def _telemetry(collector: str) -> Iterator[Any]:
    """As `configure` makes it, every trace sampled: the most that there can be to export."""
    os.environ["OTEL_TRACES_SAMPLER"] = "always_on"
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    no_lines()
    with contextlib.ExitStack() as stack:
        port = 1
        if collector == SILENT:
            port = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64)).getsockname()[1]
        good = collector == TAKES_ALL
        exporter = Nowhere() if good else OTLPSpanExporter(f"http://127.0.0.1:{port}/v1/traces", timeout=1)
        telemetry = configure(exporter=exporter)
        try:
            yield telemetry
        finally:
            telemetry.shutdown(0.5)
        if not good and any(queue.exported for queue in telemetry.queues):
            raise Wrong(f"spans were exported to {collector}")


def publish_beside(run: Run, *, collector: str) -> Sample:
    """How long a publish takes while its spans, and those of its delivery, go to `collector`."""
    with _telemetry(collector):
        taken = asyncio.run(_publishing(run.count(20_000, BURST)))
    us = [seconds * 1e6 for seconds in taken]
    return Sample(quantile(us, 0.5), {"p99": quantile(us, 0.99), "p99.9": quantile(us, 0.999)})


async def _publishing(total: int) -> list[float]:
    tally = Tally()
    taken: list[float] = []
    bus = MessageBus(registry=CollectorRegistry())

    @bus.subscribe(TOPIC, name="orders")
    async def handler(_message: Message[Any]) -> None:
        tally.hit()

    async def send(size: int) -> None:
        for _ in range(size):
            started = time.perf_counter()
            await bus.publish(TOPIC, PAYLOAD)
            taken.append(time.perf_counter() - started)

    async with bus:
        await bursts(total, tally, send)
        await bus.drain()
        balanced(bus, total)
    return taken


def failure_cost(run: Run) -> Sample:
    """CPU time that telemetry adds to a failed attempt and nine good ones around it, and what it says that it was.

    Without the garbage collector, in both: what it takes goes by all that the process holds, whoever wakes it.
    """
    failures = run.count(FAILURES, BURST // FAILING)
    gc.disable()
    try:
        without, _ = asyncio.run(_failing(failures, telemetry=False))
        with _telemetry(TAKES_ALL) as telemetry:
            beside, said_s = asyncio.run(_failing(failures, telemetry=True))
            if any(queue.dropped for queue in telemetry.queues):
                raise Wrong("spans were dropped")
    finally:
        gc.enable()
    return Sample((beside.cpu_s - without.cpu_s) / failures * 1e6, {SAID: said_s / failures * 1e6})


async def _failing(failures: int, *, telemetry: bool) -> tuple[Stopwatch, float]:
    tally = Tally()
    first_attempts = 0
    registry = CollectorRegistry()
    bus = MessageBus(registry=registry, telemetry=telemetry)

    @bus.subscribe(TOPIC, name="orders")
    async def handler(_message: Message[Any], delivery: Delivery) -> None:
        nonlocal first_attempts
        if delivery.attempt == 1:
            first_attempts += 1
            if first_attempts % FAILING == 0:
                fail()
        tally.hit()

    active = configure() if telemetry else None

    async def send(size: int) -> None:
        # A loop that never rests makes spans faster than a thread beside it exports them: let it catch up.
        if active is not None and any(len(queue) > queue.capacity // 2 for queue in active.queues):
            await asyncio.to_thread(active.flush, 10.0)
        for _ in range(size):
            await bus.publish(TOPIC, PAYLOAD)

    async with bus:
        with Stopwatch() as watch:
            await bursts(failures * FAILING, tally, send, burst=200)
            await bus.drain()
            if active is not None:
                active.flush(10.0)
        balanced(bus, failures * FAILING)
        said_s = 0.0
        for signal in ("facts", "export"):
            labels = {"bus": bus.name, "signal": signal}
            said_s += registry.get_sample_value("glassbus_telemetry_seconds_total", labels) or 0.0
    return watch, said_s


COLLECTORS = tuple(Row(name, partial(publish_beside, collector=name)) for name in (TAKES_ALL, DOWN, SILENT))
SELF_COST = (Row(MEASURED, failure_cost, "all traces sampled; one failed attempt in ten, retried at once"),)
