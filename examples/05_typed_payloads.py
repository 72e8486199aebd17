"""A handler's annotation says what it takes. What does not fit goes to the dead-letter queue as it came.

Prints:

    charge got Order(order_id=17, amount=9.5)
    ship got Parcel(order_id=17, weight_kg=1.2)
    log got {'order_id': 17}
    dead letter: {'order_id': 'seventeen'} for charge, serialization_error
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import msgspec

from glassbus import Message, MessageBus, Retry

logging.getLogger("glassbus").setLevel(logging.CRITICAL)

bus = MessageBus()


class Order(msgspec.Struct):
    order_id: int
    amount: float = 0.0


@dataclass
class Parcel:
    order_id: int
    weight_kg: float


@bus.subscribe("orders.paid", retry=Retry(max_attempts=1))
async def charge(message: Message[Order]) -> None:  # the whole message, its payload an Order
    print(f"charge got {message.payload}")


@bus.subscribe("orders.packed")
async def ship(parcel: Parcel) -> None:  # or just the payload
    print(f"ship got {parcel}")


@bus.subscribe("orders.noted")
async def log(payload: dict[str, Any]) -> None:
    print(f"log got {payload}")


async def main() -> None:
    async with bus:
        await bus.publish("orders.paid", Order(17, 9.5))
        await bus.drain()
        await bus.publish("orders.packed", {"order_id": 17, "weight_kg": 1.2})
        await bus.drain()
        await bus.publish("orders.noted", {"order_id": 17})
        await bus.publish("orders.paid", {"order_id": "seventeen"})
        await bus.drain()
        for letter in await bus.dead_letters.list():
            print(f"dead letter: {letter.message.payload} for {letter.subscription}, {letter.report.category}")


asyncio.run(main())
