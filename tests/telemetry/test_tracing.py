"""What a bus shows in traces: every failure, at any sampling rate, with true times and the right links."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from glassbus import KillSwitch, Message, MessageBus, PublishRejected, Retry
from glassbus.telemetry import observe
from glassbus.telemetry.governor import FloodBudget
from glassbus.testing import VirtualClock, run_virtual

QUICK = Retry(max_attempts=4, immediate=1, base_delay=1.0)


def traced(bus: MessageBus, spans: Any, **more: Any) -> Any:
    """`bus` shown to `spans` alone."""
    from prometheus_client import CollectorRegistry

    observer = observe(bus, registry=CollectorRegistry(), tracer_provider=spans.provider, wall=bus.clock.wall, **more)
    bus.observe(observer)
    return observer


def parent_id(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def ids(span: ReadableSpan) -> tuple[int, int]:
    return span.context.trace_id, span.context.span_id


def links(span: ReadableSpan) -> dict[str, tuple[int, int]]:
    return {str(link.attributes["glassbus.link"]): (link.context.trace_id, link.context.span_id) for link in span.links}


def failing(spans: Any, ratio: float, fail: int, retry: Retry = QUICK, headers: dict[str, str] | None = None) -> Any:
    """One message whose first `fail` attempts take 0.25 s and raise; the spans of it."""
    kept = spans(ratio)

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, kept)

        @bus.subscribe("orders.*", name="charge", retry=retry)
        async def charge(message: Message[Any]) -> None:
            nonlocal fail
            await asyncio.sleep(0.25)
            fail -= 1
            if fail >= 0:
                raise ValueError("card declined")

        async with bus:
            await bus.publish("orders.created", {"n": 1}, headers=headers)
            await bus.drain()
            assert bus.hub.failures == {}

    run_virtual(scenario)
    return kept


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_each_failed_attempt_has_its_spans_whatever_the_head_sampling(spans: Any, ratio: float) -> None:
    kept = failing(spans, ratio, fail=4)
    attempts = kept.named("process")
    assert [span.attributes["glassbus.attempt"] for span in attempts] == [1, 2, 3, 4]
    assert all(span.status.status_code is StatusCode.ERROR for span in attempts)
    assert all(span.attributes["error.type"] == "ValueError" for span in attempts)
    assert [parent_id(error) for error in kept.named("error")] == [span.context.span_id for span in attempts]
    assert [span.attributes["glassbus.recovery.action"] for span in kept.named("recover")] == [
        "immediate_retry",
        "delayed_retry",
        "delayed_retry",
        "dead_letter",
    ]
    settle = kept.one("settle")
    assert (settle.kind, parent_id(settle)) == (SpanKind.CLIENT, attempts[-1].context.span_id)
    failures = [s for s in kept.all() if s.name.partition(" ")[0] in ("process", "error", "recover", "settle")]
    assert all(span.attributes["glassbus.keep"] is True for span in failures)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_spans_made_after_the_fact_have_the_true_times(spans: Any, ratio: float) -> None:
    kept = failing(spans, ratio, fail=1)
    first, second = kept.named("process")
    for span in (first, second):
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(0.25, abs=1e-6)
    assert second.start_time >= first.end_time
    error = kept.one("error")
    assert error.start_time == first.end_time
    assert second.status.status_code is StatusCode.UNSET


def test_immediate_retries_stay_in_the_trace_and_delayed_ones_start_a_linked_one(spans: Any) -> None:
    kept = failing(spans, 1.0, fail=3)
    publish = kept.one("publish")
    first, second, third, fourth = kept.named("process")
    assert parent_id(first) == parent_id(second) == publish.context.span_id
    assert first.context.trace_id == second.context.trace_id == publish.context.trace_id
    assert third.parent is None
    assert fourth.parent is None
    assert len({publish.context.trace_id, third.context.trace_id, fourth.context.trace_id}) == 3
    assert links(second) == {"previous_attempt": ids(first)}
    assert links(third) == {"previous_attempt": ids(second), "publish": ids(publish)}
    assert links(fourth) == {"previous_attempt": ids(third), "publish": ids(publish)}


def test_the_trace_of_an_unsampled_message_follows_from_its_id(spans: Any) -> None:
    kept = spans(0.0)

    async def scenario(clock: VirtualClock) -> str:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, kept)

        @bus.subscribe("orders.*", name="charge", retry=Retry(max_attempts=1))
        async def charge(message: Message[Any]) -> None:
            assert message.headers == {}
            raise ValueError

        async with bus:
            receipt = await bus.publish("orders.created")
            await bus.drain()
        return receipt.message_id

    message_id = run_virtual(scenario)
    span = kept.one("process")
    assert f"{span.context.trace_id:032x}" == message_id
    assert span.parent is None


def test_a_happy_unsampled_message_leaves_no_span(spans: Any) -> None:
    kept = failing(spans, 0.0, fail=0)
    assert [span.name for span in kept.all()] == ["shutdown"]


def test_a_sampled_message_is_published_then_processed_under_that(spans: Any) -> None:
    kept = failing(spans, 1.0, fail=0)
    publish, process = kept.one("publish"), kept.one("process")
    assert (publish.kind, process.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert parent_id(process) == publish.context.span_id
    assert publish.attributes["messaging.destination.name"] == "orders.created"
    assert publish.attributes["messaging.destination.template"] == "orders.*"
    assert "glassbus.keep" not in process.attributes


def test_a_publish_continues_the_current_trace_and_one_in_a_handler_that_of_its_attempt(spans: Any) -> None:
    kept = spans(0.0)

    async def scenario(clock: VirtualClock) -> dict[str, str]:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, kept)
        seen: dict[str, str] = {}

        @bus.subscribe("first", name="first")
        async def first(message: Message[Any]) -> None:
            await bus.publish("second")

        @bus.subscribe("second", name="second", retry=Retry(max_attempts=1))
        async def second(message: Message[Any]) -> None:
            seen.update(message.headers)
            raise ValueError

        async with bus:
            await bus.publish("first", message_id="ab" * 16)
            await bus.drain()
        return seen

    headers = run_virtual(scenario)
    assert headers["traceparent"].startswith("00-" + "ab" * 16)
    assert headers["traceparent"].endswith("-00")
    failed = kept.one("process second")
    assert f"{failed.context.trace_id:032x}" == "ab" * 16
    assert f"{parent_id(failed):016x}" == headers["traceparent"].split("-")[2]


def test_a_publish_under_a_live_span_is_its_child_and_keeps_the_trace_state(spans: Any) -> None:
    kept = spans(1.0)
    tracer = kept.provider.get_tracer("program")

    async def scenario(clock: VirtualClock) -> dict[str, str]:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, kept)
        seen: dict[str, str] = {}

        @bus.subscribe("first", name="first")
        async def first(message: Message[Any]) -> None:
            seen.update(message.headers)
            trace.get_current_span().set_attribute("mine", 1)
            with tracer.start_as_current_span("inside"):
                pass

        async with bus:
            with tracer.start_as_current_span("request"):
                await bus.publish("first", headers={"traceparent": "nonsense", "tracestate": "old=1", "mine": "kept"})
            await bus.drain()
        return seen

    headers = run_virtual(scenario)
    publish, process = kept.one("publish"), kept.one("process")
    assert parent_id(publish) == kept.one("request").context.span_id
    assert headers == {
        "traceparent": f"00-{publish.context.trace_id:032x}-{publish.context.span_id:016x}-01",
        "mine": "kept",
    }
    assert process.attributes["mine"] == 1
    assert parent_id(kept.one("inside")) == process.context.span_id


def test_headers_given_by_the_caller_are_the_parent_where_nothing_is_current(spans: Any) -> None:
    given = {"traceparent": f"00-{'cd' * 16}-{'12' * 8}-01", "tracestate": "vendor=7"}
    kept = failing(spans, 0.0, fail=0, headers=given)
    publish, process = kept.one("publish"), kept.one("process")
    assert f"{publish.context.trace_id:032x}" == "cd" * 16
    assert f"{parent_id(publish):016x}" == "12" * 8
    assert process.context.trace_state.get("vendor") == "7"


@pytest.mark.parametrize(
    "bad", ["", "00", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "ff-" + "a" * 32 + "-" + "1" * 16 + "-01", "ä" * 55]
)
def test_a_malformed_traceparent_is_replaced_not_carried(spans: Any, bad: str) -> None:
    kept = failing(spans, 0.0, fail=1, headers={"traceparent": bad, "tracestate": "x=1"})
    assert len(kept.named("process")) == 2


def test_the_error_span_tells_the_exception_and_stays_within_bounds(spans: Any) -> None:
    kept = spans(0.0)

    class Hostile(Exception):
        def __str__(self) -> str:
            return "postgres://user:hunter2@db/x " + "\udcff\x00\n" + "x" * 100_000

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, kept)

        @bus.subscribe("orders", name="charge", retry=Retry(max_attempts=1))
        async def charge(message: Message[Any]) -> None:
            raise Hostile

        async with bus:
            await bus.publish("orders", {"card": "4111-1111"})
            await bus.drain()

    run_virtual(scenario)
    (event,) = kept.one("error").events
    assert event.attributes["exception.type"].endswith("Hostile")
    assert "raise Hostile" in event.attributes["exception.stacktrace"]
    for span in kept.all():
        shown = {**span.attributes, **{k: v for e in span.events for k, v in e.attributes.items()}}
        texts = {k: v for k, v in shown.items() if isinstance(v, str)}
        texts["status"] = span.status.description or ""
        for name, text in texts.items():
            assert len(text.encode()) <= (4096 if name == "exception.stacktrace" else 256), name
            assert "hunter2" not in text
            assert "4111" not in text


def test_a_redaction_hook_sees_every_error_text(spans: Any) -> None:
    kept = spans(0.0)
    text = "a " + "secret"

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, kept, redact=lambda text: text.replace("secret", "[gone]"))

        @bus.subscribe("orders", name="charge", retry=Retry(max_attempts=1))
        async def charge(message: Message[Any]) -> None:
            raise ValueError(text)

        async with bus:
            await bus.publish("orders")
            await bus.drain()

    run_virtual(scenario)
    told = "".join(f"{span.status.description} {span.attributes} {list(span.events)}" for span in kept.all())
    assert "[gone]" in told
    assert all(text not in str(dict(event.attributes)) for span in kept.all() for event in span.events)


@pytest.mark.parametrize("answer", [None, b"bytes", 5])
def test_a_redaction_hook_that_answers_no_text_costs_the_text_and_no_span(spans: Any, answer: Any) -> None:
    kept = spans(0.0)
    text = "a " + "secret"

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, kept, redact=lambda text: answer)

        @bus.subscribe("orders", name="charge", retry=Retry(max_attempts=1))
        async def charge(message: Message[Any]) -> None:
            raise ValueError(text)

        async with bus:
            await bus.publish("orders")
            await bus.drain()
            assert bus.hub.failures == {}

    run_virtual(scenario)
    assert kept.one("process").status.description == "<redaction raised TypeError>"
    assert text not in str(dict(kept.one("error").events[0].attributes))


def test_a_breaker_opens_under_the_attempt_that_tipped_it_linked_to_the_others(spans: Any) -> None:
    kept = spans(0.0)

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, kept)
        switch = KillSwitch(minimum=3, ratio=0.5, open_for=2.0, probes=1)
        broken = True

        @bus.subscribe("orders", name="charge", retry=Retry(max_attempts=9, immediate=0), kill_switch=switch)
        async def charge(message: Message[Any]) -> None:
            if broken:
                raise ConnectionError

        async with bus:
            for _ in range(3):
                await bus.publish("orders")
            await asyncio.sleep(1.0)
            broken = False
            await asyncio.sleep(60.0)
            await bus.drain()

    run_virtual(scenario)
    opening = kept.named("breaker charge closed->open")[0]
    process = {span.context.span_id: span for span in kept.named("process")}
    causes = [link for link in opening.links if link.attributes["glassbus.link"] == "cause"]
    assert parent_id(opening) in process
    assert len(causes) == 2
    assert all(link.context.span_id in process for link in causes)
    assert all(process[link.context.span_id].context.trace_id == link.context.trace_id for link in causes)
    half_open = kept.named("breaker charge open->half_open")[0]
    assert half_open.parent is None
    assert links(half_open) == {"opening": ids(opening)}


def test_a_replay_starts_a_trace_linked_to_the_publish_and_the_last_failure(spans: Any) -> None:
    kept = spans(1.0)

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, kept)
        broken = True

        @bus.subscribe("orders", name="charge", retry=QUICK)
        async def charge(message: Message[Any]) -> None:
            if broken:
                raise ValueError

        async with bus:
            await bus.publish("orders")
            await bus.drain()
            broken = False
            (dead,) = await bus.dead_letters.list()
            await bus.dead_letters.replay(dead.id)
            await bus.drain()

    run_virtual(scenario)
    *_, last, again = kept.named("process")
    replay = kept.one("replay")
    assert replay.parent is None
    assert links(replay) == {"publish": ids(kept.one("publish")), "last_failure": ids(last)}
    assert parent_id(again) == replay.context.span_id
    assert again.attributes["glassbus.attempt"] == 1
    assert again.attributes["glassbus.replays"] == 1


def test_refused_publishes_are_errors_under_what_was_current(spans: Any) -> None:
    kept = spans(0.0)

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, kept)
        async with bus:
            with pytest.raises(PublishRejected):
                await bus.publish("no spaces allowed")

    run_virtual(scenario)
    publish, error = kept.one("publish"), kept.one("error")
    assert publish.attributes["error.type"] == "invalid_topic"
    assert parent_id(error) == publish.context.span_id


def test_a_plain_handler_on_its_thread_has_the_span_current(spans: Any) -> None:
    kept = spans(1.0)
    seen: list[tuple[int, str]] = []

    async def main() -> None:
        bus = MessageBus(telemetry=False)
        traced(bus, kept)

        @bus.subscribe("orders", name="charge", concurrency=4)
        def charge(message: Message[Any]) -> None:
            seen.append((trace.get_current_span().get_span_context().span_id, threading.current_thread().name))
            if message.payload % 5 == 0 and len(seen) < 50:
                raise ValueError

        async with bus:
            for n in range(20):
                await bus.publish("orders", n)
            await bus.drain()

    asyncio.run(main())
    assert {span.context.span_id for span in kept.named("process")} == {span_id for span_id, _ in seen}
    assert all(name != threading.main_thread().name for _, name in seen)


def test_a_timed_out_attempt_is_a_failed_span_of_its_true_length(spans: Any) -> None:
    kept = spans(1.0)

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, kept)

        @bus.subscribe("orders", name="slow", timeout=2.0, retry=Retry(max_attempts=1))
        async def slow(message: Message[Any]) -> None:
            await asyncio.sleep(100)

        async with bus:
            await bus.publish("orders")
            await bus.drain()

    run_virtual(scenario)
    process = kept.one("process")
    assert process.attributes["error.type"].endswith("HandlerTimedOut")
    assert (process.end_time - process.start_time) / 1e9 == pytest.approx(2.0, abs=0.01)


def test_an_attempt_that_the_bus_stops_is_no_failure(spans: Any) -> None:
    kept = spans(1.0)

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, kept)

        @bus.subscribe("orders", name="slow")
        async def slow(message: Message[Any]) -> None:
            await asyncio.sleep(20)

        await bus.start()
        await bus.publish("orders")
        await asyncio.sleep(1)
        await bus.stop(0.5)

    run_virtual(scenario)
    process = kept.one("process")
    assert process.attributes["glassbus.given_back"] == "stopping"
    assert process.status.status_code is StatusCode.UNSET
    assert kept.named("error") == []


def test_a_flood_of_one_failure_is_summarised_and_counted() -> None:
    now = 0.0
    budget = FloodBudget(first=3, per_second=2.0, monotonic=lambda: now)
    admitted = [budget.admit("site") for _ in range(10)]
    assert admitted == [0, 0, 0, -1, -1, -1, -1, -1, -1, -1]
    now = 0.5
    assert budget.admit("site") == 7
    assert budget.admit("elsewhere") == 0


def test_without_an_sdk_nothing_is_shown_and_nothing_breaks(no_global_provider: None) -> None:
    async def scenario(clock: VirtualClock) -> dict[str, str]:
        from prometheus_client import CollectorRegistry

        bus = MessageBus(clock=clock, telemetry=False)
        bus.observe(observe(bus, registry=CollectorRegistry()))
        seen: dict[str, str] = {}

        @bus.subscribe("orders", name="charge", retry=QUICK)
        async def charge(message: Message[Any]) -> None:
            seen.update(message.headers)
            raise ValueError

        async with bus:
            await bus.publish("orders")
            await bus.drain()
            assert bus.hub.failures == {}
        return seen

    assert run_virtual(scenario) == {}


def test_a_provider_set_after_the_bus_is_used_from_then_on(no_global_provider: None, spans: Any) -> None:
    kept = spans(0.0)

    async def scenario(clock: VirtualClock) -> None:
        from prometheus_client import CollectorRegistry

        bus = MessageBus(clock=clock, telemetry=False)
        bus.observe(observe(bus, registry=CollectorRegistry()))

        @bus.subscribe("orders", name="charge", retry=Retry(max_attempts=1))
        async def charge(message: Message[Any]) -> None:
            raise ValueError(message.payload)

        async with bus:
            await bus.publish("orders", "before")
            await bus.drain()
            trace.set_tracer_provider(kept.provider)
            await bus.publish("orders", "after")
            await bus.drain()

    run_virtual(scenario)
    assert len(kept.named("process")) == 1


def test_processors_that_want_to_see_a_span_start_do(spans: Any) -> None:
    """A processor of the program's own gets `on_start` for spans made after the fact too."""
    from opentelemetry.sdk.trace import SpanProcessor

    started: list[str] = []

    class Watching(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            started.append(span.name)
            span.set_attribute("enriched", True)

    def watched(ratio: float) -> Any:
        kept = spans(ratio)
        kept.provider.add_span_processor(Watching())
        return kept

    kept = failing(watched, 0.0, fail=1)
    assert sorted(started) == sorted(span.name for span in kept.all())
    assert all(span.attributes["enriched"] for span in kept.all())


def test_an_attempt_whose_outcome_nobody_states_ends_with_the_bus(spans: Any) -> None:
    """A store that died took the outcome with it."""
    kept = spans(1.0)

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False)
        observer = traced(bus, kept)

        @bus.subscribe("orders", name="charge", retry=Retry(max_attempts=1))
        async def charge(message: Message[Any]) -> None:
            raise ValueError

        show = observer.tracing.show
        observer.tracing.show = lambda fact, failure: (
            None if type(fact).__name__ == "AttemptFailed" else show(fact, failure)
        )
        async with bus:
            await bus.publish("orders")
            await bus.drain()

    run_virtual(scenario)
    assert len(kept.named("process")) == 1


def test_a_provider_that_is_not_the_sdks_gets_spans_through_the_api() -> None:
    """Its own rules decide on ids and sampling; nothing breaks."""
    started: list[str] = []

    class ForeignSpan(trace.NonRecordingSpan):
        def __init__(self) -> None:
            super().__init__(trace.INVALID_SPAN_CONTEXT)

    class ForeignTracer(trace.NoOpTracer):
        def start_span(self, name: str, *args: Any, **kwargs: Any) -> trace.Span:
            started.append(name)
            return ForeignSpan()

    class Provider(trace.TracerProvider):
        def get_tracer(self, *args: Any, **kwargs: Any) -> trace.Tracer:
            return ForeignTracer()

    class Kept:
        provider = Provider()

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, Kept)

        @bus.subscribe("orders", name="charge", retry=Retry(max_attempts=2))
        async def charge(message: Message[Any]) -> None:
            raise ValueError

        async with bus:
            await bus.publish("orders")
            await bus.drain()
            assert bus.hub.failures == {}

    run_virtual(scenario)
    assert sorted(started) == sorted(
        ["process orders", "error orders", "recover orders"] * 2
        + ["settle orders", "escalate MessageDeadLettered", "shutdown"]
    )


def test_code_in_a_handler_may_do_to_the_current_span_all_that_a_span_allows(spans: Any) -> None:
    kept = spans(1.0)
    tracer = kept.provider.get_tracer("program")
    other = tracer.start_span("other")

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, kept)

        @bus.subscribe("orders", name="charge")
        async def charge(message: Message[Any]) -> None:
            span = trace.get_current_span()
            assert span.is_recording()
            span.set_attributes({"a": 1, "glassbus.attempt": 99})
            span.add_event("looked", {"b": 2})
            span.add_link(other.get_span_context())
            span.record_exception(KeyError("k"))
            span.set_status(trace.StatusCode.ERROR, "as I say")
            span.end()
            span.set_attribute("late", True)

        async with bus:
            await bus.publish("orders")
            await bus.drain()

    run_virtual(scenario)
    span = kept.one("process")
    assert span.attributes["a"] == 1
    assert span.attributes["glassbus.attempt"] == 1
    assert "late" not in span.attributes
    assert [event.name for event in span.events] == ["looked", "exception"]
    assert span.links[0].context.span_id == other.get_span_context().span_id
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "as I say")
    assert span.to_json()


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_span_that_was_current_when_the_bus_started_is_not_current_in_its_handlers(spans: Any, ratio: float) -> None:
    kept = spans(ratio)
    tracer = spans(1.0).provider.get_tracer("program")
    seen: list[int] = []

    async def scenario(clock: VirtualClock) -> int:
        bus = MessageBus(clock=clock, telemetry=False)
        traced(bus, kept)

        @bus.subscribe("orders", name="charge")
        async def charge(message: Message[Any]) -> None:
            seen.append(trace.get_current_span().get_span_context().trace_id)

        with tracer.start_as_current_span("main") as main:
            await bus.start()
        await bus.publish("orders")
        await bus.drain()
        await bus.stop()
        return main.get_span_context().trace_id

    assert run_virtual(scenario) not in seen
    assert len(seen) == 1
