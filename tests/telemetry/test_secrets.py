"""A canary in everything that may be a secret, and a search through all that leaves: it is found nowhere.

What keeps messages keeps their payloads, of course: the store, its dead letters, the spool.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import _logs, trace
from opentelemetry._logs import _internal as logs_internal
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from glassbus import (
    Alertmanager,
    Credentials,
    Delivery,
    ErrorSeverity,
    Escalation,
    GlassbusError,
    JournalSettings,
    KillSwitch,
    Message,
    MessageBus,
    Outgoing,
    PublishRejected,
    Reconnect,
    Retry,
    Webhook,
    redact_errors,
)
from glassbus.cli import main
from glassbus.message import Envelope
from glassbus.observer import ALL_FACTS, Observer
from glassbus.server import serve
from glassbus.telemetry import configure, exposition
from tests.server_kit import fetch

#: Put together here, so that no line of a stack trace shows it.
CANARY = "".join(("CANARY", "9f3ab", "hunter2"))
URL = f"https://user:{CANARY}@bank.example/pay?id=7"
TRACES = ("canary", "9f3ab", base64.b64encode(f"user:{CANARY}".encode()).decode().lower().strip("=")[8:-4])
#: What operators are shown of a store.
COMMANDS = (
    "errors list", "errors list --json", "errors stats", "errors trends", "errors report", "errors report --html -",
    "escalations list", "dlq list",
)  # fmt: skip


class Leaks:
    """What left, by where it went."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def add(self, where: str, *what: object) -> None:
        told = "\n".join(one if isinstance(one, str) else repr(one) for one in what)
        self.texts[where] = self.texts.get(where, "") + "\n" + told

    @property
    def found(self) -> dict[str, list[str]]:
        return {
            where: [line for line in text.splitlines() if any(one in line.lower() for one in TRACES)]
            for where, text in self.texts.items()
            if any(one in text.lower() for one in TRACES)
        }


@pytest.fixture
def receiver() -> Iterator[tuple[list[str], str]]:
    """Takes what is posted to it; the bodies, and where it is."""
    bodies: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(f"{self.path} {self.rfile.read(int(self.headers['Content-Length'])).decode()}")
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Nothing to say."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield bodies, f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def refusing_broker() -> Iterator[str]:
    """Speaks as much NATS as it takes to refuse a user; where it is."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            about = {"server_id": "x", "version": "2.15.0", "proto": 1, "auth_required": True, "max_payload": 1 << 20}
            self.wfile.write(f"INFO {json.dumps(about)}\r\n".encode())
            self.rfile.readline()
            self.wfile.write(b"-ERR 'Authorization Violation'\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryLogRecordExporter]:
    exporter = InMemoryLogRecordExporter()
    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    monkeypatch.setattr(logs_internal, "_LOGGER_PROVIDER", provider)
    assert _logs.get_logger_provider() is provider
    yield exporter
    provider.shutdown()


@pytest.fixture(params=["in URLs", "anywhere"])
def message(request: pytest.FixtureRequest) -> Iterator[str]:
    """The text of the exceptions: credentials of URLs are taken out anyway, more is for a program to name."""
    if request.param == "in URLs":
        yield f"cannot pay at {URL}"
    else:
        redact_errors(lambda text: text.replace(CANARY, "[gone]"))
        yield f"cannot pay with {CANARY} at {URL}"
        redact_errors(None)


class Careless(Observer):
    """An observer that fails at a fact of its own, and tells a secret while it does."""

    interests = ALL_FACTS

    def __init__(self, message: str) -> None:
        self._message = message

    def on_fact(self, fact: Any, /) -> None:
        if type(fact).__name__ == "DeliveryDeadLettered":
            raise RuntimeError(self._message)


class Pager:
    """A channel that fails."""

    name, at_least, batch, refresh_s = "pager", ErrorSeverity.LOW, 10, 0.0

    def __init__(self, message: str) -> None:
        self._message = message

    def send(self, notices: Any, /) -> None:
        raise ConnectionError(self._message)


async def live_through(bus: MessageBus, leaks: Leaks, message: str) -> None:
    """Everything that can fail fails, with the canary at hand."""

    @bus.subscribe(
        "orders.*", name="charge", retry=Retry(max_attempts=2, base_delay=0.01), kill_switch=KillSwitch(minimum=3)
    )
    async def charge(order: Message[Any]) -> None:
        password = CANARY  # a local of the frame that raises
        span = trace.get_current_span()
        try:
            raise ConnectionError(f"{message} {password[:0]}")
        except ConnectionError as error:
            span.record_exception(error)
            raise ValueError(message) from error

    @bus.subscribe("typed", name="typed", retry=Retry(max_attempts=1))
    async def typed(order: Message[dict[str, int]]) -> None:
        """Never called: its payload is of another type."""

    @bus.subscribe("slow", name="slow", timeout=0.05, retry=Retry(max_attempts=1))
    async def slow(order: Message[Any]) -> None:
        card = order.payload
        await asyncio.sleep(5.0)
        assert card

    secrets = {"authorization": f"Bearer {CANARY}", "url": URL}
    async with bus:
        for number in range(8):
            await bus.publish("orders.created", {"card": CANARY, "n": number}, headers=secrets, key=CANARY)
        await bus.publish("typed", {"card": CANARY}, headers=secrets)
        await bus.publish("slow", {"card": CANARY}, headers=secrets)
        await bus.publish("nobody", {"card": CANARY}, headers=secrets)
        for refused in ({"topic": "orders.created", "payload": {CANARY: object()}}, {"topic": f"a b {'x' * 9}"}):
            with contextlib.suppress(PublishRejected):
                await bus.publish(**refused)
        with contextlib.suppress(GlassbusError):
            await bus.reload()
        async with asyncio.timeout(60.0):
            while len(await bus.dead_letters.list(limit=100)) < 3:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)
        with serve(bus, "127.0.0.1:0", registry=bus.registry) as server:
            for path in ("/metrics", "/healthz", "/readyz"):
                with contextlib.suppress(Exception):
                    leaks.add(path, fetch(server.url + path).decode())
        leaks.add("health", json.dumps(bus.health().to_dict(), default=repr))
        leaks.add("reprs", bus, bus.health(), bus.settings, *await bus.dead_letters.list(limit=100))


def test_a_secret_is_nowhere_in_what_leaves(
    message: str,
    tmp_path: Path,
    records: InMemoryLogRecordExporter,
    receiver: tuple[list[str], str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    no_global_provider: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    leaks, registry, spans = Leaks(), CollectorRegistry(), InMemorySpanExporter()
    bodies, place = receiver
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization=Bearer {CANARY}")
    monkeypatch.setenv("GLASSBUS_PASSWORD", CANARY)
    caplog.set_level(logging.DEBUG)
    store = tmp_path / "shop.db"
    channels = (
        Webhook(f"http://user:{CANARY}@{place}/hook", headers={"X-Token": CANARY}),
        Alertmanager(f"http://user:{CANARY}@{place}", headers={"X-Token": CANARY}),
        Webhook(f"http://user:{CANARY}@127.0.0.1:1/gone?token={CANARY}", name="gone"),
        Pager(message),
    )
    leaks.add("reprs", *channels[:3])

    def configuration() -> dict[str, Any]:
        if bus.running:
            raise OSError(message)
        return {}

    bus = MessageBus(
        f"sqlite:///{store}",
        name="shop",
        registry=registry,
        observers=[Careless(message)],
        configuration=configuration,
        escalation=Escalation(channels=channels),
        journal=JournalSettings(metrics_every=0.1),
    )
    with configure(exporter=spans) as telemetry:
        with contextlib.suppress(GlassbusError):
            asyncio.run(live_through(bus, leaks, message))
        assert telemetry.flush(10.0)
    for span in spans.get_finished_spans():
        leaks.add("spans", span.to_json())
    for record in records.get_finished_logs():
        leaks.add("log records", record.log_record.body, dict(record.log_record.attributes or {}))
    for line in caplog.records:
        leaks.add("log lines", line.getMessage(), line.exc_text or "", line.__dict__.get("glassbus", {}))
    leaks.add("metrics", exposition(registry, "application/openmetrics-text")[1].decode())
    leaks.add("notifications", *bodies)
    for file in (tmp_path / "shop.db.state").rglob("*"):
        if file.is_file():
            leaks.add(f"state: {file.relative_to(tmp_path)}", file.read_bytes().decode("utf-8", "replace"))
    for command in COMMANDS:
        capsys.readouterr()
        assert main([*command.split(), "--url", f"sqlite:///{store}"]) == 0, command
        leaks.add(f"glassbus {command}", *capsys.readouterr())
    assert leaks.found == {}
    assert len(spans.get_finished_spans()) > 20
    for where in ("spans", "log records", "log lines", "notifications"):
        assert "cannot pay" in leaks.texts[where], where


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_credentials_for_brokers_and_collectors_are_nowhere(
    protocol: str,
    message: str,
    refusing_broker: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    no_global_provider: None,
) -> None:
    """The broker refuses its user, the vault fails, the collector is down: each is told of, not what opens them."""
    leaks, registry = Leaks(), CollectorRegistry()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization=Bearer {CANARY}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, logger="grpc")

    async def vault() -> Any:
        raise PermissionError(message)

    async def main() -> None:
        bus = MessageBus(
            f"nats://user:{CANARY}@{refusing_broker}",
            registry=registry,
            credentials=vault,
            state_dir=tmp_path / "state",
            reconnect=Reconnect(dial_timeout=1.0, start_timeout=0.5),
        )
        leaks.add("reprs", bus, bus.address, Credentials(password=CANARY))
        try:
            async with asyncio.timeout(3.0):
                await bus.start()
        except (GlassbusError, TimeoutError) as error:
            leaks.add("exceptions", str(error), error.__cause__, error.__context__)
        leaks.add("health", json.dumps(bus.health().to_dict(), default=repr))
        with contextlib.suppress(GlassbusError, TimeoutError):
            await bus.stop(0.5)

    telemetry = configure()
    asyncio.run(main())
    leaks.add("metrics", exposition(registry)[1].decode())
    assert not telemetry.shutdown(3.0) or telemetry.failures is None or not telemetry.failures.exported
    for line in caplog.records:
        leaks.add("log lines", line.getMessage(), line.exc_text or "", line.__dict__.get("glassbus", {}))
    for file in (tmp_path / "state").rglob("*"):
        if file.is_file():
            leaks.add(f"state: {file.name}", file.read_bytes().decode("utf-8", "replace"))
    assert leaks.found == {}
    assert leaks.texts["exceptions"]
    assert "cannot pay" in leaks.texts["log lines"]


def test_messages_show_nothing_of_what_they_carry() -> None:
    """Tools that report errors with the locals of each frame take a repr of everything."""
    message = Message("m-1", "orders", {"card": CANARY}, {"authorization": CANARY}, key=CANARY)
    outgoing = Outgoing("orders", CANARY, "m-1", CANARY, headers={"authorization": CANARY})
    envelope = Envelope("m-1", "orders", CANARY.encode(), "json", {"authorization": CANARY}, key=CANARY)
    for one in (message, outgoing, envelope, Delivery(envelope, "charge", "orders")):
        assert "m-1" in repr(one)
        assert CANARY not in repr(one)
        assert CANARY not in str(getattr(one, "__rich_repr__", list)())
