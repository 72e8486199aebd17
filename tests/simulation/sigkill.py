"""Kill a publishing and consuming process with SIGKILL, again and again, and check that nothing is lost.

    python -m tests.simulation.sigkill --kills 1000
    python -m tests.simulation.sigkill --kills 300 --full

Each child publishes and handles on one SQLite file until it is killed, some
milliseconds after it began. It writes what it does to a side log with one
`write(2)` a line, which survives its death. In the end one process drains the
store, and the checker compares: every acknowledged message was handled by every
subscription or rests in the dead-letter queue (lost = 0), nothing was handled
that nobody published, and the audit finds every delivery in one place.

With `--full` the queues are so small, and their handlers so slow, that every child spends its life on the overflow
ladder: messages give way to more important ones, queues grow and shrink. In the end all that gave way is
replayed, and handled.

POSIX only: children are forked, so that a kill costs milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from glassbus import Message, MessageBus, Overflow, Priority, PublishRejected, PublishUncertain, Retry

SUBSCRIPTIONS = ("bill", "ship")


class SideLog:
    """Lines that survive SIGKILL: one unbuffered append each."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, *words: str) -> None:
        os.write(self._fd, (" ".join(words) + "\n").encode())


def make_bus(store: Path, log: SideLog, chance: random.Random, *, full: bool) -> MessageBus:
    bus = MessageBus(f"sqlite:///{store}", telemetry=False, publish_timeout=0.005 if full else 5.0)
    capacity = 6 if full else None
    overflow = Overflow(expand_for=0.02)
    slow_s = 0.003 if full else 0.0

    @bus.subscribe(
        "orders.*",
        name="bill",
        concurrency=2 if full else 8,
        retry=Retry(max_attempts=50, base_delay=0.01),
        capacity=capacity,
        overflow=overflow,
    )
    async def bill(message: Message) -> None:
        await asyncio.sleep(slow_s)
        if chance.random() < 0.1:
            raise ConnectionError("payments are away")
        log.write("handled", "bill", message.id)

    @bus.subscribe(
        "orders.created",
        name="ship",
        concurrency=4,
        retry=Retry(max_attempts=50, base_delay=0.01),
        capacity=capacity,
        overflow=overflow,
    )
    async def ship(message: Message) -> None:
        await asyncio.sleep(chance.random() * 0.002 + slow_s)
        log.write("handled", "ship", message.id)

    return bus


async def publish_for_ever(bus: MessageBus, log: SideLog, run: int, publisher: int, *, full: bool) -> None:
    number = 0
    while True:
        priority = Priority((number + publisher) % 4) if full else Priority.NORMAL
        number += 1
        message_id = f"{run}-{publisher}-{number}"
        log.write("invoked", message_id)
        try:
            await bus.publish(
                "orders.created", {"n": number}, message_id=message_id, key=str(number % 7), priority=priority
            )
        except PublishUncertain:
            log.write("uncertain", message_id)
        except PublishRejected:
            log.write("rejected", message_id)
        else:
            log.write("accepted", message_id)


async def live(store: Path, log: SideLog, run: int, *, full: bool) -> None:
    async with make_bus(store, log, random.Random(run), full=full) as bus:
        await asyncio.gather(*(publish_for_ever(bus, log, run, n, full=full) for n in range(12 if full else 6)))


async def finish(store: Path, log: SideLog, *, full: bool) -> tuple[list[str], list[tuple[str, str]], int]:
    """Drain what is left; the audit's problems, (subscription, id) of the dead letters, and how many had given way."""
    async with make_bus(store, log, random.Random(0), full=full) as bus:
        left = await bus.drain(timeout=120)
        problems = [f"drain left {left}"] if left else []
        audit = await bus.audit()
        problems += audit.problems
        gave_way = [d.id for d in await bus.dead_letters.list(limit=1_000_000) if d.reason == "overflow"]
        if gave_way:
            await bus.dead_letters.replay(*gave_way)
            left = await bus.drain(timeout=120)
            problems += [f"drain left {left} of what was replayed"] if left else []
            audit = await bus.audit()
        problems += audit.problems
        if not bus.ledger().balanced:
            problems.append(f"the ledger does not balance: {bus.ledger()}")
        dead = await bus.dead_letters.list(limit=100_000)
        return problems, [(d.subscription, d.message.id) for d in dead], len(gave_way)


@dataclass
class Verdict:
    kills: int
    accepted: int = 0
    handled: int = 0
    uncertain: int = 0
    stored_unacknowledged: int = 0
    dead_lettered: int = 0
    gave_way: int = 0
    rejected: int = 0
    full: bool = False
    handled_twice: int = 0
    problems: list[str] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        # A run in which hardly anything happened proves nothing.
        # A queue that is meant to be full takes little.
        least = self.kills if self.full else 5 * self.kills
        busy = self.accepted >= least and self.handled >= self.accepted
        if self.full:
            busy = busy and self.gave_way >= self.kills and self.rejected >= self.kills
        return busy and not (self.lost or self.unexpected or self.problems)


def check(kills: int, log: Path, problems: list[str], dead: list[tuple[str, str]]) -> Verdict:
    """Compare what was promised with what happened."""
    invoked: set[str] = set()
    outcome: dict[str, str] = {}
    handled: Counter[tuple[str, str]] = Counter()
    for line in log.read_text().splitlines():
        match line.split(" "):
            case ["invoked", message_id]:
                invoked.add(message_id)
            case ["handled", subscription, message_id]:
                handled[subscription, message_id] += 1
            case [word, message_id]:
                outcome[message_id] = word
    ended = set(handled) | set(dead)
    accepted = {i for i, word in outcome.items() if word == "accepted"}
    rejected = {i for i, word in outcome.items() if word == "rejected"}
    return Verdict(
        kills=kills,
        accepted=len(accepted),
        handled=len(handled),
        rejected=len(rejected),
        uncertain=sum(word == "uncertain" for word in outcome.values()),
        stored_unacknowledged=len({i for _, i in ended} - accepted),
        dead_lettered=len(dead),
        handled_twice=sum(count > 1 for count in handled.values()),
        problems=problems,
        lost=[(s, i) for i in accepted for s in SUBSCRIPTIONS if (s, i) not in ended],
        unexpected=[i for _, i in ended if i not in invoked or i in rejected],
    )


#: Of the children, so many are killed while they still open the store; the others while they work.
EARLY = 0.2


def wait_for_line(log: Path, start: str, within_s: float = 30.0) -> None:
    """Return when the side log's tail has a line that begins with `start`, or after `within_s`."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if log.exists():
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - 4096))
                if f"\n{start}".encode() in file.read():
                    return
        time.sleep(0.001)


def run(kills: int, folder: Path, seed: int, *, full: bool = False) -> Verdict:
    """`kills` children, each killed at a random moment: while it starts, or up to 60 ms after its first message."""
    logging.disable(logging.CRITICAL)
    store, log_path = folder / "orders.db", folder / "side.log"
    chance = random.Random(seed)
    for number in range(kills):
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(live(store, SideLog(log_path), number + 1, full=full))
            except BaseException as error:
                SideLog(log_path).write("crashed", repr(error).replace(" ", "_"))
            finally:
                os._exit(1)
        if chance.random() < EARLY:
            time.sleep(chance.uniform(0.001, 0.06))
        else:
            wait_for_line(log_path, f"accepted {number + 1}-")
            time.sleep(chance.uniform(0.001, 0.06))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            tail = log_path.read_text().splitlines()[-3:] if log_path.exists() else []
            return Verdict(number, problems=[f"child {number} ended by itself: {tail}"])
    problems, dead, gave_way = asyncio.run(finish(store, SideLog(log_path), full=full))
    verdict = check(kills, log_path, problems, dead)
    verdict.full, verdict.gave_way = full, gave_way
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument(
        "--full", action="store_true", help="queues that are always full, and climb the overflow ladder"
    )
    parser.add_argument("--folder", type=Path, help="where the store and the side log go (default: a fresh one)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="glassbus-sigkill-"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    verdict = run(arguments.kills, folder, arguments.seed, full=arguments.full)
    summary = {
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - started, 1),
        **{k: v if not isinstance(v, list) else len(v) for k, v in vars(verdict).items()},
        "ok": verdict.ok,
    }
    print(json.dumps(summary))  # noqa: T201 - this is a command
    for problem in [*verdict.problems, *map(str, verdict.lost[:10]), *verdict.unexpected[:10]]:
        print("problem:", problem, file=sys.stderr)  # noqa: T201 - this is a command
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
