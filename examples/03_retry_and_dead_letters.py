"""A failing handler is retried; what cannot be handled rests in the dead-letter queue until somebody replays it.

Prints:

    order 1: charged at attempt 1
    order 2: charged at attempt 3
    dead letter: order 3 after 3 attempts, ValueError: no card number
    replayed 1
    order 3: charged at attempt 1
    handled 3, dead letters 0
"""

import asyncio
import logging
from collections import Counter

from glassbus import Delivery, Message, MessageBus, Retry

logging.getLogger("glassbus").setLevel(logging.CRITICAL)  # each failure is also logged; here we print our own

bus = MessageBus()
runs: Counter[int] = Counter()
cards = {1: "4000", 2: "4001"}


@bus.subscribe("orders.*", retry=Retry(max_attempts=3, immediate=1, base_delay=0.01))
async def charge(message: Message, delivery: Delivery) -> None:
    order = message.payload["order_id"]
    runs[order] += 1
    if order not in cards:
        raise ValueError("no card number")
    if order == 2 and runs[order] < 3:
        raise ConnectionError("card machine did not answer")
    print(f"order {order}: charged at attempt {delivery.attempt}")


async def main() -> None:
    async with bus:
        for order in (1, 2, 3):
            await bus.publish("orders.created", {"order_id": order})
            await bus.drain()

        letters = await bus.dead_letters.list()
        for letter in letters:
            order, report = letter.message.payload["order_id"], letter.report
            reason = f"{report.exception_type}: {report.message}"
            print(f"dead letter: order {order} after {letter.attempts} attempts, {reason}")

        cards[3] = "4002"  # the cause is mended, so the message may try again
        print(f"replayed {await bus.dead_letters.replay(*(letter.id for letter in letters))}")
        await bus.drain()
        print(f"handled {bus.ledger().total.handled}, dead letters {len(await bus.dead_letters.list())}")


asyncio.run(main())
