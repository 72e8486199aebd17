"""Which facts somebody must know of, and which facts say that it is over: one table.

Pushed is only what is known inside the bus at that moment. What grows or lasts (rates, ages, depths,
a bus that is gone) is left to the alert rules, so nobody is paged twice for one thing; see `docs/escalation.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any, NamedTuple

from glassbus import facts as f
from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity
from glassbus.facts import Fact, FactType
from glassbus.policy.escalation import RANK, Alarm, Ends

_HIGH, _CRITICAL = ErrorSeverity.HIGH, ErrorSeverity.CRITICAL
_SUMMARY_CAP = 300
#: A broken connection, or a shortage, is nobody's business before so many tries to mend it have failed.
TRIES_MIN = 3
_OPEN = ("open", "forced_open")


class Trigger(NamedTuple):
    """`when` a fact of this type holds, somebody must know: `name`, `severity` (or what yields it), the `subject`
    that tells one such escalation from another, a `summary`, and what ends it. With `Ends.HEALING`, `heals` yields
    the key that a `Healing` must have."""

    fact: FactType
    when: Callable[[Any], bool]
    name: str
    severity: ErrorSeverity | Callable[[Any], ErrorSeverity]
    subject: Callable[[Any], str]
    summary: Callable[[Any], str]
    ends: Ends = Ends.HEALING
    heals: Callable[[Any], str] = lambda _: ""


class Healing(NamedTuple):
    """`when` a fact of this type holds, what has the `key` is over. `reason` is for people."""

    fact: FactType
    when: Callable[[Any], bool]
    key: Callable[[Any], str]
    reason: str


def _always(_: Any) -> bool:
    return True


def _text(report: ErrorReport) -> str:
    return f"{report.exception_type.removeprefix('glassbus.errors.')}: {report.message}"


def _recovery(fact: Any) -> str:
    # Connected again is connected again, by whichever endpoint and after whichever trouble.
    return "recovery/endpoint" if fact.component == "endpoint" else f"recovery/{fact.component}/{fact.target}"


def _recovery_gave_up(fact: f.RecoveryConcluded) -> bool:
    # A message that a program could not recover is told by its own report.
    if fact.component in ("queue", "handler") or fact.outcome in ("succeeded", "called_off"):
        return False
    reconnecting = fact.component == "endpoint" and fact.category is not ErrorCategory.AUTHENTICATION_ERROR
    # Load is shed step by step, too: the first steps need not be enough.
    return fact.attempt >= TRIES_MIN or not (reconnecting or fact.component == "resources")


TRIGGERS: tuple[Trigger, ...] = (
    Trigger(
        f.AttemptFailed,
        lambda fact: fact.report.severity is _CRITICAL,
        "CriticalFailure",
        _CRITICAL,
        lambda fact: fingerprint_of(fact.report),
        lambda fact: f"{_text(fact.report)} (in {fact.delivery.subscription})",
        Ends.QUIET,
    ),
    Trigger(
        f.ErrorReported,
        lambda fact: fact.report.severity is _CRITICAL and not fact.report.escalated,  # else it is already
        "CriticalFailure",
        _CRITICAL,
        lambda fact: fingerprint_of(fact.report),
        lambda fact: _text(fact.report),
        Ends.QUIET,
    ),
    Trigger(
        f.DeliveryDeadLettered,
        _always,  # those below the minimum of the configuration are left out by `Triggers`
        "MessageDeadLettered",
        lambda fact: fact.report.severity,
        lambda fact: fingerprint_of(fact.report),
        lambda fact: f"dead-lettered in {fact.delivery.subscription} ({fact.reason}): {_text(fact.report)}",
        Ends.QUIET,
    ),
    Trigger(
        f.RecoveryConcluded,
        _recovery_gave_up,
        "RecoveryFailed",
        lambda fact: _CRITICAL if fact.category is ErrorCategory.AUTHENTICATION_ERROR else _HIGH,
        _recovery,
        lambda fact: f"{fact.action} of {fact.target} {fact.outcome} at try {fact.attempt}: {fact.error}",
        heals=_recovery,
    ),
    Trigger(
        f.BreakerStateChanged,
        lambda fact: fact.kind != "subscription" and fact.to_state in _OPEN,
        "BreakerOpen",
        _HIGH,
        lambda fact: f"{fact.kind}/{fact.breaker}",
        lambda fact: f"the breaker of {fact.breaker} is {fact.to_state}: {fact.reason}",
        heals=lambda fact: f"breaker/{fact.kind}/{fact.breaker}",
    ),
    Trigger(
        f.BreakerStateChanged,
        # One forced open is an operator's own doing.
        lambda fact: fact.kind == "subscription" and fact.to_state == "open",
        "KillSwitchOpen",
        _HIGH,
        lambda fact: fact.subscription,
        lambda fact: f"{fact.subscription} pauses itself and keeps its messages: {fact.reason}",
        heals=lambda fact: f"breaker/{fact.kind}/{fact.breaker}",
    ),
    Trigger(
        f.SubscriptionPaused,
        lambda fact: bool(fact.reason),
        "SubscriptionPaused",
        _HIGH,
        lambda fact: fact.subscription,
        lambda fact: f"the bus paused {fact.subscription} and keeps its messages: {fact.reason}",
        heals=lambda fact: f"subscription/{fact.subscription}",
    ),
    Trigger(
        f.IntakePaused,
        _always,
        "IntakePaused",
        _CRITICAL,
        lambda _: "",
        lambda fact: f"publishes are refused: {fact.reason}",
        heals=lambda _: "intake",
    ),
    Trigger(
        f.LedgerUnbalanced,
        _always,
        "LedgerUnbalanced",
        _CRITICAL,
        lambda fact: fact.subscription,
        lambda fact: f"{fact.unaccounted} deliveries of {fact.subscription} are unaccounted for",
        Ends.PERSON,
    ),
    Trigger(
        f.JournalFailed,
        _always,
        "RecordsFailed",
        _HIGH,
        lambda fact: fact.operation,
        lambda fact: f"{fact.operation} cannot be written, {fact.dropped} entries are not on disk: {fact.error}",
        # No fact says that it works again: the bus looks.
        heals=lambda fact: f"records/{fact.operation}",
    ),
    Trigger(
        f.EmergencyStopBegan,
        _always,
        "EmergencyStop",
        _CRITICAL,
        lambda _: "",
        lambda fact: f"the bus stops in an emergency: {fact.reason}",
        heals=lambda _: "bus",
    ),
    Trigger(
        f.EmergencyReconciled,
        lambda fact: fact.missing > 0,
        "MessagesMissing",
        _CRITICAL,
        lambda fact: fact.manifest,
        lambda fact: f"{fact.missing} of {fact.saved} messages that {fact.manifest} names are nowhere",
        Ends.PERSON,
    ),
    Trigger(
        f.ManifestQuarantined,
        _always,
        "ManifestQuarantined",
        _CRITICAL,
        lambda fact: fact.manifest,
        lambda fact: f"{fact.manifest} was damaged and is not used; it was moved to {fact.moved_to}: {fact.error}",
        Ends.PERSON,
    ),
)

HEALINGS: tuple[Healing, ...] = (
    Healing(f.RecoveryConcluded, lambda fact: fact.outcome == "succeeded", _recovery, "the recovery succeeded"),
    Healing(
        f.LoadRegained,
        lambda fact: fact.limit >= fact.concurrency and not fact.low_priority_held,
        lambda fact: f"recovery/resources/{fact.subscription}",
        "all of the load is regained",
    ),
    Healing(f.ConnectionRestored, _always, lambda _: "recovery/endpoint", "the connection is back"),
    Healing(
        f.BreakerStateChanged,
        lambda fact: fact.to_state in ("closed", "disabled"),
        lambda fact: f"breaker/{fact.kind}/{fact.breaker}",
        "the breaker closed",
    ),
    Healing(f.SubscriptionResumed, _always, lambda fact: f"subscription/{fact.subscription}", "it was resumed"),
    Healing(f.SubscriptionForgotten, _always, lambda fact: f"subscription/{fact.subscription}", "it was forgotten"),
    Healing(
        f.SubscriptionForgotten,
        _always,
        lambda fact: f"breaker/subscription/{fact.subscription}",
        "the subscription was forgotten",
    ),
    Healing(f.IntakeResumed, _always, lambda _: "intake", "publishes are taken again"),
    Healing(f.BusStarted, _always, lambda _: "bus", "the bus runs again"),
)

#: The names that escalations have.
NAMES: tuple[str, ...] = (*dict.fromkeys(t.name for t in TRIGGERS), "Reported", "TooManyEscalations")


def _by_fact(rows: Any) -> dict[FactType, Any]:
    found: dict[FactType, Any] = {}
    for row in rows:
        found[row.fact] = (*found.get(row.fact, ()), row)
    return found


class Triggers:
    """What a fact asks for. `minimum`: dead letters of less severity than this are nobody's business.

    `facts` are the types to show it.
    """

    _triggers: dict[FactType, tuple[Trigger, ...]] = _by_fact(TRIGGERS)
    _healings: dict[FactType, tuple[Healing, ...]] = _by_fact(HEALINGS)
    facts: frozenset[FactType] = frozenset({*_triggers, *_healings})

    def __init__(self, minimum: ErrorSeverity) -> None:
        self._minimum = RANK[minimum]

    def concerned(self, fact: Fact) -> bool:
        """Whether `alarms` or `healed` may find anything: cheap, for most failures ask for nobody."""
        kind = type(fact)
        if kind in self._healings:
            return True
        for row in self._triggers.get(kind, ()):  # noqa: SIM110 - a generator costs more than the look itself
            if row.when(fact):
                return True
        return False

    def alarms(self, fact: Fact) -> list[Alarm]:
        found = []
        for row in self._triggers.get(type(fact), ()):
            if not row.when(fact):
                continue
            severity = row.severity if isinstance(row.severity, ErrorSeverity) else row.severity(fact)
            if isinstance(fact, f.DeliveryDeadLettered) and RANK[severity] < self._minimum:
                continue
            subject = row.subject(fact)
            by_site = isinstance(fact, f.AttemptFailed | f.DeliveryDeadLettered | f.ErrorReported)
            found.append(
                Alarm(
                    subject if by_site else fingerprint(row.name, subject),
                    row.name,
                    severity,
                    capped(row.summary(fact)),
                    row.ends,
                    row.heals(fact),
                )
            )
        return found

    def healed(self, fact: Fact) -> list[tuple[str, str]]:
        """Keys of what is over, each with the reason."""
        return [(row.key(fact), row.reason) for row in self._healings.get(type(fact), ()) if row.when(fact)]


def of_report(report: ErrorReport) -> Alarm:
    """What a program asks to have escalated by itself."""
    name = "CriticalFailure" if report.severity is _CRITICAL else "Reported"
    return Alarm(fingerprint_of(report), name, report.severity, capped(_text(report)))


def fingerprint_of(report: ErrorReport) -> str:
    """That of the report; one is made where it has none."""
    return report.fingerprint or fingerprint(report.component, f"{report.category}/{report.exception_type}")


def fingerprint(name: str, subject: str) -> str:
    """In the form of a failure's: 16 hexadecimal digits."""
    return blake2b(f"{name}|{subject}".encode("utf-8", "replace"), digest_size=8).hexdigest()


def capped(text: str) -> str:
    return text if len(text) <= _SUMMARY_CAP else text[: _SUMMARY_CAP - 1] + "…"
