"""The observer that is always there: facts as lines of the standard `logging` module.

The level follows the outcome: a retry that will happen is not an error. One
line for each fact, JSON-free and escaped, never a payload or a header. Logger
`glassbus`; like every library it adds no handler, so without any set-up warnings and worse go to stderr.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from logging import CRITICAL, DEBUG, ERROR, INFO, WARNING
from typing import Any, NamedTuple

from glassbus import facts as f
from glassbus.errors import ErrorReport, ErrorSeverity
from glassbus.facts import Fact, FactType
from glassbus.message import Envelope
from glassbus.observer import ALL_FACTS, Observer, TraceOf

logger = logging.getLogger("glassbus")

#: Too frequent, or said better by another fact.
_QUIET: frozenset[FactType] = frozenset({f.MessagePublished, f.DeliveryHandled, f.RecoveryEnded})

_INFO_AT_MOST: frozenset[FactType] = frozenset({f.AttemptFailed, f.RetryScheduled, f.DeliveryGivenBack})


class Line(NamedTuple):
    """How a fact is told: its level (or what yields it), a sentence, and the fields to show after it.

    `delivery`, `envelope` and `report` stand for the fields that tell of them.
    """

    level: int | Callable[[Any], int]
    text: str
    fields: tuple[str, ...] = ()


def _if_bad(is_bad: Callable[[Any], bool], bad: int, otherwise: int) -> Callable[[Any], int]:
    return lambda fact: bad if is_bad(fact) else otherwise


LINES: dict[FactType, Line] = {
    f.MessagePublished: Line(DEBUG, "published", ("envelope",)),
    f.MessageUnrouted: Line(INFO, "unrouted: no subscription wants it", ("envelope",)),
    f.DuplicateRecognised: Line(INFO, "duplicate recognised", ("envelope",)),
    f.PublishRefused: Line(WARNING, "publish refused", ("topic", "message_id", "reason", "error")),
    f.PublishLeftUncertain: Line(ERROR, "publish uncertain", ("envelope", "error")),
    f.BackpressureApplied: Line(WARNING, "publisher slowed by a full queue", ("subscription", "waited_s", "admitted")),
    f.OverflowHandled: Line(
        _if_bad(lambda fact: fact.action in ("dead_letter", "refuse"), ERROR, WARNING),
        "queue overflow",
        ("subscription", "action", "capacity"),
    ),
    f.DeliveryHandled: Line(DEBUG, "handled", ("delivery", "duration_s", "late")),
    f.DeliveryRedelivered: Line(WARNING, "redelivered", ("delivery", "reason")),
    # The decision about it follows at once, at the level that its outcome deserves.
    f.AttemptFailed: Line(DEBUG, "attempt failed", ("delivery", "report")),
    f.AttemptOverdue: Line(WARNING, "handler overdue", ("delivery", "timeout_s")),
    f.AttemptAbandoned: Line(ERROR, "handler abandoned, its slot is lost", ("delivery", "ran_s")),
    f.SlotRegained: Line(INFO, "abandoned handler returned", ("delivery", "ran_s")),
    f.RetryScheduled: Line(INFO, "retry scheduled", ("delivery", "delay_s", "postponed", "report")),
    f.RecoveryEnded: Line(DEBUG, "recovery ended", ("delivery", "action", "outcome", "duration_s")),
    f.DeliveryDeadLettered: Line(
        _if_bad(lambda fact: fact.report.severity is ErrorSeverity.CRITICAL, CRITICAL, ERROR),
        "dead-lettered",
        ("delivery", "reason", "report"),
    ),
    f.DeliveryExpired: Line(WARNING, "expired unhandled", ("delivery",)),
    f.DeliveryDiscarded: Line(WARNING, "discarded unhandled", ("delivery", "reason")),
    f.DeliveryGivenBack: Line(INFO, "given back", ("delivery", "reason")),
    f.SettlementRefused: Line(WARNING, "settlement refused: the lease had passed on", ("delivery", "wanted")),
    f.CodecFellBack: Line(WARNING, "payload decoded by another codec", ("delivery", "declared", "used")),
    f.TimeoutAdapted: Line(
        _if_bad(lambda fact: fact.to_s > fact.from_s, WARNING, INFO),
        "timeout adapted",
        ("subscription", "from_s", "to_s"),
    ),
    f.LoadShed: Line(WARNING, "load shed", ("subscription", "limit", "concurrency", "low_priority_held")),
    f.LoadRegained: Line(INFO, "load regained", ("subscription", "limit", "concurrency", "low_priority_held")),
    f.IntakePaused: Line(CRITICAL, "intake paused", ("reason",)),
    f.IntakeResumed: Line(WARNING, "intake resumed", ("after_s",)),
    f.RecoveryStarted: Line(
        WARNING, "recovery started", ("component", "category", "action", "target", "attempt", "error")
    ),
    f.RecoveryConcluded: Line(
        _if_bad(lambda fact: fact.outcome in ("failed", "refused"), ERROR, WARNING),
        "recovery concluded",
        ("component", "category", "action", "target", "attempt", "outcome", "duration_s", "error"),
    ),
    f.BreakerStateChanged: Line(
        _if_bad(lambda fact: fact.to_state in ("open", "forced_open"), ERROR, WARNING),
        "breaker moved",
        ("breaker", "kind", "from_state", "to_state", "reason"),
    ),
    f.SubscriptionDeclared: Line(DEBUG, "subscription declared", ("subscription", "pattern")),
    f.SubscriptionPaused: Line(
        _if_bad(lambda fact: bool(fact.reason), ERROR, WARNING), "subscription paused", ("subscription", "reason")
    ),
    f.SubscriptionResumed: Line(WARNING, "subscription resumed", ("subscription",)),
    f.SubscriptionForgotten: Line(WARNING, "subscription forgotten", ("subscription", "discarded")),
    f.DeadLetterReplayed: Line(WARNING, "dead letter replayed", ("delivery", "report")),
    f.DeadLetterDiscarded: Line(WARNING, "dead letter discarded", ("delivery",)),
    f.TransportFailed: Line(ERROR, "store failed", ("operation", "uncertain", "error")),
    f.TransportRecovered: Line(WARNING, "store recovered", ("after_s",)),
    f.ConnectionLost: Line(ERROR, "connection lost", ("endpoint", "category", "error")),
    f.ConnectionRestored: Line(WARNING, "connection restored", ("endpoint", "after_s", "attempts", "failed_over_from")),
    f.CredentialsRefreshed: Line(
        _if_bad(lambda fact: not fact.succeeded, ERROR, WARNING),
        "credentials refreshed",
        ("endpoint", "succeeded", "error"),
    ),
    f.MessageSpooled: Line(INFO, "spooled until the broker is back", ("envelope",)),
    f.SpoolForwarded: Line(WARNING, "spool forwarded", ("endpoint", "messages", "remaining")),
    f.OwnerLost: Line(WARNING, "an owner is gone", ("owner", "deliveries", "reason")),
    f.LedgerUnbalanced: Line(CRITICAL, "ledger unbalanced", ("subscription", "unaccounted")),
    f.BusStarted: Line(INFO, "bus started", ("bus", "transport")),
    f.BusStopped: Line(
        _if_bad(lambda fact: fact.discarded or not fact.within_deadline, WARNING, INFO),
        "bus stopped",
        ("bus", "given_back", "discarded", "within_deadline"),
    ),
    f.HealthChanged: Line(
        _if_bad(lambda fact: fact.to_status in ("degraded", "critical"), ERROR, INFO),
        "health changed",
        ("from_status", "to_status", "detail"),
    ),
    # The log channel, which is always there, tells it in full.
    f.EscalationOpened: Line(DEBUG, "escalated", ("name", "severity", "fingerprint", "summary")),
    f.EscalationNotified: Line(
        _if_bad(lambda fact: fact.outcome == "failed", ERROR, INFO),
        "escalation notified",
        ("name", "severity", "channel", "event", "outcome", "notification", "error"),
    ),
    f.EscalationAcknowledged: Line(INFO, "escalation acknowledged", ("name", "fingerprint", "by")),
    f.EscalationResolved: Line(WARNING, "escalation resolved", ("name", "fingerprint", "reason", "after_s")),
    f.EmergencyStopBegan: Line(CRITICAL, "emergency stop", ("reason", "error")),
    f.EmergencyStopEnded: Line(
        CRITICAL, "emergency stop ended", ("reason", "saved", "manifest", "within_deadline", "duration_s")
    ),
    f.EmergencyReconciled: Line(
        _if_bad(lambda fact: fact.missing > 0, CRITICAL, WARNING),
        "emergency reconciled",
        ("manifest", "saved", "restored", "missing"),
    ),
    f.ManifestQuarantined: Line(CRITICAL, "manifest quarantined", ("manifest", "moved_to", "error")),
    f.ErrorReported: Line(
        _if_bad(lambda fact: fact.report.severity is ErrorSeverity.CRITICAL, CRITICAL, DEBUG),
        "error reported",
        ("report",),
    ),
    f.JournalFailed: Line(ERROR, "journal failed", ("operation", "error", "dropped")),
    f.FaultInjected: Line(WARNING, "fault injected", ("fault", "target")),
    f.FaultHealed: Line(WARNING, "fault healed", ("fault", "target", "hits")),
    f.ObserverFailed: Line(ERROR, "observer failed", ("observer", "during", "error")),
}


class LoggingObserver(Observer):
    """Writes facts to the logger `glassbus`, with their fields under `extra["glassbus"]`.

    `trace_of` names the trace that shows a fact about a delivery, where there is one.
    """

    interests = ALL_FACTS - _QUIET

    def __init__(self) -> None:
        self.trace_of: TraceOf = lambda _kind, _delivery, _reason: {}

    def on_fact(self, fact: Fact, /) -> None:
        # Most retries are at a level that nobody reads: do not describe them first.
        if type(fact) in _INFO_AT_MOST and not logger.isEnabledFor(INFO):
            return
        line = LINES[type(fact)]
        level = line.level if isinstance(line.level, int) else line.level(fact)
        if logger.isEnabledFor(level):
            fields = _fields(fact, line)
            delivery = getattr(fact, "delivery", None)
            if delivery is not None:
                traced = self.trace_of(
                    type(fact), delivery, getattr(fact, "reason", "") or getattr(fact, "outcome", "")
                )
                fields.update((name, traced[name]) for name in ("trace_id", "span_id") if name in traced)
            shown = " ".join(f"{name}={_escaped(value)}" for name, value in fields.items())
            logger.log(level, "%s %s", line.text, shown, extra={"glassbus": {"fact": type(fact).__name__, **fields}})


def _fields(fact: Fact, line: Line) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in line.fields:
        value = getattr(fact, name)
        if name == "delivery":
            fields.update(_of_envelope(value.envelope), subscription=value.subscription, attempt=value.attempt)
        elif name == "envelope":
            fields.update(_of_envelope(value))
        elif name == "report":
            fields.update(_of_report(value))
        else:
            fields[name] = value
    return fields


def _of_envelope(envelope: Envelope) -> dict[str, Any]:
    return {"message": envelope.id, "topic": envelope.topic}


def _of_report(report: ErrorReport) -> dict[str, Any]:
    return {
        "category": report.category.value,
        "severity": report.severity.value,
        "error": f"{report.exception_type}: {report.message}"[:300],
        "fingerprint": report.fingerprint,
    }


def _escaped(value: object) -> str:
    """One token on one line, whatever the value holds."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if text.isprintable() and " " not in text and text else ascii(text)
