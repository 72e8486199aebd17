"""Which facts are errors, and of what kind: one answer for spans and for metrics."""

from __future__ import annotations

from typing import NamedTuple

from glassbus import errors
from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity, classify
from glassbus.facts import (
    AttemptFailed,
    DeliveryDeadLettered,
    Fact,
    LedgerUnbalanced,
    ObserverFailed,
    OwnerLost,
    PublishLeftUncertain,
    PublishRefused,
    SettlementRefused,
    TransportFailed,
)

#: Every component that an error is counted under.
COMPONENTS = ("handler", "publish", "endpoint", "queue", "settlement", "owner", "ledger", "observer")


class Failure(NamedTuple):
    """An error, as its span and its counter tell it. `site`: failures alike, for the flood budget."""

    component: str
    category: str
    severity: str
    destination: str
    kind: str
    message: str
    site: str
    report: ErrorReport | None = None


def _by_reason() -> dict[str, errors.Classification]:
    kinds: list[type[errors.PublishRejected]] = [errors.PublishRejected]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return {kind.reason: classify(kind.__new__(kind)) for kind in kinds}


_REFUSALS = _by_reason()
_ERRORS = frozenset(
    {
        AttemptFailed,
        DeliveryDeadLettered,
        LedgerUnbalanced,
        ObserverFailed,
        OwnerLost,
        PublishLeftUncertain,
        PublishRefused,
        SettlementRefused,
        TransportFailed,
    }
)
_UNKNOWN = (ErrorCategory.MESSAGE_PROCESSING_ERROR, ErrorSeverity.LOW)


def failure_of(fact: Fact) -> Failure | None:
    """The error that `fact` is, or None: it tells of none, or of one that another fact has told."""
    if type(fact) not in _ERRORS:  # nine looks for the most frequent facts of a failure otherwise
        return None
    match fact:
        case AttemptFailed():
            return of_report(fact.report, fact.delivery.destination)
        case DeliveryDeadLettered():
            # Every other reason follows an AttemptFailed, which has counted it.
            told = fact.reason not in ("owner_died", "overflow")
            return None if told else of_report(fact.report, fact.delivery.destination)
        case PublishRefused():
            category, severity = _REFUSALS.get(fact.reason, _UNKNOWN)
            return _plain("publish", category, severity, fact.destination, fact.reason, fact.error)
        case PublishLeftUncertain():
            kind = (ErrorCategory.CONNECTION_ERROR, ErrorSeverity.HIGH)
            return _plain("publish", *kind, fact.destination, "uncertain", fact.error)
        case TransportFailed():
            severity = ErrorSeverity.CRITICAL if fact.uncertain else ErrorSeverity.HIGH
            return _plain("endpoint", fact.category, severity, "", fact.operation, fact.error)
        case SettlementRefused():
            kind = (ErrorCategory.TIMEOUT_ERROR, ErrorSeverity.MEDIUM)
            lost = f"the lease had passed to another owner; wanted {fact.wanted}"
            return _plain("settlement", *kind, fact.delivery.destination, "settlement_refused", lost)
        case OwnerLost():
            kind = (ErrorCategory.MESSAGE_PROCESSING_ERROR, ErrorSeverity.CRITICAL)
            return _plain("owner", *kind, "", fact.reason, f"owner {fact.owner} held {fact.deliveries} deliveries")
        case LedgerUnbalanced():
            kind = (ErrorCategory.MESSAGE_PROCESSING_ERROR, ErrorSeverity.CRITICAL)
            missing = f"{fact.unaccounted} messages of {fact.subscription} are unaccounted for"
            return _plain("ledger", *kind, "", "unbalanced", missing)
        case ObserverFailed():
            return _plain("observer", *_UNKNOWN, "", "observer_failed", f"{fact.observer}: {fact.error}")
        case _:
            return None


def of_report(report: ErrorReport, destination: str) -> Failure:
    kind = report.exception_type or "unknown"
    return Failure(
        report.component,
        report.category._value_,  # `value` is a property, four times as slow
        report.severity._value_,
        destination,
        kind,
        report.message,
        report.fingerprint or kind,
        report,
    )


def _plain(
    component: str, category: ErrorCategory, severity: ErrorSeverity, destination: str, kind: str, message: str
) -> Failure:
    site = f"{component}:{kind}:{destination}"
    return Failure(component, category.value, severity.value, destination, kind, message, site)
