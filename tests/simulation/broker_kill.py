"""Kill and partition a real broker under load, again and again, and check that nothing is lost and all recovers.

    python -m tests.simulation.broker_kill --kills 20 --partitions 20

One process publishes and handles on a nats-server behind two faulty proxies, a failover set. The server is killed
with SIGKILL and started again on its store; the line is partitioned (nothing goes through, nobody is told), half open,
reset in storms, or one of the two endpoints alone is taken away. After each fault the time is taken from its healing
until a message published since then, by the broker's own way, has been handled. In the end the checker compares:
every acknowledged message was handled (lost = 0), nothing was handled that nobody published, the spool is empty, and
the audit finds every delivery in one place.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glassbus import Level, Message, MessageBus, PublishRejected, PublishUncertain, Retry
from glassbus.facts import ConnectionLost, ConnectionRestored, Fact, MessageSpooled
from glassbus.faults.proxy import FaultyProxy
from glassbus.observer import Observer
from tests.nats_kit import Server, running

#: Seconds from the healing of a fault within which a message must be handled again.
RECOVERED_S = 10.0
_PUBLISHERS = 4
_PAUSE_S = 0.004


class Counts(Observer):
    """How often the connection was lost and made again, and how much went by way of the spool."""

    interests = frozenset({ConnectionLost, ConnectionRestored, MessageSpooled})

    def __init__(self) -> None:
        self.of: Counter[str] = Counter()

    def on_fact(self, fact: Fact, /) -> None:
        self.of[type(fact).__name__] += 1


@dataclass
class Verdict:
    accepted: int = 0
    handled: int = 0
    handled_twice: int = 0
    uncertain: int = 0
    rejected: int = 0
    spooled: int = 0
    lost: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    recovery_s: dict[str, list[float]] = field(default_factory=dict)
    connections: dict[str, int] = field(default_factory=dict)

    @property
    def slowest_s(self) -> float:
        return max((s for times in self.recovery_s.values() for s in times), default=0.0)

    @property
    def ok(self) -> bool:
        # A run in which hardly anything happened proves nothing.
        busy = self.accepted > 20 * sum(map(len, self.recovery_s.values()))
        return busy and not (self.lost or self.unexpected or self.problems) and self.slowest_s <= RECOVERED_S


class World:
    """A server, two ways to it, a bus on both, and publishers that never stop."""

    def __init__(self, server: Server, first: FaultyProxy, second: FaultyProxy, folder: Path, seed: int) -> None:
        self.server, self.first, self.second = server, first, second
        self.chance = random.Random(seed)
        self.verdict = Verdict()
        self.counts = Counts()
        self.accepted: set[str] = set()
        self.invoked: set[str] = set()
        self.handled: Counter[str] = Counter()
        self.bus = MessageBus(
            [f"nats://127.0.0.1:{proxy.port}/kills" for proxy in (first, second)],
            telemetry=False,
            state_dir=folder / "state",
            observers=[self.counts],
            seed=seed,
        )

        @self.bus.subscribe("orders.*", name="work", concurrency=16, retry=Retry(max_attempts=50, base_delay=0.01))
        async def work(message: Message) -> None:
            if self.chance.random() < 0.01:
                raise ConnectionError("payments are away")
            self.handled[message.id] += 1

    async def publish(self, message_id: str) -> Level | None:
        """Publish until it is known what became of it; None when it was refused."""
        self.invoked.add(message_id)
        while True:
            try:
                receipt = await self.bus.publish("orders.created", {"id": message_id}, message_id=message_id)
            except PublishUncertain:
                self.verdict.uncertain += 1
                await asyncio.sleep(0.05)
            except PublishRejected:
                self.verdict.rejected += 1
                return None
            else:
                self.accepted.add(message_id)
                return receipt.level

    async def publish_for_ever(self, publisher: int) -> None:
        number = 0
        while True:
            number += 1
            await self.publish(f"{publisher}-{number}")
            await asyncio.sleep(_PAUSE_S)

    def spooled(self) -> int:
        return self.bus.connections()[0].spooled

    # Faults

    async def kill(self) -> None:
        """SIGKILL to the server; it is back some time later."""
        await asyncio.to_thread(self.server.kill)
        await asyncio.sleep(self.chance.uniform(0.1, 2.0))
        await asyncio.to_thread(self.server.start)

    async def partition(self) -> None:
        """Both ways are cut, and nobody is told."""
        for proxy in (self.first, self.second):
            proxy.partition()
        await asyncio.sleep(self.chance.uniform(1.0, 12.0))
        for proxy in (self.first, self.second):
            proxy.heal()

    async def half_open(self) -> None:
        """What we say arrives, and no answer comes back."""
        for proxy in (self.first, self.second):
            proxy.partition("to_client")
        await asyncio.sleep(self.chance.uniform(1.0, 8.0))
        for proxy in (self.first, self.second):
            proxy.heal()

    async def storm(self) -> None:
        """Every connection is reset, ten times a second."""
        for _ in range(self.chance.randint(5, 30)):
            for proxy in (self.first, self.second):
                proxy.drop()
            await asyncio.sleep(0.1)

    async def fail_over(self) -> None:
        """The endpoint in use is gone for good; the other works."""
        used = [c.up for c in self.bus.connections()]
        proxy = self.second if used == [False, True] else self.first
        proxy.refuse()

    async def suffer(self, name: str, fault: Callable[[], Awaitable[None]], number: int) -> None:
        """One fault, and the time from its healing to the first message handled."""
        await fault()
        healed = time.monotonic()
        tries = 0
        while time.monotonic() < healed + 60.0:
            tries += 1
            message_id = f"{name}-{number}-{tries}"
            level = await self.publish(message_id)
            until = time.monotonic() + 0.5
            while level is not Level.DISK and not self.handled[message_id] and time.monotonic() < until:
                await asyncio.sleep(0.002)
            if level is not Level.DISK and self.handled[message_id]:
                break
            await asyncio.sleep(0.01)
        self.verdict.recovery_s.setdefault(name, []).append(round(time.monotonic() - healed, 3))
        for proxy in (self.first, self.second):
            proxy.heal()
        await asyncio.sleep(self.chance.uniform(0.2, 1.5))

    def faults(self, **wanted: int) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        chosen = [(name, getattr(self, name)) for name, count in wanted.items() for _ in range(count)]
        self.chance.shuffle(chosen)
        return chosen

    async def live(self, **wanted: int) -> Verdict:
        verdict = self.verdict
        async with self.bus:
            publishers = [asyncio.create_task(self.publish_for_ever(n)) for n in range(_PUBLISHERS)]
            await asyncio.sleep(0.5)
            for number, (name, fault) in enumerate(self.faults(**wanted)):
                await self.suffer(name, fault, number)
            for task in publishers:
                task.cancel()
            await asyncio.gather(*publishers, return_exceptions=True)
            left = await self.bus.drain(timeout=60)
            until = time.monotonic() + 30
            while (self.accepted - set(self.handled) or self.spooled()) and time.monotonic() < until:
                await asyncio.sleep(0.05)
            verdict.problems += [f"drain left {left}"] if left else []
            verdict.problems += (await self.bus.audit()).problems
            if not self.bus.ledger().balanced:
                verdict.problems.append(f"the ledger does not balance: {self.bus.ledger()}")
            if waiting := self.spooled():
                verdict.problems.append(f"{waiting} messages wait in the spool")
            dead = {letter.message.id for letter in await self.bus.dead_letters.list(limit=100_000)}
        ended = set(self.handled) | dead
        verdict.accepted, verdict.handled = len(self.accepted), len(self.handled)
        verdict.handled_twice = sum(count > 1 for count in self.handled.values())
        verdict.spooled = self.counts.of.pop("MessageSpooled", 0)
        verdict.connections = dict(self.counts.of)
        verdict.lost = sorted(self.accepted - ended)
        verdict.unexpected = sorted(ended - self.invoked)
        return verdict


async def run(folder: Path, seed: int, **wanted: int) -> Verdict:
    """`wanted`: how many of each fault of `World`, in an order drawn from `seed`."""
    with running(folder / "server") as server:
        async with FaultyProxy("127.0.0.1", server.port) as first, FaultyProxy("127.0.0.1", server.port) as second:
            return await World(server, first, second, folder, seed).live(**wanted)


def summary(verdict: Verdict) -> dict[str, Any]:
    plain = {k: len(v) if isinstance(v, list) else v for k, v in vars(verdict).items() if k != "recovery_s"}
    times = {
        name: {"n": len(found), "median_s": sorted(found)[len(found) // 2], "slowest_s": max(found)}
        for name, found in verdict.recovery_s.items()
    }
    return {**plain, "recovery": times, "ok": verdict.ok}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kills", 20), ("partitions", 20), ("half-open", 5), ("storms", 5), ("failovers", 5)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--folder", type=Path, help="where the server's store and the spool go (default: a fresh one)")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="glassbus-brokers-"))
    started = time.monotonic()
    verdict = asyncio.run(
        run(
            folder,
            given.seed,
            kill=given.kills,
            partition=given.partitions,
            half_open=given.half_open,
            storm=given.storms,
            fail_over=given.failovers,
        )
    )
    told = {"seed": given.seed, "seconds": round(time.monotonic() - started, 1), **summary(verdict)}
    print(json.dumps(told))  # noqa: T201 - this is a command
    for problem in [*verdict.problems, *verdict.lost[:10], *verdict.unexpected[:10]]:
        print("problem:", problem, file=sys.stderr)  # noqa: T201 - this is a command
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
