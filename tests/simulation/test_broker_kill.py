"""What a broker that dies, and a line that breaks, cannot do: lose an acknowledged message, or keep the bus away.

The full count is one command: `python -m tests.simulation.broker_kill --kills 20 --partitions 20`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.nats_kit import need_server
from tests.simulation import broker_kill
from tests.simulation.broker_kill import Verdict


def test_nothing_is_lost_to_a_killed_broker_or_a_broken_line_and_all_recovers(tmp_path: Path) -> None:
    need_server()
    verdict = asyncio.run(broker_kill.run(tmp_path, 1, kill=2, half_open=1, storm=1, fail_over=1))
    assert verdict.ok, broker_kill.summary(verdict)
    assert verdict.spooled > 0


def test_the_checker_is_not_content_with_a_loss_or_a_slow_recovery() -> None:
    fine = {"accepted": 1000, "recovery_s": {"kill": [1.0]}}
    assert Verdict(**fine).ok  # type: ignore[arg-type]
    assert not Verdict(**fine, lost=["m-1"]).ok  # type: ignore[arg-type]
    assert not Verdict(**fine, unexpected=["m-1"]).ok  # type: ignore[arg-type]
    assert not Verdict(accepted=1000, recovery_s={"kill": [1.0], "partition": [10.1]}).ok
    assert not Verdict(accepted=3, recovery_s={"kill": [1.0]}).ok
