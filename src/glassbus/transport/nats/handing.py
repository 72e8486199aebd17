"""Deliveries that are ours, and facts about deliveries: told once their messages are at hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from glassbus.errors import StoreCorrupt, TransportError
from glassbus.facts import Delivery, Fact
from glassbus.message import Envelope
from glassbus.transport.nats.contents import Contents, at_hand
from glassbus.transport.nats.mailbox import Mailbox
from glassbus.transport.nats.model import Row
from glassbus.transport.nats.requests import Answers
from glassbus.transport.nats.rounds import Rounds

Result = TypeVar("Result")

#: How soon a message that could not be read is tried again, in seconds.
_READ_AGAIN_S = 0.2
_NOBODY = Envelope("", "", b"", "", {})


class Handing:
    """Belongs to the NATS thread. `rounds` is set before anything is asked of it."""

    def __init__(
        self,
        contents: Contents,
        mailbox: Mailbox,
        answers: Callable[[], Answers],
        post: Callable[[], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self.rounds: Rounds
        self._contents = contents
        self._mailbox = mailbox
        self._answers = answers
        self._post = post
        self._spawn = spawn

    def hand_out(self, name: str, rows: Sequence[Row]) -> None:
        far: list[tuple[Row, Any]] = []
        for row in rows:
            envelope = at_hand(row)
            delivery = self.rounds.delivery(row, envelope or _NOBODY)
            if envelope is None:
                far.append((row, delivery))
            else:
                self._give(name, delivery)
        if far:
            self._spawn(self._fetch_and_give(name, far))

    def _give(self, name: str, delivery: Any) -> None:
        waiting = self.rounds.waiters(name)
        while waiting:
            future = waiting.popleft()
            if not future.done():
                self._answers().claimed.append((future, delivery))
                return
        self.rounds.give_back(delivery)

    async def _fetch_and_give(self, name: str, far: list[tuple[Row, Any]]) -> None:
        envelopes = await self._read_at_last(lambda: self._contents.envelopes([row for row, _ in far]))
        for (_, delivery), envelope in zip(far, envelopes, strict=True):
            delivery.envelope = envelope
            self._give(name, delivery)
        self._post()
        self._mailbox.stir()

    async def _read_at_last(self, read: Callable[[], Awaitable[Result]]) -> Result:
        """Read, however often the connection breaks under it. Raises StoreCorrupt."""
        while True:
            try:
                return await read()
            except StoreCorrupt:
                raise
            except TransportError:
                # What it was to tell is told when there is a connection again; virtual time goes on meanwhile.
                self._mailbox.end()
                try:
                    await asyncio.sleep(_READ_AGAIN_S)
                finally:
                    self._mailbox.begin()

    def tell(self, rows: Sequence[Row], facts: Callable[[list[Delivery]], list[Fact]]) -> None:
        """State facts about deliveries, once their messages are at hand."""
        envelopes = [at_hand(row) for row in rows]
        told = [self.rounds.delivery(row, envelope or _NOBODY) for row, envelope in zip(rows, envelopes, strict=True)]
        if None in envelopes:
            self._spawn(self._tell_later(rows, told, facts))
        else:
            self._answers().facts.extend(facts(told))

    async def _tell_later(
        self, rows: Sequence[Row], told: list[Delivery], facts: Callable[[list[Delivery]], list[Fact]]
    ) -> None:
        envelopes = await self._read_at_last(lambda: self._contents.envelopes(rows))
        for delivery, envelope in zip(told, envelopes, strict=True):
            delivery.envelope = envelope
        self._answers().facts.extend(facts(told))
        self._post()
