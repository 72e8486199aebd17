"""The short ways that most messages take do what the general ones do.

The same workload is run twice, each in virtual time: once as it comes, and once on a transport that can do nothing at
once, with observers that ask for every fact and every scope. What handlers saw, when, and in which order, what the
ledger says, and what was counted must be the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassbus import Delivery, Message, MessageBus, Priority, PublishRejected, Retry
from glassbus.facts import Fact, current_delivery
from glassbus.message import Envelope, check_headers
from glassbus.observer import Observer
from glassbus.publisher import _only_traceparent
from glassbus.record.tally import DURATION_BOUNDS, Buckets
from glassbus.testing import VirtualClock, run_virtual
from glassbus.transport import Stored, factory
from glassbus.transport.memory import MemoryTransport

MARK: ContextVar[str] = ContextVar("mark", default="")


class Slow(MemoryTransport):
    """Does nothing at once."""

    def publish_now(self, envelope: Envelope, /) -> Stored | None:
        return None

    def claim_now(self, name: str, /) -> Delivery | None:
        queue = self._queue(name)
        if not queue.pending or queue.held:
            return None
        alone = len(queue.normal) == queue.pending  # then it is nobody else's turn
        return self._claim_in_turn(queue, (Priority.NORMAL,) if alone else queue.turn.order())

    def handled_now(self, delivery: Delivery, /) -> bool:
        return False


class Nosy(Observer):
    """Asks for every fact and every scope."""

    def on_fact(self, fact: Fact, /) -> None:
        """That it is built is what matters."""

    @contextmanager
    def scope(self, work: Delivery, /) -> Iterator[None]:
        yield


ACTS = ("returns", "answers", "yields", "sleeps", "fails once", "fails", "stops iteration", "publishes", "too long")

publishes = st.fixed_dictionaries(
    {
        "topic": st.sampled_from(["a.b", "a.c", "nobody"]),
        "payload": st.sampled_from(ACTS),
        "headers": st.sampled_from([None, {"h": "1"}]),
        "priority": st.sampled_from([Priority.NORMAL, Priority.NORMAL, Priority.NORMAL, Priority.HIGH]),
        "key": st.sampled_from([None, None, "k"]),
        "message_id": st.sampled_from([None, None, None, "same"]),
        "expires_in": st.sampled_from([None, None, 0.5]),
        "delay": st.sampled_from([0.0, 0.0, 0.3]),
    }
)


async def work(clock: VirtualClock, sent: Sequence[dict[str, Any]], concurrency: int, bus: MessageBus) -> Any:
    """What the handlers saw and what the bus says of it, after `sent` in bursts of three."""
    seen: list[Any] = []
    retry = Retry(max_attempts=3, immediate=1, base_delay=0.1)

    async def handler(message: Message[str]) -> Any:
        delivery = current_delivery.get()
        assert delivery is not None
        seen.append((clock.monotonic(), message.topic, message.payload, message.headers, delivery.attempt, MARK.get()))
        MARK.set(message.payload)
        if message.payload == "yields":
            await asyncio.sleep(0)
        elif message.payload == "sleeps":
            await asyncio.sleep(0.05)
        elif message.payload == "too long":
            await asyncio.sleep(5)
        elif message.payload == "fails" or (message.payload == "fails once" and delivery.attempt == 1):
            raise ValueError(message.payload)
        elif message.payload == "stops iteration":
            raise StopIteration
        elif message.payload == "publishes" and message.topic == "a.b":
            await bus.publish("a.c", "returns")
        assert MARK.get() == message.payload
        return message.payload if message.payload == "answers" else None

    bus.subscribe("a.*", name="s", retry=retry, concurrency=concurrency, timeout=1.0, capacity=8)(handler)
    bus.subscribe("a.b", name="t", retry=retry)(handler)
    receipts: list[Any] = []
    async with bus:
        for start in range(0, len(sent), 3):
            for one in sent[start : start + 3]:
                try:
                    receipt = await bus.publish(**one)
                except PublishRejected as error:
                    receipts.append(type(error).__name__)
                else:
                    receipts.append((receipt.level, receipt.subscriptions, receipt.duplicate))
            await asyncio.sleep(0.01)
        await bus.drain()
        await asyncio.sleep(1.0)
        await bus.drain()
        tallies = [
            (t.subscription, t.destination, t.handled, t.late, t.duration.counts, t.late_duration.counts, t.age.counts)
            for t in bus.tallies()
        ]
        published = [(t.destination, t.accepted, t.duration.count) for t in bus.publish_tallies()]
        ledger = bus.ledger()
        assert ledger.unaccounted == 0
        dead = [(r.message.topic, r.subscription, r.attempts, r.report.message) for r in await bus.dead_letters.list()]
        workers = [(w.handled, w.settled_count, w.recovered, w.dead_lettered, w.expired) for w in bus.subscribers()]
    return seen, receipts, sorted(tallies), sorted(published), ledger.accounts, dead, workers


def outcome(sent: Sequence[dict[str, Any]], concurrency: int, *, short: bool) -> Any:
    async def scenario(clock: VirtualClock) -> Any:
        bus = MessageBus(telemetry=False, seed=1, publish_timeout=0.2, observers=() if short else (Nosy(),))
        return await work(clock, sent, concurrency, bus)

    with pytest.MonkeyPatch.context() as patched:
        if not short:
            patched.setattr(factory, "MemoryTransport", Slow)
        return run_virtual(scenario)


@settings(max_examples=40, deadline=None)
@given(st.lists(publishes, min_size=1, max_size=20), st.integers(1, 3))
def test_the_short_ways_do_what_the_general_ones_do(sent: list[dict[str, Any]], concurrency: int) -> None:
    one, other = outcome(sent, concurrency, short=True), outcome(sent, concurrency, short=False)
    for mine, theirs in zip(one, other, strict=True):
        assert mine == theirs


@given(
    st.lists(st.one_of(st.sampled_from(DURATION_BOUNDS), st.floats(allow_nan=False, allow_infinity=False))),
    st.sampled_from([DURATION_BOUNDS, (0.5,), ()]),
)
def test_a_histogram_counts_each_value_up_to_its_bound(values: list[float], bounds: tuple[float, ...]) -> None:
    buckets = Buckets(bounds)
    for value in values:
        buckets.observe(value)
    assert [sum(buckets.counts[: at + 1]) for at in range(len(bounds))] == [
        sum(value <= bound for value in values) for bound in bounds
    ]
    assert buckets.count == len(values)


def test_an_observer_that_scopes_nothing_plain_is_asked_about_the_rest() -> None:
    """Headers, a retry and a replay are something to go by."""
    asked: list[Any] = []

    class NotPlain(Nosy):
        scopes_plain = False

        @contextmanager
        def scope(self, work: Delivery, /) -> Iterator[None]:
            asked.append((work.envelope.topic, work.attempt, work.replays))
            yield

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(telemetry=False, observers=[NotPlain()])

        @bus.subscribe("a.*", name="s", retry=Retry(max_attempts=2, immediate=1))
        async def handler(message: Message[Any]) -> None:
            if message.topic == "a.fails":
                raise ValueError

        async with bus:
            await bus.publish("a.plain")
            await bus.publish("a.headed", headers={"h": "1"})
            await bus.publish("a.fails")
            await bus.drain()
            (dead,) = await bus.dead_letters.list()
            await bus.dead_letters.replay(dead.id)
            await bus.drain()

    run_virtual(scenario)
    assert asked == [("a.headed", 1, 0), ("a.fails", 2, 0), ("a.fails", 1, 1), ("a.fails", 2, 1)]


@given(
    st.one_of(
        st.just("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        st.text(min_size=55, max_size=55),
        st.text("0123456789abcdef-\x00\x7f\x85 ", min_size=54, max_size=56),
    )
)
def test_a_trace_context_that_is_let_through_is_one_that_the_rules_let_through(value: str) -> None:
    let_through = _only_traceparent({"traceparent": value})
    if let_through is not None:
        assert let_through == check_headers({"traceparent": value})


@pytest.mark.parametrize("headers", [{}, {"traceparent": 1}, {"other": "x" * 55}, {"traceparent": "x" * 55, "b": "c"}])
def test_all_other_headers_are_left_to_the_rules(headers: dict[str, Any]) -> None:
    assert _only_traceparent(headers) is None
