"""RecordingObserver and expect_facts: what they record, and what their failures say."""

from __future__ import annotations

import threading

import pytest

from glassbus.facts import BusStarted, BusStopped, SubscriptionPaused, SubscriptionResumed
from glassbus.observer import Hub
from glassbus.testing import RecordingObserver, expect_facts

STARTED = BusStarted(at=1.0, bus="b", transport="memory://")
STOPPED = BusStopped(at=2.0, bus="b", given_back=0, discarded=0, within_deadline=True)
PAUSED = SubscriptionPaused(at=1.5, subscription="s")


def test_it_records_in_order_and_by_type() -> None:
    recorder = RecordingObserver()
    hub = Hub(lambda: 0.0, [recorder])
    for fact in (STARTED, PAUSED, STOPPED):
        hub.state(fact)
    assert recorder.facts == (STARTED, PAUSED, STOPPED)
    assert recorder.of(SubscriptionPaused) == [PAUSED]
    assert recorder.names() == ["BusStarted", "SubscriptionPaused", "BusStopped"]
    recorder.clear()
    assert recorder.facts == ()


def test_it_loses_none_from_many_threads() -> None:
    recorder = RecordingObserver()
    threads = [threading.Thread(target=lambda: [recorder.on_fact(PAUSED) for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorder.facts) == 4000


def test_expected_facts_pass_and_are_yielded() -> None:
    recorder = RecordingObserver()
    recorder.on_fact(STARTED)  # before the block: does not count
    with expect_facts(recorder, SubscriptionPaused) as seen:
        recorder.on_fact(PAUSED)
        recorder.on_fact(STOPPED)
    assert seen.names() == ["SubscriptionPaused", "BusStopped"]


def test_a_missing_fact_fails_and_lists_what_was_stated() -> None:
    hub = Hub(lambda: 0.0)
    with (
        pytest.raises(AssertionError, match=r"(?s)not stated: SubscriptionResumed.*SubscriptionPaused"),
        expect_facts(hub, SubscriptionPaused, SubscriptionResumed),
    ):
        hub.state(PAUSED)
    assert hub.observers == ()


def test_a_type_named_twice_must_be_stated_twice() -> None:
    recorder = RecordingObserver()
    with (
        pytest.raises(AssertionError, match="not stated: SubscriptionPaused"),
        expect_facts(recorder, SubscriptionPaused, SubscriptionPaused),
    ):
        recorder.on_fact(PAUSED)


def test_exactly_allows_nothing_else_and_fixes_the_order() -> None:
    recorder = RecordingObserver()
    with expect_facts(recorder, BusStarted, BusStopped, exactly=True):
        recorder.on_fact(STARTED)
        recorder.on_fact(STOPPED)
    with (
        pytest.raises(AssertionError, match=r"(?s)exactly BusStarted, BusStopped;.*BusStopped\n  BusStarted"),
        expect_facts(recorder, BusStarted, BusStopped, exactly=True),
    ):
        recorder.on_fact(STOPPED)
        recorder.on_fact(STARTED)
    with pytest.raises(AssertionError, match="exactly nothing"), expect_facts(recorder, exactly=True):
        recorder.on_fact(STARTED)


def test_what_the_block_raises_goes_through() -> None:
    hub = Hub(lambda: 0.0)
    with pytest.raises(KeyError), expect_facts(hub, BusStarted):
        raise KeyError("from the block")
    assert hub.observers == ()
