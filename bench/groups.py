"""Every group and its rows, in the order of the table."""

from __future__ import annotations

from bench import blocking, bus, byhand, durable, failing, peers, scrape, startup, targets, telemetry
from bench.rows import Group, Row

GROUPS = (
    Group(
        "memory",
        "In memory: publish to handled",
        "msg/s",
        "asyncio.Queue + worker",
        (
            Row("asyncio.Queue + worker", peers.raw_queue, "put, one worker task"),
            Row(
                "asyncio.Queue + worker + JSON", peers.raw_queue_json, "a payload of its own for each handler, as ours"
            ),
            Row("the contract by hand", byhand.by_hand, "one handler, nothing to decide, nothing checked"),
            *bus.MEMORY,
            *peers.MEMORY,
        ),
        ("CPU us/msg",),
    ),
    Group(
        "latency",
        "One in flight: publish to handler",
        "us p50",
        "asyncio.Queue + worker",
        (Row("asyncio.Queue + worker", peers.raw_queue_latency), *bus.LATENCY),
        ("p99", "p99.9"),
    ),
    Group("overhead", "Handler of 100 us", "CPU us/msg", "the handler alone", bus.OVERHEAD, ("wall us/msg",)),
    Group(
        "errors",
        "One failed attempt, known site",
        "us p50",
        failing.FLOOR.name,
        (failing.FLOOR, *bus.ERRORS, *failing.PEERS),
        ("p99", "mean by difference", "CPU by difference"),
    ),
    Group(
        "blocking",
        "One error handed to ProductionMessageBus",
        "us p50",
        failing.FLOOR.name,
        (failing.FLOOR, *blocking.ROWS),
        ("p99", "max"),
    ),
    Group(
        "durable",
        "Durable: publish, handle, acknowledge",
        "per s",
        durable.FLOOR.name,
        (durable.FLOOR, *bus.DURABLE, *durable.PEERS),
        ("CPU us/msg", "publish p50 ms", "publish p99 ms"),
    ),
    Group(
        "collector",
        "A publish, every trace sampled, beside",
        "us p50",
        targets.TAKES_ALL,
        telemetry.COLLECTORS,
        ("p99", "p99.9"),
    ),
    Group(
        "self-cost",
        "Telemetry of a failed attempt",
        "CPU us",
        targets.MEASURED,
        telemetry.SELF_COST,
        (targets.SAID,),
    ),
    Group(
        "scrape",
        f"One scrape of {scrape.SUBSCRIPTIONS} subscriptions",
        "CPU ms",
        targets.BY_THE_CLIENT,
        scrape.ROWS,
        ("longest gap ms", "lines"),
    ),
    Group("startup", "Start of an interpreter", "ms", startup.BARE, startup.ROWS, ("RSS MB",)),
)
