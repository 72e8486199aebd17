"""The conservation law: every accepted delivery is in exactly one place."""

from __future__ import annotations

import msgspec


class Account(msgspec.Struct, frozen=True):
    """Where the deliveries of one subscription are. All are counts of deliveries.

    `accepted` is a counter of its own, changed only when a publish is stored; the
    others say where they went. `discarded` includes what `forget` and dead-letter
    discard removed.
    """

    accepted: int = 0
    ready: int = 0
    scheduled: int = 0
    retrying: int = 0
    in_flight: int = 0
    handled: int = 0
    dead_lettered: int = 0
    expired: int = 0
    discarded: int = 0

    @property
    def pending(self) -> int:
        return self.ready + self.scheduled + self.retrying

    @property
    def settled(self) -> int:
        return self.handled + self.dead_lettered + self.expired + self.discarded

    @property
    def unaccounted(self) -> int:
        """accepted - (pending + in flight + handled + dead-lettered + expired + discarded). Must be 0."""
        return self.accepted - self.pending - self.in_flight - self.settled

    def __add__(self, other: Account) -> Account:
        return Account(*(getattr(self, f) + getattr(other, f) for f in self.__struct_fields__))


class Ledger(msgspec.Struct, frozen=True):
    """The accounts of a store. `gone` holds what forgotten subscriptions left behind."""

    accounts: dict[str, Account]
    gone: Account = Account()

    @property
    def total(self) -> Account:
        total = self.gone
        for account in self.accounts.values():
            total += account
        return total

    @property
    def unaccounted(self) -> int:
        """Deliveries that are nowhere or in two places: 0, always. Errors of opposite sign do not cancel."""
        return abs(self.gone.unaccounted) + sum(abs(a.unaccounted) for a in self.accounts.values())

    @property
    def balanced(self) -> bool:
        return self.unaccounted == 0


class Audit(msgspec.Struct, frozen=True):
    """The result of recounting every row of a store against its ledger.

    `problems` is empty when all is well; each entry is a sentence for people.
    """

    ledger: Ledger
    recounted: Ledger
    messages: int
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems
