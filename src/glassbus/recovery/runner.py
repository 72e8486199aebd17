"""One thread for work that may block, so that nothing else does."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from glassbus.clock import Clock


class Runner:
    """Does one job after the other on a daemon thread, which is started at the first and ends with `close`.

    A job must not raise. Whoever submits bounds how many wait.
    """

    def __init__(self, name: str, clock: Clock) -> None:
        self._name = name
        self._clock = clock
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Have `job` done. Does not block."""
        self._jobs.put(self._clock.on_thread(job))
        if self._thread is None or not self._thread.is_alive():  # also in a forked child
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name=self._name, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread after what was submitted. Does not wait for it. Idempotent."""
        if self._thread is not None:
            self._jobs.put(None)
            # What is submitted later is for another thread.
            self._jobs, self._thread = queue.SimpleQueue(), None


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while True:
        job = jobs.get()
        if job is None:
            return
        job()
