"""What the contract alone takes: one topic, one handler, written out by hand, with nothing to decide.

Each message is encoded and decoded, has an id, an envelope, a delivery, a receipt and a context of its own, is counted
in flight and handled, and is timed three times into histograms. There is no routing, no limit, no deadline, no retry,
no failure, no stop and no observer; nothing is checked. It is the floor of this bus in Python: what is between them is
the price of being a bus, and what is below it is C.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from bisect import bisect_left
from collections import deque
from contextvars import copy_context
from typing import Any

import msgspec

from bench.rows import BURST, PAYLOAD, TOPIC, Run, Sample, Tally, bursts
from glassbus import Delivery, Message, Priority, Receipt
from glassbus.facts import current_delivery
from glassbus.message import Envelope, Level
from glassbus.record.tally import AGE_BOUNDS, DURATION_BOUNDS

_DONE = object()
_encode, _decode = msgspec.json.Encoder().encode, msgspec.json.Decoder().decode


class _ByHand:
    def __init__(self) -> None:
        self.ready: deque[Delivery] = deque()
        self.in_flight: set[Delivery] = set()
        self.accepted = self.handled = 0
        self.counts = [[0] * 20 for _ in range(3)]
        self.seconds = [0.0] * 3
        self.idle: asyncio.Future[None] | None = None
        self._numbers = itertools.count(1)

    async def publish(self, topic: str, payload: Any) -> Receipt:
        started = time.monotonic()
        body = _encode(payload)
        number = next(self._numbers)
        message_id = f"{number:032x}"
        envelope = Envelope(message_id, topic, body, "json", {}, 1, None, time.time())
        self.accepted += 1
        self.ready.append(Delivery(envelope, "orders", topic, 0, number))
        if self.idle is not None:
            self.idle.set_result(None)
            self.idle = None
        self._took(0, DURATION_BOUNDS, time.monotonic() - started)
        return Receipt(message_id, Level.MEMORY, ("orders",))

    def _took(self, which: int, bounds: tuple[float, ...], seconds: float) -> None:
        self.counts[which][bisect_left(bounds, seconds)] += 1
        self.seconds[which] += seconds

    async def serve(self, handler: Any) -> None:
        ready, in_flight, enter, base = self.ready, self.in_flight, current_delivery.set, copy_context()
        while True:
            if not ready:
                self.idle = asyncio.get_running_loop().create_future()
                await self.idle
            delivery = ready.popleft()
            envelope = delivery.envelope
            delivery.attempt += 1
            in_flight.add(delivery)
            started = time.monotonic()
            message = Message(
                envelope.id, envelope.topic, _decode(envelope.body), envelope.headers, Priority.NORMAL, None, 0.0
            )
            context = base.copy()
            context.run(enter, delivery)
            coroutine = handler(message)
            assert context.run(next, coroutine.__await__(), _DONE) is _DONE
            self._took(1, DURATION_BOUNDS, time.monotonic() - started)
            in_flight.remove(delivery)
            self.handled += 1
            self._took(2, AGE_BOUNDS, time.time() - envelope.published_at)


def by_hand(run: Run) -> Sample:
    async def main(total: int) -> Sample:
        tally, bus = Tally(), _ByHand()

        async def handler(_message: Message[Any]) -> None:
            tally.hit()

        async def send(size: int) -> None:
            for _ in range(size):
                await bus.publish(TOPIC, PAYLOAD)

        task = asyncio.create_task(bus.serve(handler))
        sample = await bursts(total, tally, send)
        task.cancel()
        return sample

    return asyncio.run(main(run.count(50_000, BURST)))
