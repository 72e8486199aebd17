"""Threads for what a loop may not wait for, that also work while the interpreter ends.

The executor that asyncio makes refuses work from the moment the main thread is done, and no thread can be started
after that: a bus that is stopped by the end of its program needs both.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

Job = Callable[[], None]


class Helpers:
    """Daemon threads that are kept for the next job; the first is started at once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[Job | None]] = []
        self._start(None)

    def run(self, job: Job) -> None:
        """Run `job`, which must not raise, on a thread; here where no thread can be had."""
        with self._lock:
            inbox = self._idle.pop() if self._idle else None
        if inbox is not None:
            inbox.put(job)
            return
        try:
            self._start(job)
        except RuntimeError:  # the process is at its limit, or ends
            job()

    def close(self) -> None:
        """End the threads that have nothing to do; the others end with the program."""
        with self._lock:
            idle, self._idle = self._idle, []
        for inbox in idle:
            inbox.put(None)

    def _start(self, job: Job | None) -> None:
        inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        if job is not None:
            inbox.put(job)
        threading.Thread(target=self._serve, args=(inbox,), name=f"glassbus-{self._name}-helper", daemon=True).start()
        if job is None:
            self._idle.append(inbox)

    def _serve(self, inbox: queue.SimpleQueue[Job | None]) -> None:
        while (job := inbox.get()) is not None:
            job()
            del job  # what it holds is not kept while this thread waits
            with self._lock:
                self._idle.append(inbox)


class HelpedLoop(asyncio.SelectorEventLoop):
    """The usual loop, whose default executor is `Helpers`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._helpers = Helpers(name)

    def run_in_executor(  # type: ignore[override]  # with plain types, which is what callers see
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        if executor is not None:
            return super().run_in_executor(executor, func, *args)
        answer: asyncio.Future[Any] = self.create_future()

        def job() -> None:
            result, error = None, None
            try:
                result = func(*args)
            except BaseException as raised:  # noqa: BLE001 - it is the caller's to handle
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self.call_soon_threadsafe(_settle, answer, result, error)

        self._helpers.run(job)
        return answer

    def close(self) -> None:
        self._helpers.close()
        super().close()


def _settle(answer: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if answer.done():  # cancelled
        return
    if error is None:
        answer.set_result(result)
    elif isinstance(error, StopIteration):
        answer.set_exception(RuntimeError("a function on a thread raised StopIteration"))  # a future refuses it
    else:
        answer.set_exception(error)
