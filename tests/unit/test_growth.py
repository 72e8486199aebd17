"""A full queue that grows, as a recovery: begun, concluded once, and left out while its breaker says so."""

from __future__ import annotations

from typing import Literal

import pytest

from glassbus.errors import ErrorCategory
from glassbus.facts import OverflowHandled, RecoveryConcluded, RecoveryStarted
from glassbus.observer import Hub
from glassbus.policy.breaker import BreakerState
from glassbus.recovery.guard import ComponentBreakers
from glassbus.recovery.queue import Growth
from glassbus.testing import FakeClock, RecordingObserver
from glassbus.transport import Hold, QueueState, SubscriptionSpec, let_grow

Action = Literal["dead_letter", "expand", "contract", "refuse"]


class Rig:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.seen = RecordingObserver()
        self.breakers = ComponentBreakers(Hub(self.clock.wall, [self.seen]), self.clock, open_for_s=60.0)
        self.allowed: list[bool] = []
        self.growth = Growth(self.breakers, self.allowed.append)
        self.asked = 0

    def saw(self, action: Action, name: str = "s") -> None:
        self.growth.saw(OverflowHandled(at=self.clock.wall(), subscription=name, action=action, capacity=6))

    def look(self, **expanded_until: float) -> None:
        def queues() -> dict[str, QueueState]:
            self.asked += 1
            return {
                name: QueueState(SubscriptionSpec(name, ">", 4), Hold(), 1, expanded_until=until)
                for name, until in expanded_until.items()
            }

        self.breakers.look()
        self.growth.look(queues)

    def told(self) -> list[str]:
        return [
            f"{fact.target} {'started' if isinstance(fact, RecoveryStarted) else fact.outcome}"
            for fact in self.seen.facts
            if isinstance(fact, RecoveryStarted | RecoveryConcluded)
        ]

    def open(self) -> None:
        for _ in range(5):
            self.saw("expand")
            self.saw("refuse")
            self.saw("contract")


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_growth_is_concluded_once(rig: Rig) -> None:
    rig.saw("expand")
    rig.saw("dead_letter")
    assert rig.told() == ["s started"]
    rig.saw("refuse")
    rig.saw("refuse")
    rig.saw("contract")
    assert rig.told() == ["s started", "s failed"]
    rig.saw("expand")
    rig.saw("contract")
    assert rig.told()[2:] == ["s started", "s succeeded"]


def test_a_refusal_of_a_queue_that_did_not_grow_says_nothing_of_growing(rig: Rig) -> None:
    for _ in range(10):
        rig.saw("refuse")
    assert rig.told() == []
    assert rig.allowed == []


def test_what_another_process_took_back_is_concluded(rig: Rig) -> None:
    rig.saw("expand", "a")
    rig.saw("expand", "b")
    rig.saw("expand", "gone")
    rig.look(a=0.0, b=9.0)
    assert rig.told()[3:] == ["a succeeded", "gone succeeded"]
    rig.look(a=0.0, b=0.0)
    assert rig.told()[5:] == ["b succeeded"]
    rig.look(a=0.0, b=0.0)
    assert rig.asked == 2, "the store is read only while something has grown"


def test_one_that_grew_again_before_it_was_seen_to_shrink_is_two_recoveries(rig: Rig) -> None:
    """Another process took it back, and this one saw neither."""
    rig.saw("expand")
    rig.saw("expand")
    assert rig.told() == ["s started", "s succeeded", "s started"]


def test_after_five_failures_nothing_grows_until_one_may_try(rig: Rig) -> None:
    rig.open()
    assert rig.allowed == [False]
    rig.clock.advance(30)
    rig.look()
    assert rig.allowed == [False]
    rig.clock.advance(31)
    rig.look()
    assert rig.allowed == [False, True]
    rig.saw("expand", "a")
    assert rig.allowed == [False, True, False], "the others wait for how it goes"
    rig.saw("contract", "a")
    assert rig.allowed == [False, True, False, True]
    assert rig.breakers.state("queue", ErrorCategory.QUEUE_OVERFLOW) is BreakerState.CLOSED


def test_a_try_that_fails_leaves_it_out_again(rig: Rig) -> None:
    rig.open()
    rig.clock.advance(61)
    rig.look()
    rig.saw("expand", "a")
    rig.saw("refuse", "a")
    rig.look()
    assert rig.allowed == [False, True, False]
    assert rig.breakers.state("queue", ErrorCategory.QUEUE_OVERFLOW) is BreakerState.OPEN


def test_a_transport_without_the_rung_is_left_alone() -> None:
    class Plain:
        pass

    plain = Plain()
    let_grow(plain, False)
    assert vars(plain) == {}
