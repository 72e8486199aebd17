"""The demo: its service heals from everything its world does to it, and it shows and counts that truly."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Command
from rich.console import Console

from glassbus import MessageBus, Outgoing
from glassbus.cli.common import CommandError
from glassbus.cli.demo.feed import InputFeed, MadeUpFeed, Spiced, outgoing, topic_of
from glassbus.cli.demo.screen import Screen
from glassbus.cli.demo.service import subscribe_intake, subscribe_service
from glassbus.cli.demo.state import Demo
from glassbus.cli.demo.watch import Watch
from glassbus.cli.demo.world import World
from glassbus.message import Priority
from glassbus.testing import VirtualClock, run_virtual

# What comes in


@pytest.mark.parametrize(
    ("record", "topic"),
    [
        ({"event": "push", "payload": {}}, "github.push"),
        ({"event": "pu sh", "payload": {}}, "input.record"),
        ({"event": "push", "payload": {}, "more": 1}, "input.record"),
        ({"topic": "shop.basket.added"}, "shop.basket.added"),
        ({"topic": "push"}, "push"),
        ({"topic": "a..b"}, "input.record"),
        ({"topic": "glassbus.secret"}, "input.record"),
        ({"topic": 7}, "input.record"),
        ({}, "input.record"),
    ],
)
def test_the_topic_follows_from_the_record(record: dict[str, Any], topic: str) -> None:
    assert topic_of(record)[0] == topic


def test_a_webhook_is_keyed_by_its_repository_and_goes_ahead_when_urgent() -> None:
    message = outgoing({"event": "sponsorship", "payload": {"repository": {"full_name": "a/b"}}})
    assert (message.topic, message.key, message.priority) == ("github.sponsorship", "a/b", Priority.HIGH)
    odd = outgoing({"event": "push", "payload": {"repository": {"full_name": "\n" * 300}}})
    assert odd.key is None


def taken(source: str, count: int, *, replay: bool) -> tuple[list[Outgoing], InputFeed]:
    async def take() -> tuple[list[Outgoing], InputFeed]:
        feed = InputFeed(source, replay=replay)
        messages: list[Outgoing] = []
        while len(messages) < count and not feed.ended:
            messages += await feed.take(count - len(messages), 1.0)
        return messages, feed

    return asyncio.run(take())


def test_an_input_is_replayed_from_its_start_or_read_once(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text('{"topic": "a.b", "n": 1}\nnonsense\n[]\n{"topic": "a.b", "n": 2}\n')
    messages, feed = taken(str(path), 5, replay=True)
    assert [m.payload["n"] for m in messages] == [1, 2, 1, 2, 1]
    assert (feed.rounds, feed.bad, feed.ended) == (2, 2, False)
    assert feed.first_bad.startswith("line 2: not JSON")
    messages, feed = taken(str(path), 5, replay=False)
    assert [m.payload["n"] for m in messages] == [1, 2]
    assert feed.ended


def test_an_input_without_one_record_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text("[]\n")
    with pytest.raises(CommandError, match=r"no JSON object in .*; line 1: not a JSON object"):
        taken(str(path), 1, replay=True)


def test_what_is_made_up_depends_on_the_seed_alone() -> None:
    async def first(seed: int) -> list[Outgoing]:
        return await MadeUpFeed(seed).take(200, 0.0)

    assert asyncio.run(first(1)) == asyncio.run(first(1))
    assert asyncio.run(first(1)) != asyncio.run(first(2))


# The service in its world, in virtual time


def run_service(seconds: float, *, outage: tuple[float, float] | None = None) -> tuple[Demo, World, dict[str, Any]]:
    """The made-up feed at 20 records a second for `seconds`, and then until all is done."""

    async def scenario(clock: VirtualClock) -> tuple[Demo, World, dict[str, Any]]:
        watch, world = Watch(), World(1)
        bus = MessageBus("memory://", telemetry=False, observers=[watch], clock=clock, seed=1)
        subscribe_intake(bus, "github.>")
        subscribe_service(bus, world)
        demo = Demo(bus, watch, Spiced(MadeUpFeed(1), "run"), "memory://")
        async with bus:
            for step in range(int(seconds * 10)):
                world.payments.down = outage is not None and outage[0] <= step / 10 < outage[1]
                await bus.publish_many(await demo.feed.take(2, 0.0))
                await asyncio.sleep(0.1)
            world.payments.down = False
            while "breaker_open" in (await bus.drain(120.0)).reasons.values():
                await asyncio.sleep(0.1)
            return demo, world, {"view": demo.view(), "letters": await bus.dead_letters.list()}

    return run_virtual(scenario)


def test_the_service_heals_from_everything_but_the_two_orders_that_nobody_can_mend() -> None:
    demo, world, end = run_service(30.0, outage=(10.0, 16.0))
    total = end["view"].total
    assert total.unaccounted == 0
    assert total.pending == total.in_flight == total.expired == total.discarded == 0
    died = {(letter.subscription, letter.report.exception_type.rpartition(".")[2]) for letter in end["letters"]}
    assert died == {
        ("warehouse", "ZeroDivisionError"),
        ("warehouse", "PayloadUndecodable"),
        ("charge", "PayloadUndecodable"),
    }
    watch = demo.watch
    assert watch.unrouted > 0
    assert watch.duplicates > 0
    assert watch.timeouts > 0
    assert watch.recovered > 50
    assert world.payments.charged_cents > 0
    (opening,) = [o for o in watch.openings if o.breaker == "charge"]
    assert opening.closed_at is not None
    # What the outage held back was charged after it: every good order was paid once and has its receipt.
    accounts = {row.name: row.account for row in end["view"].rows}
    assert accounts["receipt"].handled == accounts["charge"].handled
    assert accounts["warehouse"].accepted == accounts["charge"].accepted


def test_the_rows_stand_in_the_order_of_the_service() -> None:
    _, _, end = run_service(0.5)
    assert [row.name for row in end["view"].rows] == ["intake", "warehouse", "charge", "receipt", "archive"]


def test_repeated_news_are_one_line_with_a_count() -> None:
    watch = Watch()
    seen: list[str] = []
    watch.on_news = lambda news: seen.append(news.text)
    for number in range(3):
        watch.tell(float(number), "warn", f"attempt {number}", "retry a")
    watch.tell(9.0, "bad", "once")
    assert [(news.text, news.count, news.at) for news in watch.news] == [("attempt 2", 3, 2.0), ("once", 1, 9.0)]
    assert seen == ["attempt 0", "once"]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 40), (60, 15)])
def test_the_screen_fits_and_shows_the_equation(width: int, height: int) -> None:
    demo, _, _ = run_service(3.0)
    demo.bus = Frozen(demo.bus)  # type: ignore[assignment]
    screen = Screen(demo, colour=False)
    screen._console = console = Console(width=width, height=height, color_system=None, file=io.StringIO())
    with console.capture() as capture:
        console.print(screen._draw(demo.view()))
    lines = capture.get().splitlines()
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for part in ("glassbus demo", "warehouse", "what happened", "accepted", "✓ balanced"):
        assert part in text


class Frozen:
    """What a stopped bus still tells."""

    def __init__(self, bus: MessageBus) -> None:
        self.ledger, self.health, self.subscribers = bus.ledger, bus.health, bus.subscribers


# The command


def test_it_runs_ends_and_proves_its_books(glassbus: Command, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_text(
        "".join(
            json.dumps({"event": "push", "payload": {"repository": {"full_name": "a/b"}, "n": n}}) + "\n"
            for n in range(30)
        )
        + "nonsense\n"
    )
    url = f"sqlite:///{tmp_path / 'demo.db'}"
    assert glassbus("demo", "--plain", "--input", source, "--rate", 200, "--url", url) == 0, glassbus.err
    for part in (
        f"ended      by the end of {source}",
        "30 records from",
        "1 line could not be used; the first: line 31: not JSON",
        "1 unrouted (nobody subscribes), 1 duplicate recognised",
        "pending 0 + in flight 0",
        "✓ balanced",
        "✓ every row recounted",
        f"glassbus dlq list --url {url}",
        f"glassbus escalations list --url {url}",
        f"glassbus errors report --url {url}",
    ):
        assert part in glassbus.out
    assert glassbus("audit", "--url", url) == 0


def test_on_a_memory_bus_too(glassbus: Command) -> None:
    assert glassbus("demo", "--plain", "--seconds", "0.3", "--url", "memory://", "--rate", "100") == 0
    assert "✓ balanced" in glassbus.out
    assert "dlq list" not in glassbus.out


@pytest.mark.parametrize(
    "words",
    [
        ["--rate", "0"],
        ["--seconds", "-1"],
        ["--input", "/no/such/file"],
        ["--url", "ftp://x"],
        ["--serve", "nonsense"],
        ["--input", "/dev/null"],
    ],
)
def test_what_cannot_be_is_told_at_once(glassbus: Command, words: list[str]) -> None:
    assert glassbus("demo", "--plain", *words) == 2
    assert "error: " in glassbus.err
    assert "Traceback" not in glassbus.err


PROGRAM = "import sys; from glassbus.cli import main; sys.exit(main())"


def started(url: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "demo", "--plain", "--url", url, "--rate", "60", "--serve", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if re.match(r" +[1-9]\.\d s ", line):  # it has run for a second
            return child
    raise AssertionError(f"the demo ended by itself, with status {child.wait()}")


def test_killed_and_started_again_it_goes_on_and_loses_nothing(glassbus: Command, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'demo.db'}"
    killed = started(url)
    killed.kill()
    killed.communicate(timeout=30)
    assert glassbus("audit", "--url", url) == 0
    again = started(url)
    time.sleep(0.1)
    again.send_signal(signal.SIGINT)
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 0, out
    assert "ended      by Ctrl-C" in out
    assert "pending 0 + in flight 0" in out
    assert "✓ every row recounted" in out
