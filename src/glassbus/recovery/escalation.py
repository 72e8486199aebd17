"""Facts become escalations, and escalations reach people.

Everything here belongs to the bus's loop; files and channels are on threads of their own. A channel or a disk
that fails, hangs or lies is counted and tried again, and holds up nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from glassbus.clock import Clock
from glassbus.config import Settings
from glassbus.errors import (
    ConfigurationError,
    ErrorReport,
    ErrorSeverity,
    UnknownEscalation,
    safe_text,
    shown,
    type_name,
)
from glassbus.facts import (
    EscalationAcknowledged,
    EscalationOpened,
    EscalationResolved,
    Fact,
    JournalFailed,
    ManifestQuarantined,
)
from glassbus.observer import Hub, Observer
from glassbus.policy.escalation import SEVERITIES, Alarm, Book, Change, Escalated
from glassbus.policy.outbox import Bucket
from glassbus.policy.triggers import Triggers, of_report
from glassbus.recovery.channels import Channel, Log, Notice
from glassbus.recovery.escalation_file import Order, Place
from glassbus.recovery.lane import Lane
from glassbus.recovery.runner import Runner

_YEAR_S = 365 * 86400.0
#: Facts that wait to be looked at; those beyond are counted.
_WAITING_MAX = 10_000
#: How often what people ordered, and what other processes have open, is read, in seconds.
_READ_EVERY_S = 2.0
#: What was seen again is stored this often, in seconds; what changed, at once.
_STORE_EVERY_S = 60.0
_WHO_CAP = 200


class Escalation(msgspec.Struct, frozen=True):
    """Who must know, and how. Durations in seconds.

    `channels` are told besides the log. Dead letters of less severity than `minimum` are nobody's business. What is
    open and not acknowledged is told again every `renotify`; what a failure opened is over when it was not seen for
    `quiet`. Each channel is told at most `burst` things at once and `per_minute` on average.
    """

    channels: Sequence[Channel] = ()
    minimum: ErrorSeverity = ErrorSeverity.MEDIUM
    renotify: float = 4 * 3600.0
    quiet: float = 900.0
    per_minute: float = 30.0
    burst: int = 20

    def __post_init__(self) -> None:
        numbers = (self.renotify, self.quiet, self.per_minute)
        if not all(type(n) in (int, float) and 0 < n <= _YEAR_S and math.isfinite(n) for n in numbers):
            raise ConfigurationError("Escalation needs renotify, quiet and per_minute above 0, and at most a year")
        if type(self.burst) is not int or not 1 <= self.burst <= 1000:
            raise ConfigurationError(f"Escalation needs burst from 1 to 1000, not {shown(self.burst)}")
        if not isinstance(self.minimum, ErrorSeverity):
            raise ConfigurationError(f"Escalation needs minimum to be an ErrorSeverity, not {shown(self.minimum)}")
        if not isinstance(self.channels, tuple | list):
            raise ConfigurationError("Escalation needs channels to be a tuple of channels")
        names = ["log"]
        for channel in self.channels:
            wrong = [part for part, fits in _PARTS.items() if not fits(getattr(channel, part, None))]
            if wrong:
                raise ConfigurationError(f"{shown(channel)} is no channel: look at its {', '.join(wrong)}")
            if channel.name in names:
                raise ConfigurationError(f"two channels are called {channel.name!r}; give one another name=")
            names.append(channel.name)


_PARTS: dict[str, Callable[[object], bool]] = {
    "name": lambda value: isinstance(value, str) and value != "",
    "at_least": lambda value: isinstance(value, ErrorSeverity),
    "batch": lambda value: type(value) is int and value >= 1,
    "refresh_s": lambda value: type(value) in (int, float),
    "send": callable,
}


class Escalations(Observer):
    """What is open, and who has been told. An observer of the facts that `policy.triggers` names.

    `open`, `open_by_severity`, `acknowledge`, `resolve` and `escalate` may be called on any thread.
    """

    interests = Triggers.facts

    def __init__(self, config: Escalation, settings: Settings, hub: Hub, clock: Clock) -> None:
        self.config = config
        #: Facts that came faster than they could be looked at, and what could not be stored or told.
        self.overflowed = 0
        self._settings = settings
        self._hub = hub
        self._clock = clock
        self._triggers = Triggers(config.minimum)
        self._lock = threading.Lock()  # around the book and the lanes' outboxes
        self._book = Book(renotify_s=config.renotify, quiet_s=config.quiet)
        self._elsewhere: dict[str, Escalated] = {}
        self._waiting: deque[Alarm | tuple[str, str]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._awake = False
        self._lanes = [self._lane(channel) for channel in (Log(), *config.channels)]
        self._files = Runner("glassbus-escalations", clock)
        self._place: Place | None = None
        self._storing = self._stale = self._store_failing = self._reading = False
        self._stored_at = self._read_at = 0.0
        self._progress = asyncio.Event()
        #: Says what keeps the journal from the disk: no fact says when that is over. Asked about once a second.
        self.journal_trouble: Callable[[], str] = str

    def _lane(self, channel: Channel) -> Lane:
        bucket = Bucket(self.config.per_minute, self.config.burst)
        return Lane(channel, bucket, self._settings.name, self._clock, self._told)

    # Facts

    def on_fact(self, fact: Fact, /) -> None:
        """Any thread; never blocks."""
        if not self._triggers.concerned(fact):
            return
        for alarm in self._triggers.alarms(fact):
            self._take(alarm)
        for healed in self._triggers.healed(fact):
            self._take(healed)

    def escalate(self, report: ErrorReport) -> None:
        """Have somebody told of `report`, whatever its severity. Any thread; does not block."""
        report.escalated = True
        self._take(of_report(report))

    def asked_by(self, fact: Fact) -> bool:
        """Whether somebody is told of `fact`. Any thread."""
        return bool(self._triggers.alarms(fact))

    def _take(self, one: Alarm | tuple[str, str]) -> None:
        if len(self._waiting) >= _WAITING_MAX:
            self.overflowed += 1
            return
        self._waiting.append(one)
        self._wake()

    def _wake(self) -> None:
        loop = self._loop
        if loop is None or self._awake:
            return
        self._awake = True
        try:
            loop.call_soon_threadsafe(self._work)
        except RuntimeError:  # the loop is closed: what waits is looked at by the next start
            self._awake = False

    def _work(self) -> None:
        """On the loop: look at the facts that came, and tell what became of them."""
        self._awake = False
        changes: list[Change] = []
        now = self._clock.wall()
        with self._lock:
            for _ in range(len(self._waiting)):
                one = self._waiting.popleft()
                changes += self._book.raised(one, now) if isinstance(one, Alarm) else self._book.healed(*one)
        self._changed(changes, now)

    def _changed(self, changes: list[Change], now: float) -> None:
        """State what happened, store it, and let the channels know. Any thread."""
        for change in changes:
            fact = _fact(change, now)
            if fact is not None:
                self._hub.state(fact)
        if changes:
            with self._lock:
                for lane in self._lanes:
                    lane.add(changes)
            self._stale = True
        self._pump()

    # Time

    async def start(self) -> None:
        """Take over what an earlier run left open, and begin. Never fails: what cannot be read is stated."""
        self._loop = asyncio.get_running_loop()
        if self._settings.state_dir is not None and self._place is None:
            self._place = Place(self._settings.state_dir, self._settings.name)
            try:
                kept = self._place.left_behind()
            except OSError as error:
                self._store_failed(error)
            else:
                self._inherit(kept)
            self._state_damaged()
        self._wake()

    def _inherit(self, kept: list[Escalated]) -> None:
        now = self._clock.wall()
        with self._lock:
            if self._book.inherit(kept, now):
                self._stale = True
            for lane in self._lanes:
                lane.inherit(self._book.open())

    def look(self) -> None:
        """On the loop, about once a second."""
        now = self._clock.wall()
        with self._lock:
            changes = self._book.look(now) if len(self._book) else []
            for key in (key for key in self._book.healers() if key.startswith("records/")):
                own = key == "records/escalations"
                if not (self._store_failing if own else self.journal_trouble()):
                    changes += self._book.healed(key, "it can be written again")
        monotonic = self._clock.monotonic()
        if self._place is not None and monotonic - self._read_at >= _READ_EVERY_S and not self._reading:
            self._read_at, self._reading = monotonic, True
            self._files.submit(self._read)
        if len(self._book) and monotonic - self._stored_at >= _STORE_EVERY_S:
            self._stale = True
        self._changed(changes, now)

    async def stop(self, within_s: float) -> None:
        """Look at what has come, give the channels `within_s` seconds to be told of it, store, and end. Idempotent.

        What they were not told they are told after the next start.
        """
        if self._loop is None:
            return
        deadline = self._clock.monotonic() + within_s
        self._work()
        loop = self._loop
        try:
            while self._busy() and self._clock.monotonic() < deadline:
                self._progress.clear()
                timer = loop.call_later(max(0.0, deadline - self._clock.monotonic()), self._progress.set)
                try:
                    await self._progress.wait()
                finally:
                    timer.cancel()
        finally:
            self.abandon()

    def _busy(self) -> bool:
        return self._storing or self._stale or self._reading or any(lane.busy or lane.ready() for lane in self._lanes)

    def abandon(self) -> None:
        """End at once. Idempotent."""
        self._loop = None
        for lane in self._lanes:
            lane.close()
        place, self._place = self._place, None
        if place is not None and (self._storing or self._reading):
            self._files.submit(place.release)
        elif place is not None:
            place.release()
        self._files.close()

    # Channels

    def _pump(self) -> None:
        """Give each channel that is free what it is to be told, and store what changed."""
        loop = self._loop
        if loop is None:
            return
        for lane in self._lanes:
            with self._lock:
                held = lane.pump(loop, self._book)
            for fact in held:
                self._hub.state(fact)
        self._store()

    def _told(self, lane: Lane, notices: Sequence[Notice], took_s: float, error: BaseException | None) -> None:
        """On the loop: a channel has answered."""
        with self._lock:
            facts = lane.answered(notices, took_s, error)
            if error is None:
                for notice in notices:
                    self._stale |= notice.event != "resolved" and self._book.told(notice.escalation.fingerprint)
        for fact in facts:
            self._hub.state(fact)
        self._pump()
        self._progress.set()

    # The file

    def _store(self) -> None:
        if self._place is None:
            self._stale = False
        if self._storing or not self._stale or self._loop is None or self._place is None:
            return
        self._storing, self._stale = True, False
        self._stored_at = self._clock.monotonic()
        with self._lock:
            kept = self._book.open()
        place, loop = self._place, self._loop

        def write() -> None:
            failed: OSError | None = None
            try:
                place.write(kept)
            except OSError as error:
                failed = error
            _on(loop, self._wrote, failed)

        self._files.submit(write)

    def _wrote(self, error: OSError | None) -> None:
        self._storing = False
        if error is not None:
            self._store_failed(error)
        else:
            self._store_failing = False
            self._store()
        self._progress.set()

    def _store_failed(self, error: OSError) -> None:
        """Told once, until it works again; it is tried again with the next change, and every minute."""
        if self._store_failing:
            return
        self._store_failing = True
        why = f"{type_name(type(error))}: {safe_text(error, 300)}"
        self._hub.state(JournalFailed(at=self._clock.wall(), operation="escalations", error=why, dropped=0))

    def _read(self) -> None:
        """On the files' thread."""
        place, loop = self._place, self._loop
        if place is None or loop is None:
            return
        try:
            found: tuple[list[Order], dict[str, Escalated]] | OSError = (place.orders(), place.elsewhere())
        except OSError as error:
            found = error
        _on(loop, self._have_read, found)

    def _have_read(self, found: tuple[list[Order], dict[str, Escalated]] | OSError) -> None:
        self._reading = False
        self._progress.set()
        if isinstance(found, OSError):
            self._store_failed(found)
            return
        orders, self._elsewhere = found
        self._state_damaged()
        for order in orders:
            with contextlib.suppress(UnknownEscalation):  # it ended by itself before the order was read
                if order.do == "acknowledge":
                    self.acknowledge(order.fingerprint, by=order.by)
                else:
                    self.resolve(order.fingerprint, reason=order.by)

    def _state_damaged(self) -> None:
        damaged = self._place.damaged if self._place is not None else []
        while damaged:
            name, moved_to, why = damaged.pop()
            self._hub.state(
                ManifestQuarantined(at=self._clock.wall(), manifest=f"escalations/{name}", moved_to=moved_to, error=why)
            )

    # For people

    def open(self) -> list[Escalated]:
        """What is open in this process, the worst first."""
        with self._lock:
            return self._book.open()

    def open_by_severity(self) -> dict[ErrorSeverity, int]:
        """How many are open for the store, whichever process opened them."""
        with self._lock:
            found = {**self._elsewhere, **{e.fingerprint: e for e in self._book.open()}}
        counts = dict.fromkeys(SEVERITIES, 0)
        for escalation in found.values():
            counts[escalation.severity] += 1
        return counts

    def channels(self) -> list[Lane]:
        """The channels, as they are now."""
        return list(self._lanes)

    def acknowledge(self, fingerprint: str, *, by: str) -> bool:
        """Somebody has it: it is not told again. False when somebody had already. Raises UnknownEscalation."""
        with self._lock:
            try:
                change = self._book.acknowledge(fingerprint, _capped(by))
            except KeyError:
                raise _unknown(fingerprint) from None
        if change is not None:
            self._by_a_person(change)
        return change is not None

    def resolve(self, fingerprint: str, *, reason: str) -> None:
        """It is over. Raises UnknownEscalation."""
        with self._lock:
            try:
                change = self._book.resolve(fingerprint, _capped(reason))
            except KeyError:
                raise _unknown(fingerprint) from None
        self._by_a_person(change)

    def _by_a_person(self, change: Change) -> None:
        now = self._clock.wall()
        fact = _fact(change, now)
        if fact is not None:
            self._hub.state(fact)
        with self._lock:
            for lane in self._lanes:
                lane.add([change])
        self._stale = True
        self._wake()


def _fact(change: Change, now: float) -> Fact | None:
    escalation = change.escalation
    if change.event == "opened":
        return EscalationOpened(
            at=now,
            fingerprint=escalation.fingerprint,
            name=escalation.name,
            severity=escalation.severity,
            summary=escalation.summary,
        )
    if change.event == "acknowledged":
        return EscalationAcknowledged(
            at=now, fingerprint=escalation.fingerprint, name=escalation.name, by=escalation.acknowledged_by
        )
    if change.event == "resolved":
        return EscalationResolved(
            at=now,
            fingerprint=escalation.fingerprint,
            name=escalation.name,
            severity=escalation.severity,
            reason=change.reason,
            after_s=max(0.0, now - escalation.opened_at),
        )
    return None


def _on(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        # The loop is closed: nobody is left to be told.
        return


def _capped(text: object) -> str:
    return shown(text, _WHO_CAP) if not isinstance(text, str) else text[:_WHO_CAP]


def _unknown(fingerprint: object) -> UnknownEscalation:
    return UnknownEscalation(f"no escalation with the fingerprint {shown(fingerprint)} is open here")
