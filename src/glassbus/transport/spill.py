"""Saves what a memory transport holds at a stop, and restores it at the next start.

One JSON line a delivery, then a last line with their number and checksum. The
file appears whole or not at all (written beside, fsynced, renamed), readable by its
owner only. A damaged file is put aside with a clear error and never half-read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec

from glassbus.errors import StoreCorrupt
from glassbus.facts import Delivery
from glassbus.message import Envelope
from glassbus.transport import DeadLetterRecord


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


class _Seal(msgspec.Struct):
    deliveries: int
    checksum: str


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


def _checksum(body: bytes) -> str:
    return blake2b(body, digest_size=32).hexdigest()


def spill(path: Path, held: Sequence[Delivery | DeadLetterRecord]) -> None:
    """Write `held` to `path`, durable on return. Nothing held: no file is left."""
    if not held:
        path.unlink(missing_ok=True)
        return
    lines = [msgspec.json.encode(_line(one)) for one in held]
    body = b"".join(line + b"\n" for line in lines)
    seal = msgspec.json.encode(_Seal(len(lines), _checksum(body)))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(beside, flags, 0o600), "wb") as file:
        file.write(body + seal + b"\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def restore(path: Path) -> list[Delivery | DeadLetterRecord]:
    """What `spill` wrote, if anything. Raises StoreCorrupt after putting a damaged file aside."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    try:
        body, seal_line = text[: text.rstrip(b"\n").rfind(b"\n") + 1], text.rstrip(b"\n").rpartition(b"\n")[2]
        seal = msgspec.json.decode(seal_line, type=_Seal)
        lines = [msgspec.json.decode(line, type=_Waiting | _Dead) for line in body.splitlines()]
        if seal.deliveries != len(lines) or seal.checksum != _checksum(body):
            raise ValueError("its checksum does not match")
    except (ValueError, msgspec.MsgspecError) as error:
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        raise StoreCorrupt(
            f"the saved messages in {path.name!r} are damaged ({error}); the file was moved to {aside.name!r}: "
            "look at it, then start again"
        ) from None
    return [_held(line) for line in lines]
