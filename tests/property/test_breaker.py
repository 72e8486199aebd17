"""The circuit breaker against a model that a reader can check, and the two rules for tripping."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from glassbus.errors import ConfigurationError
from glassbus.policy.breaker import (
    LEGAL,
    Breaker,
    BreakerState,
    ConsecutiveFailures,
    DistinctFailures,
    Transition,
)

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
FORCED_OPEN, DISABLED = BreakerState.FORCED_OPEN, BreakerState.DISABLED
THRESHOLD, OPEN_FOR, PROBE_TIMEOUT = 3, 10.0, 4.0


class BreakerMachine(RuleBasedStateMachine):
    """A breaker that trips after three failures in a row, driven in every way at once."""

    @initialize(probes=st.integers(1, 3))
    def make(self, probes: int) -> None:
        self.now = 100.0
        self.probes = probes
        self.breaker: Breaker[str] = Breaker(
            ConsecutiveFailures(THRESHOLD), open_for_s=OPEN_FOR, probes=probes, probe_timeout_s=PROBE_TIMEOUT
        )
        # The model.
        self.state = CLOSED
        self.in_a_row = 0
        self.opened_at = 0.0
        self.generation = 0
        self.succeeded = 0
        self.permits: dict[int, float] = {}  # of this half-open period: when each lapses
        self.stale: list[int] = []  # of earlier ones
        self.handed_out: set[int] = set()

    def moved(self, transition: Transition[str] | None, to: BreakerState | None) -> None:
        """Check what the breaker says against what the model says, and follow it."""
        if to is None:
            assert transition is None
            return
        assert transition is not None
        assert (transition.from_state, transition.to_state) == (self.state, to)
        assert to in LEGAL[self.state]
        assert transition.reason
        self.state = to
        self.generation += 1
        self.stale += self.permits
        self.permits = {}
        self.succeeded = 0

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.9, 4.0, 9.9, 10.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def tick(self) -> None:
        due = self.state is OPEN and self.now >= self.opened_at + OPEN_FOR
        self.moved(self.breaker.tick(self.now), HALF_OPEN if due else None)

    @rule()
    def admit(self) -> None:
        permit = self.breaker.admit(self.now)
        if self.state in (CLOSED, DISABLED):
            assert permit == 0
        elif self.state is HALF_OPEN:
            for lapsed in [p for p, until in self.permits.items() if until <= self.now]:
                self.stale.append(lapsed)
                del self.permits[lapsed]
            if len(self.permits) + self.succeeded < self.probes:
                assert permit is not None
                assert permit > 0
                assert permit not in self.handed_out
                self.handed_out.add(permit)
                self.permits[permit] = self.now + PROBE_TIMEOUT
            else:
                assert permit is None
        else:
            assert permit is None

    @rule()
    def a_call_succeeds(self) -> None:
        self.moved(self.breaker.succeeded("k", self.now), None)
        if self.state is CLOSED:
            self.in_a_row = 0

    @rule()
    def a_call_fails(self) -> None:
        trips = False
        if self.state is CLOSED:
            self.in_a_row += 1
            trips = self.in_a_row >= THRESHOLD
            if trips:
                self.opened_at = self.now
        self.moved(self.breaker.failed("k", "cause", self.now), OPEN if trips else None)

    @precondition(lambda self: self.permits)
    @rule(data=st.data())
    def a_probe_succeeds(self, data: st.DataObject) -> None:
        permit = data.draw(st.sampled_from(sorted(self.permits)))
        del self.permits[permit]
        self.succeeded += 1
        closes = self.succeeded >= self.probes
        if closes:
            self.in_a_row = 0
        self.moved(self.breaker.succeeded("k", self.now, permit), CLOSED if closes else None)

    @precondition(lambda self: self.permits)
    @rule(data=st.data())
    def a_probe_fails(self, data: st.DataObject) -> None:
        permit = data.draw(st.sampled_from(sorted(self.permits)))
        del self.permits[permit]
        self.opened_at = self.now
        self.moved(self.breaker.failed("k", "the probe", self.now, permit), OPEN)

    @precondition(lambda self: self.permits)
    @rule(data=st.data())
    def a_probe_is_cancelled(self, data: st.DataObject) -> None:
        permit = data.draw(st.sampled_from(sorted(self.permits)))
        del self.permits[permit]
        self.breaker.release(permit)

    @precondition(lambda self: self.stale)
    @rule(data=st.data(), result=st.sampled_from(["succeeded", "failed", "release"]))
    def a_probe_of_an_earlier_period_reports(self, data: st.DataObject, result: str) -> None:
        permit = data.draw(st.sampled_from(self.stale))
        if result == "succeeded":
            assert self.breaker.succeeded("k", self.now, permit) is None
        elif result == "failed":
            assert self.breaker.failed("k", "stale", self.now, permit) is None
        else:
            self.breaker.release(permit)

    @precondition(lambda self: self.state is CLOSED)
    @rule()
    def it_trips(self) -> None:
        while self.state is CLOSED:
            self.a_call_fails()

    @precondition(lambda self: self.state is OPEN)
    @rule()
    def the_wait_is_over(self) -> None:
        self.now = max(self.now, self.opened_at + OPEN_FOR)
        self.tick()
        assert self.state is HALF_OPEN

    @precondition(lambda self: self.state is HALF_OPEN)
    @rule()
    def every_probe_that_can_is_admitted(self) -> None:
        for _ in range(self.probes + 1):
            self.admit()

    @rule(action=st.sampled_from(["force_open", "disable", "reset"]), really=st.integers(0, 3))
    def an_operator_acts(self, action: str, really: int) -> None:
        if really:  # seldom, or nothing else would ever happen
            return
        if action == "reset":
            self.in_a_row = 0
        to = {"force_open": FORCED_OPEN, "disable": DISABLED, "reset": CLOSED}[action]
        self.moved(getattr(self.breaker, action)(), None if self.state is to else to)

    @invariant()
    def the_breaker_is_where_the_model_is(self) -> None:
        if not hasattr(self, "breaker"):
            return
        assert self.breaker.state is self.state
        assert self.breaker.generation == self.generation
        assert len(self.permits) + self.succeeded <= self.probes
        live = sum(until > self.now for until in self.permits.values())
        assert (
            self.breaker.has_permits(self.now) is (live + self.succeeded < self.probes) or self.state is not HALF_OPEN
        )


TestBreakerAgainstItsModel = BreakerMachine.TestCase


def test_the_table_is_closed_and_has_no_way_to_stand_still() -> None:
    assert set(LEGAL) == set(BreakerState)
    for state, targets in LEGAL.items():
        assert state not in targets
        assert targets <= set(BreakerState)
    assert HALF_OPEN not in LEGAL[CLOSED]  # only a wait leads there
    assert OPEN not in LEGAL[FORCED_OPEN] | LEGAL[DISABLED]


@pytest.mark.parametrize(
    ("from_state", "to_state"), [(a, b) for a in BreakerState for b in BreakerState if b not in LEGAL[a]]
)
def test_an_illegal_transition_is_impossible(from_state: BreakerState, to_state: BreakerState) -> None:
    breaker: Breaker[str] = Breaker(ConsecutiveFailures(), open_for_s=1)
    breaker.state = from_state
    with pytest.raises(AssertionError, match="illegal"):
        breaker._move(to_state, "because")


def opened(probes: int = 1, **options: float) -> Breaker[str]:
    breaker: Breaker[str] = Breaker(ConsecutiveFailures(THRESHOLD), open_for_s=OPEN_FOR, probes=probes, **options)
    moved = [breaker.failed("k", f"cause {n}", 100.0) for n in range(THRESHOLD)]
    assert moved[:-1] == [None] * (THRESHOLD - 1)
    assert moved[-1] == Transition(CLOSED, OPEN, "3 failures in a row", ("cause 0", "cause 1", "cause 2"))
    return breaker


def test_it_heals_when_every_probe_succeeds_and_then_counts_from_zero() -> None:
    breaker = opened(probes=2)
    assert breaker.admit(109.9) is None
    assert breaker.tick(109.9) is None
    assert breaker.tick(110.0) == Transition(OPEN, HALF_OPEN, "open for 10 s")
    assert [breaker.admit(110.0) for _ in range(3)] == [1, 2, None]
    assert breaker.succeeded("k", 111.0, 1) is None
    assert not breaker.has_permits(111.0)
    assert breaker.succeeded("k", 111.0, 2) == Transition(HALF_OPEN, CLOSED, "2 probes succeeded")
    assert [breaker.failed("k", "c", 112.0) for _ in range(THRESHOLD - 1)] == [None, None]
    assert breaker.state is CLOSED


def test_a_failed_probe_opens_it_again_for_the_whole_wait() -> None:
    breaker = opened(probes=2)
    breaker.tick(110.0)
    first, second = breaker.admit(110.0), breaker.admit(110.0)
    assert first
    assert second
    assert breaker.failed("k", "the probe", 115.0, first) == Transition(
        HALF_OPEN, OPEN, "a probe failed", ("the probe",)
    )
    assert breaker.succeeded("k", 115.0, second) is None  # of a period that is over
    assert breaker.tick(124.9) is None
    assert breaker.tick(125.0) is not None
    assert [breaker.admit(125.0), breaker.admit(125.0), breaker.admit(125.0)] == [3, 4, None]


def test_a_probe_that_never_reports_loses_its_permit_to_the_next() -> None:
    breaker = opened(probes=1, probe_timeout_s=4.0)
    breaker.tick(110.0)
    assert breaker.admit(110.0) == 1
    assert not breaker.has_permits(113.9)
    assert breaker.admit(113.9) is None
    assert breaker.has_permits(114.0)
    assert breaker.admit(114.0) == 2
    assert breaker.failed("k", "late", 115.0, 1) is None
    assert breaker.succeeded("k", 115.0, 2) is not None


def test_a_released_permit_is_given_again() -> None:
    breaker = opened()
    breaker.tick(110.0)
    permit = breaker.admit(110.0)
    assert permit
    breaker.release(permit)
    assert breaker.has_permits(110.0)
    assert breaker.admit(110.0) == permit + 1


def test_a_stale_probe_counts_for_nothing_in_a_closed_breaker() -> None:
    breaker = opened()
    breaker.tick(110.0)
    stale = breaker.admit(110.0)
    assert stale
    breaker.reset()
    for _ in range(THRESHOLD - 1):
        breaker.failed("k", "c", 111.0)
    assert breaker.failed("k", "stale", 111.0, stale) is None
    assert breaker.succeeded("k", 111.0, stale) is None  # nor does it forgive
    assert breaker.failed("k", "c", 111.0) is not None


def test_successes_in_bulk_count_only_while_it_is_closed() -> None:
    breaker: Breaker[str] = Breaker(ConsecutiveFailures(THRESHOLD), open_for_s=OPEN_FOR)
    for _ in range(THRESHOLD - 1):
        breaker.failed("k", "c", 1.0)
    breaker.count_successes(0, 1.0)  # none
    assert isinstance(breaker.rule, ConsecutiveFailures)
    assert breaker.rule.count == THRESHOLD - 1
    breaker.count_successes(1, 1.0)
    assert breaker.rule.count == 0
    breaker.failed("k", "c", 1.0)
    breaker.disable()
    breaker.count_successes(5, 1.0)
    assert breaker.rule.count == 1
    assert breaker.failed("k", "c", 1.0) is None
    assert breaker.rule.count == 1


def test_it_keeps_the_newest_causes_only() -> None:
    rule = ConsecutiveFailures[int](100)
    for n in range(100):
        rule.failed("k", n, 1.0)
    assert rule.causes() == tuple(range(84, 100))
    assert ConsecutiveFailures[int](1).tripped(0.0) == ""
    with pytest.raises(ConfigurationError):
        ConsecutiveFailures(0)
    with pytest.raises(ConfigurationError):
        Breaker(ConsecutiveFailures(), open_for_s=-0.1)
    assert Breaker(ConsecutiveFailures[int](), open_for_s=0).probe_timeout_s == 60
    assert ConsecutiveFailures[int]().threshold == 5


def test_states_compare_equal_to_their_names_in_any_case() -> None:
    assert BreakerState.HALF_OPEN == "HALF_OPEN"
    assert BreakerState.CLOSED == "closed"
    assert BreakerState.CLOSED != "OPEN"
    assert BreakerState.CLOSED != BreakerState.OPEN
    assert BreakerState.CLOSED != 1
    assert {BreakerState.OPEN: 1}[BreakerState.OPEN] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"open_for_s": -1.0},
        {"open_for_s": float("nan")},
        {"open_for_s": 1, "probes": 0},
        {"open_for_s": 1, "probe_timeout_s": 0},
    ],
)
def test_a_breaker_that_cannot_work_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        Breaker(ConsecutiveFailures(), **wrong)  # type: ignore[arg-type]


def test_probes_are_bounded_when_many_threads_ask_at_once() -> None:
    breaker: Breaker[str] = Breaker(ConsecutiveFailures(1), open_for_s=0, probes=3)
    breaker.failed("k", "c", 0.0)
    breaker.tick(1.0)
    permits: list[int | None] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        permits.extend(breaker.admit(1.0) for _ in range(50))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([p for p in permits if p is not None]) == 3


# The kill switch's rule: distinct deliveries in a window


def rule_of(minimum: int = 20, ratio: float = 0.5, window_s: float = 60.0) -> DistinctFailures[str]:
    return DistinctFailures(window_s, minimum, ratio)


@given(st.integers(1, 500), st.integers(0, 300), st.floats(0, 5))
def test_a_poison_message_alone_never_trips_it(retries: int, healthy: int, gap_s: float) -> None:
    poison, now = rule_of(), 0.0
    for attempt in range(retries):
        poison.failed("poison", "poison", now)
        if attempt < healthy:
            poison.succeeded(f"m{attempt}", now)
        assert not poison.tripped(now)
        now += gap_s
    assert len(poison.causes()) <= 1


def test_a_cold_start_with_no_success_at_all_trips_at_the_minimum() -> None:
    cold = rule_of()
    for n in range(19):
        cold.failed(n, f"cause {n}", 0.1 * n)
        assert not cold.tripped(0.1 * n)
    cold.failed(19, "cause 19", 2.0)
    assert "20 of 20" in cold.tripped(2.0)
    assert cold.causes()[-1] == "cause 19"


def test_half_failing_trips_and_less_does_not() -> None:
    for failing, trips in ((50, True), (49, False)):
        mixed = rule_of()
        for n in range(100):
            if n < failing:
                mixed.failed(n, "c", 1.0)
            else:
                mixed.succeeded(n, 1.0)
        assert bool(mixed.tripped(1.0)) is trips


def test_a_delivery_that_was_handled_at_last_is_no_longer_failing() -> None:
    healed = rule_of(minimum=4)
    for n in range(4):
        healed.failed(n, "c", 1.0)
    assert healed.tripped(1.0)
    for n in range(3):
        healed.succeeded(n, 2.0)
    assert not healed.tripped(2.0)
    assert len(healed.causes()) == 1


def test_what_lies_before_the_window_is_forgotten() -> None:
    old = rule_of(window_s=60)
    for n in range(40):
        old.failed(n, "c", 0.0)
    assert old.tripped(59.9)
    assert not old.tripped(60.0)
    assert old.causes() == ()
    for n in range(1000):
        old.succeeded(n, 0.0)  # successes long ago dilute nothing
    for n in range(20):
        old.failed(f"n{n}", "c", 100.0)
    assert "20 of 20" in old.tripped(100.0)


def test_successes_counted_in_bulk_count() -> None:
    bulk = rule_of()
    bulk.succeeded(None, 0.0, 1000)
    for n in range(100):
        bulk.failed(n, "c", 0.0)
    assert not bulk.tripped(0.0)


def test_memory_is_bounded_whatever_comes() -> None:
    flood = rule_of()
    for n in range(20_000):
        now = n * 0.01
        flood.failed(n, "c", now)
        flood.succeeded(-n, now)
    assert len(flood._failing) <= flood.FAILING_MAX
    assert len(flood._slices) <= flood.SLICES + 2
    assert len(flood.causes()) <= 32


class WindowModel:
    """The rule as its docstring says it, kept naively: every delivery's latest result and when."""

    def __init__(self) -> None:
        self.latest: dict[int, tuple[float, bool]] = {}

    def counts(self, now: float, window_s: float) -> tuple[int, int]:
        recent = [failed for at, failed in self.latest.values() if at > now - window_s]
        return sum(recent), len(recent)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.booleans(), st.sampled_from([0.0, 0.3, 2.0, 15.0])), max_size=200),
    st.integers(1, 20),
    st.sampled_from([0.1, 0.5, 1.0]),
)
def test_it_trips_as_a_naive_count_of_distinct_deliveries_would(
    results: list[tuple[int, bool, float]], minimum: int, ratio: float
) -> None:
    """Exact for failures; successes are kept in slices of a second, so near the window's edge either answer will do."""
    real, model, now = rule_of(minimum, ratio), WindowModel(), 0.0
    handled: set[int] = set()
    for key, failed, gap_s in results:
        now += gap_s
        if key in handled:
            continue  # a handled delivery never runs again
        model.latest[key] = (now, failed)
        if failed:
            real.failed(key, "c", now)
        else:
            handled.add(key)
            real.succeeded(key, now)

        def trips(counts: tuple[int, int]) -> bool:
            failing, seen = counts
            return seen >= minimum and failing >= ratio * seen

        failing = model.counts(now, 60.0)[0]
        allowed = {trips((failing, failing + n)) for n in _between(model, now)}
        assert bool(real.tripped(now)) in allowed


def _between(model: WindowModel, now: float) -> range:
    """How many successes the slices may count: all those surely inside, up to those not surely outside."""
    succeeded = [at for at, failed in model.latest.values() if not failed]
    surely = sum(at > now - 59.0 for at in succeeded)
    possibly = sum(at > now - 62.0 for at in succeeded)
    return range(surely, possibly + 1)


def test_a_delivery_that_fails_again_is_as_recent_as_its_last_failure() -> None:
    rule = rule_of()
    rule.failed("a", "a, once", 0.0)
    rule.failed("b", "b", 10.0)
    rule.failed("a", "a, again", 50.0)
    assert rule.causes() == ("b", "a, again")
    rule.failed("c", "c", 75.0)  # b is over; a is not
    assert rule.causes() == ("a, again", "c")


def test_a_reset_rule_remembers_nothing() -> None:
    rule = rule_of(minimum=4)
    for n in range(6):
        rule.failed(n, "c", 1.0)
        rule.succeeded(f"ok{n}", 1.0, 3)
    rule.reset()
    assert rule.causes() == ()
    for n in range(4):
        assert rule.tripped(1.0) == ""
        rule.failed(n, "c", 1.0)
    assert rule.tripped(1.0) == "4 of 4 deliveries failing within 60 s"
    consecutive = ConsecutiveFailures[str](1)
    consecutive.failed("k", "c", 1.0)
    consecutive.succeeded("k", 1.0)
    assert consecutive.causes() == ()


def test_successes_leave_with_their_slice() -> None:
    rule = rule_of(minimum=3, ratio=0.5)  # slices of one second
    rule.succeeded("x", 0.0, 2)
    rule.succeeded("y", 0.99, 1)  # in the same slice
    rule.succeeded("z", 1.0, 1)  # in the next
    rule.failed("k", "c", 59.0)
    rule.failed("l", "c", 59.0)
    assert rule.tripped(59.0) == ""  # 2 of 6
    assert rule.tripped(60.99) == ""
    assert rule.tripped(61.0) == "2 of 3 deliveries failing within 60 s"
    assert rule.tripped(62.0) == ""  # 2 of 2, and three are wanted


def test_the_failing_are_kept_up_to_the_limit_and_the_oldest_goes() -> None:
    rule = rule_of()
    assert rule.FAILING_MAX == 4096
    for n in range(4097):
        rule.failed(n, f"c{n}", 1.0)
    assert rule.tripped(1.0).startswith("4096 of 4096")
    rule.succeeded(0, 1.0)  # it went already
    assert rule.tripped(1.0).startswith("4096 of 4097")
    assert rule.causes() == tuple(f"c{n}" for n in range(4065, 4097))


def test_the_defaults_of_the_kill_switch_are_as_documented() -> None:
    rule = DistinctFailures[str]()
    assert (rule.window_s, rule.minimum, rule.ratio, rule.SLICES) == (60.0, 20, 0.5, 60)


def test_what_succeeded_already_takes_up_a_probe() -> None:
    breaker = opened(probes=3)
    breaker.tick(110.0)
    assert [breaker.admit(110.0), breaker.admit(110.0)] == [1, 2]
    assert breaker.succeeded("k", 110.0, 1) is None
    assert breaker.has_permits(110.0)
    assert [breaker.admit(110.0), breaker.admit(110.0)] == [3, None]
    assert not breaker.has_permits(110.0)
