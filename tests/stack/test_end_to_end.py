"""From an injected handler error to all that an operator meets: metric, alert, notification, and its trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_stack import Stack

from glassbus.drill.receiver import Receiver
from tests.server_kit import fetch
from tests.stack_kit import attributes, prometheus, spans_of, until, value

BUS, ROUNDS, FAILURES = "e2e", 5, 4
#: More than three openings within 15 minutes, and no waiting: it has no `for`.
ALERT = "GlassbusBreakerFlapping"

#: A service whose handler is made to fail, five times for long enough to open its breaker. Prints how often it failed,
#: and goes on serving its metrics until its stdin ends.
SERVICE = f"""
import asyncio, logging, os, sys
from glassbus import KillSwitch, Message, MessageBus, Retry
from glassbus.faults import Raise, inject
from glassbus.server import serve
from glassbus.telemetry import configure

logging.getLogger("glassbus").setLevel(logging.CRITICAL)
bus = MessageBus("memory://", name="{BUS}")
switch = KillSwitch(window=30.0, minimum={FAILURES}, ratio=0.3, open_for=1.5, probes=1)

@bus.subscribe("orders.*", name="charge", concurrency=1, retry=Retry(max_attempts=3), kill_switch=switch)
async def charge(message: Message[int]) -> None:
    pass

async def main() -> None:
    loop = asyncio.get_running_loop()
    async with bus:
        with serve(bus):
            failed = 0
            loop.call_later(60, os._exit, 1)  # whatever is waited for in vain
            for _ in range({ROUNDS}):
                with inject(bus, Raise(ConnectionError, "the bank does not answer"), "handler:charge") as injection:
                    for number in range({FAILURES}):
                        await bus.publish("orders.created", number)
                    while bus.breakers["charge"].state != "open":
                        await asyncio.sleep(0.01)
                failed += injection.hits
                await bus.drain()
                while bus.breakers["charge"].state != "closed":
                    await asyncio.sleep(0.01)
            print(failed, flush=True)
            await loop.run_in_executor(None, sys.stdin.read)

with configure():
    asyncio.run(main())
"""


@pytest.fixture
def failed(stack: Stack, tmp_path: Path) -> Iterator[int]:
    """How often the handler of a service that still runs was made to fail."""
    service = subprocess.Popen(
        [sys.executable, "-c", SERVICE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, **stack.of_a_service("e2e-shop")},
        text=True,
    )
    try:
        assert service.stdout is not None
        yield int(service.stdout.readline() or -1)
    finally:
        service.communicate(timeout=60)


def test_a_handler_error_becomes_a_metric_an_alert_a_notification_and_a_trace(
    stack: Stack, told: Receiver, failed: int
) -> None:
    assert failed > ROUNDS
    errors = f'glassbus_errors_total{{bus="{BUS}", category="connection_error"}}'
    assert until(lambda: value(stack, errors), lambda found: found == failed) == failed

    # The alert: pending or firing in Prometheus, then in Alertmanager, and somebody is told.
    flapping = f'ALERTS{{alertname="{ALERT}", bus="{BUS}", alertstate="firing"}}'
    assert until(lambda: value(stack, flapping)) == 1
    (alert,) = until(lambda: alerts(stack))
    assert alert["labels"] | {"breaker": "charge", "bus": BUS, "severity": "warning"} == alert["labels"]
    assert {"summary", "description", "runbook_url", "dashboard_url"} <= set(alert["annotations"])
    (notice, *_) = until(lambda: [one for one in told.notices() if one.labels.get("bus") == BUS])
    assert (notice.receiver, notice.status, notice.labels["alertname"]) == ("warning", "firing", ALERT)

    # The trace: what an operator reaches by clicking on a point of the errors' panel. The last error before the breaker
    # opened is the one that tipped it, and no other takes its place before the next scrapes.
    found = until(lambda: [trace for trace in traces_of_exemplars(stack, errors) if opening_in(trace)])
    assert found
    check_the_story(stack, found[0])
    assert until(lambda: all(traces_of_exemplars(stack, errors)))


def alerts(stack: Stack) -> list[dict[str, Any]]:
    """What Alertmanager has of the alert."""
    found: list[dict[str, Any]] = json.loads(fetch(f"{stack.url('alertmanager:9093')}/api/v2/alerts"))
    return [one for one in found if one["labels"].get("alertname") == ALERT and one["labels"].get("bus") == BUS]


def traces_of_exemplars(stack: Stack, query: str) -> list[dict[str, dict[str, Any]]]:
    """For each exemplar of a metric, the trace that it leads to; empty where its span is not there (yet)."""
    now = time.time()
    series = prometheus(stack, "query_exemplars", query=query, start=str(now - 600), end=str(now))
    exemplars = [exemplar["labels"] for one in series for exemplar in one["exemplars"]]
    traces = [(spans_of(stack, one["trace_id"]), one["span_id"]) for one in exemplars]
    return [trace if span_id in trace else {} for trace, span_id in traces]


def opening_in(trace: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    return next((span for span in trace.values() if span["name"] == "breaker charge closed->open"), None)


def check_the_story(stack: Stack, trace: dict[str, dict[str, Any]]) -> None:
    """The attempt that tipped the breaker, with its error, recovery and breaker spans, and what they link to."""
    opening = opening_in(trace)
    assert opening is not None
    attempt = trace[opening["parentSpanId"]]
    assert (attempt["name"], attempt["status"]["code"]) == ("process orders.*", 2)
    assert attributes(attempt)["error.type"] == "ConnectionError"
    children = {span["name"]: span for span in trace.values() if span.get("parentSpanId") == attempt["spanId"]}
    assert set(children) == {"error orders.*", "recover orders.*", opening["name"]}
    assert children["error orders.*"]["status"]["message"] == "the bank does not answer"
    assert attributes(children["recover orders.*"])["glassbus.recovery.outcome"] == "scheduled"

    # The other deliveries that counted: each a failed attempt, in a trace of its own that is there too.
    assert opening["links"]
    for link in opening["links"]:
        assert attributes(link)["glassbus.link"] == "cause"
        cause = until(lambda: spans_of(stack, link["traceId"]).get(link["spanId"]))  # noqa: B023 - at once
        assert cause is not None
        assert (cause["name"], cause["status"]["code"]) == ("process orders.*", 2)

    # Its retry, once the breaker let it through, which links to the attempt before it.
    (trace_id,) = {span["traceId"] for span in trace.values()}
    links = until(lambda: links_of_retries(spans_of(stack, trace_id)), lambda found: attempt["spanId"] in found)
    assert attempt["spanId"] in links
    assert set(links.values()) == {"previous_attempt"}


def links_of_retries(trace: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What the attempts of a trace link to, and as what."""
    attempts = [span for span in trace.values() if span["name"] == "process orders.*"]
    return {link["spanId"]: attributes(link)["glassbus.link"] for one in attempts for link in one.get("links", [])}
