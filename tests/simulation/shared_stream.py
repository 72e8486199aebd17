"""Several processes on one JetStream stream, killed at random, and its server with them.

    python -m tests.simulation.shared_stream --lives 10

Each life publishes numbered messages, some with a key, while three consumers and the server are killed (SIGKILL) and
started again. At its end every accepted message was handled, and the stream agrees with the ledger.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from glassbus import MessageBus, PublishRejected, PublishUncertain, TransportError
from tests import nats_kit

#: Seconds within which all is handled once nothing is killed any more.
DONE_S = 90.0

_CONSUMER = """
import asyncio, random, sys
from glassbus import MessageBus, Retry

bus = MessageBus(sys.argv[1], telemetry=False)
log = open(sys.argv[2], "a")

@bus.subscribe("t.*", name="s", concurrency=4, retry=Retry(max_attempts=50, base_delay=0.05))
async def handler(payload: int) -> None:
    await asyncio.sleep(random.random() * 0.01)
    if random.random() < 0.1:
        raise ConnectionError("downstream is away")
    log.write(f"{payload}\\n")
    log.flush()

async def main() -> None:
    async with bus:
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


class Life(msgspec.Struct):
    """What one life came to. `runs` are handlers that ended well, more than `messages` where one was killed then."""

    messages: int
    runs: int
    consumers_killed: int
    servers_killed: int
    problems: list[str]


class Consumers:
    """Three processes, one of which can be killed and started again."""

    def __init__(self, url: str, folder: Path) -> None:
        self.log = folder / "handled"
        self.log.touch()
        self._errors = folder / "errors"
        self._url = url
        self._all = [self._start() for _ in range(3)]

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", _CONSUMER, self._url, str(self.log)]
        with self._errors.open("ab") as errors:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors)

    def kill(self, which: int) -> None:
        self._all[which].kill()
        self._all[which].wait()
        self._close(which)
        self._all[which] = self._start()

    def _close(self, which: int) -> None:
        stdin = self._all[which].stdin
        assert stdin is not None
        stdin.close()

    def stop(self) -> None:
        for which, process in enumerate(self._all):
            self._close(which)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def live(seed: int, messages: int, kills: int) -> Life:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, nats_kit.running(Path(folder) / "server") as server:
        url = f"{server.url}/life?lease=1"
        consumers = Consumers(url, Path(folder))
        bus = MessageBus(url, telemetry=False)
        life = Life(messages, 0, 0, 0, [])
        try:
            async with bus:
                while "s" not in bus.ledger().accounts:
                    await asyncio.sleep(0.05)
                publishing = asyncio.ensure_future(_publish(bus, messages, chance))
                while not publishing.done() or life.consumers_killed < kills:
                    await asyncio.sleep(chance.random())
                    await asyncio.to_thread(consumers.kill, chance.randrange(3))
                    life.consumers_killed += 1
                    if life.consumers_killed % 4 == 2:
                        await asyncio.to_thread(server.kill)
                        await asyncio.to_thread(server.start)
                        life.servers_killed += 1
                await publishing
                until = time.monotonic() + DONE_S
                while bus.ledger().total.settled < messages and time.monotonic() < until:
                    await asyncio.sleep(0.1)
                total = bus.ledger().total
                if (total.accepted, total.handled) != (messages, messages):
                    life.problems.append(f"of {messages} messages: {total}")
                life.problems += (await bus.audit()).problems
        finally:
            await asyncio.to_thread(consumers.stop)
        handled = [int(line) for line in consumers.log.read_text().split()]
        life.runs = len(handled)
        lost = set(range(messages)) - set(handled)
        if lost:
            life.problems.append(f"never handled: {sorted(lost)[:10]}")
    return life


async def _publish(bus: MessageBus, messages: int, chance: random.Random) -> None:
    for n in range(messages):
        while True:
            try:
                await bus.publish("t.x", n, message_id=f"m{n}", key=chance.choice([None, None, "a", "b"]))
                break
            except (PublishUncertain, PublishRejected, TransportError):
                await asyncio.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lives", type=int, default=10)
    parser.add_argument("--messages", type=int, default=3000)
    parser.add_argument(
        "--kills", type=int, default=12, help="of consumers in each life; the server dies every fourth time"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = 0
    for seed in range(options.seed, options.seed + options.lives):
        life = asyncio.run(live(seed, options.messages, options.kills))
        failed += bool(life.problems)
        sys.stdout.write(f"seed {seed}: {life}\n")
    sys.stdout.write(f"{failed} of {options.lives} lives lost something\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
