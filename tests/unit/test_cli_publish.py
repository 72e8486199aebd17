"""`glassbus publish`: what is good is stored once, what is bad is named by its line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Command, make_store, payloads

from glassbus.errors import PublishUncertain
from glassbus.message import Priority
from glassbus.transport.sqlite import SqliteTransport


@pytest.fixture
def url(tmp_path: Path) -> str:
    return make_store(tmp_path / "a.db")


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_lines_become_messages_in_order(glassbus: Command, url: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in", *({"n": n} for n in range(600)), "", '"text"', "null")
    assert glassbus("publish", "--url", url, "--topic", "orders.created", "--priority", "high", source) == 0
    assert glassbus.out == "602 accepted, 0 unrouted, 0 duplicates, 0 rejected\n"
    messages = payloads(url)
    assert [m.payload for m in messages] == [*({"n": n} for n in range(600)), "text", None]
    assert {m.priority for m in messages} == {Priority.HIGH}


def test_topic_key_id_and_payload_come_from_fields(glassbus: Command, url: str, tmp_path: Path) -> None:
    source = write(
        tmp_path / "in",
        {"event": "created", "payload": {"a": 1}, "repo": "x/y", "id": 17},
        {"event": "paid", "payload": [2], "id": "eighteen"},
    )
    fields = ["--topic-field", "event", "--topic-prefix", "orders.", "--payload-field", "payload"]
    fields += ["--key-field", "repo", "--id-field", "id"]
    assert glassbus("publish", "--url", url, *fields, source) == 0
    assert [(m.id, m.topic, m.key, m.payload) for m in payloads(url)] == [
        ("17", "orders.created", "x/y", {"a": 1}),
        ("eighteen", "orders.paid", None, [2]),
    ]


def test_the_same_input_again_is_stored_once_when_its_ids_are_its_own(
    glassbus: Command, url: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "in", {"topic": "orders.created", "id": "a"}, {"topic": "nobody.cares", "id": "b"})
    assert glassbus("publish", "--url", url, "--id-field", "id", source) == 0
    assert glassbus.out == "1 accepted, 1 unrouted, 0 duplicates, 0 rejected\n"
    assert glassbus("publish", "--url", url, "--id-field", "id", source) == 0
    assert glassbus.out.startswith("0 accepted")
    assert len(payloads(url)) == 1


BAD = {
    2: "not JSON",
    3: "key 'topic' is there twice",
    4: "NaN is not JSON",
    5: "topic 'a b' is not a dotted name",
    6: "does not fit in 64 bits",
    8: "no field 'topic'",
    9: "not an object",
    10: "payload cannot be encoded",
    11: "no text in field 'topic'",
}


def with_bad_lines(path: Path) -> Path:
    good = {"topic": "orders.created"}
    return write(
        path,
        good,
        "{",
        '{"topic": "orders.created", "topic": "orders.paid"}',
        '{"topic": "orders.created", "n": NaN}',
        {"topic": "a b"},
        '{"topic": "orders.created", "n": 99999999999999999999}',
        good,
        {"n": 1},
        "[1]",
        '{"topic": "orders.created", "text": "\\ud800"}',
        {"topic": True},
        good,
    )


def test_the_first_bad_line_ends_it_and_all_before_it_are_stored(glassbus: Command, url: str, tmp_path: Path) -> None:
    source = with_bad_lines(tmp_path / "in")
    assert glassbus("publish", "--url", url, source) == 2
    counts, error = glassbus.err.splitlines()
    assert counts == "1 accepted, 0 unrouted, 0 duplicates, 1 rejected"
    assert error.startswith(f"glassbus: error: {source} line 2: not JSON")
    assert len(payloads(url)) == 1


def test_bad_lines_are_named_and_left_out_on_request(glassbus: Command, url: str, tmp_path: Path) -> None:
    source = with_bad_lines(tmp_path / "in")
    assert glassbus("publish", "--url", url, "--skip-bad", source) == 1
    assert glassbus.out == f"3 accepted, 0 unrouted, 0 duplicates, {len(BAD)} rejected\n"
    named = dict(line.split(f"{source} line ")[1].split(": ", 1) for line in glassbus.err.splitlines())
    assert {int(number): reason for number, reason in BAD.items() if reason in named[str(number)]} == BAD
    assert len(named) == len(BAD)


def test_an_id_used_for_another_body_is_a_bad_line(glassbus: Command, url: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in", *({"topic": "orders.created", "id": "same", "n": n} for n in range(2)))
    assert glassbus("publish", "--url", url, "--id-field", "id", "--skip-bad", source) == 1
    assert "line 2: message id 'same' was already published with a different topic or body" in glassbus.err


def test_an_uncertain_batch_is_repeated_with_its_ids(
    glassbus: Command, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = SqliteTransport.publish
    calls = []

    async def uncertain(self: SqliteTransport, batch: Any, wait_s: float, /) -> Any:
        stored = await publish(self, batch, wait_s)
        calls.append([envelope.id for envelope in batch])
        if len(calls) == 1:
            raise PublishUncertain(batch[0].id, "the disk coughed")
        return stored

    monkeypatch.setattr(SqliteTransport, "publish", uncertain)
    source = write(tmp_path / "in", {"n": 1}, {"n": 2})
    assert glassbus("publish", "--url", url, "--topic", "orders.created", source) == 0
    assert glassbus.out == "0 accepted, 0 unrouted, 2 duplicates, 0 rejected\n"
    assert calls[0] == calls[1]
    monkeypatch.undo()
    assert len(payloads(url)) == 2


def test_a_batch_that_stays_uncertain_names_its_lines(
    glassbus: Command, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def uncertain(self: SqliteTransport, batch: Any, wait_s: float, /) -> Any:
        raise PublishUncertain(batch[0].id, "the disk is gone")

    monkeypatch.setattr(SqliteTransport, "publish", uncertain)
    monkeypatch.setattr("glassbus.cli.publish._REPEATS", 0)
    source = write(tmp_path / "in", {"n": 1}, {"n": 2})
    assert glassbus("publish", "--url", url, "--topic", "orders.created", source) == 2
    assert f"{source} lines 1 to 2: it is not known whether message" in glassbus.err


def test_stdin_is_published_as_it_comes_and_an_interrupt_ends_it_cleanly(url: str) -> None:
    program = "import sys; from glassbus.cli import main; sys.exit(main())"
    child = subprocess.Popen(
        [sys.executable, "-c", program, "publish", "--url", url, "--topic", "orders.created"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert child.stdin is not None
    child.stdin.write(b'{"n": 1}\n{"n": 2}\n')
    child.stdin.flush()
    path = Path(url.removeprefix("sqlite:///"))
    until = time.monotonic() + 20.0
    while len(payloads(url)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
        assert path.exists()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (130, b"interrupted after line 2\n")
    assert out == b"2 accepted, 0 unrouted, 0 duplicates, 0 rejected\n"
