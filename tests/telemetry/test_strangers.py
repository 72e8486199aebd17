"""Messages from outside a trust boundary: their traces are linked to, never continued, and sample nothing here."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from prometheus_client import CollectorRegistry

from glassbus import ConfigurationError, InvalidPattern, KillSwitch, Message, MessageBus, Retry
from glassbus.facts import Delivery
from glassbus.message import Envelope
from glassbus.telemetry.propagation import Lineage, trace_id_of
from glassbus.testing import VirtualClock, run_virtual
from tests.telemetry.test_tracing import ids, links, parent_id

THEIRS = (int("ab" * 16, 16), int("cd" * 8, 16))
HEADERS = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "tracestate": "them=1", "baggage": "user=mallory"}
RETRY = Retry(max_attempts=3, immediate=1, base_delay=1.0)


def handled(
    kept: Any,
    *,
    topic: str = "partner.orders",
    untrusted: tuple[str, ...] = ("partner.>",),
    fail: int = 0,
    stored_by_a_stranger: bool = False,
    replay: bool = False,
) -> list[dict[str, str]]:
    """One message with a stranger's trace context whose first `fail` attempts fail; what headers the next hop saw."""
    onward: list[dict[str, str]] = []

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, registry=CollectorRegistry(), tracer_provider=kept.provider, untrusted=untrusted)

        @bus.subscribe("partner.>", name="charge", retry=RETRY, kill_switch=KillSwitch(enabled=False))
        async def charge(message: Message[Any]) -> None:
            nonlocal fail
            await bus.publish("audit", 1)
            fail -= 1
            if fail >= 0:
                raise ValueError

        @bus.subscribe("audit", name="audit")
        async def audit(message: Message[Any]) -> None:
            onward.append(dict(message.headers))

        async with bus:
            if stored_by_a_stranger:  # past our publisher: another program wrote it into the store
                await bus._transport.publish([Envelope("m-1", topic, b"1", "json", dict(HEADERS))], 0.0)
            else:
                await bus.publish(topic, 1, headers=HEADERS, message_id="m-1")
            await bus.drain()
            if replay:
                (dead,) = await bus.dead_letters.list()
                await bus.dead_letters.replay(dead.id)
                await bus.drain()
            assert bus.hub.failures == {}

    run_virtual(scenario)
    return onward


def traces(kept: Any) -> set[int]:
    return {span.context.trace_id for span in kept.all()}


@pytest.mark.parametrize("stored_by_a_stranger", [False, True])
def test_a_strangers_trace_is_linked_to_by_each_attempt_and_never_continued(
    spans: Any, stored_by_a_stranger: bool
) -> None:
    kept = spans(0.0)
    onward = handled(kept, fail=3, stored_by_a_stranger=stored_by_a_stranger, replay=True)
    attempts = kept.named("process partner")
    assert len(attempts) == 4
    assert all(links(span)["stranger"] == THEIRS for span in [*attempts, *kept.named("replay")])
    assert attempts[0].parent is None
    assert THEIRS[0] not in traces(kept)
    # Later attempts are found from the ones before them, as ever.
    assert links(attempts[1])["previous_attempt"] == ids(attempts[0])
    # The next hop is in our trace, and hears nothing of theirs.
    assert f"{attempts[0].context.trace_id:032x}" in onward[0]["traceparent"]
    assert set(onward[0]) == {"traceparent"}


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_sampler_decides_here_whatever_flag_a_stranger_sets(spans: Any, ratio: float) -> None:
    kept = spans(ratio)
    handled(kept)
    assert len(kept.named("process partner")) == len(kept.named("publish partner")) == ratio
    assert THEIRS[0] not in traces(kept)
    for span in kept.named("publish partner"):
        assert span.parent is None
        assert links(span) == {"stranger": THEIRS}


def test_by_default_headers_that_are_given_are_the_parent(spans: Any) -> None:
    kept = spans(1.0)
    handled(kept, untrusted=())
    assert (kept.one("publish partner").context.trace_id, parent_id(kept.one("publish partner"))) == THEIRS
    assert kept.one("process partner").links == ()


def test_nobody_can_choose_the_trace_that_an_untrusted_message_is_in() -> None:
    """Elsewhere a message's id may be its trace; a stranger would take that of a trace it wants to be in."""
    victim = "ab" * 16
    delivery = Delivery(Envelope(victim, "partner.orders", b"", "", {}), "charge", "partner.>", attempt=1)
    assert Lineage(lambda _: 1).published(delivery).trace_id == trace_id_of(victim) == int(victim, 16)
    assert Lineage(lambda _: 1, lambda _topic: True).published(delivery).trace_id != int(victim, 16)


@pytest.mark.parametrize(
    ("untrusted", "error"),
    [("partner.>", ConfigurationError), (5, ConfigurationError), (["bad..topic"], InvalidPattern)],
)
def test_untrusted_topics_are_checked(untrusted: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        MessageBus(untrusted=untrusted)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_baggage_is_neither_sent_nor_taken_up(spans: Any, ratio: float) -> None:
    """It is whatever anybody put into it, sent to everybody: a program that wants it carries it as a header."""
    kept, seen = spans(ratio), []

    async def main() -> None:
        bus = MessageBus(registry=CollectorRegistry(), tracer_provider=kept.provider)

        @bus.subscribe("orders", name="charge")
        async def charge(message: Message[Any]) -> None:
            seen.append((message.headers.get("baggage"), baggage.get_all()))

        async with bus:
            token = context.attach(baggage.set_baggage("user", "alice"))
            with trace.use_span(trace.NonRecordingSpan(trace.INVALID_SPAN_CONTEXT)):
                await bus.publish("orders")
            await bus.publish("orders")
            context.detach(token)
            await bus.publish("orders", headers={"baggage": "user=bob"})
            await bus.drain()

    asyncio.run(main())
    assert seen == [(None, {}), (None, {}), ("user=bob", {})]
