"""A transport that passes everything on to another, for those that change a part of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from glassbus.facts import Delivery
from glassbus.message import Envelope
from glassbus.policy.delivery import Decision
from glassbus.policy.ledger import Audit, Ledger
from glassbus.transport import (
    DeadLetterFilter,
    DeadLetterRecord,
    Features,
    Forced,
    Hold,
    Listener,
    Locates,
    QueueState,
    Recorded,
    Stored,
    SubscriptionSpec,
    Transport,
    Whereabouts,
)


class TransportWrapper:
    """See the port for what each method promises: it promises what the inner one does."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.features: Features = inner.features
        self.address = inner.address

    async def open(self, listener: Listener, /) -> None:
        await self._inner.open(listener)

    async def close(self, deadline_s: float, /) -> tuple[int, int]:
        return await self._inner.close(deadline_s)

    async def declare(self, spec: SubscriptionSpec, /, *, consume: bool) -> Hold:
        return await self._inner.declare(spec, consume=consume)

    async def forget(self, name: str, /) -> int:
        return await self._inner.forget(name)

    async def publish(self, batch: Sequence[Envelope], /, wait_s: float) -> Sequence[Stored]:
        return await self._inner.publish(batch, wait_s)

    def publish_now(self, envelope: Envelope, /) -> Stored | None:
        return self._inner.publish_now(envelope)

    def claim_now(self, name: str, /) -> Delivery | None:
        return self._inner.claim_now(name)

    async def claim(self, name: str, /) -> Delivery:
        return await self._inner.claim(name)

    def handled_now(self, delivery: Delivery, /) -> bool:
        return self._inner.handled_now(delivery)

    def settle(self, delivery: Delivery, decision: Decision, recorded: Recorded, /) -> None:
        self._inner.settle(delivery, decision, recorded)

    async def flush(self) -> None:
        await self._inner.flush()

    async def set_hold(self, name: str, /, *, paused: bool | None = None, forced: Forced | None = None) -> Hold:
        return await self._inner.set_hold(name, paused=paused, forced=forced)

    @property
    def hold_back(self) -> Callable[[str, int], None] | None:
        """See `HoldsBack`; None when the inner one cannot."""
        found: Callable[[str, int], None] | None = getattr(self._inner, "hold_back", None)
        return found

    def ledger(self) -> Ledger:
        return self._inner.ledger()

    def queues(self) -> dict[str, QueueState]:
        return self._inner.queues()

    async def audit(self) -> Audit:
        return await self._inner.audit()

    async def dead_letters(self, wanted: DeadLetterFilter, limit: int, /) -> list[DeadLetterRecord]:
        return await self._inner.dead_letters(wanted, limit)

    async def locate(self, message_id: str, /) -> Whereabouts | None:
        """See `Locates`; None when the inner one cannot tell."""
        return await self._inner.locate(message_id) if isinstance(self._inner, Locates) else None

    async def ids_like(self, beginning: str, limit: int, /) -> list[str]:
        """See `Locates`."""
        return await self._inner.ids_like(beginning, limit) if isinstance(self._inner, Locates) else []

    async def replay(self, ids: Sequence[str], /) -> list[DeadLetterRecord]:
        return await self._inner.replay(ids)

    async def discard(self, ids: Sequence[str], /) -> list[DeadLetterRecord]:
        return await self._inner.discard(ids)

    async def probe(self) -> float:
        return await self._inner.probe()

    def disk_free_bytes(self) -> int | None:
        return self._inner.disk_free_bytes()
