"""A test of a service: a long outage passes at once, and what the bus stated about it is asserted.

Prints:

    order 7: charged at attempt 4
    retries 3, dead letters 0
"""

import logging

from glassbus import Delivery, Message, MessageBus, Retry
from glassbus.facts import AttemptFailed, DeliveryHandled, RecoveryEnded, RetryScheduled
from glassbus.testing import RecordingObserver, VirtualClock, expect_facts, run_virtual

logging.getLogger("glassbus").setLevel(logging.CRITICAL)


def service(recorder: RecordingObserver) -> MessageBus:
    """What is tested. Made inside `run_virtual` it takes the virtual clock by itself."""
    bus = MessageBus(observers=[recorder])

    @bus.subscribe("orders.*", retry=Retry(max_attempts=5, immediate=0, base_delay=300.0, max_delay=300.0))
    async def charge(message: Message[dict[str, int]], delivery: Delivery) -> None:
        if delivery.attempt < 4:
            raise ConnectionError("card machine is down")
        print(f"order {message.payload['order_id']}: charged at attempt {delivery.attempt}")

    return bus


async def outage(clock: VirtualClock) -> None:
    recorder, started = RecordingObserver(), clock.monotonic()
    async with service(recorder) as bus:
        with expect_facts(bus, AttemptFailed, RetryScheduled, RecoveryEnded, DeliveryHandled):
            await bus.publish("orders.created", {"order_id": 7})
            await bus.drain()
        retries = recorder.of(RetryScheduled)
        assert abs(clock.monotonic() - started - sum(retry.delay_s for retry in retries)) < 1.0  # virtual seconds
        dead = bus.ledger().total.dead_lettered
        print(f"retries {len(retries)}, dead letters {dead}")


run_virtual(outage)
