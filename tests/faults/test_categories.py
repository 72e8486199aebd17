"""Each of the eight categories: a fault that passes is recovered from with nothing lost, one that stays is settled and
reported; and exactly these facts are stated, at these virtual seconds."""

from __future__ import annotations

import asyncio
import textwrap
from typing import Any

import pytest
from kit import House, play

from glassbus import ErrorCategory, KillSwitch, Priority, QueueFull, Retry
from glassbus.codec import JSON, RAW
from glassbus.faults import Always, First, Raise, Schedule, inject
from glassbus.faults.scenarios import SCENARIOS

#: Three attempts, without delays, so that nothing is left to chance.
RETRY = Retry(max_attempts=3, immediate=1, base_delay=0.0)
PASSES, STAYS = First(2), Always()


def exactly(house: House, since: float, told: str) -> None:
    assert house.story(since) == textwrap.dedent(told).strip().splitlines()


def told_to_people(house: House, since: float, *notices: str) -> None:
    """Who was told, and of nothing else: each escalation opened once, and the log told of it at once."""
    at = [notice.partition(" ")[0] for notice in notices]
    what = [notice.partition(" ")[2] for notice in notices]
    expected = []
    for when, escalation in zip(at, what, strict=True):
        expected += [
            f"{when} EscalationOpened {escalation}",
            f"{when} EscalationNotified {escalation.partition(' ')[0]} log opened sent",
        ]
    assert house.escalations(since) == expected


async def struck(house: House, name: str, schedule: Schedule, *, messages: int = 1, **options: Any) -> float:
    """Publish under the scenario's fault, which heals after ten seconds; when it began, in wall seconds."""
    house.subscribe(timeout=1.0, retry=RETRY, **options)
    await house.bus.start()
    began = house.clock.wall()
    async with SCENARIOS[name].on(house.bus, "work", probability=1.0, schedule=schedule, limit=None):
        for number in range(messages):
            await house.bus.publish("work.a", f"message {number}")
        await asyncio.sleep(10.0)
    await house.bus.drain(60)
    return began


async def settled_reported_and_not_lost(house: House, category: ErrorCategory, exception: str) -> None:
    """Every message rests as a dead letter that says why, the journal has it, and replayed they all go through."""
    total = house.total()
    assert (total.dead_lettered, total.pending, total.in_flight) == (total.accepted, 0, 0)
    letters = await house.bus.dead_letters.list()
    told = {(letter.report.category, letter.report.exception_type.rpartition(".")[2]) for letter in letters}
    assert told == {(category, exception)}
    assert {report.category for report in house.bus.journal.reports()} == {category}
    assert house.bus.health().messages_failed == len(letters)
    assert [move.partition(" ")[2] for move in house.health(0.0)] == ["critical"]  # all that was settled has failed
    house.seen.clear()
    await house.bus.dead_letters.replay(*(letter.id for letter in letters))
    await asyncio.sleep(20.0)  # whatever was paused is tried again by now
    await house.bus.drain(60)
    assert sorted(house.runs) == [f"message {number}" for number in range(total.accepted)]
    assert house.total().handled == total.accepted


# Those of a handler that are mended by trying again


@pytest.mark.parametrize(
    ("name", "fault", "first"),
    [
        ("connection_error", "refuse", "immediate_retry"),
        ("message_processing_error", "raise(ValueError)", "immediate_retry"),
        ("authentication_error", "raise(PermissionError)", "delayed_retry"),  # no hammering
        ("configuration_error", "raise(ModuleNotFoundError)", "delayed_retry"),
    ],
)
def test_a_handlers_fault_that_passes_is_tried_again_until_it_works(name: str, fault: str, first: str) -> None:
    async def scenario(house: House) -> None:
        began = await struck(house, name, PASSES)
        assert house.runs == ["message 0"]
        exactly(
            house,
            began,
            f"""
            0.0 FaultInjected {fault} handler:work
            0.0 AttemptFailed 1 {name}
            0.0 RetryScheduled {first} 0
            0.0 AttemptFailed 2 {name}
            0.0 RecoveryEnded failed
            0.0 RetryScheduled delayed_retry 0
            0.0 RecoveryEnded succeeded
            0.0 DeliveryHandled 3
            10.0 FaultHealed 2
            """,
        )
        told_to_people(house, began)  # nobody: it was mended

    play(scenario)


@pytest.mark.parametrize(
    ("name", "fault", "first", "exception"),
    [
        ("connection_error", "refuse", "immediate_retry", "ConnectionRefusedError"),
        ("message_processing_error", "raise(ValueError)", "immediate_retry", "ValueError"),
        ("authentication_error", "raise(PermissionError)", "delayed_retry", "PermissionError"),
        ("configuration_error", "raise(ModuleNotFoundError)", "delayed_retry", "ModuleNotFoundError"),
    ],
)
def test_a_handlers_fault_that_stays_is_settled_and_reported(name: str, fault: str, first: str, exception: str) -> None:
    async def scenario(house: House) -> None:
        began = await struck(house, name, STAYS)
        exactly(
            house,
            began,
            f"""
            0.0 FaultInjected {fault} handler:work
            0.0 AttemptFailed 1 {name}
            0.0 RetryScheduled {first} 0
            0.0 AttemptFailed 2 {name}
            0.0 RecoveryEnded failed
            0.0 RetryScheduled delayed_retry 0
            0.0 AttemptFailed 3 {name}
            0.0 RecoveryEnded failed
            0.0 DeliveryDeadLettered attempts_spent
            10.0 FaultHealed 3
            """,
        )
        severity = "medium" if name == "message_processing_error" else "high"
        told_to_people(house, began, f"0.0 MessageDeadLettered {severity}")
        await settled_reported_and_not_lost(house, ErrorCategory(name), exception)

    play(scenario)


@pytest.mark.parametrize("name", ["connection_error", "authentication_error"])
def test_an_outage_opens_the_kill_switch_and_no_message_is_dead_lettered(name: str) -> None:
    """Ten messages whose handler is cut off for nine seconds: they wait, and all go through when it is back."""

    async def scenario(house: House) -> None:
        house.subscribe(
            retry=Retry(max_attempts=20, immediate=0, base_delay=0.0),
            kill_switch=KillSwitch(minimum=4, ratio=0.5, open_for=2.0, probes=2),
        )
        await house.bus.start()
        began = house.clock.wall()
        async with SCENARIOS[name].on(house.bus, "work"):
            for number in range(10):
                await house.bus.publish("work.a", number)
            await asyncio.sleep(9.0)
        await house.bus.drain(60)
        await asyncio.sleep(5.0)
        assert sorted(house.runs) == list(range(10))
        assert house.total().dead_lettered == 0
        moves = [line for line in house.story(began) if "Breaker" in line or "Fault" in line]
        assert moves == [
            f"0.0 FaultInjected {SCENARIOS[name].fault} handler:work",
            "0.0 BreakerStateChanged work open",
            *(f"{2 * n:.1f} BreakerStateChanged work {to}" for n in range(1, 5) for to in ("half_open", "open")),
            "9.0 FaultHealed 8",
            "10.0 BreakerStateChanged work half_open",
            "10.0 BreakerStateChanged work closed",
        ]

    play(scenario)


# Timeouts


def test_a_timeout_that_passes_is_given_more_time_and_takes_it_back() -> None:
    async def scenario(house: House) -> None:
        began = await struck(house, "timeout_error", PASSES)
        await asyncio.sleep(10.0)
        assert house.runs == ["message 0"]
        exactly(
            house,
            began,
            """
            0.0 FaultInjected hang handler:work
            1.0 AttemptFailed 1 timeout_error
            1.0 RetryScheduled immediate_retry 0
            1.0 TimeoutAdapted 1.5
            2.5 AttemptFailed 2 timeout_error
            2.5 RecoveryEnded failed
            2.5 RetryScheduled delayed_retry 0
            2.5 TimeoutAdapted 2.25
            2.5 RecoveryEnded succeeded
            2.5 DeliveryHandled 3
            6.0 TimeoutAdapted 1.37
            10.0 FaultHealed 2
            17.0 TimeoutAdapted 1
            """,
        )
        told_to_people(house, began)

    play(scenario)


def test_a_timeout_that_stays_is_settled_and_reported() -> None:
    async def scenario(house: House) -> None:
        began = await struck(house, "timeout_error", STAYS)
        await asyncio.sleep(20.0)
        exactly(
            house,
            began,
            """
            0.0 FaultInjected hang handler:work
            1.0 AttemptFailed 1 timeout_error
            1.0 RetryScheduled immediate_retry 0
            1.0 TimeoutAdapted 1.5
            2.5 AttemptFailed 2 timeout_error
            2.5 RecoveryEnded failed
            2.5 RetryScheduled delayed_retry 0
            2.5 TimeoutAdapted 2.25
            4.6 AttemptFailed 3 timeout_error
            4.6 RecoveryEnded failed
            4.6 DeliveryDeadLettered attempts_spent
            4.6 TimeoutAdapted 3.08
            7.0 TimeoutAdapted 1.89
            10.0 FaultHealed 3
            11.0 TimeoutAdapted 1.22
            20.0 TimeoutAdapted 1
            """,
        )
        told_to_people(house, began, "4.6 MessageDeadLettered high")
        await settled_reported_and_not_lost(house, ErrorCategory.TIMEOUT_ERROR, "HandlerTimedOut")

    play(scenario)


# Payloads


def test_a_payload_that_another_codec_can_read_is_handled() -> None:
    async def scenario(house: House) -> None:
        began = await struck(house, "serialization_error", PASSES)
        assert house.runs[0] != "message 0"
        assert b"\xff" in house.runs[0]
        exactly(
            house,
            began,
            """
            0.0 FaultInjected corrupt_payload codec:decode
            0.0 CodecFellBack json raw
            0.0 DeliveryHandled 1
            10.0 FaultHealed 1
            """,
        )
        told_to_people(house, began)

    play(scenario, codecs=[JSON, RAW])


def test_a_payload_that_none_can_read_is_kept_whole_and_reported() -> None:
    async def scenario(house: House) -> None:
        began = await struck(house, "serialization_error", STAYS, messages=2)
        exactly(
            house,
            began,
            """
            0.0 FaultInjected corrupt_payload codec:decode
            0.0 AttemptFailed 1 serialization_error
            0.0 DeliveryDeadLettered not_retryable
            0.0 AttemptFailed 1 serialization_error
            0.0 DeliveryDeadLettered not_retryable
            10.0 FaultHealed 2
            """,
        )
        told_to_people(house, began, "0.0 MessageDeadLettered medium")  # once: it is the same failure
        await settled_reported_and_not_lost(house, ErrorCategory.SERIALIZATION_ERROR, "PayloadUndecodable")

    play(scenario)


# Full queues


def test_a_queue_that_is_full_for_a_while_slows_its_publishers_and_loses_nothing() -> None:
    async def scenario(house: House) -> None:
        house.subscribe(timeout=60.0, capacity=2)
        await house.bus.start()
        began = house.clock.wall()
        async with SCENARIOS["queue_overflow"].on(house.bus, "work"):
            for number in range(3):  # one is at work, and two wait
                await house.bus.publish("work.a", number)
                await asyncio.sleep(0.1)
            waiting = asyncio.create_task(house.bus.publish("work.a", 3))
            await asyncio.sleep(2.0)
            assert not waiting.done()
        await waiting
        await house.bus.drain(60)
        assert house.runs == [0, 1, 2, 3]
        exactly(
            house,
            began,
            """
            0.0 FaultInjected hang handler:work
            2.3 FaultHealed 1
            2.3 DeliveryHandled 1
            2.3 DeliveryHandled 1
            2.3 DeliveryHandled 1
            2.3 BackpressureApplied 2 True
            2.3 DeliveryHandled 1
            """,
        )

    play(scenario)


def test_a_queue_that_stays_full_climbs_the_ladder_to_the_end_and_says_so() -> None:
    """The least important gives way and is kept, the queue grows for a while, and then it refuses."""

    async def scenario(house: House) -> None:
        house.subscribe(timeout=60.0, capacity=2)
        await house.bus.start()
        began = house.clock.wall()
        async with SCENARIOS["queue_overflow"].on(house.bus, "work"):
            await house.bus.publish("work.a", "at work")
            await asyncio.sleep(0.1)
            await house.bus.publish("work.a", "least", priority=Priority.LOW)
            await house.bus.publish("work.a", "usual")
            await house.bus.publish("work.a", "urgent", priority=Priority.HIGH)
            await house.bus.publish("work.a", "more")
            with pytest.raises(QueueFull):
                await house.bus.publish("work.a", "too much")
        await house.bus.drain(60)
        await asyncio.sleep(60.0)
        (letter,) = await house.bus.dead_letters.list()
        assert (letter.message.payload, letter.reason) == ("least", "overflow")
        assert letter.report.category is ErrorCategory.QUEUE_OVERFLOW
        exactly(
            house,
            began,
            """
            0.0 FaultInjected hang handler:work
            5.1 BackpressureApplied 5 True
            5.1 OverflowHandled dead_letter 2
            5.1 DeliveryDeadLettered overflow
            10.1 BackpressureApplied 5 True
            10.1 OverflowHandled expand 3
            10.1 RecoveryStarted queue expand
            15.1 BackpressureApplied 5 False
            15.1 OverflowHandled refuse 3
            15.1 RecoveryConcluded queue expand failed
            15.1 PublishRefused queue_full
            15.1 FaultHealed 1
            15.1 DeliveryHandled 1
            15.1 DeliveryHandled 1
            15.1 DeliveryHandled 1
            15.1 DeliveryHandled 1
            70.1 OverflowHandled contract 2
            """,
        )
        told_to_people(house, began, "5.1 MessageDeadLettered high")
        assert sorted(house.runs) == ["at work", "more", "urgent", "usual"]
        await house.bus.dead_letters.replay(letter.id)
        await house.bus.drain(60)
        assert house.runs[-1] == "least"

    play(scenario)


# Resources


def test_resources_that_run_out_for_a_moment_halve_the_load_and_give_it_back() -> None:
    async def scenario(house: House) -> None:
        house.subscribe(retry=RETRY, concurrency=4)
        await house.bus.start()
        began = house.clock.wall()
        async with SCENARIOS["resource_exhaustion"].on(house.bus, "work", probability=1.0, schedule=First(1)):
            await house.bus.publish("work.a", "message 0")
            await asyncio.sleep(10.0)
        await asyncio.sleep(20.0)
        assert house.runs == ["message 0"]
        exactly(
            house,
            began,
            """
            0.0 FaultInjected memory_pressure handler:work
            0.0 AttemptFailed 1 resource_exhaustion
            0.0 RetryScheduled delayed_retry 0
            0.0 RecoveryStarted resources shed
            0.0 LoadShed 2 True
            0.0 RecoveryEnded succeeded
            0.0 DeliveryHandled 2
            1.0 RecoveryConcluded resources shed succeeded
            1.0 LoadRegained 3 True
            2.0 LoadRegained 4 True
            3.0 LoadRegained 4 False
            10.0 FaultHealed 1
            """,
        )
        told_to_people(house, began, "0.0 CriticalFailure critical")  # it is critical, whatever became of it

    play(scenario)


def test_resources_that_do_not_come_back_are_settled_and_reported() -> None:
    async def scenario(house: House) -> None:
        began = await struck(house, "resource_exhaustion", STAYS)
        exactly(
            house,
            began,
            """
            0.0 FaultInjected memory_pressure handler:work
            0.0 AttemptFailed 1 resource_exhaustion
            0.0 RetryScheduled delayed_retry 0
            0.0 RecoveryStarted resources shed
            0.0 LoadShed 1 True
            0.0 AttemptFailed 2 resource_exhaustion
            0.0 RecoveryEnded failed
            0.0 RetryScheduled delayed_retry 0
            0.0 AttemptFailed 3 resource_exhaustion
            0.0 RecoveryEnded failed
            0.0 DeliveryDeadLettered attempts_spent
            10.0 LoadRegained 1 False
            10.0 RecoveryConcluded resources shed called_off
            10.0 FaultHealed 3
            """,
        )
        told_to_people(house, began, "0.0 CriticalFailure critical")
        await settled_reported_and_not_lost(house, ErrorCategory.RESOURCE_EXHAUSTION, "MemoryError")

    play(scenario)


# Configuration


def test_a_handler_that_always_finds_its_configuration_wrong_is_paused_and_keeps_its_messages() -> None:
    async def scenario(house: House) -> None:
        began = await struck(house, "configuration_error", Always(), messages=3)
        await house.bus.publish("work.a", "message 3")
        await asyncio.sleep(1.0)
        assert house.total().pending == 1  # kept, while the subscription is paused
        story = [line for line in house.story(began) if "Subscription" in line or "DeadLettered" in line]
        assert story == [
            "0.0 DeliveryDeadLettered attempts_spent",
            "0.0 DeliveryDeadLettered attempts_spent",
            "0.0 SubscriptionPaused work",
            "0.0 DeliveryDeadLettered attempts_spent",
        ]
        await asyncio.sleep(5.0)  # tried again 15 s after it was paused
        assert house.runs == ["message 3"]
        await house.bus.dead_letters.replay(*(letter.id for letter in await house.bus.dead_letters.list()))
        await house.bus.drain(60)
        assert sorted(house.runs) == [f"message {number}" for number in range(4)]

    play(scenario)


def test_a_configuration_that_cannot_be_read_leaves_the_last_known_good_in_force() -> None:
    """The handler complains, the source is read again and fails, and what was in force stays in force."""

    async def scenario(house: House) -> None:
        house.subscribe(timeout=60.0, retry=Retry(immediate=0, base_delay=4.0))
        await house.bus.start()
        assert house.bus.subscribers()[0].timeout_s == 7.0
        await asyncio.sleep(10.0)
        began = house.clock.wall()
        house.seen.clear()
        wrong = inject(house.bus, Raise(ModuleNotFoundError), "handler:work", schedule=First(1))
        async with inject(house.bus, Raise(OSError, "no such file"), "configuration", schedule=First(1)), wrong:
            await house.bus.publish("work.a", "message 0")
            await asyncio.sleep(10.0)
        assert house.runs == ["message 0"]
        assert house.bus.subscribers()[0].timeout_s == 7.0
        exactly(
            house,
            began,
            """
            0.0 FaultInjected raise(OSError) configuration
            0.0 FaultInjected raise(ModuleNotFoundError) handler:work
            0.0 AttemptFailed 1 configuration_error
            0.0 RetryScheduled delayed_retry 0.672
            0.0 RecoveryStarted configuration reload
            0.0 RecoveryConcluded configuration reload failed
            0.0 RecoveryStarted configuration last_known_good
            0.0 RecoveryConcluded configuration last_known_good succeeded
            0.7 RecoveryEnded succeeded
            0.7 DeliveryHandled 2
            10.0 FaultHealed 1
            10.0 FaultHealed 1
            """,
        )

    play(scenario, configuration=lambda: {"subscriptions": {"work": {"timeout": 7.0}}})


def test_every_category_has_a_scenario() -> None:
    assert {scenario.category for scenario in SCENARIOS.values()} - {None} == set(ErrorCategory)
