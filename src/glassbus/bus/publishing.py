"""Publishing."""

from __future__ import annotations

import asyncio
from asyncio import get_running_loop
from collections.abc import Iterable, Sequence
from typing import Any

from glassbus.bus.parts import Parts
from glassbus.errors import (
    BrokerUnreachable,
    BusNotRunning,
    BusOverloaded,
    EndpointRefused,
    EndpointUnreachable,
    InvalidMessage,
    PublishRejected,
    PublishUncertain,
    TransportError,
)
from glassbus.facts import current_delivery
from glassbus.message import Envelope, Outgoing, Priority, Receipt
from glassbus.observer import safe_text
from glassbus.transport import Stored


class Publishing(Parts):
    """The way in. A plain publish that fits goes to the store and comes back without giving the loop a turn."""

    async def publish(
        self,
        topic: str,
        payload: Any = None,
        *,
        message_id: str | None = None,
        key: str | None = None,
        priority: Priority = Priority.NORMAL,
        headers: dict[str, str] | None = None,
        delay: float = 0.0,
        expires_in: float | None = None,
    ) -> Receipt:
        """Store one message for every subscription that wants it, and say how safe it is.

        On return it is stored at the receipt's `level`. A full queue makes it wait, up to the bus's
        `publish_timeout`, the highest priority first; inside a handler it does not wait. Then lower priorities
        may give way to it, or the queue may grow for a while (`subscribe(overflow=…)`), or it is refused. A second
        publish of the same `message_id` within 10 minutes yields a `duplicate` receipt. `delay` and `expires_in` are
        seconds of wall time.

        Raises PublishRejected (certainly not stored; its subclasses say why) or PublishUncertain
        (may be stored: publish again with the same id).
        """
        if self._state != "running" or self._bars or get_running_loop() is not self._loop:
            await self._make_ready(topic, message_id)
        started = self._monotonic()
        try:
            envelope = self._publisher.seal(topic, payload, message_id, key, priority, headers, delay, expires_in)
        except PublishRejected as error:
            self._publisher.refused(topic, message_id, error, started)
            raise
        stored = self._transport.publish_now(envelope)
        if stored is None:
            stored = (await self._store((envelope,), started))[0]
        self._publisher.stored(envelope, stored, self._monotonic() - started)
        return Receipt(envelope.id, stored.spooled or self._level, stored.subscriptions, stored.duplicate)

    async def publish_many(self, messages: Iterable[Outgoing | tuple[str, Any]]) -> list[Receipt]:
        """Store a batch: all of it or nothing, with one receipt for each message in order.

        Takes `Outgoing` messages or pairs of topic and payload. Raises as `publish` does; a
        PublishUncertain names all of them (`message_ids`): publish the whole batch again, each message with its id.
        """
        sealed: list[Envelope] = []
        for message in _each(messages):
            one = message if isinstance(message, Outgoing) else Outgoing(*message)
            if self._state != "running" or self._bars or get_running_loop() is not self._loop:
                await self._make_ready(one.topic, one.message_id)
            started = self._monotonic()
            try:
                sealed.append(
                    self._publisher.seal(
                        one.topic,
                        one.payload,
                        one.message_id,
                        one.key,
                        one.priority,
                        one.headers,
                        one.delay,
                        one.expires_in,
                    )
                )
            except PublishRejected as error:
                self._publisher.refused(one.topic, one.message_id, error, started)
                raise
        if not sealed:
            return []
        started = self._monotonic()
        stored = await self._store(sealed, started)
        duration_s = self._monotonic() - started
        receipts = []
        for envelope, outcome in zip(sealed, stored, strict=True):
            self._publisher.stored(envelope, outcome, duration_s)
            level = outcome.spooled or self._level
            receipts.append(Receipt(envelope.id, level, outcome.subscriptions, outcome.duplicate))
        return receipts

    async def _publish_sealed(self, envelope: Envelope) -> Stored:
        """Store one message that the bus itself has made. Raises as `publish` does."""
        if self._state != "running" or self._bars:
            await self._make_ready(envelope.topic, envelope.id)
        started = self._monotonic()
        stored = (await self._store((envelope,), started))[0]
        self._publisher.stored(envelope, stored, self._monotonic() - started)
        return stored

    async def _store(self, batch: Sequence[Envelope], started: float) -> Sequence[Stored]:
        """Have the transport store `batch`, waiting for room except inside a handler, which would wait for itself."""
        try:
            return await self._transport.publish(batch, 0.0 if self._inside_handler() else self._patience_s)
        except (EndpointUnreachable, EndpointRefused) as error:
            rejected = BrokerUnreachable(f"{safe_text(error, 300)}; publish again later, or give the bus a state_dir")
            self._publisher.not_stored(batch, rejected, started)
            raise rejected from error
        except (TransportError, PublishUncertain) as error:
            known = error if isinstance(error, PublishUncertain) else None
            uncertain = known or PublishUncertain(batch[0].id, safe_text(error, 300))
            uncertain.message_ids = tuple(envelope.id for envelope in batch)
            self._publisher.not_stored(batch, uncertain, started)
            raise uncertain from (error.__cause__ if known else error)
        except BaseException as error:
            self._publisher.not_stored(batch, error, started)
            raise

    def _inside_handler(self) -> bool:
        """Whether a handler of ours runs here. A task that it left behind inherits its context, but holds no slot."""
        delivery = current_delivery.get()
        worker = self._workers.get(delivery.subscription) if delivery is not None else None
        return worker is not None and worker.holds(delivery)

    async def _make_ready(self, topic: object, message_id: str | None) -> None:
        """Wait for subscriptions that are being declared. Raises BusNotRunning or BusOverloaded."""
        elsewhere = self._loop is not None and get_running_loop() is not self._loop
        if self._state == "running" and not elsewhere and not self._pulse.broken:
            if self.intake.paused:
                why = f"bus {self.name!r} takes nothing now, try again later: {self.intake.paused}"
                overloaded = BusOverloaded(why)
                self._publisher.refused(topic, message_id, overloaded, self._monotonic())
                raise overloaded
            await asyncio.wait(self._declaring)
            return
        if self._state == "stopping" and not elsewhere and not self.emergency.began and self._inside_handler():
            return  # what runs may finish, and that takes what it publishes
        if elsewhere:
            why = "runs on another event loop: hand the call to it with asyncio.run_coroutine_threadsafe"
        elif self._pulse.broken:
            why = f"has stopped taking messages: {self._pulse.broken}"
        elif self._state == "new":
            why = "is not started: use 'async with bus' or 'await bus.start()'"
        elif self._state == "starting":
            why = "is starting: publish when start() has returned"
        else:
            why = f"is {self._state}: it takes no more messages"
        error = BusNotRunning(f"bus {self.name!r} {why}")
        self._publisher.refused(topic, message_id, error, self._monotonic())
        raise error


def _each(messages: object) -> Iterable[Outgoing | tuple[str, Any]]:
    """The messages of a batch, their form checked. Raises InvalidMessage."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Iterable):
        raise InvalidMessage(f"publish_many takes an iterable of messages, not {type(messages).__name__}")
    for message in messages:
        if not isinstance(message, Outgoing) and not (isinstance(message, tuple) and len(message) == 2):
            raise InvalidMessage(f"publish_many takes Outgoing or (topic, payload) tuples, not {repr(message)[:80]}")
        yield message
