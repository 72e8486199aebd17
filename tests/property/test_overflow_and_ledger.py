"""The overflow ladder and the conservation law."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glassbus.config import Overflow
from glassbus.errors import ConfigurationError
from glassbus.facts import Delivery
from glassbus.message import Envelope, Priority
from glassbus.policy.ledger import Account, Audit, Ledger
from glassbus.policy.overflow import (
    Rung,
    capacity_now,
    climb,
    contracts,
    displaced_report,
    expanded_capacity,
    giving_way,
    is_expanded,
    left_out,
    may_grow_to,
    next_rung,
    unconsumed_report,
)

COUNT = st.integers(0, 1000)
PRIORITY = st.integers(0, 3)
SECONDS = st.floats(0, 1e10)


@given(
    COUNT, st.integers(1, 100), st.integers(1, 1000), st.floats(0, 10), st.floats(0, 10), st.booleans(), COUNT, COUNT
)
def test_the_ladder_is_climbed_in_order(
    pending: int,
    incoming: int,
    capacity: int,
    waited_s: float,
    wait_max_s: float,
    consumed: bool,
    gives_way: int,
    more: int,
) -> None:
    rung = next_rung(
        pending=pending,
        incoming=incoming,
        capacity=capacity,
        waited_s=waited_s,
        wait_max_s=wait_max_s,
        consumed=consumed,
        gives_way=gives_way,
        expanded=capacity + more,
    )
    if pending + incoming <= capacity:
        assert rung is Rung.ADMIT
    elif not consumed:
        assert rung is Rung.DEAD_LETTER  # a queue that nobody empties blocks no publisher
    elif waited_s < wait_max_s:
        assert rung is Rung.SLOW
    elif gives_way >= incoming or pending + incoming - gives_way <= capacity:
        assert rung is Rung.DISPLACE
    elif pending + incoming - gives_way <= capacity + more:
        assert rung is Rung.EXPAND
    else:
        assert rung is Rung.REFUSE


QUEUE = st.tuples(
    st.lists(PRIORITY, max_size=8), st.lists(PRIORITY, min_size=1, max_size=6), st.integers(1, 8), st.booleans()
)


@given(QUEUE, st.integers(0, 4))
def test_a_step_makes_exactly_the_room_it_needs_and_loses_nothing(
    queue: tuple[list[int], list[int], int, bool], more: int
) -> None:
    pending, incoming, capacity, consumed = queue
    lower = sorted(p for p in pending if p < max(incoming))
    step = climb(
        pending=len(pending),
        incoming=incoming,
        capacity=capacity,
        expanded=capacity + more,
        consumed=consumed,
        lower=lower,
    )
    if step.rung is Rung.REFUSE:
        assert (step.displace, step.leave_out, step.capacity) == (0, 0, capacity)
        assert consumed
        return
    assert capacity <= step.capacity <= capacity + more
    after = len(pending) + len(incoming) - step.displace - step.leave_out
    if step.displace or step.leave_out:
        # Not one more than needed: it is exactly full, or as much over its capacity as it was.
        assert after == max(step.capacity, len(pending))
    else:
        assert after <= step.capacity
    # What gives way is pairwise lower than what gets in for it, and nothing higher than what is left out gets less.
    victims = lower[: step.displace]
    kept = sorted(set(range(len(incoming))) - left_out(incoming, step.leave_out), key=lambda place: incoming[place])
    getting_in = [incoming[place] for place in kept][-step.displace :] if step.displace else []
    assert all(victim < by for victim, by in zip(victims, getting_in, strict=True))
    if consumed:
        assert step.leave_out == 0
    else:
        assert step.capacity == capacity, "a queue that nobody empties does not grow"


def _fits_by_hand(incoming: list[int], victims: list[int]) -> bool:
    return any(all(v < by for v, by in zip(victims, order, strict=False)) for order in permutations(incoming))


@given(st.lists(PRIORITY, max_size=5), st.lists(PRIORITY, max_size=5))
def test_as_many_give_way_as_can_be_paired_with_something_higher(incoming: list[int], pending: list[int]) -> None:
    count = giving_way(incoming, pending)
    lowest = sorted(pending)
    assert count <= min(len(incoming), len(pending))
    assert _fits_by_hand(incoming, lowest[:count])
    if count < min(len(incoming), len(pending)):
        assert not _fits_by_hand(incoming, lowest[: count + 1])


def test_equal_and_higher_priorities_never_give_way() -> None:
    assert giving_way([Priority.NORMAL] * 3, [Priority.NORMAL, Priority.HIGH]) == 0
    assert giving_way([Priority.LOW, Priority.CRITICAL], [Priority.LOW, Priority.NORMAL]) == 1


@given(st.lists(PRIORITY, max_size=8), st.integers(-2, 10))
def test_left_out_are_the_lowest_and_of_those_the_latest(incoming: list[int], too_many: int) -> None:
    out = left_out(incoming, too_many)
    assert len(out) == min(len(incoming), max(0, too_many))
    for place in out:
        for other in set(range(len(incoming))) - out:
            assert (incoming[place], -place) < (incoming[other], -other)


# Growing for a while

OVERFLOW = st.builds(Overflow, st.booleans(), st.floats(1, 1.5), st.floats(0.001, 1e6))


@given(st.integers(1, 10**12), OVERFLOW, SECONDS, SECONDS)
@example(1, Overflow(), 60.0, 0.0)
def test_a_queue_never_grows_past_half_as_much_again(
    capacity: int, overflow: Overflow, until: float, now: float
) -> None:
    assert capacity <= expanded_capacity(capacity, overflow) <= 1.5 * capacity
    assert capacity_now(capacity, overflow, until, now) in (capacity, expanded_capacity(capacity, overflow))
    # While it has grown it does not grow again, and what it grows to is of the declared capacity.
    assert may_grow_to(capacity, overflow, until) == (capacity if until else expanded_capacity(capacity, overflow))


@given(OVERFLOW, SECONDS, st.floats(0, 1e6), st.integers(0, 30))
def test_what_grew_shrinks_when_its_time_is_over_and_all_fits(
    overflow: Overflow, now: float, later: float, pending: int
) -> None:
    until = now + overflow.expand_for
    at = now + later
    over = not is_expanded(overflow, until, at)
    assert over == (at >= until)
    assert contracts(10, overflow, until, at, pending) == (over and pending <= 10)
    assert capacity_now(10, overflow, until, at) == (10 if over else expanded_capacity(10, overflow))


def test_a_queue_that_did_not_grow_does_not_shrink() -> None:
    assert not contracts(10, Overflow(), 0.0, 1e9, 0)
    assert not is_expanded(Overflow(), 0.0, 0.0)


def test_a_clock_that_is_set_back_ends_an_expansion_instead_of_prolonging_it() -> None:
    overflow, until = Overflow(expand_for=60.0), 10_000.0 + 60.0
    assert is_expanded(overflow, until, 10_000.0)
    assert not is_expanded(overflow, until, 9_999.0)
    assert contracts(10, overflow, until, 9_999.0, 10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"displace": 1},
        {"displace": None},
        {"expand": 0.99},
        {"expand": 1.51},
        {"expand": math.nan},
        {"expand": True},
        {"expand": "1.2"},
        {"expand_for": 0},
        {"expand_for": -1.0},
        {"expand_for": math.inf},
        {"expand_for": None},
    ],
)
def test_options_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="Overflow needs"):
        Overflow(**wrong)  # type: ignore[arg-type]


# What is told

DELIVERY = Delivery(Envelope("m1", "orders.created", b"secret", "json", {}, priority=0), "bill", "orders.*", 2)


def test_the_reports_name_the_queue_the_priorities_and_a_fingerprint_and_no_payload() -> None:
    gave_way = displaced_report(DELIVERY, Priority.CRITICAL, 10, 5.0)
    assert "LOW message gave way to a CRITICAL one" in gave_way.message
    assert (gave_way.fingerprint, gave_way.component, gave_way.category) == (
        "displaced:bill",
        "queue",
        "queue_overflow",
    )
    assert (gave_way.error_id, gave_way.timestamp, gave_way.retry_count) == ("m1:bill:displaced", 5.0, 1)
    assert gave_way.context == {"topic": "orders.created", "priority": "LOW", "gave_way_to": "CRITICAL"}
    no_one = unconsumed_report(DELIVERY, 10, 5.0)
    assert "nothing consumes it" in no_one.message
    assert (no_one.fingerprint, no_one.component, no_one.category) == ("overflow:bill", "queue", "queue_overflow")
    assert "secret" not in repr((gave_way, no_one))


# The ledger

PLACES = ("ready", "scheduled", "retrying", "in_flight", "handled", "dead_lettered", "expired", "discarded")
ACCOUNT = st.builds(
    lambda places: Account(accepted=sum(places), **dict(zip(PLACES, places, strict=True))),
    st.lists(COUNT, min_size=8, max_size=8),
)


@given(st.dictionaries(st.text(max_size=3), ACCOUNT, max_size=4), ACCOUNT)
def test_a_ledger_of_balanced_accounts_balances_and_adds_up(accounts: dict[str, Account], gone: Account) -> None:
    ledger = Ledger(accounts, gone)
    assert ledger.balanced
    assert ledger.unaccounted == 0
    total = ledger.total
    assert total.accepted == total.pending + total.in_flight + total.settled
    assert total.accepted == gone.accepted + sum(a.accepted for a in accounts.values())


def test_an_audit_with_a_problem_is_not_ok() -> None:
    assert Audit(Ledger({}), Ledger({}), 0).ok
    assert not Audit(Ledger({}), Ledger({}), 0, ("one delivery is in two places",)).ok


@given(ACCOUNT, st.sampled_from(("accepted", *PLACES)), st.integers(1, 5))
def test_one_delivery_more_or_less_anywhere_shows(account: Account, place: str, by: int) -> None:
    counts = {f: getattr(account, f) for f in account.__struct_fields__}
    counts[place] += by
    tampered = Account(**counts)
    assert abs(tampered.unaccounted) == by
    opposite = Account(**{**counts, place: counts[place] - 2 * by})
    # Errors of opposite sign do not cancel.
    assert Ledger({"a": tampered, "b": opposite}).unaccounted == 2 * by
    assert not Ledger({"a": tampered, "b": opposite}).balanced
