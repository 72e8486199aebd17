"""What went wrong lately, and the story of single messages: a bounded ring in memory."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import msgspec

from glassbus import facts as f
from glassbus.errors import ErrorReport
from glassbus.facts import Fact, FactType
from glassbus.observer import ALL_FACTS, Observer

_HAPPY = frozenset({f.MessagePublished, f.DeliveryHandled})
_FINGERPRINTS_MAX = 10_000

#: Fields of each fact that are plain values, to be kept; what refers to payloads is not.
_KEPT: dict[FactType, tuple[str, ...]] = {
    kind: tuple(
        name
        for name in kind.__struct_fields__
        if name not in ("at", "delivery", "envelope", "report", "causes", "message_id", "subscription")
    )
    for kind in ALL_FACTS
}

#: at, fact type, message id, subscription, attempt, report, kept values
_Record = tuple[float, FactType, str, str, int, ErrorReport | None, tuple[Any, ...]]


class Entry(msgspec.Struct, frozen=True):
    """One fact as plain values. `at` is wall seconds; `report` is that of the failure it is about."""

    at: float
    fact: str
    message_id: str
    subscription: str
    attempt: int
    fields: dict[str, Any]
    report: ErrorReport | None = None


class Journal(Observer):
    """An observer that keeps the last `size` facts other than the happy ones, and exact counts of errors.

    It holds strings and numbers only: never a frame, an exception or a payload.
    """

    interests = ALL_FACTS - _HAPPY

    def __init__(self, size: int = 10_000) -> None:
        self._ring: deque[_Record] = deque(maxlen=size)
        self.categories: Counter[str] = Counter()
        self.severities: Counter[str] = Counter()
        self.fingerprints: Counter[str] = Counter()
        self._stated = 0

    @property
    def dropped(self) -> int:
        """Entries that the ring has let go of."""
        return self._stated - len(self._ring)

    def on_fact(self, fact: Fact, /) -> None:
        kind = type(fact)
        delivery = getattr(fact, "delivery", None)
        if delivery is not None:
            ids = (delivery.envelope.id, delivery.subscription, delivery.attempt)
        else:
            envelope = getattr(fact, "envelope", None)
            message_id = envelope.id if envelope is not None else getattr(fact, "message_id", "")
            ids = (message_id, getattr(fact, "subscription", ""), 0)
        report = getattr(fact, "report", None)
        if isinstance(fact, f.AttemptFailed):
            self._count(fact.report)
        self._stated += 1
        self._ring.append((fact.at, kind, *ids, report, tuple([getattr(fact, name) for name in _KEPT[kind]])))

    def _count(self, report: ErrorReport) -> None:
        self.categories[report.category] += 1
        self.severities[report.severity] += 1
        if report.fingerprint in self.fingerprints or len(self.fingerprints) < _FINGERPRINTS_MAX:
            self.fingerprints[report.fingerprint] += 1

    def entries(self, limit: int = 100) -> list[Entry]:
        """The newest entries, oldest first."""
        return [_entry(record) for record in list(self._ring)[-limit:]]

    def story(self, message_id: str) -> list[Entry]:
        """What the ring still holds of one message, oldest first."""
        return [_entry(record) for record in list(self._ring) if record[2] == message_id]

    def reports(self, limit: int = 100) -> list[ErrorReport]:
        """The newest error reports, oldest first."""
        failed = [record[5] for record in list(self._ring) if record[1] is f.AttemptFailed]
        return [report for report in failed if report is not None][-limit:]


def _entry(record: _Record) -> Entry:
    at, kind, message_id, subscription, attempt, report, kept = record
    return Entry(
        at, kind.__name__, message_id, subscription, attempt, dict(zip(_KEPT[kind], kept, strict=True)), report
    )
