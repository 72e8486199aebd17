"""One channel, and the thread it is told on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from glassbus.clock import Clock
from glassbus.errors import safe_text, type_name
from glassbus.facts import EscalationNotified
from glassbus.policy.escalation import Book, Change, Escalated, EscalationState
from glassbus.policy.outbox import Bucket, Outbox
from glassbus.recovery.channels import Channel, Notice
from glassbus.recovery.runner import Runner

#: A channel that has not returned for so long counts as failed, in seconds; it is waited for all the same.
STUCK_S = 30.0
#: How often a channel that is refreshed is told that something is over.
_RESOLVED_TIMES = 4

Told = Callable[["Lane", Sequence[Notice], float, BaseException | None], None]


class Lane:
    """What one channel is still to be told, and how that goes. The counts only grow and may be read anywhere;
    everything else is called under the lock of `Escalations`, but for `told`, which the loop calls."""

    def __init__(self, channel: Channel, bucket: Bucket, bus: str, clock: Clock, told: Told) -> None:
        self.name = channel.name
        self.sent = self.failed = self.suppressed = 0
        #: What it raised last; empty while it works.
        self.failing = ""
        self._channel = channel
        self._refresh_s = float(channel.refresh_s)
        self._outbox = Outbox(channel.at_least, bucket, max(1, int(channel.batch)))
        self._bus = bus
        self._clock = clock
        self._told = told
        self._runner = Runner(f"glassbus-channel-{channel.name}", clock)
        self._busy_since: float | None = None
        self._stuck = False
        self._refreshed_at = clock.monotonic()
        self._over: dict[str, tuple[Change, int]] = {}  # what is over, and how often that is told yet
        self._numbers: dict[str, int] = {}

    @property
    def busy(self) -> bool:
        return self._busy_since is not None

    @property
    def waiting(self) -> int:
        return len(self._outbox)

    def ready(self) -> bool:
        """Whether there is something to tell that can be told now."""
        return self._outbox.ready and not self.busy

    def inherit(self, escalations: Sequence[Escalated]) -> None:
        """An earlier run left these open: they go on being told of, and those nobody was told of are told now."""
        for escalation in escalations:
            if escalation.state is EscalationState.OPEN:
                self._outbox.add(Change("opened", escalation))
            else:
                self._outbox.heard(escalation.fingerprint)
        self._refreshed_at = float("-inf")

    def add(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self._outbox.add(change)

    def pump(self, loop: asyncio.AbstractEventLoop, book: Book) -> list[EscalationNotified]:
        """Tell the channel what it is to be told, if it is free. Yields what is held up, by the rate limit or by it."""
        now = self._clock.monotonic()
        if self._busy_since is not None:
            return self._look_at_stuck(now)
        batch, held = self._outbox.take(now)
        facts = [self._fact(self._notice(change), "suppressed") for change in held]
        self.suppressed += len(held)
        refresh: list[Change] = []
        if self._refresh_s > 0 and now - self._refreshed_at >= self._refresh_s and now >= self._outbox.retry_at:
            self._refreshed_at = now
            fresh = {change.escalation.fingerprint for change in batch}
            refresh = [c for c in self._still(book) if c.escalation.fingerprint not in fresh]
        if batch or refresh:
            notices = [self._notice(change, counted=True) for change in batch]
            notices += [self._notice(change) for change in refresh]
            self._send(loop, now, batch, notices)
        return facts

    def _still(self, book: Book) -> list[Change]:
        """What a refresh shows: all that is open, and what is over, for a while."""
        open_ = {e.fingerprint: e for e in book.open() if self._outbox.wants(e)}
        told: list[Change] = [Change("still_open", escalation) for escalation in open_.values()]
        for fingerprint, (change, times) in list(self._over.items()):
            if times <= 1 or fingerprint in open_:
                del self._over[fingerprint]
            else:
                self._over[fingerprint] = (change, times - 1)
            if fingerprint not in open_:
                told.append(change)
        return told

    def _notice(self, change: Change, *, counted: bool = False) -> Notice:
        fingerprint = change.escalation.fingerprint
        number = self._numbers.get(fingerprint, 0) + counted
        if counted:
            self._numbers[fingerprint] = number
        return Notice(change.event, change.escalation, self._bus, self._clock.wall(), number, change.reason)

    def _send(self, loop: asyncio.AbstractEventLoop, now: float, batch: list[Change], notices: list[Notice]) -> None:
        self._busy_since = now
        self._batch = batch
        channel = self._channel

        def work() -> None:
            started = time.perf_counter()
            failed: BaseException | None = None
            try:
                channel.send(notices)
            except BaseException as error:  # noqa: BLE001 - a channel of the user's may raise anything
                failed = error
            try:
                loop.call_soon_threadsafe(self._told, self, notices, time.perf_counter() - started, failed)
            except RuntimeError:
                # The loop is closed: nobody is left to be told.
                return

        self._runner.submit(work)

    _batch: Sequence[Change] = ()

    def answered(
        self, notices: Sequence[Notice], took_s: float, error: BaseException | None
    ) -> list[EscalationNotified]:
        """The call has returned. Yields what is to be stated: of a mere refresh only that it fails, or works again."""
        now = self._clock.monotonic()
        batch, self._batch = self._batch, ()
        self._busy_since, self._stuck = None, False
        failed_before, self.failing = bool(self.failing), ""
        if error is None:
            self._outbox.sent(batch)
            for change in batch:
                if change.event == "resolved":
                    self._numbers.pop(change.escalation.fingerprint, None)
                    if self._refresh_s > 0:
                        self._over[change.escalation.fingerprint] = (change, _RESOLVED_TIMES)
            outcome = "sent"
        else:
            self.failing = f"{type_name(type(error))}: {safe_text(error, 300)}"
            self._outbox.failed(batch, now)
            if not batch:
                self._refreshed_at = float("-inf")  # as soon as it works again
            outcome = "failed"
        told = list(notices[: len(batch)])
        if not batch and bool(self.failing) is not failed_before:
            told = list(notices[:1])
        if error is None:
            self.sent += len(told)
        else:
            self.failed += len(told)
        return [self._fact(notice, outcome, took_s, self.failing) for notice in told]

    def _look_at_stuck(self, now: float) -> list[EscalationNotified]:
        if self._busy_since is None or self._stuck or now - self._busy_since < STUCK_S:
            return []
        self._stuck = True
        self.failing = f"it has not returned for {STUCK_S:g} s"
        self.failed += len(self._batch)
        return [self._fact(self._notice(c), "failed", now - self._busy_since, self.failing) for c in self._batch]

    def close(self) -> None:
        self._runner.close()

    def _fact(self, notice: Notice, outcome: str, took_s: float = 0.0, error: str = "") -> EscalationNotified:
        return EscalationNotified(
            at=self._clock.wall(),
            fingerprint=notice.escalation.fingerprint,
            name=notice.escalation.name,
            severity=notice.escalation.severity,
            channel=self.name,
            event=notice.event,
            outcome=outcome,  # type: ignore[arg-type]
            notification=max(1, notice.notification),
            duration_s=took_s,
            error=error,
        )
