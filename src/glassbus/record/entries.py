"""What the journal keeps of a fact, and its lines on disk.

Plain values only: no payload, no header, no exception. A line is one JSON object; `kind` tells which.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import msgspec

from glassbus import facts as f
from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity
from glassbus.facts import Delivery, Fact, FactType
from glassbus.message import Envelope
from glassbus.observer import ALL_FACTS, TraceOf
from glassbus.record.plain import STACK_CAP, plain, plain_report, text

#: Fields of each fact that are plain values, to be kept; what refers to payloads is not.
KEPT: dict[FactType, tuple[str, ...]] = {
    kind: tuple(
        name
        for name in kind.__struct_fields__
        if name not in ("at", "delivery", "envelope", "report", "causes", "message_id", "subscription")
    )
    for kind in ALL_FACTS
}

#: Facts that a message may have many of without anything being wrong: on disk only once it has failed.
QUIET: frozenset[FactType] = frozenset(
    {f.MessageUnrouted, f.DuplicateRecognised, f.MessageSpooled, f.DeliveryGivenBack, f.BackpressureApplied}
)
#: Facts of a bus that comes and goes: on disk before the first thing that is worth a file.
LIFECYCLE: frozenset[FactType] = frozenset({f.BusStarted, f.BusStopped, f.SubscriptionDeclared})

#: What besides its id names the trace of a message: its `traceparent`, and of a delivery how often it was replayed,
#: the recovery under way, and when its attempt began.
Track = tuple[str, int, tuple[str, str] | None, float]
#: number, at, fact type, message id, subscription, attempt, report, kept values, topic, published_at, error, track
Record = tuple[
    int, float, FactType, str, str, int, ErrorReport | None, Any, str, float, bool, Track | None
]  # fmt: skip


class Entry(msgspec.Struct, frozen=True):
    """One fact as plain values. `at` is wall seconds; `report` is that of the failure it is about.

    `topic` and `published_at` are of its message, where it is about one. `number` counts what one process stated.
    `error`: this fact is the failure, and is counted; others only refer to it. `replays` of its delivery were before
    it; `started_at` is when its attempt began, if that is known. The trace that shows it, in hex, where traces were
    recorded: `span_id` is the attempt, or the replay, and `parent_id` the publish or replay above it.
    """

    at: float
    fact: str
    message_id: str
    subscription: str
    attempt: int
    fields: dict[str, Any]
    report: ErrorReport | None = None
    topic: str = ""
    published_at: float = 0.0
    number: int = 0
    error: bool = False
    replays: int = 0
    started_at: float = 0.0
    trace_id: str = ""
    span_id: str = ""
    parent_id: str = ""


def _reader(names: tuple[str, ...]) -> Callable[[Fact], Any]:
    if not names:
        return lambda _fact: ()
    return attrgetter(*names)


_READ: dict[FactType, Callable[[Fact], Any]] = {kind: _reader(names) for kind, names in KEPT.items()}
#: How to find the message of a fact: 2 by its delivery, 1 by its envelope, 0 by its own fields.
_ABOUT: dict[FactType, int] = {
    kind: 2 if "delivery" in kind.__struct_fields__ else int("envelope" in kind.__struct_fields__) for kind in ALL_FACTS
}


def record_of(number: int, fact: Fact, report: ErrorReport | None, error: bool) -> Record:
    """What is kept of `fact`; it refers to nothing that holds a payload."""
    kind = type(fact)
    about = _ABOUT[kind]
    if about == 2:
        delivery = fact.delivery  # type: ignore[union-attr]
        envelope = delivery.envelope
        headers = envelope.headers
        track = (
            headers.get("traceparent", "") if headers else "",
            delivery.replays, delivery.recovering, delivery.started_at,
        )  # fmt: skip
        return (
            number, fact.at, kind, envelope.id, delivery.subscription, delivery.attempt, report, _READ[kind](fact),
            envelope.topic, envelope.published_at, error, track,
        )  # fmt: skip
    kept = _READ[kind](fact)
    if about:
        envelope = fact.envelope  # type: ignore[union-attr]
        return (
            number, fact.at, kind, envelope.id, "", 0, report, kept, envelope.topic, envelope.published_at, error, None,
        )  # fmt: skip
    message_id, subscription, topic = (getattr(fact, name, "") for name in ("message_id", "subscription", "topic"))
    return number, fact.at, kind, message_id, subscription, 0, report, kept, topic, 0.0, error, None


def entry_of(record: Record, trace_of: TraceOf | None = None) -> Entry:
    """`record` for people and programs; `trace_of` says in which trace it is."""
    number, at, kind, message_id, subscription, attempt, report, kept, topic, published_at, error, track = record
    names = KEPT[kind]
    values = (kept,) if len(names) == 1 else kept
    fields = {name: plain(value) for name, value in zip(names, values, strict=True)}
    traced: dict[str, str] = {}
    if track is None:
        track = ("", 0, None, 0.0)
    elif trace_of is not None:
        headers = {"traceparent": track[0]} if track[0] else {}
        envelope = Envelope(message_id, topic, b"", "", headers, published_at=published_at)
        delivery = Delivery(envelope, subscription, "", attempt, recovering=track[2], replays=track[1])
        traced = trace_of(kind, delivery, fields.get("reason") or fields.get("outcome") or "")
    return Entry(
        at, kind.__name__, message_id, subscription, attempt, fields, report, topic, published_at, number, error,
        track[1], track[3], **traced,
    )  # fmt: skip


# Lines

FORMAT = 1


class StartLine(msgspec.Struct, tag_field="kind", tag="start"):
    """The first line of each file: whose it is. Times are wall seconds; `level` is that of what its bus publishes."""

    format: int
    process: str
    pid: int
    bus: str
    at: float
    level: str = ""


class SiteLine(msgspec.Struct, tag_field="kind", tag="site"):
    """The stack of a fingerprint, once in each file: reports there have none."""

    fingerprint: str
    stack_trace: str


class ReportLine(msgspec.Struct, omit_defaults=True):
    """An ErrorReport without its stack. Strings where it has enumerations: a later version may know more."""

    error_id: str
    timestamp: float
    category: str
    severity: str
    message: str
    exception_type: str = ""
    context: dict[str, Any] = msgspec.field(default_factory=dict)
    recovery_attempted: bool = False
    recovery_successful: bool = False
    retry_count: int = 0
    escalated: bool = False
    fingerprint: str = ""
    component: str = "handler"


class FactLine(msgspec.Struct, tag_field="kind", tag="fact", omit_defaults=True):
    """One fact, as an Entry has it."""

    number: int
    at: float
    fact: str
    message_id: str = ""
    subscription: str = ""
    attempt: int = 0
    fields: dict[str, Any] = msgspec.field(default_factory=dict)
    report: ReportLine | None = None
    topic: str = ""
    published_at: float = 0.0
    error: bool = False
    replays: int = 0
    started_at: float = 0.0
    trace_id: str = ""
    span_id: str = ""
    parent_id: str = ""


class FloodLine(msgspec.Struct, tag_field="kind", tag="flood", omit_defaults=True):
    """`count` facts alike between `since` and `at` that have no lines of their own; `report` is that of the last.

    `outcome` is that of recoveries, `duration_s` their sum.
    """

    at: float
    since: float
    fact: str
    count: int
    subscription: str = ""
    report: ReportLine | None = None
    error: bool = False
    outcome: str = ""
    duration_s: float = 0.0


class LostLine(msgspec.Struct, tag_field="kind", tag="lost"):
    """`count` entries are missing before this line: the disk or the writer could not keep up."""

    at: float
    count: int


Line = StartLine | SiteLine | FactLine | FloodLine | LostLine

encode = msgspec.json.Encoder().encode
_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


def decode(line: bytes) -> Line:
    """Raises msgspec.MsgspecError or UnicodeDecodeError for a line that is torn, or not ours."""
    return _decoder.decode(line)


def report_line(report: ErrorReport) -> ReportLine:
    kept = plain_report(report)
    return ReportLine(
        kept.error_id,
        kept.timestamp,
        str(kept.category),
        str(kept.severity),
        kept.message,
        kept.exception_type,
        kept.context,
        kept.recovery_attempted,
        kept.recovery_successful,
        kept.retry_count,
        kept.escalated,
        kept.fingerprint,
        kept.component,
    )


def report_of(line: ReportLine | None, stack_trace: str = "") -> ErrorReport | None:
    """The report of a line; a category or severity of another version is taken for the mildest."""
    if line is None:
        return None
    values = {name: getattr(line, name) for name in ReportLine.__struct_fields__}
    category, severity = values.pop("category"), values.pop("severity")
    known = category in ErrorCategory.__members__.values(), severity in ErrorSeverity.__members__.values()
    return ErrorReport(
        category=ErrorCategory(category) if known[0] else ErrorCategory.MESSAGE_PROCESSING_ERROR,
        severity=ErrorSeverity(severity) if known[1] else ErrorSeverity.LOW,
        stack_trace=stack_trace,
        **values,
    )


def site_line(report: ErrorReport) -> SiteLine:
    return SiteLine(text(report.fingerprint, 100), text(report.stack_trace, STACK_CAP))


def fact_line(record: Record, trace_of: TraceOf | None = None) -> FactLine:
    entry = entry_of(record, trace_of)
    return FactLine(
        entry.number,
        entry.at,
        entry.fact,
        text(entry.message_id),
        text(entry.subscription),
        entry.attempt,
        entry.fields,
        report_line(entry.report) if entry.report is not None else None,
        text(entry.topic),
        entry.published_at,
        entry.error,
        entry.replays,
        entry.started_at,
        entry.trace_id,
        entry.span_id,
        entry.parent_id,
    )


def entry_of_line(line: FactLine, stack_trace: str = "") -> Entry:
    return Entry(
        line.at,
        line.fact,
        line.message_id,
        line.subscription,
        line.attempt,
        line.fields,
        report_of(line.report, stack_trace),
        line.topic,
        line.published_at,
        line.number,
        line.error,
        line.replays,
        line.started_at,
        line.trace_id,
        line.span_id,
        line.parent_id,
    )
