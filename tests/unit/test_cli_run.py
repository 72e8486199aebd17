"""`glassbus run`: finds the bus, says clearly when it cannot, runs it, and ends it as asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_kit import Command

SHOP = """
import asyncio, pathlib
from glassbus import Message, MessageBus

class Config:
    bus = MessageBus("sqlite:///shop.db", name="shop")

bus = Config.bus
number = 3
started = pathlib.Path("started")

@bus.subscribe("orders.*", timeout=60.0)
async def charge(message: Message) -> None:
    started.touch()
    await asyncio.sleep(message.payload)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a program in it, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "shop.py").write_text(SHOP)
    yield tmp_path
    for name in set(sys.modules) - before:
        if not name.startswith("glassbus"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("shop", "'shop' is not MODULE:ATTRIBUTE"),
        (":bus", "is not MODULE:ATTRIBUTE"),
        ("nowhere:bus", "no module named 'nowhere' here"),
        ("shop.deeper:bus", "no module named 'shop.deeper' here"),
        ("shop:buss", "shop has no attribute 'buss'; it has bus"),
        ("shop:Config.nothing", "shop:Config has no attribute 'nothing'; it has bus"),
        ("shop:number.real.nothing", "shop:number.real has no attribute 'nothing'"),
        ("shop:number", "shop:number is of type int, not a MessageBus"),
        ("shop:MessageBus", "is the class MessageBus, not a MessageBus that was made"),
    ],
)
def test_what_is_no_bus_is_one_clear_line(glassbus: Command, here: Path, target: str, reason: str) -> None:
    assert glassbus("run", target) == 2
    assert glassbus.err.splitlines()[-1].startswith("glassbus: error: ")
    assert reason in glassbus.err


@pytest.mark.parametrize(
    ("source", "shown", "reason"),
    [
        (
            "def f():\n    raise ValueError('boom')\nf()\n",
            "ValueError: boom",
            "importing broken failed with ValueError",
        ),
        ("import no_such_thing\n", "line 1, in <module>", "importing broken failed: No module named 'no_such_thing'"),
        ("raise SystemExit(3)\n", "SystemExit: 3", "importing broken failed with SystemExit"),
        ("x = (\n", "SyntaxError", "importing broken failed with SyntaxError"),
    ],
)
def test_an_error_of_the_program_is_shown_from_its_own_line_on(
    glassbus: Command, here: Path, source: str, shown: str, reason: str
) -> None:
    (here / "broken.py").write_text(source)
    assert glassbus("run", "broken:bus") == 2
    assert shown in glassbus.err
    assert "importlib" not in glassbus.err
    assert glassbus.err.splitlines()[-1] == f"glassbus: error: {reason}"


def test_a_bus_that_was_stopped_cannot_be_run(glassbus: Command, here: Path) -> None:
    (here / "used.py").write_text(
        "import asyncio\nfrom glassbus import MessageBus\nbus = MessageBus()\n"
        "async def use():\n    async with bus:\n        pass\nasyncio.run(use())\n"
    )
    assert glassbus("run", "used:bus") == 2
    assert "bus 'default' is stopped; a bus starts once" in glassbus.err


def test_an_address_that_cannot_be_had_is_an_error(
    glassbus: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASSBUS_HTTP", "256.0.0.1:nonsense")
    assert glassbus("run", "shop:bus") == 2
    assert "is not host:port" in glassbus.err


class Running:
    """`glassbus run shop:Config.bus` in a process of its own, with a message that takes `handling_s`."""

    def __init__(self, glassbus: Command, here: Path, handling_s: float, deadline_s: int = 20) -> None:
        program = "import sys; from glassbus.cli import main; sys.exit(main())"
        self.child = subprocess.Popen(
            [sys.executable, "-c", program, "run", "shop:Config.bus", "--deadline", str(deadline_s)],
            stderr=subprocess.PIPE,
            env={**os.environ, "GLASSBUS_HTTP": "127.0.0.1:0"},
            text=True,
        )
        assert self.child.stderr is not None
        self.lines = [""]
        self.read_to("running MessageBus")
        (here / "in").write_text(f"{handling_s}\n")
        assert glassbus("publish", "--url", "sqlite:///shop.db", "--topic", "orders.created", here / "in") == 0
        while not (here / "started").exists():
            time.sleep(0.01)

    def read_to(self, told: str) -> None:
        """Read what it says until it has said `told`."""
        assert self.child.stderr is not None
        while told not in self.lines[-1]:
            self.lines.append(self.child.stderr.readline())
            assert self.lines[-1], "it ended"

    def end(self, *signals: signal.Signals) -> int:
        """Send `signals`, each when it has answered the one before."""
        for number in signals[:-1]:
            self.child.send_signal(number)
            self.read_to(": stopping within")
        self.child.send_signal(signals[-1])
        _, rest = self.child.communicate(timeout=60)
        self.lines += rest.splitlines()
        return self.child.returncode


def test_it_runs_serves_metrics_and_ends_with_its_handlers(glassbus: Command, here: Path) -> None:
    running = Running(glassbus, here, 0.5)
    url = running.lines[-1].rpartition(" at ")[2].strip()
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - its own http URL
        assert b'glassbus_handlers_in_flight{bus="shop"' in answer.read()
    assert running.end(signal.SIGTERM) == 0
    assert "SIGTERM: stopping within 20 s; once more to stop now" in running.lines
    assert glassbus("audit", "--url", "sqlite:///shop.db") == 0
    assert "handled 1 " in glassbus.out


def test_a_second_signal_does_not_wait_and_loses_nothing(glassbus: Command, here: Path) -> None:
    running = Running(glassbus, here, 600.0, 600)
    assert running.end(signal.SIGINT, signal.SIGINT) == 130
    assert glassbus("audit", "--url", "sqlite:///shop.db") == 0
    assert "accepted 1 = pending 1 " in glassbus.out


def test_a_quit_signal_is_an_emergency_stop_that_writes_down_what_is_held(glassbus: Command, here: Path) -> None:
    running = Running(glassbus, here, 0.5)
    assert running.end(signal.SIGQUIT) == 2
    assert running.lines[-1] == "glassbus: error: the bus made an emergency stop: signal SIGQUIT"
    assert (here / "shop.db.state/emergency/shop/0.manifest.jsonl").exists()
    assert glassbus("escalations", "list", "--url", "sqlite:///shop.db") == 1
    assert "EmergencyStop" in glassbus.out
    assert glassbus("audit", "--url", "sqlite:///shop.db") == 0


def test_a_hang_up_reads_the_configuration_again(glassbus: Command, here: Path) -> None:
    (here / "shop.py").write_text(SHOP.replace('name="shop")', 'name="shop", configuration="shop.toml")'))
    (here / "shop.toml").write_text("[subscriptions.charge]\nconcurrency = 2\n")
    running = Running(glassbus, here, 0.0)

    def hang_up(told: str) -> str:
        running.child.send_signal(signal.SIGHUP)
        running.read_to("SIGHUP:")
        line = running.lines[-1]
        running.lines.append("")
        assert told in line
        return line

    (here / "shop.toml").write_text("[subscriptions.charge]\nconcurrency = 'many'\n")
    assert "concurrency" in hang_up("not reloaded")
    (here / "shop.toml").write_text("[subscriptions.charge]\nconcurrency = 3\n")
    hang_up("configuration reloaded")
    assert running.end(signal.SIGTERM) == 0
