"""From a failing handler to Jaeger, through the real collector with the configuration that we ship."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.nats_kit import free_port
from tests.server_kit import REPOSITORY, Server, fetch, need, running

MESSAGES, EVERY = 1000, 5

#: Publishes MESSAGES messages; every fifth fails at its first attempt, every tenth at both. Prints their traces.
WORKLOAD = f"""
import asyncio, json, logging, sys
from glassbus import Message, MessageBus, KillSwitch, Retry
from glassbus.telemetry import configure

logging.getLogger("glassbus").setLevel(logging.CRITICAL)
bus = MessageBus("memory://", name="shop")

@bus.subscribe("orders.*", name="charge", retry=Retry(max_attempts=2), kill_switch=KillSwitch(enabled=False))
async def charge(message: Message[int], *_: object) -> None:
    number = message.payload
    if number % {EVERY} == 0 and (number % {2 * EVERY} == 0 or number not in failed):
        # A sampled message carries its trace; the trace of any other is its id.
        failed[number] = message.headers.get("traceparent", f"00-{{message.id}}-").split("-")[1]
        raise ConnectionError("the bank does not answer")

failed: dict[int, str] = {{}}

async def main() -> None:
    async with bus:
        for number in range({MESSAGES}):
            await bus.publish("orders.created", number)
        await bus.drain()

with configure() as telemetry:
    asyncio.run(main())
    assert telemetry.flush(20.0)
json.dump(failed, sys.stdout)
"""


class Stack(NamedTuple):
    collector: Server
    jaeger: Server
    otlp: str
    query: str
    span_metrics: str


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    ports = {
        name: free_port() for name in ("grpc", "http", "health", "metrics", "spans", "jotlp", "jhttp", "jgrpc", "jh")
    }
    local = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    jaeger = Server(
        [need("jaeger"), "--config", f"file:{REPOSITORY / 'deploy' / 'jaeger.yaml'}"],
        f"http://{local['jh']}/status",
        tmp_path,
        {
            "JAEGER_OTLP": local["jotlp"],
            "JAEGER_HTTP": local["jhttp"],
            "JAEGER_GRPC": local["jgrpc"],
            "JAEGER_HEALTH": local["jh"],
        },
    )
    collector = Server(
        [need("otelcol"), "--config", str(REPOSITORY / "otel-collector.yaml")],
        f"http://{local['health']}",
        tmp_path,
        {
            "GLASSBUS_OTLP_GRPC": local["grpc"],
            "GLASSBUS_OTLP_HTTP": local["http"],
            "GLASSBUS_OTELCOL_HEALTH": local["health"],
            "GLASSBUS_OTELCOL_METRICS_HOST": "127.0.0.1",
            "GLASSBUS_OTELCOL_METRICS_PORT": str(ports["metrics"]),
            "GLASSBUS_SPANMETRICS": local["spans"],
            "GLASSBUS_SPANMETRICS_FLUSH": "1s",
            "GLASSBUS_JAEGER_OTLP": local["jotlp"],
            "GLASSBUS_DECISION_WAIT": "2s",
            "GLASSBUS_OTELCOL_QUEUE_DIR": str(tmp_path / "queue"),
        },
    )
    with running(jaeger), running(collector):
        yield Stack(
            collector, jaeger, f"http://{local['grpc']}", f"http://{local['jhttp']}", f"http://{local['spans']}/metrics"
        )


def run_workload(stack: Stack) -> dict[int, str]:
    """The trace of each message that failed, by its number."""
    environment = {
        **os.environ,
        "OTEL_EXPORTER_OTLP_ENDPOINT": stack.otlp,
        "OTEL_SERVICE_NAME": "shop",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.01",
    }
    done = subprocess.run(
        [sys.executable, "-c", WORKLOAD], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return {int(number): trace_id for number, trace_id in json.loads(done.stdout).items()}


def spans_of(stack: Stack, trace_id: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(fetch(f"{stack.query}/api/v3/traces/{trace_id}"))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return []
        raise
    resources = found["result"].get("resourceSpans", [])
    return [span for one in resources for scope in one["scopeSpans"] for span in scope["spans"]]


def wait_for(stack: Stack, trace_id: str, spans: int, until: float) -> list[dict[str, Any]]:
    """The spans of a trace once there are `spans` of them, or as many as there are at `until`."""
    while True:
        found = spans_of(stack, trace_id)
        if len(found) >= spans or time.monotonic() > until:
            return found
        time.sleep(0.1)


def test_every_failure_at_one_percent_sampling_is_found_in_jaeger(stack: Stack) -> None:
    failed = run_workload(stack)
    assert len(failed) == MESSAGES // EVERY
    until = time.monotonic() + 60
    for number, trace_id in failed.items():
        wanted = ["error orders.*", "process orders.*", "process orders.*", "recover orders.*"]
        if number % (2 * EVERY) == 0:
            wanted += ["error orders.*", "recover orders.*", "settle orders.*"]
        found = {span["spanId"]: span for span in wait_for(stack, trace_id, len(wanted), until)}
        names = sorted(span["name"] for span in found.values() if span["name"] != "publish orders.*")
        assert names == sorted(wanted), trace_id
        (retried,) = [span for span in found.values() if span["name"] == "process orders.*" and span.get("links")]
        assert found[retried["links"][0]["spanId"]]["name"] == "process orders.*"


def test_span_metrics_count_what_was_sent_before_any_sampling(stack: Stack) -> None:
    run_workload(stack)
    errors, until = 0.0, time.monotonic() + 30
    while errors != MESSAGES // EVERY * 1.5 and time.monotonic() < until:
        errors = sum(
            float(line.rpartition("}")[2].split()[0])
            for line in fetch(stack.span_metrics).decode().splitlines()
            if line.startswith("traces_span_metrics_calls_total{") and 'span_name="error orders.*"' in line
        )
        time.sleep(0.1)
    assert errors == MESSAGES // EVERY * 1.5
