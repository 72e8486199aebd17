"""The demo's service: a shop that takes orders and is paid by webhook. Read it as an example.

    github.*  ─> intake ──> orders.created ─┬─> warehouse
    orders.created (web shop) ─────────────>├─> charge ──> orders.paid ─> receipt
                                            └─> archive (and orders.paid too)

Each handler does its own small job and lets errors out: the bus decides what becomes of the
message. A handler may run twice for one message (at least once is what a bus can promise), so what it
does outside carries a key by which a second time is recognised: the same message id, the same payment key.
"""

from __future__ import annotations

from typing import Any

import msgspec

from glassbus import KillSwitch, Message, MessageBus, Priority, Retry
from glassbus.cli.demo.world import World

#: What a webhook costs, in cents, where it is not the usual price.
PRICES = {"push": 20, "workflow_job": 35, "release": 250, "marketplace_purchase": 4900, "sponsorship": 1500}
USUAL_PRICE = 5
URGENT = {"marketplace_purchase", "sponsorship", "dependabot_alert", "security_advisory", "code_scanning_alert"}
IDLE = {"star", "watch", "label", "ping", "gollum"}

STOCK = 1200


class Order(msgspec.Struct):
    """What `orders.created` and `orders.paid` carry."""

    order_id: str = ""
    customer: str = "somebody"
    item: str = "something"
    quantity: int = 1
    cents: int = USUAL_PRICE


def subscribe_service(bus: MessageBus, world: World) -> None:
    """Bind the shop's handlers to `bus`. Where its orders come from is bound by `subscribe_intake`."""

    # Behind a bad network, a quick retry nearly always helps. A handler may ask for the payload alone.
    @bus.subscribe("orders.created", name="warehouse", concurrency=8, timeout=2.0, retry=Retry(max_attempts=6))
    async def reserve(order: Order) -> None:
        shelves = STOCK // order.quantity  # an order of nothing is a bug that no retry mends
        if shelves:
            await world.warehouse.reserve(order.item, order.quantity)

    # The provider goes down now and then. When half of the recent orders fail, the kill switch opens:
    # orders wait instead of using up their attempts, and a probe every two seconds sees when it is back.
    @bus.subscribe(
        "orders.created",
        name="charge",
        concurrency=8,
        timeout=2.0,
        retry=Retry(max_attempts=12, base_delay=0.5, max_delay=3.0),
        kill_switch=KillSwitch(window=3.0, minimum=8, ratio=0.5, open_for=2.0, probes=2),
    )
    async def charge(message: Message[Order]) -> None:
        order = message.payload
        order_id = order.order_id or message.id
        await world.payments.charge(order.cents, idempotency_key=order_id)
        await bus.publish("orders.paid", order, message_id=f"paid-{order_id}", priority=message.priority)

    # Slow, so it has many slots; too slow, and the attempt is cancelled and made again.
    @bus.subscribe("orders.paid", name="receipt", concurrency=16, timeout=0.5, retry=Retry(max_attempts=6))
    async def mail_receipt(order: Order) -> None:
        await world.mailer.send(order.customer, f"Your receipt for {order.quantity} x {order.item}")

    # Plain code that blocks: the bus runs it on threads.
    @bus.subscribe("orders.*", name="archive", concurrency=2, timeout=10.0)
    def keep(message: Message[Any]) -> None:
        world.archive.keep(message.id, msgspec.json.encode(message.payload))


def subscribe_intake(bus: MessageBus, pattern: str) -> None:
    """Make orders of the messages of `pattern`, such as `github.>`: whatever they are, they are billed."""
    root, dot, _ = pattern.partition(".")
    name = "intake" if root == "github" else f"intake-{root}" if dot else f"intake-{root}-itself"

    @bus.subscribe(pattern, name=name, concurrency=8, timeout=5.0)
    async def intake(message: Message[Any]) -> None:
        order = order_for(message.topic.partition(".")[2] or root, message.payload, f"o-{message.id}")
        await bus.publish(
            "orders.created",
            order,
            message_id=order.order_id,  # should this handler run again, the bus knows the order already
            key=message.key,  # one at a time for one repository, in the order they came
            priority=message.priority,
        )


def order_for(kind: str, payload: Any, order_id: str) -> Order:
    """The order that a webhook of `kind` stands for."""
    return Order(order_id, repository_of(payload) or "somebody", kind, 1, PRICES.get(kind, USUAL_PRICE))


def repository_of(payload: Any) -> str | None:
    """The full name of the repository that a webhook is about."""
    repository = payload.get("repository") if isinstance(payload, dict) else None
    name = repository.get("full_name") if isinstance(repository, dict) else None
    return name if isinstance(name, str) else None


def priority_of(kind: str) -> Priority:
    return Priority.HIGH if kind in URGENT else Priority.LOW if kind in IDLE else Priority.NORMAL
