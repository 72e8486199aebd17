"""Whatever becomes of a collector: messages are handled as if it were not there, and what is lost is counted."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from prometheus_client import CollectorRegistry

from glassbus import KillSwitch, Message, MessageBus, Retry
from glassbus.telemetry import configure
from glassbus.telemetry.setup import Telemetry

pytestmark = pytest.mark.usefixtures("no_global_provider")

MESSAGES, EVERY = 300, 10
#: Far more than anything here takes; what hangs would exceed it.
GENEROUS_S = 50.0
RESOLVED = socket.getaddrinfo


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set at the end of a test, for whatever hangs in it to go on."""
    event = threading.Event()
    yield event
    event.set()


# The collectors. Each yields the address of one.


def down(_: threading.Event) -> contextlib.AbstractContextManager[str]:
    return contextlib.nullcontext("127.0.0.1:1")


@contextlib.contextmanager
def unresolvable(released: threading.Event) -> Iterator[str]:
    """Its name is looked up for ever."""

    def look_up(host: Any, *more: Any, **options: Any) -> Any:
        if host == "collector.invalid":
            released.wait(60.0)
        return RESOLVED(host, *more, **options)

    socket.getaddrinfo = look_up
    try:
        yield "collector.invalid:4318"
    finally:
        socket.getaddrinfo = RESOLVED


def answering(answer: Callable[[Any, threading.Event], None]) -> Callable[[threading.Event], Any]:
    """A server that does `answer` with each connection."""

    @contextlib.contextmanager
    def serve(released: threading.Event) -> Iterator[str]:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):  # the client has gone
                    answer(self.request, released)

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            server.block_on_close = False
            thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            thread.start()
            yield f"127.0.0.1:{server.server_address[1]}"
            server.shutdown()
            thread.join()

    return serve


def silent(connection: Any, released: threading.Event) -> None:
    released.wait(60.0)


def garbage(connection: Any, _: threading.Event) -> None:
    connection.recv(65536)
    connection.sendall(b"\x00\xff" * 500 + b"HTTP/9.9 nonsense\r\n\r\n")


def error_500(connection: Any, _: threading.Event) -> None:
    connection.recv(1 << 20)
    connection.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def closing(connection: Any, _: threading.Event) -> None:
    connection.recv(10)


COLLECTORS = {
    "down": down,
    "silent": answering(silent),
    "answers garbage": answering(garbage),
    "answers 500": answering(error_500),
    "hangs up": answering(closing),
    "name hangs": unresolvable,
}


async def work() -> dict[str, int]:
    """Messages of which some fail once; all are handled, and the bus stops in time. The failures of observers."""
    registry = CollectorRegistry()
    bus = MessageBus(registry=registry)
    handled: set[int] = set()
    failed: set[int] = set()

    @bus.subscribe(
        "orders", name="charge", retry=Retry(max_attempts=3, immediate=2), kill_switch=KillSwitch(enabled=False)
    )
    async def charge(message: Message[int]) -> None:
        if message.payload % EVERY == 0 and message.payload not in failed:
            failed.add(message.payload)
            raise ConnectionError("the bank does not answer")
        handled.add(message.payload)

    async with asyncio.timeout(GENEROUS_S), bus:
        for number in range(MESSAGES):
            await bus.publish("orders", number)
        await bus.drain()
        assert len(handled) == MESSAGES
        assert bus.ledger().unaccounted == 0
    settled = registry.get_sample_value(
        "glassbus_messages_settled_total",
        {"bus": "default", "destination": "orders", "subscription": "charge", "result": "handled"},
    )
    assert settled == MESSAGES
    return bus.hub.failures


def made(telemetry: Telemetry) -> int:
    """Spans that came out of the bus, exported or counted as dropped."""
    return sum(queue.exported + sum(queue.dropped.values()) for queue in telemetry.queues)


#: publish + process of each, a second process of each that failed, its error and recover, and the shutdown.
SPANS = 2 * MESSAGES + 3 * (MESSAGES // EVERY) + 1


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
@pytest.mark.parametrize("collector", COLLECTORS)
def test_a_collector_changes_nothing_but_the_counts_of_what_it_did_not_take(
    collector: str, protocol: str, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with COLLECTORS[collector](released) as address:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{address}")
        telemetry = configure()
        assert asyncio.run(work()) == {}
        began = time.monotonic()
        telemetry.flush(0.2)
        telemetry.shutdown(0.5)
        assert time.monotonic() - began < GENEROUS_S
        assert made(telemetry) == SPANS
        assert [queue.exported for queue in telemetry.queues] == [0, 0]
        released.set()


class Exporter(SpanExporter):
    """Does `act`, and then says what it says."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act = act

    def export(self, spans: Any) -> Any:
        return self._act()

    def shutdown(self) -> None:
        self._act()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return bool(self._act())


def raising(error: type[BaseException]) -> Callable[[], Any]:
    def act() -> Any:
        raise error("collector says no")

    return act


@pytest.mark.parametrize(
    "act",
    [
        raising(RuntimeError),
        raising(SystemExit),
        raising(KeyboardInterrupt),
        lambda: SpanExportResult.FAILURE,
        lambda: None,
        lambda: "SUCCESS",
    ],
    ids=["raises", "exits", "interrupts", "fails", "says nothing", "lies"],
)
def test_an_exporter_changes_nothing_but_the_counts_of_what_it_did_not_take(act: Callable[[], Any]) -> None:
    telemetry = configure(exporter=Exporter(act))
    assert asyncio.run(work()) == {}
    telemetry.flush(GENEROUS_S)
    telemetry.shutdown(GENEROUS_S)
    assert made(telemetry) == SPANS == sum(queue.dropped["export_failed"] for queue in telemetry.queues)


def test_an_exporter_that_hangs_holds_up_neither_messages_nor_the_end(released: threading.Event) -> None:
    telemetry = configure(exporter=Exporter(lambda: released.wait(60.0)))
    assert asyncio.run(work()) == {}
    began = time.monotonic()
    assert not telemetry.flush(0.1)
    assert not telemetry.shutdown(0.2)
    assert time.monotonic() - began < GENEROUS_S
    assert made(telemetry) == SPANS


def test_failures_leave_although_happy_spans_flood_a_queue_that_nobody_empties(released: threading.Event) -> None:
    """Each queue has its own room, thread and exporter: a flood of what went well pushes out no failure."""
    taken: list[str] = []

    class Taking(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            taken.extend(span.name for span in spans)
            return SpanExportResult.SUCCESS

    with configure(exporter=Exporter(lambda: released.wait(60.0)), failure_exporter=Taking()) as telemetry:
        for _ in range(10):
            asyncio.run(work())
        assert telemetry.spans is not None
        assert telemetry.failures is not None
        assert telemetry.failures.flush(GENEROUS_S)
        assert telemetry.spans.dropped["queue_full"] > 0
        telemetry.shutdown(0.2)
    assert taken.count("error orders") == 10 * MESSAGES // EVERY


def test_a_full_disk_under_the_log_loses_no_message() -> None:
    class Full(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    handler = Full()
    logger = logging.getLogger("glassbus")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        failures = asyncio.run(work())
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert set(failures) == {"LoggingObserver"}
