"""Where Alertmanager's notifications arrive: a webhook receiver that remembers who was told what, and when."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple, Self

_BODY_BYTES_MAX = 16 * 1024 * 1024
_CLIENT_S = 5.0


class Notice(NamedTuple):
    """One alert of one notification. `receiver` is Alertmanager's name for who was told; `at` is monotonic seconds."""

    receiver: str
    status: str
    labels: Mapping[str, str]
    at: float


class Receiver:
    """Listens on a free port of the loopback from its making until `close`. A context manager. Thread-safe."""

    def __init__(self) -> None:
        self._notices: list[Notice] = []
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.take = self._take
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(0.05,), name="glassbus-drill-receiver", daemon=True
        )
        self._thread.start()

    def _take(self, body: bytes) -> None:
        """Keep what one notification says. Raises ValueError for what is not Alertmanager's webhook."""
        at = time.monotonic()
        said = json.loads(body)
        try:
            notices = [
                Notice(str(said["receiver"]), str(alert["status"]), dict(alert["labels"]), at)
                for alert in said["alerts"]
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a notification of Alertmanager: {error!r}") from error
        with self._lock:
            self._notices += notices

    def notices(self, since: int = 0) -> list[Notice]:
        """All that arrived, oldest first, from number `since` on."""
        with self._lock:
            return self._notices[since:]

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(_CLIENT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    take: Any


class _Handler(BaseHTTPRequestHandler):
    server: _Http
    timeout = _CLIENT_S

    def do_POST(self) -> None:
        status = 200
        with contextlib.suppress(ConnectionError):  # whoever told us has gone; it will tell again
            try:
                length = int(self.headers.get("Content-Length", ""))
                if not 0 <= length <= _BODY_BYTES_MAX:
                    raise ValueError("too long")
                self.server.take(self.rfile.read(length))
            except ValueError:
                status = 400  # Alertmanager logs that, and its log is shown when a drill fails
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
        """Notifications are kept, not logged."""
