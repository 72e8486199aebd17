"""In-memory floors and peers: the raw queue, pyee, bubus, dramatiq, taskiq."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Coroutine, Iterator
from typing import Any

from bench.rows import BURST, PAYLOAD, TOPIC, Row, Run, Sample, Stopwatch, Tally, bursts, peer, quantile


def raw_queue(run: Run) -> Sample:
    """The floor: an asyncio.Queue and one worker task that awaits the handler."""

    async def main(total: int) -> Sample:
        tally = Tally()
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        async def handler(_payload: dict[str, Any]) -> None:
            tally.hit()

        async def worker() -> None:
            while True:
                await handler(await queue.get())

        async def send(size: int) -> None:
            for _ in range(size):
                await queue.put(PAYLOAD)

        return await _with_worker(worker(), bursts(total, tally, send))

    return asyncio.run(main(run.count(200_000, BURST)))


def raw_queue_json(run: Run) -> Sample:
    """The floor of a bus whose handlers each get a payload of their own: encoded by the publisher, decoded for each."""
    json = peer("msgspec.json")
    encode, decode = json.Encoder().encode, json.Decoder().decode

    async def main(total: int) -> Sample:
        tally = Tally()
        queue: asyncio.Queue[bytes] = asyncio.Queue()

        async def handler(_payload: dict[str, Any]) -> None:
            tally.hit()

        async def worker() -> None:
            while True:
                await handler(decode(await queue.get()))

        async def send(size: int) -> None:
            for _ in range(size):
                await queue.put(encode(PAYLOAD))

        return await _with_worker(worker(), bursts(total, tally, send))

    return asyncio.run(main(run.count(100_000, BURST)))


async def _with_worker(worker: Coroutine[Any, Any, None], measured: Coroutine[Any, Any, Sample]) -> Sample:
    task = asyncio.create_task(worker)
    sample = await measured
    task.cancel()
    return sample


def pyee_emitter(run: Run) -> Sample:
    emitter_class = peer("pyee.asyncio").AsyncIOEventEmitter

    async def main() -> Sample:
        tally = Tally()
        emitter = emitter_class()

        async def handler(_payload: dict[str, Any]) -> None:
            tally.hit()

        emitter.on(TOPIC, handler)

        async def send(size: int) -> None:
            for _ in range(size):
                emitter.emit(TOPIC, PAYLOAD)

        return await bursts(run.count(40_000, BURST), tally, send)

    return asyncio.run(main())


def bubus_bus(run: Run) -> Sample:
    """In bursts of 40, because it refuses more than 100 pending."""
    bubus = peer("bubus")
    logging.getLogger("bubus").setLevel(logging.CRITICAL)

    class OrderCreated(bubus.BaseEvent):  # type: ignore[misc, name-defined]
        order: dict[str, Any]

    async def main() -> Sample:
        tally = Tally()
        bus = bubus.EventBus()

        async def handler(_event: OrderCreated) -> None:
            tally.hit()

        bus.on(OrderCreated, handler)

        async def send(size: int) -> None:
            for _ in range(size):
                bus.dispatch(OrderCreated(order=PAYLOAD))
            await bus.wait_until_idle()

        sample = await bursts(run.count(800, 40), tally, send, burst=40)
        await bus.stop(timeout=5, clear=True)
        return sample

    return asyncio.run(main())


@contextlib.contextmanager
def dramatiq_broker(*, retries: bool = False, prometheus: bool = False) -> Iterator[tuple[Any, Any]]:
    """(dramatiq, StubBroker with one worker thread)."""
    # Imported first: under dramatiq's multiprocess variables prometheus_client would be another one for every row.
    peer("prometheus_client")
    dramatiq, stub = peer("dramatiq"), peer("dramatiq.brokers.stub")
    for name in ("dramatiq", "dramatiq.worker.WorkerThread"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    middleware = None
    if retries:
        middleware = [dramatiq.middleware.Retries(min_backoff=1, max_backoff=1)]
    broker = stub.StubBroker(middleware=middleware)
    if prometheus:
        metrics = peer("dramatiq.middleware.prometheus").Prometheus()
        before = dict(os.environ)
        metrics.after_process_boot(broker)
        for key in set(os.environ) - set(before):
            del os.environ[key]
        broker.add_middleware(metrics)
    worker = dramatiq.Worker(broker, worker_timeout=100, worker_threads=1)
    worker.start()
    try:
        yield dramatiq, broker
    finally:
        worker.stop()
        broker.close()


def _dramatiq_throughput(run: Run, *, prometheus: bool) -> Sample:
    with dramatiq_broker(prometheus=prometheus) as (dramatiq, broker):
        tally = Tally(threads=True)
        total = run.count(4_000, BURST)

        def handler(_payload: dict[str, Any]) -> None:
            tally.hit()

        actor = dramatiq.actor(handler, broker=broker, actor_name="orders", queue_name="orders")
        with Stopwatch() as watch:
            for _ in range(0, total, BURST):
                tally.expect(BURST)
                for _ in range(BURST):
                    actor.send(PAYLOAD)
                tally.wait_thread()
        tally.check(total)
        return watch.throughput(total)


def dramatiq_stub(run: Run) -> Sample:
    return _dramatiq_throughput(run, prometheus=False)


def dramatiq_prometheus(run: Run) -> Sample:
    return _dramatiq_throughput(run, prometheus=True)


def taskiq_memory(run: Run) -> Sample:
    taskiq = peer("taskiq")

    async def main() -> Sample:
        tally = Tally()
        broker = taskiq.InMemoryBroker()

        async def handler(_payload: dict[str, Any]) -> None:
            tally.hit()

        task = broker.register_task(handler, task_name="orders")
        await broker.startup()

        async def send(size: int) -> None:
            for _ in range(size):
                await task.kiq(PAYLOAD)

        sample = await bursts(run.count(10_000, BURST), tally, send)
        await broker.wait_all()
        await broker.shutdown()
        return sample

    return asyncio.run(main())


def raw_queue_latency(run: Run) -> Sample:
    """Publish to handler entry, one message in flight, with the task wake-up that it takes."""

    async def main() -> Sample:
        queue: asyncio.Queue[float] = asyncio.Queue()
        taken: list[float] = []
        answered = asyncio.Event()

        async def handler(sent_at: float) -> None:
            taken.append(time.perf_counter() - sent_at)
            answered.set()

        async def worker() -> None:
            while True:
                await handler(await queue.get())

        task = asyncio.create_task(worker())
        for _ in range(run.count(10_000)):
            answered.clear()
            await queue.put(time.perf_counter())
            await answered.wait()
        task.cancel()
        return latency(taken)

    return asyncio.run(main())


def latency(taken_s: list[float]) -> Sample:
    """p50, with p99 and p99.9 beside it, in microseconds."""
    us = [seconds * 1e6 for seconds in taken_s]
    return Sample(quantile(us, 0.5), {"p99": quantile(us, 0.99), "p99.9": quantile(us, 0.999)})


MEMORY = (
    Row("pyee AsyncIOEventEmitter", pyee_emitter, "a task for each handler"),
    Row("taskiq InMemoryBroker", taskiq_memory),
    Row("dramatiq StubBroker", dramatiq_stub, "1 worker thread, plain handler"),
    Row("dramatiq StubBroker + Prometheus", dramatiq_prometheus, "1 worker thread, plain handler"),
    Row("bubus EventBus", bubus_bus, "bursts of 40: it refuses more than 100 pending"),
)
