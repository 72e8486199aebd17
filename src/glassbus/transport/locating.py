"""Where single messages are: among the queues of a process, and what several stores tell of one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import msgspec

from glassbus.facts import Delivery
from glassbus.message import Envelope
from glassbus.transport import Located, Whereabouts
from glassbus.transport.queue import Queue

#: The one subscription of a spool's store; its dead letters are shown under it.
SPOOL = "(spool)"


def locate(queues: Iterable[Queue], message_id: str, wall: float, monotonic: float) -> Whereabouts | None:
    """Looks at everything that is held, which a store in memory must. None when none of it is of `message_id`."""
    found = [
        (envelope, located)
        for queue in queues
        for envelope, located in _all(queue, wall, monotonic)
        if envelope.id == message_id
    ]
    if not found:
        return None
    envelope = found[0][0]
    deliveries = tuple(located for _, located in found)
    return Whereabouts(
        message_id, envelope.topic, envelope.published_at, envelope.priority, envelope.key, deliveries=deliveries
    )


def ids_like(queues: Iterable[Queue], beginning: str) -> list[str]:
    found = {
        envelope.id for queue in queues for envelope, _ in _all(queue, 0.0, 0.0) if envelope.id.startswith(beginning)
    }
    return sorted(found)


def together(found: Iterable[tuple[str, Whereabouts | None]]) -> Whereabouts | None:
    """One answer of several: of spools, and last of the broker that they are before. Each comes with what the ids of
    its dead letters begin with here."""
    whole: Whereabouts | None = None
    deliveries: list[Located] = []
    for mark, where in found:
        if where is None:
            continue
        whole = where
        for one in where.deliveries:
            letter = f"{mark}{one.dead_letter}" if one.dead_letter else ""
            deliveries.append(msgspec.structs.replace(one, dead_letter=letter))
    if whole is None:
        return None
    if any(one.subscription == SPOOL for one in deliveries):  # where it will go is for the broker to say
        whole = msgspec.structs.replace(whole, fanout=0, routed=None)
    return msgspec.structs.replace(whole, deliveries=tuple(deliveries))


def _all(queue: Queue, wall: float, monotonic: float) -> Iterator[tuple[Envelope, Located]]:
    keyed = [d for waiting in queue.waiting_for_key.values() for _, _, d in waiting]
    for delivery in queue.in_flight:
        yield _located(delivery, "in_flight", owner=f"process {os.getpid()}")
    for delivery in (d for lane in queue.ready for d in lane):
        yield _located(delivery, "ready")
    for delivery in keyed:
        yield _located(delivery, "ready", waits_for_key=True)
    for due, _, delivery in queue.later:
        yield _located(delivery, "retrying", due_at=wall + max(0.0, due - monotonic))
    for due, _, delivery in queue.scheduled:
        yield _located(delivery, "scheduled", due_at=due)
    for record in queue.dead.values():
        made = Located(
            record.subscription,
            "dead_lettered",
            record.attempts,
            record.replays,
            first_failed_at=record.first_failed_at,
            dead_letter=record.id,
        )
        yield record.envelope, made


def _located(
    delivery: Delivery, state: str, *, due_at: float = 0.0, waits_for_key: bool = False, owner: str = ""
) -> tuple[Envelope, Located]:
    envelope = delivery.envelope
    made = Located(
        delivery.subscription,
        state,
        delivery.attempt,
        delivery.replays,
        due_at,
        envelope.expires_at,
        delivery.first_failed_at,
        delivery.recovering[1] if delivery.recovering is not None else "",
        waits_for_key,
        owner=owner,
        owner_lives=True if owner else None,
    )
    return envelope, made
