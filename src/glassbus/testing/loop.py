"""An asyncio loop in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
import random
import selectors
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from glassbus.clock import Clock
from glassbus.testing.sleepers import Sleepers

Result = TypeVar("Result")
_Args = TypeVarTuple("_Args")

# How often, for a hundredth of a real second, time stands still for the functions on threads, before it goes on
# without them; and waits for a thread that nobody announced, before a deadlock is called one. Where the machine is
# busy each of these waits takes longer, as the work on the threads does.
_THREAD_PATIENCE = 50
_DEADLOCK_GRACE = 50
_GLANCE_S = 0.01
_ASYNCIO = str(Path(asyncio.__file__).parent)
# A loop that runs this often without time moving will never end.
_TURNS_MAX = 1_000_000
# Virtual seconds that may pass without a single callback while a sleeper gives no due time.
_SILENCE_MAX_S = 3600.0


class VirtualTimeStuckError(RuntimeError):
    """Virtual time cannot go on: a deadlock, a task that spins, or a thread that does not end."""


class _Selector(selectors.DefaultSelector):
    """Where an event loop would sleep, this asks the loop to move time instead."""

    loop: VirtualTimeLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        self.loop.take_turn()
        if events or (timeout is not None and timeout <= 0):
            return events
        return self.loop.pass_time()

    def poll(self, real_s: float) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(real_s)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio loop in virtual time: when nothing is ready it moves to the next timer at once.

    Before time moves, every attached `Sleeper` has done its work (`quiesce`), and every
    function given to `run_in_executor` has returned or waits in `VirtualClock.sleep`
    or `Gate.wait`; so what threads do happens at the virtual time they were asked.
    Raises VirtualTimeStuckError when nothing can ever happen again, naming the tasks that
    wait, or when `limit_s` virtual seconds have passed. Real sockets are not waited for.

    With a `seed`, tasks that are ready together run in an order drawn from it. Plain
    callbacks keep their order, which asyncio promises.
    """

    def __init__(self, *, seed: int | None = None, start: float = 1000.0, limit_s: float = math.inf) -> None:
        self._now = start
        self._end = start + limit_s
        self._random = None if seed is None else random.Random(seed)  # noqa: S311 - a schedule, not a secret
        self.sleepers = Sleepers()
        self.glassbus_clock: Clock | None = None
        self._turns = 0
        self._silent_since = start
        self._threads = threading.Lock()
        self._jobs: set[_Job] = set()
        self._asleep: list[tuple[float, int, Wait]] = []
        self._order = itertools.count()
        self._job = threading.local()
        self._poll = _Selector()
        self._poll.loop = self
        super().__init__(self._poll)
        self.set_default_executor(ThreadPoolExecutor(max_workers=16, thread_name_prefix="virtual"))

    def time(self) -> float:
        return self._now

    # Moving time

    def take_turn(self) -> None:
        """Called once a turn of the loop: count it, and shuffle what is ready."""
        self._turns += 1
        if self._turns > _TURNS_MAX:
            raise VirtualTimeStuckError(
                f"{_TURNS_MAX:,} turns of the loop without time moving: a task spins. {self._pending()}"
            )
        ready: Any = self._ready  # type: ignore[attr-defined]
        if ready:
            self._silent_since = self._now
        if self._random is not None and len(ready) > 1:
            places = [
                i for i, h in enumerate(ready) if isinstance(getattr(h._callback, "__self__", None), asyncio.Task)
            ]
            tasks = [ready[i] for i in places]
            self._random.shuffle(tasks)
            for place, task in zip(places, tasks, strict=True):
                ready[place] = task

    def _wait_patiently(self, glances: int) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for what other threads bring about; nothing if they bring nothing."""
        for _ in range(glances):
            events = self._poll.poll(_GLANCE_S)
            if events:
                return events
        return []

    def pass_time(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Nothing is ready: let threads finish, then move to the next moment at which something is due."""
        self.sleepers.quiesce()
        events = self._poll.poll(0)
        ready: Any = self._ready  # type: ignore[attr-defined]
        if events or ready:
            return events
        if self._jobs:
            events = self._wait_patiently(_THREAD_PATIENCE)
            if events or ready:
                return events
            with self._threads:
                self._jobs.clear()  # they run long: time goes on without them
        moment = self._next_moment()
        if moment is None:
            events = self._wait_patiently(_DEADLOCK_GRACE)
            if not events:
                raise VirtualTimeStuckError(f"deadlock: nothing is ready and no timer is set. {self._pending()}")
            return events
        if moment > self._end:
            raise VirtualTimeStuckError(
                f"not done at virtual time {self._now:,.0f} s, and only timers are left. {self._pending()}"
            )
        if moment > self._now:
            self._now = moment
            self._turns = 0
        self._wake_threads()
        self.sleepers.poke()
        return self._poll.poll(0)

    def _next_moment(self) -> float | None:
        timers: Any = self._scheduled  # type: ignore[attr-defined]
        moments = [timers[0]._when] if timers else []
        with self._threads:
            moments += [at for at, _, _ in self._asleep[:1]]
        due = self.sleepers.due(self._now)
        # Stepping for the sake of a silent sleeper must end some time.
        if due is not None and (moments or not self.sleepers.silent or self._now - self._silent_since < _SILENCE_MAX_S):
            moments.append(due)
        return max(self._now, min(moments)) if moments else None

    def _pending(self) -> str:
        lines = [f"{task.get_name()} waits at {_where(task)}" for task in asyncio.all_tasks(self)]
        return "Pending tasks: " + ("; ".join(sorted(lines)) or "none")

    # Threads

    def on_thread(self, job: Callable[[], None], /) -> Callable[[], None]:
        """See `Clock`. A job that waits in virtual time, or runs for very long, lets time move."""
        mine = _Job()
        self._begin(mine)

        def run() -> None:
            self._job.current = mine
            try:
                job()
            finally:
                self._job.current = None
                self._end_job(mine)

        return run

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*_Args], Result], *args: *_Args
    ) -> asyncio.Future[Result]:
        """As in asyncio; virtual time stands still until `func` returns or waits in virtual time."""
        mine = _Job()

        def run() -> Result:
            self._job.current = mine
            try:
                return func(*args)
            finally:
                self._job.current = None

        pool: Executor = executor or self._default_executor  # type: ignore[attr-defined]
        self._begin(mine)
        try:
            running: Future[Result] = pool.submit(run)
        except BaseException:
            self._end_job(mine)
            raise
        result = asyncio.wrap_future(running, loop=self)
        # Added after wrap_future's own callback, so the result is on its way before the job counts as ended.
        running.add_done_callback(lambda _: self._end_job(mine))
        return result

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncio's name
        mine = _Job()
        self._begin(mine)
        try:
            await super().shutdown_default_executor()
        finally:
            self._end_job(mine)

    def _begin(self, job: _Job) -> None:
        with self._threads:
            self._jobs.add(job)

    def _end_job(self, job: _Job) -> None:
        with self._threads:
            self._jobs.discard(job)
        # A job that outlived its loop has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self.call_soon_threadsafe(_nothing)

    def wait_in_thread(self, wait: Wait, until: float | None) -> None:
        """Block the calling thread in `wait`, letting time move meanwhile.

        Raises RuntimeError on the loop's own thread, which would wait for ever.
        """
        if asyncio._get_running_loop() is self:
            raise RuntimeError("this would block the event loop for ever; `await asyncio.sleep(…)` passes virtual time")
        wait.job = getattr(self._job, "current", None)
        with self._threads:
            if until is not None:
                heapq.heappush(self._asleep, (until, next(self._order), wait))
            if wait.job is not None:
                self._jobs.discard(wait.job)
        self.call_soon_threadsafe(_nothing)
        wait.event.wait()

    def release(self, wait: Wait) -> None:
        """Let a thread that is blocked in `wait` go on, and time stand still for it again."""
        with self._threads:
            if wait.job is not None:
                self._jobs.add(wait.job)
        wait.event.set()

    def _wake_threads(self) -> None:
        while True:
            with self._threads:
                if not self._asleep or self._asleep[0][0] > self._now:
                    return
                _, _, wait = heapq.heappop(self._asleep)
            self.release(wait)


class _Job:
    """One function that runs on a thread, and for which time stands still."""


class Wait:
    """One thread that waits in virtual time."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.job: _Job | None = None


def _nothing() -> None:
    """Only wakes the loop."""


def _where(task: asyncio.Task[Any]) -> str:
    """The innermost place outside asyncio where `task` waits."""
    awaited: Any = task.get_coro()
    frame = None
    while awaited is not None:
        inner = getattr(awaited, "cr_frame", None) or getattr(awaited, "ag_frame", None)
        if inner is not None and (frame is None or not inner.f_code.co_filename.startswith(_ASYNCIO)):
            frame = inner
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)
    return f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})" if frame else "an unknown place"
