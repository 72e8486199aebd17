"""Ask a store for all that a story needs of it. Changes nothing."""

from __future__ import annotations

from typing import Protocol

from glassbus.story.tell import Asked
from glassbus.transport import DeadLetterFilter, DeadLetterRecord, Locates, QueueState

_LETTERS_MAX = 1000


class Askable(Protocol):
    """The part of a transport that a story needs; `Locates` besides, if it can."""

    address: str

    async def dead_letters(self, wanted: DeadLetterFilter, limit: int, /) -> list[DeadLetterRecord]: ...
    def queues(self) -> dict[str, QueueState]: ...


async def ask(transport: Askable, message_id: str) -> Asked | None:
    """What `transport` answers; None where it cannot tell where single messages are. Raises TransportError."""
    if not isinstance(transport, Locates):
        return None
    where = await transport.locate(message_id)
    letters: list[DeadLetterRecord] = []
    if where is not None and any(one.dead_letter for one in where.deliveries):
        letters = await transport.dead_letters(DeadLetterFilter(message_id=message_id), _LETTERS_MAX)
    return Asked(transport.address, where, letters, transport.queues())
