"""A store seen from outside, as it was left: who looks is no owner, and takes nothing back from dead ones."""

from __future__ import annotations

import time
from pathlib import Path

from glassbus.transport import DeadLetterFilter, DeadLetterRecord, QueueState, Whereabouts
from glassbus.transport.sqlite.reading import Reader


class LooksOnly:
    """What can be asked of the file at `path` without opening it as a bus does. Blocks. Raises TransportError.

    Not for a process that has the same file open as a transport: closing would drop that one's locks.
    """

    def __init__(self, path: str) -> None:
        self.address = f"sqlite:///{path}"
        self._reader = Reader(str(Path(path)), path, time.time)

    async def locate(self, message_id: str, /) -> Whereabouts | None:
        return self._reader.locate(message_id, time.monotonic())

    async def ids_like(self, beginning: str, limit: int, /) -> list[str]:
        return self._reader.ids_like(beginning, limit)

    async def dead_letters(self, wanted: DeadLetterFilter, limit: int, /) -> list[DeadLetterRecord]:
        return self._reader.dead_letters(wanted, limit)

    def queues(self) -> dict[str, QueueState]:
        return self._reader.queues()

    def close(self) -> None:
        self._reader.close()
