"""The bus's own failures, for the error log: written on a thread of their own, never on the bus's loop."""

from __future__ import annotations

import threading
from collections import deque

from glassbus.errors import ErrorReport
from glassbus.facts import AttemptFailed, DeliveryDeadLettered, Fact, FactType
from glassbus.observer import Observer
from glassbus.record.errorlog import ErrorLogger

#: At most so many reports wait for the disk; more are counted in `dropped`.
_WAITING_MAX = 10_000
_IDLE_S = 5.0
#: Why a delivery may be dead-lettered without a failed attempt before it.
_UNTOLD = ("owner_died", "overflow")


class ErrorFeed(Observer):
    """Hands each failure of the bus's own deliveries to an ErrorLogger. Does not block."""

    interests: frozenset[FactType] = frozenset({AttemptFailed, DeliveryDeadLettered})

    def __init__(self, log: ErrorLogger) -> None:
        self._log = log
        self._waiting: deque[ErrorReport] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self.dropped = 0

    def on_fact(self, fact: Fact, /) -> None:
        if isinstance(fact, AttemptFailed) or (isinstance(fact, DeliveryDeadLettered) and fact.reason in _UNTOLD):
            self._take(fact.report)

    def _take(self, report: ErrorReport) -> None:
        with self._changed:
            if len(self._waiting) >= _WAITING_MAX:
                self.dropped += 1
                return
            self._waiting.append(report)
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
                report = self._waiting[0]
            self._log.log_error(report)
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()
