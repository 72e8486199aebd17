"""`glassbus health` and `glassbus audit`: what can be known of a store from outside."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from pathlib import Path

import apsw
import pytest
from cli_kit import Command, failing, make_store, url_of

from glassbus import Message, MessageBus, Outgoing
from glassbus.cli.store import judge
from glassbus.policy.ledger import Account, Ledger
from glassbus.transport import Hold, QueueState, SubscriptionSpec


def test_an_audit_prints_the_equation_of_each_subscription(glassbus: Command, tmp_path: Path) -> None:
    url = make_store(tmp_path / "a.db", [*failing("one", "two"), Outgoing("orders.paid", {"n": 1})])
    assert glassbus("audit", "--url", url) == 0
    equation = "accepted 3 = pending 0 + in flight 0 + handled 1 + dead-lettered 2 + expired 0 + discarded 0  balanced"
    assert glassbus.out.splitlines() == [
        "charge",
        f"  {equation}",
        "total",
        f"  {equation}",
        "ok: 2 stored messages recounted; every delivery is in exactly one place",
        "recounted: pending, in flight, dead-lettered; counters: accepted, handled, expired, discarded",
    ]
    assert glassbus("audit", "--url", url, "--json") == 0
    told = json.loads(glassbus.out)
    assert told["ok"] is True
    assert (told["total"], told["recounted"]) == (told["subscriptions"]["charge"], told["total"])
    assert told["total"]["dead_lettered"] == 2


def test_a_message_that_vanished_is_found(glassbus: Command, tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    url = make_store(path, failing("one", "two"))
    with closing(apsw.Connection(str(path))) as connection:
        connection.execute("DELETE FROM deliveries WHERE id = (SELECT min(id) FROM deliveries)")
    assert glassbus("audit", "--url", url) == 1
    assert "NOT OK" in glassbus.out
    assert "problem: " in glassbus.out
    assert glassbus("audit", "--url", url, "--json") == 1
    assert json.loads(glassbus.out)["ok"] is False


def test_forgotten_subscriptions_have_an_account(glassbus: Command, tmp_path: Path) -> None:
    url = make_store(tmp_path / "a.db", failing("one"))

    async def forget() -> None:
        async with MessageBus(url, telemetry=False) as bus:
            await bus.forget("charge")

    asyncio.run(forget())
    assert glassbus("audit", "--url", url) == 0
    assert "(forgotten subscriptions)" in glassbus.out


def test_a_store_at_rest_is_ok(glassbus: Command, tmp_path: Path) -> None:
    url = make_store(tmp_path / "a.db", failing("one"))
    assert glassbus("health", "--url", url) == 0
    assert glassbus.out.startswith("store: ok; ")
    assert "charge" in glassbus.out
    assert glassbus("health", "--url", url, "--json") == 0
    told = json.loads(glassbus.out)
    assert told["store"] == "ok"
    assert told["subscriptions"]["charge"]["dead_lettered"] == 1
    assert told["subscriptions"]["charge"]["consumers"] == 0


def test_messages_that_nobody_consumes_and_holds_are_told(glassbus: Command, tmp_path: Path) -> None:
    url = make_store(tmp_path / "a.db")
    source = tmp_path / "in"
    source.write_text("1\n2\n")
    assert glassbus("publish", "--url", url, "--topic", "orders.created", source) == 0
    assert glassbus("health", "--url", url) == 0
    assert glassbus.out.startswith("store: degraded; ")
    assert "nobody consumes charge: 2 messages waiting" in glassbus.out

    async def pause() -> None:
        async with MessageBus(url, telemetry=False) as bus:
            await bus.pause("charge")

    asyncio.run(pause())
    assert glassbus("health", "--url", url) == 0
    assert "charge is paused and keeps 2 messages" in glassbus.out


def test_a_bus_that_runs_elsewhere_is_seen(glassbus: Command, tmp_path: Path) -> None:
    """Health opens a store that another bus works on, and sees its consumer."""
    from glassbus.cli.store import _health

    async def look() -> dict[str, QueueState]:
        bus = MessageBus(url_of(tmp_path / "a.db"), telemetry=False)

        @bus.subscribe("orders.*", name="charge")
        async def charge(message: Message) -> None:
            """Nothing to do."""

        async with bus:
            *_, queues, _ = await _health(url_of(tmp_path / "a.db"))
        return queues

    assert asyncio.run(look())["charge"].consumers == 1


@pytest.mark.parametrize(
    ("account", "hold", "consumers", "status"),
    [
        (Account(accepted=1, handled=1), Hold(), 0, "ok"),
        (Account(accepted=1, ready=1), Hold(), 1, "ok"),
        (Account(accepted=1, ready=1), Hold(), 0, "degraded"),
        (Account(), Hold(forced="forced_open"), 1, "degraded"),
        (Account(), Hold(forced="disabled"), 1, "ok"),
        (Account(accepted=2, handled=1), Hold(paused=True), 1, "critical"),
    ],
)
def test_the_status_follows_from_what_is_seen(account: Account, hold: Hold, consumers: int, status: str) -> None:
    queue = QueueState(SubscriptionSpec("charge", "orders.*", 10), hold, consumers)
    told, reasons = judge(Ledger({"charge": account}), {"charge": queue})
    assert told == status
    assert bool(reasons) == (status != "ok")
