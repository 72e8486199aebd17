"""What a drill plays on: a real bus with traffic, in a process that is scraped, and the fault that befalls it.

Several scenes run on one loop, each on a bus of its own that bears the scene's name, so that the label `bus` tells
their alerts apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from glassbus.bus import MessageBus
from glassbus.errors import PublishError
from glassbus.faults.injection import Injection, inject
from glassbus.faults.kinds import Fault
from glassbus.message import Message

#: What a scene's traffic is published to, and the name of its subscription.
TOPIC, SUBSCRIPTION = "orders.created", "charge"
_STOP_S = 2.0


def given(**options: Any) -> Mapping[str, Any]:
    """Options, as a class may have them."""
    return MappingProxyType(options)


class Scene:
    """A bus with one subscription and steady traffic; the base of every scene. Belongs to the loop that starts it.

    `place` is a folder of its own. `strike` makes the fault and `heal` takes it away; by default the fault is
    `fault` at `target`, injected with `options`. Durations are seconds.
    """

    #: Messages a second; 0 for none but those that a scene publishes itself.
    rate = 5.0
    fault: Fault | None = None
    target = f"handler:{SUBSCRIPTION}"
    options: Mapping[str, Any] = given()
    #: Of `MessageBus` and of `subscribe`.
    bus_options: Mapping[str, Any] = given()
    subscription: Mapping[str, Any] = given()
    durable = False

    def __init__(self, name: str, place: Path) -> None:
        self.name = name
        self.place = place
        self.injection: Injection | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.bus = self.make_bus()

    # What a subclass may replace

    def make_bus(self) -> MessageBus:
        return MessageBus(self.url, name=self.name, **self.bus_options)

    async def handle(self, message: Message[Any]) -> None:
        """Handles every message, at once."""

    async def publish(self) -> None:
        """One message of the traffic. May raise PublishError."""
        await self.bus.publish(TOPIC, {"order_id": 17})

    async def strike(self) -> None:
        assert self.fault is not None
        self.injection = inject(self.bus, self.fault, self.target, **self.options).begin()

    async def heal(self) -> None:
        if self.injection is not None:
            self.injection.heal()

    # For subclasses

    @property
    def url(self) -> str:
        return f"sqlite:///{self.place / 'store.db'}" if self.durable else "memory://"

    def subscribe(self, bus: MessageBus) -> None:
        bus.subscribe("orders.*", name=SUBSCRIPTION, **self.subscription)(self.handle)

    def keep_doing(self, what: Callable[[], Awaitable[object]], every_s: float) -> asyncio.Task[None]:
        """Do `what` again and again until the task is cancelled. What is refused is refused."""

        async def repeat() -> None:
            while True:
                # The bus tells of it, which is what some of the drills are about.
                with contextlib.suppress(PublishError):
                    await what()
                await asyncio.sleep(every_s)

        task = asyncio.create_task(repeat())
        self._tasks.add(task)
        return task

    async def publish_many(self, count: int) -> None:
        """Messages at once. Raises PublishError."""
        await self.bus.publish_many([(TOPIC, {"order_id": n}) for n in range(count)])

    # For the site

    async def start(self) -> None:
        self.subscribe(self.bus)
        await self.bus.start()
        if self.rate:
            self.keep_doing(self.publish, 1 / self.rate)

    async def stop(self) -> None:
        """Used where the process goes on without it."""
        for task in self._tasks:
            task.cancel()
        await self.bus.stop(_STOP_S)
        shutil.rmtree(self.place, ignore_errors=True)
