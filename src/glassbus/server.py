"""/metrics, /healthz and /readyz over HTTP, on a thread of their own.

- `/metrics`: a Prometheus scrape, in OpenMetrics when the client asks for it.
- `/healthz`: 200 while the process is alive and the loops of its buses turn, else 503: restart it.
- `/readyz`: 200 while every bus takes messages and its store answers, else 503: send it no work. How its handlers
  fare does not count: what they depend on is often shared, and would take every replica out of service at once. The
  answer holds all that `Health.to_dict` tells.

Meant for the inside of a network: there is no TLS and no authentication, and it listens on
the loopback unless told otherwise. It asks nothing of the event loop, so it answers while that hangs.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BufferedIOBase
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import Any, Protocol, Self

from glassbus.errors import ConfigurationError
from glassbus.telemetry import exposition

_log = logging.getLogger(__name__)

DEFAULT_ADDRESS = "127.0.0.1:9464"
#: A client that sends or reads nothing for so long is dropped.
CLIENT_TIMEOUT_S = 5.0
#: Requests served at once; those beyond get 503. A scraper and two probes need three.
CLIENTS_MAX = 16
#: While there is no room, a client that has not sent its request for so long makes way for a new one.
UNHEARD_MAX_S = 0.5
#: Clients told 503 are kept until they hang up, so many, for so long: closed with their request unread, they could
#: see a reset in place of the answer.
_TURNED_AWAY_MAX = 32
_TURNED_AWAY_S = 1.0
_TURNED_AWAY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 17\r\n"
    b"Cache-Control: no-store\r\nConnection: close\r\n\r\ntoo many clients\n"
)
#: A loop that has not turned for so long is stuck.
LOOP_AGE_MAX_S = 10.0
#: A request line and its headers, in bytes.
_HEAD_BYTES_MAX = 16 * 1024

#: The body of a POST, in bytes.
_BODY_BYTES_MAX = 1024 * 1024

Expose = Callable[[Any, str], tuple[str, bytes]]
#: Answers pages of the program's own: the path, and the body of a POST or None, to a status and plain text, or None for
#: a page that is not there. Called on threads of the server.
Desk = Callable[[str, bytes | None], tuple[int, bytes] | None]


class _HealthView(Protocol):
    @property
    def status(self) -> str: ...
    @property
    def ready(self) -> bool: ...


class Watched(Protocol):
    """What the server asks of a bus; any thread may."""

    @property
    def name(self) -> str: ...
    @property
    def running(self) -> bool: ...
    def health(self) -> _HealthView: ...
    def loop_age_s(self) -> float:
        """Seconds since the bus's loop last turned."""


class Server:
    """A running server. A context manager that closes it. `address` is where it listens, the true port in it."""

    def __init__(self, http: _Http) -> None:
        self._http = http
        host, port = http.server_address[:2]
        shown = host.decode() if isinstance(host, bytes | bytearray) else str(host)
        self.host, self.port = shown, int(port)
        self._thread = threading.Thread(target=http.serve_forever, name="glassbus-server", args=(0.1,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def close(self) -> None:
        """Stop listening. Requests being answered are dropped. Idempotent."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(CLIENT_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(
    buses: Watched | Iterable[Watched],
    address: str | None = None,
    *,
    registry: Any = None,
    expose: Expose = exposition,
    desk: Desk | None = None,
) -> Server:
    """Serve `buses` at `address`, `host:port` (default: the variable GLASSBUS_HTTP, else 127.0.0.1:9464).

    Port 0 takes a free one; the result knows which. `registry` is the Prometheus registry to show (default:
    the global one); `desk` answers further pages. Raises ConfigurationError when the address is malformed, in use
    or not ours.
    """
    where = address if address is not None else os.environ.get("GLASSBUS_HTTP") or DEFAULT_ADDRESS
    host, port = _parse(where)
    watched = tuple(buses) if isinstance(buses, Iterable) else (buses,)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        http = _Http(family, (host, port), watched, registry, expose, desk)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigurationError(
            f"cannot serve metrics at {where}: {reason}; choose another address with GLASSBUS_HTTP=host:port "
            "(port 0 takes a free one)"
        ) from error
    return Server(http)


def _parse(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigurationError(f"address {address!r} is not host:port, such as {DEFAULT_ADDRESS}")
    return host.removeprefix("[").removesuffix("]"), int(port)


class _Http(ThreadingMixIn, HTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(
        self,
        family: socket.AddressFamily,
        address: tuple[str, int],
        buses: tuple[Watched, ...],
        registry: Any,
        expose: Expose,
        desk: Desk | None,
    ) -> None:
        self.address_family = family
        self.buses = buses
        self.registry = registry
        self.expose = expose
        self.desk = desk
        self._lock = threading.Lock()
        #: The clients that have a thread, oldest first: when each came, or None once its request was heard whole.
        self._clients: dict[Any, float | None] = {}
        #: The clients told 503, and until when each is kept. Only the thread that accepts touches it.
        self._turned_away: deque[tuple[float, Any]] = deque()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks DNS for the name of the host, which may take long and is not used.
        if os.name == "posix":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            admitted = len(self._clients) < CLIENTS_MAX or self._make_way()
            if admitted:
                self._clients[request] = time.monotonic()
        if admitted:
            super().process_request(request, client_address)
        else:
            self._turn_away(request)

    def _make_way(self) -> bool:
        """Under the lock: hang up on the oldest client still unheard; False when there is none that took long."""
        for client, came in self._clients.items():
            if came is not None and time.monotonic() - came >= UNHEARD_MAX_S:
                del self._clients[client]
                _hang_up(client)  # its thread wakes, and ends
                return True
        return False

    def heard(self, request: Any) -> bool:
        """The request came whole, so its client keeps its place; False when it had to make way before."""
        with self._lock:
            if request not in self._clients:
                return False
            self._clients[request] = None
            return True

    def _turn_away(self, request: Any) -> None:
        try:
            request.setblocking(False)
            request.send(_TURNED_AWAY)
            request.shutdown(socket.SHUT_WR)
        except OSError:
            _log.debug("a client to be turned away had gone")
            self.shutdown_request(request)
            return
        self._turned_away.append((time.monotonic() + _TURNED_AWAY_S, request))

    def service_actions(self) -> None:
        # Called by the thread that accepts, every 0.1 s and after each client.
        for _ in range(len(self._turned_away)):
            until, request = self._turned_away.popleft()
            if len(self._turned_away) >= _TURNED_AWAY_MAX or time.monotonic() >= until or _hung_up(request):
                self.shutdown_request(request)
            else:
                self._turned_away.append((until, request))

    def shutdown_request(self, request: Any) -> None:
        with self._lock:  # before it is closed: `_make_way` must not meet a descriptor that is another's by then
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        while self._turned_away:
            self.shutdown_request(self._turned_away.popleft()[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        # The client went away, or sends nonsense; neither is our failure.
        _log.debug("request of %s ended early", client_address, exc_info=True)


def _hang_up(client: socket.socket) -> None:
    try:
        client.shutdown(socket.SHUT_RDWR)
    except OSError:
        _log.debug("a client to be dropped had gone")


def _hung_up(client: socket.socket) -> bool:
    """Reads on, without waiting, what a client still sends; True at its end."""
    try:
        return not client.recv(65536)
    except BlockingIOError:
        return False
    except OSError:
        return True


class _Capped:
    """Reads the head of a request, and ends it when it is too long."""

    def __init__(self, inner: BufferedIOBase) -> None:
        self._inner = inner
        self._left = _HEAD_BYTES_MAX

    @property
    def spent(self) -> bool:
        return self._left <= 0

    def readline(self, limit: int = -1) -> bytes:
        if self.spent:
            return b""
        line = self._inner.readline(min(limit, self._left) if limit >= 0 else self._left)
        self._left -= len(line)
        return line

    def body(self, length: int) -> bytes:
        """Of `length` bytes, after the head; fewer when the client sends no more."""
        return self._inner.read(length)

    def close(self) -> None:
        self._inner.close()


class _Handler(BaseHTTPRequestHandler):
    server: _Http
    server_version = "glassbus"
    sys_version = ""
    timeout = CLIENT_TIMEOUT_S
    protocol_version = "HTTP/1.0"  # one request a connection: nobody can hold one open

    def setup(self) -> None:
        super().setup()
        self._head = self.rfile = _Capped(self.rfile)  # type: ignore[assignment]
        self._body: bytes | None = None

    def handle_one_request(self) -> None:
        # `timeout` is for each read, so a client that sends a byte at a time could stay for ever.
        timer = threading.Timer(2 * CLIENT_TIMEOUT_S, _hang_up, (self.connection,))
        timer.daemon = True
        timer.start()
        try:
            super().handle_one_request()
        finally:
            timer.cancel()

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.server.desk is None:
            self.send_error(501, "nothing is taken here")
        elif not _is_body_length(length):
            self.send_error(413, f"the body must be of at most {_BODY_BYTES_MAX} bytes, and say how many")
        else:
            self._body = self._head.body(int(length))
            if len(self._body) < int(length):
                self.send_error(400, "the body ended early")
            else:
                self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        if not self.server.heard(self.request):
            return
        path = self.path.partition("?")[0]
        if self._head.spent:
            status, kind, content = 431, "text/plain; charset=utf-8", b"the headers are too long\n"
        elif (page := self._at_the_desk(path)) is not None:
            status, kind, content = page[0], "text/plain; charset=utf-8", page[1]
        elif self._body is not None:
            status, kind, content = 404, "text/plain; charset=utf-8", b"not here\n"
        elif path == "/metrics":
            status, kind, content = self._metrics()
        elif path in ("/healthz", "/readyz"):
            alive, told = _healthz(self.server.buses) if path == "/healthz" else _readyz(self.server.buses)
            status, kind = (200 if alive else 503), "application/json"
            content = json.dumps(told).encode() + b"\n"
        elif path == "/":
            status, kind, content = 200, "text/plain; charset=utf-8", b"/metrics\n/healthz\n/readyz\n"
        else:
            status, kind, content = 404, "text/plain; charset=utf-8", b"not here; see /\n"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _at_the_desk(self, path: str) -> tuple[int, bytes] | None:
        if self.server.desk is None:
            return None
        try:
            return self.server.desk(path, self._body)
        except Exception:  # noqa: BLE001 - it is the program's own code, so any type can come
            _log.exception("a page of the program failed: %s", path)
            return 500, b"this page failed; see the log\n"

    def _metrics(self) -> tuple[int, str, bytes]:
        try:
            kind, content = self.server.expose(self.server.registry, self.headers.get("Accept", ""))
        except Exception:  # noqa: BLE001 - the registry is shared: a collector of somebody else may raise anything
            _log.exception("a scrape failed")
            return 500, "text/plain; charset=utf-8", b"the scrape failed; see the log\n"
        return 200, kind, content

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
        _log.debug("%s " + format, self.address_string(), *args)

    def address_string(self) -> str:
        return str(self.client_address[0])


def _is_body_length(text: str) -> bool:
    # Its digits are counted first: `int` raises for thousands of them.
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _BODY_BYTES_MAX


def _healthz(buses: Iterable[Watched]) -> tuple[bool, dict[str, Any]]:
    told: list[dict[str, Any]] = []
    alive = True
    for bus in buses:
        # A bus that has not started, or has stopped, has no loop to be stuck.
        age_s = bus.loop_age_s() if bus.running else 0.0
        turns = age_s <= LOOP_AGE_MAX_S
        alive = alive and turns
        # As of the loop's last look: asking anew could wait for a disk, and this must not.
        seen = str(getattr(bus, "health_status", "unknown"))
        told.append({"name": bus.name, "alive": turns, "loop_age_seconds": round(age_s, 3), "status": seen})
    return alive, {"status": "ok" if alive else "stuck", "buses": told}


def _readyz(buses: Iterable[Watched]) -> tuple[bool, dict[str, Any]]:
    told: list[dict[str, Any]] = []
    ready = True
    for bus in buses:
        health = bus.health()
        able = bool(bus.running and health.ready and bus.loop_age_s() <= LOOP_AGE_MAX_S)
        ready = ready and able
        in_full: Callable[[], dict[str, Any]] = getattr(health, "to_dict", dict)
        told.append({**in_full(), "name": bus.name, "ready": able, "status": str(health.status)})
    return ready, {"status": "ready" if ready else "not ready", "buses": told}
