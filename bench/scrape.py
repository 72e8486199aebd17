"""What one scrape of a bus with 500 subscriptions costs, and how long it holds up the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from bench.bus import no_lines
from bench.rows import PAYLOAD, Row, Run, Sample, Tally, Wrong
from bench.targets import AT_WORK, BY_THE_CLIENT
from glassbus import Message, MessageBus
from glassbus.telemetry import exposition

SUBSCRIPTIONS = 500
#: Of the loop's own beat while a scrape runs on a thread, in seconds.
_BEAT_S = 0.0005


def scrape(run: Run, *, working: int, how: Callable[[CollectorRegistry], bytes]) -> Sample:
    """CPU time of a scrape on a thread of its own; before each, `working` of the subscriptions handle a message."""
    return asyncio.run(_scrape(run.count(10), working, how))


def _ours(registry: CollectorRegistry) -> bytes:
    return exposition(registry)[1]


def _asleep(registry: CollectorRegistry) -> bytes:
    """What the machine itself does to the loop meanwhile."""
    time.sleep(0.03)
    return b""


async def _scrape(scrapes: int, working: int, how: Callable[[CollectorRegistry], bytes]) -> Sample:
    no_lines()
    tally = Tally()
    registry = CollectorRegistry()
    bus = MessageBus(registry=registry)

    async def handler(_message: Message[Any]) -> None:
        tally.hit()

    for number in range(SUBSCRIPTIONS):
        bus.subscribe(f"orders.t{number}", name=f"orders-{number}")(handler)
    taken: list[float] = []
    gaps: list[float] = []
    body = b""

    def once() -> None:
        nonlocal body
        began = time.thread_time()
        body = how(registry)
        taken.append((time.thread_time() - began) * 1e3)

    async with bus:
        await _work(bus, tally, SUBSCRIPTIONS)
        once()
        taken.clear()
        for _ in range(scrapes):
            await _work(bus, tally, working)
            beat = asyncio.create_task(_beat())
            await asyncio.sleep(0.01)
            await asyncio.to_thread(once)
            beat.cancel()
            with contextlib.suppress(asyncio.CancelledError):  # we cancelled it ourselves
                await beat
            gaps.append(_latest)
    handled = 1 + scrapes * (working > 0)
    labels = '{bus="default",destination="orders.t0",result="handled",subscription="orders-0"}'
    if body and f"glassbus_messages_settled_total{labels} {handled}.0\n".encode() not in body:
        raise Wrong(f"the scrape does not show {handled} messages of the first subscription")
    more = {"longest gap ms": statistics.median(gaps), "lines": float(body.count(b"\n"))}
    return Sample(statistics.median(taken), more)


_latest = 0.0


async def _beat() -> None:
    """Keep the longest time that the loop was late by, in ms."""
    global _latest
    _latest = 0.0
    while True:
        due = time.perf_counter() + _BEAT_S
        await asyncio.sleep(_BEAT_S)
        _latest = max(_latest, (time.perf_counter() - due) * 1e3)


async def _work(bus: MessageBus, tally: Tally, subscriptions: int) -> None:
    tally.expect(subscriptions)
    for number in range(subscriptions):
        await bus.publish(f"orders.t{number}", PAYLOAD)
    if subscriptions:
        await tally.wait()


ROWS = (
    Row(BY_THE_CLIENT, partial(scrape, working=SUBSCRIPTIONS, how=generate_latest), "the same numbers, its own way"),
    Row(AT_WORK, partial(scrape, working=SUBSCRIPTIONS, how=_ours), "each handled a message since the last scrape"),
    Row("glassbus, a tenth at work", partial(scrape, working=SUBSCRIPTIONS // 10, how=_ours)),
    Row("glassbus, at rest", partial(scrape, working=0, how=_ours)),
    Row("no scrape, 30 ms of sleep", partial(scrape, working=SUBSCRIPTIONS, how=_asleep), "what the machine does"),
)
