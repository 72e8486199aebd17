"""The life of a bus: drain, stop, pause, breakers, dead letters, several buses; and nothing lost at any step of it."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any

import pytest
from suite import House, Store

from glassbus import (
    BusNotRunning,
    ConfigurationError,
    GlassbusError,
    HealthStatus,
    KillSwitch,
    Message,
    MessageBus,
    Outgoing,
    PublishUncertain,
    QueueFull,
    Retry,
    SubscriptionExists,
    TransportError,
    UnknownDeadLetter,
    UnknownSubscription,
)
from glassbus.facts import (
    BreakerStateChanged,
    BusStopped,
    DeliveryGivenBack,
    DeliveryHandled,
    Fact,
    SubscriptionDeclared,
    SubscriptionForgotten,
    SubscriptionPaused,
    SubscriptionResumed,
)
from glassbus.message import check_topic
from glassbus.observer import Observer
from glassbus.testing import expect_facts

QUICK = Retry(max_attempts=3, base_delay=0.1, max_delay=0.1)
SWITCH = KillSwitch(window=60.0, minimum=4, ratio=0.5, open_for=5.0, probes=2)


async def nothing(message: Message) -> None:
    """Handles anything."""


# Drain


def test_drain_waits_for_retries_and_for_what_handlers_publish(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, done = house.bus(), []

        @bus.subscribe("first.*", retry=Retry(immediate=0, base_delay=100.0, max_delay=100.0))
        async def first(message: Message, delivery: Any) -> None:
            if delivery.attempt == 1:
                raise ValueError
            await bus.publish("second.x")

        @bus.subscribe("second.*")
        async def second(message: Message) -> None:
            await asyncio.sleep(1)
            done.append(message.topic)

        async with bus:
            await bus.publish("first.x")
            assert await bus.drain() == set()
            assert done == ["second.x"]

    store.run_bus(scenario)


def test_drain_names_what_it_leaves_and_why(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()
        for name in ("paused", "forced", "later", "done"):
            bus.subscribe(f"{name}.*", name=name)(nothing)
        async with bus:
            await bus.pause("paused")
            await bus.breakers["forced"].force_open()
            for name in ("paused", "forced", "done"):
                await bus.publish(f"{name}.x")
            await bus.publish("later.x", delay=1000)
            left = await bus.drain()
            assert left.reasons == {"paused": "paused", "forced": "breaker_open", "later": "due_later"}
            assert bus.ledger().accounts["done"].handled == 1

    store.run_bus(scenario)


def test_drain_gives_up_after_its_timeout(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()

        @bus.subscribe("orders.*", timeout=100.0)
        async def slow(message: Message) -> None:
            await asyncio.sleep(50)

        async with bus:
            await bus.publish("orders.created")
            started = house.clock.monotonic()
            with pytest.raises(TimeoutError):
                await bus.drain(timeout=3.0)
            assert house.clock.monotonic() - started == pytest.approx(3, abs=0.1)
            assert await bus.drain() == set()

    store.run_bus(scenario)


# Stop


def test_stop_lets_running_handlers_finish_and_gives_the_rest_back(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, done = house.bus(), []

        @bus.subscribe("orders.*", name="s", concurrency=2)
        async def slow(payload: int) -> None:
            await asyncio.sleep(5)
            done.append(payload)

        await bus.start()
        await bus.publish_many([("orders.created", n) for n in range(6)])
        await asyncio.sleep(1)
        await bus.stop(10)
        assert sorted(done) == [0, 1]
        (stopped,) = house.seen.of(BusStopped)
        assert stopped.within_deadline
        assert (stopped.given_back, stopped.discarded) == ((4, 0) if store.backend.keeps else (0, 4))
        await all_come_back(house, done, {0, 1, 2, 3, 4, 5})

    store.run_bus(scenario)


async def all_come_back(house: House, done: list[int], everything: set[int]) -> None:
    """Where the store keeps messages, the next bus handles the rest at attempt 1; elsewhere they were told gone."""
    if not house.store.backend.keeps:
        names = Counter(house.seen.names())
        assert len(set(done)) + names["DeliveryDiscarded"] == len(everything)
        return
    again = house.bus()

    @again.subscribe("orders.*", name="s")
    async def rest(payload: int, delivery: Any) -> None:
        assert delivery.attempt == 1
        done.append(payload)

    async with again:
        await again.drain()
        assert set(done) == everything
        assert again.ledger().balanced


def test_what_outlasts_the_deadline_is_cancelled_and_given_back_uncharged(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, done = house.bus(), []

        @bus.subscribe("orders.*", name="s", concurrency=2, timeout=1000.0)
        async def slow(payload: int) -> None:
            await asyncio.sleep(500)

        await bus.start()
        await bus.publish_many([("orders.created", n) for n in range(4)])
        await asyncio.sleep(1)
        started = house.clock.monotonic()
        await bus.stop(3.0)
        assert house.clock.monotonic() - started == pytest.approx(3, abs=0.6)
        assert {f.reason for f in house.seen.of(DeliveryGivenBack)} == {"stopping"}
        assert len(house.seen.of(DeliveryGivenBack)) == 2
        assert "AttemptFailed" not in house.seen.names()
        await all_come_back(house, done, {0, 1, 2, 3})

    store.run_bus(scenario)


def test_a_handler_that_runs_when_the_bus_stops_may_still_publish(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, attempts = house.bus(), []

        @bus.subscribe("first.*", name="first", retry=Retry(max_attempts=1))
        async def first(message: Message, delivery: Any) -> None:
            attempts.append(delivery.attempt)
            await asyncio.sleep(2)
            await bus.publish("second.x")

        @bus.subscribe("second.*", name="second")
        async def second(message: Message) -> None: ...

        async with bus:
            await bus.publish("first.x")
            await asyncio.sleep(1)
            stopping = asyncio.create_task(bus.stop(10.0))
            await asyncio.sleep(0.5)
            with pytest.raises(BusNotRunning, match="is stopping"):  # from anywhere else it takes no more
                await bus.publish("second.x")
            await stopping
        total = bus.ledger().total
        assert (attempts, total.handled, total.dead_lettered, total.accepted) == ([1], 1, 0, 2)

    store.run_bus(scenario)


def test_handlers_of_a_backlog_may_publish_from_the_first_moment(store: Store) -> None:
    if not store.backend.keeps:
        pytest.skip("it starts with nothing")

    async def scenario(house: House) -> None:
        before = house.bus()
        before.subscribe("first.*", name="first")(nothing)
        async with before:
            await before.publish_many([Outgoing("first.x", delay=1.0)] * 4)
        await asyncio.sleep(2)  # due while nobody runs
        bus = house.bus()

        @bus.subscribe("first.*", name="first", retry=Retry(max_attempts=1))
        async def first(message: Message) -> None:
            await bus.publish("second.x")

        @bus.subscribe("second.*", name="second")
        async def second(message: Message) -> None: ...

        async with bus:
            await bus.drain()
            assert (bus.ledger().total.handled, bus.ledger().total.dead_lettered) == (8, 0)

    store.run_bus(scenario)


def test_a_handler_that_ignores_the_stop_holds_nothing_up(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, let_go = house.bus(), asyncio.Event()

        @bus.subscribe("orders.*", name="s", timeout=1000.0)
        async def stubborn(payload: int) -> None:
            while not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue

        await bus.start()
        await bus.publish("orders.created", 0)
        await asyncio.sleep(1)
        started = house.clock.monotonic()
        await bus.stop(2.0)
        assert house.clock.monotonic() - started <= 5
        let_go.set()
        await asyncio.sleep(1)
        await all_come_back(house, [], {0})

    store.run_bus(scenario)


def test_a_stopped_bus_takes_nothing_and_starts_once(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()
        bus.subscribe("orders.*", name="s")(nothing)
        with pytest.raises(BusNotRunning, match=r"not|new"):
            await bus.publish("orders.created")
        async with bus:
            with pytest.raises(ConfigurationError):
                await bus.start()
        with pytest.raises(BusNotRunning):
            await bus.publish("orders.created")
        await bus.stop()
        with pytest.raises(ConfigurationError):
            await bus.start()
        with pytest.raises(ConfigurationError):
            bus.subscribe("x")(nothing)
        assert house.seen.names().count("BusStopped") == 1
        assert house.seen.names().count("PublishRefused") == 2

    store.run_bus(scenario)


def test_a_handler_cannot_wait_for_its_own_stop_but_can_begin_it(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, seen, tasks = house.bus(), [], []

        @bus.subscribe("orders.*", name="s")
        async def stops(message: Message) -> None:
            try:
                await bus.stop()
            except GlassbusError as error:
                seen.append(str(error))
            tasks.append(asyncio.ensure_future(bus.stop(5)))

        await bus.start()
        await bus.publish("orders.created")
        await asyncio.sleep(1)
        await asyncio.gather(*tasks)
        assert len(seen) == 1
        assert not bus.running
        assert house.seen.names().count("DeliveryHandled") == 1

    store.run_bus(scenario)


def test_a_subscription_that_could_not_be_forgotten_goes_on(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, done = house.bus(), []

        @bus.subscribe("orders.*", name="s")
        async def take(payload: int) -> None:
            done.append(payload)

        async with bus:
            transport = bus._transport
            real = transport.forget

            async def fails(name: str, /) -> int:
                raise TransportError("disk full")

            transport.forget = fails
            with pytest.raises(TransportError, match="disk full"):
                await bus.forget("s")
            transport.forget = real
            await asyncio.sleep(1)
            await bus.publish("orders.created", 1)
            await bus.drain()
            assert done == [1]
            assert await bus.forget("s") == 0

    store.run_bus(scenario)


def test_two_stops_at_once_are_one(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()

        @bus.subscribe("orders.*", name="s")
        async def slow(message: Message) -> None:
            await asyncio.sleep(3)

        await bus.start()
        await bus.publish("orders.created")
        await asyncio.sleep(1)
        await asyncio.gather(bus.stop(10), bus.stop(10), bus.stop(0.5))
        assert house.seen.names().count("BusStopped") == 1
        assert house.seen.names().count("DeliveryHandled") == 1

    store.run_bus(scenario)


# Pause


def test_a_paused_subscription_keeps_its_messages_until_it_is_resumed(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, got = house.bus(), []

        @bus.subscribe("orders.*", name="s")
        async def handler(payload: int) -> None:
            got.append(payload)

        async with bus:
            with expect_facts(bus, SubscriptionPaused):
                await bus.pause("s")
            for n in range(3):
                await bus.publish("orders.created", n)
            await asyncio.sleep(10)
            assert got == []
            assert bus.ledger().accounts["s"].ready == 3
            with expect_facts(bus, SubscriptionResumed):
                await bus.resume("s")
            await bus.drain()
            assert got == [0, 1, 2]
            with pytest.raises(UnknownSubscription):
                await bus.pause("nobody")

    store.run_bus(scenario)


@pytest.mark.needs("durable")
def test_a_pause_outlives_the_process(store: Store) -> None:
    async def scenario(house: House) -> None:
        first = house.bus()
        first.subscribe("orders.*", name="s")(nothing)
        async with first:
            await first.pause("s")
            await first.publish("orders.created")
        second = house.bus()
        second.subscribe("orders.*", name="s")(nothing)
        async with second:
            assert (await second.drain()).reasons == {"s": "paused"}
            await second.resume("s")
            assert await second.drain() == set()
            assert second.ledger().accounts["s"].handled == 1

    store.run_bus(scenario)


# The kill switch


def test_the_kill_switch_pauses_keeps_probes_and_heals(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, healthy, runs = house.bus(), False, []

        @bus.subscribe("orders.*", name="s", retry=Retry(max_attempts=50, base_delay=0.5), kill_switch=SWITCH)
        async def handler(payload: int) -> None:
            runs.append(house.clock.monotonic())
            if not healthy:
                raise ConnectionError("downstream is away")

        async with bus:
            for n in range(12):
                await bus.publish("orders.created", n)
            await asyncio.sleep(3)
            assert bus.breakers["s"].state == "OPEN"
            moved = house.seen.of(BreakerStateChanged)[0]
            assert (moved.from_state, moved.to_state, moved.kind) == ("closed", "open", "subscription")
            assert len({cause.envelope.id for cause in moved.causes}) >= 4
            assert bus.health().status is not HealthStatus.HEALTHY
            tripped_after = len(runs)
            await asyncio.sleep(1)
            assert len(runs) == tripped_after  # nothing runs while it is open
            account = bus.ledger().accounts["s"]
            assert account.pending + account.in_flight == 12
            await asyncio.sleep(60)
            # Half-open lets at most two probes run each time; each failure opens it again.
            assert len(runs) - tripped_after <= 2 * (60 / SWITCH.open_for + 1)
            healthy = True
            await asyncio.sleep(30)
            assert await bus.drain() == set()
            assert bus.breakers["s"].state == "CLOSED"
            assert bus.ledger().accounts["s"].handled == 12
        states = [(f.from_state, f.to_state) for f in house.seen.of(BreakerStateChanged)]
        assert set(states) == {
            ("closed", "open"),
            ("open", "half_open"),
            ("half_open", "open"),
            ("half_open", "closed"),
        }
        assert states[-1] == ("half_open", "closed")
        assert "DeliveryDeadLettered" not in house.seen.names()

    store.run_bus(scenario)


def test_a_forced_breaker_stays_until_it_is_reset(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, got = house.bus(), []

        @bus.subscribe("orders.*", name="s", kill_switch=SWITCH)
        async def handler(payload: int) -> None:
            got.append(payload)

        async with bus:
            await bus.breakers["s"].force_open()
            await bus.publish("orders.created", 1)
            await asyncio.sleep(100)
            assert got == []
            assert bus.breakers["s"].state == "FORCED_OPEN"
            await bus.breakers["s"].reset()
            await bus.drain()
            assert got == [1]
            assert bus.breakers["s"].state == "CLOSED"
            with pytest.raises(UnknownSubscription):
                _ = bus.breakers["nobody"]

    store.run_bus(scenario)


def test_a_disabled_kill_switch_never_trips(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()

        @bus.subscribe("orders.*", name="s", retry=QUICK, kill_switch=SWITCH)
        async def handler(payload: int) -> None:
            raise ConnectionError

        async with bus:
            await bus.breakers["s"].disable()
            for n in range(12):
                await bus.publish("orders.created", n)
            await bus.drain()
            assert bus.ledger().accounts["s"].dead_lettered == 12
        assert {f.to_state for f in house.seen.of(BreakerStateChanged)} == {"disabled"}

    store.run_bus(scenario)


# Subscriptions and dead letters


def test_subscriptions_can_come_while_the_bus_runs(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus, got = house.bus(), []
        async with bus:
            with expect_facts(bus, SubscriptionDeclared):

                @bus.subscribe("orders.*", name="late")
                async def late(payload: int) -> None:
                    got.append(payload)

                receipt = await bus.publish("orders.created", 1)
                assert receipt.subscriptions == ("late",)
                await bus.drain()
            assert got == [1]
            with pytest.raises(SubscriptionExists):
                bus.subscribe("x", name="late")(nothing)

    store.run_bus(scenario)


def test_a_forgotten_subscription_is_gone(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()
        bus.subscribe("orders.*", name="s")(nothing)
        async with bus:
            await bus.pause("s")
            await bus.publish_many([("orders.created", n) for n in range(3)])
            with expect_facts(bus, SubscriptionForgotten):
                assert await bus.forget("s") == 3
            assert (await bus.publish("orders.created")).subscriptions == ()
            assert bus.ledger().gone.discarded == 3
            with pytest.raises(UnknownSubscription):
                await bus.forget("s")
            bus.subscribe("orders.*", name="s")(nothing)
            await bus.publish("orders.created")
            await bus.drain()
            assert bus.ledger().accounts["s"].handled == 1

    store.run_bus(scenario)


def test_dead_letters_can_be_looked_at_and_discarded(store: Store) -> None:
    async def scenario(house: House) -> None:
        bus = house.bus()

        @bus.subscribe("orders.*", name="s", retry=Retry(max_attempts=1))
        async def broken(message: Message) -> None:
            raise ValueError(message.payload)

        async with bus:
            for n in range(5):
                await bus.publish("orders.created", f"n{n}")
            await bus.drain()
            dead = await bus.dead_letters.list()
            assert [d.report.message for d in dead] == ["n4", "n3", "n2", "n1", "n0"]
            assert len(await bus.dead_letters.list(2)) == 2
            assert len(await bus.dead_letters.list(before=dead[1].id)) == 3
            assert await bus.dead_letters.discard(dead[0].id, dead[1].id) == 2
            with pytest.raises(UnknownDeadLetter):
                await bus.dead_letters.get(dead[0].id)
            with pytest.raises(UnknownDeadLetter):
                await bus.dead_letters.replay(dead[2].id, dead[0].id)
            total = bus.ledger().total
            assert (total.dead_lettered, total.discarded, total.accepted) == (3, 2, 5)
        assert house.seen.names().count("DeadLetterDiscarded") == 2

    store.run_bus(scenario)


@pytest.mark.needs("multi_process")
def test_two_buses_on_one_store_share_the_work(store: Store) -> None:
    async def scenario(house: House) -> None:
        done: list[tuple[str, int]] = []

        def make(name: str) -> MessageBus:
            bus = house.bus(name=name)

            @bus.subscribe("orders.*", name="s", concurrency=2)
            async def handler(payload: int) -> None:
                await asyncio.sleep(0.5)
                done.append((name, payload))

            return bus

        one, two = make("one"), make("two")
        async with one, two:
            await one.publish_many([("orders.created", n) for n in range(20)])
            await two.publish_many([("orders.created", n) for n in range(20, 40)])
            assert await one.drain() == set()
            assert sorted(n for _, n in done) == list(range(40))
            assert {name for name, _ in done} == {"one", "two"}
            assert one.ledger() == two.ledger()
            await one.pause("s")
            await asyncio.sleep(2)  # the other one learns of it from the store
            await two.publish("orders.created", 99)
            assert (await two.drain()).reasons == {"s": "paused"}

    store.run_bus(scenario)


@pytest.mark.needs("durable")
def test_a_subscription_collects_while_nobody_runs_it(store: Store) -> None:
    async def scenario(house: House) -> None:
        first = house.bus()
        first.subscribe("orders.*", name="s")(nothing)
        async with first:
            await first.drain()
        publisher, got = house.bus(), []
        async with publisher:
            assert (await publisher.publish("orders.created", 1)).subscriptions == ("s",)
        third = house.bus()

        @third.subscribe("orders.*", name="s")
        async def handler(payload: int) -> None:
            got.append(payload)

        async with third:
            await third.drain()
        assert got == [1]

    store.run_bus(scenario)


# Cancellation


Action = Callable[[MessageBus], Coroutine[Any, Any, Any]]
ACTIONS: dict[str, Action] = {
    "publish": lambda bus: bus.publish("orders.created", 100, message_id="swept"),
    "publish_many": lambda bus: bus.publish_many([("orders.created", n) for n in (100, 101)]),
    "drain": lambda bus: bus.drain(),
    "stop": lambda bus: bus.stop(5.0),
    "forget": lambda bus: bus.forget("other"),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 7, 10, 15])
def test_whatever_is_cancelled_wherever_nothing_is_lost(store: Store, action: str, steps: int) -> None:
    """Cancel one call after so many turns of the loop; then every accepted message is handled or told gone."""

    async def scenario(house: House) -> None:
        bus = house.bus(capacity=50)
        handled: Counter[int] = Counter()

        def serve(on: MessageBus) -> None:
            @on.subscribe("orders.*", name="s", concurrency=3)
            async def handler(payload: int) -> None:
                await asyncio.sleep(0.01)
                handled[payload] += 1

            on.subscribe("other.*", name="other")(nothing)

        serve(bus)
        await bus.start()
        await bus.publish_many([("orders.created", n) for n in range(8)])
        task = asyncio.ensure_future(ACTIONS[action](bus))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert not isinstance(outcome, Exception) or isinstance(outcome, PublishUncertain), outcome
        await asyncio.sleep(1)
        if bus.running:
            if action == "publish":  # the same id is safe to publish again
                await bus.publish("orders.created", 100, message_id="swept")
            await bus.drain()
            ledger = bus.ledger()
            assert ledger.balanced
            assert ledger.accounts["s"].handled == ledger.accounts["s"].accepted
            assert ledger.accounts["s"].accepted == sum(handled.values())
            assert set(range(8)) <= set(handled)
            if action == "publish":
                assert handled[100] == 1
            assert handled[100] == handled[101] or action == "publish"
            return
        await bus.stop(5.0)  # a stop that was cancelled can be finished
        told = Counter(house.seen.names())
        if store.backend.keeps:
            again = house.bus()
            serve(again)
            async with again:
                await again.drain()
                assert again.ledger().balanced
            assert set(range(8)) <= set(handled)
        else:
            assert sum(handled.values()) + told["DeliveryDiscarded"] == 8

    store.run_bus(scenario)


@pytest.mark.parametrize("steps", range(0, 30, 3))
def test_a_slot_cancelled_from_outside_works_again(store: Store, steps: int) -> None:
    """Somebody cancels every task of the loop but ours: the delivery is retried, and the slot goes on."""

    async def scenario(house: House) -> None:
        bus, handled = house.bus(), []

        @bus.subscribe("orders.*", name="s", concurrency=2, retry=Retry(max_attempts=10))
        async def handler(payload: int) -> None:
            await asyncio.sleep(0.01)
            handled.append(payload)

        async with bus:
            await bus.publish_many([("orders.created", n) for n in range(5)])
            for _ in range(steps):
                await asyncio.sleep(0)
            for task in asyncio.all_tasks():
                if task.get_name() == "glassbus:s":
                    task.cancel()
            await asyncio.sleep(1)
            await bus.drain()
            assert sorted(set(handled)) == list(range(5))
            assert bus.ledger().accounts["s"].handled == 5

    store.run_bus(scenario)


# Observers


class Saboteur(Observer):
    """Raises at everything, lies about scopes, and swallows what it can."""

    def on_fact(self, fact: Fact, /) -> None:
        raise SystemExit("not today")

    def scope(self, work: Any, /) -> AbstractContextManager[None]:
        return _Swallow()


class _Swallow(AbstractContextManager[None]):
    def __exit__(self, *_: object) -> bool:
        return True


def test_observers_that_raise_and_lie_change_no_outcome(store: Store) -> None:
    """The same scenario twice, once with saboteurs: the same messages end the same way after the same attempts."""
    outcomes = []
    for saboteurs in ([], [Saboteur(), Saboteur()]):

        async def scenario(house: House, saboteurs: list[Observer] = saboteurs) -> None:
            bus = house.bus(observers=[*saboteurs, house.seen])
            attempts: Counter[int] = Counter()

            @bus.subscribe("orders.*", name="s", retry=QUICK, concurrency=2)
            async def handler(payload: int) -> None:
                attempts[payload] += 1
                if payload % 3 == 0 or (payload % 3 == 1 and attempts[payload] < 3):
                    raise ValueError(payload)

            async with bus:
                for n in range(9):
                    await bus.publish("orders.created", n)
                await bus.drain()
                dead = sorted(d.message.payload for d in await bus.dead_letters.list())
                outcomes.append((bus.ledger(), attempts, dead, bus.health().status))
                assert bool(bus.hub.failures) is bool(saboteurs)
                bus.hub.failures.clear()
            bus.hub.failures.clear()

        Store(store.backend, store.fresh().place).run_bus(scenario)
    assert outcomes[0] == outcomes[1]


# Everything at once


@pytest.mark.parametrize("seed", range(6))
def test_a_busy_hour_is_accounted_for(store: Store, seed: int) -> None:
    """Failing, slow and plain handlers, keys, delays, pauses and full queues, in an order drawn from the seed."""

    async def scenario(house: House) -> None:
        chance = random.Random(seed)
        bus = house.bus(capacity=40, publish_timeout=2.0, seed=seed)
        ended: Counter[str] = Counter()

        @bus.subscribe("a.*", name="flaky", concurrency=4, retry=QUICK, kill_switch=SWITCH)
        async def flaky(message: Message) -> None:
            await asyncio.sleep(chance.random() * 0.2)
            if chance.random() < 0.4:
                raise ConnectionError

        @bus.subscribe("*.x", name="slow", concurrency=2, timeout=0.5, retry=QUICK)
        async def slow(message: Message) -> None:
            await asyncio.sleep(chance.random())

        @bus.subscribe("b.>", name="keyed", concurrency=3, strict_key=True, retry=QUICK)
        def keyed(message: Message) -> None:
            if message.payload % 5 == 0:
                raise ValueError

        async with bus:
            for n in range(200):
                try:
                    await bus.publish(
                        check_topic(chance.choice(["a.x", "a.y", "b.x", "c.y"])),
                        n,
                        key=chance.choice([None, "k", "l"]),
                        delay=chance.choice([0, 0, 0, 3.0]),
                        expires_in=chance.choice([None, None, 2.0]),
                        priority=chance.randrange(4),  # type: ignore[arg-type]
                    )
                    ended["accepted"] += 1
                except QueueFull:
                    ended["refused"] += 1
                if n % 50 == 25:
                    await bus.pause("slow")
                if n % 50 == 40:
                    await bus.resume("slow")
                await asyncio.sleep(chance.random() * 0.3)
            await bus.resume("slow")
            for _ in range(20):
                await asyncio.sleep(30)
                if not await bus.drain():
                    break
            ledger = bus.ledger()
            assert ledger.balanced
            assert ledger.total.pending == ledger.total.in_flight == 0
            assert ended["accepted"] > 100
        counts = Counter(house.seen.names())
        assert counts["DeliveryDeadLettered"] == ledger.total.dead_lettered
        assert counts["DeliveryExpired"] == ledger.total.expired
        assert len(house.seen.of(DeliveryHandled)) == ledger.total.handled
        assert counts["RetryScheduled"] > 10

    store.run_bus(scenario, seed=seed)


@pytest.mark.parametrize("steps", range(8))
def test_a_start_that_is_cancelled_leaves_nothing_behind_and_can_be_made_again(store: Store, steps: int) -> None:
    async def scenario(house: House) -> None:
        bus, got = house.bus(), []

        @bus.subscribe("orders.*", name="s")
        async def handler(payload: int) -> None:
            got.append(payload)

        starting = asyncio.ensure_future(bus.start())
        for _ in range(steps):
            await asyncio.sleep(0)
        starting.cancel()
        (outcome,) = await asyncio.gather(starting, return_exceptions=True)
        if isinstance(outcome, asyncio.CancelledError):
            assert not bus.running
            await bus.start()
        await bus.publish("orders.created", 1)
        await bus.drain()
        assert got == [1]
        await bus.stop()
        assert house.seen.names().count("BusStopped") == 1

    store.run_bus(scenario)
