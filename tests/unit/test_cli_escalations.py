"""`glassbus escalations` on the state directory of a bus that runs, and of one that does not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Command, url_of

from glassbus import Message, MessageBus, Retry
from glassbus.cli import main
from glassbus.recovery.escalation_file import look


def bus_with_failures(path: Path, *errors: BaseException) -> MessageBus:
    """A bus whose handler raises the error that a message names by its number, once."""
    bus = MessageBus(url_of(path), telemetry=False)

    @bus.subscribe("orders.*", name="charge", retry=Retry(max_attempts=1))
    async def charge(message: Message[Any]) -> None:
        raise errors[message.payload]

    return bus


async def fail(bus: MessageBus, count: int) -> None:
    for number in range(count):
        await bus.publish("orders.created", number)
    await bus.drain()
    state_dir = bus.settings.state_dir
    assert state_dir is not None
    while sum(len(kept.escalations) for kept in look(state_dir)) < count:  # stored, not only open
        await asyncio.sleep(0.01)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store whose bus has stopped with two open escalations, one of them critical."""

    async def run() -> None:
        async with bus_with_failures(
            tmp_path / "orders.db", ValueError("a card of plastic"), MemoryError("none")
        ) as bus:
            await fail(bus, 2)

    asyncio.run(run())
    return url_of(tmp_path / "orders.db")


def test_what_is_open_is_listed_the_worst_first_and_a_critical_one_is_a_no(glassbus: Command, url: str) -> None:
    assert glassbus("escalations", "list", "--url", url) == 1
    lines = glassbus.out.splitlines()
    assert lines[0].split() == ["FINGERPRINT", "SEVERITY", "STATE", "NAME", "SEEN", "OPENED", "BUS", "SUMMARY"]
    assert "critical" in lines[1]
    assert "MemoryError: none" in lines[1]
    assert "default (not running)" in lines[1]
    assert "a card of plastic" in lines[2]
    assert glassbus("escalations", "list", "--url", url, "--json") == 1
    told = json.loads(glassbus.out)
    assert [one["severity"] for one in told["escalations"]] == ["critical", "medium"]
    assert told["escalations"][0]["live"] is False


def test_one_is_acknowledged_and_resolved_by_the_start_of_its_fingerprint(glassbus: Command, url: str) -> None:
    glassbus("escalations", "list", "--url", url, "--json")
    critical, medium = [one["fingerprint"] for one in json.loads(glassbus.out)["escalations"]]
    assert glassbus("escalations", "ack", critical[:6], "--by", "mia", "--url", url) == 0
    assert glassbus.out == f"{critical}: acknowledged\n"
    assert glassbus("escalations", "list", "--url", url) == 0
    assert "acknowledged by mia" in glassbus.out
    assert glassbus("escalations", "resolve", medium, critical, "--url", url) == 0
    assert glassbus("escalations", "list", "--url", url) == 0
    assert glassbus.out == "no escalation is open\n"


def test_what_is_not_open_is_a_no_and_what_is_ambiguous_an_error(glassbus: Command, url: str) -> None:
    assert glassbus("escalations", "ack", "feedfeed", "--url", url) == 1
    assert "no escalation feedfeed is open" in glassbus.out
    glassbus("escalations", "list", "--url", url, "--json")
    prints = [one["fingerprint"] for one in json.loads(glassbus.out)["escalations"]]
    if prints[0][0] == prints[1][0]:
        assert glassbus("escalations", "ack", prints[0][0], "--url", url) == 2
    assert glassbus("escalations", "ack", "", "--url", url) == 1


def test_a_running_bus_is_told_and_does_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "orders.db"

    async def run() -> None:
        async with bus_with_failures(path, ValueError("x")) as bus:
            await fail(bus, 1)
            (one,) = bus.escalations.open()
            words = ["escalations", "ack", one.fingerprint, "--by", "mia", "--url", url_of(path)]
            assert await asyncio.to_thread(main, words) == 0
            async with asyncio.timeout(20):
                while bus.escalations.open()[0].acknowledged_by != "mia":
                    await asyncio.sleep(0.05)

    asyncio.run(run())
    assert "1 running bus will have it acknowledged within 2 s" in capsys.readouterr().out


def test_a_state_directory_can_be_named_itself(glassbus: Command, url: str, tmp_path: Path) -> None:
    assert glassbus("escalations", "list", "--state-dir", tmp_path / "orders.db.state") == 1
    assert glassbus("escalations", "list", "--state-dir", tmp_path / "nowhere") == 2
    assert "there is no folder" in glassbus.err
    assert glassbus("escalations", "list", "--url", "memory://") == 2
    assert "give --state-dir" in glassbus.err
    assert glassbus("escalations", "list") == 2


def test_a_store_without_any_has_none(glassbus: Command, tmp_path: Path) -> None:
    (tmp_path / "new.db").touch()
    assert glassbus("escalations", "list", "--url", url_of(tmp_path / "new.db")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["new.db"]


def test_a_path_that_was_misspelt_does_not_read_as_nothing_open(glassbus: Command, tmp_path: Path) -> None:
    assert glassbus("escalations", "list", "--url", url_of(tmp_path / "odrers.db")) == 2
    assert "there is no store" in glassbus.err
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_told_and_left_for_its_bus(glassbus: Command, url: str, tmp_path: Path) -> None:
    path = tmp_path / "orders.db.state" / "escalations" / "default" / "0.json"
    path.write_bytes(path.read_bytes()[:50])
    assert glassbus("escalations", "list", "--url", url) == 0
    assert "damaged: default/0.json" in glassbus.out
    assert path.exists()
    assert glassbus("escalations", "list", "--url", url, "--json") == 0
    assert json.loads(glassbus.out)["damaged"]


def test_other_commands_take_nothing_over(glassbus: Command, url: str, tmp_path: Path) -> None:
    before = (tmp_path / "orders.db.state" / "escalations" / "default" / "0.json").read_bytes()
    assert glassbus("audit", "--url", url) == 0
    assert glassbus("dlq", "list", "--url", url) == 0
    assert (tmp_path / "orders.db.state" / "escalations" / "default" / "0.json").read_bytes() == before
