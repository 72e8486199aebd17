"""Real servers for tests: each on free loopback ports, its files in a folder of its own, stopped by its pid."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self, TypeVar

import pytest

REPOSITORY = Path(__file__).parents[1]
#: Seconds within which a server must be ready, or be gone.
READY_S = 60.0


def need(name: str) -> str:
    """The binary of server `name`: in $GLASSBUS_SERVERS, on PATH, or where scripts/servers.sh puts it.

    Skips the test where there is none; in CI that is a failure, so that nothing is left untested unseen.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glassbus-ci" / "bin"
    for folder in (os.environ.get("GLASSBUS_SERVERS"), os.environ.get("PATH"), str(cache)):
        found = shutil.which(name, path=folder) if folder else None
        if found is not None:
            return found
    why = f"no {name}: run `sh scripts/servers.sh {name}`, which builds it, or put one on PATH"
    if os.environ.get("CI") or os.environ.get("GLASSBUS_CI"):
        pytest.fail(why)
    pytest.skip(why)


def fetch(url: str) -> bytes:
    """The body of a page of a server of ours. Raises OSError where it is not answered with success."""
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - only what the tests started
        body: bytes = answer.read()
        return body


class Server:
    """A server process. `kill` and `start` again keep its ports and files."""

    def __init__(self, command: list[str], ready: str, place: Path, environment: Mapping[str, str]) -> None:
        self.command = command
        self.ready = ready
        self.log = place / f"{Path(command[0]).name}.log"
        self._place = place
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Returns when its health page answers 200. Raises RuntimeError with the end of its log."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=self._place, env=self._environment
            )
        until = time.monotonic() + READY_S
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"{self.command[0]} did not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.02)
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def answers(self) -> bool:
        try:
            fetch(self.ready)
        except OSError:  # refused, or an answer that is not a success
            return False
        return True

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(how)
        try:
            process.wait(READY_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


Started = TypeVar("Started", bound=Server)


@contextlib.contextmanager
def running(server: Started) -> Iterator[Started]:
    """`server` for as long as the block lasts."""
    try:
        yield server.start()
    finally:
        server.kill()
