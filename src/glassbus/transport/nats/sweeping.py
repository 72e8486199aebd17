"""Keeps the stream short: now and then a snapshot, and then what stands in it need not stand in entries."""

from __future__ import annotations

import asyncio
import time

from glassbus.transport.nats import snapshot
from glassbus.transport.nats.connection import Link, NotFound, StoreRefused
from glassbus.transport.nats.state import Fold
from glassbus.transport.nats.stream import Found, Place

#: A snapshot is taken when so much was written since the last one, and at least as much as is alive.
ENTRIES = 20_000
BYTES = 64 * 1024 * 1024
#: Of a stream with a limit, the part that is kept free for acknowledgements, and at which it is swept.
_RESERVE = 0.05
_RESERVE_BYTES = 1024 * 1024
#: About what a stored entry takes beside its payload, in bytes.
_OVERHEAD = 96
_SWEEP_AT = 0.5
_LOOK_S = 2.0
_DELETES_AT_ONCE = 64
_WRONG_LAST_SEQUENCE = 10071


class Sweeper:
    """Knows how much the stream holds, and keeps it short. Belongs to the NATS thread."""

    def __init__(self, place: Place) -> None:
        self.head_seq = 0
        self._place = place
        self._entries = 0
        self._bytes = 0
        self._max_bytes = 0
        self._used = 0
        self._looked_at = 0.0

    def limit(self, found: Found) -> None:
        """What is known of the stream's size."""
        self._max_bytes, self._used = found.max_bytes, found.used_bytes

    def read(self, seq: int, size: int) -> None:
        """An entry was read."""
        self._used += size + _OVERHEAD
        if seq > self.head_seq:
            self._entries += 1
            self._bytes += size

    @property
    def room(self) -> float:
        """For how many bytes of new messages there is room."""
        if not self._max_bytes:
            return float("inf")
        reserve = max(self._max_bytes * _RESERVE, min(_RESERVE_BYTES, self._max_bytes / 5))
        return self._max_bytes - reserve - self._used

    def full(self) -> str:
        """What is told of a stream without room."""
        return (
            f"the stream {self._place.stream} has {self._used:,} of its {self._max_bytes:,} bytes, and the rest keeps "
            "acknowledgements possible; nothing was stored. Let consumers catch up, discard dead letters, or raise "
            "its max_bytes"
        )

    async def look(self, link: Link, fold: Fold, token: str) -> int:
        """Sweep if it is time, and if it is our turn; up to which entry what is not needed was deleted, or 0.

        Raises TransportError.
        """
        if self._max_bytes and time.monotonic() - self._looked_at > _LOOK_S:
            await self._measure(link)
        if not self._due(fold) or token != min(fold.owners, default=""):
            return 0
        if any(owner.parts for owner in fold.owners.values()):
            return 0
        return await self._sweep(link, fold, token)

    def _due(self, fold: Fold) -> bool:
        if self._max_bytes and self._bytes and self._used > self._max_bytes * _SWEEP_AT:
            return self._bytes * 20 > self._max_bytes
        return (self._entries >= ENTRIES or self._bytes >= BYTES) and self._entries * 16 >= len(fold.rows)

    async def _measure(self, link: Link) -> None:
        self._looked_at = time.monotonic()
        info = await link.api(f"STREAM.INFO.{self._place.stream}")
        self._max_bytes, self._used = max(0, int(info["config"]["max_bytes"])), int(info["state"]["bytes"])

    async def _sweep(self, link: Link, fold: Fold, token: str) -> int:
        place = self._place
        behind, before = await snapshot.read_head(link, place)
        if before is not None and before.seq >= fold.seq:
            return 0
        # From here to the next `await` nothing is read, so all of this belongs together.
        seq, whole = fold.seq, snapshot.dump(fold)
        upto = min([seq, *(owner.seen for owner in fold.owners.values() if owner.token != token)])
        spent = [one for one in fold.spent if one[0] <= upto]
        needed = min(fold.blobs, default=seq + 1)
        try:
            await snapshot.write(link, place, seq, whole, behind)
        except StoreRefused as error:
            if error.code == _WRONG_LAST_SEQUENCE:
                return 0  # another process was first
            raise
        self.head_seq, self._entries, self._bytes = seq, 0, 0
        await self._purge(link, place.plain, upto + 1)
        await self._purge(link, place.bearing, min(needed, upto + 1))
        gate = asyncio.Semaphore(_DELETES_AT_ONCE)
        await asyncio.gather(*(self._delete(link, gate, at, places, needed) for at, places in spent))
        if before is not None:
            await self._purge(link, f"{place.snapshot(before.seq)}.*")
        await link.api(f"STREAM.PURGE.{place.stream}", {"filter": place.head, "keep": 1})
        if self._max_bytes:
            await self._measure(link)
        return upto

    async def _purge(self, link: Link, subject: str, before: int = 0) -> None:
        wanted: dict[str, object] = {"filter": subject}
        if before:
            wanted["seq"] = before
        await link.api(f"STREAM.PURGE.{self._place.stream}", wanted)

    async def _delete(
        self, link: Link, gate: asyncio.Semaphore, seq: int, places: tuple[tuple[str, int], ...], purged: int
    ) -> None:
        async with gate:
            for token, _ in places:
                await self._purge(link, f"{self._place.body(token)}.*")
            if seq < purged:
                return
            try:
                await link.api(f"STREAM.MSG.DELETE.{self._place.stream}", {"seq": seq, "no_erase": True})
            except NotFound:
                return  # deleted by one who died before he could say so
            except StoreRefused as error:
                if error.code not in (10043, 10057):  # the same, in other words
                    raise
