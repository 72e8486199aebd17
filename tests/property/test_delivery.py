"""The one decision about a delivery: every outcome at every attempt, and whole lives played at random."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity
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
from glassbus.message import Envelope
from glassbus.policy.delivery import (
    FINAL,
    LEGAL,
    PENDING,
    Abandoned,
    Decision,
    Failed,
    Handled,
    Outcome,
    Overran,
    Spent,
    State,
    Stopped,
    decide,
)
from glassbus.policy.retry import Retry, RetryBudget

NOW = 1_700_000_000.0


def report(category: ErrorCategory = ErrorCategory.CONNECTION_ERROR) -> ErrorReport:
    return ErrorReport(
        error_id="e", timestamp=NOW, category=category, severity=ErrorSeverity.HIGH, message="it went wrong"
    )


ENVELOPE = Envelope("m1", "orders.created", b"{}", "json", {})
REPORTS = st.builds(report, st.sampled_from(list(ErrorCategory)))
DURATION = st.floats(0, 1000)
OUTCOMES: st.SearchStrategy[Outcome] = st.one_of(
    st.builds(Handled, DURATION, st.booleans()),
    st.builds(Failed, REPORTS, DURATION, st.booleans()),
    st.builds(Abandoned, REPORTS, DURATION),
    st.builds(Spent, REPORTS),
    st.builds(Stopped, st.sampled_from(["stopping", "breaker_open"])),
    st.builds(Overran),
)
RECOVERING = st.none() | st.tuples(
    st.sampled_from([c.value for c in ErrorCategory]), st.sampled_from(["immediate_retry", "delayed_retry"])
)
RETRY = st.builds(
    Retry, max_attempts=st.integers(1, 6), immediate=st.integers(0, 3), base_delay=st.sampled_from([0.0, 0.2])
)


@st.composite
def deliveries(draw: st.DrawFn, retry: Retry) -> Delivery:
    recovering = draw(RECOVERING)
    return Delivery(
        ENVELOPE,
        "s",
        "orders.created",
        attempt=draw(st.integers(1, retry.max_attempts + 1)),
        recovering=recovering,
        first_failed_at=NOW - 10 if recovering else 0.0,
    )


def names(facts: tuple[Fact, ...]) -> list[str]:
    return [type(fact).__name__ for fact in facts]


def expected_facts(delivery: Delivery, outcome: Outcome, decision: Decision) -> list[str]:
    """The facts of an outcome, in order, as the design tells them."""
    ended = ["RecoveryEnded"] if delivery.recovering else []
    match outcome:
        case Handled():
            return [*ended, "DeliveryHandled"]
        case Stopped():
            return ["DeliveryGivenBack"]  # the attempt has not ended: the recovery is still under way
        case Overran():
            return [*ended, "DeliveryExpired"]
        case Spent():
            return [*ended, "DeliveryDeadLettered"]
        case Abandoned():
            return ["AttemptFailed", "AttemptAbandoned", *ended, "DeliveryDeadLettered"]
        case Failed():
            last = "DeliveryDeadLettered" if decision.state is State.DEAD_LETTERED else "RetryScheduled"
            return ["AttemptFailed", *ended, last]


@given(st.data())
def test_every_outcome_leads_to_a_legal_state_with_exactly_its_facts(data: st.DataObject) -> None:
    retry = data.draw(RETRY)
    delivery = data.draw(deliveries(retry))
    outcome = data.draw(OUTCOMES)
    chance = data.draw(st.floats(0, 1, exclude_max=True))
    decision = decide(delivery, outcome, retry, NOW, lambda: chance)

    assert decision.state in LEGAL[State.IN_FLIGHT]
    assert names(decision.facts) == expected_facts(delivery, outcome, decision)
    assert all(fact.at == NOW for fact in decision.facts)
    for fact in decision.facts:
        told: Delivery = getattr(fact, "delivery")  # noqa: B009
        if isinstance(outcome, Spent):  # this claim was no attempt, and is not told as one
            assert (told.envelope, told.attempt) == (delivery.envelope, decision.attempt)
        else:
            assert told is delivery
    told_reports = [fact.report for fact in decision.facts if hasattr(fact, "report")]
    assert all(told == outcome.report for told in told_reports)  # type: ignore[union-attr]
    held = [id(decision.report), *map(id, told_reports)]
    assert len(set(held)) == len(held)  # each its own, for observers may write on them
    assert decision.attempt in (delivery.attempt, delivery.attempt - 1, retry.max_attempts)
    if decision.state is State.DEAD_LETTERED:
        assert decision.report is outcome.report  # type: ignore[union-attr]
        assert decision.reason
        assert decision.first_failed_at == (delivery.first_failed_at or NOW)
    if decision.state in FINAL | {State.DEAD_LETTERED}:
        assert decision.recovering is None
        assert decision.delay_s == 0


@given(st.data())
def test_a_retry_says_the_delay_that_is_used_and_leaves_attempts(data: st.DataObject) -> None:
    retry = data.draw(RETRY)
    attempt = data.draw(st.integers(1, retry.max_attempts))
    failure = report(data.draw(st.sampled_from(list(ErrorCategory))))
    delivery = Delivery(ENVELOPE, "s", "d", attempt=attempt)
    decision = decide(delivery, Failed(failure, 0.1), retry, NOW, lambda: 0.5)
    if attempt == retry.max_attempts:
        assert decision.state is State.DEAD_LETTERED
        assert decision.reason == "attempts_spent"
        return
    scheduled = decision.facts[-1]
    assert isinstance(scheduled, RetryScheduled)
    assert scheduled.delay_s == decision.delay_s == retry.delay(attempt, lambda: 0.5)
    assert not scheduled.postponed
    assert decision.first_failed_at == NOW
    assert scheduled.next_attempt == attempt + 1
    assert decision.attempt == attempt
    assert decision.recovering == (failure.category.value, scheduled.action)
    if attempt <= retry.immediate:
        assert (decision.state, scheduled.action, decision.delay_s) == (State.READY, "immediate_retry", 0)
    else:
        assert (decision.state, scheduled.action) == (State.RETRYING, "delayed_retry")


def test_what_is_not_worth_a_retry_is_dead_lettered_at_once() -> None:
    decision = decide(Delivery(ENVELOPE, "s", "d", attempt=1), Failed(report(), 0.1, False), Retry(), NOW, lambda: 0.0)
    assert (decision.state, decision.reason, decision.attempt) == (State.DEAD_LETTERED, "not_retryable", 1)


def test_a_dead_owner_is_not_charged_for_the_claim_that_found_it() -> None:
    delivery = Delivery(ENVELOPE, "s", "d", attempt=6)
    early = decide(Delivery(ENVELOPE, "s", "d", attempt=2), Spent(report()), Retry(max_attempts=5), NOW, lambda: 0.0)
    assert early.attempt == 1
    for max_attempts in (5, 3):  # 3: owners died once more while they were about to dead-letter it
        decision = decide(delivery, Spent(report()), Retry(max_attempts=max_attempts), NOW, lambda: 0.0)
        assert (decision.state, decision.reason, decision.attempt) == (State.DEAD_LETTERED, "owner_died", max_attempts)


def test_what_we_stop_ourselves_is_not_charged_and_keeps_its_recovery() -> None:
    delivery = Delivery(
        ENVELOPE, "s", "d", attempt=3, recovering=("timeout_error", "delayed_retry"), first_failed_at=NOW - 5
    )
    decision = decide(delivery, Stopped("stopping"), Retry(), NOW, lambda: 0.0)
    assert (decision.state, decision.attempt) == (State.READY, 2)
    assert (decision.recovering, decision.first_failed_at) == (delivery.recovering, delivery.first_failed_at)


def test_a_recovery_is_timed_from_the_first_failure() -> None:
    delivery = Delivery(
        ENVELOPE, "s", "d", attempt=3, recovering=("timeout_error", "delayed_retry"), first_failed_at=NOW - 5
    )
    ended = decide(delivery, Handled(0.1), Retry(), NOW, lambda: 0.0).facts[0]
    assert isinstance(ended, RecoveryEnded)
    assert (ended.category, ended.action, ended.outcome, ended.duration_s) == (
        ErrorCategory.TIMEOUT_ERROR,
        "delayed_retry",
        "succeeded",
        5,
    )


def test_a_wall_clock_set_back_yields_no_negative_duration() -> None:
    delivery = Delivery(
        ENVELOPE, "s", "d", attempt=2, recovering=("timeout_error", "delayed_retry"), first_failed_at=NOW + 100
    )
    ended = decide(delivery, Handled(0.1), Retry(), NOW, lambda: 0.0).facts[0]
    assert isinstance(ended, RecoveryEnded)
    assert ended.duration_s == 0


def test_a_late_success_is_told_as_one() -> None:
    for late in (True, False):
        (handled,) = decide(
            Delivery(ENVELOPE, "s", "d", attempt=1), Handled(2.5, late), Retry(), NOW, lambda: 0.0
        ).facts
        assert isinstance(handled, DeliveryHandled)
        assert (handled.late, handled.duration_s) == (late, 2.5)
    assert not Handled(1.0).late


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_spent_budget_postpones_and_never_dead_letters(attempt: int) -> None:
    budget = RetryBudget(0.0, 1.0, 0.0)
    budget.tokens = 0.0
    decision = decide(
        Delivery(ENVELOPE, "s", "d", attempt=attempt), Failed(report(), 0.1), Retry(), NOW, lambda: 0.5, budget, 0.0
    )
    scheduled = decision.facts[-1]
    assert isinstance(scheduled, RetryScheduled)
    assert decision.state is State.RETRYING
    assert scheduled.postponed
    assert scheduled.action == "delayed_retry"
    assert decision.delay_s >= 1


def test_the_table_is_closed() -> None:
    assert set(LEGAL) == set(State)
    for state in FINAL:
        assert LEGAL[state] == frozenset()
    for state in PENDING:
        assert State.HANDLED not in LEGAL[state]  # nothing is handled without having been in flight
    assert [s.value for s in State] == list(range(8))  # stored: never renumbered


class Life(RuleBasedStateMachine):
    """One delivery, from ready to its end, with random outcomes, dead owners and replays on the way."""

    @initialize(retry=RETRY, budgeted=st.booleans())
    def accept(self, retry: Retry, budgeted: bool) -> None:
        self.retry = retry
        self.now = NOW
        self.state = State.READY
        self.attempt = 0
        self.recovering: tuple[str, str] | None = None
        self.first_failed_at = 0.0
        self.runs = 0  # of the handler, since accepted or replayed
        self.budget = RetryBudget(0.0, 0.5, 0.0) if budgeted else None
        self.recoveries_begun = self.recoveries_ended = 0
        self.failures = self.first_failure_at_s = 0
        self.delivery: Delivery | None = None

    def go(self, state: State) -> None:
        assert state in LEGAL[self.state]
        self.state = state

    @rule(seconds=st.sampled_from([0.0, 0.1, 6.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        if self.state in (State.RETRYING, State.SCHEDULED):
            self.go(State.READY)

    @precondition(lambda self: self.state is State.READY)
    @rule()
    def claim(self) -> None:
        self.go(State.IN_FLIGHT)
        self.attempt += 1
        self.delivery = Delivery(
            ENVELOPE,
            "s",
            "d",
            attempt=self.attempt,
            recovering=self.recovering,
            first_failed_at=self.first_failed_at,
        )

    @precondition(lambda self: self.state is State.IN_FLIGHT)
    @rule()
    def the_owner_dies(self) -> None:
        """The claim stays counted; the delivery is ready again for somebody else."""
        if self.attempt <= self.retry.max_attempts:
            self.runs += 1
        self.go(State.READY)

    @precondition(lambda self: self.state is State.IN_FLIGHT)
    @rule(outcome=OUTCOMES, chance=st.floats(0, 1, exclude_max=True))
    def it_ends(self, outcome: Outcome, chance: float) -> None:
        assert self.delivery is not None
        if self.attempt > self.retry.max_attempts:
            outcome = Spent(report())  # the worker runs no handler beyond the last attempt
        elif isinstance(outcome, Spent):
            outcome = Handled(0.1)
        pending = self.delivery.recovering is not None
        decision = decide(self.delivery, outcome, self.retry, self.now, lambda: chance, self.budget, self.now)
        assert names(decision.facts) == expected_facts(self.delivery, outcome, decision)
        self.runs += isinstance(outcome, Handled | Failed | Abandoned)
        self.recoveries_begun += "RetryScheduled" in names(decision.facts)
        ended = [fact for fact in decision.facts if isinstance(fact, RecoveryEnded)]
        self.recoveries_ended += len(ended)
        assert len(ended) == (pending and not isinstance(outcome, Stopped))
        if ended:
            assert ended[0].outcome == ("succeeded" if isinstance(outcome, Handled) else "failed")
            assert ended[0].duration_s == pytest.approx(self.now - self.first_failed_at)
        if decision.first_failed_at:
            assert decision.first_failed_at == (self.first_failed_at or self.now)
        self.go(decision.state)
        self.attempt, self.recovering = decision.attempt, decision.recovering
        self.first_failed_at = decision.first_failed_at

    @precondition(lambda self: self.state is State.DEAD_LETTERED)
    @rule()
    def replay(self) -> None:
        self.go(State.READY)
        self.attempt, self.recovering, self.first_failed_at, self.runs = 0, None, 0.0, 0

    @precondition(lambda self: self.state in FINAL)
    @rule()
    def the_next_message(self) -> None:
        self.accept(self.retry, False)

    @invariant()
    def attempts_and_recoveries_are_accounted_for(self) -> None:
        if not hasattr(self, "retry"):
            return
        assert self.runs <= self.retry.max_attempts
        under_way = self.recovering is not None
        assert self.recoveries_begun - self.recoveries_ended == under_way
        if self.state in FINAL | {State.DEAD_LETTERED}:
            assert self.attempt <= self.retry.max_attempts
            assert not under_way


TestALifeOfADelivery = Life.TestCase


def test_every_kind_of_fact_about_an_attempt_is_reached() -> None:
    """So that the tables above are not true of nothing."""
    seen: set[type[Any]] = set()
    delivery = Delivery(ENVELOPE, "s", "d", attempt=1, recovering=("timeout_error", "delayed_retry"), first_failed_at=1)
    for outcome in (
        Handled(0.1),
        Failed(report(), 0.1),
        Failed(report(), 0.1, False),
        Abandoned(report(), 0.1),
        Spent(report()),
        Stopped("stopping"),
        Overran(),
    ):
        seen |= {type(fact) for fact in decide(delivery, outcome, Retry(), NOW, lambda: 0.0).facts}
    assert seen == {
        AttemptAbandoned,
        AttemptFailed,
        DeliveryDeadLettered,
        DeliveryExpired,
        DeliveryGivenBack,
        DeliveryHandled,
        RecoveryEnded,
        RetryScheduled,
    }
