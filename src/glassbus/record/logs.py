"""The observer that is always there: facts as lines of the standard `logging` module.

The level follows the outcome: a retry that will happen is not an error. One
line for each fact, JSON-free and escaped, never a payload or a header. Logger
`glassbus`; like every library it adds no handler, so without any set-up warnings and worse go to stderr.
"""

from __future__ import annotations

import logging
from typing import Any, assert_never

from glassbus import facts as f
from glassbus.errors import ErrorSeverity
from glassbus.facts import Fact, FactType
from glassbus.observer import ALL_FACTS, Observer

logger = logging.getLogger("glassbus")

#: Too frequent, or said better by another fact.
_QUIET: frozenset[FactType] = frozenset({f.MessagePublished, f.DeliveryHandled, f.RecoveryEnded})

_INFO_AT_MOST: frozenset[FactType] = frozenset({f.AttemptFailed, f.RetryScheduled, f.DeliveryGivenBack})

Line = tuple[int, str, dict[str, Any]]


class LoggingObserver(Observer):
    """Writes facts to the logger `glassbus`, with their fields under `extra["glassbus"]`."""

    interests = ALL_FACTS - _QUIET

    def on_fact(self, fact: Fact, /) -> None:
        # Most retries are at a level that nobody reads: do not describe them first.
        if type(fact) in _INFO_AT_MOST and not logger.isEnabledFor(logging.INFO):
            return
        level, text, fields = describe(fact)
        if logger.isEnabledFor(level):
            shown = " ".join(f"{name}={_escaped(value)}" for name, value in fields.items())
            logger.log(level, "%s %s", text, shown, extra={"glassbus": {"fact": type(fact).__name__, **fields}})


def _escaped(value: object) -> str:
    """One token on one line, whatever the value holds."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if text.isprintable() and " " not in text and text else ascii(text)


def _of(delivery: f.Delivery) -> dict[str, Any]:
    return {
        "message": delivery.envelope.id,
        "topic": delivery.envelope.topic,
        "subscription": delivery.subscription,
        "attempt": delivery.attempt,
    }


def _error(fact: f.AttemptFailed | f.RetryScheduled | f.DeliveryDeadLettered | f.DeadLetterReplayed) -> dict[str, Any]:
    report = fact.report
    return {
        "category": report.category.value,
        "severity": report.severity.value,
        "error": f"{report.exception_type}: {report.message}"[:300],
        "fingerprint": report.fingerprint,
    }


def describe(fact: Fact) -> Line:
    """The level, the sentence and the fields of `fact`."""
    match fact:
        case f.MessagePublished():
            return logging.DEBUG, "published", {"message": fact.envelope.id, "topic": fact.envelope.topic}
        case f.MessageUnrouted():
            return (
                logging.INFO,
                "unrouted: no subscription wants it",
                {
                    "message": fact.envelope.id,
                    "topic": fact.envelope.topic,
                },
            )
        case f.DuplicateRecognised():
            return logging.INFO, "duplicate recognised", {"message": fact.envelope.id, "topic": fact.envelope.topic}
        case f.PublishRefused():
            return (
                logging.WARNING,
                "publish refused",
                {
                    "topic": fact.topic,
                    "message": fact.message_id,
                    "reason": fact.reason,
                    "error": fact.error,
                },
            )
        case f.PublishLeftUncertain():
            return logging.ERROR, "publish uncertain", {"message": fact.envelope.id, "error": fact.error}
        case f.BackpressureApplied():
            return (
                logging.WARNING,
                "publisher slowed by a full queue",
                {
                    "subscription": fact.subscription,
                    "waited_s": fact.waited_s,
                    "admitted": fact.admitted,
                },
            )
        case f.OverflowHandled():
            return logging.ERROR, "queue overflow", {"subscription": fact.subscription, "action": fact.action}
        case f.DeliveryHandled():
            return logging.DEBUG, "handled", {**_of(fact.delivery), "duration_s": fact.duration_s, "late": fact.late}
        case f.DeliveryRedelivered():
            return logging.WARNING, "redelivered", {**_of(fact.delivery), "reason": fact.reason}
        case f.AttemptFailed():
            # The decision about it follows at once, at the level that its outcome deserves.
            return logging.DEBUG, "attempt failed", {**_of(fact.delivery), **_error(fact)}
        case f.AttemptOverdue():
            return logging.WARNING, "handler overdue", {**_of(fact.delivery), "timeout_s": fact.timeout_s}
        case f.AttemptAbandoned():
            return logging.ERROR, "handler abandoned, its slot is lost", {**_of(fact.delivery), "ran_s": fact.ran_s}
        case f.SlotRegained():
            return logging.INFO, "abandoned handler returned", {**_of(fact.delivery), "ran_s": fact.ran_s}
        case f.RetryScheduled():
            return (
                logging.INFO,
                "retry scheduled",
                {
                    **_of(fact.delivery),
                    "delay_s": fact.delay_s,
                    "postponed": fact.postponed,
                    **_error(fact),
                },
            )
        case f.RecoveryEnded():
            return (
                logging.DEBUG,
                "recovery ended",
                {
                    **_of(fact.delivery),
                    "action": fact.action,
                    "outcome": fact.outcome,
                    "duration_s": fact.duration_s,
                },
            )
        case f.DeliveryDeadLettered():
            critical = fact.report.severity is ErrorSeverity.CRITICAL
            return (
                logging.CRITICAL if critical else logging.ERROR,
                "dead-lettered",
                {
                    **_of(fact.delivery),
                    "reason": fact.reason,
                    **_error(fact),
                },
            )
        case f.DeliveryExpired():
            return logging.WARNING, "expired unhandled", _of(fact.delivery)
        case f.DeliveryDiscarded():
            return logging.WARNING, "discarded unhandled", {**_of(fact.delivery), "reason": fact.reason}
        case f.DeliveryGivenBack():
            return logging.INFO, "given back", {**_of(fact.delivery), "reason": fact.reason}
        case f.SettlementRefused():
            return (
                logging.WARNING,
                "settlement refused: the lease had passed on",
                {
                    **_of(fact.delivery),
                    "wanted": fact.wanted,
                },
            )
        case f.BreakerStateChanged():
            bad = fact.to_state in ("open", "forced_open")
            return (
                logging.ERROR if bad else logging.WARNING,
                "breaker moved",
                {
                    "breaker": fact.breaker,
                    "from": fact.from_state,
                    "to": fact.to_state,
                    "reason": fact.reason,
                },
            )
        case f.SubscriptionDeclared():
            return logging.DEBUG, "subscription declared", {"subscription": fact.subscription, "pattern": fact.pattern}
        case f.SubscriptionPaused():
            return logging.WARNING, "subscription paused", {"subscription": fact.subscription}
        case f.SubscriptionResumed():
            return logging.WARNING, "subscription resumed", {"subscription": fact.subscription}
        case f.SubscriptionForgotten():
            return (
                logging.WARNING,
                "subscription forgotten",
                {
                    "subscription": fact.subscription,
                    "discarded": fact.discarded,
                },
            )
        case f.DeadLetterReplayed():
            return logging.WARNING, "dead letter replayed", {**_of(fact.delivery), **_error(fact)}
        case f.DeadLetterDiscarded():
            return logging.WARNING, "dead letter discarded", _of(fact.delivery)
        case f.TransportFailed():
            return (
                logging.ERROR,
                "store failed",
                {
                    "operation": fact.operation,
                    "uncertain": fact.uncertain,
                    "error": fact.error,
                },
            )
        case f.TransportRecovered():
            return logging.WARNING, "store recovered", {"after_s": fact.after_s}
        case f.OwnerLost():
            return (
                logging.WARNING,
                "an owner is gone",
                {
                    "owner": fact.owner,
                    "deliveries": fact.deliveries,
                    "reason": fact.reason,
                },
            )
        case f.LedgerUnbalanced():
            return (
                logging.CRITICAL,
                "ledger unbalanced",
                {
                    "subscription": fact.subscription,
                    "unaccounted": fact.unaccounted,
                },
            )
        case f.BusStarted():
            return logging.INFO, "bus started", {"bus": fact.bus, "transport": fact.transport}
        case f.BusStopped():
            return (
                (logging.INFO if fact.within_deadline and not fact.discarded else logging.WARNING),
                "bus stopped",
                {
                    "bus": fact.bus,
                    "given_back": fact.given_back,
                    "discarded": fact.discarded,
                    "within_deadline": fact.within_deadline,
                },
            )
        case f.ObserverFailed():
            return (
                logging.ERROR,
                "observer failed",
                {
                    "observer": fact.observer,
                    "during": fact.during,
                    "error": fact.error,
                },
            )
        case _:
            assert_never(fact)
