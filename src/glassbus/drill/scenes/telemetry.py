"""Telemetry that nobody takes, that costs too much, or that is not whole. Much of it is of a whole process, so most of
these scenes have one to themselves."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from glassbus import telemetry
from glassbus.bus import MessageBus
from glassbus.drill.scenes.base import Scene, given
from glassbus.drill.scenes.handlers import NEVER, ONCE
from glassbus.facts import AttemptFailed, Fact, FactType
from glassbus.faults.kinds import Raise, TelemetryDown
from glassbus.faults.taps import tap
from glassbus.message import Message
from glassbus.observer import Observer
from glassbus.record.journal import JournalSettings
from glassbus.telemetry.governor import LABEL_VALUES_MAX

#: Beyond the first 65,536 characters of Unicode.
_CLEF = "\N{MUSICAL SYMBOL G CLEF}"
_BODY_BYTES_MAX = 64 * 1024 * 1024


class Collector:
    """Takes OTLP over HTTP and throws it away, or refuses it: with `refuses`, for good (400)."""

    def __init__(self) -> None:
        self.refuses = False
        collector = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10.0

            def do_POST(self) -> None:
                self.rfile.read(min(int(self.headers.get("Content-Length", "0")), _BODY_BYTES_MAX))
                self.send_response(400 if collector.refuses else 200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """It has nothing to say."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()


class Exported(Scene):
    """Traces go to a collector, all of them. `failing`: so many messages of a hundred fail."""

    failing = 50
    queue_spans = 4096
    subscription = given(retry=ONCE, kill_switch=NEVER)

    def __init__(self, name: str, place: Path) -> None:
        self.collector = Collector()
        self._numbers = itertools.count()
        os.environ.update(
            OTEL_EXPORTER_OTLP_ENDPOINT=self.collector.url,
            OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
            OTEL_TRACES_SAMPLER="always_on",
            OTEL_BSP_SCHEDULE_DELAY="500",
        )
        self.telemetry = telemetry.configure(service_name=name, failure_queue_spans=self.queue_spans)
        super().__init__(name, place)

    async def handle(self, message: Message[Any]) -> None:
        if next(self._numbers) % 100 < self.failing:
            raise ValueError("this order cannot be read (injected)")

    async def strike(self) -> None:
        self.collector.refuses = True

    async def heal(self) -> None:
        self.collector.refuses = False


class CollectorRefuses(Exported):
    """The collector refuses every batch of spans."""


class CollectorRefusesHappy(Exported):
    """The collector refuses every batch of spans, and no message fails."""

    failing = 0


class CollectorHangs(Exported):
    """The collector takes spans and never answers, so that they queue up."""

    queue_spans = 40
    failing = 100
    fault = TelemetryDown("hang")
    target = "telemetry"

    async def strike(self) -> None:
        await Scene.strike(self)

    async def heal(self) -> None:
        await Scene.heal(self)


class Flood(Exported):
    """A handler fails for every one of thousands of messages, all of them alike, and then for hundreds a second."""

    rate = 1.0
    failing = 0
    first, each = 5500, 300
    subscription = given(retry=ONCE, kill_switch=NEVER, concurrency=50)

    async def strike(self) -> None:
        self.failing = 100
        for _ in range(self.first // 500):
            await self.publish_many(500)
        self._flood = self.keep_doing(lambda: self.publish_many(self.each), 1.0)

    async def heal(self) -> None:
        self._flood.cancel()
        self.failing = 0


class Costly(Exported):
    """The exporter of spans takes 30 ms of processor for each batch."""

    failing = 0

    async def strike(self) -> None:
        def slow(export: Callable[..., Any]) -> Callable[..., Any]:
            def burning(*spans: Any) -> Any:
                until = time.thread_time() + 0.03
                while time.thread_time() < until:
                    sum(range(1000))
                return export(*spans)

            return burning

        spans = self.telemetry.spans
        assert spans is not None
        self._undo = tap(spans._exporter, "export", slow)

    async def heal(self) -> None:
        self._undo()


class Dropping(Scene):
    """The journal keeps one failure a second of those that are alike, and folds the rest together."""

    durable = True
    bus_options = given(journal=JournalSettings(flood_per_s=1))
    subscription = given(retry=ONCE, kill_switch=NEVER)
    fault = Raise(ValueError, "this order cannot be read (injected)")


class ManyErrors(Scene):
    """The journal is told to keep a million entries in memory, and thousands of messages fail, each with much to say.

    Healed, the program is started anew, with the journal that it has by default.
    """

    rate = 2.0
    count = 5000
    bus_options = given(journal=JournalSettings(entries=1_000_000))
    subscription = given(retry=ONCE, kill_switch=NEVER, concurrency=50)
    _failing = False

    async def handle(self, message: Message[Any]) -> None:
        if self._failing:
            # As long as a message may be, in characters that take four bytes each.
            raise ValueError(f"{message.id} cannot be read (injected): {_CLEF * 950}")

    async def strike(self) -> None:
        self._failing = True
        for _ in range(self.count // 100):
            await self.publish_many(100)
            await self.bus.drain()
        self._failing = False

    async def heal(self) -> None:
        before, self.bus_options = self.bus, given()
        await before.stop(1.0)
        self.bus = self.make_bus()
        self.subscribe(self.bus)
        await self.bus.start()


class VeryManyErrors(ManyErrors):
    count = 13_000


class ManyTopics(Scene):
    """The program makes more subscriptions than a label may have values; healed, it makes one again."""

    rate = 1.0

    async def strike(self) -> None:
        for number in range(LABEL_VALUES_MAX + 10):
            topic = f"orders.of.customer{number}"
            self.bus.subscribe(topic, name=f"customer{number}")(self.handle)
            await self.bus.publish(topic, {"order_id": number})

    async def heal(self) -> None:
        before = self.bus
        await before.stop(1.0)
        self.bus = self.make_bus()
        self.subscribe(self.bus)
        await self.bus.start()


class Auditor(Observer):
    """An observer of the program's own."""

    interests: frozenset[FactType] = frozenset({AttemptFailed})

    def on_fact(self, fact: Fact, /) -> None:
        """Sees it."""


class ObserverRaises(Scene):
    """An observer of the program's own raises at all that it is shown."""

    fault = Raise(RuntimeError, "out of order (injected)")
    target = "observer:Auditor"
    subscription = given(kill_switch=NEVER, retry=ONCE)

    def make_bus(self) -> MessageBus:
        return MessageBus(name=self.name, observers=[Auditor()])

    async def handle(self, message: Message[Any]) -> None:
        raise ValueError("this order cannot be read (injected)")


class Unreadable(Scene):
    """A breaker of the program's own, which is shown with the bus's, cannot be read."""

    async def strike(self) -> None:
        def broken() -> Any:
            raise RuntimeError("out of order (injected)")

        self._before: Callable[[], Any] = self.bus.further_breakers
        self.bus.further_breakers = broken

    async def heal(self) -> None:
        self.bus.further_breakers = self._before
