"""The trace ids that a story names are those of exported spans: at any sampling, of strangers, replayed, restarted."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from glassbus import Delivery, KillSwitch, Message, MessageBus, Priority, Retry
from glassbus.cli import main
from glassbus.record.reading import JournalReader
from glassbus.record.telling import told_by
from glassbus.story import Story, tell
from glassbus.telemetry import configure
from tests.telemetry.test_tracing import ids, links

THEIRS = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
OFF = KillSwitch(enabled=False)


def make_bus(kept: Any, url: str, untrusted: Sequence[str]) -> MessageBus:
    return MessageBus(url, registry=CollectorRegistry(), tracer_provider=kept.provider, untrusted=untrusted)


CHARGE = Retry(3, 1, base_delay=0.01, budget_per_second=1e3)


def subscribe(bus: MessageBus, heals: bool, retry: Retry = CHARGE) -> None:
    """`charge` fails until it `heals`, then its second attempt succeeds; `late` waits a while after its first."""

    @bus.subscribe("orders.*", name="charge", retry=retry, kill_switch=OFF)
    async def charge(message: Message[Any], delivery: Delivery) -> None:
        if not heals or delivery.attempt == 1:
            raise ValueError("card declined")

    @bus.subscribe("orders.*", name="late", retry=Retry(3, 0, base_delay=0.5, budget_per_second=1e3), kill_switch=OFF)
    async def late(message: Message[Any], delivery: Delivery) -> None:
        if delivery.attempt == 1:
            raise ConnectionError("no answer")


async def live_through(kept: Any, url: str, untrusted: Sequence[str], retry: Retry = CHARGE) -> None:
    """Dead in a first bus; replayed by another, which knows nothing of strangers; handled by a third."""
    first = make_bus(kept, url, untrusted)
    subscribe(first, False, retry)
    async with first:
        for number in range(12):
            await first.publish(
                "orders.created", number, message_id=f"m-{number}", headers=THEIRS if number == 0 else None
            )
        await until_dead(first, 12)
    operators = make_bus(kept, url, ())
    async with operators:
        dead = await operators.dead_letters.list()
        assert await operators.dead_letters.replay(*(letter.id for letter in dead)) == 12
    last = make_bus(kept, url, untrusted)
    subscribe(last, True, retry)
    async with last:
        await last.drain(30.0)


async def until_dead(bus: MessageBus, many: int) -> None:
    async with asyncio.timeout(30.0):
        while len(await bus.dead_letters.list()) < many:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("untrusted", [(), ("orders.>",)], ids=["trusted", "untrusted"])
@pytest.mark.parametrize("ratio", [0.0, 0.01, 1.0])
def test_a_story_names_the_traces_that_were_exported(
    spans: Any, tmp_path: Path, ratio: float, untrusted: tuple[str, ...]
) -> None:
    kept = spans(ratio)
    asyncio.run(live_through(kept, f"sqlite:///{tmp_path / 'orders.db'}", untrusted))
    exported = exported_of(kept)
    reader = JournalReader(tmp_path / "orders.db.state")
    for number in range(12):
        name = f"m-{number}"
        story = tell(name, told_by(reader, name), None, 2e9)
        assert story is not None
        check(story, exported[name])
        assert story.published.sampled == (
            not untrusted and (ratio == 1.0 or number == 0 or has_publish(exported[name]))
        )


def exported_of(kept: Any) -> dict[str, list[ReadableSpan]]:
    """The exported spans of each message, by its id; errors have none, and are in the trace of their attempt."""
    found: dict[str, list[ReadableSpan]] = defaultdict(list)
    for span in kept.all():
        found[str(span.attributes.get("messaging.message.id", ""))].append(span)
    return found


def has_publish(exported: Sequence[ReadableSpan]) -> bool:
    return any(span.name.startswith("publish") for span in exported)


def check(story: Story, exported: Sequence[ReadableSpan]) -> None:
    by_id = {f"{span.context.span_id:016x}": span for span in exported}
    attempts, replays = set(), 0
    for delivery in story.deliveries:
        for step in delivery.steps:
            if step.kind in ("attempt", "retry", "dead_lettered", "replayed"):
                span = by_id[step.span_id]
                assert step.trace_id == f"{span.context.trace_id:032x}"
                replays += step.kind == "replayed"
                if step.kind == "attempt":
                    assert span.attributes["messaging.consumer.group.name"] == delivery.subscription
                    assert span.attributes["glassbus.attempt"] == step.attempt
                    attempts.add(step.span_id)
    # Nothing is missing either: each attempt that was exported is told, and each trace holds what it says.
    happy = {f"{s.context.span_id:016x}" for s in exported if s.name.startswith("process") and s.status.is_unset}
    assert {f"{s.context.span_id:016x}" for s in exported if s.name.startswith("process")} == attempts | happy
    assert replays == 1
    ours = [span for span in exported if not span.name.startswith("publish")]
    assert {trace.trace_id for trace in story.traces} == {f"{span.context.trace_id:032x}" for span in ours}
    held = {trace.trace_id: trace.holds for trace in story.traces}
    origin = held[story.published.trace_id]
    assert ("publish" in origin) == story.published.sampled
    assert {"charge attempt 1", "charge attempt 2", "late attempt 1"} <= set(origin)
    linked = {trace.linked_to for trace in story.traces} - {""}
    assert linked <= set(held)


@pytest.mark.parametrize("untrusted", [(), ("orders.>",)], ids=["trusted", "untrusted"])
@pytest.mark.parametrize(
    "retry",
    [Retry(2, 1, budget_per_second=1e3), CHARGE, Retry(2, 1, budget=0.0, budget_per_second=5.0)],
    ids=["at once", "delayed", "postponed"],
)
def test_whoever_replays_it_links_to_the_failure_that_it_died_of(
    spans: Any, tmp_path: Path, untrusted: tuple[str, ...], retry: Retry
) -> None:
    """An operator's bus knows neither which topics strangers write to nor what a spent budget delayed."""
    kept = spans(0.0)
    asyncio.run(live_through(kept, f"sqlite:///{tmp_path / 'orders.db'}", untrusted, retry))
    replays = kept.named("replay orders")
    assert len(replays) == 12
    for span in replays:
        failed = links(span)["last_failure"]
        (died,) = [one for one in kept.named("process") if ids(one) == failed]
        assert died.attributes["messaging.message.id"] == span.attributes["messaging.message.id"]
        assert (died.attributes["glassbus.attempt"], died.status.is_ok) == (retry.max_attempts, False)


def test_without_anybody_who_records_traces_none_is_named(tmp_path: Path) -> None:
    async def run() -> Story:
        bus = MessageBus(f"sqlite:///{tmp_path / 'orders.db'}", telemetry=False)

        @bus.subscribe("orders.*", name="charge", retry=Retry(1))
        async def charge(message: Message[Any]) -> None:
            raise ValueError

        async with bus:
            await bus.publish("orders.created", 1, message_id="m-1")
            await bus.drain(60.0)
            assert "trace_id" not in (await bus.dead_letters.list())[0].report.context
            return await bus.explain("m-1")

    story = asyncio.run(run())
    assert story.traces == ()
    assert {step.trace_id for step in story.deliveries[0].steps} == {""}


def test_a_dead_letter_that_no_handler_failed_has_no_failure_to_link_to(spans: Any, tmp_path: Path) -> None:
    """Its queue was full: whatever was linked to would not exist."""
    kept = spans(0.0)

    async def run() -> Story:
        bus = make_bus(kept, f"sqlite:///{tmp_path / 'orders.db'}", ())

        @bus.subscribe("orders.*", name="charge", capacity=1, concurrency=1)
        async def charge(message: Message[Any]) -> None:
            await asyncio.sleep(0)

        async with bus:
            await bus.pause("charge")
            for number, priority in enumerate((Priority.LOW, Priority.CRITICAL)):
                await bus.publish("orders.created", message_id=f"m-{number}", priority=priority)
            (letter,) = await bus.dead_letters.list()
            await bus.resume("charge")
            await bus.drain(60.0)
            await bus.dead_letters.replay(letter.id)
            await bus.drain(60.0)
            return await bus.explain("m-0")

    story = asyncio.run(run())
    assert set(links(kept.one("replay"))) == set()
    exported = {f"{span.context.trace_id:032x}" for span in exported_of(kept)["m-0"]}
    assert {trace.trace_id for trace in story.traces} == exported
    assert [step.kind for step in story.deliveries[0].steps if step.kind in ("dead_lettered", "replayed")] == [
        "dead_lettered",
        "replayed",
    ]


def test_a_replay_by_the_command_has_its_span_where_the_others_are(
    spans: Any, tmp_path: Path, no_global_provider: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what follows it would be below a span that is nowhere."""
    kept, operators, url = spans(0.0), InMemorySpanExporter(), f"sqlite:///{tmp_path / 'orders.db'}"

    async def run(heals: bool) -> None:
        bus = make_bus(kept, url, ())
        subscribe(bus, heals)
        async with bus:
            if not heals:
                await bus.publish("orders.created", message_id="m-1")
            await bus.drain(30.0)

    asyncio.run(run(heals=False))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    to_operators = partial(configure, exporter=operators, failure_exporter=operators)
    monkeypatch.setattr("glassbus.telemetry.configure", to_operators)
    assert main(["dlq", "replay", "1", "--yes", "--url", url]) == 0
    asyncio.run(run(heals=True))
    (replay,) = [span for span in operators.get_finished_spans() if span.name.startswith("replay")]
    followed = [span for span in kept.named("process") if span.parent and span.parent.span_id == ids(replay)[1]]
    assert [span.attributes["glassbus.attempt"] for span in followed] == [1, 2]
    story = tell("m-1", told_by(JournalReader(tmp_path / "orders.db.state"), "m-1"), None, 2e9)
    assert story is not None
    (told,) = [step for delivery in story.deliveries for step in delivery.steps if step.kind == "replayed"]
    assert (told.trace_id, told.span_id) == (f"{ids(replay)[0]:032x}", f"{ids(replay)[1]:016x}")
    assert next(trace for trace in story.traces if trace.trace_id == told.trace_id).holds[0] == "charge replay 1"
