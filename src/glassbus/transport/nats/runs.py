"""Coroutines that the bus's loop has run on the NATS thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from glassbus.errors import TransportError
from glassbus.transport.nats.mailbox import Mailbox

Result = TypeVar("Result")


class Runs:
    """Starts coroutines on a loop of another thread, and fails what it could not run before it ended."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._lock = threading.Lock()
        self._under_way: dict[Future[Any], Coroutine[Any, Any, Any]] | None = {}

    def run(self, loop: asyncio.AbstractEventLoop, make: Callable[[], Coroutine[Any, Any, Result]]) -> Future[Result]:
        """Whoever asked calls `Mailbox.end` once he has the answer; until then virtual time stands still.

        Raises TransportError when the thread has ended.
        """
        with self._lock:
            if self._under_way is None:
                raise TransportError("the store is closed")
            self._mailbox.begin()
            coroutine = make()
            running = asyncio.run_coroutine_threadsafe(coroutine, loop)
            self._under_way[running] = coroutine
        running.add_done_callback(self._ran)
        return running

    def _ran(self, running: Future[Any]) -> None:
        with self._lock:
            if self._under_way is not None:
                self._under_way.pop(running, None)

    def end(self) -> None:
        """The loop is gone: what it was yet to run is run no more."""
        with self._lock:
            under_way, self._under_way = self._under_way or {}, None
        for running, coroutine in under_way.items():
            coroutine.close()
            with contextlib.suppress(InvalidStateError):  # it was cancelled meanwhile
                running.set_exception(TransportError("the store is closed"))
