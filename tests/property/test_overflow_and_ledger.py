"""The overflow ladder and the conservation law."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from glassbus.policy.ledger import Account, Audit, Ledger
from glassbus.policy.overflow import Rung, next_rung

COUNT = st.integers(0, 1000)


@given(COUNT, st.integers(1, 100), st.integers(1, 1000), st.floats(0, 10), st.floats(0, 10), st.booleans())
def test_the_ladder_is_climbed_in_order(
    pending: int, incoming: int, capacity: int, waited_s: float, wait_max_s: float, consumed: bool
) -> None:
    rung = next_rung(
        pending=pending,
        incoming=incoming,
        capacity=capacity,
        waited_s=waited_s,
        wait_max_s=wait_max_s,
        consumed=consumed,
    )
    if pending + incoming <= capacity:
        assert rung is Rung.ADMIT
    elif not consumed:
        assert rung is Rung.DEAD_LETTER  # a queue that nobody empties blocks no publisher
    else:
        assert rung is (Rung.SLOW if waited_s < wait_max_s else Rung.REFUSE)


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
