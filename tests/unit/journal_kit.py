"""Facts of failing messages, with times of our own, and what a journal's folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glassbus import facts as f
from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity
from glassbus.facts import Delivery
from glassbus.message import Envelope
from glassbus.record.journal import Journal, JournalSettings
from glassbus.record.journalfiles import journal_files
from glassbus.record.reading import JournalReader

START = 1_700_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class Kept:
    """A journal in `folder` (or in memory), the clock it reads, and the facts that it stated itself."""

    def __init__(self, folder: Path | None, **settings: Any) -> None:
        self.clock = Clock()
        self.stated: list[f.Fact] = []
        self.journal = Journal(
            JournalSettings(**settings),
            state_dir=None if folder is None else str(folder),
            bus="orders",
            wall=self.clock,
            state=self.stated.append,
        )

    def state(self, *facts: f.Fact) -> None:
        for fact in facts:
            self.journal.on_fact(fact)


def delivery(
    message: str = "m-1", *, attempt: int = 1, failed_at: float = 0.0, subscription: str = "charge"
) -> Delivery:
    envelope = Envelope(message, "orders.created", b'{"card": "secret-in-payload"}', "json", {"h": "secret-in-header"})
    return Delivery(envelope, subscription, "orders.*", attempt, first_failed_at=failed_at)


def report(at: float = START, *, fingerprint: str = "f00dcafe", text: str = "refused", **more: Any) -> ErrorReport:
    return ErrorReport(
        **{
            "error_id": f"e-{at}",
            "timestamp": at,
            "category": ErrorCategory.CONNECTION_ERROR,
            "severity": ErrorSeverity.HIGH,
            "message": text,
            "exception_type": "ConnectionRefusedError",
            "stack_trace": '  File "shop.py", line 7, in charge\nConnectionRefusedError',
            "fingerprint": fingerprint,
            **more,
        }
    )


def failed(at: float = START, message: str = "m-1", *, attempt: int = 1, **more: Any) -> f.AttemptFailed:
    return f.AttemptFailed(
        at=at, delivery=delivery(message, attempt=attempt), report=report(at, **more), duration_s=0.01
    )


def ended(at: float = START, message: str = "m-1", outcome: Any = "succeeded") -> f.RecoveryEnded:
    return f.RecoveryEnded(
        at=at,
        delivery=delivery(message, attempt=2, failed_at=at - 1),
        category=ErrorCategory.CONNECTION_ERROR,
        action="delayed_retry",
        outcome=outcome,
        duration_s=1.5,
    )


def text_of(folder: Path) -> str:
    return "".join(path.read_text() for path in journal_files(folder))


def lines_of(folder: Path) -> list[Any]:
    return list(JournalReader(folder).lines())
