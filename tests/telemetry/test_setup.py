"""`configure()` exports over real OTLP, from the standard variables, and lets go within our own deadline."""

from __future__ import annotations

import asyncio
import gzip
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from glassbus import ConfigurationError, Message, MessageBus, Retry
from glassbus.telemetry import configure, exposition, observe, setup
from glassbus.telemetry.outlet import SCHEMA_URL

pytestmark = pytest.mark.usefixtures("no_global_provider", "clean_environment")


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


class Receiver:
    """What a collector was sent, by service name and span name."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def services(self) -> set[str]:
        return {
            attribute.value.string_value
            for request in self.requests
            for resource in request.resource_spans
            for attribute in resource.resource.attributes
            if attribute.key == "service.name"
        }


@pytest.fixture
def http_receiver() -> Iterator[tuple[Receiver, str]]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            receiver.requests.append(ExportTraceServiceRequest.FromString(body))
            receiver.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Nothing to say."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield receiver, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def grpc_receiver() -> Iterator[tuple[Receiver, str]]:
    import grpc
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
        TraceServiceServicer,
        add_TraceServiceServicer_to_server,
    )

    receiver = Receiver()

    class Service(TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the service's own name
            receiver.requests.append(request)
            return ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(Service(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield receiver, f"http://127.0.0.1:{port}"
    server.stop(0).wait()


async def fail_once() -> CollectorRegistry:
    """One message that fails and is then handled, and one that is handled at once."""
    registry = CollectorRegistry()
    bus = MessageBus(telemetry=False)
    bus.observe(observe(bus, registry=registry))
    failed = False

    @bus.subscribe("orders", name="charge", retry=Retry(max_attempts=3))
    async def charge(message: Message[Any]) -> None:
        nonlocal failed
        if message.payload == "bad" and not failed:
            failed = True
            raise ValueError("card declined")

    async with bus:
        await bus.publish("orders", "good")
        await bus.publish("orders", "bad")
        await bus.drain()
    return registry


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_failures_leave_over_otlp_at_zero_percent_sampling(
    protocol: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver, endpoint = request.getfixturevalue("grpc_receiver" if protocol == "grpc" else "http_receiver")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=payments")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "orders")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    with configure(service_name="not this") as telemetry:
        asyncio.run(fail_once())
        assert telemetry.flush(30.0)
    names = sorted(span.name for span in receiver.spans)
    assert names == ["error orders", "process orders", "process orders", "recover orders", "shutdown"]
    assert receiver.services == {"orders"}
    (event,) = next(span for span in receiver.spans if span.name == "error orders").events
    assert {a.key for a in event.attributes} == {"exception.type", "exception.message", "exception.stacktrace"}
    if protocol != "grpc":
        assert all(headers["x-team"] == "payments" for headers in receiver.headers)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, "given"),
        ({"OTEL_SERVICE_NAME": "one"}, "one"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=two,service.version=7"}, "two"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.namespace=shop,service.version=7"}, "given"),
    ],
)
def test_spans_say_which_service_and_sdk_they_are_of(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    exporter = InMemorySpanExporter()
    with configure(service_name="given", exporter=exporter) as telemetry:
        asyncio.run(fail_once())
        assert telemetry.flush(30.0)
    for span in exporter.get_finished_spans():
        said = span.resource.attributes
        assert said["service.name"] == named
        assert {"telemetry.sdk.name", "telemetry.sdk.language", "telemetry.sdk.version"} <= set(said)
        assert ("service.version" in said) == ("service.version" in str(variables))
        assert span.instrumentation_scope.name == "glassbus"
        assert span.instrumentation_scope.schema_url == SCHEMA_URL


def test_happy_spans_and_failures_have_a_queue_each() -> None:
    happy, failures = InMemorySpanExporter(), InMemorySpanExporter()
    with configure(exporter=happy, failure_exporter=failures) as telemetry:
        asyncio.run(fail_once())
        assert telemetry.flush(30.0)
    assert sorted(s.name for s in happy.get_finished_spans()) == ["process orders", "publish orders", "publish orders"]
    assert sorted(s.name for s in failures.get_finished_spans()) == [
        "error orders",
        "process orders",
        "process orders",
        "recover orders",
        "shutdown",
    ]


def test_it_is_set_up_once_and_may_be_again_after_a_shutdown() -> None:
    first, second = InMemorySpanExporter(), InMemorySpanExporter()
    telemetry = configure(exporter=first, service_name="one")
    provider = trace.get_tracer_provider()
    assert configure(exporter=second) is telemetry
    assert telemetry.shutdown(30.0)
    assert telemetry.shutdown(30.0)
    with configure(exporter=second) as again:
        assert again is not telemetry
        assert trace.get_tracer_provider() is provider
        asyncio.run(fail_once())
        assert again.flush(30.0)
    assert first.get_finished_spans() == ()
    assert second.get_finished_spans()[0].resource.attributes["service.name"] == "one"


def test_a_provider_of_the_program_is_left_alone_and_a_failure_exporter_is_added(spans: Any) -> None:
    theirs, failures = spans(1.0), InMemorySpanExporter()
    trace.set_tracer_provider(theirs.provider)
    with configure(failure_exporter=failures) as telemetry:
        assert trace.get_tracer_provider() is theirs.provider
        asyncio.run(fail_once())
        assert telemetry.flush(30.0)
    assert sorted(span.name for span in theirs.all()) == ["process orders", "publish orders", "publish orders"]
    assert "error orders" in [span.name for span in failures.get_finished_spans()]


def test_without_exporter_or_with_the_sdk_disabled_nothing_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with configure() as telemetry:
        assert telemetry.queues == ()
        asyncio.run(fail_once())
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    with configure() as telemetry:
        assert telemetry.queues == ()
        asyncio.run(fail_once())


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "carrier-pigeon"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "telex"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
        ("OTEL_BSP_SCHEDULE_DELAY", "-1"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    if variable == "OTEL_EXPORTER_OTLP_PROTOCOL":
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=value):
        configure()


def test_a_collector_that_is_down_changes_nothing_but_the_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    telemetry = configure()
    registry = asyncio.run(fail_once())
    assert not telemetry.shutdown(0.3)
    lost = sum(sum(queue.dropped.values()) for queue in telemetry.queues)
    assert lost == 8
    assert b"glassbus_messages_settled_total" in exposition(registry)[1]


def test_the_queues_show_in_a_scrape_once_whatever_the_number_of_buses() -> None:
    with configure(exporter=InMemorySpanExporter()) as telemetry:
        registry = asyncio.run(fail_once())
        others = [MessageBus(telemetry=False, name=name) for name in ("one", "two")]
        kept = [observe(bus, registry=registry) for bus in others]
        telemetry.flush(30.0)
        body = exposition(registry)[1].decode()
    for queue in ("spans", "failures"):
        assert len(re.findall(rf'glassbus_telemetry_queue_spans{{bus="\w+",queue="{queue}"}} 0\.0', body)) == 1
    assert len(kept) == 2
    assert setup.active_queues() == ()


def test_importing_telemetry_imports_no_sdk_and_a_program_that_just_ends_has_exported() -> None:
    program = (
        "import sys, asyncio, glassbus.telemetry as t\n"
        "heavy = [m for m in ('opentelemetry', 'prometheus_client', 'grpc') if m in sys.modules]\n"
        "from opentelemetry.sdk.trace.export import ConsoleSpanExporter\n"
        "t.configure(exporter=ConsoleSpanExporter(formatter=lambda span: span.name + chr(10)))\n"
        "from glassbus import MessageBus\n"
        "async def main():\n"
        "    bus = MessageBus()\n"
        "    bus.subscribe('orders', name='o')(lambda message: None)\n"
        "    async with bus:\n"
        "        await bus.publish('orders')\n"
        "        await bus.drain()\n"
        "asyncio.run(main())\n"
        "print(heavy)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    lines = ran.stdout.split("\n")
    assert "[]" in lines
    assert {"publish orders", "process orders", "shutdown"} <= set(lines)
