"""From a failing handler to Jaeger, through the real collector with the configuration that we ship."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

import yaml
from local_stack import Stack

from tests.server_kit import REPOSITORY
from tests.stack_kit import series, spans_of, until, value

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


def run_workload(stack: Stack, service: str) -> dict[int, str]:
    """The trace of each message that failed, by its number."""
    environment = {**os.environ, **stack.of_a_service(service)}
    done = subprocess.run(
        [sys.executable, "-c", WORKLOAD], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return {int(number): trace_id for number, trace_id in json.loads(done.stdout).items()}


def test_every_failure_at_one_percent_sampling_is_found_in_jaeger(stack: Stack) -> None:
    failed = run_workload(stack, "traced-shop")
    assert len(failed) == MESSAGES // EVERY
    for number, trace_id in failed.items():
        wanted = ["error orders.*", "process orders.*", "process orders.*", "recover orders.*"]
        if number % (2 * EVERY) == 0:
            wanted += ["error orders.*", "recover orders.*", "settle orders.*"]
        enough = partial(_has, len(wanted))
        found = until(partial(spans_of, stack, trace_id), enough)
        assert _of_the_failure(found) == sorted(wanted), trace_id
        (retried,) = [span for span in found.values() if span["name"] == "process orders.*" and span.get("links")]
        assert found[retried["links"][0]["spanId"]]["name"] == "process orders.*"


def _has(count: int, spans: dict[str, dict[str, Any]]) -> bool:
    return len(_of_the_failure(spans)) >= count


def _of_the_failure(spans: dict[str, dict[str, Any]]) -> list[str]:
    return sorted(span["name"] for span in spans.values() if span["name"] != "publish orders.*")


def test_span_metrics_count_every_failure_of_a_service(stack: Stack) -> None:
    run_workload(stack, "counted-shop")
    errors = 'traces_span_metrics_calls_total{service_name="counted-shop", span_name="error orders.*"}'
    wanted = MESSAGES // EVERY * 1.5
    assert until(lambda: value(stack, errors), lambda found: found == wanted) == wanted


def test_a_span_leads_to_metrics_of_its_service(stack: Stack) -> None:
    """The queries behind Grafana's links from Jaeger: `$__tags` stands for the span's tags as labels."""
    run_workload(stack, "linked-shop")
    provisioned = yaml.safe_load((REPOSITORY / "deploy/grafana/provisioning/datasources/glassbus.yaml").read_text())
    (jaeger,) = [source for source in provisioned["datasources"] if source["type"] == "jaeger"]
    links = jaeger["jsonData"]["tracesToMetrics"]
    assert [(tag["key"], tag["value"]) for tag in links["tags"]] == [("service.name", "service_name")]
    queries = [one["query"].replace("$$__tags", 'service_name="linked-shop"') for one in links["queries"]]
    for query in (one for one in queries if "linked-shop" in one):
        assert until(partial(series, stack, query)), query
    assert len(queries) > 2
