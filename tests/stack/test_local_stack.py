"""`make stack`: it comes up with the demo, ends when asked, leaves nothing when killed, and says what is missing."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from local_stack import SERVERS

from tests.server_kit import REPOSITORY, need
from tests.stack_kit import until

SCRIPT = REPOSITORY / "scripts" / "local_stack.py"


@contextmanager
def running(place: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and what it said when all was up."""
    for server in SERVERS:
        need(server)
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "--place", str(place), "--rate", "5"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "GO": "/nonexistent"},  # built or not: nothing is built here
    ) as process:
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if line.startswith("Ctrl-C"):
                    break
            yield process, said
        finally:
            process.kill()


def living(place: Path) -> list[str]:
    """Processes that have to do with `place`, whoever their parent is."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            where = str((entry / "cwd").readlink())
        except OSError:  # not a process, or no longer
            continue
        if (str(place) in command or where.startswith(str(place))) and entry.name != str(os.getpid()):
            found.append(command)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_all_of_it_is_up_and_all_of_it_ends(how: signal.Signals, tmp_path: Path) -> None:
    place = tmp_path / "stack"
    with running(place) as (process, said):
        urls = dict(re.findall(r"^  (\S+) +(http://127\.0\.0\.1:\d+)", said, re.MULTILINE))
        assert set(urls) == {"Prometheus", "Alertmanager", "Jaeger", "OTLP", "demo"}
        for page in (urls["demo"] + "/readyz", urls["Prometheus"] + "/-/ready", urls["Jaeger"] + "/api/services"):
            with urllib.request.urlopen(page, timeout=10) as answer:  # noqa: S310 - what was started here
                assert answer.status == 200
        assert len(living(place)) > len(SERVERS)
        process.send_signal(how)
        assert process.wait(120) == (0 if how is signal.SIGINT else -how)
        assert until(lambda: living(place), lambda found: not found) == []
        if how is signal.SIGINT:
            assert "unaccounted" in (place / "demo.log").read_text() or "ledger" in (place / "demo.log").read_text()


def test_a_second_one_in_the_same_place_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for server in SERVERS:
            need(server)
        ran = subprocess.run(
            [sys.executable, str(SCRIPT), "--place", str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "GO": "/nonexistent"},
        )
    assert ran.returncode == 1
    assert "another one runs" in ran.stderr


def test_without_go_and_servers_it_says_what_to_install(tmp_path: Path) -> None:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
        "GO": "/nonexistent",
    }
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--place", str(tmp_path / "stack")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert ran.returncode == 1
    assert "Install Go" in ran.stderr
    assert "jaeger is not installed" in ran.stderr
    assert not (tmp_path / "stack").exists()
