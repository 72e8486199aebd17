"""A real nats-server for tests: on a free loopback port, its store in a folder of its own, stopped by its pid."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

#: Seconds within which a server must be ready, or be gone.
READY_S = 20.0


def find_server() -> str | None:
    """The nats-server to test with: $GLASSBUS_NATS_SERVER, the one on PATH, or the one that CI installed."""
    named = os.environ.get("GLASSBUS_NATS_SERVER")
    if named:
        return named
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = cache / "glassbus-ci" / "bin" / "nats-server"
    return shutil.which("nats-server") or (str(cached) if cached.exists() else None)


def need_server() -> str:
    """The server, or a skip; in CI a missing server is a failure, so that nothing is left untested unseen."""
    found = find_server()
    if found is None:
        why = (
            "no nats-server: put one on PATH, name it in $GLASSBUS_NATS_SERVER, or "
            "`go install github.com/nats-io/nats-server/v2@v2.15.2`"
        )
        if os.environ.get("CI") or os.environ.get("GLASSBUS_CI"):
            pytest.fail(why)
        pytest.skip(why)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """One nats-server. `kill` and `start` again keep its store and its port."""

    def __init__(self, place: Path, config: str = "") -> None:
        self.place = place
        self.port = free_port()
        self.monitor = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        place.mkdir(parents=True, exist_ok=True)
        self._config = place / "server.conf"
        self._log = place / "server.log"
        self.configure(config)

    def configure(self, config: str) -> None:
        """Write the configuration; `start` or `reload` makes it work."""
        self._config.write_text(
            f'listen: "127.0.0.1:{self.port}"\nhttp: "127.0.0.1:{self.monitor}"\n'
            f'jetstream {{ store_dir: "{self.place / "store"}" }}\n{config}\n'
        )

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> Server:
        binary = need_server()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([binary, "-c", str(self._config)], stdout=log, stderr=log)
        until = time.monotonic() + READY_S
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"nats-server did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.01)
        return self

    def _ready(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            url = f"http://127.0.0.1:{self.monitor}/healthz?js-enabled-only=true"
            with urllib.request.urlopen(url, timeout=1) as answer:
                return bool(json.loads(answer.read()).get("status") == "ok")
        return False

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
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

    def reload(self) -> None:
        """Have it read its configuration again."""
        os.kill(self.pid, signal.SIGHUP)


@contextlib.contextmanager
def running(place: Path, config: str = "") -> Iterator[Server]:
    """A server for as long as the block lasts."""
    server = Server(place, config)
    try:
        yield server.start()
    finally:
        server.kill()


@functools.cache
def shared() -> Server:
    """One server for all tests of this process that only need some server."""
    place = tempfile.mkdtemp(prefix="glassbus-nats-")
    server = Server(Path(place))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    atexit.register(server.kill)
    return server.start()


def store_name(place: Path) -> str:
    """The name of the store that stands for a folder."""
    return hashlib.blake2b(str(place).encode(), digest_size=8).hexdigest()
