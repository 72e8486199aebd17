"""Queues that fill up, messages that wait too long, dead letters that nobody looks at."""

from __future__ import annotations

import contextlib

from glassbus.bus import MessageBus
from glassbus.config import Overflow
from glassbus.drill.scenes.base import SUBSCRIPTION, Scene, given
from glassbus.drill.scenes.handlers import NEVER, ONCE
from glassbus.errors import QueueFull
from glassbus.faults.clock import JumpingClock
from glassbus.faults.injection import inject
from glassbus.faults.kinds import ClockJump, Raise, Refuse
from glassbus.faults.schedule import Every

_HOUR_S = 3600.0


class Stale(Scene):
    """A paused subscription's messages wait; the clock goes ahead, so that nobody has to wait with them.

    Healed, they are handled; the clock stays ahead, as time does.
    """

    ahead_s = 600.0

    def make_bus(self) -> MessageBus:
        return MessageBus(name=self.name, clock=JumpingClock())

    async def strike(self) -> None:
        await self.bus.pause(SUBSCRIPTION)
        await self.publish_many(3)
        inject(self.bus, ClockJump(self.ahead_s), "clock").begin()

    async def heal(self) -> None:
        await self.bus.resume(SUBSCRIPTION)


class VeryStale(Stale):
    ahead_s = _HOUR_S


class OldDeadLetters(Stale):
    """A message ends as a dead letter, and nobody looks at it while the clock goes on; healed, it is discarded."""

    rate = 2.0
    ahead_s = 5 * _HOUR_S
    subscription = given(retry=ONCE, kill_switch=NEVER)

    async def strike(self) -> None:
        with inject(self.bus, Raise(ValueError, "this order cannot be read (injected)"), self.target, limit=1) as fault:
            while not fault.hits:
                await self.publish()
                await self.bus.drain()
        inject(self.bus, ClockJump(self.ahead_s), "clock").begin()

    async def heal(self) -> None:
        for one in await self.bus.dead_letters.list():
            await self.bus.dead_letters.discard(one.id)


class VeryOldDeadLetters(OldDeadLetters):
    ahead_s = 30 * _HOUR_S


class NearlyFull(Scene):
    """A paused subscription's queue fills up to the mark; healed, it goes on."""

    rate = 0.0
    filled = 85
    bus_options = given(capacity=100)

    async def strike(self) -> None:
        await self.bus.pause(SUBSCRIPTION)
        await self.publish_many(self.filled)

    async def heal(self) -> None:
        await self.bus.resume(SUBSCRIPTION)


class AlmostFull(NearlyFull):
    filled = 97


class FillingUp(NearlyFull):
    """A paused subscription's queue holds a quarter of what it may, and gets more with every second."""

    rate = 10.0
    filled = 500
    bus_options = given(capacity=2000)


class Overflowing(NearlyFull):
    """A paused subscription's queue is full, and what is published is refused."""

    rate = 5.0
    bus_options = given(capacity=10, publish_timeout=0.01)
    subscription = given(overflow=Overflow(expand=1.0))

    async def strike(self) -> None:
        await self.bus.pause(SUBSCRIPTION)
        with contextlib.suppress(QueueFull):  # as it must
            while True:
                await self.publish()


class SomeRefused(Scene):
    """The store refuses one publish in forty."""

    rate = 20.0
    fault = Refuse()
    target = "transport:publish"
    options = given(schedule=Every(40))


class Refusing(SomeRefused):
    """The store refuses every publish."""

    options = given()
