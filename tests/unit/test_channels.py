"""Channels over HTTP: what they send, and servers that hang, lie, redirect or never end."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from glassbus import Alertmanager, ConfigurationError, ErrorSeverity, Webhook
from glassbus.policy.escalation import Ends, Escalated, EscalationState
from glassbus.recovery import posting
from glassbus.recovery.channels import Log, Notice
from glassbus.recovery.posting import NotDelivered, Target, post

ESCALATED = Escalated(
    fingerprint="f00d",
    name="KillSwitchOpen",
    severity=ErrorSeverity.HIGH,
    summary="charge pauses itself",
    ends=Ends.HEALING,
    state=EscalationState.ACKNOWLEDGED,
    acknowledged_by="mia",
    opened_at=1_700_000_000.0,
    seen_at=1_700_000_060.0,
    seen=3,
)
OPENED = Notice("opened", ESCALATED, "shop", 1_700_000_100.0, 1)
RESOLVED = Notice("resolved", ESCALATED, "shop", 1_700_000_100.0, 2, "the breaker closed")

Behave = Callable[[socket.socket, bytes], None]


class Peer:
    """A server that reads one request on each connection, and then does what it is told to."""

    def __init__(self, behave: Behave) -> None:
        self.requests: list[bytes] = []
        self._behave = behave
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._ended = threading.Event()
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            client, _ = self._socket.accept()
            with client:
                if self._ended.is_set():
                    return
                client.settimeout(10)
                with contextlib.suppress(OSError):  # the client gave up: that is what is tested
                    request = self._read(client)
                    self.requests.append(request)
                    self._behave(client, request)

    @staticmethod
    def _read(client: socket.socket) -> bytes:
        request = b""
        while b"\r\n\r\n" not in request:
            more = client.recv(65536)
            if not more:
                return request
            request += more
        head, _, body = request.partition(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-l"))
        while len(body) < length:
            body += client.recv(65536)
        return head + b"\r\n\r\n" + body

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(request.partition(b"\r\n\r\n")[2]) for request in self.requests]

    def close(self) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):  # it may have ended by itself
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        self._thread.join(10)
        self._socket.close()


@contextlib.contextmanager
def peer(behave: Behave) -> Iterator[Peer]:
    one = Peer(behave)
    try:
        yield one
    finally:
        one.close()


def answers(text: bytes) -> Behave:
    return lambda client, _: client.sendall(text)


FINE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


# What is sent


def test_an_alert_is_what_the_api_v2_takes_and_names_who_sent_it() -> None:
    with peer(answers(FINE)) as server:
        Alertmanager(f"http://127.0.0.1:{server.port}/prefix/").send([OPENED, RESOLVED])
        (request,), ((opened, resolved),) = server.requests, server.bodies
    assert request.startswith(b"POST /prefix/api/v2/alerts HTTP/1.1\r\n")
    assert opened == {
        "labels": {
            "alertname": "GlassbusKillSwitchOpen",
            "severity": "high",
            "fingerprint": "f00d",
            "bus": "shop",
            "source": "glassbus",
        },
        "annotations": {"summary": "charge pauses itself", "seen": "3", "acknowledged_by": "mia"},
        "startsAt": "2023-11-14T22:13:20.000Z",
        "endsAt": "2023-11-14T22:19:00.000Z",
    }
    assert resolved["endsAt"] == "2023-11-14T22:15:00.000Z"
    assert resolved["annotations"]["resolved_because"] == "the breaker closed"
    assert resolved["labels"] == opened["labels"]


def test_hundreds_of_alerts_go_in_pieces() -> None:
    with peer(answers(FINE)) as server:
        Alertmanager(f"http://127.0.0.1:{server.port}").send([OPENED] * 450)
        assert [len(body) for body in server.bodies] == [200, 200, 50]


def test_a_webhook_is_sent_one_object_with_its_headers() -> None:
    with peer(answers(b"HTTP/1.1 204 No Content\r\n\r\n")) as server:
        hook = Webhook(f"http://127.0.0.1:{server.port}/hook?token=t0p", headers={"X-Team": "payments"})
        hook.send([OPENED])
        (request,), (body,) = server.requests, server.bodies
    assert request.startswith(b"POST /hook?token=t0p HTTP/1.1\r\n")
    assert b"X-Team: payments\r\n" in request
    assert (body["event"], body["bus"], body["notification"], body["version"]) == ("opened", "shop", 1, 1)
    assert body["escalation"]["state"] == "acknowledged"


def test_credentials_of_a_url_are_sent_and_never_shown() -> None:
    with peer(answers(b"HTTP/1.1 401 Unauthorized\r\n\r\nBasic bWlhOnB3")) as server:
        hook = Webhook(f"http://mia:p%77@127.0.0.1:{server.port}/T0KEN", headers={"Authorisation": "s3cret"})
        with pytest.raises(NotDelivered) as raised:
            hook.send([OPENED])
        assert b"Authorization: Basic " + base64.b64encode(b"mia:pw") in server.requests[0]
    shown = f"{hook!r} {hook} {[hook]} {raised.value!r} {Target(hook.url)!r} {list(hook.__rich_repr__())}"
    assert raised.value.__cause__ is None
    for secret in ("mia", "pw", "p%77", "T0KEN", "s3cret", "bWlh"):
        assert secret not in shown
    assert f"http://127.0.0.1:{server.port} answered 401" in shown


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/",
        "file:///etc/passwd",
        "http://",
        "host:9093",
        "",
        7,
        None,
        "http://host/a b",
        "http://host/\r\nX: 1",
        "http://host:port/",
        "http://[::1/",
        "http://hööst/",
        "http://host/#secret",
    ],
)
def test_a_url_that_cannot_work_is_refused_without_being_shown(url: Any) -> None:
    with pytest.raises(ConfigurationError) as raised:
        Webhook(url)
    assert "secret" not in str(raised.value)
    assert "passwd" not in str(raised.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "Bad Name"},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"timeout": True},
        {"at_least": "high"},
        {"headers": {"X: evil": "1"}},
        {"headers": {"X": "1\r\nY: 2"}},
        {"headers": ["X"]},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Webhook("http://host/", **wrong)


# Servers that are no friends


def drip(client: socket.socket, _: bytes) -> None:
    """Would be done in a few days."""
    client.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        client.sendall(b"X")
        time.sleep(0.02)


def hang(client: socket.socket, _: bytes) -> None:
    while client.recv(1):
        raise AssertionError("the client sent more")


def endless_headers(client: socket.socket, _: bytes) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        client.sendall(b"X-More: yes\r\n" * 1000)


def continues_for_ever(client: socket.socket, _: bytes) -> None:
    while True:
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("behave", "why"),
    [
        (
            answers(b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/latest/\r\n\r\n"),
            "redirects are not followed",
        ),
        (answers(b"HTTP/1.1 500 Oops\r\n\r\n<secret>"), "answered 500"),
        (answers(b"HTTP/1.1 503 \xff\xfe\r\n\r\n"), "answered 503"),
        (answers(b"SSH-2.0-OpenSSH\r\n"), "did not answer in HTTP"),
        (answers(b"\x00" * 100_000), "did not answer in HTTP"),
        (answers(b""), "did not answer in HTTP|RemoteDisconnected|Reset"),
        (endless_headers, "did not answer in HTTP"),
        (hang, "did not answer in time"),
        (drip, "did not answer in time"),
        (continues_for_ever, "did not answer in time"),
    ],
    ids=["redirect", "error", "bytes", "ssh", "zeros", "nothing", "headers", "hang", "drip", "continue"],
)
def test_a_server_that_does_not_take_it_is_a_failure_and_no_more(behave: Behave, why: str) -> None:
    with peer(behave) as server, pytest.raises(NotDelivered, match=why) as raised:
        post(Target(f"http://127.0.0.1:{server.port}/"), b"{}", timeout_s=0.3)
    assert "secret" not in str(raised.value)
    assert len(server.requests) == 1  # nothing was followed, and nothing sent twice


def test_a_body_without_end_is_not_read() -> None:
    def endless(client: socket.socket, _: bytes) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            client.sendall(b"x" * 65536)

    with peer(endless) as server:
        post(Target(f"http://127.0.0.1:{server.port}/"), b"{}", timeout_s=5.0)


def test_nobody_there_and_a_host_without_a_name_are_failures() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(NotDelivered, match="ConnectionRefused"):
        post(Target(f"http://127.0.0.1:{port}/"), b"{}", timeout_s=1.0)
    with pytest.raises(NotDelivered, match="cannot be resolved"):
        post(Target("http://no-such-host.invalid/"), b"{}", timeout_s=1.0)


def test_https_that_is_none_or_drips_its_handshake_is_a_failure_in_bounded_time() -> None:
    # It reads a TLS greeting as if it were HTTP, and waits for its end.
    with peer(answers(b"")) as server, pytest.raises(NotDelivered):
        post(Target(f"https://127.0.0.1:{server.port}/"), b"{}", timeout_s=0.3)
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def dripping() -> None:
        client, _ = listener.accept()
        with client, contextlib.suppress(OSError):  # the client has gone
            client.sendall(b"\x16\x03\x03\x3f\xff")  # a record of 16 KiB is to come
            while not ended.wait(0.02):
                client.sendall(b"\x02")

    thread = threading.Thread(target=dripping)
    thread.start()
    try:
        with pytest.raises(NotDelivered):
            post(Target(f"https://127.0.0.1:{listener.getsockname()[1]}/"), b"{}", timeout_s=0.2)
    finally:
        ended.set()
        thread.join(10)
        listener.close()


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with peer(answers(FINE)) as server, peer(answers(FINE)) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        post(Target(f"http://127.0.0.1:{server.port}/"), b"{}", timeout_s=2.0)
        assert (len(server.requests), proxy.requests) == (1, [])


def test_the_whole_of_a_request_is_bounded_not_only_its_steps() -> None:
    assert posting.TOTAL * Alertmanager("http://host").timeout <= 10


# The log


def test_a_log_line_tells_it_on_one_line_at_a_level_that_fits(caplog: pytest.LogCaptureFixture) -> None:
    worst = msgspec.structs.replace(ESCALATED, severity=ErrorSeverity.CRITICAL, summary="two\nlines \x1b[31m")
    with caplog.at_level(logging.INFO, "glassbus.escalation"):
        Log().send([OPENED, msgspec.structs.replace(OPENED, escalation=worst), RESOLVED])
    assert [record.levelname for record in caplog.records] == ["ERROR", "CRITICAL", "WARNING"]
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert "(the breaker closed)" in caplog.records[2].getMessage()


def test_times_beyond_any_calendar_are_told_all_the_same() -> None:
    far = msgspec.structs.replace(ESCALATED, opened_at=-1e18, seen_at=1e18)
    with peer(answers(FINE)) as server:
        Alertmanager(f"http://127.0.0.1:{server.port}").send([msgspec.structs.replace(OPENED, escalation=far)])
        assert server.bodies[0][0]["startsAt"] == "1970-01-01T00:00:00.000Z"
