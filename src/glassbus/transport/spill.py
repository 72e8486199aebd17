"""Saves what a memory transport holds at a stop, and restores it at the next start.

One JSON line a delivery, sealed (`transport.sealed`): the file appears whole or not at all, and a damaged
one is put aside with a clear error and never half-read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from glassbus.errors import StoreCorrupt
from glassbus.facts import Delivery
from glassbus.message import Envelope
from glassbus.transport import DeadLetterRecord, sealed


class _Waiting(msgspec.Struct, tag="waiting"):
    subscription: str
    destination: str
    attempt: int
    first_failed_at: float
    recovering: tuple[str, str] | None
    replays: int
    envelope: Envelope


class _Dead(msgspec.Struct, tag="dead"):
    record: DeadLetterRecord


def _line(held: Delivery | DeadLetterRecord) -> _Waiting | _Dead:
    if isinstance(held, DeadLetterRecord):
        return _Dead(held)
    return _Waiting(
        held.subscription,
        held.destination,
        held.attempt,
        held.first_failed_at,
        held.recovering,
        held.replays,
        held.envelope,
    )


def _held(line: _Waiting | _Dead) -> Delivery | DeadLetterRecord:
    if isinstance(line, _Dead):
        return line.record
    return Delivery(
        line.envelope,
        line.subscription,
        line.destination,
        line.attempt,
        first_failed_at=line.first_failed_at,
        recovering=line.recovering,
        replays=line.replays,
    )


def spill(path: Path, held: Sequence[Delivery | DeadLetterRecord]) -> None:
    """Write `held` to `path`, durable on return. Nothing held: no file is left."""
    if not held:
        path.unlink(missing_ok=True)
        return
    sealed.write(path, [msgspec.json.encode(_line(one)) for one in held])


def restore(path: Path) -> list[Delivery | DeadLetterRecord]:
    """What `spill` wrote, if anything. Raises OSError, and StoreCorrupt after putting a damaged file aside."""
    sealed.sweep(path.parent, path.name)
    try:
        return read(path)
    except FileNotFoundError:
        return []
    except ValueError as error:
        aside = sealed.move_aside(path)
        raise StoreCorrupt(
            f"the saved messages in {path.name!r} are damaged ({error}); the file was moved to {aside.name!r}: "
            "look at it, then start again"
        ) from None


def read(path: Path) -> list[Delivery | DeadLetterRecord]:
    """What `spill` wrote. Raises FileNotFoundError, OSError, and ValueError when the file is damaged."""
    try:
        return [_held(msgspec.json.decode(line, type=_Waiting | _Dead)) for line in sealed.read(path)]
    except msgspec.MsgspecError as error:
        raise ValueError(f"a line of it is not a delivery: {error}") from None
