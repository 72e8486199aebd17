"""What otel-collector.yaml promises, asked of the real collector and Jaeger: `validate` sees little of it."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import time
import urllib.request
from collections.abc import Iterable, Mapping
from typing import Any

from local_stack import Stack

from tests.server_kit import REPOSITORY, fetch, need
from tests.stack_kit import spans_of, until, value

CONFIG = REPOSITORY / "otel-collector.yaml"
#: Spans that are kept, each for another reason, and one that need not be.
KEEP: Mapping[str, Any] = {"keep": True}
ERROR: Mapping[str, Any] = {"error": True}
SLOW: Mapping[str, Any] = {"seconds": 2.0}
PLAIN: Mapping[str, Any] = {}


def send(
    stack: Stack,
    traces: Iterable[str],
    *,
    keep: bool = False,
    error: bool = False,
    seconds: float = 0.01,
    service: str = "sender",
) -> None:
    """One span for each of `traces`, over OTLP/HTTP."""
    ended = time.time_ns()
    spans = [
        {
            "traceId": trace_id,
            "spanId": secrets.token_hex(8),
            "name": "sent",
            "kind": 1,
            "startTimeUnixNano": str(ended - int(seconds * 1e9)),
            "endTimeUnixNano": str(ended),
            "attributes": [{"key": "glassbus.keep", "value": {"boolValue": True}}] if keep else [],
            "status": {"code": 2} if error else {},
        }
        for trace_id in traces
    ]
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": service}}]}
    body = json.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": spans}]}]}).encode()
    asked = urllib.request.Request(  # noqa: S310 - what the tests started
        f"{stack.url('collector:4318')}/v1/traces", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=10) as answer:  # noqa: S310
        assert json.load(answer).get("partialSuccess", {}).get("rejectedSpans", 0) == 0


def traces(count: int) -> list[str]:
    return [secrets.token_hex(16) for _ in range(count)]


def missing(stack: Stack, wanted: Iterable[str]) -> list[str]:
    return [trace_id for trace_id in wanted if not spans_of(stack, trace_id)]


def is_empty(found: list[str]) -> bool:
    return not found


def decided(stack: Stack) -> None:
    """Return when all traces that were sent before are decided on: a later one, with an error, is in Jaeger."""
    marker = traces(1)
    send(stack, marker, **ERROR)
    assert until(lambda: missing(stack, marker), is_empty) == []


def metric(stack: Stack, name: str) -> float:
    """The sum of a metric of the collector's own, without a scrape between."""
    lines = fetch(f"{stack.url('collector:8888')}/metrics").decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}[{{ ]", line))


def test_it_is_valid_and_every_variable_of_it_has_a_default() -> None:
    checked = subprocess.run(
        [need("otelcol"), "validate", "--config", str(CONFIG)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")
    assert [found for found in re.findall(r"\$\{[^}]*\}", CONFIG.read_text()) if ":-" not in found] == []


def test_what_went_wrong_is_kept_for_each_reason_and_of_the_rest_a_share(stack: Stack) -> None:
    kept, failed, slow, plain = traces(20), traces(20), traces(20), traces(400)
    send(stack, plain, **PLAIN)
    send(stack, kept, **KEEP)
    send(stack, failed, **ERROR)
    send(stack, slow, **SLOW)
    decided(stack)
    for wanted in (kept, failed, slow):
        assert until(lambda: missing(stack, wanted), is_empty) == []  # noqa: B023 - asked at once
    share = 1 - len(missing(stack, plain)) / len(plain)
    assert 0.01 < share < 0.25  # 10 %, six standard deviations either way


def test_span_metrics_count_what_was_sent_before_any_sampling(stack: Stack) -> None:
    """Spans of healthy traces, most of which are dropped: each is counted, once, though Jaeger never has it."""
    plain, failed = traces(400), traces(20)
    send(stack, plain, **PLAIN, service="counted")
    send(stack, failed, **ERROR, service="counted")
    decided(stack)
    assert len(missing(stack, plain)) > len(plain) / 2
    for status, sent in (("STATUS_CODE_UNSET", plain), ("STATUS_CODE_ERROR", failed)):
        calls = f'traces_span_metrics_calls_total{{service_name="counted", status_code="{status}"}}'
        assert until(lambda: value(stack, calls), lambda found: found == len(sent)) == len(sent)  # noqa: B023 - at once


def test_a_failure_span_that_comes_after_the_decision_on_its_trace_is_kept(stack: Stack) -> None:
    late = traces(30)
    send(stack, late, **PLAIN)
    decided(stack)
    assert missing(stack, late)
    send(stack, late, **KEEP)
    assert until(lambda: missing(stack, late), is_empty) == []


def test_what_was_decided_outlives_jaeger_and_the_collector(stack: Stack) -> None:
    kept = traces(50)
    stack.jaeger.kill()
    try:
        send(stack, kept, **KEEP)
        # On disk by both paths, the quick and the usual one.
        assert until(lambda: metric(stack, "otelcol_exporter_queue_size"), lambda size: size >= 2 * len(kept)) >= 100
        stack.collector.kill()
    finally:
        stack.jaeger.start()
        if not stack.collector.running:
            stack.collector.start()
    assert until(lambda: missing(stack, kept), is_empty) == []


def test_prometheus_sees_the_collector_and_the_rest_of_the_stack(stack: Stack) -> None:
    send(stack, traces(1), **KEEP)
    jobs = 'up{job=~"collector|span-metrics|jaeger|prometheus|alertmanager"}'
    assert until(lambda: value(stack, jobs), lambda found: found == 5) == 5
    for name in ("otelcol_receiver_accepted_spans", "otelcol_exporter_sent_spans", "otelcol_exporter_queue_capacity"):
        assert until(lambda: value(stack, f'{name}{{job="collector"}}')) > 0, name  # noqa: B023 - asked at once


def test_nothing_in_the_configurations_is_deprecated(stack: Stack) -> None:
    for server in stack.servers:
        assert [line for line in server.log.read_text().splitlines() if "deprecat" in line.lower()] == []
