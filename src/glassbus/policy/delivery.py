"""The life of a delivery, as a table and one pure decision.

ready ──claim──> in_flight ──> handled
  ^  scheduled ─┘  │  │  └───> dead_lettered ──replay──> ready
  │                │  └──────> expired / discarded
  └─ retrying <────┘ failed, attempts left
  └─ ready    <────┘ given back (we stopped it: not charged)
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Literal, assert_never

import msgspec

from glassbus.errors import ErrorCategory, ErrorReport
from glassbus.facts import (
    AttemptAbandoned,
    AttemptFailed,
    Delivery,
    DeliveryDeadLettered,
    DeliveryExpired,
    DeliveryGivenBack,
    DeliveryHandled,
    Fact,
    RecoveryEnded,
    RetryScheduled,
)
from glassbus.policy.retry import Retry, RetryBudget

#: What `copy.copy` calls in the end, at a quarter of its cost.
_copy: Callable[[ErrorReport], ErrorReport] = ErrorReport.__copy__  # type: ignore[attr-defined]


class State(IntEnum):
    """Where a delivery is. The numbers are stored: never renumber."""

    READY = 0
    SCHEDULED = 1
    RETRYING = 2
    IN_FLIGHT = 3
    DEAD_LETTERED = 4
    HANDLED = 5
    EXPIRED = 6
    DISCARDED = 7


#: States that count as pending in the ledger.
PENDING = frozenset({State.READY, State.SCHEDULED, State.RETRYING})
#: States that a delivery never leaves; its row is gone and only its count stays.
FINAL = frozenset({State.HANDLED, State.EXPIRED, State.DISCARDED})

LEGAL: dict[State, frozenset[State]] = {
    State.READY: frozenset({State.IN_FLIGHT, State.EXPIRED, State.DISCARDED, State.DEAD_LETTERED}),
    State.SCHEDULED: frozenset({State.READY, State.EXPIRED, State.DISCARDED, State.DEAD_LETTERED}),
    State.RETRYING: frozenset({State.READY, State.EXPIRED, State.DISCARDED, State.DEAD_LETTERED}),
    State.IN_FLIGHT: frozenset(
        {State.READY, State.RETRYING, State.HANDLED, State.DEAD_LETTERED, State.EXPIRED, State.DISCARDED}
    ),
    State.DEAD_LETTERED: frozenset({State.READY, State.DISCARDED}),
    State.HANDLED: frozenset(),
    State.EXPIRED: frozenset(),
    State.DISCARDED: frozenset(),
}


class Handled(msgspec.Struct, frozen=True):
    """The handler returned. `late`: after its timeout."""

    duration_s: float
    late: bool = False


class Failed(msgspec.Struct, frozen=True):
    """The handler raised, timed out, or could not be given its payload. `handling_s`: spent on the failure so far."""

    report: ErrorReport
    duration_s: float
    retryable: bool = True
    handling_s: float = 0.0


class Abandoned(msgspec.Struct, frozen=True):
    """The handler still runs past `abandon_after`."""

    report: ErrorReport
    duration_s: float


class Spent(msgspec.Struct, frozen=True):
    """Claimed once more than `max_attempts`: the handler was not run. `owner_died`: its owners died in them."""

    report: ErrorReport
    owner_died: bool = True


class Stopped(msgspec.Struct, frozen=True):
    """We ourselves stopped the attempt, so it is not charged."""

    reason: Literal["stopping", "breaker_open"]


class Overran(msgspec.Struct, frozen=True):
    """`expires_in` passed before the attempt could start."""


Outcome = Handled | Failed | Abandoned | Spent | Stopped | Overran


class Decision(msgspec.Struct, frozen=True):
    """What becomes of a delivery, and the facts that are true once that is stored.

    `attempt` is the count to store. `recovering` and `first_failed_at` travel with
    the delivery. `report` is kept with a dead letter.
    """

    state: State
    attempt: int = 0
    delay_s: float = 0.0
    recovering: tuple[str, str] | None = None
    first_failed_at: float = 0.0
    report: ErrorReport | None = None
    reason: str = ""
    facts: tuple[Fact, ...] = ()


def decide(
    delivery: Delivery,
    outcome: Outcome,
    retry: Retry,
    now: float,
    uniform: Callable[[], float],
    budget: RetryBudget | None = None,
    monotonic_now: float = 0.0,
) -> Decision:
    """What becomes of an in-flight `delivery` after `outcome`.

    `now` is wall seconds for the facts, `monotonic_now` feeds the retry budget,
    `uniform` gives chance in [0, 1).
    """
    match outcome:
        case Failed():  # by far the most frequent
            return _after_failure(delivery, outcome, retry, now, uniform, budget, monotonic_now)
        case Handled():
            recovered = _recovery_ended(delivery, "succeeded", now)
            handled = DeliveryHandled(at=now, delivery=delivery, duration_s=outcome.duration_s, late=outcome.late)
            return Decision(State.HANDLED, delivery.attempt, facts=(*recovered, handled))
        case Stopped():
            given_back = DeliveryGivenBack(at=now, delivery=delivery, reason=outcome.reason)
            return Decision(
                State.READY,
                delivery.attempt - 1,
                recovering=delivery.recovering,
                first_failed_at=delivery.first_failed_at,
                reason=outcome.reason,
                facts=(given_back,),
            )
        case Overran():
            ended = _recovery_ended(delivery, "failed", now)
            expired = DeliveryExpired(at=now, delivery=delivery)
            return Decision(State.EXPIRED, delivery.attempt - 1, facts=(*ended, expired))
        case Spent():
            # This claim ran no handler; nor did those that found its owners dead.
            ran = delivery.attempt - 1
            if outcome.owner_died:
                ran = min(ran, retry.max_attempts)
            delivery = msgspec.structs.replace(delivery, attempt=ran)
            spent: Literal["owner_died", "attempts_spent"] = "owner_died" if outcome.owner_died else "attempts_spent"
            return _dead_letter(delivery, outcome.report, spent, now, ran, (), max_attempts=retry.max_attempts)
        case Abandoned():
            abandoned = AttemptAbandoned(at=now, delivery=delivery, ran_s=outcome.duration_s)
            told = _for_observers(outcome.report)
            failed = AttemptFailed(at=now, delivery=delivery, report=told, duration_s=outcome.duration_s)
            before = (failed, abandoned)
            return _dead_letter(
                delivery, outcome.report, "abandoned", now, delivery.attempt, before, max_attempts=retry.max_attempts
            )
    assert_never(outcome)


def _after_failure(
    delivery: Delivery,
    outcome: Failed,
    retry: Retry,
    now: float,
    uniform: Callable[[], float],
    budget: RetryBudget | None,
    monotonic_now: float,
) -> Decision:
    report, attempt = outcome.report, delivery.attempt
    failed = AttemptFailed(at=now, delivery=delivery, report=_for_observers(report), duration_s=outcome.duration_s)
    most = retry.max_attempts
    if not outcome.retryable:
        return _dead_letter(delivery, report, "not_retryable", now, attempt, (failed,), outcome.handling_s, most)
    if attempt >= most:
        return _dead_letter(delivery, report, "attempts_spent", now, attempt, (failed,), outcome.handling_s, most)
    postponed_s = budget.spend(monotonic_now) if budget is not None else 0.0
    ceiling_s = retry.ceiling(attempt)
    delay_s = ceiling_s * uniform() + postponed_s
    action: Literal["immediate_retry", "delayed_retry"] = (
        "immediate_retry" if attempt <= retry.immediate and not postponed_s else "delayed_retry"
    )
    scheduled = RetryScheduled(
        at=now,
        delivery=delivery,
        report=_for_observers(report),
        action=action,
        delay_s=delay_s,
        next_attempt=attempt + 1,
        postponed=postponed_s > 0,
        handling_s=outcome.handling_s,
        max_attempts=most,
        immediate=retry.immediate,
        ceiling_s=ceiling_s,
    )
    return Decision(
        State.READY if action == "immediate_retry" else State.RETRYING,
        attempt,
        delay_s=delay_s,
        recovering=(report.category, action),
        first_failed_at=delivery.first_failed_at or now,
        facts=(failed, *_recovery_ended(delivery, "failed", now), scheduled),
    )


def _dead_letter(
    delivery: Delivery,
    report: ErrorReport,
    reason: Literal["attempts_spent", "not_retryable", "abandoned", "owner_died"],
    now: float,
    attempt: int,
    before: tuple[Fact, ...],
    handling_s: float = 0.0,
    max_attempts: int = 0,
) -> Decision:
    shown = _for_observers(report)
    dead = DeliveryDeadLettered(
        at=now, delivery=delivery, report=shown, reason=reason, handling_s=handling_s, max_attempts=max_attempts
    )
    return Decision(
        State.DEAD_LETTERED,
        attempt,
        first_failed_at=delivery.first_failed_at or now,
        report=report,
        reason=reason,
        facts=(*before, *_recovery_ended(delivery, "failed", now), dead),
    )


def _for_observers(report: ErrorReport) -> ErrorReport:
    """A copy for one fact: reports can be written on, and what one is told must not change what others are."""
    shown = _copy(report)
    shown.context = report.context.copy()
    return shown


def _recovery_ended(delivery: Delivery, outcome: Literal["succeeded", "failed"], now: float) -> tuple[Fact, ...]:
    """The recovery that led to this attempt has its answer now, so it is counted now."""
    if delivery.recovering is None:
        return ()
    category, action = delivery.recovering
    return (
        RecoveryEnded(
            at=now,
            delivery=delivery,
            category=ErrorCategory(category),
            action=action,
            outcome=outcome,
            duration_s=max(0.0, now - delivery.first_failed_at),
        ),
    )
