"""Messages and reports that are in the stream and not at hand: read when they are needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from glassbus.errors import ErrorReport, StoreCorrupt
from glassbus.facts import Delivery
from glassbus.message import Envelope
from glassbus.policy.overflow import displaced_report, unconsumed_report
from glassbus.transport.nats import records as r
from glassbus.transport.nats.connection import Link, NotFound
from glassbus.transport.nats.model import Dead, Row
from glassbus.transport.nats.stream import Place
from glassbus.transport.reports import decode_report

#: A body up to this size travels in its entry, a larger one is kept apart; bytes.
INLINE_BYTES = 16 * 1024
_AT_ONCE = 32


def at_hand(row: Row) -> Envelope | None:
    """The message of `row` if nothing need be read for it."""
    sent = row.content
    return None if sent is None or sent.parts else sent.envelope(sent.body, expires=row.expires_at > 0)


class Contents:
    """Reads over whatever connection there is. Everything raises StoreCorrupt for what is not there any more."""

    def __init__(self, place: Place, link: Callable[[], Link]) -> None:
        self._place = place
        self._link = link
        self._gate = asyncio.Semaphore(_AT_ONCE)

    async def envelopes(self, rows: Sequence[Row]) -> list[Envelope]:
        """Raises TransportError while there is no connection."""
        entries = await self._entries(row.blob for row in rows if row.content is None)
        return list(await asyncio.gather(*(self._envelope(row, entries) for row in rows)))

    async def _envelope(self, row: Row, entries: dict[int, r.Entry]) -> Envelope:
        sent = row.content
        if sent is None:
            op = entries[row.blob].ops[row.op]
            if not isinstance(op, r.Publish | r.Part):
                raise StoreCorrupt(f"entry {row.blob} of the store holds no message at {row.op}")
            sent = op.messages[row.at]
        body = sent.body
        if sent.parts:
            subject = self._place.body(sent.place)
            pieces = await asyncio.gather(*(self._last(f"{subject}.{n}") for n in range(sent.parts)))
            body = b"".join(pieces)
        return sent.envelope(body, expires=row.expires_at > 0)

    async def reports(self, letters: Sequence[tuple[Delivery, Dead]]) -> list[ErrorReport]:
        """The reports of dead letters."""
        entries = await self._entries(dead.blob for _, dead in letters if dead.blob)
        return [self._report(delivery, dead, entries) for delivery, dead in letters]

    @staticmethod
    def _report(delivery: Delivery, dead: Dead, entries: dict[int, r.Entry]) -> ErrorReport:
        if not dead.blob:
            return made_up(delivery, dead)
        op = entries[dead.blob].ops[dead.op]
        if not isinstance(op, r.Settle):
            raise StoreCorrupt(f"entry {dead.blob} of the store holds no report at {dead.op}")
        return decode_report(op.report)

    async def _entries(self, seqs: Iterable[int]) -> dict[int, r.Entry]:
        wanted = sorted(set(seqs))
        found = await asyncio.gather(*(self._entry(seq) for seq in wanted))
        return dict(zip(wanted, found, strict=True))

    async def _entry(self, seq: int) -> r.Entry:
        async with self._gate:
            try:
                stored = await self._link().get(self._place.stream, seq)
            except NotFound as error:
                raise StoreCorrupt(
                    f"entry {seq} is gone from the stream {self._place.stream}, and is needed"
                ) from error
        return r.decode(stored, f"entry {seq} of the stream {self._place.stream}")

    async def _last(self, subject: str) -> bytes:
        async with self._gate:
            try:
                return (await self._link().last(self._place.stream, subject))[1]
            except NotFound as error:
                raise StoreCorrupt(f"a body is gone from the stream {self._place.stream}, and is needed") from error


def made_up(delivery: Delivery, dead: Dead) -> ErrorReport:
    """The report of a message that had no room: all of it follows from what is known."""
    if dead.by < 0:
        return unconsumed_report(delivery, dead.capacity, dead.died_at)
    return displaced_report(delivery, dead.by, dead.capacity, dead.died_at)
