"""A provider that keeps its spans, and a bus made of constants."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from glassbus.policy.ledger import Account, Ledger
from glassbus.policy.retry import Retry
from glassbus.record.tally import Buckets, PublishTally, Tally
from glassbus.transport import Hold, QueueState, SubscriptionSpec


class Spans:
    """The spans that a provider of ours exported, in the order they ended."""

    def __init__(self, ratio: float) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            resource=Resource({"service.name": "test"}),
            shutdown_on_exit=False,
        )
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def all(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    def named(self, prefix: str) -> list[ReadableSpan]:
        return [span for span in self.all() if span.name.startswith(prefix)]

    def one(self, prefix: str) -> ReadableSpan:
        (span,) = self.named(prefix)
        return span


@pytest.fixture
def spans() -> Callable[[float], Spans]:
    return Spans


@dataclass
class FakeSubscriber:
    name: str = "charge"
    state: str = "running"
    in_flight: int = 0
    limit: int = 8
    overdue: int = 0
    timeout_s: float = 30.0
    retry: Retry = field(default_factory=Retry)
    handling: Mapping[str, Buckets] = field(default_factory=dict)


@dataclass
class FakeBreaker:
    name: str = "charge"
    kind: str = "subscription"
    subscription: str = "charge"
    state: str = "closed"
    succeeded_count: int = 0
    failed_count: int = 0
    refused: int = 0


@dataclass
class FakeCheck:
    name: str
    status: str
    detail: str


@dataclass
class FakeHealth:
    status: str = "healthy"
    ready: bool = True
    checks: tuple[FakeCheck, ...] = ()


@dataclass
class FakeConnection:
    endpoint: str = "nats://one:4222"
    up: bool = True
    round_trip_age_s: float | None = 0.5
    spooled: int = 0


class FakeSource:
    """A bus with one subscription, `charge` on `orders.*`, that has done nothing yet."""

    transport = "memory"
    running = True
    untrusted: tuple[str, ...] = ()

    def __init__(self, name: str = "default", address: str = "memory://") -> None:
        self.name = name
        self.address = address
        self.tally = Tally("charge", "orders.*")
        self.published = PublishTally("orders.*")
        self.subscriber = FakeSubscriber()
        self.breaker = FakeBreaker()
        self.account = Account()
        self.state = FakeHealth()
        self.loop_age = 0.0
        self.round_trip_age: float | None = None
        self.disk: int | None = None
        self.failures: dict[str, int] = {}
        self.store_down = False
        self.endpoints: list[FakeConnection] = []

    def tallies(self) -> list[Tally]:
        return [self.tally]

    def publish_tallies(self) -> list[PublishTally]:
        return [self.published]

    def subscribers(self) -> list[FakeSubscriber]:
        return [self.subscriber]

    def breaker_views(self) -> list[FakeBreaker]:
        return [self.breaker]

    def queues(self) -> dict[str, QueueState]:
        spec = SubscriptionSpec("charge", "orders.*", 100)
        return {"charge": QueueState(spec=spec, hold=Hold(), consumers=1)}

    def ledger(self) -> Ledger:
        if self.store_down:
            raise OSError("disk gone")
        return Ledger({"charge": self.account})

    def health(self) -> FakeHealth:
        return self.state

    def observer_failures(self) -> dict[str, int]:
        return self.failures

    def round_trip_age_s(self) -> float | None:
        return self.round_trip_age

    def disk_free_bytes(self) -> int | None:
        return self.disk

    def journal_dropped(self) -> int:
        return 0

    def connections(self) -> list[FakeConnection]:
        return self.endpoints

    def escalation_channels(self) -> list[str]:
        return ["log", "pager"]

    def escalations_open(self) -> dict[str, int]:
        return {"critical": 2}

    def error_memory_bytes(self) -> int:
        return 12_345

    def loop_age_s(self) -> float:
        return self.loop_age


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
def make_source() -> Callable[..., FakeSource]:
    return FakeSource


@pytest.fixture
def no_global_provider() -> Iterator[None]:
    """The process as it is before anybody set a provider; the OpenTelemetry API has no way back of its own."""
    from opentelemetry import trace
    from opentelemetry.util._once import Once

    from glassbus.telemetry import setup

    names = ("_TRACER_PROVIDER", "_TRACER_PROVIDER_SET_ONCE")
    before: dict[str, Any] = {name: getattr(trace, name) for name in names}
    ours, setup._ours = setup._ours, None
    active, setup._active = setup._active, None
    trace._TRACER_PROVIDER, trace._TRACER_PROVIDER_SET_ONCE = None, Once()
    try:
        yield
    finally:
        if setup._active is not None:
            setup._active.shutdown(1.0)
        # An exporter that was given up goes on for a while; its use of `random` would disturb Hypothesis.
        for thread in threading.enumerate():
            if thread.name.startswith("glassbus-spans-"):
                thread.join(10.0)
        setup._ours, setup._active = ours, active
        for name, value in before.items():
            setattr(trace, name, value)
