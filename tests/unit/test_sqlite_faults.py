"""When the disk fails: nothing acknowledged is lost, nothing refused is stored, and what is uncertain is called so."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlite_kit import Desk, FaultyStore, peek, play

from glassbus.config import Overflow
from glassbus.errors import (
    MessageConflict,
    PublishRejected,
    PublishUncertain,
    QueueFull,
    StorageFull,
    StoreCorrupt,
    StoreLocked,
    TransportError,
)
from glassbus.facts import OverflowHandled, TransportFailed, TransportRecovered
from glassbus.message import Priority
from glassbus.policy.delivery import Decision, State
from glassbus.testing import VirtualClock
from glassbus.transport.sqlite import DUPLICATE_WINDOW_S


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


async def faulty(path: Path, clock: VirtualClock, **spec: Any) -> tuple[Desk, FaultyStore]:
    store = FaultyStore(path)
    desk = await Desk(path, clock, store=store).open()
    await desk.declare(**spec)
    return desk, store


# A commit of unknown outcome


@pytest.mark.parametrize("fault", ["lost", "kept"])
def test_a_failed_sync_is_found_out_and_nothing_is_stored_twice(path: Path, fault: str) -> None:
    """Whichever way the failed commit went, the publish ends well and the message is there once."""

    async def scenario(clock: VirtualClock) -> None:
        desk, store = await faulty(path, clock)
        store.plan = [fault]
        stored = await desk.publish(b"once", wait_s=5.0)
        assert stored.subscriptions == ("s",)
        assert not stored.duplicate
        delivery = await desk.claim()
        assert (delivery.envelope.body, delivery.attempt) == (b"once", 1)
        assert await desk.settle(delivery)
        await desk.nothing()
        (failed,) = desk.ears.recorder.of(TransportFailed)
        assert (failed.operation, failed.uncertain) == ("commit", True)
        assert len(desk.ears.recorder.of(TransportRecovered)) == 1
        await desk.proven()
        await desk.close()

    play(scenario)


@pytest.mark.parametrize("fault", ["lost", "kept"])
def test_a_claim_in_a_failed_commit_is_not_charged_twice(path: Path, fault: str) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, store = await faulty(path, clock)
        await desk.publish(b"x")
        store.plan = [fault]
        delivery = await desk.claim()
        assert delivery.attempt == 1
        assert desk.account().in_flight == 1
        assert await desk.settle(delivery)
        await desk.proven()
        await desk.close()

    play(scenario)


@pytest.mark.parametrize("fault", ["lost", "kept"])
@pytest.mark.parametrize("state", [State.HANDLED, State.RETRYING, State.READY, State.DEAD_LETTERED, State.EXPIRED])
def test_a_settlement_in_a_failed_commit_is_recorded_once(path: Path, fault: str, state: State) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, store = await faulty(path, clock)
        await desk.publish(b"x", key="k")
        delivery = await desk.claim()
        store.plan = [fault]
        assert await desk.settle(delivery, state)
        account = desk.account()
        assert (account.in_flight, account.accepted) == (0, 1)
        assert len(await desk.dead_letters()) == (state is State.DEAD_LETTERED)
        await desk.proven()
        await desk.close()

    play(scenario)


@pytest.mark.parametrize("fault", ["lost", "kept"])
def test_what_gives_way_in_a_failed_commit_gives_way_once(path: Path, fault: str) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, store = await faulty(path, clock, capacity=2, overflow=Overflow(expand=1.0))
        await desk.publish(b"1", b"2", priority=Priority.LOW)
        store.plan = [fault]
        await desk.publish(b"3", priority=Priority.CRITICAL)
        account = desk.account()
        assert (account.accepted, account.pending, account.dead_lettered) == (3, 2, 1)
        (record,) = await desk.dead_letters()
        assert record.envelope.body == b"2"
        await desk.proven()
        await desk.close()

    play(scenario)


@pytest.mark.parametrize("fault", ["lost", "kept"])
def test_a_growth_in_a_failed_commit_is_one_growth(path: Path, fault: str) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, store = await faulty(path, clock, capacity=2, overflow=Overflow(expand_for=60.0))
        await desk.publish(b"1", b"2")
        store.plan = [fault]
        started = clock.wall()
        await desk.publish(b"3")
        assert 60 <= desk.transport.queues()["s"].expanded_until - started <= 62
        with pytest.raises(QueueFull):
            await desk.publish(b"4")
        assert desk.account().pending == 3
        await desk.settle(await desk.claim())
        await asyncio.sleep(70)
        assert desk.transport.queues()["s"].expanded_until == 0.0
        assert [f.action for f in desk.ears.recorder.of(OverflowHandled)][-1] == "contract"
        await desk.proven()
        await desk.close()

    play(scenario)


@pytest.mark.parametrize("fault", ["lost", "kept"])
def test_while_the_store_cannot_be_reopened_publishes_are_uncertain_and_their_ids_known_later(
    path: Path, fault: str
) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, store = await faulty(path, clock)
        store.plan = [fault]
        store.openings = [apsw.IOError("IOError: disk I/O error (injected)")] * 20
        envelope = desk.envelope(body=b"x")
        with pytest.raises(PublishUncertain) as raised:
            await desk.transport.publish([envelope], 1.0)
        assert raised.value.message_id == envelope.id
        with pytest.raises(PublishRejected, match="not stored"):  # this one was never tried
            await desk.publish(b"y", wait_s=0.5)
        await asyncio.sleep(60)
        (stored,) = await desk.transport.publish([envelope], 1.0)
        assert stored.duplicate == (fault == "kept")
        assert desk.account().accepted == 1
        assert await desk.settle(await desk.claim())
        (again,) = await desk.transport.publish([envelope], 1.0)
        assert again.duplicate == (fault == "kept")  # remembered after it is gone, if it was uncertain and stored
        await desk.proven()
        await desk.close()

    play(scenario)


def test_an_uncertain_id_with_another_body_is_a_conflict(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, store = await faulty(path, clock)
        store.plan = ["kept"]
        store.openings = [apsw.IOError("IOError: disk I/O error (injected)")] * 5
        envelope = desk.envelope(body=b"x", remember=True)
        with pytest.raises(PublishUncertain):
            await desk.transport.publish([envelope], 0.0)
        await asyncio.sleep(10)
        with pytest.raises(MessageConflict):
            await desk.publish(b"other", id=envelope.id)
        await desk.close()

    play(scenario)


def test_a_call_that_fails_says_so(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, store = await faulty(path, clock)
        store.plan = ["lost"]
        with pytest.raises(TransportError):
            await desk.transport.probe()
        assert await desk.transport.probe() >= 0
        await desk.close()

    play(scenario)


def test_settlements_survive_a_long_failure(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, store = await faulty(path, clock)
        await desk.publish(b"x")
        delivery = await desk.claim()
        store.plan = ["lost", "kept", "lost"]
        store.openings = [apsw.IOError("IOError: disk I/O error (injected)"), None, TransportError("gone"), None]
        assert await desk.settle(delivery)
        assert desk.account().handled == 1
        await desk.proven()
        await desk.close()

    play(scenario)


# A lock that others hold


def test_a_lock_held_for_long_rejects_overdue_publishes_and_keeps_settlements(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, store = await faulty(path, clock)
        await desk.publish(b"x")
        delivery = await desk.claim()
        store.plan = [apsw.BusyError("BusyError: database is locked (injected)")] * 30
        with pytest.raises(PublishRejected, match="locked"):
            await desk.publish(b"y", wait_s=0.0)
        assert await desk.settle(delivery)
        assert desk.account().accepted == 1
        await desk.proven()
        await desk.close()

    play(scenario)


def test_another_program_with_an_open_transaction_only_delays(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, store = await faulty(path, clock)
        with closing(apsw.Connection(str(path))) as other:
            other.execute("BEGIN IMMEDIATE")
            store.connection.set_busy_timeout(1)
            store.connection.setlk_timeout(0, 0)
            with pytest.raises(StoreLocked):
                await desk.transport.probe()
            other.execute("ROLLBACK")
        await desk.publish(b"x")
        await desk.proven()
        await desk.close()

    play(scenario)


# A full disk


def test_below_the_reserve_publishes_are_refused_and_acknowledgements_go_on(path: Path) -> None:
    free = [10**9]

    async def scenario(clock: VirtualClock) -> None:
        desk = await Desk(path, clock, ask_free_space=lambda folder: free[0], free_space_reserve_bytes=10**6).open()
        await desk.declare()
        await desk.publish(b"x", id="a", remember=True)
        free[0] = 10**5
        await asyncio.sleep(1)
        with pytest.raises(StorageFull, match="reserve"):
            await desk.publish(b"y")
        assert (await desk.publish(b"x", id="a", remember=True)).duplicate  # nothing has to be stored for this
        assert await desk.settle(await desk.claim())
        free[0] = 10**9
        await asyncio.sleep(1)
        await desk.publish(b"z")
        await desk.proven()
        await desk.close()

    play(scenario)


def test_a_full_disk_refuses_publishes_and_takes_acknowledgements(path: Path) -> None:
    """`max_page_count` plays the disk: the database can grow no further, and says FULL as a disk would."""

    async def scenario(clock: VirtualClock) -> None:
        desk, store = await faulty(path, clock)
        for _ in range(30):
            await desk.publish(b"x" * 1000)
        held = [await desk.claim() for _ in range(20)]
        store.connection.pragma("max_page_count", store.connection.pragma("page_count"))
        refused = 0
        for _ in range(60):
            try:
                await desk.publish(b"y" * 1000)
            except StorageFull:
                refused += 1
        assert refused
        accepted = desk.account().accepted
        assert accepted == 90 - refused
        for delivery in held:
            assert await desk.settle(delivery)
        await asyncio.sleep(2)
        await desk.publish(b"z" * 1000, wait_s=5.0)
        assert desk.ears.recorder.of(TransportRecovered)
        await desk.proven()
        await desk.close()

    play(scenario)


def test_on_a_full_disk_settlements_are_tried_in_smaller_transactions(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, store = await faulty(path, clock)
        await desk.publish(*[b"x"] * 8)
        held = [await desk.claim() for _ in range(8)]
        store.plan = [apsw.FullError("FullError: database or disk is full (injected)")] * 3
        answers: list[bool] = []
        for delivery in held:
            desk.transport.settle(delivery, Decision(State.HANDLED), lambda _d, _s, ok: answers.append(ok))
        await desk.transport.flush()
        assert answers == [True] * 8
        await desk.publish(b"y")
        await desk.proven()
        await desk.close()

    play(scenario)


# Damage


def test_damage_found_while_running_stops_the_bus(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, store = await faulty(path, clock)
        await desk.publish(b"x")
        delivery = await desk.claim()
        store.plan = [apsw.CorruptError("CorruptError: database disk image is malformed (injected)")]
        assert not await desk.settle(delivery)
        (error,) = desk.ears.errors
        assert isinstance(error, StoreCorrupt)
        with pytest.raises(TransportError):
            await desk.transport.claim("s")

    play(scenario)


def test_unreadable_headers_are_damage(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, _ = await faulty(path, clock)
        await desk.publish(b"x")
        peek(path, "UPDATE messages SET headers = '{not json'")
        with pytest.raises(TransportError):
            await desk.claim()
        assert isinstance(desk.ears.errors[0], StoreCorrupt)

    play(scenario)


def test_the_audit_finds_what_does_not_add_up(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, _ = await faulty(path, clock)
        await desk.publish(b"x", b"y")
        peek(path, "DELETE FROM deliveries WHERE id = 1")
        audit = await desk.transport.audit()
        assert not audit.ok
        assert any("ready" in problem for problem in audit.problems)
        assert any("without a delivery" in problem for problem in audit.problems)
        assert audit.recounted.unaccounted == 1
        await desk.close()

    play(scenario)


# One bad message among good ones


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": "\ud800"},  # no text in any encoding: binding it fails
        {"body": "not bytes"},  # the column refuses it
        {"priority": 7},  # there is no such lane
    ],
)
def test_one_message_that_cannot_be_stored_does_not_fail_its_neighbours(path: Path, wrong: dict[str, Any]) -> None:
    """The bus checks messages before; this is what the transport does if something gets past it."""

    async def scenario(clock: VirtualClock) -> None:
        desk, _ = await faulty(path, clock)
        await desk.publish(b"before")
        delivery = await desk.claim()
        bad = desk.envelope(**wrong)
        settled: list[bool] = []
        desk.transport.settle(delivery, Decision(State.HANDLED), lambda _d, _s, ok: settled.append(ok))
        results = await asyncio.gather(
            desk.publish(b"good"),
            desk.transport.publish([bad], 0.0),
            desk.publish(b"good too"),
            return_exceptions=True,
        )
        assert isinstance(results[1], PublishRejected)
        assert [type(r).__name__ for r in results] == ["Stored", "PublishRejected", "Stored"]
        assert settled == [True]
        await desk.proven()
        await desk.close()

    play(scenario)


def test_a_new_id_that_is_not_new_is_recognised(path: Path) -> None:
    """Ids of the bus's own making are not looked up; should one be there, the insert tells."""

    async def scenario(clock: VirtualClock) -> None:
        desk, _ = await faulty(path, clock)
        await desk.publish(b"x", id="same")
        delivery = await desk.claim()
        stored, other = await asyncio.gather(desk.publish(b"x", id="same"), desk.publish(b"y", id="other"))
        assert (stored.duplicate, other.duplicate) == (True, False)
        with pytest.raises(MessageConflict):
            await desk.publish(b"z", id="same")
        assert await desk.settle(delivery)
        await desk.proven()
        await desk.close()

    play(scenario)


# Cancelled callers


def test_a_publish_cancelled_after_it_was_handed_over_is_remembered_if_it_was_stored(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, _ = await faulty(path, clock)
        for turns in range(6):
            envelope = desk.envelope(body=b"x")
            publishing = asyncio.ensure_future(desk.transport.publish([envelope], 0.0))
            for _ in range(turns):
                await asyncio.sleep(0)
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            await desk.transport.probe()
            before = desk.account().accepted
            (stored,) = await desk.transport.publish([envelope], 0.0)
            # Either it was stored, and is known, or it was not, and is stored now: never both, never neither.
            assert stored.duplicate == (desk.account().accepted == before)
            assert await desk.settle(await desk.claim())
            await desk.nothing(within_s=0.1)
        await desk.proven()
        await desk.close()

    play(scenario)


def test_a_cancelled_claim_gives_back_what_it_was_given(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, _ = await faulty(path, clock)
        for turns in range(6):
            await desk.publish(b"x")
            claiming = asyncio.ensure_future(desk.transport.claim("s"))
            for _ in range(turns):
                await asyncio.sleep(0)
            claiming.cancel()
            await asyncio.gather(claiming, return_exceptions=True)
            delivery = claiming.result() if not claiming.cancelled() else await desk.claim()
            assert delivery.attempt == 1
            assert await desk.settle(delivery)
        await desk.proven()
        await desk.close()

    play(scenario)


# Remembered ids


def test_ids_are_known_for_the_window_and_not_for_ever(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk, _ = await faulty(path, clock)
        await desk.publish(b"x", id="a", remember=True)
        await desk.publish(b"x", id="nobody", topic="elsewhere.x", remember=True)
        assert await desk.settle(await desk.claim())
        await desk.close()
        desk, _ = await faulty(path, clock)  # over a restart, too
        assert (await desk.publish(b"x", id="a", remember=True)).subscriptions == ("s",)
        assert (await desk.publish(b"x", id="a", remember=True)).duplicate
        assert (await desk.publish(b"x", id="nobody", topic="elsewhere.x", remember=True)).duplicate
        with pytest.raises(MessageConflict):
            await desk.publish(b"other", id="a")
        assert peek(path, "SELECT count(*) FROM messages WHERE body IS NOT NULL") == [(0,)]
        await asyncio.sleep(DUPLICATE_WINDOW_S + 2)
        assert peek(path, "SELECT count(*) FROM messages") == [(0,)]
        assert not (await desk.publish(b"other", id="a", remember=True)).duplicate
        await desk.proven()
        await desk.close()

    play(scenario)


def test_after_an_owner_died_all_that_was_stored_is_remembered_for_a_while(path: Path) -> None:
    """A commit that was reported as failed can come back with a restart: its publisher retries with the same id."""

    async def scenario(clock: VirtualClock) -> None:
        dead, _ = await faulty(path, clock)
        await dead.publish(b"x", id="unremembered")
        dead.die()
        desk, _ = await faulty(path, clock)
        await desk.publish(b"later", id="later")
        for _ in range(2):
            assert await desk.settle(await desk.claim())
        assert (await desk.publish(b"x", id="unremembered")).duplicate
        with pytest.raises(MessageConflict):
            await desk.publish(b"y", id="unremembered")
        assert not (await desk.publish(b"later", id="later")).duplicate  # never was uncertain
        await asyncio.sleep(DUPLICATE_WINDOW_S + 2)
        assert not (await desk.publish(b"x", id="unremembered")).duplicate
        await desk.proven()
        await desk.close()

    play(scenario)


# Everything at once

_STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("publish"), st.integers(0, 1), st.sampled_from([None, None, "k", "l"]), st.sampled_from(Priority)
        ),
        st.tuples(st.just("again"), st.integers(0, 1), st.integers(0, 5)),
        st.tuples(st.just("claim"), st.integers(0, 1)),
        st.tuples(
            st.just("settle"), st.integers(0, 5), st.sampled_from(["HANDLED", "READY", "RETRYING", "DEAD_LETTERED"])
        ),
        st.tuples(st.just("fault"), st.integers(0, 1), st.sampled_from(["lost", "kept", "full", "busy"])),
        st.tuples(st.just("closed"), st.integers(0, 1)),
        st.tuples(st.just("killed"), st.integers(0, 1)),
        st.tuples(st.just("wait"), st.integers(1, 40)),
    ),
    max_size=40,
)
_FAULTS: dict[str, str | Exception] = {
    "lost": "lost",
    "kept": "kept",
    "full": apsw.FullError("FullError: database or disk is full (injected)"),
    "busy": apsw.BusyError("BusyError: database is locked (injected)"),
}


#: A queue that is mostly full, and one that never is.
_FULL = {"capacity": 2, "overflow": Overflow(expand_for=10.0)}
_ROOMY = {"capacity": 1000}


class Plot:
    """Two owners of one file, and what must hold whatever happens to them."""

    def __init__(self, path: Path, clock: VirtualClock, spec: dict[str, Any]) -> None:
        self.path, self.clock, self.spec = path, clock, spec
        self.desks: list[tuple[Desk, FaultyStore]] = []
        self.accepted: list[Any] = []
        self.held: list[tuple[Desk, Any]] = []
        self.handled: set[str] = set()
        self.possible: set[str] = set()

    async def start(self) -> None:
        self.desks = [await faulty(self.path, self.clock, **self.spec) for _ in range(2)]

    async def step(self, kind: str, *arguments: Any) -> None:
        if kind in ("publish", "again"):
            desk, _ = self.desks[arguments[0]]
            if kind == "publish":
                envelope = desk.envelope(
                    id=f"m{len(self.possible)}", key=arguments[1], priority=arguments[2], remember=True
                )
            elif not self.accepted:
                return
            else:
                envelope = self.accepted[arguments[1] % len(self.accepted)]
            self.possible.add(envelope.id)
            try:
                (stored,) = await desk.transport.publish([envelope], 3.0)
            except (PublishRejected, PublishUncertain):
                return
            assert stored.duplicate or kind == "publish"
            if kind == "publish":
                self.accepted.append(envelope)
        elif kind == "claim":
            desk, _ = self.desks[arguments[0]]
            claiming = asyncio.ensure_future(desk.transport.claim("s"))
            await asyncio.sleep(1)
            if not claiming.done():
                claiming.cancel()
            (delivery,) = await asyncio.gather(claiming, return_exceptions=True)
            if not isinstance(delivery, BaseException):
                assert delivery.envelope.id in self.possible
                assert all(d.envelope.id != delivery.envelope.id for _, d in self.held), "held twice"
                key = delivery.envelope.key
                assert key is None or all(d.envelope.key != key for _, d in self.held), "key held twice"
                self.held.append((desk, delivery))
        elif kind == "settle" and self.held:
            desk, delivery = self.held.pop(arguments[0] % len(self.held))
            assert await desk.settle(delivery, State[arguments[1]], delay_s=5.0)
            if arguments[1] == "HANDLED":
                assert delivery.envelope.id not in self.handled, "handled twice"
                self.handled.add(delivery.envelope.id)
        elif kind == "fault":
            self.desks[arguments[0]][1].plan.append(_FAULTS[arguments[1]])
        elif kind in ("closed", "killed"):
            desk, store = self.desks[arguments[0]]
            self.held = [(d, delivery) for d, delivery in self.held if d is not desk]
            if kind == "closed":
                store.plan.clear()
                await desk.close()
            else:
                desk.die()
            self.desks[arguments[0]] = await faulty(self.path, self.clock, **self.spec)
        elif kind == "wait":
            await asyncio.sleep(arguments[0])

    async def end(self) -> None:
        """All is settled in the end: what was accepted is in the ledger once, and nothing is stuck."""
        for _, store in self.desks:
            store.plan.clear()
        for desk, delivery in self.held:
            assert await desk.settle(delivery)
        one, two = self.desks[0][0], self.desks[1][0]
        await two.close()
        await asyncio.sleep(30)
        account = one.account()
        while account.pending:
            assert await one.settle(await one.claim())
            account = one.account()
        assert one.transport.queues()["s"].expanded_until == 0.0
        await one.proven()
        assert len(self.accepted) <= account.accepted <= len(self.possible)
        assert account.handled + account.dead_lettered == account.accepted
        assert account.handled >= len(self.handled)
        await one.close()


@pytest.mark.parametrize("spec", [_ROOMY, _FULL], ids=["roomy", "full"])
@given(steps=_STEPS)
def test_two_owners_under_faults_and_deaths_lose_nothing_and_share_nothing(
    spec: dict[str, Any], steps: list[tuple[Any, ...]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("plot") / "store.db"

    async def scenario(clock: VirtualClock) -> None:
        plot = Plot(path, clock, spec)
        await plot.start()
        for step in steps:
            await plot.step(*step)
        await plot.end()

    play(scenario)
