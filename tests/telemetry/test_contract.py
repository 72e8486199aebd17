"""The telemetry contract under every fault that we can inject: all that leaves is declared, and all comes to rest."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from glassbus import AdaptiveTimeout, KillSwitch, Message, MessageBus, Priority, PublishError, Retry
from glassbus.facts import Fact
from glassbus.faults.drill import Drill
from glassbus.faults.scenarios import SCENARIOS, Scenario
from glassbus.observer import ALL_FACTS, Observer
from glassbus.telemetry.catalogue import BY_NAME, PREFIX, PROJECTIONS, SPANS
from glassbus.testing import VirtualClock, run_virtual

DECLARED = {span.name.partition(" ")[0]: span for span in SPANS}
#: Gauges that have no resting value.
RESTLESS = {"disk_free_bytes", "error_memory_bytes", "last_round_trip_age_seconds", "telemetry_queue_spans"}
#: Longer than any window or quiet time after which something counts as over, in seconds.
LONG_S = 1500.0
PLAYED = [one for one in SCENARIOS.values() if not one.crash]


class Seen(Observer):
    interests = ALL_FACTS

    def __init__(self) -> None:
        self.kinds: set[type[Fact]] = set()

    def on_fact(self, fact: Fact, /) -> None:
        self.kinds.add(type(fact))


def gauges(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for metric in registry.collect()
        for one in metric.samples
        if metric.type == "gauge" and metric.name.removeprefix(PREFIX) not in RESTLESS
    }


def unborn(name: str, labels: tuple[tuple[str, str], ...]) -> float:
    """What a gauge rests at whose series came later: a recovery's breaker is there from its first use on."""
    return float(name == f"{PREFIX}breaker_state" and ("state", "closed") in labels)


async def traffic(bus: MessageBus, clock: VirtualClock) -> None:
    """A message every 50 ms, each under its own id until the store has taken it."""
    for number in itertools.count():
        for _ in range(3):
            with contextlib.suppress(PublishError):
                await bus.publish(
                    "orders.created", {"n": number}, message_id=f"m{number}", priority=Priority(number % 4)
                )
                break
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("scenario", PLAYED, ids=lambda scenario: scenario.name)
def test_all_that_leaves_is_declared_and_every_gauge_comes_to_rest(
    scenario: Scenario, spans: Any, tmp_path: Path
) -> None:
    kept, registry, seen = spans(0.5), CollectorRegistry(), Seen()

    async def play(clock: VirtualClock) -> None:
        bus = MessageBus(
            f"sqlite:///{tmp_path / 'shop.db'}" if scenario.target == "disk" else "memory://",
            clock=clock,
            seed=1,
            registry=registry,
            tracer_provider=kept.provider,
            durability="process",
            publish_timeout=0.2,
            observers=[seen],
        )

        @bus.subscribe(
            "orders.*",
            name="charge",
            timeout=1.0,
            concurrency=4,
            capacity=scenario.capacity,
            retry=Retry(max_attempts=5),
            kill_switch=KillSwitch(window=10.0, minimum=10, open_for=2.0),
            adaptive_timeout=AdaptiveTimeout(),
        )
        async def charge(message: Message[Any]) -> None:
            await asyncio.sleep(0.01)

        async with bus:
            rest = gauges(registry)
            busy = asyncio.create_task(traffic(bus, clock))
            played = await Drill(bus, scenario, handler="charge", hold_s=20.0, within_s=60.0, seed=1).run()
            assert played.passed, played
            await asyncio.sleep(30.0)
            busy.cancel()
            await asyncio.sleep(60.0)
            await bus.drain()
            dead = await bus.dead_letters.list(limit=10_000)
            if dead:
                await bus.dead_letters.discard(*(one.id for one in dead))
            await asyncio.sleep(LONG_S)
            after = gauges(registry)
            assert {name: value for name, value in after.items() if value != rest.get(name, unborn(*name))} == {}
            check_metrics(registry)

    run_virtual(play)
    check_spans(kept.all())
    for kind in seen.kinds:
        assert kind in PROJECTIONS


def check_metrics(registry: CollectorRegistry) -> None:
    for metric in registry.collect():
        declared = BY_NAME[metric.name.removeprefix(PREFIX) + ("_total" if metric.type == "counter" else "")]
        assert metric.type == declared.type
        for one in metric.samples:
            assert set(one.labels) - {"le"} == {"bus", *declared.labels}
            for label, values in declared.labels.items():
                assert not values or one.labels[label] in ("", *values), (one.name, label, one.labels[label])


def check_spans(found: Any) -> None:
    assert found
    for span in found:
        contract = DECLARED[span.name.partition(" ")[0]]
        assert span.kind.name == contract.kind
        assert set(span.attributes) <= set(contract.attributes), span.name
        assert {link.attributes["glassbus.link"] for link in span.links} <= set(contract.links), span.name
        assert {event.name for event in span.events} <= set(contract.events), span.name
