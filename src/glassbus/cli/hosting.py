"""What the commands that run a bus share: signals, logging, /metrics and traces."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.handlers
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from glassbus.config import redact
from glassbus.errors import ConfigurationError

if TYPE_CHECKING:
    from glassbus.bus import MessageBus
    from glassbus.server import Desk, Server
    from glassbus.telemetry.setup import Telemetry

_TRACES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_LOG_BYTES_MAX = 10 * 1024 * 1024
_EXPORT_MAX_S = 3.0
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextlib.contextmanager
def stop_signals(told: Callable[[str], None]) -> Iterator[None]:
    """Call `told` with the signal's name for each SIGINT and SIGTERM, on the running loop."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, told, "Ctrl-C" if number == signal.SIGINT else "SIGTERM")
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """All logging of the process goes to a file of bounded size, so that none of it tears the screen."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES_MAX, backupCount=1, delay=True)
    handler.setFormatter(logging.Formatter(_FORMAT))
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
        handler.close()


class Traces:
    """Where traces went, if anywhere, and how many spans arrived."""

    def __init__(self, endpoint: str, telemetry: Telemetry | None) -> None:
        self._endpoint = endpoint
        self._telemetry = telemetry

    @property
    def told(self) -> str:
        """For people; empty when nothing is exported."""
        if self._telemetry is None:
            return ""
        queues = self._telemetry.queues
        lost = sum(sum(queue.dropped.values()) for queue in queues)
        sent = f"{sum(queue.exported for queue in queues):,} spans sent to {redact(self._endpoint)}"
        return f"{sent}; {lost:,} could not be sent" if lost else sent


@contextlib.contextmanager
def exported_traces(service_name: str) -> Iterator[Traces]:
    """Set the OpenTelemetry SDK up when the environment names an endpoint.

    Spans that wait are sent, within 3 seconds, before this ends. Raises ConfigurationError.
    """
    endpoint = next((os.environ[name] for name in _TRACES if os.environ.get(name)), "")
    if not endpoint:
        yield Traces("", None)
        return
    from glassbus.telemetry import configure

    telemetry = configure(service_name=service_name)
    try:
        yield Traces(endpoint, telemetry)
    finally:
        telemetry.shutdown(_EXPORT_MAX_S)


def serve_somewhere(bus: MessageBus, address: str | None, desk: Desk | None = None) -> tuple[Server, str]:
    """Serve /metrics, /healthz and /readyz of `bus`; the server, and a note when it is not at the usual place.

    `address` is host:port, or "" for the usual one; then, or with GLASSBUS_HTTP set, failing to listen is an
    error (ConfigurationError). With None, when the usual port is in use a free one is taken. `desk` answers
    further pages.
    """
    from glassbus.server import DEFAULT_ADDRESS, serve

    try:
        return serve(bus, address or None, desk=desk), ""
    except ConfigurationError:
        if address is not None or os.environ.get("GLASSBUS_HTTP"):
            raise
    host = DEFAULT_ADDRESS.rpartition(":")[0]
    server = serve(bus, f"{host}:0", desk=desk)
    return server, f"{DEFAULT_ADDRESS} is in use: metrics are at {server.url}/metrics"
