"""What befalls the OpenTelemetry Collector: the real one, with the shipped configuration, and a backend behind it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from glassbus.drill.outside import Outside
from glassbus.drill.servers import Server, ask, find_server, free_port
from glassbus.drill.stack import Target, write_config
from glassbus.shipped import find

if TYPE_CHECKING:
    from glassbus.drill.play import Play
    from glassbus.drill.world import World

_CONFIG = "otel-collector.yaml"
_LISTENS = ("OTLP_GRPC", "OTLP_HTTP", "SPANMETRICS", "OTELCOL_HEALTH")
_NS = 1_000_000_000


class Collector:
    """A collector in `place`, which sends to `backend` (host:port). `environment` is of its configuration."""

    def __init__(self, place: Path, name: str, backend: str, environment: Mapping[str, str]) -> None:
        ports = {
            variable: f"127.0.0.1:{free_port()}"
            for variable in (
                "GLASSBUS_OTLP_GRPC",
                "GLASSBUS_OTLP_HTTP",
                "GLASSBUS_SPANMETRICS",
                "GLASSBUS_OTELCOL_HEALTH",
            )
        }
        metrics = free_port()
        self.url = f"http://{ports['GLASSBUS_OTLP_HTTP']}/v1/traces"
        self.target = Target("collector", f"127.0.0.1:{metrics}", name)
        self.server = Server(
            [find_server("otelcol"), "--config", str(find(_CONFIG))],
            f"http://{ports['GLASSBUS_OTELCOL_HEALTH']}/",
            place,
            name=name,
            environment={
                **ports,
                "GLASSBUS_JAEGER_OTLP": backend,
                "GLASSBUS_OTELCOL_METRICS_HOST": "127.0.0.1",
                "GLASSBUS_OTELCOL_METRICS_PORT": str(metrics),
                "GLASSBUS_OTELCOL_QUEUE_DIR": str(place / f"{name}-queue"),
                **environment,
            },
        )
        self._numbers = itertools.count(1)

    def send(self, traces: int, *, spans: int = 1, kept: bool = False, padding: str = "") -> None:
        """Some traces of `spans` spans each. Raises OSError where the collector refuses them."""
        now = time.time_ns()
        attributes = [{"key": "padding", "value": {"stringValue": padding}}] if padding else []
        if kept:
            attributes.append({"key": "glassbus.keep", "value": {"boolValue": True}})
        made: list[dict[str, Any]] = []
        for _ in range(traces):
            trace = f"{os.getpid() & 0xFFFF:04x}{next(self._numbers):028x}"
            made += [
                {
                    "traceId": trace,
                    "spanId": f"{number + 1:016x}",
                    "name": "drill",
                    "kind": 1,
                    "startTimeUnixNano": str(now - _NS // 1000),
                    "endTimeUnixNano": str(now),
                    "attributes": attributes,
                }
                for number in range(spans)
            ]
        service = {"attributes": [{"key": "service.name", "value": {"stringValue": "drill"}}]}
        body = {"resourceSpans": [{"resource": service, "scopeSpans": [{"spans": made}]}]}
        ask(self.url, json.dumps(body).encode(), timeout=30.0)


def _backend(place: Path) -> tuple[Server, str]:
    """What takes the traces in Jaeger's place, and its address."""
    grpc, health = (f"127.0.0.1:{free_port()}" for _ in range(2))
    config = place / "backend.yml"
    write_config(
        config,
        {
            "receivers": {"otlp": {"protocols": {"grpc": {"endpoint": grpc}}}},
            "exporters": {"debug": {"verbosity": "basic"}},
            "extensions": {"health_check": {"endpoint": health}},
            "service": {
                "extensions": ["health_check"],
                "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["debug"]}},
                "telemetry": {"metrics": {"level": "none"}, "logs": {"level": "warn"}},
            },
        },
    )
    return Server([find_server("otelcol"), "--config", str(config)], f"http://{health}/", place, name="backend"), grpc


class Collecting(Outside):
    """A collector with a little traffic. Plays of one `collector` share it."""

    collector_name = "collector"
    environment: Mapping[str, str] = MappingProxyType({})

    def __init__(self, world: World, play: Play) -> None:
        super().__init__(world, play)
        name = self.collector_name

        def make() -> tuple[Collector, Server]:
            server, address = _backend(folder)
            collector = Collector(folder, name, address, self.environment)
            world.servers += [server, collector.server]
            world.targets.append(collector.target)
            return collector, server

        folder = world.place / name
        folder.mkdir(exist_ok=True)
        self.collector, self.backend = world.shared(name, make)
        self._sending: asyncio.Task[None] | None = None

    def keep_sending(self, send: Callable[[], None], every_s: float) -> None:
        """Send again and again, until `stop_sending`."""

        async def repeat() -> None:
            while True:
                with contextlib.suppress(OSError):  # being refused is what the drill is about
                    await asyncio.to_thread(send)
                await asyncio.sleep(every_s)

        self._sending = asyncio.create_task(repeat())

    async def stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait({self._sending})
            self._sending = None


class BackendGone(Collecting):
    """What the collector sends to is gone, and it gives up after ten seconds; healed, it is there again."""

    collector_name = "collector-small"
    environment = MappingProxyType({"GLASSBUS_RETRY_MAX": "10s", "GLASSBUS_NUM_TRACES": "100"})

    async def strike(self) -> None:
        self.backend.kill()
        self.keep_sending(lambda: self.collector.send(1, kept=True), 0.3)

    async def heal(self) -> None:
        await self.stop_sending()
        await self.backend.started()


class TooManyTraces(Collecting):
    """More traces come within the decision's wait than the collector keeps: 60 a second for 10 s, with room for 100."""

    collector_name = BackendGone.collector_name
    environment = BackendGone.environment

    async def strike(self) -> None:
        self.keep_sending(lambda: self.collector.send(30), 0.5)

    async def heal(self) -> None:
        await self.stop_sending()


class QueueFills(Collecting):
    """What the collector sends to is gone while tens of thousands of failure spans come: they wait on its disk."""

    collector_name = "collector-large"
    environment = MappingProxyType({"GLASSBUS_DECISION_WAIT": "1s", "GLASSBUS_OTELCOL_LIMIT_MIB": "1024"})

    async def strike(self) -> None:
        self.backend.kill()
        for _ in range(9):
            # Each is kept by both of the samplers, so each takes two places of 100,000.
            await asyncio.to_thread(self.collector.send, 500, spans=10, kept=True)

    async def heal(self) -> None:
        await self.backend.started()


class OutOfMemory(Collecting):
    """Spans of 100 KB each come until the collector has no memory for more of them, and go on coming."""

    collector_name = "collector-tight"
    environment = MappingProxyType({"GLASSBUS_OTELCOL_LIMIT_MIB": "200"})

    async def strike(self) -> None:
        padding = "x" * 100_000
        self.keep_sending(lambda: self.collector.send(50, padding=padding), 0.2)

    async def heal(self) -> None:
        await self.stop_sending()
