"""Whoever watches, and whatever they do, the same becomes of every message, and the same is stated about it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from kit import House, play

from glassbus import ErrorSeverity, Retry
from glassbus.facts import Delivery
from glassbus.faults import CorruptPayload, Hang, MemoryPressure, Raise, Refuse, inject
from glassbus.observer import Observer
from glassbus.recovery.escalation import Escalation

RETRY = Retry(max_attempts=4, immediate=1, base_delay=0.5)


Day = tuple[tuple[Any, ...], list[tuple[Any, ...]]]


async def a_bad_day(house: House) -> Day:
    """What became of 125 deliveries, of which many go wrong in several ways: ledger, dead letters; and the story."""
    house.subscribe("one", "work.*", retry=RETRY, timeout=2.0, concurrency=4)
    house.subscribe("two", ">", retry=RETRY, timeout=2.0, concurrency=2)

    @house.bus.subscribe("work.b", name="plain", retry=RETRY)
    def keep(message: dict[str, int]) -> None:
        house.runs.append(message["n"])

    await house.bus.start()
    faults = [
        inject(house.bus, Refuse(), "handler:one", probability=0.3, seed=1),
        inject(house.bus, Hang(), "handler:one", probability=0.1, seed=2),
        inject(house.bus, MemoryPressure(), "handler:two", probability=0.05, seed=3),
        inject(house.bus, Raise(ValueError), "handler:plain", probability=0.4, seed=4),
        inject(house.bus, CorruptPayload(), "codec:decode", probability=0.05, seed=5),
        inject(house.bus, Refuse(), "transport:settle", probability=0.05, seed=6),
    ]
    with contextlib.ExitStack() as stack:
        for fault in faults:
            stack.enter_context(fault)
        for number in range(50):
            await house.bus.publish(f"work.{'ab'[number % 2]}", {"n": number}, message_id=f"m-{number}")
            await asyncio.sleep(0.1)
        await house.bus.drain(300)
    await asyncio.sleep(60)
    assert all(fault.hits for fault in faults)
    story = [told(house, fact) for fact in house.seen.facts if type(fact).__name__ not in _OF_WATCHERS]
    letters = [
        (letter.message.id, letter.subscription, letter.attempts, letter.report.category, letter.report.message)
        for letter in await house.bus.dead_letters.list(1000)
    ]
    return (house.bus.ledger().total, *letters), story


_OF_WATCHERS = {"ObserverFailed", "EscalationNotified"}


def told(house: House, fact: Any) -> tuple[Any, ...]:
    """A fact as plain values, without what is measured in real time."""
    delivery = getattr(fact, "delivery", None)
    who = () if delivery is None else (delivery.envelope.id, delivery.subscription, delivery.attempt)
    plain = {
        name: getattr(fact, name)
        for name in fact.__struct_fields__
        if name not in ("delivery", "envelope", "report", "causes")
    }
    return type(fact).__name__, who, plain


# The hostile


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise SystemExit("not even this")

    __repr__ = __str__


class Raises(Observer):
    error: BaseException | type[BaseException] = OSError

    def on_fact(self, fact: Any) -> None:
        raise self.error


class RaisesUnspeakable(Raises):
    error = Unspeakable


class Exits(Raises):
    error = SystemExit


class Interrupts(Raises):
    error = KeyboardInterrupt


class Cancels(Raises):
    error = asyncio.CancelledError


class Recurses(Observer):
    def on_fact(self, fact: Any) -> None:
        self.on_fact(fact)


class Dawdles(Observer):
    """An observer may not block; one that does costs real time, and nothing else."""

    def on_fact(self, fact: Any) -> None:
        time.sleep(0.0002)


class ScopeRaises(Observer):
    def on_fact(self, fact: Any) -> None:
        """Hears nothing."""

    def scope(self, work: Delivery) -> Any:
        raise OSError("no scope")


class EnterRaises(ScopeRaises):
    def scope(self, work: Delivery) -> Any:
        @contextlib.contextmanager
        def scope() -> Iterator[None]:
            raise MemoryError
            yield

        return scope()


class ExitRaises(ScopeRaises):
    def scope(self, work: Delivery) -> Any:
        @contextlib.contextmanager
        def scope() -> Iterator[None]:
            try:
                yield
            finally:
                raise KeyError("over")

        return scope()


class Swallows(ScopeRaises):
    """Says of every failure that it was none."""

    def scope(self, work: Delivery) -> Any:
        return contextlib.suppress(BaseException)


class Nonsense(ScopeRaises):
    def scope(self, work: Delivery) -> Any:
        return 7


class Rewrites(Observer):
    """Changes whatever of a fact can be changed."""

    def on_fact(self, fact: Any) -> None:
        for name in fact.__struct_fields__:
            with contextlib.suppress(AttributeError, TypeError):
                setattr(fact, name, None)
        report = getattr(fact, "report", None)
        if report is not None:
            report.message = "all is well"
            report.category = report.severity = "low"
            report.context.clear()


class Injects(Observer):
    """A propagator that takes away every header, and writes those that it may not."""

    def on_fact(self, fact: Any) -> None:
        """Hears nothing."""

    def inject(self, headers: dict[str, Any]) -> None:
        headers.clear()
        headers["glassbus-attempt"] = 99


HOSTILE: list[type[Observer]] = [
    Raises,
    RaisesUnspeakable,
    Exits,
    Interrupts,
    Cancels,
    Recurses,
    Dawdles,
    ScopeRaises,
    EnterRaises,
    ExitRaises,
    Swallows,
    Nonsense,
    Rewrites,
    Injects,
]


@pytest.fixture(scope="module")
def undisturbed() -> Day:
    return play(a_bad_day)


def test_the_day_is_bad_enough(undisturbed: Day) -> None:
    (total, *letters), story = undisturbed
    names = {name for name, _, _ in story}
    assert {"AttemptFailed", "RetryScheduled", "RecoveryEnded", "DeliveryDeadLettered", "LoadShed"} <= names
    assert total.handled > 80
    assert len(letters) == total.dead_lettered > 3


def test_it_goes_the_same_way_each_time(undisturbed: Day) -> None:
    assert play(a_bad_day) == undisturbed


@pytest.mark.parametrize("kind", HOSTILE, ids=lambda kind: kind.__name__)
def test_no_observer_changes_what_happens_or_what_is_stated(kind: type[Observer], undisturbed: Day) -> None:
    outcome, story = play(a_bad_day, observers=[kind()])
    assert outcome == undisturbed[0]
    assert len(story) == len(undisturbed[1])
    for mine, theirs in zip(story, undisturbed[1], strict=True):
        assert mine == theirs


def test_nor_do_all_of_them_together(undisturbed: Day) -> None:
    assert play(a_bad_day, observers=[kind() for kind in HOSTILE]) == undisturbed


# Channels of escalations


class Calls:
    """A channel; what it is told it does not care about."""

    name, at_least, batch, refresh_s = "mine", ErrorSeverity.LOW, 5, 0.0

    def send(self, notices: Any) -> Any:
        """Takes it."""


class CallRaises(Calls):
    def send(self, notices: Any) -> Any:
        raise OSError("no answer")


class CallExits(Calls):
    def send(self, notices: Any) -> Any:
        raise SystemExit


class CallUnspeakable(Calls):
    def send(self, notices: Any) -> Any:
        raise Unspeakable


class CallHangs(Calls):
    over = threading.Event()

    def send(self, notices: Any) -> Any:
        self.over.wait()


class CallRewrites(Calls):
    """Changes whatever of what it is told can be changed, and answers nonsense."""

    def send(self, notices: Any) -> Any:
        for notice in notices:
            for part in (notice, notice.escalation):
                for name in part.__struct_fields__:
                    with contextlib.suppress(AttributeError, TypeError):
                        setattr(part, name, None)
        notices.clear()
        return NotImplemented


CHANNELS = [CallRaises, CallExits, CallUnspeakable, CallHangs, CallRewrites]


@pytest.mark.parametrize("kind", CHANNELS, ids=lambda kind: kind.__name__)
def test_no_channel_changes_what_happens_or_what_is_stated(kind: type[Calls], undisturbed: Day) -> None:
    """But for whom it told, and whether that worked."""
    kind_over = getattr(kind, "over", threading.Event())
    try:
        assert play(a_bad_day, escalation=Escalation(channels=(kind(),))) == undisturbed
    finally:
        kind_over.set()


# Rules of classification


def rule_raises(error: BaseException) -> Any:
    raise OSError("no rule")


def rule_exits(error: BaseException) -> Any:
    raise SystemExit


def rule_lies(error: BaseException) -> Any:
    return "everything", "is fine"


RULES = [rule_raises, rule_exits, rule_lies]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_that_does_not_work_is_passed_over(rule: Any, undisturbed: Day) -> None:
    assert play(a_bad_day, rules=[rule]) == undisturbed
