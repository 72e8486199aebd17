"""Everything that the core says happened: one closed union, past tense.

Observers read these; tracing, metrics, logs and the journal are projections of
them. A new fact is added here first, and the type checker then names every
projection that does not handle it (`assert_never`).

A fact is stated after the store has taken what it tells, and never under a lock.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Literal

import msgspec

from glassbus.classification import classify
from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity, safe_text
from glassbus.message import Envelope, Level


class Delivery(msgspec.Struct, eq=False, gc=False):
    """One message on its way through one subscription: the unit of work.

    `attempt` is the run it is claimed for, from 1. `destination` is the bounded
    label of its topic. `first_failed_at` and `recovering` (category and action of
    the recovery under way) travel with it through the store. `redelivered` says
    why the transport gave it again. `handle` belongs to the transport.
    """

    envelope: Envelope
    subscription: str
    destination: str
    attempt: int = 0
    handle: Any = None
    redelivered: Literal["", "owner_died", "lease_expired"] = ""
    first_failed_at: float = 0.0
    recovering: tuple[str, str] | None = None
    replays: int = 0
    started_at: float = 0.0

    def __repr__(self) -> str:
        return f"Delivery({self.envelope.id!r} -> {self.subscription!r}, attempt={self.attempt})"


def without_payload(delivery: Delivery) -> Delivery:
    """A copy that may be kept: it holds no payload, and its attempt stays what it was."""
    envelope = delivery.envelope
    return Delivery(
        Envelope(envelope.id, envelope.topic, b"", "", envelope.headers, published_at=envelope.published_at),
        delivery.subscription,
        delivery.destination,
        delivery.attempt,
        first_failed_at=delivery.first_failed_at,
        recovering=delivery.recovering,
        replays=delivery.replays,
        started_at=delivery.started_at,
    )


Work = Delivery

#: The delivery whose handler runs in this context, if any.
current_delivery: ContextVar[Delivery | None] = ContextVar("glassbus_delivery", default=None)


class _Fact(msgspec.Struct, frozen=True, kw_only=True):
    """`at` is wall time in seconds."""

    at: float


# Publishing


class MessagePublished(_Fact, frozen=True, kw_only=True):
    """Accepted by the store. `duration_s` is the whole publish."""

    envelope: Envelope
    destination: str
    level: Level
    subscriptions: tuple[str, ...]
    duration_s: float


class MessageUnrouted(_Fact, frozen=True, kw_only=True):
    """Accepted, but no subscription wants it: it went nowhere."""

    envelope: Envelope
    destination: str
    duration_s: float


class DuplicateRecognised(_Fact, frozen=True, kw_only=True):
    """This id had been accepted before; nothing was stored."""

    envelope: Envelope
    destination: str
    duration_s: float


class PublishRefused(_Fact, frozen=True, kw_only=True):
    """Certainly not stored. `topic` is as given, capped."""

    topic: str
    destination: str
    message_id: str
    reason: str
    error: str
    duration_s: float


class PublishLeftUncertain(_Fact, frozen=True, kw_only=True):
    """May be stored; the publisher was told to retry with the same id."""

    envelope: Envelope
    destination: str
    error: str
    duration_s: float


class BackpressureApplied(_Fact, frozen=True, kw_only=True):
    """A publisher was made to wait for room in `subscription`."""

    subscription: str
    waited_s: float
    admitted: bool


class OverflowHandled(_Fact, frozen=True, kw_only=True):
    """A rung of the overflow ladder acted on `subscription`, whose capacity is `capacity` afterwards."""

    subscription: str
    action: Literal["dead_letter", "expand", "contract", "refuse"]
    capacity: int = 0


# Attempts


class DeliveryHandled(_Fact, frozen=True, kw_only=True):
    """The handler returned and the store recorded it. `late`: after its timeout."""

    delivery: Delivery
    duration_s: float
    late: bool = False


class DeliveryRedelivered(_Fact, frozen=True, kw_only=True):
    """The transport gave a delivery again because its last owner did not end it."""

    delivery: Delivery
    reason: str


class AttemptFailed(_Fact, frozen=True, kw_only=True):
    """One run of the handler failed. Stated once the decision about it is stored."""

    delivery: Delivery
    report: ErrorReport
    duration_s: float


class AttemptOverdue(_Fact, frozen=True, kw_only=True):
    """The handler passed its timeout and cannot be stopped; it keeps its slot."""

    delivery: Delivery
    timeout_s: float


class AttemptAbandoned(_Fact, frozen=True, kw_only=True):
    """The handler passed `abandon_after`; the delivery is dead-lettered and the slot lost."""

    delivery: Delivery
    ran_s: float


class SlotRegained(_Fact, frozen=True, kw_only=True):
    """An abandoned handler returned after all; its slot works again. Its result is not used."""

    delivery: Delivery
    ran_s: float


class RetryScheduled(_Fact, frozen=True, kw_only=True):
    """Another attempt will be made in `delay_s`. `postponed`: the retry budget was spent.

    `handling_s` is what the failure had cost when this was decided. By the rule in force at most `max_attempts` are
    made, the first `immediate` retries at once; this delay was drawn from 0 to `ceiling_s`, before any postponement.
    """

    delivery: Delivery
    report: ErrorReport
    action: Literal["immediate_retry", "delayed_retry"]
    delay_s: float
    next_attempt: int
    postponed: bool = False
    handling_s: float = 0.0
    max_attempts: int = 0
    immediate: int = 0
    ceiling_s: float = 0.0


class RecoveryEnded(_Fact, frozen=True, kw_only=True):
    """The attempt that a recovery led to has ended. `duration_s` is from the first failure."""

    delivery: Delivery
    category: ErrorCategory
    action: str
    outcome: Literal["succeeded", "failed"]
    duration_s: float


class DeliveryDeadLettered(_Fact, frozen=True, kw_only=True):
    """At rest in the dead-letter queue with its report. `max_attempts`: what the rule in force allowed, where asked."""

    delivery: Delivery
    report: ErrorReport
    reason: Literal["attempts_spent", "not_retryable", "abandoned", "owner_died", "overflow"]
    handling_s: float = 0.0
    max_attempts: int = 0


class DeliveryExpired(_Fact, frozen=True, kw_only=True):
    """Not handled before `expires_in` had passed."""

    delivery: Delivery


class DeliveryDiscarded(_Fact, frozen=True, kw_only=True):
    """Removed unhandled. `reason`: stopped, forgotten or dead_letter."""

    delivery: Delivery
    reason: Literal["stopped", "forgotten", "dead_letter"]


class DeliveryGivenBack(_Fact, frozen=True, kw_only=True):
    """Returned to the queue uncharged, because we ourselves stopped its attempt."""

    delivery: Delivery
    reason: Literal["stopping", "breaker_open"]


class SettlementRefused(_Fact, frozen=True, kw_only=True):
    """The store did not take a settlement: the lease had passed to another owner."""

    delivery: Delivery
    wanted: str


class CodecFellBack(_Fact, frozen=True, kw_only=True):
    """The payload did not decode as `declared` says, but did with the next codec of the list."""

    delivery: Delivery
    declared: str
    used: str


# What adapts to failure


class TimeoutAdapted(_Fact, frozen=True, kw_only=True):
    """The timeout in force of `subscription` changed: longer after a timeout, back towards its own on success."""

    subscription: str
    from_s: float
    to_s: float


class LoadShed(_Fact, frozen=True, kw_only=True):
    """Resources ran out: at most `limit` of `concurrency` attempts run at once from now on."""

    subscription: str
    limit: int
    concurrency: int
    low_priority_held: bool


class LoadRegained(_Fact, frozen=True, kw_only=True):
    """A step back towards the full `concurrency`."""

    subscription: str
    limit: int
    concurrency: int
    low_priority_held: bool


class IntakePaused(_Fact, frozen=True, kw_only=True):
    """The bus refuses publishes for now (`BusOverloaded`), because shedding load did not help."""

    reason: str


class IntakeResumed(_Fact, frozen=True, kw_only=True):
    after_s: float


class RecoveryStarted(_Fact, frozen=True, kw_only=True):
    """A recovery of a component began. `target`: the endpoint, subscription or source.

    Recoveries of single deliveries are RetryScheduled and RecoveryEnded; `handler` is a message that a program
    gave to its `ErrorRecoveryManager`.
    """

    component: Literal["handler", "endpoint", "queue", "resources", "configuration"]
    category: ErrorCategory
    action: str
    target: str
    attempt: int
    error: str


class RecoveryConcluded(_Fact, frozen=True, kw_only=True):
    """How it went. `refused`: the breaker of (component, category) did not let it begin; no start was stated.
    `called_off`: the bus stopped meanwhile, which says nothing about whether it would have worked.

    `duration_s` is from the first failure. `reported`: the error is told by an ErrorReported, and not counted for this.
    """

    component: Literal["handler", "endpoint", "queue", "resources", "configuration"]
    category: ErrorCategory
    action: str
    target: str
    attempt: int
    outcome: Literal["succeeded", "failed", "refused", "called_off"]
    duration_s: float
    error: str = ""
    reported: bool = False


# Breakers and subscriptions


class BreakerStateChanged(_Fact, frozen=True, kw_only=True):
    """A breaker moved. `causes` are the deliveries whose failures counted, newest last, without payloads."""

    breaker: str
    kind: Literal["subscription", "component", "endpoint"]
    subscription: str
    from_state: str
    to_state: str
    reason: str
    causes: tuple[Delivery, ...] = ()


class SubscriptionDeclared(_Fact, frozen=True, kw_only=True):
    """The store collects messages for `subscription` from now on."""

    subscription: str
    pattern: str


class SubscriptionPaused(_Fact, frozen=True, kw_only=True):
    """`reason`: why the bus itself paused it; empty when an operator did."""

    subscription: str
    reason: str = ""


class SubscriptionResumed(_Fact, frozen=True, kw_only=True):
    subscription: str


class SubscriptionForgotten(_Fact, frozen=True, kw_only=True):
    """Gone from the store; `discarded` deliveries went with it."""

    subscription: str
    discarded: int


# Dead letters


class DeadLetterReplayed(_Fact, frozen=True, kw_only=True):
    """Back in the queue of its subscription, attempts at 0. `delivery.replays` counts it."""

    delivery: Delivery
    report: ErrorReport


class DeadLetterDiscarded(_Fact, frozen=True, kw_only=True):
    delivery: Delivery
    report: ErrorReport


# Store, ledger, bus


class TransportFailed(_Fact, frozen=True, kw_only=True):
    """An operation of the store failed. `uncertain`: it may have taken effect."""

    operation: str
    error: str
    category: ErrorCategory
    uncertain: bool


def transport_failed(at: float, operation: str, error: BaseException) -> TransportFailed:
    """The fact that `operation` raised `error` and certainly did nothing."""
    return TransportFailed(
        at=at,
        operation=operation,
        error=f"{type(error).__name__}: {safe_text(error)}",
        category=classify(error)[0],
        uncertain=False,
    )


class TransportRecovered(_Fact, frozen=True, kw_only=True):
    """The store works again, `after_s` after its first failure."""

    after_s: float


class ConnectionLost(_Fact, frozen=True, kw_only=True):
    """The connection to `endpoint` (no credentials in it) is gone, or could not be made."""

    endpoint: str
    category: ErrorCategory
    error: str


class ConnectionRestored(_Fact, frozen=True, kw_only=True):
    """Connected to `endpoint`, `after_s` after the loss. `failed_over_from`: the endpoint used before, if another."""

    endpoint: str
    after_s: float
    attempts: int
    failed_over_from: str = ""


class CredentialsRefreshed(_Fact, frozen=True, kw_only=True):
    """New credentials were asked for, after `endpoint` refused the old ones."""

    endpoint: str
    succeeded: bool
    error: str = ""


class MessageSpooled(_Fact, frozen=True, kw_only=True):
    """Accepted by the local spool, because the broker cannot be reached; it will be forwarded."""

    envelope: Envelope
    destination: str
    duration_s: float


class SpoolForwarded(_Fact, frozen=True, kw_only=True):
    """`messages` of the spool reached `endpoint`; `remaining` still wait."""

    endpoint: str
    messages: int
    remaining: int


class OwnerLost(_Fact, frozen=True, kw_only=True):
    """Another process died, or lost its lease, while it held `deliveries`."""

    owner: str
    deliveries: int
    reason: Literal["owner_died", "lease_expired"]


class LedgerUnbalanced(_Fact, frozen=True, kw_only=True):
    """`unaccounted` messages of `subscription` are nowhere, or in two places. Never expected."""

    subscription: str
    unaccounted: int


class BusStarted(_Fact, frozen=True, kw_only=True):
    bus: str
    transport: str


class BusStopped(_Fact, frozen=True, kw_only=True):
    """`given_back` deliveries are for the next start; `discarded` went with the memory."""

    bus: str
    given_back: int
    discarded: int
    within_deadline: bool


class HealthChanged(_Fact, frozen=True, kw_only=True):
    """Health moved; `detail` names the checks that decided it."""

    from_status: str
    to_status: str
    detail: str


# Escalation


class EscalationOpened(_Fact, frozen=True, kw_only=True):
    """Somebody must know. One is open for each fingerprint at a time."""

    fingerprint: str
    name: str
    severity: ErrorSeverity
    summary: str


class EscalationNotified(_Fact, frozen=True, kw_only=True):
    """A channel was told, or could not be. `notification` counts from 1; `suppressed`: over the rate limit."""

    fingerprint: str
    name: str
    severity: ErrorSeverity
    channel: str
    event: Literal["opened", "still_open", "acknowledged", "resolved"]
    outcome: Literal["sent", "failed", "suppressed"]
    notification: int
    duration_s: float
    error: str = ""


class EscalationAcknowledged(_Fact, frozen=True, kw_only=True):
    fingerprint: str
    name: str
    by: str


class EscalationResolved(_Fact, frozen=True, kw_only=True):
    fingerprint: str
    name: str
    severity: ErrorSeverity
    reason: str
    after_s: float


# Emergency


class EmergencyStopBegan(_Fact, frozen=True, kw_only=True):
    """The bus stops in an emergency; `error` is empty when an operator asked for it."""

    reason: str
    error: str = ""


class EmergencyStopEnded(_Fact, frozen=True, kw_only=True):
    """All is closed. `saved` messages are named in `manifest` (a file name; empty when there was none to write)."""

    reason: str
    saved: int
    manifest: str
    within_deadline: bool
    duration_s: float


class EmergencyReconciled(_Fact, frozen=True, kw_only=True):
    """What an emergency stop left was compared with the store: `missing` of its `saved` messages are nowhere."""

    manifest: str
    saved: int
    restored: int
    missing: int


class ManifestQuarantined(_Fact, frozen=True, kw_only=True):
    """A damaged manifest was moved aside to `moved_to`; nothing of it was used."""

    manifest: str
    moved_to: str
    error: str


# Records and faults


class ErrorReported(_Fact, frozen=True, kw_only=True):
    """A program gave the bus an error of its own to handle (`ProductionMessageBus`); the report says what was tried."""

    report: ErrorReport


class JournalFailed(_Fact, frozen=True, kw_only=True):
    """The journal could not be written; `dropped` entries are not on disk. Told once until it works again."""

    operation: str
    error: str
    dropped: int


class FaultInjected(_Fact, frozen=True, kw_only=True):
    """`glassbus.faults` put a fault in place. Never in production unless somebody asked for it."""

    fault: str
    target: str


class FaultHealed(_Fact, frozen=True, kw_only=True):
    """The fault is taken away. `hits`: how often it struck."""

    fault: str
    target: str
    hits: int


class ObserverFailed(_Fact, frozen=True, kw_only=True):
    """An observer raised. Nothing else was affected. Not shown to the one that raised."""

    observer: str
    during: str
    error: str


Fact = (
    MessagePublished
    | MessageUnrouted
    | DuplicateRecognised
    | PublishRefused
    | PublishLeftUncertain
    | BackpressureApplied
    | OverflowHandled
    | DeliveryHandled
    | DeliveryRedelivered
    | AttemptFailed
    | AttemptOverdue
    | AttemptAbandoned
    | SlotRegained
    | RetryScheduled
    | RecoveryEnded
    | DeliveryDeadLettered
    | DeliveryExpired
    | DeliveryDiscarded
    | DeliveryGivenBack
    | SettlementRefused
    | BreakerStateChanged
    | SubscriptionDeclared
    | SubscriptionPaused
    | SubscriptionResumed
    | SubscriptionForgotten
    | DeadLetterReplayed
    | DeadLetterDiscarded
    | TransportFailed
    | TransportRecovered
    | OwnerLost
    | LedgerUnbalanced
    | BusStarted
    | BusStopped
    | CodecFellBack
    | TimeoutAdapted
    | LoadShed
    | LoadRegained
    | IntakePaused
    | IntakeResumed
    | RecoveryStarted
    | RecoveryConcluded
    | ConnectionLost
    | ConnectionRestored
    | CredentialsRefreshed
    | MessageSpooled
    | SpoolForwarded
    | HealthChanged
    | EscalationOpened
    | EscalationNotified
    | EscalationAcknowledged
    | EscalationResolved
    | EmergencyStopBegan
    | EmergencyStopEnded
    | EmergencyReconciled
    | ManifestQuarantined
    | ErrorReported
    | JournalFailed
    | FaultInjected
    | FaultHealed
    | ObserverFailed
)

FactType = type[Fact]
