"""Whatever strangers put into topics, ids, keys and errors: telemetry takes a bounded room, and says what it folded."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import threading
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from prometheus_client import CollectorRegistry

from glassbus import JournalSettings, KillSwitch, Message, MessageBus, PublishRejected, Retry
from glassbus.observer import Hub
from glassbus.telemetry import configure, exposition
from glassbus.telemetry.governor import LABEL_VALUES_MAX, OTHER, FloodBudget, LabelCap
from glassbus.telemetry.metrics import collector_of
from glassbus.telemetry.observing import TelemetryObserver
from glassbus.testing import VirtualClock, run_virtual
from glassbus.transport.queue import Queue

#: How many messages of strangers. The million that is promised takes minutes: GLASSBUS_STRANGERS=1000000.
MESSAGES = int(os.environ.get("GLASSBUS_STRANGERS", "2000"))
BYTES_MAX = 1024 * 1024
#: Of the length that a stranger would use.
PAD = "x" * 200

#: What is the rest of the program's, wherever it is reached from.
_SHARED = (
    type, ModuleType, FunctionType, BuiltinFunctionType, CodeType, FrameType, threading.Thread,
    MessageBus, VirtualClock, Queue, Hub,
)  # fmt: skip


class Nothing(SpanExporter):
    """Looks at every span, as an exporter does, and keeps none."""

    def export(self, spans: Any) -> SpanExportResult:
        assert all(span.name and span.attributes is not None for span in spans)
        return SpanExportResult.SUCCESS


@pytest.fixture(params=["0", "0.05"])
def telemetry(
    request: pytest.FixtureRequest, no_global_provider: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", request.param)
    logging.getLogger("glassbus").setLevel(logging.CRITICAL)
    with configure(exporter=Nothing()) as made:
        yield made
    logging.getLogger("glassbus").setLevel(logging.NOTSET)


def size_of(*roots: Any) -> int:
    """Bytes of everything that can be reached from `roots`, but for what is shared with the rest of the program."""
    seen: set[int] = set()
    found = list(roots)
    size = 0
    while found:
        one = found.pop()
        if id(one) not in seen and not isinstance(one, _SHARED):
            seen.add(id(one))
            size += sys.getsizeof(one)
            found.extend(gc.get_referents(one))
            if isinstance(one, dict):
                found.extend(one)  # keys that are strings are not told by the collector
    return size


async def settle(bus: MessageBus, telemetry: Any) -> None:
    await bus.drain()
    while dead := await bus.dead_letters.list(limit=1000):
        await bus.dead_letters.discard(*(one.id for one in dead))
    telemetry.flush(10.0)


@pytest.mark.parametrize("failing", [False, True], ids=["handled", "failing"])
def test_topics_ids_and_keys_of_strangers_take_less_than_a_megabyte(telemetry: Any, failing: bool) -> None:
    """In telemetry, and in what the core remembers of topics: the same after a few as after a million."""
    registry = CollectorRegistry()
    sizes: list[int] = []

    async def scenario(clock: VirtualClock) -> int:
        bus = MessageBus(clock=clock, registry=registry, journal=JournalSettings(entries=10))

        @bus.subscribe(
            "in.>",
            name="charge",
            retry=Retry(max_attempts=3, budget_per_second=1e6),
            kill_switch=KillSwitch(enabled=False),
        )
        async def charge(message: Message[Any]) -> None:
            if failing:
                raise ValueError(message.topic)

        async def publish(first: int, count: int) -> None:
            for number in range(first, first + count):
                name = f"{PAD}{number}"
                await bus.publish(f"in.{name}", message_id=f"{number:0120}", key=name)
                with contextlib.suppress(PublishRejected):
                    await bus.publish(f"nobody.{name}" if number % 2 else f"in. {name}")
                if number % 200 == 0:
                    sizes.append(taken())
                    await settle(bus, telemetry)
            await settle(bus, telemetry)
            exposition(registry)

        def taken() -> int:
            (observer,) = [one for one in bus.hub.observers if isinstance(one, TelemetryObserver)]
            core = (bus._publisher._topics, bus._publisher.tallies, bus._transport._routes)
            return size_of(observer, collector_of(registry), telemetry, *core)

        async with bus:
            await publish(0, 10)
            sizes.append(taken())
            await publish(1000, MESSAGES)
            return max(sizes) - sizes[0]

    assert run_virtual(scenario) < BYTES_MAX
    text = exposition(registry)[1].decode()
    assert PAD not in text
    assert 'destination="in.>"' in text


def test_a_label_beyond_its_cap_is_other_and_counted() -> None:
    cap = LabelCap()
    for number in range(LABEL_VALUES_MAX):
        assert cap.bound(f"v{number}") == f"v{number}"
    assert [cap.bound(f"w{number}") for number in range(1000)] == [OTHER] * 1000
    assert cap.overflowed == 1000
    assert cap.bound("v7") == "v7"
    assert size_of(cap) < 100_000


def test_a_flood_budget_keeps_a_bounded_number_of_sites() -> None:
    budget = FloodBudget()
    for number in range(20_000):
        budget.admit(f"{PAD}{number}")
    assert size_of(budget) < BYTES_MAX
