"""Real servers on loopback, that end with whoever started them, even by SIGKILL."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from glassbus.errors import GlassbusError

#: Where to find servers that are not on PATH.
SERVERS_VARIABLE = "GLASSBUS_SERVERS"
#: Seconds within which a server must be ready, or be gone.
READY_S = 60.0
_ASK_S = 10.0
_LOOK_S = 0.02
#: What is kept of a server's log for an error.
_LOG_TAIL = 1500

# The server is this shell's own process after `exec`, so its pid is the server's. Beside it, in the same process
# group, a `cat` waits for the end of our end of the pipe, which comes when we die in whatever way, and ends the group.
_LEASH = 'exec 3<&0; (cat <&3 >/dev/null 2>&1; kill -s KILL -- -$$) >/dev/null 2>&1 & exec "$@" </dev/null 3<&-'


class ServerMissing(GlassbusError):
    """A server that is needed is not installed; the text says how to have it."""


class ServerFailed(GlassbusError):
    """A server did not start, or ended by itself; the text has the end of its log."""


def find_server(name: str) -> str:
    """The binary of server `name`, in $GLASSBUS_SERVERS, on PATH, or where scripts/servers.sh puts it.

    Raises ServerMissing, which says how to install it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glassbus-ci" / "bin"
    for folder in (os.environ.get(SERVERS_VARIABLE), os.environ.get("PATH"), str(cache)):
        found = shutil.which(name, path=folder) if folder else None
        if found is not None:
            return found
    raise ServerMissing(
        f"{name} is not installed, and the real one is needed. Put its binary on PATH or in the folder that "
        f"${SERVERS_VARIABLE} names ({_WHERE.get(name, 'its project has releases')}); in a checkout, "
        f"`sh scripts/servers.sh {_BUILT_WITH.get(name, name)}` builds it"
    )


_WHERE = {
    "prometheus": "https://prometheus.io/download",
    "promtool": "https://prometheus.io/download, with Prometheus",
    "alertmanager": "https://prometheus.io/download",
    "amtool": "https://prometheus.io/download, with Alertmanager",
    "otelcol": "https://opentelemetry.io/docs/collector",
    "nats-server": "https://nats.io/download",
}
_BUILT_WITH = {"promtool": "prometheus", "amtool": "alertmanager"}


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def ask(url: str, body: bytes | None = None, timeout: float = _ASK_S) -> bytes:
    """The body of a loopback page (POST with `body`). Raises OSError unless it answers with success."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=timeout)
    try:
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request("GET" if body is None else "POST", f"/{path}", body=body, headers=kind)
        answer = connection.getresponse()
        text = answer.read()
    except http.client.HTTPException as error:
        raise OSError(f"{url} answers with no HTTP: {error!r}") from error
    finally:
        connection.close()
    if answer.status // 100 != 2:
        raise OSError(f"{url} answers {answer.status}: {text[:300].decode(errors='replace')}")
    return text


def ask_json(url: str, body: bytes | None = None) -> Any:
    """What a loopback page says in JSON. Raises OSError."""
    try:
        return json.loads(ask(url, body))
    except ValueError as error:
        raise OSError(f"{url} answers with no JSON") from error


class Server:
    """One server process. `kill` and `start` again keep its ports and files. Not thread-safe.

    `ready` is the page that answers with success once it serves. Its log is `NAME.log` in `place`.
    """

    def __init__(
        self, command: Sequence[str], ready: str, place: Path, *, name: str = "", environment: Mapping[str, str] = {}
    ) -> None:
        self.command = list(command)
        self.ready = ready
        self.name = name or Path(command[0]).name
        self.log = place / f"{self.name}.log"
        self._place = place
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Returns when it is ready. Raises ServerFailed. Where a loop runs, await `started` instead."""
        self.begin()
        until = time.monotonic() + READY_S
        while not self.answers():
            self._still_coming(until)
            time.sleep(_LOOK_S)
        return self

    async def started(self) -> None:
        """As `start`, for a loop, which may cancel it; then `kill` it."""
        self.begin()
        until = time.monotonic() + READY_S
        while not await asyncio.to_thread(self.answers):
            self._still_coming(until)
            await asyncio.sleep(_LOOK_S)

    def _still_coming(self, until: float) -> None:
        self.check()
        if time.monotonic() > until:
            self.kill()
            raise ServerFailed(f"{self.name} was not ready within {READY_S:g} s; its log ends: {self.log_end()}")

    def begin(self) -> None:
        """Start the process, and do not wait until it is ready. Raises ServerFailed."""
        try:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(  # noqa: S603 - servers that find_server found
                    ["/bin/sh", "-c", _LEASH, "sh", *self.command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    cwd=self._place,
                    env=self._environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise ServerFailed(f"{self.name} cannot be started: {error}") from error

    @property
    def pid(self) -> int | None:
        """Of the process that runs; None when none does."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def check(self) -> None:
        """Raises ServerFailed when it ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            status = self._process.returncode
            self.kill()
            raise ServerFailed(f"{self.name} ended by itself, status {status}; its log ends: {self.log_end()}")

    def answers(self) -> bool:
        """Whether it is ready now."""
        try:
            ask(self.ready, timeout=2.0)
        except OSError:  # not yet, or no more
            return False
        return True

    def log_end(self) -> str:
        """The last lines of its log."""
        try:
            return self.log.read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip()
        except OSError as error:
            return f"(no log: {error})"

    def freeze(self) -> None:
        """SIGSTOP: it is there, and does nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        # The group has our `cat` in it for as long as our end of the pipe is open, so its number is no one else's.
        with contextlib.suppress(ProcessLookupError):  # killed from outside, with its whole group
            os.killpg(process.pid, signal.SIGKILL)
        if process.stdin is not None:
            process.stdin.close()
        process.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL after a while. Idempotent."""
        if self.running and self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # then it is killed
                self._process.wait(READY_S / 4)
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.running:
            self._process.send_signal(number)


Started = TypeVar("Started", bound=Server)


@contextlib.contextmanager
def serving(server: Started) -> Iterator[Started]:
    """`server` for as long as the block lasts."""
    try:
        yield server.start()
    finally:
        server.kill()
