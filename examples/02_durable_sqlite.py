"""Messages in a file: they wait for their consumer, and survive the process that published them.

Prints:

    published while nobody runs: level disk, for charge
    in the store: 3 pending
    charged order 1
    charged order 2
    charged order 3
    charged order 2 again? it was a duplicate: True
    in the store: 0 pending, 3 handled
"""

import asyncio
import tempfile
from pathlib import Path

from glassbus import Message, MessageBus


async def charge(message: Message) -> None:
    print(f"charged order {message.payload['order_id']}")


async def main(url: str) -> None:
    # A subscription is declared by the first bus that runs it. From then on it collects.
    consumer = MessageBus(url)
    consumer.subscribe("orders.*")(charge)
    async with consumer:
        pass

    # Another process, perhaps on another day: it publishes and runs no handler.
    async with MessageBus(url) as publisher:
        for order in (1, 2, 3):
            receipt = await publisher.publish("orders.created", {"order_id": order}, message_id=f"order-{order}")
        print(f"published while nobody runs: level {receipt.level}, for {', '.join(receipt.subscriptions)}")
        print(f"in the store: {publisher.ledger().total.pending} pending")

    consumer = MessageBus(url)
    consumer.subscribe("orders.*")(charge)
    async with consumer:
        await consumer.drain()
        # An id is known for 10 minutes, so a publisher that is not sure may simply publish again.
        again = await consumer.publish("orders.created", {"order_id": 2}, message_id="order-2")
        print(f"charged order 2 again? it was a duplicate: {again.duplicate}")
        total = consumer.ledger().total
        print(f"in the store: {total.pending} pending, {total.handled} handled")


with tempfile.TemporaryDirectory() as folder:
    asyncio.run(main(f"sqlite:///{Path(folder, 'orders.db')}"))
