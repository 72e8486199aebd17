"""The bus's own failures, for the error log: written on a thread of their own, never on the bus's loop."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from glassbus.errors import ErrorReport
from glassbus.facts import AttemptFailed, DeliveryDeadLettered, Fact, FactType, RecoveryEnded, RetryScheduled
from glassbus.observer import Observer
from glassbus.record.errorlog import ErrorLogger

#: At most so many reports wait for the disk; more are counted in `dropped`.
_WAITING_MAX = 10_000
#: Of so many retries it is remembered which report they are of; the others are counted without one.
_RETRYING_MAX = 10_000
_IDLE_S = 5.0
#: Why a delivery may be dead-lettered without a failed attempt before it.
_UNTOLD = ("owner_died", "overflow")


class ErrorFeed(Observer):
    """Hands each failure of the bus's own deliveries to an ErrorLogger, and how its recovery ended. Does not block.

    `escalates` answers whether somebody is told of a fact.
    """

    interests: frozenset[FactType] = frozenset({AttemptFailed, RetryScheduled, RecoveryEnded, DeliveryDeadLettered})

    def __init__(self, log: ErrorLogger) -> None:
        self.escalates: Callable[[Fact], bool] = lambda fact: False
        self._log = log
        self._failed: AttemptFailed | None = None  # what becomes of it is stated next
        self._retrying: OrderedDict[tuple[str, str], ErrorReport] = OrderedDict()
        self._waiting: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self.dropped = 0

    def on_fact(self, fact: Fact, /) -> None:
        match fact:
            case AttemptFailed():
                self._record(self._before())
                self._failed = fact
            case RetryScheduled():
                report = self._before()
                if report is not None:
                    report.recovery_attempted = True
                    self._retrying[fact.delivery.envelope.id, fact.delivery.subscription] = report
                    if len(self._retrying) > _RETRYING_MAX:
                        self._retrying.popitem(last=False)
                    self._put(partial(self._log.log_error, report, outcome_follows=True))
            case RecoveryEnded():
                known = self._retrying.pop((fact.delivery.envelope.id, fact.delivery.subscription), None)
                self._put(partial(self._log.recovery_ended, known, fact.outcome == "succeeded"))
            case DeliveryDeadLettered():
                report = self._before()
                if report is None and fact.reason in _UNTOLD:
                    report = replace(fact.report)
                if report is not None:
                    report.escalated = report.escalated or self.escalates(fact)
                self._record(report)
            case _:
                return

    def _before(self) -> ErrorReport | None:
        """The report of the attempt that failed just now: a copy, for other observers have been shown it too."""
        failed, self._failed = self._failed, None
        return replace(failed.report, escalated=self.escalates(failed)) if failed is not None else None

    def _record(self, report: ErrorReport | None) -> None:
        if report is not None:
            self._put(partial(self._log.log_error, report))

    def _put(self, work: Callable[[], object]) -> None:
        with self._changed:
            if len(self._waiting) >= _WAITING_MAX:
                self.dropped += 1
                return
            self._waiting.append(work)
            if self._busy:
                self._changed.notify()
                return
            self._busy = True
            threading.Thread(target=self._write, name="glassbus-error-log", daemon=True).start()

    def flush(self, within_s: float) -> bool:
        """Wait until all is written; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, within_s)

    def after_fork(self) -> None:
        """In the child: what waits is the parent's to write, and so is its thread."""
        self._changed = threading.Condition()
        self._waiting.clear()
        self._busy = False

    def _write(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._waiting, _IDLE_S):
                    self._busy = False
                    return
                work = self._waiting[0]
            work()
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()
