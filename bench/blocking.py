"""What it takes to hand an error to the blocking face: classified, recovered, written to the log and told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from bench.failing import fail
from bench.rows import Row, Run, Sample, Wrong, quantile
from glassbus import ProductionMessageBus

_SCALE_US = 1e6


class _Queue:
    def __init__(self) -> None:
        self.taken = 0

    def requeue_message(self, _message: Any) -> bool:
        self.taken += 1
        return True


def _handed(run: Run, bus: ProductionMessageBus, context: Callable[[], dict[str, Any]], answer: bool) -> Sample:
    """Each error timed alone: a new exception of a known site, as a tight loop would raise it."""
    logging.getLogger("glassbus").setLevel(logging.CRITICAL)
    count = run.count(1_000)
    gaps = []
    for number in range(count):
        try:
            fail()
        except ValueError as raised:
            error = raised
        managers = context()
        started = time.perf_counter()
        recovered = bus._handle_message_processing_error(f"message-{number}", error, managers)
        gaps.append((time.perf_counter() - started) * _SCALE_US)
        if recovered is not answer:
            raise Wrong(f"error {number}: {recovered}")
    status = bus.get_health_status()
    if status["status"] == "unknown" or status["error_statistics"]["total_errors"] != count:
        raise Wrong(f"{status['status']}, {status['error_statistics']['total_errors']} of {count} counted")
    return Sample(quantile(gaps, 0.5), {"p99": quantile(gaps, 0.99), "max": max(gaps)})


def _bus(run: Run, name: str) -> ProductionMessageBus:
    return ProductionMessageBus({"log_dir": str(run.folder / f"logs-{name}-{time.perf_counter_ns()}"), "name": name})


def before_start(run: Run) -> Sample:
    return _handed(run, _bus(run, "idle"), dict, answer=False)


def running(run: Run) -> Sample:
    with _bus(run, "running") as bus:
        return _handed(run, bus, dict, answer=False)


def recovered(run: Run) -> Sample:
    queue = _Queue()
    with _bus(run, "recovering") as bus:
        return _handed(run, bus, lambda: {"message_queue": queue}, answer=True)


NOT_STARTED = "not started, nobody takes it back"
RUNNING = "running, nobody takes it back"
ROWS = (
    Row(NOT_STARTED, before_start, "telemetry and the log line in the caller's thread"),
    Row(RUNNING, running, "told on the loop's thread"),
    Row("running, given back to its queue", recovered, "through its breaker"),
)
