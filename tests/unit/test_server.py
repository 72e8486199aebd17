"""/metrics, /healthz and /readyz: right answers, also to wrong, slow and many clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from glassbus import ConfigurationError, MessageBus, server
from glassbus.server import Server, serve
from glassbus.telemetry import observe


@dataclass
class FakeHealth:
    status: str = "healthy"
    ready: bool = True
    checks: tuple[Any, ...] = ()


@dataclass
class FakeBus:
    name: str = "default"
    running: bool = True
    age: float = 0.0
    state: FakeHealth = field(default_factory=FakeHealth)

    def health(self) -> FakeHealth:
        return self.state

    def loop_age_s(self) -> float:
        return self.age


def get(running: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    request = urllib.request.Request(running.url + path, method=method, headers=headers)  # noqa: S310 - our own
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - our own
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read().decode()


def raw(running: Server, sent: bytes, wait_s: float = 10.0) -> bytes:
    """All that comes back for `sent`."""
    with socket.create_connection((running.host, running.port), timeout=wait_s) as client:
        client.sendall(sent)
        received = b""
        while chunk := client.recv(65536):
            received += chunk
        return received


def test_a_scrape_is_in_the_form_that_was_asked_for() -> None:
    seen: list[tuple[Any, str]] = []

    def expose(registry: Any, accept: str) -> tuple[str, bytes]:
        seen.append((registry, accept))
        return "text/x-test", b"metrics\n"

    with serve(FakeBus(), "127.0.0.1:0", registry="mine", expose=expose) as running:
        status, headers, body = get(running, "/metrics?name[]=x", Accept="application/openmetrics-text")
        assert (status, body, headers["Content-Type"]) == (200, "metrics\n", "text/x-test")
        assert get(running, "/metrics", "HEAD")[2] == ""
    assert seen[0] == ("mine", "application/openmetrics-text")


def test_a_running_bus_is_scraped_alive_and_ready() -> None:
    registry = CollectorRegistry()

    async def main() -> None:
        bus = MessageBus(name="orders", telemetry=False)
        bus.observe(observe(bus, registry=registry))
        with serve(bus, "127.0.0.1:0", registry=registry) as running:
            loop = asyncio.get_running_loop()
            assert (await loop.run_in_executor(None, get, running, "/readyz"))[0] == 503
            async with bus:
                for path in ("/healthz", "/readyz"):
                    status, _, body = await loop.run_in_executor(None, get, running, path)
                    assert (status, json.loads(body)["buses"][0]["name"]) == (200, "orders")
                status, _, body = await loop.run_in_executor(None, get, running, "/metrics")
                assert status == 200
                assert 'glassbus_build_info{bus="orders"' in body
            assert (await loop.run_in_executor(None, get, running, "/healthz"))[0] == 200
            assert (await loop.run_in_executor(None, get, running, "/readyz"))[0] == 503

    asyncio.run(main())


def test_a_stuck_loop_is_not_alive_and_not_ready() -> None:
    bus = FakeBus(age=server.LOOP_AGE_MAX_S + 1)
    with serve([FakeBus("well"), bus], "127.0.0.1:0") as running:
        status, _, body = get(running, "/healthz")
        assert status == 503
        assert [told["alive"] for told in json.loads(body)["buses"]] == [True, False]
        assert get(running, "/readyz")[0] == 503
        bus.age = 0.0
        assert get(running, "/healthz")[0] == 200


@pytest.mark.parametrize(
    ("health", "running", "status"),
    [
        (FakeHealth("healthy", True), True, 200),
        (FakeHealth("degraded", True), True, 200),
        (FakeHealth("critical", True), True, 200),
        (FakeHealth("healthy", False), True, 503),
        (FakeHealth("healthy", True), False, 503),
    ],
)
def test_ready_means_running_and_answering_however_the_handlers_fare(
    health: FakeHealth, running: bool, status: int
) -> None:
    with serve(FakeBus(state=health, running=running), "127.0.0.1:0") as served:
        assert get(served, "/readyz")[0] == status


def test_other_paths_and_methods_are_refused() -> None:
    with serve(FakeBus(), "127.0.0.1:0") as running:
        assert get(running, "/")[0] == 200
        assert get(running, "/../etc/passwd")[0] == 404
        assert get(running, "/metricsx")[0] == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert get(running, "/metrics", method)[0] == 501


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\xff\xfe garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"x" * 20_000 + b" HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.0\r\n" + b"".join(b"h%d: x\r\n" % n for n in range(5000)) + b"\r\n",
        b"GET / HTTP/1.0\r\nh: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
)
def test_nonsense_gets_an_error_and_the_server_goes_on(sent: bytes) -> None:
    with serve(FakeBus(), "127.0.0.1:0") as running:
        try:
            answer = raw(running, sent)
        except ConnectionError:
            answer = b""  # it hung up on what it would not read
        assert b" 200 " not in answer.partition(b"\r\n")[0]
        assert get(running, "/healthz")[0] == 200


def test_a_client_that_sends_nothing_or_a_byte_at_a_time_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CLIENT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(server._Handler, "timeout", 0.2)
    with serve(FakeBus(), "127.0.0.1:0") as running:
        began = time.monotonic()
        assert raw(running, b"") == b""
        with socket.create_connection((running.host, running.port), timeout=10) as slow:
            slow.settimeout(0.05)
            dropped = False
            while not dropped and time.monotonic() - began < 60:
                try:
                    slow.sendall(b"G")
                    dropped = slow.recv(100) == b""
                except TimeoutError:
                    continue
                except OSError:
                    dropped = True
        assert dropped
        assert get(running, "/healthz")[0] == 200


def test_more_clients_than_it_has_room_for_are_turned_away_and_then_served(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    entered = threading.Semaphore(0)

    def expose(registry: Any, accept: str) -> tuple[str, bytes]:
        entered.release()
        gate.wait(60)
        return "text/plain", b""

    monkeypatch.setattr(server, "UNHEARD_MAX_S", 60.0)  # a slow machine is not a silent client
    with serve(FakeBus(), "127.0.0.1:0", expose=expose) as running:
        answers: list[bytes] = []

        def ask() -> None:
            answers.append(raw(running, b"GET /metrics HTTP/1.0\r\n\r\n", 60))

        clients = [threading.Thread(target=ask) for _ in range(server.CLIENTS_MAX + 4)]
        for client in clients:
            client.start()
        until = time.monotonic() + 50
        while len(answers) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        turned_away = answers[:]
        assert all(entered.acquire(timeout=30) for _ in range(server.CLIENTS_MAX))
        monkeypatch.setattr(server, "UNHEARD_MAX_S", 0.0)
        assert get(running, "/healthz")[0] == 503  # who was heard, and is being answered, makes no way
        gate.set()
        for client in clients:
            client.join()
        assert [answer.split(b"\r\n")[0] for answer in turned_away] == [b"HTTP/1.1 503 Service Unavailable"] * 4
        assert all(answer.endswith(b"Connection: close\r\n\r\ntoo many clients\n") for answer in turned_away)
        assert sum(answer.startswith(b"HTTP/1.0 200") for answer in answers) == server.CLIENTS_MAX
        assert get(running, "/healthz")[0] == 200


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"GET /healthz HTTP/1.0\r\n"])
def test_a_silent_client_makes_way_when_there_is_no_room_and_an_unasked_one_is_told_503(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(server._Handler, "timeout", 120)  # not what frees the room here
    monkeypatch.setattr(server, "CLIENT_TIMEOUT_S", 60)
    monkeypatch.setattr(server, "UNHEARD_MAX_S", 3600.0)
    with serve(FakeBus(), "127.0.0.1:0") as running, contextlib.ExitStack() as clients:
        held = [
            clients.enter_context(socket.create_connection((running.host, running.port), timeout=30))
            for _ in range(server.CLIENTS_MAX)
        ]
        for client in held:
            client.sendall(sent)
        assert get(running, "/healthz")[0] == 503
        monkeypatch.setattr(server, "UNHEARD_MAX_S", 0.0)
        assert get(running, "/healthz")[0] == 200
        assert held[0].recv(100) == b""  # the oldest, and no answer to half a request
        held[-1].sendall(b"GET /healthz HTTP/1.0\r\n\r\n"[len(sent) :])
        assert held[-1].recv(15) == b"HTTP/1.0 200 OK"


def test_clients_that_are_turned_away_and_do_not_hang_up_are_kept_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CLIENTS_MAX", 0)
    monkeypatch.setattr(server, "_TURNED_AWAY_MAX", 2)
    monkeypatch.setattr(server, "_TURNED_AWAY_S", 3600.0)
    with serve(FakeBus(), "127.0.0.1:0") as running, contextlib.ExitStack() as clients:
        for _ in range(10):
            client = clients.enter_context(socket.create_connection((running.host, running.port), timeout=30))
            assert client.recv(12) == b"HTTP/1.1 503"
        until = time.monotonic() + 30
        while len(running._http._turned_away) > 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(running._http._turned_away) == 2
    assert not running._http._turned_away


@pytest.mark.parametrize(
    ("length", "status"),
    [
        pytest.param("9" * 5000, 413, id="5,000 digits"),
        ("9" * 11, 413),
        ("-1", 413),
        ("x", 413),
        ("500", 400),
        ("3", 400),
        ("2", 200),
        ("0", 200),
    ],
)
def test_a_body_must_be_as_long_as_it_says(length: str, status: int) -> None:
    bodies: list[bytes | None] = []

    def desk(path: str, body: bytes | None) -> tuple[int, bytes]:
        bodies.append(body)
        return 200, b""

    sent = b"" if length == "0" else b"{}"
    with (
        serve([], "127.0.0.1:0", desk=desk) as running,
        socket.create_connection((running.host, running.port), timeout=30) as client,
    ):
        client.sendall(f"POST /mine HTTP/1.0\r\nContent-Length: {length}\r\n\r\n".encode() + sent)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(12) == f"HTTP/1.0 {status}".encode()
    assert bodies == ([sent] if status == 200 else [])


def test_a_scrape_that_raises_is_a_500_without_details(caplog: pytest.LogCaptureFixture) -> None:
    def expose(registry: Any, accept: str) -> tuple[str, bytes]:
        raise RuntimeError("secret detail")

    with serve(FakeBus(), "127.0.0.1:0", expose=expose) as running:
        status, _, body = get(running, "/metrics")
    assert status == 500
    assert "secret" not in body
    assert "secret detail" in caplog.text


def test_a_port_that_is_taken_is_said_so_with_a_way_out() -> None:
    with serve(FakeBus(), "127.0.0.1:0") as running:
        with pytest.raises(ConfigurationError, match="GLASSBUS_HTTP"):
            serve(FakeBus(), running.address)
        assert get(running, "/healthz")[0] == 200


@pytest.mark.parametrize("address", ["", "localhost", "localhost:http", "localhost:99999", ":-1", "999.1.1.1:0"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError):
        serve(FakeBus(), address)


def test_the_address_comes_from_the_environment_and_close_frees_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("GLASSBUS_HTTP", f"127.0.0.1:{port}")
    running = serve(FakeBus())
    assert running.port == port
    running.close()
    running.close()
    serve(FakeBus()).close()


@pytest.mark.skipif(not socket.has_ipv6 or sys.platform == "win32", reason="no IPv6 here")
def test_an_ipv6_address_works() -> None:
    try:
        running = serve(FakeBus(), "[::1]:0")
    except ConfigurationError as error:
        pytest.skip(str(error))
    with running:
        assert running.address.startswith("[::1]:")
        assert get(running, "/healthz")[0] == 200
