"""What drills are played in: the processes with buses, the servers that watch them, and what those say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from glassbus.drill.play import SHARED, Play
from glassbus.drill.receiver import Notice, Receiver
from glassbus.drill.rules import Rule
from glassbus.drill.servers import Server, ServerFailed, free_port
from glassbus.drill.site import READY
from glassbus.drill.stack import Active, Pace, Stack, Target

Shared = TypeVar("Shared")

#: How often Prometheus is asked which alerts there are, in seconds.
_LOOK_S = 0.15
#: Buses of one process: more of them, and a scrape takes too long on a busy machine.
_BUSES_MAX = 10
_START_S = 60.0
#: How long the servers are watched before anything is played, in seconds, and what share of the time between two
#: scrapes one may take.
_WATCH_S, _SPARE = 4.0, 0.6
_OBEY_S = 180.0
#: Prometheus not answering for so long is an error: one that stands still on purpose is not asked.
_DEAF_S = 30.0


class Site:
    """A process with buses, and the scenes that run in it. It ends when this process does. For one loop."""

    def __init__(self, name: str, place: Path, plays: Iterable[Play]) -> None:
        self.name = name
        self.port = free_port()
        self._log = place / f"site-{name}.log"
        self._place = place
        self._given = {
            play.name: f"{play.scene.__module__}:{play.scene.__qualname__}" for play in plays if play.scene is not None
        }
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._answers: dict[str, asyncio.Future[str]] = {}
        self._lives = 0

    @property
    def target(self) -> Target:
        return Target("glassbus", f"127.0.0.1:{self.port}", self.name)

    async def start(self) -> None:
        """Returns when its buses run. Raises ServerFailed."""
        self._lives += 1
        given = {"port": self.port, "place": str(self._place / f"{self.name}-{self._lives}"), "plays": self._given}
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "glassbus.drill.site", json.dumps(given)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self._place,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,  # Ctrl-C is for us, who end it
            )
        self._answers = {READY: asyncio.get_running_loop().create_future()}
        self._reading = asyncio.create_task(self._read(self._process))
        try:
            async with asyncio.timeout(_START_S):
                await self._answers[READY]
        except TimeoutError:
            raise ServerFailed(f"the process {self.name} did not start: {self.log_end()}") from None

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for raw in process.stdout:
            said, _, rest = raw.decode(errors="replace").strip().partition(" ")
            name, _, why = rest.partition(" ")
            waiting = self._answers.pop(READY if said == READY else name, None)
            if waiting is not None and not waiting.done():
                waiting.set_result("" if said in (READY, "ok") else why or "it did not say why")
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(ServerFailed(f"the process {self.name} ended by itself: {self.log_end()}"))

    async def order(self, verb: str, play: str) -> None:
        """Have a scene `strike` or `heal`. Raises ServerFailed with what it says when it cannot."""
        if self._process is None or self._process.returncode is not None:
            raise ServerFailed(f"the process {self.name} does not run: {self.log_end()}")
        assert self._process.stdin is not None
        answer = self._answers[play] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(f"{verb} {play}\n".encode())
        try:
            async with asyncio.timeout(_OBEY_S):
                why = await answer
        except TimeoutError:
            raise ServerFailed(f"{verb} of {play} did not end within {_OBEY_S:g} s") from None
        if why:
            raise ServerFailed(f"{verb} of {play}: {why}")

    async def kill(self) -> None:
        """SIGKILL. Idempotent."""
        process, self._process = self._process, None
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
            self._reading = None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                process.kill()
            await process.wait()

    def log_end(self) -> str:
        try:
            return self._log.read_bytes()[-1500:].decode(errors="replace").strip() or "(its log is empty)"
        except OSError as error:
            return f"(no log: {error})"


class World:
    """Everything that the chosen plays need, in `place`. An asynchronous context manager, for one loop.

    Raises ServerMissing when made, ServerFailed when entered.
    """

    def __init__(
        self, plays: Iterable[Play], groups: list[dict[str, Any]], routing: Mapping[str, Any], pace: Pace, place: Path
    ) -> None:
        self.plays = list(plays)
        self.pace = pace
        self.place = place
        self.routing = routing
        #: By the play that is played there.
        self.site_of: dict[str, Site] = {}
        self.sites = self._make_sites()
        self.targets = [site.target for site in self.sites]
        #: Further Alertmanagers that Prometheus tells.
        self.alertmanagers: list[str] = []
        self.servers: list[Server] = []
        self.receiver = Receiver()
        self.active: list[Active] = []
        #: Prometheus is not asked while this is set: it stands still on purpose.
        self.frozen = False
        self._shared: dict[str, Any] = {}
        self._undo = contextlib.ExitStack()
        self._undo.callback(self.receiver.close)
        try:
            self.outside = {play.name: play.outside(self, play) for play in self.plays if play.outside is not None}
            own = [{"record": "drill:own", "expr": play.own_rule} for play in self.plays if play.own_rule]
            self.stack = Stack(
                place,
                [*groups, *([{"name": "of-the-user", "rules": own}] if own else [])],
                pace,
                self.targets,
                self.receiver,
                routing=routing,
                alertmanagers=self.alertmanagers,
            )
        except BaseException:
            self._undo.close()
            raise
        self._looking: asyncio.Task[None] | None = None
        self._trouble: BaseException | None = None

    def _make_sites(self) -> list[Site]:
        on_buses = [play for play in self.plays if play.scene is not None]
        sharing = [play for play in on_buses if play.site == SHARED]
        lots = {
            f"{SHARED}-{n + 1}": sharing[n :: -(-len(sharing) // _BUSES_MAX)]
            for n in range(-(-len(sharing) // _BUSES_MAX))
        }
        for play in on_buses:
            if play.site != SHARED:
                lots.setdefault(play.site, []).append(play)
        sites = []
        for name, plays in lots.items():
            site = Site(name, self.place, plays)
            sites.append(site)
            self.site_of.update((play.name, site) for play in plays)
        return sites

    async def __aenter__(self) -> World:
        try:
            starts: list[Awaitable[object]] = [
                self.stack.start(),
                *(site.start() for site in self.sites),
                *(server.started() for server in self.servers),
            ]
            for done in await asyncio.gather(*starts, return_exceptions=True):
                if isinstance(done, BaseException):
                    raise done
            self._looking = asyncio.create_task(self._look())
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every process that was started. Idempotent."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})
        for site in self.sites:
            await site.kill()
        self.stack.close()
        for server in self.servers:
            server.kill()
        self._undo.close()

    def shared(self, name: str, make: Callable[[], Shared]) -> Shared:
        """What several plays use: made by the first of them."""
        if name not in self._shared:
            self._shared[name] = make()
        found: Shared = self._shared[name]
        return found

    def at_end(self, job: Callable[[], None]) -> None:
        """Have `job` done when the world ends."""
        self._undo.callback(job)

    # What is said

    async def _look(self) -> None:
        answered = time.monotonic()
        while True:
            if not self.frozen:
                try:
                    self.active = await asyncio.to_thread(self.stack.active)
                    answered = time.monotonic()
                except (OSError, LookupError, TypeError) as error:  # no answer, or none that can be read
                    if time.monotonic() - answered > _DEAF_S:
                        self._trouble = ServerFailed(f"Prometheus does not answer: {error!r}")
            else:
                answered = time.monotonic()
            await asyncio.sleep(_LOOK_S)

    async def until(self, holds: Callable[[], bool], within_s: float) -> bool:
        """Wait until `holds`; whether it did within so many seconds. Raises ServerFailed."""
        end = time.monotonic() + within_s
        while not holds():
            if self._trouble is not None:
                raise self._trouble
            if time.monotonic() > end:
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    async def keeps_up(self) -> bool:
        """Whether scrapes are made, and made in time with some to spare. Takes a few seconds."""
        interval_s = self.pace.scrape_s
        await asyncio.sleep(max(_WATCH_S, 10 * interval_s))
        window = f"[{round(8 * interval_s * 1000)}ms]"
        slow = f"max(max_over_time(scrape_duration_seconds{window})) > {_SPARE * interval_s:g}"
        lost = f"min(min_over_time(up{window})) == 0"
        try:
            return not await asyncio.to_thread(self.stack.value, f"{slow} or {lost}")
        except OSError:  # it does not even answer
            return False

    async def lost_scrapes(self, within_s: float) -> int:
        """How many were lost, of what was not killed on purpose, within the last so many seconds."""
        killed = "|".join(play.name for play in self.plays if play.outside is not None) or "none"
        window = f"[{max(1, round(within_s * 1000))}ms]"
        of = f'up{{instance!~"{killed}"}}'
        lost = f"sum(count_over_time({of}{window}) - sum_over_time({of}{window}))"
        try:
            return int(sum(value for _, value in await asyncio.to_thread(self.stack.value, lost)))
        except OSError:  # it does not even answer
            return 1

    async def until_seen(self, play: Play, within_s: float) -> bool:
        """Wait until Prometheus has samples of the play's scene; whether it had within so many seconds."""
        end = time.monotonic() + within_s
        query = f'count(glassbus_build_info{{bus="{play.name}"}}) and on () (count(up{{job="glassbus"}} == 1) > 0)'
        while not await asyncio.to_thread(self.stack.value, query):
            if time.monotonic() > end:
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    def of_rule(self, play: Play, rule: Rule, states: tuple[str, ...] = ("firing",)) -> list[Active]:
        """The alerts of a rule that `play` makes and that are in one of these states."""
        return [
            one
            for one in self.active
            if one.name == rule.alert
            and one.state in states
            and rule.labels.items() <= one.labels.items()
            and play.claims(one.labels)
        ]

    def told(self, play: Play, rule: Rule, status: str, since: float) -> list[Notice]:
        """The notifications of `status` about it since then, monotonic seconds."""
        return [
            one
            for one in self.receiver.notices()
            if one.at >= since
            and one.status == status
            and one.labels.get("alertname") == rule.alert
            and rule.labels.items() <= one.labels.items()
            and play.claims(one.labels)
        ]

    def why_quiet(self, play: Play, rule: Rule) -> str:
        """What can be said of an alert that does not fire."""
        if self.of_rule(play, rule, ("pending",)):
            return "it is pending"
        broken = [one for one in self.stack.trouble_with_rules() if one.startswith(f"{rule.alert}:")]
        return f"its rule fails: {broken[0]}" if broken else "its expression yields nothing"

    async def why_untold(self, play: Play, rule: Rule) -> str:
        """What Alertmanager says of an alert that nobody was told of."""
        held = await asyncio.to_thread(self.stack.held)
        mine = [
            one
            for one in held
            if one["labels"].get("alertname") == rule.alert
            and rule.labels.items() <= one["labels"].items()
            and play.claims(one["labels"])
        ]
        if not mine:
            return "Alertmanager does not have it"
        names = {one["fingerprint"]: one["labels"].get("alertname") for one in held}
        status = mine[0]["status"]
        inhibitors = [str(names.get(one, one)) for one in status.get("inhibitedBy", ())]
        if inhibitors:
            return f"inhibited by {', '.join(inhibitors)}"
        return f"Alertmanager has it, {status.get('state')}"
