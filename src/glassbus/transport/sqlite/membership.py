"""This process as one of the store's owners: registered, renewing its lease, looking after the others."""

from __future__ import annotations

from pathlib import Path

from glassbus.transport.sqlite import owners, upkeep
from glassbus.transport.sqlite.books import Books, Owner
from glassbus.transport.sqlite.transaction import Transaction


class Membership:
    """The owner that this process is. Belongs to the writer thread; construction does no I/O."""

    def __init__(self, *, lease_s: float = owners.LEASE_S, boot: str | None = None) -> None:
        self.id = 0
        self.boot = boot or ""
        self.lease_s = lease_s
        self.consuming: set[str] = set()
        self.renew_at = 0.0
        self._folder = Path()
        self._lock: owners.OwnerLock | None = None
        self._suspected: list[int] = []

    @property
    def suspects_others(self) -> bool:
        return bool(self._suspected)

    def open(self, store: Path, txn: Transaction) -> None:
        """Take back what dead owners left, and register."""
        self._folder = store.with_name(f"{store.name}-owners")
        self.boot = self.boot or owners.boot_id()
        upkeep.new_boot(txn, self.boot)
        self.look(txn.books, txn.monotonic)
        self.expel_lost(txn)
        upkeep.heal(txn)
        self.register(txn)
        owners.sweep(self._folder, {owner.token for owner in txn.books.owners.values()})

    def register(self, txn: Transaction) -> None:
        """Enter as a new owner, under a lock of its own."""
        if self._lock is not None:
            self._lock.release()
        self._lock = owners.OwnerLock(self._folder, self.boot)
        self.id = txn.owner = upkeep.register(txn, self._lock.token, self.boot, txn.monotonic + self.lease_s)
        upkeep.consume(txn, self.id, self.consuming)
        self.renew_at = txn.monotonic + self.lease_s / 3

    def look(self, books: Books, monotonic: float) -> None:
        """See which of the other owners seem lost. Outside a transaction, so `books` may be out of date."""
        self._suspected = [o.id for o in books.owners.values() if o.id != self.id and self._why_lost(o, monotonic)]

    def _why_lost(self, owner: Owner, monotonic: float) -> int:
        return owners.lost(owner, self._folder, self.boot, monotonic)

    def expel_lost(self, txn: Transaction) -> None:
        for id_ in self._suspected:
            owner = txn.books.owners.get(id_)
            # Looked at again: it may have renewed its lease, or another process was faster.
            why = 0 if owner is None else self._why_lost(owner, txn.monotonic)
            if owner is not None and why:
                upkeep.expel(txn, owner, why)

    def renew(self, txn: Transaction) -> None:
        if txn.monotonic >= self.renew_at:
            upkeep.renew(txn, self.id, txn.monotonic + self.lease_s)

    def committed(self, monotonic: float) -> None:
        """What the transaction did for us is stored."""
        self._suspected = []
        if monotonic >= self.renew_at:
            self.renew_at = monotonic + self.lease_s / 3

    def leave(self) -> None:
        """Drop the lock. What the store still says of us, others then take as a death."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
