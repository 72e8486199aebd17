"""The command as a whole: exit statuses, one line for an expected error, quiet ends."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import Command, failing, make_store, url_of

from glassbus.cli import COMMANDS, main
from glassbus.cli.common import duration, number, own_command, paint, printable, printable_lines, shortened, table


def test_help_names_every_command(glassbus: Command) -> None:
    assert glassbus("--help") == 0
    for name, _, purpose in COMMANDS:
        assert name in glassbus.out
        assert purpose.split()[0] in glassbus.out


@pytest.mark.parametrize("name", [name for name, _, _ in COMMANDS])
def test_every_command_explains_itself(glassbus: Command, name: str) -> None:
    assert glassbus(name, "--help") == 0
    assert f"usage: glassbus {name}" in glassbus.out


def test_the_version_is_told(glassbus: Command) -> None:
    assert glassbus("--version") == 0
    assert glassbus.out.startswith("glassbus ")


@pytest.mark.parametrize("words", [(), ("nonsense",), ("health", "--nonsense"), ("publish", "--priority", "urgent")])
def test_a_command_line_that_makes_no_sense_is_status_2(glassbus: Command, words: tuple[str, ...]) -> None:
    assert glassbus(*words) == 2
    assert "usage:" in glassbus.err


@pytest.mark.parametrize("command", [["health"], ["audit"], ["dlq", "list"], ["publish", "/dev/null"]])
def test_a_store_must_be_named_and_there(glassbus: Command, command: list[str], tmp_path: Path) -> None:
    assert glassbus(*command) == 2
    assert glassbus.err == (
        "glassbus: error: no store named: give --url sqlite:///path/to/file.db, or set GLASSBUS_URL\n"
    )
    assert glassbus(*command, "--url", url_of(tmp_path / "absent.db")) == 2
    assert "there is no store at" in glassbus.err
    assert not (tmp_path / "absent.db").exists()
    assert glassbus(*command, "--url", "memory://") == 2
    assert "nothing to see from outside" in glassbus.err


def test_credentials_in_a_url_never_show(glassbus: Command) -> None:
    assert glassbus("health", "--url", "nats://ada:secret@127.0.0.1:1") == 2
    assert "secret" not in glassbus.out + glassbus.err
    assert glassbus.err.count("\n") == 1


def test_a_file_that_is_no_store_is_one_clear_line(glassbus: Command, tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Dear Ada, this is not a database. " * 100)
    assert glassbus("audit", "--url", url_of(path)) == 2
    assert glassbus.err.startswith("glassbus: error: ")
    assert glassbus.err.count("\n") == 1
    assert path.read_text().startswith("Dear Ada")


def test_the_url_may_come_from_the_environment(
    glassbus: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASSBUS_URL", make_store(tmp_path / "a.db"))
    assert glassbus("audit") == 0


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("glassbus.cli._dispatch", interrupted)
    assert main(["health"]) == 130


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    url = make_store(tmp_path / "a.db", failing("one"))
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from glassbus.cli import main; sys.exit(main())",
            "dlq",
            "list",
            "--url",
            url,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.close()
    _, err = child.communicate(timeout=30)
    assert err == b""
    assert child.returncode == 141


def test_nothing_that_a_terminal_would_obey_is_written() -> None:
    assert printable("a\x1b[2Jb\r\n\x9bc\u202e") == r"a\x1b[2Jb\r\n\x9bc\u202e"
    assert printable("x" * 20, 10) == "x" * 9 + "…"
    assert printable_lines("a\n\tb\x07") == "a\n    b\\x07"


def test_no_colour_without_a_terminal() -> None:
    assert paint("text", "good") == "text"


def test_durations_for_people() -> None:
    assert [duration(s) for s in (0.0004, 0.05, 1.234, 59.9, 61, 3600, 7322, 200_000)] == [
        "0 ms", "50 ms", "1.2 s", "59.9 s", "1 min 1 s", "1 h 0 min", "2 h 2 min", "2 d 7 h",
    ]  # fmt: skip


def test_a_table_aligns_its_columns() -> None:
    assert table([["a", "1"], ["bcd", "1,000"]], ["name", "n"], frozenset({1})) == (
        "name      n\na         1\nbcd   1,000"
    )


def test_numbers_have_bounds() -> None:
    read = number(0, 10, above=True)
    assert read("2.5") == 2.5
    for text in ("0", "-1", "11", "nan", "inf", "two"):
        with pytest.raises(Exception, match="above 0 and at most 10"):
            read(text)


def test_a_command_to_copy_can_be_run_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["my venv/bin/glassbus", "demo"])
    assert own_command() == "'my venv/bin/glassbus'"
    monkeypatch.setattr(sys, "argv", ["/elsewhere/pytest"])
    assert own_command() == shlex.quote(str(Path(sys.executable).with_name("glassbus")))
    (tmp_path / "glassbus").write_text("#!/bin/sh\n")
    (tmp_path / "glassbus").chmod(0o700)
    assert own_command() == "glassbus"


def test_what_is_cut_keeps_both_ends() -> None:
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 7) == "abc…ijk"
