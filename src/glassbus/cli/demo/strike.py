"""`glassbus demo --fault NAME`: a scenario of `glassbus.faults` played on the demo, and whether it went as it must."""

from __future__ import annotations

import asyncio
import time

from glassbus.bus import MessageBus
from glassbus.cli.common import count, duration
from glassbus.cli.demo.watch import Watch
from glassbus.faults.drill import Drill, Drilled
from glassbus.faults.scenarios import Scenario

#: Whom a scenario befalls: the subscription of the demo's service that shows it best.
HANDLERS = {
    "connection_error": "charge",
    "message_processing_error": "warehouse",
    "queue_overflow": "charge",
    "timeout_error": "receipt",
    "authentication_error": "charge",
    "resource_exhaustion": "warehouse",
    "configuration_error": "warehouse",
    "lost_answers": "warehouse",
    "crash": "charge",
}
_FIRST_S = 5.0
_HOLD_S = 10.0
_WITHIN_S = 30.0
_SHORT_S = 25.0


class Strike:
    """One scenario on its way to, upon, or taken from the demo's bus."""

    def __init__(self, scenario: Scenario, bus: MessageBus, watch: Watch, seconds: float | None, *, seed: int) -> None:
        self.scenario = scenario
        self.handler = HANDLERS.get(scenario.name, "*")
        self.result: Drilled | None = None
        self._watch = watch
        self._first_s, hold_s = (_FIRST_S, _HOLD_S) if seconds is None or seconds > _SHORT_S else _within(seconds)
        self._drill = Drill(
            bus,
            scenario,
            handler=self.handler,
            hold_s=hold_s,
            within_s=_WITHIN_S,
            seed=seed,
            allow_crash=scenario.crash,
        )

    @property
    def in_place(self) -> bool:
        return self._drill.injection.active

    async def run(self) -> None:
        await asyncio.sleep(self._first_s)
        if self.scenario.crash:
            self._watch.tell(time.time(), "bad", "this process kills itself now: run it again with the same --url")
        self.result = await self._drill.run()

    def end(self) -> None:
        """Heal, if it is in place: intake ends."""
        self._drill.end()

    def told(self) -> list[tuple[str, str]]:
        """What the closing account says of it: (text, mood)."""
        name, where = self.scenario.name, self._drill.injection.target
        result = self.result
        if result is None:
            return [(f"{name} had not come to its end", "warn")]
        lines = [
            (f"{name}: {self._drill.injection.fault} at {where}, for {duration(result.held_s)}", ""),
            (f"it struck {count(result.hits, 'time')}; {self.scenario.summary}", ""),
        ]
        if result.missing:
            lines.append((f"✗ not stated: {', '.join(result.missing)}", "bad"))
        elif not result.hits and self.scenario.while_struck:
            lines.append(("✗ nothing came its way", "bad"))
        else:
            after = f"{duration(result.healed_after_s)} after it healed" if self.scenario.once_healed else "in time"
            lines.append((f"✓ everything that must be stated was, {after}", "good"))
        return lines


def _within(seconds: float) -> tuple[float, float]:
    """When to strike and for how long, in a short run."""
    return 0.2 * seconds, 0.4 * seconds
