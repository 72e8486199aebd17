"""The world around the demo's service: three things it depends on, each with its own way to fail.

They are pretended, so that the demo needs no network: what they do to the service is what the real ones do.
"""

from __future__ import annotations

import asyncio
import random
import threading
import zlib


class Payments:
    """A payment provider: quick and reliable, until it is down. Then every call is refused at once."""

    def __init__(self) -> None:
        self.down = False
        self.charged_cents = 0
        #: Payments made, by the key the caller gave: charging twice with one key charges once.
        self._known: dict[str, int] = {}

    async def charge(self, cents: int, idempotency_key: str) -> None:
        """Take `cents`. Raises ConnectionRefusedError while it is down."""
        await asyncio.sleep(0.01)
        if self.down:
            raise ConnectionRefusedError("payments.example:443 refused the connection")
        if idempotency_key not in self._known:
            self._known[idempotency_key] = cents
            self.charged_cents += cents
            if len(self._known) > 100_000:
                del self._known[next(iter(self._known))]


class Warehouse:
    """A stock service behind a bad network: one call in five is cut off."""

    failing = 0.2

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    async def reserve(self, item: str, quantity: int) -> None:
        """Put `quantity` of `item` aside. Raises ConnectionResetError now and then."""
        await asyncio.sleep(0.005)
        if self._chance.random() < self.failing:
            raise ConnectionResetError(f"warehouse.example reset the connection while reserving {item}")


class Mailer:
    """A mail gateway that is slow: most mails take 20 to 200 ms, one in twenty far longer."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    async def send(self, to: str, subject: str) -> None:
        stuck = self._chance.random() < 0.05
        await asyncio.sleep(self._chance.uniform(0.4, 1.5) if stuck else self._chance.uniform(0.02, 0.2))


class Archive:
    """Cold storage: packs what it is given. Plain, blocking code, called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.bytes_in = self.bytes_packed = 0

    def keep(self, name: str, content: bytes) -> None:
        packed = zlib.compress(content, 6)
        with self._lock:
            self.bytes_in += len(content)
            self.bytes_packed += len(packed)


class World:
    """All of it. `seed` makes its moods repeatable as far as the order of calls is."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311 - a pretended network needs no secrecy
        self.payments = Payments()
        self.warehouse = Warehouse(chance)
        self.mailer = Mailer(chance)
        self.archive = Archive()
