"""What went wrong lately, and the story of single messages: a bounded ring in memory."""

from __future__ import annotations

from collections import Counter, deque

import msgspec

from glassbus import facts as f
from glassbus.errors import ErrorReport
from glassbus.facts import Delivery, Fact
from glassbus.observer import ALL_FACTS, Observer
from glassbus.record.logs import describe

_HAPPY = frozenset({f.MessagePublished, f.DeliveryHandled})


class Entry(msgspec.Struct, frozen=True):
    """One fact as strings and numbers. `at` is wall seconds."""

    at: float
    fact: str
    text: str
    message_id: str
    subscription: str
    attempt: int
    fields: dict[str, str | int | float | bool]


class Journal(Observer):
    """An observer that keeps the last `size` facts other than the happy ones, and exact counts of errors.

    It holds strings and numbers only: never a frame, an exception or a payload.
    """

    interests = ALL_FACTS - _HAPPY

    def __init__(self, size: int = 10_000) -> None:
        self._entries: deque[Entry] = deque(maxlen=size)
        self._reports: deque[ErrorReport] = deque(maxlen=max(1, size // 10))
        self.categories: Counter[str] = Counter()
        self.severities: Counter[str] = Counter()
        self.fingerprints: Counter[str] = Counter()
        #: Entries that the ring has let go of.
        self.dropped = 0

    def on_fact(self, fact: Fact, /) -> None:
        if isinstance(fact, f.AttemptFailed):
            self._reports.append(fact.report)
            self.categories[fact.report.category.value] += 1
            self.severities[fact.report.severity.value] += 1
            if fact.report.fingerprint in self.fingerprints or len(self.fingerprints) < 10_000:
                self.fingerprints[fact.report.fingerprint] += 1
        self.dropped += len(self._entries) == self._entries.maxlen
        self._entries.append(_entry(fact))

    def entries(self, limit: int = 100) -> list[Entry]:
        """The newest entries, oldest first."""
        return list(self._entries)[-limit:]

    def story(self, message_id: str) -> list[Entry]:
        """What the ring still holds of one message, oldest first."""
        return [entry for entry in list(self._entries) if entry.message_id == message_id]

    def reports(self, limit: int = 100) -> list[ErrorReport]:
        """The newest error reports, oldest first."""
        return list(self._reports)[-limit:]


def _entry(fact: Fact) -> Entry:
    _, text, fields = describe(fact)
    delivery: Delivery | None = getattr(fact, "delivery", None)
    envelope = delivery.envelope if delivery is not None else getattr(fact, "envelope", None)
    return Entry(
        at=fact.at,
        fact=type(fact).__name__,
        text=text,
        message_id=envelope.id if envelope is not None else getattr(fact, "message_id", ""),
        subscription=delivery.subscription if delivery is not None else getattr(fact, "subscription", ""),
        attempt=delivery.attempt if delivery is not None else 0,
        fields=fields,
    )
