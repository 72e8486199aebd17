"""Plays: a fault is made, its alerts fire and people are told; it is healed, and they resolve and people are told."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from glassbus.drill.play import Play
from glassbus.drill.receiver import Notice
from glassbus.drill.rules import Rule
from glassbus.drill.servers import ServerFailed, find_server
from glassbus.drill.stack import Pace
from glassbus.drill.world import World
from glassbus.errors import GlassbusError

Verdict = Literal["waiting", "playing", "passed", "failed"]

#: Beyond what the rule itself takes, what each step may take on a machine that is busy with other things, in seconds.
PATIENCE_S = 45.0
#: What failed for want of scrapes is played again, at half the speed where that can be, so often at most in all.
_TRIES = 3
_SERVERS = ("prometheus", "alertmanager")


class Outcome(msgspec.Struct, kw_only=True):
    """How the drill of one rule goes. Times are real seconds, of this run: fired, reached (the first of `receivers`)
    after the fault was made; resolved, told (that it is resolved) after it was healed. None: it has not happened.
    `verdict` is passed when all of them have; else `why` says which did not. `factor`: by which durations were divided.
    """

    alert: str
    severity: str
    fault: str
    verdict: Verdict = "waiting"
    why: str = ""
    fired_s: float | None = None
    reached_s: float | None = None
    resolved_s: float | None = None
    told_s: float | None = None
    receivers: tuple[str, ...] = ()
    factor: float = 1.0


class Drills:
    """The plays that the chosen rules need, on one set of servers. `outcomes`, by the rules' ids, may be read any time.

    On a machine that is too busy to scrape as often as `pace` asks, durations are divided by less: at first when that
    is seen before anything is played, and once more for what failed while scrapes were lost.

    Raises ServerMissing when made, with what to install.
    """

    def __init__(
        self,
        chosen: Mapping[str, Rule],
        plays: Iterable[Play],
        *,
        groups: list[dict[str, Any]],
        routing: Mapping[str, Any],
        pace: Pace,
        place: Path,
    ) -> None:
        self._rules = dict(chosen)
        self._plays = [play for play in plays if any(alert in self._rules for alert in play.alerts)]
        for name in (*_SERVERS, *(need for play in self._plays for need in play.needs)):
            find_server(name)
        self._groups, self._routing = groups, routing
        self._pace = pace
        self._place = place
        self._changed: Callable[[], None] = lambda: None
        self.outcomes = {
            alert: Outcome(alert=alert, severity=self._rules[alert].severity, fault=play.fault)
            for play in self._plays
            for alert in play.alerts
            if alert in self._rules
        }

    async def run(self, changed: Callable[[], None] = lambda: None) -> list[Outcome]:
        """Play all of them. `changed` is called at each step.

        Raises ServerFailed when the servers do not start or end by themselves.
        """
        self._changed = changed
        # What blinds everything is played in a world of its own, and does not wait for the others.
        companies = [play for play in self._plays if not play.last], [play for play in self._plays if play.last]
        runs = [self._company(plays, f"{n}") for n, plays in enumerate(companies, 1) if plays]
        async with asyncio.TaskGroup() as group:
            for one in runs:
                group.create_task(one)
        return list(self.outcomes.values())

    async def _company(self, plays: list[Play], name: str) -> None:
        """Play these in one world, and what failed for want of scrapes again in another."""
        pace, tries = self._pace, 0
        for number in itertools.count(1):
            place = self._place / f"{name}.{number}"
            place.mkdir()
            async with World(plays, self._groups, self._routing, pace, place) as world:
                if pace.can_slow and not await world.keeps_up():
                    pace = pace.slower()
                    continue
                plays, tries = await self._round(world, plays), tries + 1
            if not plays or tries == _TRIES:
                return
            pace = pace.slower() if pace.can_slow else pace
            for play in plays:
                for one in self._mine(play):
                    blank = Outcome(alert=one, severity=self._rules[one].severity, fault=play.fault)
                    self.outcomes[one] = blank

    async def _round(self, world: World, plays: list[Play]) -> list[Play]:
        """Play these once; those of them that failed while scrapes were lost, and so have told nothing."""
        turn = asyncio.Lock()
        courses = {
            play.name: _Course(
                world, play, {one: self._rules[one] for one in self._mine(play)}, self.outcomes, self._changed, turn
            )
            for play in plays
        }
        await asyncio.gather(*(courses[play.name].run() for play in plays if not play.last))
        for play in plays:
            if play.last:
                await courses[play.name].run()
        return [play for play in plays if courses[play.name].blinded]

    def _mine(self, play: Play) -> list[str]:
        return [one for one in play.alerts if one in self._rules]


class _Course:
    """One play from rest to rest."""

    def __init__(
        self,
        world: World,
        play: Play,
        rules: Mapping[str, Rule],
        outcomes: Mapping[str, Outcome],
        changed: Callable[[], None],
        turn: asyncio.Lock,
    ) -> None:
        self._turn = turn
        self._world = world
        self._play = play
        self._rules = rules
        self._outcomes = outcomes
        self._changed = changed
        self._factor = world.pace.factor
        #: It failed while scrapes were lost.
        self.blinded = False

    async def run(self) -> None:
        for one in self._rules:
            self._set(one, verdict="playing", factor=self._factor)
        began = time.monotonic()
        try:
            await (self._always() if self._play.inverted else self._once())
        except (GlassbusError, OSError) as error:  # OSError: the servers do not answer
            for one in self._rules:
                self.fail(one, str(error))
        if any(self._outcomes[one].verdict == "failed" for one in self._rules):
            lost = await self._world.lost_scrapes(time.monotonic() - began)
            self.blinded = lost > 0
            for one in self._rules:
                if lost and self._outcomes[one].verdict == "failed":
                    self._set(one, why=f"{self._outcomes[one].why} ({lost} scrapes were lost meanwhile)")

    def fail(self, alert: str, why: str) -> None:
        if self._outcomes[alert].verdict != "failed":
            self._set(alert, verdict="failed", why=why)

    # An alert that fires when something is wrong

    async def _once(self) -> None:
        await asyncio.gather(*(self._rest(one) for one in self._rules))
        async with self._turn if self._play.heavy else contextlib.nullcontext():
            struck_at = time.monotonic()
            await self._do("strike")
        await asyncio.gather(*(self._fires(one, struck_at) for one in self._rules))
        healed_at = time.monotonic()
        await self._do("heal")
        await asyncio.gather(*(self._resolves(one, healed_at) for one in self._rules))
        if self._play.heavy:
            await self._do("stop")
        for one in self._rules:
            if self._outcomes[one].verdict == "playing":
                self._set(one, verdict="passed")

    async def _rest(self, alert: str) -> None:
        """Wait until what the fault befalls is seen, and the alert is at rest."""
        if self._play.scene is not None:
            seen = await self._world.until_seen(self._play, PATIENCE_S)
            if not seen:
                raise ServerFailed(f"Prometheus does not see {self._play.name} within {PATIENCE_S:g} s")
        rule = self._rules[alert]
        within_s = PATIENCE_S + rule.resolves_within_s / self._factor
        if not await self._world.until(lambda: not self._firing(alert), within_s):
            self.fail(alert, "it fires before there is any fault")

    async def _fires(self, alert: str, struck_at: float) -> None:
        if self._outcomes[alert].verdict == "failed":
            return
        rule = self._rules[alert]
        within_s = PATIENCE_S + rule.fires_within_s / self._factor
        if not await self._world.until(lambda: bool(self._firing(alert)), within_s):
            self.fail(alert, f"it did not fire within {within_s:.0f} s: {await self._why_quiet(rule)}")
            return
        self._set(alert, fired_s=time.monotonic() - struck_at)
        if not await self._world.until(lambda: bool(self._told(alert, "firing", struck_at)), PATIENCE_S):
            why = await self._world.why_untold(self._play, rule)
            self.fail(alert, f"it fired, and nobody was told within {PATIENCE_S:g} s: {why}")
            return
        notices = self._told(alert, "firing", struck_at)
        reached_s = notices[0].at - struck_at
        self._set(
            alert,
            fired_s=min(reached_s, self._outcomes[alert].fired_s or reached_s),  # seen at the next look only
            reached_s=reached_s,
            receivers=tuple(dict.fromkeys(notice.receiver for notice in notices)),
        )

    async def _resolves(self, alert: str, healed_at: float) -> None:
        if self._outcomes[alert].verdict == "failed":
            return
        rule = self._rules[alert]
        within_s = PATIENCE_S + rule.resolves_within_s / self._factor
        if not await self._world.until(lambda: not self._firing(alert), within_s):
            self.fail(alert, f"it still fires {within_s:.0f} s after the fault was healed")
            return
        self._set(alert, resolved_s=time.monotonic() - healed_at)
        if not await self._world.until(lambda: bool(self._told(alert, "resolved", healed_at)), PATIENCE_S):
            self.fail(alert, f"it resolved, and nobody was told within {PATIENCE_S:g} s")
            return
        told_s = self._told(alert, "resolved", healed_at)[0].at - healed_at
        self._set(alert, resolved_s=min(told_s, self._outcomes[alert].resolved_s or told_s), told_s=told_s)

    # An alert that fires always, and must be missed when it does not

    async def _always(self) -> None:
        began = time.monotonic()
        (alert,) = self._rules
        for count, step in ((1, "fired_s"), (3, "reached_s")):
            if not await self._world.until(lambda: len(self._told(alert, "firing", began)) >= count, PATIENCE_S):  # noqa: B023
                self.fail(alert, f"it came {len(self._told(alert, 'firing', began))} times in {PATIENCE_S:g} s")
                return
            self._set(alert, **{step: time.monotonic() - began})
        self._set(alert, receivers=tuple({one.receiver for one in self._told(alert, "firing", began)}))
        struck_at = time.monotonic()
        await self._do("strike")
        # Missed: nothing for several times as long as what usually lies between two of them.
        came = self._outcomes[alert]
        quiet_s = 2 * ((came.reached_s or 0.0) - (came.fired_s or 0.0)) + 1.0
        missed = await self._world.until(lambda: self._quiet_s(alert, struck_at) > quiet_s, PATIENCE_S + 2 * quiet_s)
        healed_at = time.monotonic()
        await self._do("heal")
        if not missed:
            self.fail(alert, "it goes on coming though nothing makes it")
            return
        self._set(alert, resolved_s=healed_at - struck_at)
        if not await self._world.until(lambda: bool(self._told(alert, "firing", healed_at)), PATIENCE_S):
            self.fail(alert, f"it did not come again within {PATIENCE_S:g} s")
            return
        self._set(alert, told_s=self._told(alert, "firing", healed_at)[0].at - healed_at, verdict="passed")

    def _quiet_s(self, alert: str, since: float) -> float:
        heard = [notice.at for notice in self._told(alert, "firing", since)]
        return time.monotonic() - max([since, *heard])

    # What all of them need

    async def _do(self, verb: Literal["strike", "heal", "stop"]) -> None:
        outside = self._world.outside.get(self._play.name)
        if outside is not None:
            if verb != "stop":
                await (outside.strike() if verb == "strike" else outside.heal())
        else:
            await self._world.site_of[self._play.name].order(verb, self._play.name)

    async def _why_quiet(self, rule: Rule) -> str:
        return await asyncio.to_thread(self._world.why_quiet, self._play, rule)

    def _firing(self, alert: str) -> bool:
        return bool(self._world.of_rule(self._play, self._rules[alert]))

    def _told(self, alert: str, status: str, since: float) -> list[Notice]:
        return self._world.told(self._play, self._rules[alert], status, since)

    def _set(self, alert: str, **values: Any) -> None:
        for name, value in values.items():
            setattr(self._outcomes[alert], name, value)
        self._changed()
