"""Calls to what may do anything: hang, raise any exception, ignore its cancellation. None of it gets out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from glassbus.errors import EndpointUnreachable

#: How long what was called off is waited for, in seconds; then it is left to itself.
GRACE_S = 1.0


class Answer(NamedTuple):
    """What a call returned, or raised."""

    value: Any
    error: BaseException | None


class Calls:
    """Makes calls, each in a task of its own, bounded in time. Belongs to the loop."""

    def __init__(self) -> None:
        self._under_way: set[asyncio.Task[Answer]] = set()

    async def make(
        self, call: Callable[[], Awaitable[Any]], timeout_s: float, *, unless: asyncio.Future[None] | None = None
    ) -> Answer:
        """What `call` answers or raises. One that takes longer, or until `unless`, is called off."""
        task = asyncio.create_task(_caught(call))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        try:
            wanted: set[asyncio.Future[Any]] = {task} if unless is None else {task, unless}
            await asyncio.wait(wanted, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            task.cancel()
        await asyncio.wait({task}, timeout=GRACE_S)
        return Answer(None, EndpointUnreachable(f"no answer within {timeout_s:g} s"))

    async def call_off(self) -> None:
        """Call off all that is under way."""
        for call in self._under_way:
            call.cancel()
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=GRACE_S)


async def _caught(call: Callable[[], Awaitable[Any]]) -> Answer:
    try:
        return Answer(await call(), None)
    except BaseException as error:  # noqa: BLE001 - whatever it is: what it means is its caller's to say
        return Answer(None, error)
