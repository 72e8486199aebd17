"""Several owners of one file: competition, deaths, leases, suspects, and fences against the late."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlite_kit import Desk, peek, play

from glassbus.clock import SystemClock
from glassbus.errors import TransportError, UnknownSubscription
from glassbus.facts import DeliveryExpired, OwnerLost
from glassbus.policy.delivery import State
from glassbus.testing import VirtualClock
from glassbus.transport import Hold

CHILD = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from sqlite_kit import Desk
    from glassbus.clock import SystemClock

    async def main():
        desk = await Desk(Path(sys.argv[1]), SystemClock()).open()
        await desk.declare()
        taken = [await desk.claim() for _ in range(int(sys.argv[3]))]
        print(*(d.envelope.body.decode() for d in taken), flush=True)
        await asyncio.sleep(600)

    asyncio.run(main())
    """
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for child in started:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def claim_in_a_child(path: Path, count: int, children: list[subprocess.Popen[str]]) -> str:
    """Start a process that claims `count` deliveries and keeps them; what it took."""
    command = [sys.executable, "-c", CHILD, str(path), str(Path(__file__).parent), str(count)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    children.append(child)
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_a_killed_process_is_noticed_at_once_and_its_deliveries_given_again(
    path: Path, children: list[subprocess.Popen[str]]
) -> None:
    async def scenario() -> None:
        desk = await Desk(path, SystemClock()).open()
        await desk.declare()
        await desk.publish(b"one", b"two")
        assert claim_in_a_child(path, 2, children) == "one two"
        assert desk.account().in_flight == 2
        children[0].send_signal(signal.SIGKILL)
        children[0].wait()

        async def load() -> None:
            while True:  # so that there is always something more urgent to do
                await desk.publish(topic="nobody.wants")

        loading = asyncio.ensure_future(load())
        claimed = await desk.claim()
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        assert (claimed.attempt, claimed.redelivered) == (2, "owner_died")
        assert await desk.settle(claimed)
        assert (await desk.claim()).envelope.body == b"two"
        (lost,) = desk.ears.recorder.of(OwnerLost)
        assert (lost.deliveries, lost.reason) == (2, "owner_died")
        await desk.close()

    asyncio.run(scenario())


def test_a_stopped_process_loses_its_lease_and_its_settlement_is_void(
    path: Path, children: list[subprocess.Popen[str]]
) -> None:
    """SIGSTOP keeps the lock: only the lease tells. When it goes on, it finds itself expelled."""

    async def scenario() -> None:
        desk = await Desk(path, SystemClock()).open()
        await desk.declare()
        await desk.publish(b"one")
        # The child renews every 10 s for 30 s: its lease is shortened behind its back.
        assert claim_in_a_child(path, 1, children) == "one"
        children[0].send_signal(signal.SIGSTOP)
        peek(path, "UPDATE owners SET lease_until = 0 WHERE pid = ?", children[0].pid)
        claimed = await desk.claim()
        assert (claimed.attempt, claimed.redelivered) == (2, "lease_expired")
        children[0].send_signal(signal.SIGCONT)
        assert await desk.settle(claimed)
        await desk.proven()
        await desk.close()

    asyncio.run(scenario())


def test_two_owners_never_hold_the_same_delivery(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        one, two = await Desk(path, clock).open(), await Desk(path, clock).open()
        for desk in (one, two):
            await desk.declare()
        taken: list[str] = []

        async def work(desk: Desk) -> None:
            while True:
                delivery = await desk.transport.claim("s")
                taken.append(delivery.envelope.id)
                await asyncio.sleep(0.01)
                assert await desk.settle(delivery)

        workers = [asyncio.ensure_future(work(desk)) for desk in (one, two) for _ in range(8)]
        for _ in range(20):
            await one.publish(*[b"x"] * 5)
            await two.publish(*[b"x"] * 5)
        async with asyncio.timeout(60):
            while one.account().handled < 200:
                await asyncio.sleep(0.1)
        assert len(taken) == len(set(taken)) == 200
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await one.proven()
        await two.close()
        await one.close()

    play(scenario)


def test_what_another_process_publishes_wakes_a_waiting_claim(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        one, two = await Desk(path, clock).open(), await Desk(path, clock).open()
        await one.declare()
        claiming = asyncio.ensure_future(one.claim(within_s=1.0))
        await asyncio.sleep(0.1)
        await two.publish(b"from two")
        assert (await claiming).envelope.body == b"from two"
        await two.close()
        await one.close()

    play(scenario)


def test_a_hold_set_by_another_process_holds_here_and_is_told(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        one, two = await Desk(path, clock).open(), await Desk(path, clock).open()
        await one.declare()
        await two.transport.set_hold("s", paused=True)
        await two.publish()
        await one.nothing()
        assert one.ears.holds == [("s", Hold(paused=True))]
        await two.transport.set_hold("s", paused=False)
        assert await one.claim()
        assert one.ears.holds[-1] == ("s", Hold())
        await two.close()
        await one.close()

    play(scenario)


def test_consumers_are_counted_over_processes(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        one, two = await Desk(path, clock).open(), await Desk(path, clock).open()
        await one.declare(consume=False)
        assert one.transport.queues()["s"].consumers == 0
        await one.declare()
        await two.declare()
        await two.declare()
        assert one.transport.queues()["s"].consumers == 2
        await two.close()
        assert one.transport.queues()["s"].consumers == 1
        await one.close()

    play(scenario)


def test_what_another_process_forgets_is_refused_to_its_holder(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        one, two = await Desk(path, clock).open(), await Desk(path, clock).open()
        for name in ("s", "t"):
            await one.declare(name)
        await one.publish(b"a", b"b", b"c")
        held = [await one.claim("s"), await one.claim("s"), await one.claim("t")]
        claiming = asyncio.ensure_future(one.transport.claim("s"))
        await asyncio.sleep(0)
        await claiming
        waiting = asyncio.ensure_future(one.transport.claim("s"))
        await asyncio.sleep(0)
        assert await two.transport.forget("s") == 3
        # In one batch with what is still ours, which is recorded all the same.
        results = await asyncio.gather(
            one.settle(held[0]), one.settle(held[1], State.RETRYING, delay_s=1.0), one.settle(held[2])
        )
        assert results == [False, False, True]
        with pytest.raises(UnknownSubscription):
            await waiting
        assert one.transport.ledger().gone.discarded == 3
        await one.proven()
        await two.close()
        await one.close()

    play(scenario)


# Leases


def test_a_lease_is_renewed_while_the_owner_lives(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        one, two = await Desk(path, clock).open(), await Desk(path, clock).open()
        await one.declare()
        await one.publish()
        delivery = await one.claim()
        await asyncio.sleep(300)
        assert one.account().in_flight == 1
        assert await one.settle(delivery)
        assert not one.ears.recorder.of(OwnerLost)
        await two.close()
        await one.close()

    play(scenario)


def test_an_expelled_owner_is_fenced_and_registers_anew(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        one, two = await Desk(path, clock).open(), await Desk(path, clock).open()
        for desk in (one, two):
            await desk.declare()
        await one.publish(b"one", b"two")
        first, second = await one.claim(), await one.claim()
        clock.detach(one.transport._writer.mailbox)  # it hangs: no renewal, but its lock is held
        again = await two.claim(within_s=60)
        assert again.redelivered == "lease_expired"
        assert again.envelope.id == first.envelope.id
        clock.attach(one.transport._writer.mailbox)
        assert not await one.settle(first)
        assert not await one.settle(second, State.RETRYING, delay_s=1.0)
        assert await two.settle(again)
        third = await one.claim()  # as a new owner, it takes part again
        assert (third.envelope.id, third.attempt) == (second.envelope.id, 2)
        assert await one.settle(third)
        assert one.transport.queues()["s"].consumers == 2
        await one.proven()
        (lost,) = two.ears.recorder.of(OwnerLost)
        assert (lost.reason, lost.deliveries) == ("lease_expired", 2)
        await two.close()
        await one.close()

    play(scenario)


# Suspects


def test_suspects_run_one_at_a_time_and_fresh_ones_wait(path: Path) -> None:
    """A poison message kills its process: its neighbours are charged once, and never again."""

    async def scenario(clock: VirtualClock) -> None:
        one = await Desk(path, clock).open()
        await one.declare()
        await one.publish(b"a", b"poison", b"b")
        assert [(await one.claim()).envelope.body for _ in range(3)] == [b"a", b"poison", b"b"]
        one.die()
        charged = {b"a": 1, b"poison": 1, b"b": 1}
        await asyncio.sleep(0)
        last = await Desk(path, clock).open()
        await last.declare()
        await last.publish(b"fresh")
        for _ in range(4):
            delivery = await last.claim()
            assert delivery.redelivered == "owner_died"
            await last.nothing()  # neither a second suspect nor a fresh one
            body = delivery.envelope.body
            charged[body] += 1
            assert delivery.attempt == charged[body]
            if body == b"poison":
                last.die()
                last = await Desk(path, clock).open()
                await last.declare()
                if charged[body] == 3:
                    break
            else:
                assert await last.settle(delivery)
        assert charged == {b"a": 2, b"poison": 3, b"b": 1}
        poison = await last.claim()
        assert poison.envelope.body == b"poison"
        await last.nothing()
        assert await last.settle(poison, State.DEAD_LETTERED)
        rest = [await last.claim()]
        assert (rest[0].envelope.body, rest[0].attempt) == (b"b", 2)  # charged when it was fresh, and for its own run
        assert await last.settle(rest[0])
        fresh = await last.claim()
        assert (fresh.envelope.body, fresh.attempt, fresh.redelivered) == (b"fresh", 1, "")
        await last.proven()
        await last.close()

    play(scenario)


def test_a_suspect_given_back_is_still_a_suspect(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        one = await Desk(path, clock).open()
        await one.declare()
        await one.publish(b"a", b"b")
        await one.claim(), await one.claim()
        one.die()
        two = await Desk(path, clock).open()
        await two.declare()
        delivery = await two.claim()
        assert await two.settle(delivery, State.READY, attempt=delivery.attempt - 1)
        again = await two.claim()
        assert (again.envelope.id, again.attempt, again.redelivered) == (delivery.envelope.id, 2, "owner_died")
        await two.nothing()
        assert await two.settle(again, State.READY)  # an immediate retry: this attempt has ended
        assert (await two.claim()).envelope.body == b"b"
        await two.proven()
        await two.close()

    play(scenario)


def test_only_one_suspect_runs_in_a_process_over_all_its_subscriptions(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        one = await Desk(path, clock).open()
        for name in ("s", "t"):
            await one.declare(name)
        await one.publish()
        await one.claim("s"), await one.claim("t")
        one.die()
        two = await Desk(path, clock).open()
        for name in ("s", "t"):
            await two.declare(name)
        suspect = await two.claim("s")
        await two.nothing("t")
        assert await two.settle(suspect)
        assert (await two.claim("t")).redelivered == "owner_died"
        await two.close()

    play(scenario)


@pytest.mark.parametrize("in_one_transaction", [True, False])
def test_a_suspect_that_expired_keeps_nobody_waiting(path: Path, in_one_transaction: bool) -> None:
    """Its process died after it had expired; the one that is left, busy then, goes on with what came later."""

    async def scenario(clock: VirtualClock) -> None:
        one, two = await Desk(path, clock).open(), await Desk(path, clock).open()
        for desk in (one, two):
            await desk.declare()
        await one.publish(b"expires", expires_at=clock.wall() + 5)
        await one.publish(b"mine")
        assert (await one.claim()).envelope.body == b"expires"
        busy = await two.claim()
        await asyncio.sleep(10)
        await two.publish(b"later")
        one.die()
        if in_one_transaction:
            two.transport._writer._upkeep_at = 0.0  # it looks for the dead when it next has something to do
        else:
            await asyncio.sleep(30)
            (expired,) = two.ears.recorder.of(DeliveryExpired)  # though nobody has asked for it
            assert expired.delivery.envelope.body == b"expires"
        waiting = asyncio.ensure_future(two.claim())
        assert await two.settle(busy)
        assert (await waiting).envelope.body == b"later"
        assert two.account().expired == 1
        assert two.stated().count("DeliveryExpired") == 1
        await two.proven()
        await two.close()

    play(scenario)


def test_a_suspect_given_back_after_it_expired_keeps_nobody_waiting(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        one, two = await Desk(path, clock).open(), await Desk(path, clock).open()
        for desk in (one, two):
            await desk.declare()
        await one.publish(b"expires", expires_at=clock.wall() + 50)
        await one.claim()
        one.die()
        suspect = await two.claim(within_s=30)
        await two.publish(b"later")
        await two.nothing(within_s=60)
        waiting = asyncio.ensure_future(two.claim())
        assert await two.settle(suspect, State.READY, attempt=suspect.attempt - 1)
        assert (await waiting).envelope.body == b"later"
        assert two.stated().count("DeliveryExpired") == 1
        await two.proven()
        await two.close()

    play(scenario)


def test_a_keyed_suspect_goes_before_the_rest_of_its_key(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        one = await Desk(path, clock).open()
        await one.declare()
        await one.publish(b"1", b"2", b"3", key="k")
        await one.claim()
        await one.nothing()
        one.die()
        two = await Desk(path, clock).open()
        await two.declare()
        for body in (b"1", b"2", b"3"):
            delivery = await two.claim()
            assert delivery.envelope.body == body
            await two.nothing()
            assert await two.settle(delivery)
        await two.proven()
        await two.close()

    play(scenario)


# Restarts


def test_a_graceful_close_gives_back_uncharged(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        one = await Desk(path, clock).open()
        await one.declare()
        await one.publish(b"a", b"b", b"c")
        await one.claim()
        assert await one.close() == 3
        two = await Desk(path, clock).open()
        assert not two.ears.recorder.of(OwnerLost)
        await two.declare()
        delivery = await two.claim()
        assert (delivery.envelope.body, delivery.attempt, delivery.redelivered) == (b"a", 1, "")
        await two.proven()
        await two.close()

    play(scenario)


def test_a_loop_that_ends_without_close_gives_back_too(path: Path) -> None:
    async def unclosed() -> None:
        desk = await Desk(path, SystemClock()).open()
        await desk.declare()
        await desk.publish()
        await desk.claim()
        desks.append(desk)

    desks: list[Desk] = []
    asyncio.run(unclosed())
    desks[0].transport._writer.join(60.0)
    assert peek(path, "SELECT count(*) FROM owners") == [(0,)]
    assert peek(path, "SELECT ready, in_flight FROM subscriptions") == [(1, 0)]
    assert peek(path, "SELECT attempt FROM deliveries") == [(0,)]


def test_after_a_reboot_retries_are_due_at_once(path: Path) -> None:
    """Their due times were of another boot's clock."""

    async def before(clock: VirtualClock) -> None:
        desk = await Desk(path, clock, boot_id="boot-1").open()
        await desk.declare()
        await desk.publish()
        assert await desk.settle(await desk.claim(), State.RETRYING, delay_s=10_000)
        await desk.close()

    async def same_boot(clock: VirtualClock) -> None:
        desk = await Desk(path, clock, boot_id="boot-1").open()
        assert desk.account().retrying == 1
        await desk.close()

    async def after(clock: VirtualClock) -> None:
        desk = await Desk(path, clock, boot_id="boot-2").open()
        assert desk.account().retrying == 0
        await desk.declare()
        assert (await desk.claim()).attempt == 2
        await desk.proven()
        await desk.close()

    play(before)
    play(same_boot)
    play(after)


# Forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_to_open_its_own(path: Path) -> None:
    """In a process of its own, because the test runner has threads."""
    script = textwrap.dedent(
        """
        import asyncio, os, sys, warnings
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from sqlite_kit import Desk
        from glassbus.clock import SystemClock
        from glassbus.errors import TransportError, UnknownSubscription
        warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads: that is the point

        async def main():
            desk = await Desk(Path(sys.argv[1]), SystemClock()).open()
            await desk.declare()
            child = os.fork()
            if child == 0:
                answers = []
                desk.transport.settle(None, None, lambda _d, _s, ok: answers.append(ok))
                for use in (desk.transport.ledger, lambda: desk.transport.claim("s").send(None)):
                    try:
                        use()
                    except TransportError as error:
                        answers.append("forked child" in str(error))
                os._exit(0 if answers == [False, True, True] else 1)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0, status
            await desk.publish()
            delivery = await desk.claim()
            assert await desk.settle(delivery)
            await desk.proven()
            await desk.close()

        asyncio.run(main())
        """
    )
    command = [sys.executable, "-c", script, str(path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_child_that_outlives_its_parent_does_not_keep_its_lock(
    path: Path, children: list[subprocess.Popen[str]]
) -> None:
    script = CHILD.replace("await asyncio.sleep(600)", "import os; os.fork(); await asyncio.sleep(600)").replace(
        "import asyncio, sys", "import asyncio, sys, warnings; warnings.simplefilter('ignore')"
    )

    async def scenario() -> None:
        desk = await Desk(path, SystemClock()).open()
        await desk.declare()
        await desk.publish()
        command = [sys.executable, "-c", script, str(path), str(Path(__file__).parent), "1"]
        child = subprocess.Popen(  # noqa: ASYNC220 - it starts at once, and nothing else runs here
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        children.append(child)
        assert child.stdout is not None
        child.stdout.readline()
        try:
            await asyncio.sleep(0.2)
            child.kill()
            child.wait()
            assert (await desk.claim()).redelivered == "owner_died"
        finally:
            os.killpg(child.pid, signal.SIGKILL)
        await desk.close()

    asyncio.run(scenario())


def test_settling_with_a_closed_transport_is_refused_not_lost(path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk = await Desk(path, clock).open()
        await desk.declare()
        await desk.publish()
        delivery = await desk.claim()
        await desk.close()
        answers: list[bool] = []
        from glassbus.policy.delivery import Decision

        desk.transport.settle(delivery, Decision(State.HANDLED), lambda _d, _s, ok: answers.append(ok))
        await asyncio.sleep(0)
        assert answers == [False]
        with pytest.raises(TransportError):
            await desk.transport.claim("s")

    play(scenario)
