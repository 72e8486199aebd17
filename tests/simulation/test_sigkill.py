"""What SIGKILL cannot do: lose an acknowledged message, or a delivery's place in the ledger.

The full count is one command: `python -m tests.simulation.sigkill --kills 1000`.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from glassbus import MessageBus
from tests.simulation import sigkill

KILLS = 40


@pytest.mark.parametrize(("kills", "options"), [(KILLS, []), (KILLS // 2, ["--full"])], ids=["roomy", "full"])
def test_no_acknowledged_message_is_lost_to_sigkill(tmp_path: Path, kills: int, options: list[str]) -> None:
    """Nor, where the queues are always full, one that gave way: replayed, it is handled."""
    # In a process of its own: a fork of the test runner would carry its threads' locks along.
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation.sigkill", "--kills", str(kills), "--folder", str(tmp_path), *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_checker_notices_a_loss_and_a_ghost(tmp_path: Path) -> None:
    log = tmp_path / "side.log"
    log.write_text("invoked a\naccepted a\nhandled bill a\ninvoked b\nrejected b\nhandled bill b\n")
    verdict = sigkill.check(1, log, [], [])
    assert verdict.lost == [("ship", "a")]
    assert verdict.unexpected == ["b"]
    assert not verdict.ok


POISON = textwrap.dedent(
    """
    import asyncio, os, sys
    from glassbus import Message, MessageBus, Retry

    async def main(store, attempts):
        bus = MessageBus(f"sqlite:///{store}", telemetry=False)

        @bus.subscribe("jobs", name="work", concurrency=8, retry=Retry(max_attempts=attempts, base_delay=0.01))
        async def work(message: Message) -> None:
            await asyncio.sleep(0.01)  # so that its neighbours are in flight too
            if message.payload == "poison":
                os._exit(9)
            print(message.payload, flush=True)

        async with bus:
            if "publish" in sys.argv:
                await bus.publish_many([("jobs", "poison" if n == 3 else n) for n in range(8)])
            await bus.drain(timeout=60)

    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
    """
)


def test_a_message_that_kills_its_process_is_dead_lettered_after_exactly_max_attempts(tmp_path: Path) -> None:
    store, attempts = tmp_path / "jobs.db", 3
    deaths = 0
    handled: list[str] = []
    for start in range(attempts + 3):
        arguments = [sys.executable, "-c", POISON, str(store), str(attempts), *(["publish"] if start == 0 else [])]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
        handled += done.stdout.split()
        if done.returncode == 0:
            break
        assert done.returncode == 9, done.stderr
        deaths += 1
    assert deaths == attempts

    async def look() -> None:
        async with MessageBus(f"sqlite:///{store}", telemetry=False) as bus:
            (dead,) = await bus.dead_letters.list()
            assert (dead.message.payload, dead.attempts, dead.reason) == ("poison", attempts, "owner_died")
            assert bus.ledger().balanced
            assert (await bus.audit()).ok

    asyncio.run(look())
    assert sorted(set(handled)) == ["0", "1", "2", "4", "5", "6", "7"], "its neighbours were handled"
