"""A full queue: what matters less gives way, the queue grows for a while, then a publish is refused. Nothing is lost.

Prints:

    6 newsletters wait, and the queue is full
    overflow: dead_letter, capacity 6
    an invoice got in
    overflow: expand, capacity 9
    3 more newsletters got in
    overflow: refuse, capacity 9
    refused: queue_full
    overflow: contract, capacity 6
    sent: 1 invoice, 8 newsletters
    replayed: 1 dead letter
    sent: 1 invoice, 9 newsletters
"""

import asyncio
import logging
from collections import Counter

from glassbus import Fact, Message, MessageBus, Observer, Overflow, Priority, PublishRejected
from glassbus.facts import OverflowHandled

logging.getLogger("glassbus").setLevel(logging.CRITICAL)


class Watch(Observer):
    interests = frozenset({OverflowHandled})

    def __init__(self) -> None:
        self.contracted = asyncio.Event()

    def on_fact(self, fact: Fact, /) -> None:
        assert isinstance(fact, OverflowHandled)
        print(f"overflow: {fact.action}, capacity {fact.capacity}")
        if fact.action == "contract":
            self.contracted.set()


watch = Watch()
bus = MessageBus(observers=[watch], publish_timeout=0.01)
mail_is_up = asyncio.Event()
sent: Counter[str] = Counter()


@bus.subscribe("mail.*", capacity=6, overflow=Overflow(expand_for=1.0))
async def send(message: Message) -> None:
    await mail_is_up.wait()
    if message.topic != "mail.test":
        sent[message.topic.removeprefix("mail.")] += 1


def count() -> str:
    return ", ".join(f"{number} {what}{'s' if number > 1 else ''}" for what, number in sorted(sent.items()))


async def main() -> None:
    async with bus:
        await bus.publish("mail.test")
        await asyncio.sleep(0.05)  # it is being handled, and keeps the only slot
        for _ in range(6):
            await bus.publish("mail.newsletter", priority=Priority.LOW)
        print("6 newsletters wait, and the queue is full")

        await bus.publish("mail.invoice", priority=Priority.HIGH)
        print("an invoice got in")

        for _ in range(3):
            await bus.publish("mail.newsletter", priority=Priority.LOW)
        print("3 more newsletters got in")

        try:
            await bus.publish("mail.newsletter", priority=Priority.LOW)
        except PublishRejected as error:
            print(f"refused: {error.reason}")

        mail_is_up.set()
        await bus.drain()
        await watch.contracted.wait()
        print(f"sent: {count()}")

        dead = await bus.dead_letters.list()
        print(f"replayed: {await bus.dead_letters.replay(*(letter.id for letter in dead))} dead letter")
        await bus.drain()
        print(f"sent: {count()}")


asyncio.run(main())
