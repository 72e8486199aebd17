"""What is to be done later, on threads of its own: nobody who schedules it waits.

One thread watches the clock and never runs a job; another runs them. A job that hangs is left alone: a
further thread then runs what comes after it.
"""

from __future__ import annotations

import atexit
import contextlib
import heapq
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]

#: At most so many jobs wait; more are refused.
PENDING_MAX = 10_000
#: A job that runs for so long is taken to hang, in seconds.
HANGING_AFTER_S = 10.0
#: At most so many threads run jobs, the hanging ones among them.
RUNNERS_MAX = 8
#: Threads that had nothing to do for so long end, in seconds.
_IDLE_S = 30.0
#: How long the end of the program waits for jobs, in seconds.
_EXIT_S = 5.0


class Timer:
    """Runs jobs after a delay. Its daemon threads start with the first job; any thread may use it.

    When the program ends, or at `close`, what still waits is run at once and not dropped. A forked child
    starts with nothing: what waited is the parent's to run.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._reset()
        _timers.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int, Job]] = []
        self._due: deque[Job] = deque()
        self._order = itertools.count()
        self._running: dict[int, float] = {}  # by thread, since when
        self._runners = 0
        self._watched = False
        self._closed = False

    def schedule(self, delay_s: float, job: Job) -> bool:
        """Run `job` in `delay_s` seconds. False when it will not be run: too many wait, or it is closed.

        A job must not raise.
        """
        with self._changed:
            if self._closed or len(self._waiting) + len(self._due) >= PENDING_MAX:
                return False
            try:
                self._start_threads()
            except RuntimeError:  # no thread can be started: the process is at its limit, or ends
                return False
            heapq.heappush(self._waiting, (time.monotonic() + delay_s, next(self._order), job))
            self._changed.notify_all()
        return True

    @property
    def pending(self) -> int:
        """Jobs that wait, or run."""
        with self._changed:
            return len(self._waiting) + len(self._due) + len(self._running)

    def close(self, deadline_s: float = _EXIT_S) -> bool:
        """Take nothing more, and run what waits at once. Whether all of it ended within `deadline_s`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not (self._waiting or self._due or self._running), deadline_s)

    def _start_threads(self) -> None:
        if not self._runners:
            self._start(self._run)
            self._runners = 1
        if not self._watched:
            self._start(self._watch)
            self._watched = True

    def _start(self, target: Job) -> None:
        threading.Thread(target=target, name=f"glassbus-{self._name}", daemon=True).start()

    def _watch(self) -> None:
        """Hand over what is due, until nothing has waited for a while."""
        with self._changed:
            while True:
                now = time.monotonic()
                while self._waiting and (self._closed or self._waiting[0][0] <= now):
                    self._due.append(heapq.heappop(self._waiting)[2])
                    self._changed.notify_all()
                self._relieve(now)
                wait_s = self._waiting[0][0] - now if self._waiting else _IDLE_S
                told = self._changed.wait(min(wait_s, HANGING_AFTER_S) if self._due or self._running else wait_s)
                if not (told or self._waiting or self._due or self._running):
                    self._watched = False
                    return

    def _relieve(self, now: float) -> None:
        """Another runner when all that there are hang."""
        hanging = sum(now - since >= HANGING_AFTER_S for since in self._running.values())
        if self._due and self._runners <= hanging and self._runners < RUNNERS_MAX:
            with contextlib.suppress(RuntimeError):  # no thread to be had: asked for again soon
                self._start(self._run)
                self._runners += 1

    def _run(self) -> None:
        me = threading.get_ident()
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._due, _IDLE_S):
                    self._runners -= 1
                    return
                job = self._due.popleft()
                self._running[me] = time.monotonic()
            try:
                job()
            finally:
                with self._changed:
                    del self._running[me]
                    self._changed.notify_all()
            del job  # what it holds is not kept while this thread waits


_timers: weakref.WeakSet[Timer] = weakref.WeakSet()


def _at_exit() -> None:
    for timer in list(_timers):
        if timer.pending:
            timer.close()


def _after_fork() -> None:
    for timer in list(_timers):
        timer._reset()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)
