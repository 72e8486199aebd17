"""`glassbus explain`: the story of one message as an operator asks for it, whoever runs or died."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cli_kit import Command, failing, make_store, url_of
from journal_kit import START, Kept, failed

from glassbus import Delivery, Message, MessageBus, Outgoing, Retry
from glassbus.cli.storytext import Places, story_text
from glassbus.clock import SystemClock
from glassbus.message import Envelope
from glassbus.story import model
from glassbus.transport.spoolfile import take_files

ROOT = Path(__file__).parents[2]
KILLED = """
import asyncio, os, sys
from glassbus import *

async def main():
    bus = MessageBus(sys.argv[1], telemetry=False)

    @bus.subscribe("orders.*", name="charge", retry=Retry(3, 1))
    async def charge(message: Message, delivery: Delivery):
        if delivery.attempt == 2:
            bus.journal.flush()
            os.kill(os.getpid(), 9)
        raise ConnectionRefusedError(111, "refused by psp:443")

    async with bus:
        await bus.publish("orders.created", {"n": 1}, message_id="m-1")
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("GLASSBUS_JAEGER", raising=False)
    monkeypatch.delenv("GLASSBUS_URL", raising=False)


def test_a_dead_letter_is_told_in_eighty_columns_without_colours(glassbus: Command, tmp_path: Path) -> None:
    url = make_store(tmp_path / "orders.db", failing("card \x1b[31mdeclined", "other"))
    assert glassbus("explain", "m-1", "--url", url) == 0
    text = re.sub(r"\d\d:\d\d:\d\d(\.\d{3})?", "hh:mm:ss", glassbus.out)
    text = re.sub(r"\d{4}-\d\d-\d\d", "date", re.sub(r"[\d.]+ ms", "N ms", re.sub(r"[0-9a-f]{16}", "f" * 16, text)))
    head, commands = text.split("next       ")
    assert head.splitlines() == [
        "message    m-1",
        "published  on orders.created, at date hh:mm:ss UTC, level disk, to",
        "           charge",
        "",
        "charge     ✖ dead-lettered at dateThh:mm:ssZ after 1 attempt (attempts",
        "           spent)",
        "",
        "hh:mm:ss  attempt 1 of 1  ✖ failed after N ms",
        "              ValueError: card \\x1b[31mdeclined (message_processing_error,",
        "              medium, ffffffffffffffff)",
        "hh:mm:ss  dead letter",
        "              the only attempt was made",
        "",
    ]
    assert [line.split("glassbus ")[1].split(" --url")[0] for line in commands.splitlines()] == [
        "dlq show 1",
        "dlq replay 1",
        "errors show ffffffffffffffff",
    ]
    assert max(map(len, glassbus.out.split("next ")[0].splitlines())) <= 80


def test_a_killed_process_is_told_and_nothing_is_changed(glassbus: Command, tmp_path: Path) -> None:
    """A bus that opened the store would take the delivery back from the dead: a look leaves it where it is."""
    url = url_of(tmp_path / "orders.db")
    ran = subprocess.run([sys.executable, "-c", KILLED, url], capture_output=True, timeout=60, check=False)
    assert ran.returncode == -9, ran.stderr
    for _ in range(2):
        assert glassbus("explain", "m-1", "--url", url, "--json") == 0
        story = json.loads(glassbus.out)
        (charge,) = story["deliveries"]
        now = charge["now"]
        assert (now["state"], now["attempt"], now["owner_lives"], now["source"]) == ("in_flight", 2, False, "store")
        assert now["owner"].startswith("process ")
        assert [(step["kind"], step["attempt"]) for step in charge["steps"]] == [("attempt", 1), ("retry", 1)]
        assert story["notes"] == []
    assert glassbus("explain", "m-1", "--url", url) == 0
    assert "which is dead: given again" in " ".join(glassbus.out.split())

    async def go_on() -> None:
        bus = MessageBus(url, telemetry=False)

        @bus.subscribe("orders.*", name="charge", retry=Retry(3, 1))
        async def charge(message: Message[Any], delivery: Delivery) -> None:
            raise ConnectionRefusedError(111, "refused by psp:443")

        async with bus:
            await bus.drain(30.0)

    asyncio.run(go_on())
    assert glassbus("explain", "m-1", "--url", url) == 0
    words = " ".join(glassbus.out.split())
    assert "given again attempt 2 has no end: its process died" in words
    assert "from here in process" in words
    assert "all 3 attempts were made" in words


def test_json_is_what_the_page_says_it_is(glassbus: Command, tmp_path: Path) -> None:
    """Each field is documented, by its name; whoever adds one adds it there."""
    url = make_store(tmp_path / "orders.db", failing("declined"))
    assert glassbus("explain", "m-1", "--url", url, "--json") == 0
    story = json.loads(glassbus.out)
    assert json.loads(json.dumps(msgspec.convert(story, model.Story).to_dict())) == story
    page = (ROOT / "docs/explain.md").read_text()
    kinds = [kind for kind in vars(model).values() if isinstance(kind, type) and kind.__module__ == model.__name__]
    assert len(kinds) == 8
    fields = {name for kind in kinds for name in kind.__struct_fields__}
    assert {name for name in fields if f"`{name}`" not in page} == set()


def test_an_id_that_nobody_knows_says_why_that_may_be(glassbus: Command, tmp_path: Path) -> None:
    url = make_store(tmp_path / "orders.db", failing("declined"))
    for unknown in ("nobody", "m-1:charge:0.1:x", "", "%", "' OR 1=1 --", "../../etc/passwd"):
        assert glassbus("explain", unknown, "--url", url) == 1
        assert glassbus.out == ""
        assert f"nothing is known of a message {unknown} in" in glassbus.err
        assert "one that never failed leaves nothing once it is handled" in glassbus.err


def test_an_id_that_is_no_text_is_one_that_nobody_knows(glassbus: Command, tmp_path: Path) -> None:
    """The shell gives bytes that are no UTF-8; Python makes halves of surrogate pairs of them."""
    url = make_store(tmp_path / "orders.db", failing("declined"))
    for where in (("--state-dir", tmp_path / "orders.db.state"), ("--url", url)):
        assert glassbus("explain", *where, "--", os.fsdecode(b"\xff\xfe\xfd\xfcab")) == 1
        assert r"nothing is known of a message \udcff\udcfe\udcfd\udcfcab in" in glassbus.err


def test_what_a_journal_holds_reaches_no_terminal_and_no_shell_as_it_is() -> None:
    evil = "\x1b[31mPWN\x07; touch PWNED"
    now = model.Now(evil, evil, evil, dead_letter=evil)
    error = model.Failure(evil, evil, evil, evil, evil, evil, evil)
    steps = tuple(
        model.Step(1.0, kind, evil, 1, outcome=evil, error=error)
        for kind in ("attempt", "retry", "dead_lettered", "breaker", "reported", evil)
    )
    story = model.Story(
        model.FORMAT,
        evil,
        1.0,
        model.Published(evil, 1.0, evil, (evil,), complete=True, priority=evil, key=evil, trace_id=evil),
        steps,
        (model.DeliveryStory(evil, now, steps),),
        (model.TraceOfStory(evil, (evil,), evil, evil),),
        (evil,),
    )
    text = story_text(story, Places(" --url URL", ""))
    assert [char for char in text if not char.isprintable() and char != "\n"] == []
    commands = text.split("next       ")[1].splitlines()
    assert [shlex.split(line)[-1 if "errors" in line else -3] for line in commands] == [
        r"\x1b[31mPWN\x07; touch PWNED"
    ] * 3


def test_a_message_that_waits_and_never_failed_is_known_by_the_store(glassbus: Command, tmp_path: Path) -> None:
    url = make_store(tmp_path / "orders.db")

    async def publish() -> None:
        async with MessageBus(url, telemetry=False) as bus:
            await bus.publish("orders.created", 1, message_id="waits", delay=3600.0)

    asyncio.run(publish())
    assert glassbus("explain", "waits", "--url", url) == 0
    assert "waiting for its time, at" in glassbus.out
    assert "nobody consumes its subscription now" in " ".join(glassbus.out.split())


def test_an_id_that_the_store_still_remembers_was_handled(glassbus: Command, tmp_path: Path) -> None:
    """Ids that callers gave are remembered for ten minutes; whatever else could have ended it would be told."""
    url = make_store(tmp_path / "orders.db", [Outgoing("orders.paid", {"n": 1}, "happy")])
    assert glassbus("explain", "happy", "--url", url) == 0
    assert "✔ handled, it seems" in glassbus.out


def test_a_beginning_an_error_or_a_trace_leads_to_the_message(glassbus: Command, tmp_path: Path) -> None:
    url = make_store(tmp_path / "orders.db", [Outgoing("orders.created", {"fail": "x"}, f"hook-{n}00") for n in (1, 2)])
    for given in ("hook-1", "hook-100:charge:0.1"):
        assert glassbus("explain", given, "--url", url) == 0
        assert "message    hook-100" in glassbus.out
        assert glassbus.err == f"{given}: found hook-100\n"
    assert glassbus("explain", "hook-", "--url", url) == 1
    assert glassbus.err == "hook- begins the ids of 2 messages:\n  hook-100\n  hook-200\n"
    assert glassbus("explain", "ho", "--url", url) == 1  # too short to be meant
    folder = tmp_path / "state"
    kept = Kept(folder)
    kept.journal.trace_with(lambda _kind, _delivery, _reason: {"trace_id": "ab" * 16})
    kept.state(failed(START, "traced"))
    kept.journal.close()
    assert glassbus("explain", "ab" * 16, "--state-dir", folder, "--jaeger", "http://jaeger:16686/") == 0
    assert "message    traced" in glassbus.out
    assert f"http://jaeger:16686/trace/{'ab' * 16}" in glassbus.out


def test_without_its_store_the_journal_tells_what_it_can(glassbus: Command, tmp_path: Path) -> None:
    url = make_store(tmp_path / "orders.db", failing("declined"))
    folder = tmp_path / "orders.db.state"
    assert glassbus("explain", "m-1", "--state-dir", folder) == 0
    assert "as the journal has it; no store was asked" in " ".join(glassbus.out.split())
    assert "no store was asked where it is now: --url names it" in " ".join(glassbus.out.split())
    (tmp_path / "orders.db").write_bytes(b"not a database at all" * 100)
    assert glassbus("explain", "m-1", "--url", url) == 0
    assert "the store could not be asked" in glassbus.out
    assert glassbus("explain", "nobody", "--url", url) == 2
    assert "the journal tells nothing of it, and the store could not be asked" in glassbus.err


def test_a_password_in_the_url_is_not_printed(glassbus: Command, tmp_path: Path) -> None:
    kept = Kept(tmp_path / "state")
    kept.state(failed(START, "m-1"))
    kept.journal.close()
    url = "nats://bob:hunter2@127.0.0.1:1/shop"
    assert glassbus("explain", "m-1", "--url", url, "--state-dir", tmp_path / "state") == 0
    assert "hunter2" not in glassbus.out + glassbus.err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "no store named"),
        (["--state-dir", "nowhere"], "there is no folder nowhere"),
        (["--url", "sqlite:///nowhere.db"], "there is no store at"),
        (["--url", "memory://"], "memory:// lives inside the process"),
        (["--state-dir", ".", "--jaeger", "jaeger:16686"], "--jaeger takes a URL"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(glassbus: Command, words: list[str], problem: str) -> None:
    assert glassbus("explain", "m-1", *words) == 2
    assert problem in glassbus.err
    assert len(glassbus.err.splitlines()) == 1


def test_a_long_story_leaves_out_its_middle_and_json_does_not(glassbus: Command, tmp_path: Path) -> None:
    kept = Kept(tmp_path, flood_per_s=1000)
    for n in range(1, 201):
        kept.state(failed(START + n, "m-1", attempt=n))
    kept.journal.close()
    assert glassbus("explain", "m-1", "--state-dir", tmp_path) == 0
    assert "… 152 steps are left out here: --json has them" in glassbus.out
    assert glassbus("explain", "m-1", "--state-dir", tmp_path, "--json") == 0
    assert len(json.loads(glassbus.out)["deliveries"][0]["steps"]) == 200


def test_what_waits_in_the_spool_of_a_broker_that_is_away_is_found(glassbus: Command, tmp_path: Path) -> None:
    folder = tmp_path / "state"

    async def publish() -> None:
        (file,) = take_files(str(folder), "shop", SystemClock())
        await file.open(lambda _fact: None, lambda _file, _error: None)
        await file.add([Envelope("m-1", "orders.created", b"1", "json", {}, 2, "k", 1_700_000_000.0)])
        await file.close(5.0)

    asyncio.run(publish())
    for words in (["--state-dir", folder], ["--state-dir", folder, "--url", "nats://127.0.0.1:1/shop"]):
        assert glassbus("explain", "m-1", *words) == 0
        assert "in the local spool, to be forwarded when the broker is back" in " ".join(glassbus.out.split())
        assert "on orders.created, at 2023-11-14 22:13:20.000 UTC\n" in glassbus.out
    assert "the store could not be asked" in glassbus.out
    assert glassbus("explain", "m-2", "--state-dir", folder) == 1


def test_files_that_are_none_of_ours_are_told_of_and_harm_nothing(glassbus: Command, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "link.jsonl").symlink_to("/etc/passwd")
    (folder / "noise.jsonl").write_bytes(bytes(range(256)) * 1000)
    assert glassbus("explain", "nobody", "--state-dir", tmp_path) == 1
    assert "files could not be read" in glassbus.err
    assert "torn lines were passed over" in glassbus.err


def test_a_terminal_without_the_characters_gets_others(tmp_path: Path) -> None:
    make_store(tmp_path / "orders.db", failing("declined"))
    told = subprocess.run(
        [sys.executable, "-c", "import sys; from glassbus.cli import main; sys.exit(main())", "explain", "m-1",
         "--state-dir", str(tmp_path / "orders.db.state")],
        capture_output=True, timeout=60, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert b"attempt 1 of 1  ? failed" in told.stdout
