"""Runs the demo from start to closing account."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import msgspec

from glassbus import MessageBus, Outgoing, PublishRejected, PublishUncertain
from glassbus.cli.common import CommandError, colours, count, duration
from glassbus.cli.demo.account import Closing, close_account, print_account
from glassbus.cli.demo.desk import Desk
from glassbus.cli.demo.feed import Feed, InputFeed, MadeUpFeed, Spiced
from glassbus.cli.demo.lines import Lines
from glassbus.cli.demo.sayings import Mood
from glassbus.cli.demo.service import subscribe_intake, subscribe_service
from glassbus.cli.demo.state import Demo
from glassbus.cli.demo.strike import Strike
from glassbus.cli.demo.watch import Watch
from glassbus.cli.demo.world import World
from glassbus.cli.hosting import exported_traces, logging_to, serve_somewhere, stop_signals
from glassbus.config import addresses
from glassbus.errors import BusNotRunning, GlassbusError, InvalidMessage, TransportError, safe_text
from glassbus.faults import JumpingClock
from glassbus.faults.scenarios import scenario_of

_DRAIN_MAX_S = 30.0
_STOP_MAX_S = 5.0
_BATCH_MAX = 100
#: How many messages may wait for a subscription, unless a fault is about that.
_CAPACITY = 100_000


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, checked."""

    source: str | None
    seconds: float | None
    rate: float
    url: str | None
    plain: bool
    seed: int
    serve: str | None
    fault: str | None = None
    allow_crash: bool = False


class Face(Protocol):
    """Shows the demo while it runs."""

    interval_s: float

    def start(self) -> None: ...
    def show(self) -> None: ...
    def stop(self) -> None: ...


def conduct(options: Options) -> int:
    """Run the demo; the exit status. Raises GlassbusError when it cannot run."""
    _check_fault(options)
    folder = Path(tempfile.mkdtemp(prefix="glassbus-demo-"))
    url = options.url or f"sqlite:///{quote(str(folder / 'demo.db'))}"
    log = folder / "demo.log"
    with logging_to(log), exported_traces("glassbus-demo") as traces:
        closing = asyncio.run(_Run(options, url, log).run())
    print_account(closing, traces.told)
    return 0 if closing.balanced and closing.as_it_must else 1


class _Run:
    def __init__(self, options: Options, url: str, log: Path) -> None:
        self.options = options
        self.url = url
        self.log = log
        self.world = World(options.seed)
        self.watch = Watch()
        self.ending = asyncio.Event()
        self.hurried = asyncio.Event()
        self.why_ended = ""
        self.unusable = 0
        self.first_unusable = ""
        self.patterns: set[str] = set()
        self.strike: Strike | None = None

    async def run(self) -> Closing:
        options = self.options
        self._loop = asyncio.get_running_loop()
        scenario = scenario_of(options.fault) if options.fault else None
        self.bus = bus = MessageBus(
            self.url,
            name="demo",
            observers=[self.watch],
            seed=options.seed,
            clock=JumpingClock() if scenario is not None else None,
            capacity=(scenario.capacity if scenario is not None else None) or _CAPACITY,
        )
        feed: Feed = (
            InputFeed(options.source, replay=options.seconds is not None)
            if options.source
            else MadeUpFeed(options.seed)
        )
        self.feed = Spiced(feed, f"demo-{secrets.token_hex(6)}")
        self.demo = Demo(bus, self.watch, self.feed, self.url)
        self.demo.is_down = lambda: self.world.payments.down
        if not options.source:
            self._listen_to({"github.>"})
        subscribe_service(bus, self.world)
        if scenario is not None:
            self.strike = Strike(scenario, bus, self.watch, options.seconds, seed=options.seed)
            self.demo.strike = self.strike
        server, note = serve_somewhere(bus, options.serve, Desk(self._tell_from_afar))
        self.demo.metrics_url = f"{server.url}/metrics"
        self.demo.notes += [note] if note else []
        with contextlib.closing(feed), server:
            await bus.start()
            try:
                self._take_up()
                with self._shown():
                    await self._work()
                return await close_account(self)
            finally:
                await bus.stop(_STOP_MAX_S)

    def _take_up(self) -> None:
        """Go on where an earlier run on this store left off."""
        self.demo.before = before = self.bus.ledger()
        for name, queue in self.bus.queues().items():
            if name.startswith("intake"):
                self._listen_to({queue.spec.pattern})
        left = before.total.pending + before.total.in_flight
        if left:
            text = f"an earlier run left {count(left, 'delivery', 'deliveries')}: they go on now"
            self.watch.tell(time.time(), "good", text)

    def _listen_to(self, patterns: set[str]) -> None:
        for pattern in sorted(patterns - self.patterns - {"orders.>"}):
            self.patterns.add(pattern)
            subscribe_intake(self.bus, pattern)

    def _tell_from_afar(self, mood: Mood, text: str, key: str) -> None:
        """Add news from another thread than the loop's."""
        self._loop.call_soon_threadsafe(self.watch.tell, time.time(), mood, text, key)

    # The three things that go on at once

    async def _work(self) -> None:
        self.demo.phase = "running"
        with stop_signals(self._signalled):
            publishing = asyncio.create_task(self._publish())
            strike = asyncio.create_task(self._strike()) if self.strike is not None else None
            moods = strike or asyncio.create_task(self._moods())
            beside = [moods, asyncio.create_task(self._show())]
            asked = asyncio.create_task(self.ending.wait())
            tasks = [publishing, asked, *beside]
            try:
                lasting = [task for task in tasks if task is not strike]
                ended, _ = await asyncio.wait(
                    lasting, timeout=self.options.seconds, return_when=asyncio.FIRST_COMPLETED
                )
                if not ended:
                    self.why_ended = f"--seconds {self.options.seconds:g}"
                self._end_intake()
                await asyncio.wait([publishing], timeout=_STOP_MAX_S + 1)
                _raise_failures([publishing, *beside])
                await self._drain()
                if strike is not None and not self.hurried.is_set():
                    await asyncio.wait([strike], timeout=_DRAIN_MAX_S)
                _raise_failures(beside)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _end_intake(self) -> None:
        self.ending.set()
        self.demo.intake_s = time.monotonic() - self.demo.started
        self.demo.phase = "draining"
        self.world.payments.down = False
        if self.strike is not None:
            self.strike.end()

    def _signalled(self, name: str) -> None:
        if self.ending.is_set():
            self.hurried.set()
        self.why_ended = self.why_ended or name
        self.ending.set()

    async def _publish(self) -> None:
        """Take records at the rate wanted, and publish them, until the end of the feed or of the run."""
        rate = self.options.rate
        clock_s = time.monotonic()
        while not self.ending.is_set():
            now = time.monotonic()
            clock_s = max(clock_s, now - 1.0)  # what could not be published in time is not made up for in a burst
            due = int((now - clock_s) * rate)
            if due:
                messages = await self.feed.take(min(due, _BATCH_MAX), 0.2)
                clock_s += len(messages) / rate
                self._listen_to(self.feed.patterns)
                await self._store(messages)
                if self.feed.feed.ended:
                    self.why_ended = f"the end of {self.feed.feed.name}"
                    return
            if not self.bus.running:
                return
            await asyncio.sleep(min(0.05, 1 / rate))

    async def _store(self, messages: list[Outgoing]) -> None:
        """Publish a batch however often it takes: its ids make that safe."""
        while messages and not self.hurried.is_set():
            try:
                await self.bus.publish_many(messages)
                return
            except PublishUncertain:
                await asyncio.sleep(0.2)
            except BusNotRunning:
                return
            except InvalidMessage as error:
                if len(messages) == 1:
                    self.unusable += 1
                    self.first_unusable = self.first_unusable or safe_text(error)
                    return
                for message in messages:
                    await self._store([message])
                return
            except PublishRejected:  # no room now
                await asyncio.sleep(0.5)

    async def _moods(self) -> None:
        """Payments goes down for a while, and comes back. The others are moody by themselves."""
        first_s, length_s = self._outage()
        await asyncio.sleep(first_s)
        while True:
            self.world.payments.down = True
            self.watch.tell(time.time(), "bad", f"payments goes down for {duration(length_s)} (the demo does that)")
            await asyncio.sleep(length_s)
            self.world.payments.down = False
            self.watch.tell(time.time(), "good", "payments is back")
            await asyncio.sleep(60.0)

    async def _strike(self) -> None:
        """The fault that was asked for; one that cannot be ends the run."""
        assert self.strike is not None
        try:
            await self.strike.run()
        except GlassbusError:
            self.ending.set()
            raise

    def _outage(self) -> tuple[float, float]:
        """When payments first goes down, and for how long: in the middle of a short run."""
        seconds = self.options.seconds or _reading_s(self.options)
        if seconds is None or seconds > 20:
            return 6.0, 6.0
        return 0.3 * seconds, 0.4 * seconds

    async def _drain(self) -> None:
        """Let what was accepted be handled, waiting for an open breaker to close, within bounds."""
        until = time.monotonic() + _DRAIN_MAX_S
        hurried = asyncio.create_task(self.hurried.wait())
        try:
            while (left_s := until - time.monotonic()) > 0 and not hurried.done() and self.bus.running:
                draining = asyncio.create_task(self.bus.drain(left_s))
                await asyncio.wait([draining, hurried], return_when=asyncio.FIRST_COMPLETED)
                if not draining.done():
                    draining.cancel()
                    return
                if draining.exception() is not None:  # TimeoutError: what is left is told in the account
                    return
                if "breaker_open" not in draining.result().reasons.values():
                    return
                await asyncio.sleep(0.1)
        finally:
            hurried.cancel()

    # Showing

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        self.face: Face
        plain = self.options.plain or self.options.allow_crash  # a killed process cannot give the screen back
        if plain or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
            self.face = Lines(self.demo)
        else:
            from glassbus.cli.demo.screen import Screen

            self.face = Screen(self.demo, colours())
        self.face.start()
        try:
            yield
        finally:
            self.face.stop()

    async def _show(self) -> None:
        while True:
            try:
                self.face.show()
            except TransportError as error:  # the ledger could not be read now
                self.watch.tell(time.time(), "bad", f"the store does not answer: {safe_text(error, 160)}", "show")
            await asyncio.sleep(self.face.interval_s)


def _check_fault(options: Options) -> None:
    """Raises ConfigurationError for a fault that cannot be, before anything is made."""
    if options.fault is None:
        return
    scenario = scenario_of(options.fault)
    if scenario.crash and not options.allow_crash:
        raise CommandError(f"--fault {scenario.name} kills this process with SIGKILL: give --allow-crash too")
    if scenario.durable and options.url and addresses(options.url)[0].scheme == "memory":
        raise CommandError(f"--fault {scenario.name} is of use on a store that outlives it: give another --url")


def _reading_s(options: Options) -> float | None:
    """How long it takes to read the input once; None when nobody knows."""
    path = Path(options.source or "-")
    if not path.is_file():
        return None
    with path.open("rb") as file:
        lines = sum(1 for _ in itertools.islice(file, 100_000))
    return lines / options.rate


def _raise_failures(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()
