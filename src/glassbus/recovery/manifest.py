"""What an emergency stop writes down, and how the next start compares it with the store.

A manifest names what was held, by message id and subscription, with the ledger of that moment: never a payload.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from glassbus.policy.ledger import Account, Ledger
from glassbus.transport import sealed


class Saved(msgspec.Struct, frozen=True):
    """One delivery that was held."""

    message_id: str
    subscription: str
    attempt: int = 0

    @property
    def key(self) -> tuple[str, str]:
        return self.message_id, self.subscription


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`at` is wall seconds. `ledger` is None where the store could not tell. `spilled`: the messages themselves are in
    the spill file of the same number; else they are in the store."""

    bus: str
    address: str
    at: float
    reason: str
    error: str = ""
    spilled: bool = False
    ledger: Ledger | None = None
    saved: tuple[Saved, ...] = ()
    version: int = 1


def write(path: Path, manifest: Manifest) -> None:
    """Durable on return. Blocks. Raises OSError."""
    head = msgspec.structs.replace(manifest, saved=())
    sealed.write(path, [msgspec.json.encode(head), *map(msgspec.json.encode, manifest.saved)])


def read(path: Path) -> Manifest:
    """Raises FileNotFoundError, OSError, and ValueError when it is damaged."""
    lines = sealed.read(path)
    if not lines:
        raise ValueError("it is empty")
    try:
        head = msgspec.json.decode(lines[0], type=Manifest)
        saved = tuple(msgspec.json.decode(line, type=Saved) for line in lines[1:])
    except msgspec.MsgspecError as error:
        raise ValueError(f"a line of it is not of a manifest: {error}") from None
    if head.version != 1:
        raise ValueError(f"it is of version {head.version}, which this version does not know")
    return msgspec.structs.replace(head, saved=saved)


def missing(manifest: Manifest, found: Collection[tuple[str, str]], now: Ledger) -> int:
    """How many messages are nowhere: neither found in the store nor ended since, or gone from the ledger itself.

    `now` is the ledger read after `found` was.
    """
    then = manifest.ledger if manifest.ledger is not None else Ledger({})
    nowhere = Counter(saved.subscription for saved in manifest.saved if saved.key not in found)
    lost = 0
    for subscription, count in nowhere.items():
        before = then.accounts.get(subscription, Account())
        if subscription in now.accounts:
            ended = _ended(now.accounts[subscription]) - _ended(before)
        else:  # forgotten, with all it held
            ended = now.gone.accepted - then.gone.accepted
        lost += max(0, count - max(0, ended))
    # Accepted only grows: a store that knows of less is an older copy, or another one.
    return max(lost, then.total.accepted - now.total.accepted)


def _ended(account: Account) -> int:
    """Deliveries that ended and left no row behind."""
    return account.handled + account.expired + account.discarded


def of_spilled(manifest: Manifest, found: Sequence[tuple[str, str]]) -> int:
    """How many messages of `manifest` are not in its spill file."""
    left = Counter(saved.key for saved in manifest.saved)
    left.subtract(found)
    return sum(count for count in left.values() if count > 0)
