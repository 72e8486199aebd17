"""Stores and brokers that are lost, silent, full, or no longer add up; configurations and channels that fail."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import apsw

from glassbus.bus import MessageBus
from glassbus.drill.scenes.base import SUBSCRIPTION, Scene
from glassbus.drill.scenes.handlers import Critical
from glassbus.drill.servers import Server, find_server, free_port
from glassbus.errors import ErrorSeverity
from glassbus.faults.injection import inject
from glassbus.faults.kinds import DiskFull, Hang, Refuse
from glassbus.faults.taps import tap
from glassbus.recovery.channels import Notice
from glassbus.recovery.escalation import Escalation


class Down(Scene):
    """The store takes and gives nothing."""

    durable = True
    fault = Refuse()
    target = "transport:*"


class Flickering(Down):
    """The store is lost and found again, every second or so."""

    async def strike(self) -> None:
        self._flaps = self.keep_doing(self._flap, 0.8)

    async def _flap(self) -> None:
        await super().strike()
        await asyncio.sleep(0.8)
        await super().heal()

    async def heal(self) -> None:
        self._flaps.cancel()
        await asyncio.wait({self._flaps})
        await super().heal()


class Silent(Scene):
    """The store answers nothing and refuses nothing."""

    durable = True
    fault = Hang()
    target = "transport:*"
    rate = 2.0


class DiskFilling(Scene):
    """Half of a GiB is free where the store is: the measure is faked, no disk is filled."""

    durable = True
    free_bytes = 512 * 1024 * 1024

    async def strike(self) -> None:
        transport: Any = self.bus._transport
        self._undo: Callable[[], None] = tap(transport, "disk_free_bytes", lambda _: lambda: self.free_bytes)

    async def heal(self) -> None:
        self._undo()


class DiskIsFull(Scene):
    """No space is free where the store is: the store's own reserve refuses publishes. No disk is filled."""

    durable = True
    fault = DiskFull()
    target = "disk"


class Unbalanced(Scene):
    """A row of the store is lost behind the bus's back: a delivery that was accepted is nowhere.

    Healed, the row is put back.
    """

    durable = True

    async def strike(self) -> None:
        self._count(+1)

    async def heal(self) -> None:
        self._count(-1)
        await self.bus.stop(1.0)
        self.bus = self.make_bus()
        self.subscribe(self.bus)
        await self.bus.start()

    def _count(self, change: int) -> None:
        connection = apsw.Connection(str(self.place / "store.db"))
        connection.setbusytimeout(5000)
        with contextlib.closing(connection):
            connection.execute(
                "UPDATE subscriptions SET accepted = accepted + ? WHERE name = ?", (change, SUBSCRIPTION)
            )


_broker: list[Server] = []


def _broker_url(place: Path) -> str:
    """Of a JetStream server that all scenes of this process share. Blocks until it is ready. Raises ServerFailed."""
    if not _broker:
        store = place / "jetstream"
        store.mkdir()
        port, page = free_port(), free_port()
        command = [find_server("nats-server"), "-a", "127.0.0.1", "-p", str(port), "-m", str(page)]
        server = Server([*command, "-js", "-sd", str(store)], f"http://127.0.0.1:{page}/healthz", place)
        _broker.append(server.start())
    command = _broker[0].command
    return f"nats://127.0.0.1:{command[command.index('-p') + 1]}"


class OnBroker(Scene):
    """A bus on a real JetStream server, whose connection is lost and refused: publishes go to the spool."""

    fault = Refuse()
    target = "endpoint"

    def make_bus(self) -> MessageBus:
        return MessageBus(f"{_broker_url(self.place)}/{self.name}", name=self.name, state_dir=self.place / "state")


class SpoolFull(OnBroker):
    """And so many of them that the spool fills up."""

    async def strike(self) -> None:
        await super().strike()
        for _ in range(101):
            await self.publish_many(500)


class Pager:
    """A channel of escalations that takes everything."""

    name = "pager"
    at_least = ErrorSeverity.LOW
    batch = 10
    refresh_s = 0.0

    def send(self, notices: Sequence[Notice], /) -> None:
        """Told."""


class Untold(Critical):
    """The channel by which people are told refuses, while there is something to tell."""

    def make_bus(self) -> MessageBus:
        self.escalation = Escalation(channels=(Pager(),), quiet=2.0)
        return super().make_bus()

    async def strike(self) -> None:
        await super().strike()
        self._channel = inject(self.bus, Refuse(), "channel:pager").begin()

    async def heal(self) -> None:
        self._channel.heal()
        await super().heal()
