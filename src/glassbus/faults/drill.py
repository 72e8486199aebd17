"""A scenario played on a running bus, with what was stated checked against what must be."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from glassbus.bus import MessageBus
from glassbus.facts import Fact, FactType, LedgerUnbalanced
from glassbus.faults.injection import Injection
from glassbus.faults.scenarios import Scenario, Stated
from glassbus.observer import Observer

#: How often the facts that are waited for are looked at, in seconds.
_LOOK_S = 0.05


class Drilled(msgspec.Struct, frozen=True, kw_only=True):
    """How a drill went. `missing` was to be stated and was not; `healed_after_s`: from healing to the last of it."""

    scenario: str
    hits: int
    held_s: float
    healed_after_s: float
    missing: tuple[str, ...]
    balanced: bool

    @property
    def passed(self) -> bool:
        return not self.missing and self.balanced and self.hits > 0


class _Ears(Observer):
    """Hears what a scenario is about, and nothing else."""

    def __init__(self, wanted: tuple[Stated, ...]) -> None:
        self.interests: frozenset[FactType] = frozenset({one.kind for one in wanted} | {LedgerUnbalanced})
        self.missing = list(wanted)
        self.balanced = True

    def on_fact(self, fact: Fact, /) -> None:
        if isinstance(fact, LedgerUnbalanced):
            self.balanced = False
        self.missing = [one for one in self.missing if not one.fits(fact)]


class Drill:
    """One scenario on one bus, whose traffic is somebody else's business.

    The fault is in place for `hold_s` seconds, and what must follow its end has `within_s`.
    `handler` is the subscription that it befalls. For the bus's loop.
    """

    def __init__(
        self,
        bus: MessageBus,
        scenario: Scenario,
        *,
        handler: str = "*",
        hold_s: float = 10.0,
        within_s: float = 30.0,
        **changed: Any,
    ) -> None:
        self.scenario = scenario
        self.injection: Injection = scenario.on(bus, handler, **changed)
        self._bus = bus
        self._hold_s = hold_s
        self._within_s = within_s
        self._over = asyncio.Event()

    def end(self) -> None:
        """Heal now."""
        self._over.set()
        self.injection.heal()

    async def run(self) -> Drilled:
        """Play it. Raises ConfigurationError when the bus has no such target."""
        clock, bus, scenario = self._bus.clock, self._bus, self.scenario
        struck, healed = _Ears(scenario.while_struck), _Ears(scenario.once_healed)
        began = clock.monotonic()
        bus.hub.add(struck)
        try:
            async with self.injection:
                over = asyncio.ensure_future(self._over.wait())
                await asyncio.wait({over}, timeout=self._hold_s)
                over.cancel()
                bus.hub.add(healed)
            ended = clock.monotonic()
            # Facts may come from any thread, so they are looked for rather than waited for.
            while healed.missing and clock.monotonic() - ended < self._within_s:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_S)
        finally:
            bus.hub.remove(struck)
            bus.hub.remove(healed)
        return Drilled(
            scenario=scenario.name,
            hits=self.injection.hits,
            held_s=ended - began,
            healed_after_s=clock.monotonic() - ended,
            missing=tuple(str(one) for one in (*struck.missing, *healed.missing)),
            balanced=struck.balanced and healed.balanced and bus.ledger().balanced,
        )


async def drill(bus: MessageBus, scenario: Scenario, **options: Any) -> Drilled:
    """Play `scenario` on `bus`, with the options of `Drill`."""
    return await Drill(bus, scenario, **options).run()
