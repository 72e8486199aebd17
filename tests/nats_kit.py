"""A real nats-server for tests: on a free loopback port, its store in a folder of its own, stopped by its pid."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests import server_kit
from tests.server_kit import free_port


def need_server() -> str:
    """The nats-server to test with; see `server_kit.need`."""
    return server_kit.need("nats-server")


class Server(server_kit.Server):
    """One nats-server. `kill` and `start` again keep its store and its port."""

    def __init__(self, place: Path, config: str = "") -> None:
        self.place = place.resolve()
        self.port = free_port()
        self.monitor = free_port()
        self.place.mkdir(parents=True, exist_ok=True)
        self._config = self.place / "server.conf"
        self.configure(config)
        ready = f"http://127.0.0.1:{self.monitor}/healthz?js-enabled-only=true"
        super().__init__([need_server(), "-c", str(self._config)], ready, self.place)

    def configure(self, config: str) -> None:
        """Write the configuration; `start` or `reload` makes it work."""
        self._config.write_text(
            f'listen: "127.0.0.1:{self.port}"\nhttp: "127.0.0.1:{self.monitor}"\n'
            f'jetstream {{ store_dir: "{self.place / "store"}" }}\n{config}\n'
        )

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def reload(self) -> None:
        """Have it read its configuration again."""
        assert self.pid is not None
        os.kill(self.pid, signal.SIGHUP)


@contextlib.contextmanager
def running(place: Path, config: str = "") -> Iterator[Server]:
    """A server for as long as the block lasts."""
    with server_kit.running(Server(place, config)) as server:
        yield server


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
