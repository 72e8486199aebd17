"""Faults on purpose: a provider that is away for a minute, and payloads that arrive damaged, in virtual time.

Prints:

    charged 3 of 3 orders, 8 attempts failed, the slowest order took 100 s
    stated: FaultInjected, MessagePublished, AttemptFailed, RetryScheduled, RecoveryEnded, DeliveryHandled, FaultHealed
    damaged: PayloadUndecodable, and the dead letter still holds {'order_id': 4}
"""

import logging

from glassbus import Message, MessageBus, Retry
from glassbus.facts import AttemptFailed, DeliveryHandled, FaultHealed, FaultInjected, RecoveryEnded, RetryScheduled
from glassbus.faults import Between, CorruptPayload, Refuse, inject
from glassbus.testing import VirtualClock, expect_facts, run_virtual

logging.getLogger("glassbus").setLevel(logging.CRITICAL + 1)


async def drill(clock: VirtualClock) -> None:
    bus, charged = MessageBus(seed=1), dict[int, float]()

    @bus.subscribe("orders.*", name="charge", retry=Retry(max_attempts=5, immediate=0, base_delay=60.0, max_delay=60.0))
    async def charge(message: Message[dict[str, int]]) -> None:
        charged[message.payload["order_id"]] = clock.wall() - message.published_at

    wanted = (FaultInjected, AttemptFailed, RetryScheduled, RecoveryEnded, DeliveryHandled, FaultHealed)
    async with bus:
        with expect_facts(bus, *wanted) as seen, inject(bus, Refuse(), "handler:charge", schedule=Between(0, 60)):
            for order_id in (1, 2, 3):
                await bus.publish("orders.created", {"order_id": order_id})
            await bus.drain()
        failed, slowest_s = len(seen.of(AttemptFailed)), max(charged.values())
        print(f"charged {len(charged)} of 3 orders, {failed} attempts failed, the slowest order took {slowest_s:.0f} s")
        print("stated:", ", ".join(dict.fromkeys(seen.names())))

        with inject(bus, CorruptPayload(), "codec:decode", limit=1):
            await bus.publish("orders.created", {"order_id": 4})
            await bus.drain()
        (letter,) = await bus.dead_letters.list()
        error = letter.report.exception_type.rpartition(".")[2]
        print(f"damaged: {error}, and the dead letter still holds {letter.message.payload}")


run_virtual(drill, seed=1)
