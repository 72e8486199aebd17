"""Publish, subscribe by pattern, and see that every message is accounted for.

Prints:

    orders.created went to audit, charge
    orders.cancelled went to audit
    newsletter.sent went to nobody
    charged order 17
    audit saw orders.created
    audit saw orders.cancelled
    accepted 3, handled 3, unaccounted 0
"""

import asyncio

from glassbus import Message, MessageBus

bus = MessageBus()  # in memory; see 02 for a durable one


@bus.subscribe("orders.created")
async def charge(message: Message) -> None:
    print(f"charged order {message.payload['order_id']}")


@bus.subscribe("orders.*")
def audit(message: Message) -> None:  # a plain function runs on a thread
    print(f"audit saw {message.topic}")


async def main() -> None:
    async with bus:
        for topic in ("orders.created", "orders.cancelled", "newsletter.sent"):
            receipt = await bus.publish(topic, {"order_id": 17})
            print(f"{topic} went to {', '.join(sorted(receipt.subscriptions)) or 'nobody'}")
        await bus.drain()  # until all of it is handled, retries included
        total = bus.ledger().total
        print(f"accepted {total.accepted}, handled {total.handled}, unaccounted {total.unaccounted}")


asyncio.run(main())
