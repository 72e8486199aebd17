"""The virtual-time loop and the fake clock: time moves only when nothing else can happen."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from glassbus.testing import EPOCH, FakeClock, VirtualClock, VirtualTimeStuckError, run_virtual


class Echo:
    """A thread that is given work and moments, as the SQLite writer is, and answers on the loop."""

    def __init__(self, clock: FakeClock | VirtualClock, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.clock = clock
        self.loop = loop
        self.moments: list[float] = []
        self.woken: list[float] = []
        self.work: list[asyncio.Future[float]] = []
        self.idle = threading.Condition()
        self.at_rest = False
        self.stopping = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        clock.attach(self)
        self.thread.start()

    def _run(self) -> None:
        with self.idle:
            while not self.stopping:
                self.at_rest = False
                while self.work:
                    future = self.work.pop()
                    self.idle.release()
                    time.sleep(0.002)  # real work, which virtual time must wait for
                    self.idle.acquire()
                    assert self.loop is not None
                    self.loop.call_soon_threadsafe(future.set_result, self.clock.monotonic())
                while self.moments and self.moments[0] <= self.clock.monotonic():
                    self.woken.append(self.clock.monotonic())
                    self.moments.pop(0)
                self.at_rest = True
                self.idle.notify_all()
                self.idle.wait()

    def ask(self) -> asyncio.Future[float]:
        assert self.loop is not None
        future: asyncio.Future[float] = self.loop.create_future()
        with self.idle:
            self.work.append(future)
            self.at_rest = False
            self.idle.notify_all()
        return future

    def quiesce(self) -> None:
        with self.idle:
            assert self.idle.wait_for(lambda: self.at_rest, 5)

    def poke(self) -> None:
        with self.idle:
            self.at_rest = False
            self.idle.notify_all()

    def due(self) -> float | None:
        with self.idle:
            return self.moments[0] if self.moments else None

    def stop(self) -> None:
        self.clock.detach(self)
        with self.idle:
            self.stopping = True
            self.idle.notify_all()
        self.thread.join(5)


def test_an_hour_passes_at_once_and_in_order() -> None:
    async def scenario(clock: VirtualClock) -> list[str]:
        seen: list[str] = []

        async def after(seconds: float, name: str) -> None:
            await asyncio.sleep(seconds)
            seen.append(name)

        started, wall = clock.monotonic(), clock.wall()
        await asyncio.gather(after(3600, "hour"), after(1, "second"), after(60, "minute"))
        assert clock.monotonic() - started == pytest.approx(3600)
        assert clock.wall() - wall == pytest.approx(3600)
        assert wall == EPOCH
        return seen

    began = time.monotonic()
    assert run_virtual(scenario) == ["second", "minute", "hour"]
    assert time.monotonic() - began < 600  # however busy the machine is


def test_timeouts_fire_in_virtual_time() -> None:
    async def scenario(clock: VirtualClock) -> float:
        started = clock.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()
        return clock.monotonic() - started

    assert run_virtual(scenario) == pytest.approx(30)


def test_a_deadlock_names_the_tasks_that_wait() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    async def scenario(clock: VirtualClock) -> None:
        await asyncio.create_task(forever(), name="the stuck one")

    with pytest.raises(VirtualTimeStuckError, match=r"deadlock.*the stuck one waits at .*forever"):
        run_virtual(scenario)


def test_a_scenario_that_only_ticks_is_ended_at_the_limit() -> None:
    async def scenario(clock: VirtualClock) -> None:
        loop = asyncio.get_running_loop()

        def tick() -> None:
            loop.call_later(1, tick)

        tick()
        await asyncio.Event().wait()

    with pytest.raises(VirtualTimeStuckError, match=r"not done at virtual time 1,1\d\d s.*scenario"):
        run_virtual(scenario, limit_s=100)


def test_a_task_that_spins_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glassbus.testing.loop._TURNS_MAX", 500)

    async def scenario(clock: VirtualClock) -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(VirtualTimeStuckError, match="a task spins"):
        run_virtual(scenario)


def test_time_stands_still_while_a_plain_function_runs() -> None:
    async def scenario(clock: VirtualClock) -> float:
        started = clock.monotonic()
        async with asyncio.timeout(0.001):  # virtual: would be over at once if time moved
            await asyncio.to_thread(time.sleep, 0.02)
        return clock.monotonic() - started

    assert run_virtual(scenario) == 0


def test_time_goes_on_without_a_plain_function_that_really_hangs() -> None:
    """And it costs the patience once, not at every step of time."""

    async def scenario(clock: VirtualClock) -> str:
        release = threading.Event()
        running = asyncio.ensure_future(asyncio.to_thread(release.wait))
        began = time.monotonic()
        for _ in range(1000):
            await asyncio.sleep(10)
        assert time.monotonic() - began < 100  # at least half a second each, if it did
        release.set()
        await running
        return "done"

    assert run_virtual(scenario) == "done"


def test_a_plain_function_can_sleep_in_virtual_time() -> None:
    async def scenario(clock: VirtualClock) -> list[float]:
        started = clock.monotonic()

        def plain() -> float:
            clock.sleep(100)
            return clock.monotonic() - started

        return await asyncio.gather(asyncio.to_thread(plain), asyncio.to_thread(plain), asyncio.sleep(50, 50.0))

    assert run_virtual(scenario) == [pytest.approx(100), pytest.approx(100), 50.0]


def test_a_coroutine_that_would_block_its_loop_is_told_so() -> None:
    async def scenario(clock: VirtualClock) -> None:
        for block in (lambda: clock.sleep(1), clock.gate().wait):
            with pytest.raises(RuntimeError, match=r"await asyncio\.sleep"):
                block()

    run_virtual(scenario)


def test_a_gate_holds_a_plain_function_while_time_moves_and_time_stops_when_it_opens() -> None:
    async def scenario(clock: VirtualClock) -> float:
        started = clock.monotonic()
        gate = clock.gate()

        def plain() -> float:
            gate.wait()
            time.sleep(0.01)
            return clock.monotonic() - started

        running = asyncio.ensure_future(asyncio.to_thread(plain))
        await asyncio.sleep(10)
        assert not running.done()
        gate.open()
        gate_passed, _ = await asyncio.gather(running, asyncio.sleep(1000))
        gate.wait()  # open for good
        return gate_passed

    assert run_virtual(scenario) == pytest.approx(10)


def test_a_sleepers_work_is_done_before_time_moves() -> None:
    async def scenario(clock: VirtualClock) -> None:
        echo = Echo(clock, asyncio.get_running_loop())
        try:
            for _ in range(20):
                asked = clock.monotonic()
                async with asyncio.timeout(0.001):
                    assert await echo.ask() == asked
                await asyncio.sleep(1)
        finally:
            echo.stop()

    run_virtual(scenario)


@pytest.mark.parametrize("with_timer", [True, False])
def test_a_sleeper_is_poked_exactly_when_it_is_due(with_timer: bool) -> None:
    async def scenario(clock: VirtualClock) -> None:
        echo = Echo(clock, asyncio.get_running_loop())
        try:
            start = clock.monotonic()
            echo.moments = [start + 0.3, start + 7.25]
            if with_timer:
                await asyncio.sleep(10)
            else:
                while len(echo.woken) < 2:
                    await asyncio.sleep(20)
            assert echo.woken == [start + 0.3, start + 7.25]
        finally:
            echo.stop()

    run_virtual(scenario)


def test_a_sleeper_without_due_times_is_passed_in_steps_and_its_deadlock_is_found() -> None:
    class Silent:
        pokes = 0

        def quiesce(self) -> None:
            """Always at rest."""

        def poke(self) -> None:
            self.pokes += 1

    silent = Silent()

    async def scenario(clock: VirtualClock) -> None:
        clock.attach(silent)
        await asyncio.sleep(1)
        assert 15 <= silent.pokes <= 25
        await asyncio.Event().wait()

    with pytest.raises(VirtualTimeStuckError, match="deadlock"):
        run_virtual(scenario)


def test_a_thread_that_nobody_announced_is_still_heard() -> None:
    async def scenario(clock: VirtualClock) -> str:
        loop = asyncio.get_running_loop()
        heard: asyncio.Future[str] = loop.create_future()

        def late() -> None:
            time.sleep(0.02)
            loop.call_soon_threadsafe(heard.set_result, "heard")

        thread = threading.Thread(target=late)
        thread.start()
        try:
            return await heard
        finally:
            thread.join()

    assert run_virtual(scenario) == "heard"


def _order(seed: int | None) -> list[int]:
    async def scenario(clock: VirtualClock) -> list[int]:
        seen: list[int] = []

        async def step(n: int) -> None:
            for _ in range(3):
                await asyncio.sleep(0.01)
            seen.append(n)

        await asyncio.gather(*(step(n) for n in range(12)))
        return seen

    return run_virtual(scenario, seed=seed)


def test_a_seed_shuffles_tasks_the_same_way_every_time() -> None:
    assert _order(None) == _order(None)
    assert _order(1) == _order(1)
    assert len({tuple(_order(seed)) for seed in range(10)}) > 5


def test_a_seed_keeps_the_order_of_plain_callbacks() -> None:
    async def scenario(clock: VirtualClock) -> list[int]:
        seen: list[int] = []
        for n in range(20):
            asyncio.get_running_loop().call_soon(seen.append, n)
        await asyncio.sleep(1)
        return seen

    for seed in range(5):
        assert run_virtual(scenario, seed=seed) == list(range(20))


def test_the_wall_clock_jumps_alone() -> None:
    async def scenario(clock: VirtualClock) -> None:
        before = clock.monotonic()
        clock.jump(-3600)
        assert clock.wall() == EPOCH - 3600
        assert clock.monotonic() == before
        assert clock.real(5) is None

    run_virtual(scenario)


def test_a_fake_clock_moves_when_told_and_carries_sleepers_along() -> None:
    clock = FakeClock(wall=5000.0, monotonic=10.0)
    echo = Echo(clock)
    try:
        echo.moments = [10.5, 12.0, 99.0]
        clock.advance(5)
        assert (clock.monotonic(), clock.wall()) == (15.0, 5005.0)
        assert echo.woken == [10.5, 12.0]
        clock.jump(-1000)
        assert (clock.monotonic(), clock.wall()) == (15.0, 4005.0)
        assert clock.real(1) is None
        with pytest.raises(ValueError, match="jump"):
            clock.advance(-1)
    finally:
        echo.stop()
