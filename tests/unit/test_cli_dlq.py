"""`glassbus dlq`: dead letters are found, shown whole, replayed and discarded, and never by accident."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import time
from pathlib import Path

import pytest
from cli_kit import Command, failing, make_store, payloads

from glassbus import Message, MessageBus, Outgoing
from glassbus.cli.common import when


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store with three dead letters."""
    odd = Outgoing("orders.odd", {"fail": "bad\x1b[2J", "text": "\x1b]0;owned\x07"}, "m-3", headers={"trace": "t-1"})
    return make_store(tmp_path / "a.db", [*failing("one", "two"), odd])


def ids(glassbus: Command, url: str, *filters: str) -> list[str]:
    assert glassbus("dlq", "list", "--url", url, "--json", *filters) == 0
    return [letter["message"]["id"] for letter in json.loads(glassbus.out)]


def test_the_list_is_newest_first_and_names_no_payload(glassbus: Command, url: str) -> None:
    assert glassbus("dlq", "list", "--url", url) == 0
    heading, *rows = glassbus.out.splitlines()
    assert heading.split() == ["id", "died", "subscription", "topic", "message", "attempts", "fingerprint", "error"]
    assert [word for row in rows for word in row.split() if word.startswith("m-")] == ["m-3", "m-2", "m-1"]
    assert [row.rpartition("ValueError: ")[2] for row in rows] == [r"bad\x1b[2J", "two", "one"]
    assert "\x1b" not in glassbus.out
    assert ids(glassbus, url) == ["m-3", "m-2", "m-1"]
    assert "owned" not in glassbus.out


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (["--topic", "orders.odd"], ["m-3"]),
        (["--message-id", "m-2"], ["m-2"]),
        (["--subscription", "charge"], ["m-3", "m-2", "m-1"]),
        (["--exception-type", "ValueError", "--limit", "1"], ["m-3"]),
        (["--category", "timeout_error"], []),
        (["--since", "1h"], ["m-3", "m-2", "m-1"]),
        (["--until", "1h"], []),
    ],
)
def test_filters_choose(glassbus: Command, url: str, filters: list[str], found: list[str]) -> None:
    assert ids(glassbus, url, *filters) == found


@pytest.mark.parametrize(
    "words", [["list"], ["list", "--json"], ["replay", "--all", "--yes"], ["discard", "--all", "--yes"]]
)
def test_a_subscription_that_is_not_there_is_an_error_that_names_those_that_are(
    glassbus: Command, url: str, words: list[str]
) -> None:
    assert glassbus("dlq", *words, "--url", url, "--subscription", "chrage") == 2
    assert glassbus.err == "glassbus: error: no subscription 'chrage' in this store; it has charge\n"


def test_an_error_of_our_own_is_found_and_told_by_its_bare_name(glassbus: Command, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'b.db'}"

    async def run() -> None:
        bus = MessageBus(url, telemetry=False)

        @bus.subscribe("orders.*", name="typed")
        async def typed(message: Message[int]) -> None:
            """Is given no text."""

        async with bus:
            await bus.publish("orders.created", "text")
            await bus.drain(60.0)

    asyncio.run(run())
    assert len(ids(glassbus, url, "--exception-type", "PayloadUndecodable")) == 1
    assert len(ids(glassbus, url, "--exception-type", "glassbus.errors.PayloadUndecodable")) == 1
    assert glassbus("dlq", "list", "--url", url) == 0
    assert "  PayloadUndecodable: " in glassbus.out


def test_an_error_is_whole_in_a_pipe_and_keeps_its_end_in_a_terminal(
    glassbus: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_store(tmp_path / "b.db", failing("start " + "x" * 300 + " end"))
    assert glassbus("dlq", "list", "--url", url) == 0
    assert glassbus.out.endswith("start " + "x" * 300 + " end\n")
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    assert glassbus("dlq", "list", "--url", url) == 0
    monkeypatch.undo()
    error = shown.getvalue()[shown.getvalue().index("ValueError: ") :]
    assert error.startswith("ValueError: start x")
    assert error.endswith("x end\n")
    assert len(error) == 101


def test_times_have_their_zone_and_are_taken_back(glassbus: Command, url: str) -> None:
    assert glassbus("dlq", "list", "--url", url) == 0
    died = glassbus.out.splitlines()[1].split()[1]
    assert died.endswith("Z")
    assert abs(when(died) - time.time()) < 60
    assert ids(glassbus, url, "--since", died)


def test_a_list_that_is_cut_says_how_to_go_on(glassbus: Command, url: str) -> None:
    assert glassbus("dlq", "list", "--url", url, "--limit", "2") == 0
    hint = glassbus.out.splitlines()[-1]
    before = hint.split("--before ")[1].split()[0]
    assert ids(glassbus, url, "--before", before) == ["m-1"]


def test_one_is_shown_whole_and_harmless(glassbus: Command, url: str) -> None:
    assert glassbus("dlq", "list", "--url", url, "--json", "--message-id", "m-3") == 0
    letter = json.loads(glassbus.out)[0]["id"]
    assert glassbus("dlq", "show", "--url", url, letter) == 0
    for part in ("m-3 on orders.odd", "trace: t-1", "ValueError: bad", "stack trace", ".charge", '"fail": '):
        assert part in glassbus.out
    assert "\x1b" not in glassbus.out
    assert glassbus("dlq", "show", "--url", url, "--json", letter) == 0
    assert json.loads(glassbus.out)[0]["message"]["payload"]["fail"] == "bad\x1b[2J"
    assert glassbus("dlq", "show", "--url", url, "nonsense") == 2
    assert glassbus.err == "glassbus: error: no dead letter 'nonsense'\n"


def test_replay_of_some_leaves_the_others(glassbus: Command, url: str) -> None:
    assert glassbus("dlq", "replay", "--url", url, "--all", "--yes", "--topic", "orders.created") == 0
    assert glassbus.out == "replayed 2 dead letters\n"
    assert ids(glassbus, url) == ["m-3"]
    assert sorted(m.id for m in payloads(url)) == ["m-1", "m-2"]


def test_discard_by_id(glassbus: Command, url: str) -> None:
    assert glassbus("dlq", "list", "--url", url, "--json") == 0
    first, second, _ = (letter["id"] for letter in json.loads(glassbus.out))
    assert glassbus("dlq", "discard", "--url", url, "--yes", "--json", first, second, second) == 0
    assert json.loads(glassbus.out) == {"discarded": 2, "gone": 0}
    assert ids(glassbus, url) == ["m-1"]
    assert glassbus("dlq", "discard", "--url", url, "--yes", first) == 2
    assert "no dead letter" in glassbus.err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["replay"], "say which"),
        (["discard", "--subscription", "charge"], "say which"),
        (["discard", "--all", "1"], "not both"),
        (["discard", "1", "--topic", "x"], "not both"),
        (["discard", "--all"], "needs --yes when it is not run in a terminal"),
    ],
)
def test_nothing_is_done_by_accident(glassbus: Command, url: str, words: list[str], reason: str) -> None:
    assert glassbus("dlq", *words, "--url", url) == 2
    assert reason in glassbus.err
    assert len(ids(glassbus, url)) == 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "left"), [("y\n", 0), ("\n", 3), ("", 3), ("no\n", 3)])
def test_in_a_terminal_it_asks(
    glassbus: Command, url: str, answer: str, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    assert glassbus("dlq", "discard", "--all", "--url", url) == (1 if left else 0)
    monkeypatch.undo()
    assert shown.getvalue().startswith("discard 3 dead letters? [y/N] ")
    assert len(ids(glassbus, url)) == left


def test_dead_letters_that_somebody_else_took_are_passed_over(
    glassbus: Command, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stale(store: object, filters: object) -> list[str]:
        return ["999", *letters, "1000"]

    assert glassbus("dlq", "list", "--url", url, "--json") == 0
    letters = [letter["id"] for letter in json.loads(glassbus.out)]
    monkeypatch.setattr("glassbus.cli.dlq._matching", stale)
    assert glassbus("dlq", "replay", "--all", "--yes", "--url", url) == 0
    assert glassbus.out == "replayed 3 dead letters; 2 were gone already\n"


def test_an_empty_queue_says_so(glassbus: Command, tmp_path: Path) -> None:
    url = make_store(tmp_path / "empty.db")
    assert glassbus("dlq", "list", "--url", url) == 0
    assert glassbus.out == "no dead letters\n"
    assert glassbus("dlq", "replay", "--all", "--yes", "--url", url) == 0
    assert glassbus.out == "no dead letters\n"


def test_times_are_ago_or_iso_or_unix() -> None:
    assert abs(when("90s") - (time.time() - 90)) < 5
    assert abs(when("2d") - (time.time() - 172_800)) < 5
    assert when("2026-01-31T12:00:00+00:00") == 1769860800.0
    assert when("1769860800.5") == 1769860800.5
    with pytest.raises(Exception, match="is no time"):
        when("yesterday")
