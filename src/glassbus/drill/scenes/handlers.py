"""Handlers that fail, hang, are slow, or are not there."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

from glassbus.bus import MessageBus
from glassbus.classification import Classification
from glassbus.config import KillSwitch
from glassbus.drill.scenes.base import SUBSCRIPTION, Scene, given
from glassbus.errors import ErrorCategory, ErrorSeverity
from glassbus.faults.kinds import Delay, Hang, Raise, Refuse
from glassbus.faults.schedule import Every
from glassbus.message import Message
from glassbus.policy.retry import Retry
from glassbus.policy.timeouts import AdaptiveTimeout
from glassbus.recovery.escalation import Escalation

ONCE = Retry(max_attempts=1)
SOON = Retry(max_attempts=3, immediate=0, base_delay=0.2, max_delay=0.5)
NEVER = KillSwitch(enabled=False)
_NO_STRETCH = AdaptiveTimeout(cap=1.0)
_UNREADABLE = Raise(ValueError, "this order cannot be read (injected)")


class Burning(Scene):
    """A handler fails for one message in `one_in`, which end as dead letters: they are not handled in time."""

    rate = 20.0
    one_in = 4
    fault = _UNREADABLE
    subscription = given(retry=ONCE, kill_switch=NEVER)

    async def strike(self) -> None:
        self.options = given(schedule=Every(self.one_in))
        await super().strike()


class BurningSlowly(Burning):
    one_in = 250


class BurningLeast(Burning):
    one_in = 500


class SomeDeadLetters(Scene):
    """Two messages of many end as dead letters."""

    rate = 50.0
    fault = _UNREADABLE
    options = given(limit=2)
    subscription = given(retry=ONCE, kill_switch=NEVER)


class Overdue(Scene):
    """One handler of four ignores its cancellation and hangs; healed, it returns."""

    fault = Hang(stubborn=True)
    options = given(limit=1)
    subscription = given(timeout=0.2, abandon_after=3600.0, concurrency=4, kill_switch=NEVER)


class AllOverdue(Overdue):
    """Every handler hangs so."""

    options = given()
    subscription = given(timeout=0.2, abandon_after=3600.0, concurrency=2, kill_switch=NEVER)


class Lost(Scene):
    """The one handler hangs until its slot is given up; healed, it returns, and its slot is there again."""

    rate = 2.0
    fault = Hang(stubborn=True)
    subscription = given(timeout=0.2, abandon_after=0.5, kill_switch=NEVER, adaptive_timeout=_NO_STRETCH)


class Slow(Scene):
    """Every handler takes 4.4 s of the 5 s that it has."""

    rate = 4.0
    fault = Delay(4.4)
    subscription = given(timeout=5.0, concurrency=50, adaptive_timeout=_NO_STRETCH)


class TimedOut(Scene):
    """Every second call of a handler never comes back, so that its timeout is stretched; healed, it shrinks again."""

    rate = 4.0
    fault = Hang()
    options = given(schedule=Every(2))
    subscription = given(timeout=0.2, concurrency=4, kill_switch=NEVER, retry=SOON)


class Refused(Scene):
    """What a handler depends on refuses every connection; without a kill switch each attempt is made, and fails."""

    fault = Refuse()
    subscription = given(kill_switch=NEVER, retry=SOON, concurrency=20)


class Held(Scene):
    """What a handler depends on refuses every connection: its kill switch opens, and each probe fails."""

    fault = Refuse()
    subscription = given(
        kill_switch=KillSwitch(minimum=5, open_for=1.0, probes=1),
        retry=Retry(max_attempts=100, immediate=0, base_delay=0.5, max_delay=1.0),
    )


class Flapping(Scene):
    """What a handler depends on comes and goes, and its kill switch opens each time."""

    fault = Refuse()
    rate = 20.0
    subscription = given(
        kill_switch=KillSwitch(window=1.0, minimum=3, open_for=0.3, probes=1),
        retry=Retry(max_attempts=100, immediate=0, base_delay=0.2, max_delay=0.5),
        concurrency=5,
    )

    async def strike(self) -> None:
        self._flaps = self.keep_doing(self._flap, 0.7)

    async def _flap(self) -> None:
        await super().strike()
        await asyncio.sleep(0.7)
        await super().heal()

    async def heal(self) -> None:
        self._flaps.cancel()
        await asyncio.wait({self._flaps})
        await super().heal()


class SlowlyClassified(Scene):
    """A classification rule of the program's own takes 30 ms for each error."""

    rate = 2.0
    fault = _UNREADABLE
    subscription = given(retry=ONCE, kill_switch=NEVER)

    def make_bus(self) -> MessageBus:
        def rule(_: BaseException) -> Classification | None:
            time.sleep(0.03)
            return None

        return MessageBus(name=self.name, rules=[rule])


class Critical(Scene):
    """A handler fails with what a rule of the program's own calls critical; without more of it that is soon over."""

    rate = 2.0
    severity = ErrorSeverity.CRITICAL
    escalation = Escalation(quiet=2.0)
    fault = _UNREADABLE
    subscription = given(retry=ONCE, kill_switch=NEVER)

    def make_bus(self) -> MessageBus:
        verdict = (ErrorCategory.MESSAGE_PROCESSING_ERROR, self.severity)
        return MessageBus(name=self.name, rules=[lambda _: verdict], escalation=self.escalation)


class High(Critical):
    severity = ErrorSeverity.HIGH


class Stalled(Scene):
    """The store gives out no message, though it answers everything else."""

    fault = Hang()
    target = "transport:claim"


class Unconsumed(Scene):
    """The one process that consumes a subscription ends, while another goes on publishing; healed, it runs again."""

    durable = True

    def subscribe(self, bus: MessageBus) -> None:
        """This bus only publishes."""

    async def start(self) -> None:
        self._consumer = await self._consume()
        await super().start()

    async def _consume(self) -> MessageBus:
        consumer = MessageBus(self.url, name=self.name, telemetry=False)
        super().subscribe(consumer)
        await consumer.start()
        return consumer

    async def strike(self) -> None:
        await self._consumer.stop(1.0)

    async def heal(self) -> None:
        self._consumer = await self._consume()


_VICTIM = """
import asyncio, os, signal, sys
from glassbus import Message, MessageBus
bus = MessageBus(sys.argv[1], name="victim", telemetry=False)
@bus.subscribe("orders.*", name=sys.argv[2])
async def die(message: Message) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
async def main() -> None:
    await bus.start()
    await asyncio.sleep(30)
asyncio.run(main())
"""


class OwnersDying(Scene):
    """A second process takes messages from the store and is killed in the middle of one, again and again."""

    durable = True

    async def handle(self, message: Message[Any]) -> None:
        await asyncio.sleep(0.5)  # busy enough to leave something to the other

    async def strike(self) -> None:
        self._deaths = self.keep_doing(self._die, 2.0)

    async def _die(self) -> None:
        victim = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _VICTIM, self.url, SUBSCRIPTION, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        await victim.wait()

    async def heal(self) -> None:
        self._deaths.cancel()


class Paused(Scene):
    """Somebody paused the subscription, and has it go on again."""

    async def strike(self) -> None:
        await self.bus.pause(SUBSCRIPTION)

    async def heal(self) -> None:
        await self.bus.resume(SUBSCRIPTION)


class TwoSubscriptions(Scene):
    """The program makes a second subscription; healed, it is forgotten."""

    async def strike(self) -> None:
        self.bus.subscribe("orders.*", name="second")(self.handle)

    async def heal(self) -> None:
        await self.bus.forget("second")
