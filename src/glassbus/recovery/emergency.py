"""Emergency stop: take nothing more, write down what is held, close, and be gone within a deadline.

Unrecoverable is a corrupt store, an unaccounted message that an audit confirms, and error handling that itself
keeps failing; never what a handler raises, and never an observer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from msgspec.structs import replace

from glassbus.clock import Clock
from glassbus.config import Settings
from glassbus.errors import GlassbusError, safe_text, shown, type_name
from glassbus.facts import (
    Delivery,
    EmergencyStopBegan,
    EmergencyStopEnded,
    Fact,
    LedgerUnbalanced,
    transport_failed,
)
from glassbus.observer import Hub, Observer
from glassbus.policy.ledger import Ledger
from glassbus.recovery import manifest as manifests
from glassbus.recovery.aftermath import MANIFEST, SPILL, Aftermath, name_of
from glassbus.recovery.manifest import Manifest, Saved
from glassbus.recovery.places import Lock, take_place
from glassbus.recovery.runner import Runner
from glassbus.transport import Spills, Transport
from glassbus.transport import spill as spills

DEADLINE_S = 10.0
#: Shares of the deadline: for writing down, and for handlers to finish. The rest is for closing.
_WRITE_SHARE, _HANDLERS_SHARE = 0.2, 0.5
#: What is left for the last words, whatever happened before, in seconds.
_LAST_S = 0.5
#: An audit is made again after this long before it is believed, in seconds.
_CONFIRM_AFTER_S = 1.0
#: Error handling keeps failing: so often in a row, over so many seconds, and nothing settled meanwhile.
_OWN_FAILURES, _OWN_FAILURES_S = 10, 10.0
_REASON_CAP = 500


class Runs(Protocol):
    """A subscription that this process runs."""

    @property
    def settled_count(self) -> int: ...
    def at_work(self) -> list[Delivery]:
        """What its handlers hold now."""

    def halt(self) -> None:
        """Stop without waiting for anybody."""


class Bus(Protocol):
    """What an emergency asks of its bus. On the loop."""

    def state(self) -> str: ...
    def transport(self) -> Transport: ...
    def workers(self) -> Mapping[str, Runs]: ...
    def refuse(self, reason: str) -> None:
        """Take no more messages from now on, and say why."""

    def end_start(self) -> None:
        """Let a start that is at work fail."""

    async def stop(self, deadline_s: float) -> None:
        """As `MessageBus.stop`; it awaits `Emergency.closed` once the transport is closed."""

    def finish(self) -> None:
        """The bus counts as stopped, whatever did not work."""


class Emergency(Observer):
    """The emergency stop of one bus. Everything belongs to its loop, but `request`.

    `last` is called, with the seconds that are left, when all else is closed: for what must see even that.
    """

    interests = frozenset({LedgerUnbalanced})

    def __init__(self, bus: Bus, settings: Settings, hub: Hub, clock: Clock) -> None:
        self.last: list[Callable[[float], None]] = []
        self._bus = bus
        self._settings = settings
        self._hub = hub
        self._clock = clock
        self._files = Runner("glassbus-emergency", clock)
        self._folder = Path(settings.state_dir) / "emergency" / settings.name if settings.state_dir else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._requested: tuple[str, float] | None = None
        self._stop: asyncio.Task[EmergencyStopEnded] | None = None
        self._reason = ""
        self._began_at = self._ends_at = 0.0
        self._manifest: Manifest | None = None
        self._saved = 0  # what is on disk, and nothing else
        self._written = ""
        self._number: int | None = None
        self._lock: Lock | None = None
        self._ended: EmergencyStopEnded | None = None
        self._aftermath: Aftermath | None = None
        self._suspecting: asyncio.Task[None] | None = None
        self._own_failures = 0
        self._own_failures_since = 0.0
        self._settled_then = -1

    @property
    def began(self) -> bool:
        return self._stop is not None

    @property
    def reason(self) -> str:
        """Why it began; empty while it has not."""
        return self._reason

    # Stopping

    async def stop(self, reason: str, deadline_s: float = DEADLINE_S, error: str = "") -> EmergencyStopEnded:
        """Stop now. Whoever else asks meanwhile, or later, waits for the same stop, which no cancelled caller ends.

        Never raises for what fails on the way: it is stated, and the next step is made.
        """
        return await asyncio.shield(self.begin(reason, deadline_s, error))

    def begin(self, reason: str, deadline_s: float = DEADLINE_S, error: str = "") -> asyncio.Task[EmergencyStopEnded]:
        """Begin to stop, and do not wait for it."""
        if self._stop is None:
            loop = asyncio.get_running_loop()
            self._reason = reason[:_REASON_CAP] if isinstance(reason, str) else shown(reason, _REASON_CAP)
            self._began_at = self._clock.monotonic()
            self._ends_at = self._began_at + deadline_s
            if self._bus.state() not in ("new", "stopped"):
                self._bus.refuse(f"emergency stop: {self._reason}")
            self._stop = loop.create_task(self._run(deadline_s, error), name="glassbus:emergency")
        return self._stop

    def request(self, reason: str, deadline_s: float = DEADLINE_S) -> None:
        """Have the bus stop soon. Any thread, and safe in a signal handler: it sets a flag and wakes the loop."""
        self._requested = self._requested or (reason or "asked for", deadline_s)
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self.look)

    def look(self) -> None:
        """On the loop, about once a second: was it asked for?"""
        if self._requested and self._stop is None and self._bus.state() in ("starting", "running", "stopping"):
            self.begin(*self._requested)

    async def _run(self, deadline_s: float, error: str) -> EmergencyStopEnded:
        state = self._bus.state()
        self._hub.state(EmergencyStopBegan(at=self._clock.wall(), reason=self._reason, error=error))
        if self._suspecting is not None and self._suspecting is not asyncio.current_task():
            self._suspecting.cancel()
        if state == "starting":
            self._bus.end_start()
            await self._until(lambda: self._bus.state() != "starting", self._left())
        if self._bus.state() in ("running", "stopping"):
            await self._step("save", self._save(error), max(_LAST_S, _WRITE_SHARE * deadline_s))
            await self._close(deadline_s)
        if self._bus.state() != "stopped":
            self._bus.finish()
        ended = self._tell_end()
        for told in self.last:
            await self._step("last", self._in_thread(partial(told, self._left())), self._left())
        self._release()
        return ended

    def _left(self) -> float:
        return max(_LAST_S, self._ends_at - self._clock.monotonic())

    async def _until(self, holds: Callable[[], bool], within_s: float) -> bool:
        ends = self._clock.monotonic() + within_s
        while not holds() and self._clock.monotonic() < ends:  # noqa: ASYNC110 - what others do has no event
            await asyncio.sleep(0.01)
        return holds()

    async def _step(self, what: str, work: Coroutine[Any, Any, None], within_s: float) -> None:
        """Do `work` within its time; what it raises is stated, and nothing more."""
        try:
            async with asyncio.timeout(within_s):
                await work
        except Exception as error:  # noqa: BLE001 - whatever is broken, the next step must be made
            self._failed(what, error)

    def _failed(self, what: str, error: BaseException) -> None:
        self._hub.state(transport_failed(self._clock.wall(), f"emergency {what}", error))

    async def _close(self, deadline_s: float) -> None:
        others = self._bus.state() == "stopping"  # a stop with a deadline of its own is at work
        handlers_s = min(_HANDLERS_SHARE * deadline_s, self._left())
        stopping = asyncio.get_running_loop().create_task(self._bus.stop(handlers_s), name="glassbus:emergency-stop")
        if others:
            await asyncio.wait([stopping], timeout=handlers_s)
            for worker in list(self._bus.workers().values()):
                worker.halt()
        await asyncio.wait([stopping], timeout=max(_LAST_S, self._left() - _LAST_S))
        if not stopping.done():
            stopping.cancel()
            await asyncio.wait([stopping], timeout=_LAST_S)
        if stopping.done() and not stopping.cancelled() and stopping.exception() is not None:
            self._failed("stop", stopping.exception() or AssertionError())
        if self._bus.state() != "stopped":
            await self._step("close", self._close_transport(), _LAST_S)

    async def _close_transport(self) -> None:
        await self._bus.transport().close(_LAST_S)

    async def closed(self) -> None:
        """The transport is closed, by whomever. The bus awaits it before it tells that it has stopped."""
        if self._stop is None or self._ended is not None:
            return
        transport = self._bus.transport()
        if isinstance(transport, Spills) and transport.spill_path is not None:
            await self._step("manifest", self._in_thread(self._write_spilled), self._left())
        self._tell_end()

    def _tell_end(self) -> EmergencyStopEnded:
        if self._ended is None:
            took_s = self._clock.monotonic() - self._began_at
            self._ended = EmergencyStopEnded(
                at=self._clock.wall(),
                reason=self._reason,
                saved=self._saved,
                manifest=self._written,
                within_deadline=self._clock.monotonic() <= self._ends_at + _LAST_S,
                duration_s=took_s,
            )
            self._hub.state(self._ended)
        return self._ended

    # Writing down

    async def _save(self, error: str) -> None:
        """Write down what is held now: a sudden end in the middle of the stop must find it on disk."""
        transport = self._bus.transport()
        held = [delivery for worker in list(self._bus.workers().values()) for delivery in worker.at_work()]
        spilling = isinstance(transport, Spills)
        spills_already = isinstance(transport, Spills) and transport.spill_path is not None
        manifest = Manifest(
            bus=self._settings.name,
            address=transport.address,
            at=self._clock.wall(),
            reason=self._reason,
            error=error,
            spilled=spilling,
            saved=tuple(Saved(d.envelope.id, d.subscription, d.attempt) for d in held),
        )
        if self._folder is None and not spills_already:
            return
        if isinstance(transport, Spills):
            await self._in_thread(self._take_place)
            if transport.spill_path is None and self._folder is not None and self._number is not None:
                transport.keep_in(self._folder / f"{self._number}.{SPILL}")
            path, everything = transport.spill_path, transport.held()
            if path is not None:
                self._manifest = manifest
                await self._in_thread(lambda: spills.spill(path, everything))
                await self._in_thread(self._write_spilled)
            return

        def write() -> None:
            self._take_place()
            self._write(manifest, _ledger(transport))

        await self._in_thread(write)

    def _take_place(self) -> None:
        """On the files' thread. Raises OSError."""
        if self._folder is not None and self._number is None:
            folder = self._folder

            def fits(number: int) -> bool:
                return not any((folder / f"{number}.{kind}").exists() for kind in (MANIFEST, SPILL))

            self._number, self._lock = take_place(folder, fits)

    def _write(self, manifest: Manifest, ledger: Ledger | None) -> None:
        """On the files' thread. Raises OSError."""
        if self._folder is not None and self._number is not None:
            manifests.write(self._folder / f"{self._number}.{MANIFEST}", replace(manifest, ledger=ledger))
            self._written = name_of(self._settings.name, self._number)
            self._saved = len(manifest.saved)
        self._manifest = manifest

    def _write_spilled(self) -> None:
        """On the files' thread: what is in the spill file now, read back, is what was saved."""
        transport = self._bus.transport()
        if not isinstance(transport, Spills) or transport.spill_path is None or self._manifest is None:
            return
        try:
            held = spills.read(transport.spill_path)
        except FileNotFoundError:
            held = []
        saved = tuple(Saved(one.envelope.id, one.subscription, getattr(one, "attempt", 0)) for one in held)
        self._saved = len(saved)
        self._write(replace(self._manifest, saved=saved), None)
        if held:
            self._written = self._written or transport.spill_path.name

    async def _in_thread(self, work: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def job() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - told to whoever waits
                _on(loop, _fail, done, error)
            except BaseException as error:  # noqa: BLE001 - one of these would end the loop
                _on(loop, _fail, done, RuntimeError(type_name(type(error))))
            else:
                _on(loop, _finish, done)

        self._files.submit(job)
        await done

    def _release(self) -> None:
        lock, self._lock, self._number = self._lock, None, None
        if lock is not None:
            lock.release()
        self._files.close()

    # Starting

    def prepare(self) -> None:
        """Before the transport is opened: look at what an earlier stop left."""
        self._loop = asyncio.get_running_loop()
        self._aftermath = Aftermath(self._settings, self._folder, self._hub, self._clock)
        self._aftermath.look(self._bus.transport())
        self._number, self._lock = self._aftermath.adopted

    async def reconcile(self) -> None:
        """The transport is open, and nothing runs yet: compare with it what an earlier stop wrote down."""
        if self._aftermath is not None:
            await self._aftermath.reconcile(self._bus.transport())

    def abandon(self) -> None:
        """The bus has ended, or its start failed: let go of what is held here. Idempotent."""
        if self._suspecting is not None:
            self._suspecting.cancel()
        if self._aftermath is not None:
            self._aftermath.release()
        if self._stop is None or self._stop.done():
            self._release()

    # What is unrecoverable

    def on_fact(self, fact: Fact, /) -> None:
        if isinstance(fact, LedgerUnbalanced) and self._loop is not None and not self.began:
            _on(self._loop, self._suspect)

    def _suspect(self) -> None:
        if self._suspecting is None and not self.began and self._bus.state() == "running":
            self._suspecting = asyncio.get_running_loop().create_task(self._confirm(), name="glassbus:confirm")

    async def _confirm(self) -> None:
        """Stop if the store is found not to add up, twice."""
        try:
            problems: tuple[str, ...] = ()
            for wait_s in (0.0, _CONFIRM_AFTER_S):
                await asyncio.sleep(wait_s)
                problems = (await self._bus.transport().audit()).problems
                if not problems:
                    return
            self.begin("messages are unaccounted for", error="; ".join(problems)[:_REASON_CAP])
        except GlassbusError as error:
            self._failed("audit", error)
        finally:
            self._suspecting = None

    def error_handling_failed(self, error: BaseException) -> None:
        """Our own handling of an error failed. On the loop."""
        now = self._clock.monotonic()
        settled = sum(worker.settled_count for worker in list(self._bus.workers().values()))
        if settled != self._settled_then:
            self._settled_then, self._own_failures, self._own_failures_since = settled, 0, now
        self._own_failures += 1
        if self._own_failures >= _OWN_FAILURES and now - self._own_failures_since >= _OWN_FAILURES_S:
            self.begin("error handling keeps failing", error=f"{type_name(type(error))}: {safe_text(error, 300)}")


def _ledger(transport: Transport) -> Ledger | None:
    try:
        return transport.ledger()
    except GlassbusError:
        return None  # a store that is broken cannot say: then only what was at work is known


def _on(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        # The loop is closed: nobody is left to be told.
        return


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _fail(done: asyncio.Future[None], error: BaseException) -> None:
    if not done.done():
        done.set_exception(error)
