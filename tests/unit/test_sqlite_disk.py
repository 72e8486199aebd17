"""A disk that really fails: the system calls of a child process are made to, one after the other, by strace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from sqlite_kit import Desk, play

from glassbus.policy.delivery import State
from glassbus.testing import VirtualClock

STRACE = shutil.which("strace")
# On a laptop without strace these are left out; in CI its absence is a failure.
pytestmark = pytest.mark.skipif(STRACE is None and "CI" not in os.environ, reason="strace is not installed")

CHILD = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from sqlite_kit import Desk
    from glassbus.clock import SystemClock
    from glassbus.errors import GlassbusError, PublishRejected, PublishUncertain

    async def publish(desk, name):
        try:
            await desk.publish(id=name, wait_s=0.3)
            print("accepted", name, flush=True)
        except PublishRejected:
            print("rejected", name, flush=True)
        except PublishUncertain:
            print("uncertain", name, flush=True)

    async def handle(desk):
        while True:
            delivery = await desk.transport.claim("s")
            if await desk.settle(delivery):
                print("handled", delivery.envelope.id, flush=True)

    async def main():
        desk = Desk(Path(sys.argv[1]), SystemClock(), durability="disk")
        try:
            await desk.open()
            await desk.declare()
        except GlassbusError:
            return
        handling = asyncio.ensure_future(handle(desk))
        for turn in range(4):
            await asyncio.gather(*(publish(desk, f"m{turn}-{n}") for n in range(3)))
        await asyncio.sleep(0.2)
        handling.cancel()
        await asyncio.gather(handling, return_exceptions=True)
        await desk.close()

    asyncio.run(main())
    """
)

# Every sync, single; one that goes on failing; and writes that find no space.
INJECTED = [f"fdatasync,fsync:error=EIO:when={n}" for n in range(1, 13)]
INJECTED += ["fdatasync,fsync:error=EIO:when=9+", "pwrite64:error=ENOSPC:when=60+3", "pwrite64:error=EIO:when=70"]


@pytest.mark.parametrize("injected", INJECTED)
def test_no_answer_is_false_when_system_calls_fail(tmp_path: Path, injected: str) -> None:
    path = tmp_path / "store.db"
    assert STRACE is not None, "CI needs strace: apt-get install strace"
    calls = injected.partition(":")[0]
    command = [STRACE, "-f", "-qq", "-o", str(tmp_path / "calls"), "-e", f"trace={calls}", "-e", f"inject={injected}"]
    command += [sys.executable, "-c", CHILD, str(path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "(INJECTED)" in (tmp_path / "calls").read_text(), "the fault was never reached"
    said: dict[str, set[str]] = {"accepted": set(), "rejected": set(), "uncertain": set(), "handled": set()}
    for line in done.stdout.splitlines():
        word, _, name = line.partition(" ")
        said[word].add(name)

    async def scenario(clock: VirtualClock) -> None:
        desk = await Desk(path, clock).open()
        await desk.declare()
        left = set()
        while desk.account().pending:
            delivery = await desk.claim(within_s=60)
            left.add(delivery.envelope.id)
            assert await desk.settle(delivery, State.HANDLED)
        assert said["accepted"] <= left | said["handled"], "an accepted message is lost"
        assert not said["rejected"] & (left | said["handled"]), "a rejected message was stored"
        assert not left & said["handled"], "a handled message came back"
        await desk.proven()
        await desk.close()

    play(scenario)
    if said["accepted"] or said["uncertain"]:
        assert len(said["accepted"] | said["rejected"] | said["uncertain"]) == 12
