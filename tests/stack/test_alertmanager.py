"""Escalations on a real Alertmanager: what opens fires there, is told again after its restart, and is resolved."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from glassbus import Alertmanager, Escalation, Message, MessageBus, Retry
from glassbus.recovery import channels
from tests.server_kit import Server, fetch, free_port, need

SOON_S = 60.0


class Receiver:
    """What Alertmanager notifies: keeps every alert that it was sent, with its status."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str]]] = []
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.extend((alert["status"], alert["labels"]) for alert in body["alerts"])
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self._http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()

    def statuses(self) -> list[str]:
        return [status for status, _ in self.seen]

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    one = Receiver()
    yield one
    one.close()


class Live:
    """An Alertmanager that notifies at once. `restart` makes it forget everything."""

    def __init__(self, place: Path, receiver: Receiver) -> None:
        self._place = place
        self._address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{self._address}"
        self._config = place / "alertmanager.yml"
        self._config.write_text(
            "route: {receiver: people, group_by: [fingerprint], group_wait: 0s, group_interval: 1s,"
            " repeat_interval: 1h}\n"
            f"receivers: [{{name: people, webhook_configs: [{{url: '{receiver.url}', send_resolved: true}}]}}]\n"
        )
        self._starts = 0
        self._server: Server | None = None

    def start(self) -> None:
        self._starts += 1
        data = self._place / f"data-{self._starts}"
        self._server = Server(
            [
                need("alertmanager"),
                f"--config.file={self._config}",
                f"--storage.path={data}",
                f"--web.listen-address={self._address}",
                "--cluster.listen-address=",
            ],
            f"{self.url}/-/ready",
            self._place,
        ).start()

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def alerts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(fetch(f"{self.url}/api/v2/alerts"))
        return found


@pytest.fixture
def live(tmp_path: Path, receiver: Receiver) -> Iterator[Live]:
    one = Live(tmp_path, receiver)
    one.start()
    yield one
    one.stop()


async def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def test_what_opens_fires_survives_a_restart_and_resolves(
    live: Live, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "REFRESH_S", 1.0)

    async def scenario() -> None:
        bus = MessageBus(
            f"sqlite:///{tmp_path}/orders.db",
            name="shop",
            telemetry=False,
            escalation=Escalation(channels=(Alertmanager(live.url),)),
        )

        @bus.subscribe("orders.*", name="charge", retry=Retry(max_attempts=1))
        async def charge(_: Message[Any]) -> None:
            raise ValueError("the card is of plastic")

        async with bus:
            await bus.publish("orders.created", {"order": 17})
            await until(lambda: receiver.statuses() == ["firing"])
            (open_,) = bus.escalations.open()
            (alert,) = live.alerts()
            assert alert["labels"] == {
                "alertname": "GlassbusMessageDeadLettered",
                "severity": "medium",
                "fingerprint": open_.fingerprint,
                "bus": "shop",
                "source": "glassbus",
            }
            assert "ValueError: the card is of plastic" in alert["annotations"]["summary"]
            bus.escalations.acknowledge(open_.fingerprint, by="mia")
            await until(lambda: live.alerts()[0]["annotations"].get("acknowledged_by") == "mia")

            # Gone with everything it knew, and back: it is told again, and nobody had to do anything.
            live.stop()
            await until(lambda: any(lane.failing for lane in bus.escalations.channels()))
            live.start()
            await until(lambda: len(live.alerts()) == 1)

            bus.escalations.resolve(open_.fingerprint, reason="a new card")
            await until(lambda: receiver.statuses()[-1] == "resolved")
            assert live.alerts() == []

    asyncio.run(scenario())
    assert {labels["source"] for _, labels in receiver.seen} == {"glassbus"}


def test_what_a_dead_bus_opened_goes_on_firing_when_it_is_started_again(
    live: Live, receiver: Receiver, tmp_path: Path
) -> None:
    def bus() -> MessageBus:
        return MessageBus(
            f"sqlite:///{tmp_path}/orders.db",
            telemetry=False,
            escalation=Escalation(channels=(Alertmanager(live.url),)),
        )

    async def first() -> None:
        one = bus()

        @one.subscribe("orders.*", name="charge", retry=Retry(max_attempts=1))
        async def charge(_: Message[Any]) -> None:
            raise MemoryError

        async with one:
            await one.publish("orders.created", 1)
            await until(lambda: len(live.alerts()) == 1)

    async def second() -> None:
        async with bus() as one:
            await until(lambda: len(live.alerts()) == 1)
            one.escalations.resolve(one.escalations.open()[0].fingerprint, reason="more memory")
            await until(lambda: receiver.statuses()[-1] == "resolved")

    asyncio.run(first())
    live.stop()
    live.start()
    assert live.alerts() == []
    asyncio.run(second())
    assert live.alerts() == []
