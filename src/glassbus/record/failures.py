"""Which facts are errors, and of what kind: one answer for statistics, spans and metrics."""

from __future__ import annotations

from typing import NamedTuple

from glassbus import errors
from glassbus import facts as f
from glassbus.classification import Classification, classify
from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity

#: Every component that an error is counted under.
COMPONENTS = (
    "handler", "publish", "endpoint", "queue", "resources", "configuration", "settlement", "owner", "ledger",
    "observer", "journal", "escalation", "emergency",
)  # fmt: skip


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


def _by_reason() -> dict[str, Classification]:
    kinds: list[type[errors.PublishRejected]] = [errors.PublishRejected]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return {kind.reason: classify(kind.__new__(kind)) for kind in kinds}


_REFUSALS = _by_reason()
_ERRORS = frozenset(
    {
        f.AttemptFailed,
        f.CodecFellBack,
        f.ConnectionLost,
        f.CredentialsRefreshed,
        f.DeliveryDeadLettered,
        f.EmergencyReconciled,
        f.EmergencyStopBegan,
        f.ErrorReported,
        f.EscalationNotified,
        f.IntakePaused,
        f.JournalFailed,
        f.LedgerUnbalanced,
        f.ManifestQuarantined,
        f.ObserverFailed,
        f.OwnerLost,
        f.PublishLeftUncertain,
        f.PublishRefused,
        f.RecoveryConcluded,
        f.SettlementRefused,
        f.SubscriptionPaused,
        f.TransportFailed,
    }
)
_UNKNOWN = (ErrorCategory.MESSAGE_PROCESSING_ERROR, ErrorSeverity.LOW)


def failure_of(fact: f.Fact) -> Failure | None:
    """The error that `fact` is, or None: it tells of none, or of one that another fact has told."""
    if type(fact) not in _ERRORS:  # many looks for the most frequent facts of a failure otherwise
        return None
    match fact:
        case f.AttemptFailed():
            return of_report(fact.report, fact.delivery.destination)
        case f.ErrorReported():
            return of_report(fact.report, "")
        case f.DeliveryDeadLettered():
            # Every other reason follows an f.AttemptFailed, which has counted it.
            told = fact.reason not in ("owner_died", "overflow")
            return None if told else of_report(fact.report, fact.delivery.destination)
        case f.PublishRefused():
            category, severity = _REFUSALS.get(fact.reason, _UNKNOWN)
            return _plain("publish", category, severity, fact.destination, fact.reason, fact.error)
        case f.PublishLeftUncertain():
            kind = (ErrorCategory.CONNECTION_ERROR, ErrorSeverity.HIGH)
            return _plain("publish", *kind, fact.destination, "uncertain", fact.error)
        case f.TransportFailed():
            severity = ErrorSeverity.CRITICAL if fact.uncertain else ErrorSeverity.HIGH
            return _plain("endpoint", fact.category, severity, "", fact.operation, fact.error)
        case f.SettlementRefused():
            kind = (ErrorCategory.TIMEOUT_ERROR, ErrorSeverity.MEDIUM)
            lost = f"the lease had passed to another owner; wanted {fact.wanted}"
            return _plain("settlement", *kind, fact.delivery.destination, "settlement_refused", lost)
        case f.OwnerLost():
            kind = (ErrorCategory.MESSAGE_PROCESSING_ERROR, ErrorSeverity.CRITICAL)
            return _plain("owner", *kind, "", fact.reason, f"owner {fact.owner} held {fact.deliveries} deliveries")
        case f.LedgerUnbalanced():
            kind = (ErrorCategory.MESSAGE_PROCESSING_ERROR, ErrorSeverity.CRITICAL)
            missing = f"{fact.unaccounted} messages of {fact.subscription} are unaccounted for"
            return _plain("ledger", *kind, "", "unbalanced", missing)
        case f.ObserverFailed():
            return _plain("observer", *_UNKNOWN, "", "observer_failed", f"{fact.observer}: {fact.error}")
        case _:
            return _of_recovery(fact)


def _of_recovery(fact: f.Fact) -> Failure | None:
    """The error that a fact of recovering, escalating or recording is, or None."""
    match fact:
        case f.CodecFellBack():
            kind = (ErrorCategory.SERIALIZATION_ERROR, ErrorSeverity.LOW)
            told = f"the payload is not {fact.declared}; {fact.used} could read it"
            return _plain("handler", *kind, fact.delivery.destination, "codec_fell_back", told)
        case f.ConnectionLost():
            return _plain("endpoint", fact.category, ErrorSeverity.HIGH, "", "connection_lost", fact.error)
        case f.CredentialsRefreshed(succeeded=False):
            kind = (ErrorCategory.AUTHENTICATION_ERROR, ErrorSeverity.HIGH)
            return _plain("endpoint", *kind, "", "credentials_refresh", fact.error)
        case f.RecoveryConcluded(outcome="failed", reported=False):
            told = f"{fact.action} of {fact.target}: {fact.error}"
            return _plain(fact.component, fact.category, ErrorSeverity.HIGH, "", fact.action, told)
        case f.IntakePaused():
            kind = (ErrorCategory.RESOURCE_EXHAUSTION, ErrorSeverity.CRITICAL)
            return _plain("resources", *kind, "", "intake_paused", fact.reason)
        case f.SubscriptionPaused() if fact.reason:
            kind = (ErrorCategory.CONFIGURATION_ERROR, ErrorSeverity.HIGH)
            told = f"{fact.subscription} was paused: {fact.reason}"
            return _plain("configuration", *kind, "", "subscription_paused", told)
        case f.EscalationNotified(outcome="failed"):
            kind = (ErrorCategory.CONNECTION_ERROR, ErrorSeverity.HIGH)
            return _plain("escalation", *kind, "", f"channel_{fact.channel}", fact.error)
        case f.JournalFailed():
            kind = (ErrorCategory.RESOURCE_EXHAUSTION, ErrorSeverity.HIGH)
            return _plain("journal", *kind, "", fact.operation, fact.error)
        case f.EmergencyStopBegan() if fact.error:
            kind = (ErrorCategory.RESOURCE_EXHAUSTION, ErrorSeverity.CRITICAL)
            return _plain("emergency", *kind, "", "emergency_stop", f"{fact.reason}: {fact.error}")
        case f.EmergencyReconciled() if fact.missing:
            kind = (ErrorCategory.MESSAGE_PROCESSING_ERROR, ErrorSeverity.CRITICAL)
            told = f"{fact.missing} of {fact.saved} messages in {fact.manifest} are nowhere"
            return _plain("emergency", *kind, "", "messages_missing", told)
        case f.ManifestQuarantined():
            kind = (ErrorCategory.SERIALIZATION_ERROR, ErrorSeverity.CRITICAL)
            return _plain("emergency", *kind, "", "manifest_damaged", f"{fact.manifest}: {fact.error}")
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
