"""One event loop in one daemon thread, which any other thread may ask to do something and wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from glassbus.blocking.helpers import HelpedLoop
from glassbus.errors import GlassbusError, WouldBlockLoop

Result = TypeVar("Result")

#: At most so many calls wait for the loop, so that one that hangs costs no memory without bound.
POSTED_MAX = 10_000
_BATCH = 32


class LoopThread:
    """The thread starts when it is first asked for, and ends at `close`.

    It ends with the program: it keeps nobody from leaving. A forked child has no such thread and is told so.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # Reentrant: a signal handler may come in on the thread that holds it.
        self._lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._waiting: set[Future[Any]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._posted: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._called = False
        self._forked = False
        self.dropped = 0
        _threads.add(self)

    @property
    def alive(self) -> bool:
        return self._loop is not None and not self._forked

    @property
    def here(self) -> bool:
        """Whether this code runs on the loop's thread."""
        return self._thread is threading.current_thread()

    def call(
        self,
        function: Callable[..., Coroutine[Any, Any, Result]],
        *args: Any,
        within_s: float | None = None,
        **kwargs: Any,
    ) -> Result:
        """Run `function` on the loop, in a copy of the caller's context, and return what it returns.

        Raises what it raises; WouldBlockLoop when a loop runs in this very thread, which would stand still meanwhile;
        TimeoutError after `within_s` seconds, if given; GlassbusError in a forked child, or when the loop
        ends meanwhile. What is interrupted here is cancelled there.
        """
        self.check(getattr(function, "__name__", "this"))
        answer: Future[tuple[Result | None, BaseException | None]] = Future()
        begun: list[asyncio.Task[None]] = []

        def begin() -> None:
            if answer.set_running_or_notify_cancel():  # from here on the answer is the loop's to give
                task = loop.create_task(_answered(answer, function, args, kwargs))
                self._tasks.add(task)  # kept, also when the caller has gone
                task.add_done_callback(self._tasks.discard)
                begun.append(task)

        def give_up() -> None:
            for task in begun:
                task.cancel()

        with self._lock:
            loop = self._running()
            self._waiting.add(answer)
            loop.call_soon_threadsafe(begin)  # in a copy of this thread's context, and so does the task run
        try:
            result, error = answer.result(within_s)
        except BaseException:
            answer.cancel()
            with self._lock:
                if self._loop is loop:
                    loop.call_soon_threadsafe(give_up)
            raise
        finally:
            with self._lock:
                self._waiting.discard(answer)
        if error is not None:
            try:
                raise error
            finally:
                del error  # the traceback refers to this frame, and this frame to it
        return result  # type: ignore[return-value]  # without an error it is there

    def check(self, what: str) -> None:
        """Raises WouldBlockLoop when this thread runs a loop, and GlassbusError in a forked child."""
        if _a_loop_runs_here():
            raise WouldBlockLoop(
                f"{what}() blocks, and an event loop runs in this thread, which would stand still until it returns: "
                "use MessageBus there, or call it with asyncio.to_thread"
            )
        if self._forked:
            raise GlassbusError("this process was forked from the one that the bus runs in: make a new bus here")

    def post(self, function: Callable[..., object], *args: Any) -> bool:
        """Have the loop call `function` soon, without waiting. False when it does not run, or too much waits for it."""
        with self._lock:
            if self._loop is None or self._forked:
                return False
            if len(self._posted) >= POSTED_MAX:
                self.dropped += 1
                return False
            self._posted.append((function, args))
            if not self._called:  # waking the loop is the costly part: once for all that waits
                self._called = True
                self._loop.call_soon_threadsafe(self._work, self._loop)
            return True

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make the calls that wait, some at a time. On the loop."""
        for _ in range(_BATCH):
            with self._lock:
                if not self._posted:
                    self._called = False
                    return
                function, args = self._posted.popleft()
            try:
                function(*args)
            except BaseException as error:  # noqa: BLE001 - one that raises must not end the others, nor the loop
                loop.call_exception_handler({"message": "a call posted to the bus's loop raised", "exception": error})
        loop.call_soon(self._work, loop)

    def close(self, within_s: float = 5.0) -> None:
        """End the loop and its thread; who still waits gets a GlassbusError. Idempotent."""
        with self._lock:
            loop, thread = self._loop, self._thread
            if loop is None or thread is None or self._forked:
                return
            loop.call_soon_threadsafe(loop.stop)
        if not self.here:
            thread.join(within_s)

    def _running(self) -> asyncio.AbstractEventLoop:
        """The loop, its thread started. The lock is held."""
        if self._loop is None:
            loop = HelpedLoop(self._name)
            thread = threading.Thread(target=self._run, args=(loop,), name=f"glassbus-{self._name}-loop", daemon=True)
            try:
                thread.start()
            except BaseException:
                loop.close()
                raise
            self._loop, self._thread = loop, thread
            self._posted.clear()
            self._called = False
        return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            with self._lock:
                self._loop = None
                waiting, self._waiting = self._waiting, set()
            for answer in waiting:
                with contextlib.suppress(InvalidStateError):  # answered, or given up
                    answer.set_result((None, GlassbusError("the bus's loop ended before it answered")))
            _end(loop)

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        self._forked = self._forked or self._loop is not None
        self._waiting = set()


def _a_loop_runs_here() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _answered(
    answer: Future[Any], function: Callable[..., Coroutine[Any, Any, Any]], args: Any, kwargs: Any
) -> None:
    """Run it and hand over what came of it. Nothing is raised here: SystemExit would end the loop."""
    result, error = None, None
    try:
        result = await function(*args, **kwargs)
    except BaseException as raised:  # noqa: BLE001 - it is the caller's to handle
        error = raised
    if not answer.done():
        answer.set_result((result, error))


def _end(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what still runs on a stopped loop, and close it."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


_threads: weakref.WeakSet[LoopThread] = weakref.WeakSet()


def _after_fork() -> None:
    for thread in list(_threads):
        thread._after_fork()


os.register_at_fork(after_in_child=_after_fork)
