"""The supervisor of a broker's connection, on dialers that play every kind of broker, in virtual time."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from glassbus.clock import SystemClock
from glassbus.config import Address, Credentials
from glassbus.errors import ConfigurationError, EndpointRefused, EndpointUnreachable, ErrorCategory, TransportError
from glassbus.facts import (
    BreakerStateChanged,
    ConnectionLost,
    ConnectionRestored,
    CredentialsRefreshed,
    Fact,
    RecoveryConcluded,
    RecoveryStarted,
    TransportFailed,
)
from glassbus.observer import Hub
from glassbus.policy.failover import Reconnect
from glassbus.recovery.endpoint import EndpointSupervisor
from glassbus.recovery.guard import ComponentBreakers
from glassbus.testing import RecordingObserver, VirtualClock, run_virtual

A, B, C = (Address(f"nats://{host}:4222") for host in "abc")


class Broker:
    """A dialer on brokers that are up, unreachable, hanging or picky about passwords."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.unreachable: set[str] = set()
        self.hanging: set[str] = set()
        self.password: str | None = None
        self.answers = True
        self.dials: list[tuple[float, str]] = []
        self.on: str | None = None
        self.under_way = 0
        self.raises: BaseException | None = None

    async def dial(self, address: Address, credentials: Credentials | None, /) -> None:
        assert self.under_way == 0, "one dial at a time"
        assert self.on is None, "it was not hung up"
        self.dials.append((self.clock.monotonic(), address.host))
        self.under_way += 1
        try:
            await asyncio.sleep(0.01)
            if address.host in self.hanging:
                await asyncio.Event().wait()
            if self.raises is not None:
                raise self.raises
            if address.host in self.unreachable:
                raise EndpointUnreachable(f"{address}: connection refused")
            shown = credentials.password if credentials is not None else address.credentials[1]
            if self.password is not None and shown != self.password:
                raise EndpointRefused(f"{address}: authorization violation")
        finally:
            self.under_way -= 1
        self.on = address.host

    async def hang_up(self) -> None:
        self.on = None

    async def probe(self) -> float:
        if not self.answers:
            await asyncio.Event().wait()
        if self.on is None:
            raise TransportError("not connected")
        return 0.001


class Watched:
    """A supervisor, its broker, and every fact stated."""

    def __init__(self, clock: VirtualClock, addresses: list[Address], **options: Any) -> None:
        self.clock = clock
        self.seen = RecordingObserver()
        self.hub = Hub(clock.wall, [self.seen])
        self.breakers = ComponentBreakers(self.hub, clock)
        self.broker = Broker(clock)
        self.supervisor = EndpointSupervisor(
            addresses, self.hub.state, breakers=self.breakers, clock=clock, uniform=random.Random(1).random, **options
        )

    def lose(self, error: BaseException | None = None) -> None:
        self.broker.on = None
        self.supervisor.lost(error or EndpointUnreachable("connection reset"))

    def story(self) -> list[str]:
        return [told(fact) for fact in self.seen.facts]

    async def back(self) -> float:
        started = self.clock.monotonic()
        await self.supervisor.connected()
        return self.clock.monotonic() - started


def told(fact: Fact) -> str:
    match fact:
        case RecoveryStarted():
            return f"start {fact.action} {_host(fact.target)}"
        case RecoveryConcluded():
            return f"{fact.outcome} {fact.action} {_host(fact.target)}"
        case BreakerStateChanged():
            return f"{_host(fact.breaker)} {fact.from_state}->{fact.to_state}"
        case ConnectionLost():
            return f"lost {_host(fact.endpoint)} {fact.category}"
        case ConnectionRestored():
            return f"restored {_host(fact.endpoint)}" + (f" from {_host(f)}" if (f := fact.failed_over_from) else "")
        case CredentialsRefreshed():
            return f"credentials {'new' if fact.succeeded else 'none'}"
    return type(fact).__name__


def _host(endpoint: str) -> str:
    return endpoint.removeprefix("nats://").removesuffix(":4222")


@asynccontextmanager
async def watched(clock: VirtualClock, *addresses: Address, **options: Any) -> Any:
    one = Watched(clock, list(addresses) or [A], **options)
    try:
        yield one
    finally:
        await one.supervisor.stop()
        assert one.broker.on is None
        assert one.broker.under_way == 0


def play(scenario: Callable[[VirtualClock], Awaitable[None]], limit_s: float = 86_400.0) -> None:
    async def run(clock: VirtualClock) -> None:
        await scenario(clock)

    run_virtual(run, limit_s=limit_s)


def test_a_first_connection_that_works_states_nothing() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock) as w:
            await w.supervisor.start(w.broker)
            assert w.supervisor.up()
            assert w.story() == []
            [now] = w.supervisor.connections()
            assert (now.endpoint, now.up, now.breaker) == ("nats://a:4222", True, "closed")
        assert not w.supervisor.up()
        assert w.story() == [], "a stop is no loss"

    play(scenario)


def test_a_loss_told_often_is_one_loss_and_the_facts_are_exactly_these() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock) as w:
            await w.supervisor.start(w.broker)
            await asyncio.sleep(60)
            for _ in range(3):
                w.lose()
            assert not w.supervisor.up()
            assert await w.back() < 0.2
            assert w.story() == [
                "lost a connection_error",
                "start reconnect a",
                "succeeded reconnect a",
                "restored a",
            ]

    play(scenario)


def test_a_broker_away_for_an_hour_is_dialled_at_a_pace_and_found_within_seconds() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock) as w:
            await w.supervisor.start(w.broker)
            await asyncio.sleep(60)
            w.broker.unreachable.add("a")
            w.lose()
            lost_at = clock.monotonic()
            await asyncio.sleep(3600)
            assert len(w.broker.dials) < 3600 / 2, "no hammering"
            w.broker.unreachable.clear()
            assert await w.back() < 4
            [restored] = w.seen.of(ConnectionRestored)
            assert restored.after_s == pytest.approx(clock.monotonic() - lost_at)
            assert restored.attempts == len(w.broker.dials) - 1
            assert w.story().count("lost a connection_error") == 1
            assert {"a closed->open", "endpoint/connection_error closed->open"} < set(w.story())
            assert w.supervisor.connections()[0].breaker == "closed"
            assert w.breakers.state("endpoint", ErrorCategory.CONNECTION_ERROR) == "closed"
            started, concluded = w.seen.of(RecoveryStarted), w.seen.of(RecoveryConcluded)
            assert len(started) == len(concluded) == restored.attempts

    play(scenario)


def test_it_fails_over_through_a_set_of_three_and_stays_there() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock, A, B, C) as w:
            await w.supervisor.start(w.broker)
            await asyncio.sleep(60)
            w.broker.unreachable |= {"a", "b"}
            w.lose()
            assert await w.back() < 5
            assert w.broker.on == "c"
            assert w.story()[-1] == "restored c from a"
            assert "failed failover b" in w.story()
            assert [c.up for c in w.supervisor.connections()] == [False, False, True]
            w.broker.unreachable.clear()
            await asyncio.sleep(3600)
            assert w.broker.on == "c", "no going back while it works"
            w.seen.clear()
            w.lose()
            await w.back()
            assert w.story()[-1] == "restored c"

    play(scenario)


def test_a_hanging_endpoint_costs_its_timeout_and_then_the_next_is_tried() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock, A, B, settings=Reconnect(dial_timeout=3.0)) as w:
            await w.supervisor.start(w.broker)
            await asyncio.sleep(60)
            w.broker.hanging.add("a")
            w.lose()
            assert await w.back() < 4
            assert w.broker.on == "b"

    play(scenario)


def test_a_partition_is_noticed_by_the_probe() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock) as w:
            await w.supervisor.start(w.broker)
            await asyncio.sleep(60)
            w.broker.answers = False
            cut_at = clock.monotonic()
            while not w.seen.of(ConnectionLost):
                await asyncio.sleep(0.1)
            assert clock.monotonic() - cut_at < 7
            [lost] = w.seen.of(ConnectionLost)
            assert "round trip failed: no answer within 3 s" in lost.error

    play(scenario)


def test_round_trips_are_made_and_their_age_is_known() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock) as w:
            await w.supervisor.start(w.broker)
            for _ in range(50):
                await asyncio.sleep(1.7)
                assert w.supervisor.connections()[0].round_trip_age_s < 3.5

    play(scenario)


# Credentials


def test_credentials_are_refreshed_once_and_the_facts_are_exactly_these() -> None:
    asked = 0

    async def fresh() -> Credentials:
        nonlocal asked
        asked += 1
        return Credentials("user", "new")

    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock, Address("nats://user:old@a:4222"), credentials=fresh) as w:
            w.broker.password = "old"
            await w.supervisor.start(w.broker)
            assert asked == 0, "the URL has some"
            await asyncio.sleep(60)
            w.broker.password = "new"
            w.lose()
            assert await w.back() < 1
            assert asked == 1
            assert w.story() == [
                "lost a connection_error",
                "start reconnect a",
                "failed reconnect a",
                "start refresh_credentials a",
                "credentials new",
                "succeeded refresh_credentials a",
                "restored a",
            ]
            await asyncio.sleep(60)
            w.lose()
            await w.back()
            assert asked == 1, "what was given is used from then on"

    play(scenario)


def test_refused_again_is_forced_open_and_not_dialled_for_minutes() -> None:
    def stale() -> tuple[str, str]:
        return "user", "old"

    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock, Address("nats://user:old@a:4222"), credentials=stale) as w:
            w.broker.password = "old"
            await w.supervisor.start(w.broker)
            await asyncio.sleep(60)
            w.broker.password = "new"
            w.lose()
            await asyncio.sleep(299)
            assert w.story() == [
                "lost a connection_error",
                "start reconnect a",
                "failed reconnect a",
                "start refresh_credentials a",
                "credentials new",
                "failed refresh_credentials a",
                "a closed->forced_open",
            ]
            assert len(w.broker.dials) == 3
            [forced] = w.seen.of(BreakerStateChanged)
            assert forced.reason == "credentials refused"
            w.broker.password = "old"
            assert await w.back() < 60, "it looks again after five minutes"
            assert w.story()[-2:] == ["a forced_open->closed", "restored a"]

    play(scenario)


def test_an_operator_mends_it_at_once() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock, Address("nats://user:old@a:4222")) as w:
            w.broker.password = "old"
            await w.supervisor.start(w.broker)
            await asyncio.sleep(60)
            w.broker.password = "new"
            w.lose()
            await asyncio.sleep(10)
            assert w.story()[-3:] == [
                "start refresh_credentials a",
                "failed refresh_credentials a",
                "a closed->forced_open",
            ]
            with pytest.raises(EndpointRefused, match="authorization violation"):
                await w.supervisor.reconnect()
            assert len(w.broker.dials) == 3
            w.broker.password = "old"
            await w.supervisor.reconnect()
            assert w.supervisor.up()
            assert w.story()[-1] == "restored a"
            await w.supervisor.reconnect()
            assert len(w.broker.dials) == 4, "nothing to do"

    play(scenario)


def test_a_set_whose_endpoints_all_refuse_asks_once_and_dials_each_once() -> None:
    asked = 0

    def stale() -> Credentials:
        nonlocal asked
        asked += 1
        return Credentials("user", "old")

    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock, A, B, C, credentials=stale) as w:
            await w.supervisor.start(w.broker)
            before = asked
            await asyncio.sleep(60)
            w.broker.password = "new"
            w.lose()
            await asyncio.sleep(250)
            assert asked == before + 1
            assert [host for _, host in w.broker.dials[1:]] == ["a", "a", "b", "c"]
            assert [c.breaker for c in w.supervisor.connections()] == ["forced_open"] * 3

    play(scenario)


@pytest.mark.parametrize("kind", ["raises", "exits", "hangs", "hangs_on_its_thread", "lies", "odd", "empty", "cancels"])
def test_whatever_the_credentials_function_does_is_a_fact_and_no_more(kind: str) -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise SystemExit("no text")

    def function(clock: VirtualClock) -> Callable[[], Any]:
        async def hangs() -> Credentials:
            await asyncio.Event().wait()
            raise AssertionError

        async def cancels() -> Credentials:
            raise asyncio.CancelledError

        def thrown(error: BaseException) -> Callable[[], Any]:
            def throw() -> Any:
                raise error

            return throw

        return {
            "raises": thrown(OSError("vault is away: https://user:secret@vault/x")),
            "exits": thrown(SystemExit(3)),
            "hangs": hangs,
            "hangs_on_its_thread": lambda: clock.sleep(1e6),
            "lies": lambda: "secret",
            "odd": thrown(Odd()),
            "empty": lambda: Credentials(),
            "cancels": cancels,
        }[kind]

    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock, Address("nats://user:old@a:4222"), credentials=function(clock)) as w:
            w.broker.password = "old"
            await w.supervisor.start(w.broker)
            await asyncio.sleep(60)
            w.broker.password = "new"
            w.lose()
            await asyncio.sleep(10)
            [refreshed] = w.seen.of(CredentialsRefreshed)
            assert not refreshed.succeeded
            assert refreshed.error
            assert "secret" not in str(w.seen.facts)
            assert w.story()[-1] == "a closed->forced_open"
            await w.supervisor.stop()

    play(scenario)


def test_without_credentials_in_the_url_they_are_asked_for_first() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock, credentials=lambda: ("user", "word")) as w:
            w.broker.password = "word"
            await w.supervisor.start(w.broker)
            assert w.story() == []

    play(scenario)


# Starting


def test_a_start_that_finds_no_broker_in_time_raises_why() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock, A, B) as w:
            w.broker.unreachable |= {"a", "b"}
            started = clock.monotonic()
            with pytest.raises(EndpointUnreachable, match="connection refused"):
                await w.supervisor.start(w.broker)
            assert 10 <= clock.monotonic() - started < 12
            dials = len(w.broker.dials)
            await asyncio.sleep(60)
            assert len(w.broker.dials) == dials, "it has stopped"

    play(scenario)


def test_a_start_waits_for_the_try_that_is_under_way_when_its_time_is_over() -> None:
    """A large store takes long to read."""

    async def scenario(clock: VirtualClock) -> None:
        class Large(Broker):
            async def dial(self, address: Address, credentials: Credentials | None, /) -> None:
                await asyncio.sleep(25)
                await super().dial(address, credentials)

        w = Watched(clock, [A])
        w.broker = Large(clock)
        await w.supervisor.start(w.broker)
        assert w.supervisor.up()
        await w.supervisor.stop()

    play(scenario)


def test_a_closed_breaker_keeps_no_dial_waiting_on_a_clock_that_runs() -> None:
    clock = SystemClock()
    breakers = ComponentBreakers(Hub(clock.wall), clock)
    now = clock.monotonic()
    assert breakers.ready_at("endpoint", ErrorCategory.CONNECTION_ERROR) <= now


def test_a_start_waits_for_a_broker_that_comes() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock) as w:
            w.broker.unreachable.add("a")
            asyncio.get_running_loop().call_later(5, w.broker.unreachable.clear)
            await w.supervisor.start(w.broker)
            assert w.story()[0] == "lost a connection_error"
            assert w.story()[-1] == "restored a"

    play(scenario)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (EndpointRefused("no"), EndpointRefused),
        (TransportError("JetStream is off"), TransportError),
        (ConfigurationError("a stream of another program"), ConfigurationError),
    ],
)
def test_a_start_that_cannot_succeed_raises_at_once(error: BaseException, raised: type[BaseException]) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock) as w:
            w.broker.raises = error
            started = clock.monotonic()
            with pytest.raises(raised, match=str(error)):
                await w.supervisor.start(w.broker)
            assert clock.monotonic() - started < 1

    play(scenario)


def test_a_cancelled_start_leaves_nothing_behind_and_counts_nothing() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock) as w:
            w.broker.hanging.add("a")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await w.supervisor.start(w.broker)
            assert w.story() == []

    play(scenario)


def test_a_stop_in_the_middle_of_a_recovery_calls_it_off_uncounted() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock) as w:
            await w.supervisor.start(w.broker)
            await asyncio.sleep(60)
            w.broker.hanging.add("a")
            w.lose()
            await asyncio.sleep(0.5)
            await w.supervisor.stop()
            [concluded] = w.seen.of(RecoveryConcluded)
            assert concluded.outcome == "called_off"
            [view] = w.breakers.views()
            assert view.failed_count == 0
            await w.supervisor.stop()

    play(scenario)


# Dialers that lie


class Hostile(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "error",
    [Hostile(), SystemExit(1), asyncio.CancelledError(), MemoryError(), OSError(111, "refused"), StopIteration()],
)
def test_whatever_a_dial_raises_on_reconnecting_is_a_failed_dial(error: BaseException) -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock) as w:
            await w.supervisor.start(w.broker)
            await asyncio.sleep(60)
            w.broker.raises = error
            w.lose()
            await asyncio.sleep(30)
            w.broker.raises = None
            assert await w.back() < 4
            assert w.seen.of(TransportFailed) == []

    play(scenario)


def test_a_dial_that_ignores_its_cancellation_holds_nothing_up() -> None:
    async def scenario(clock: VirtualClock) -> None:
        class Deaf(Broker):
            deaf = False

            async def dial(self, address: Address, credentials: Credentials | None, /) -> None:
                if self.deaf:
                    until = clock.monotonic() + 60
                    while clock.monotonic() < until:
                        try:
                            await asyncio.sleep(60)
                        except asyncio.CancelledError:
                            continue
                await super().dial(address, credentials)

        w = Watched(clock, [A], settings=Reconnect(dial_timeout=3.0))
        w.broker = deaf = Deaf(clock)
        await w.supervisor.start(deaf)
        await asyncio.sleep(60)
        deaf.deaf = True
        w.lose()
        await asyncio.sleep(5)
        deaf.deaf = False
        assert await w.back() < 6
        deaf.deaf = True
        started = clock.monotonic()
        await w.supervisor.stop()
        assert clock.monotonic() - started < 5

    play(scenario)


def test_a_hang_up_that_raises_or_hangs_is_stated_and_passed_over() -> None:
    async def scenario(clock: VirtualClock) -> None:
        w = Watched(clock, [A])

        async def hang_up() -> None:
            w.broker.on = None
            raise ValueError("no line")

        w.broker.hang_up = hang_up  # type: ignore[method-assign]
        await w.supervisor.start(w.broker)
        await asyncio.sleep(60)
        w.lose()
        assert await w.back() < 1
        assert [f.operation for f in w.seen.of(TransportFailed)] == ["hang_up"]
        await w.supervisor.stop()

    play(scenario)


def test_a_loss_told_while_dialling_fails_that_dial() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock) as w:
            await w.supervisor.start(w.broker)
            await asyncio.sleep(60)
            w.lose()
            while w.broker.under_way == 0:
                await asyncio.sleep(0.001)
            w.supervisor.lost(EndpointUnreachable("broke while it was made ready"))
            await w.back()
            assert w.story()[1:5] == [
                "start reconnect a",
                "failed reconnect a",
                "start reconnect a",
                "succeeded reconnect a",
            ]

    play(scenario)


def test_a_storm_of_resets_does_not_make_a_storm_of_dials() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock) as w:
            await w.supervisor.start(w.broker)
            until = clock.monotonic() + 30
            while clock.monotonic() < until:
                await asyncio.sleep(0.05)
                if w.supervisor.up():
                    w.lose()
            assert len(w.broker.dials) < 60
            assert await w.back() < 3
            await asyncio.sleep(10)
            assert w.supervisor.up()

    play(scenario)


def test_a_supervisor_starts_once_and_credentials_are_a_function() -> None:
    async def scenario(clock: VirtualClock) -> None:
        async with watched(clock) as w:
            await w.supervisor.start(w.broker)
            with pytest.raises(TransportError, match="started before"):
                await w.supervisor.start(w.broker)
            await w.supervisor.stop()
            with pytest.raises(TransportError, match="does not run"):
                await w.supervisor.reconnect()

    play(scenario)


def test_two_supervisors_on_one_seed_dial_at_the_same_times() -> None:
    def run() -> list[tuple[float, str]]:
        dials: list[tuple[float, str]] = []

        async def scenario(clock: VirtualClock) -> None:
            async with watched(clock, A, B, settings=Reconnect(refused_again=math.inf)) as w:
                await w.supervisor.start(w.broker)
                w.broker.unreachable |= {"a", "b"}
                w.lose()
                await asyncio.sleep(60)
                dials.extend(w.broker.dials)

        play(scenario)
        return dials

    assert run() == run()
