"""A program of threads: the same bus with plain calls, and errors of its own that it hands over to be recovered.

Prints:

    published at level disk, wanted by ('charge',)
    charged [17, 18], attempts [17, 18, 18]
    a message that failed elsewhere is given back: True
    critical: 0.50 of the messages handled lately
    an event loop is not blocked: publish() blocks
    restarted, nothing lost: charged [17, 18, 19], pending 0
"""

import asyncio
import logging
import tempfile

from glassbus import Message, ProductionMessageBus, WouldBlockLoop

logging.getLogger("glassbus").setLevel(logging.CRITICAL)


class Queue:
    """A queue of the program's own: recovery gives messages back to it."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def requeue_message(self, message: str) -> bool:
        self.messages.append(message)
        return True


def main(folder: str) -> None:
    bus = ProductionMessageBus(
        {"url": f"sqlite:///{folder}/orders.db", "log_dir": f"{folder}/logs", "max_retries": 2, "timeout": 5.0}
    )
    attempts: list[int] = []
    charged: list[int] = []

    @bus.subscribe("orders.*")
    def charge(message: Message) -> None:
        order = message.payload["order_id"]
        attempts.append(order)
        if order == 18 and attempts.count(18) == 1:
            raise ConnectionError("card machine did not answer")
        charged.append(order)

    with bus:
        receipt = bus.publish("orders.created", {"order_id": 17})
        print(f"published at level {receipt.level}, wanted by {receipt.subscriptions}")
        bus.publish("orders.created", {"order_id": 18})
        bus.drain()
        print(f"charged {charged}, attempts {attempts}")

        queue = Queue()
        recovered = bus._handle_message_processing_error("legacy-1", ValueError("bad"), {"message_queue": queue})
        print("a message that failed elsewhere is given back:", recovered)
        for number in range(2):
            bus._handle_message_processing_error(f"legacy-{number}", ValueError("nobody takes it back"))
        health = bus.get_health_status()
        print(f"{health['status']}: {health['success_rate']:.2f} of the messages handled lately")

        async def on_a_loop() -> None:
            try:
                bus.publish("orders.created", {"order_id": 19})
            except WouldBlockLoop as error:
                print("an event loop is not blocked:", str(error).partition(",")[0])
            await asyncio.to_thread(bus.publish, "orders.created", {"order_id": 19})

        bus.pause("charge")
        asyncio.run(on_a_loop())

    with bus:  # the message that was held is still there
        bus.resume("charge")
        bus.drain()
        print(f"restarted, nothing lost: charged {charged}, pending {bus.ledger().total.pending}")


with tempfile.TemporaryDirectory() as folder:
    main(folder)
