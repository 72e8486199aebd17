"""Settings that an operator changes while the bus runs, and what becomes of a file that cannot work.

Prints:

    started with concurrency 4
    reloaded: concurrency 8, nothing restarted; not of this bus: ('invoices',)
    refused: subscriptions.charge.retry has no setting 'max_attempt'; did you mean 'max_attempts'?
    still concurrency 8
    started again on the broken file, with the last known good: concurrency 8
"""

import asyncio
import logging
import tempfile
from pathlib import Path

from glassbus import ConfigurationError, Message, MessageBus

logging.getLogger("glassbus").setLevel(logging.CRITICAL)


def make_bus(folder: Path) -> MessageBus:
    bus = MessageBus(f"sqlite:///{folder}/orders.db", configuration=folder / "bus.toml")

    @bus.subscribe("orders.*", concurrency=2)
    async def charge(message: Message) -> None:
        print("charged", message.payload)

    return bus


def concurrency(bus: MessageBus) -> int:
    (charge,) = bus.subscribers()
    return charge.subscription.concurrency


async def main(folder: Path) -> None:
    file = folder / "bus.toml"
    file.write_text("[subscriptions.charge]\nconcurrency = 4\n")
    async with make_bus(folder) as bus:
        print(f"started with concurrency {concurrency(bus)}")

        file.write_text("[subscriptions.charge]\nconcurrency = 8\n\n[subscriptions.invoices]\ntimeout = 1.0\n")
        strangers = await bus.reload()
        print(f"reloaded: concurrency {concurrency(bus)}, nothing restarted; not of this bus: {strangers}")

        file.write_text("[subscriptions.charge]\nconcurrency = 16\nretry.max_attempt = 9\n")
        try:
            await bus.reload()
        except ConfigurationError as error:
            print(f"refused: {error}")
        print(f"still concurrency {concurrency(bus)}")

    async with make_bus(folder) as bus:
        print(f"started again on the broken file, with the last known good: concurrency {concurrency(bus)}")


with tempfile.TemporaryDirectory() as name:
    asyncio.run(main(Path(name)))
