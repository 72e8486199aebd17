"""What the demo answers beside its metrics, over real HTTP: runbooks, and notifications that become news."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from glassbus import MessageBus, shipped
from glassbus.cli.demo.desk import Desk
from glassbus.cli.demo.sayings import Mood
from glassbus.server import Server, serve

NOTIFICATION = {
    "receiver": "critical",
    "alerts": [
        {
            "status": "firing",
            "labels": {"alertname": "GlassbusDown"},
            "annotations": {"summary": "the bus is\x1b gone"},
        },
        {"status": "resolved", "labels": {"alertname": "GlassbusSlow"}, "annotations": {}},
    ],
}


@pytest.fixture
def told() -> list[tuple[Mood, str, str]]:
    return []


@pytest.fixture
def server(told: list[tuple[Mood, str, str]]) -> Iterator[Server]:
    with serve(
        MessageBus(telemetry=False), "127.0.0.1:0", desk=Desk(lambda mood, text, key: told.append((mood, text, key)))
    ) as one:
        yield one


def ask(server: Server, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_a_notification_becomes_news_and_the_dead_mans_switch_does_not(
    server: Server, told: list[tuple[Mood, str, str]]
) -> None:
    body = json.dumps(NOTIFICATION).encode()
    assert ask(server, "POST", "/notifications/deadman", body)[0] == 200
    assert told == []
    assert ask(server, "POST", "/notifications/critical", body)[0] == 200
    assert told == [
        ("bad", "Alertmanager tells critical: the bus is\\x1b gone", "critical GlassbusDown bad"),
        ("good", "Alertmanager tells critical: resolved: GlassbusSlow", "critical GlassbusSlow good"),
    ]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"{}", b'{"alerts": 1}', b'{"alerts": [{}]}', b'{"alerts": [1]}', b"\xff"),
        pytest.param(b"[" * 200_000, id="deep"),
        pytest.param(b'{"alerts":' * 50_000, id="deep alerts"),
        pytest.param(b'{"alerts": ' + b"9" * 5000 + b"}", id="long number"),
    ],
)
def test_what_is_no_notification_is_refused(server: Server, told: list[tuple[Mood, str, str]], body: bytes) -> None:
    assert ask(server, "POST", "/notifications/critical", body)[0] == 400
    assert told == []


def test_a_runbook_is_a_page_and_no_other_file_is(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "alerts" / "runbooks").mkdir(parents=True)
    (tmp_path / "alerts" / "runbooks" / "GlassbusDown.md").write_text("# GlassbusDown")
    (tmp_path / "alerts" / "secret.md").write_text("secret")
    monkeypatch.setattr(shipped, "root", lambda: tmp_path)
    assert ask(server, "GET", "/runbooks/GlassbusDown") == (200, b"# GlassbusDown")
    assert ask(server, "GET", "/runbooks/GlassbusDown.md") == (200, b"# GlassbusDown")
    for path in ("/runbooks/", "/runbooks/GlassbusUp", "/runbooks/../secret", "/runbooks/..%2Fsecret"):
        assert ask(server, "GET", path)[0] == 404


@pytest.mark.parametrize(
    "name", [pytest.param("A" * 5000, id="5,000"), "A" * 100, "watchdog", "\u0661", "%00", "GlassbusDown%0a"]
)
def test_a_runbook_that_does_not_ship_is_404_and_logs_nothing(
    server: Server, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(server, "GET", "/runbooks/" + quote(name, safe="%"))[0] == 404
    assert not [record for record in caplog.records if record.exc_info]


def test_of_many_alerts_at_once_the_rest_is_one_line(server: Server, told: list[tuple[Mood, str, str]]) -> None:
    alerts = [{"status": "resolved", "labels": {"alertname": f"A{number}"}} for number in range(2000)]
    assert ask(server, "POST", "/notifications/critical", json.dumps({"alerts": alerts}).encode())[0] == 200
    assert [text for _, text, _ in told][-2:] == [
        "Alertmanager tells critical: resolved: A19",
        "Alertmanager tells critical: 1,980 more alerts",
    ]
    assert (len(told), told[-1][0]) == (21, "good")


def test_what_is_posted_is_bounded_and_goes_nowhere_else(server: Server) -> None:
    assert ask(server, "POST", "/metrics", b"1")[0] == 404
    assert ask(server, "POST", "/runbooks/GlassbusDown", b"1")[0] == 404
    assert ask(server, "GET", "/notifications/critical")[0] == 404
    assert ask(server, "POST", "/notifications/critical", b"1", Content_Length="99999999")[0] == 413
    assert ask(server, "POST", "/notifications/critical", b"1", Content_Length="-1")[0] == 413
    assert ask(server, "GET", "/metrics")[0] == 200


def test_a_page_that_raises_costs_nothing_but_itself() -> None:
    def broken(path: str, body: bytes | None) -> tuple[int, bytes] | None:
        raise KeyError(path)

    with serve(MessageBus(telemetry=False), "127.0.0.1:0", desk=broken) as one:
        assert ask(one, "GET", "/mine")[0] == 500
    with serve(MessageBus(telemetry=False), "127.0.0.1:0") as one:
        assert ask(one, "POST", "/metrics", b"1")[0] == 501
        assert ask(one, "GET", "/metrics")[0] == 200
