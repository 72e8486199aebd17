"""When a dependency is down, the subscription stops by itself, keeps its messages, and goes on when it is up again.

Prints:

    charge: closed -> open (10 of 10 deliveries failing within 60 s)
    the card machine is mended; 0 charged so far, none lost
    charge: open -> half_open (open for 0.2 s)
    charge: half_open -> closed (3 probes succeeded)
    charged 30 of 30, dead letters 0
"""

import asyncio
import logging

from glassbus import Fact, KillSwitch, Message, MessageBus, Observer, Retry
from glassbus.facts import BreakerStateChanged

logging.getLogger("glassbus").setLevel(logging.CRITICAL)


class Watch(Observer):
    """Sees what happened; could not change it if it wanted to."""

    interests = frozenset({BreakerStateChanged})

    def __init__(self) -> None:
        self.opened = asyncio.Event()

    def on_fact(self, fact: Fact, /) -> None:
        assert isinstance(fact, BreakerStateChanged)
        print(f"{fact.breaker}: {fact.from_state} -> {fact.to_state} ({fact.reason})")
        if fact.to_state == "open":
            self.opened.set()


watch = Watch()
bus = MessageBus(observers=[watch])
machine_is_up = False
charged = 0


@bus.subscribe(
    "orders.*",
    retry=Retry(max_attempts=20, base_delay=0.01, max_delay=0.05),
    kill_switch=KillSwitch(minimum=10, open_for=0.2, probes=3),
)
async def charge(message: Message) -> None:
    global charged
    if not machine_is_up:
        raise ConnectionError("card machine is down")
    charged += 1


async def main() -> None:
    global machine_is_up
    async with bus:
        await bus.publish_many([("orders.created", {"order_id": order}) for order in range(30)])
        await watch.opened.wait()
        machine_is_up = True
        print(f"the card machine is mended; {charged} charged so far, none lost")
        while await bus.drain():  # noqa: ASYNC110 - drain leaves what an open breaker holds, and names it
            await asyncio.sleep(0.01)
        print(f"charged {charged} of 30, dead letters {bus.ledger().total.dead_lettered}")


asyncio.run(main())
