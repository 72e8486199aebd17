"""The telemetry contract: every metric and every span, declared once, as data.

Nothing is emitted that is not here. Dashboards, alerts, the reference docs and the
tests read this; a fact without an entry in `PROJECTIONS` breaks a test.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from glassbus import facts
from glassbus.classification import CLASSIFICATIONS
from glassbus.errors import ErrorCategory, ErrorSeverity
from glassbus.facts import FactType
from glassbus.policy.breaker import LEGAL, BreakerState
from glassbus.record.failures import COMPONENTS
from glassbus.record.tally import AGE_BOUNDS, DURATION_BOUNDS

PREFIX = "glassbus_"

CATEGORIES = tuple(c.value for c in ErrorCategory)
SEVERITIES = tuple(s.value for s in ErrorSeverity)
BREAKER_STATES = tuple(s.value for s in BreakerState)
BREAKER_KINDS = ("subscription", "component", "endpoint")
SUBSCRIPTION_STATES = ("running", "paused", "breaker_open", "stopped")
HEALTH_STATES = ("healthy", "degraded", "critical", "unknown")
QUEUE_STATES = ("ready", "scheduled", "retrying", "in_flight")
RESULTS = ("handled", "dead_lettered", "expired", "discarded")
PUBLISH_OUTCOMES = ("accepted", "spooled", "unrouted", "duplicate", "rejected", "uncertain")
ATTEMPT_OUTCOMES = ("succeeded", "late", "failed")
RETRY_ACTIONS = ("immediate_retry", "delayed_retry")
#: What is done for a component, and what a program's own managers are asked to do (none: there was nothing to do).
COMPONENT_ACTIONS = (
    "reconnect", "failover", "refresh_credentials", "expand", "backpressure", "shed", "pause_intake", "reload",
    "last_known_good", "pause_subscription", "increase_timeout", "fallback_codec", "dead_letter", "custom", "none",
)  # fmt: skip
ACTIONS = (*RETRY_ACTIONS, *COMPONENT_ACTIONS)
#: (component, category, action) of recoveries that the bus makes by itself: at 0 from the start, their breakers closed.
COMPONENT_RECOVERIES = (
    ("endpoint", "connection_error", "reconnect"),
    ("endpoint", "connection_error", "failover"),
    ("endpoint", "authentication_error", "refresh_credentials"),
    ("queue", "queue_overflow", "expand"),
    ("resources", "resource_exhaustion", "shed"),
    ("configuration", "configuration_error", "reload"),
    ("configuration", "configuration_error", "last_known_good"),
)
#: (category, severity) that the built-in rules can yield: at 0 from the start.
PAIRS = tuple(sorted((c.value, s.value) for c, s in CLASSIFICATIONS))
#: Transitions that happen by themselves: at 0 from the start.
USUAL_MOVES = (("closed", "open"), ("open", "half_open"), ("half_open", "closed"), ("half_open", "open"))

#: A label whose values are not listed: `ANY` is bounded by what the program declares.
ANY: tuple[str, ...] = ()


class Metric(NamedTuple):
    """A metric family. `labels` come after `bus`, each with its allowed values. `source`: facts or fields."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    labels: dict[str, tuple[str, ...]]
    source: str
    unit: str = ""
    bounds: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        """As it is scraped, without the suffixes of histogram series."""
        return PREFIX + self.name


_SUB = {"subscription": ANY}
_SUB_DEST = {"destination": ANY, "subscription": ANY}
_BREAKER = {"breaker": ANY, "kind": BREAKER_KINDS}

METRICS: tuple[Metric, ...] = (
    # Messages
    Metric(
        "messages_published_total",
        "counter",
        "Publishes, by what became of them. Only accepted ones are stored.",
        {"destination": ANY, "outcome": PUBLISH_OUTCOMES},
        "PublishTally.accepted, MessageSpooled, MessageUnrouted, DuplicateRecognised, PublishRefused, "
        "PublishLeftUncertain",
    ),
    Metric(
        "publish_duration_seconds",
        "histogram",
        "Time that a publish took, until the store had it or refused it.",
        {"destination": ANY, "outcome": PUBLISH_OUTCOMES},
        "PublishTally.duration, MessageSpooled, MessageUnrouted, DuplicateRecognised, PublishRefused, "
        "PublishLeftUncertain",
        "seconds",
        DURATION_BOUNDS,
    ),
    Metric(
        "messages_settled_total",
        "counter",
        "Deliveries that came to their end, by how.",
        {**_SUB_DEST, "result": RESULTS},
        "Tally.handled, DeliveryDeadLettered, DeliveryExpired, DeliveryDiscarded",
    ),
    Metric(
        "message_age_seconds",
        "histogram",
        "Time from publish, or from when it was due, to the end of a delivery.",
        {**_SUB_DEST, "result": RESULTS},
        "Tally.age, DeliveryDeadLettered, DeliveryExpired, DeliveryDiscarded",
        "seconds",
        AGE_BOUNDS,
    ),
    Metric(
        "process_duration_seconds",
        "histogram",
        "Time that one attempt took. late: it returned after its timeout.",
        {**_SUB_DEST, "outcome": ATTEMPT_OUTCOMES},
        "Tally.duration, Tally.late_duration, AttemptFailed",
        "seconds",
        DURATION_BOUNDS,
    ),
    Metric(
        "redeliveries_total",
        "counter",
        "Deliveries given out again because their last owner did not end them.",
        {**_SUB, "reason": ("owner_died", "lease_expired")},
        "DeliveryRedelivered",
    ),
    # Errors and recovery
    Metric(
        "errors_total",
        "counter",
        "Errors: each failed attempt, and each failure of the bus's own parts.",
        {"component": COMPONENTS, "category": CATEGORIES, "severity": SEVERITIES, "destination": ANY},
        "record.failures.failure_of",
    ),
    Metric(
        "error_handling_seconds",
        "histogram",
        "Time from catching a handler's exception to having handed the decision to the store.",
        {"category": CATEGORIES},
        "SubscriberView.handling",
        "seconds",
        DURATION_BOUNDS,
    ),
    Metric(
        "recovery_attempts_total",
        "counter",
        "Recoveries that have ended, counted once, when the attempt that they led to ends.",
        {
            "category": CATEGORIES,
            "action": ACTIONS,
            "outcome": ("succeeded", "failed", "refused", "called_off"),
            "destination": ANY,
        },
        "RecoveryEnded, RecoveryConcluded",
    ),
    Metric(
        "recovery_duration_seconds",
        "histogram",
        "Time from a delivery's first failure to the end of the attempt that a recovery led to.",
        {"category": CATEGORIES, "action": ACTIONS},
        "RecoveryEnded.duration_s, RecoveryConcluded.duration_s",
        "seconds",
        AGE_BOUNDS,
    ),
    Metric(
        "dead_letters_total",
        "counter",
        "Deliveries that were put to rest in the dead-letter queue.",
        {**_SUB, "category": CATEGORIES},
        "DeliveryDeadLettered",
    ),
    Metric(
        "dead_letter_messages",
        "gauge",
        "Deliveries that rest in the dead-letter queue now. The same from every process of a store.",
        _SUB,
        "Source.ledger",
    ),
    Metric(
        "dead_letter_oldest_age_seconds",
        "gauge",
        "How long the oldest dead letter has rested; 0 without any. The same from every process of a store.",
        _SUB,
        "QueueState.dead_letter_oldest_at",
        "seconds",
    ),
    # Breakers
    Metric(
        "breaker_state",
        "gauge",
        "1 for the state that a breaker is in, 0 for the others.",
        {**_BREAKER, "subscription": ANY, "state": BREAKER_STATES},
        "BreakerView.state",
    ),
    Metric(
        "breaker_transitions_total",
        "counter",
        "Moves of a breaker from one state to another.",
        {**_BREAKER, "subscription": ANY, "from_state": BREAKER_STATES, "to_state": BREAKER_STATES},
        "BreakerStateChanged",
    ),
    Metric(
        "breaker_calls_total",
        "counter",
        "Calls through a breaker, and those that it refused.",
        {**_BREAKER, "outcome": ("succeeded", "failed", "refused")},
        "BreakerView",
    ),
    # Queues and handlers
    Metric(
        "queue_messages",
        "gauge",
        "Deliveries in a queue now. The same from every process of a store.",
        {**_SUB, "state": QUEUE_STATES},
        "Source.ledger",
    ),
    Metric("queue_capacity_messages", "gauge", "Most deliveries that may be pending.", _SUB, "QueueState.capacity"),
    Metric(
        "queue_oldest_message_age_seconds",
        "gauge",
        "How long the oldest waiting delivery has waited; 0 without any. The same from every process of a store.",
        _SUB,
        "QueueState.oldest_at",
        "seconds",
    ),
    Metric(
        "backpressure_seconds_total",
        "counter",
        "Time that publishers waited for room in a queue.",
        _SUB,
        "BackpressureApplied.waited_s",
    ),
    Metric(
        "overflow_actions_total",
        "counter",
        "What was done about a full queue.",
        {**_SUB, "action": ("dead_letter", "expand", "contract", "refuse")},
        "OverflowHandled",
    ),
    Metric("handlers_in_flight", "gauge", "Attempts that run now.", _SUB, "SubscriberView.in_flight"),
    Metric("handlers_limit", "gauge", "Most attempts that may run at once.", _SUB, "SubscriberView.limit"),
    Metric("handlers_overdue", "gauge", "Attempts that run past their timeout.", _SUB, "SubscriberView.overdue"),
    Metric("handler_timeout_seconds", "gauge", "The timeout in force.", _SUB, "SubscriberView.timeout_s", "seconds"),
    Metric("subscription_consumers", "gauge", "Processes that consume it now.", _SUB, "QueueState.consumers"),
    Metric(
        "subscription_state",
        "gauge",
        "1 for the state that a subscription of this process is in, 0 for the others.",
        {**_SUB, "state": SUBSCRIPTION_STATES},
        "SubscriberView.state",
    ),
    # Store, ledger, bus
    Metric(
        "connection_up",
        "gauge",
        "Whether the broker is connected; of an embedded store, whether it answered its last call.",
        {"endpoint": ANY},
        "Connection.up, TransportFailed",
    ),
    Metric(
        "spool_messages",
        "gauge",
        "Messages kept on this machine until the broker is back.",
        {"endpoint": ANY},
        "Connection.spooled",
    ),
    Metric(
        "last_round_trip_age_seconds",
        "gauge",
        "Time since the broker or store last answered; absent before it ever did.",
        {"endpoint": ANY},
        "Connection.round_trip_age_s, Source.round_trip_age_s",
        "seconds",
    ),
    Metric(
        "reconnects_total",
        "counter",
        "Times that the store or broker worked again.",
        {"endpoint": ANY},
        "TransportRecovered, ConnectionRestored",
    ),
    Metric("disk_free_bytes", "gauge", "Free space where the store is.", {}, "Source.disk_free_bytes", "bytes"),
    Metric(
        "journal_dropped_total", "counter", "Journal lines dropped or folded together.", {}, "Source.journal_dropped"
    ),
    Metric(
        "messages_unaccounted",
        "gauge",
        "Deliveries that are nowhere, or in two places: 0, always. The same from every process of a store.",
        {},
        "Source.ledger",
    ),
    Metric(
        "health_status", "gauge", "1 for how the bus is, 0 for the others.", {"status": HEALTH_STATES}, "Source.health"
    ),
    Metric(
        "build_info",
        "gauge",
        "1; what is running.",
        {"version": ANY, "python": ANY, "transport": ANY},
        "Source.transport",
    ),
    # Escalation
    Metric(
        "escalations_total",
        "counter",
        "Notifications of people, by channel. suppressed: over the channel's rate limit.",
        {"severity": SEVERITIES, "channel": ANY, "outcome": ("sent", "failed", "suppressed")},
        "EscalationNotified",
    ),
    Metric(
        "escalations_open",
        "gauge",
        "Escalations that are not resolved. The same from every process of a store.",
        {"severity": SEVERITIES},
        "Source.escalations_open",
    ),
    Metric(
        "error_memory_bytes",
        "gauge",
        "About how much memory the records of errors take.",
        {},
        "Source.error_memory_bytes",
        "bytes",
    ),
    # Telemetry about itself
    Metric(
        "telemetry_seconds_total",
        "counter",
        "CPU time spent on showing facts, sampled publishes and sampled attempts (from a sample), on scrapes, and on "
        "making and exporting spans (in queues of ours). What goes well is counted, and garbage collected, beside it.",
        {"signal": ("facts", "scrape", "export")},
        "telemetry",
    ),
    Metric(
        "telemetry_spans_dropped_total",
        "counter",
        "Spans that were not exported.",
        {"queue": ("spans", "failures"), "reason": ("queue_full", "export_failed", "shut_down", "not_made")},
        "SpanQueue.dropped",
    ),
    Metric(
        "telemetry_spans_summarised_total",
        "counter",
        "Spans not made because their failure site was over its flood budget; a later one carries the count.",
        {},
        "Tracing.summarised",
    ),
    Metric(
        "telemetry_export_failures_total",
        "counter",
        "Batches of spans that the exporter did not deliver.",
        {"queue": ("spans", "failures")},
        "SpanQueue.export_failures",
    ),
    Metric(
        "telemetry_queue_spans",
        "gauge",
        "Entries that wait for export: a span, or the spans of one failure.",
        {"queue": ("spans", "failures")},
        "SpanQueue",
    ),
    Metric(
        "telemetry_queue_capacity_spans",
        "gauge",
        "Most entries that may wait for export.",
        {"queue": ("spans", "failures")},
        "SpanQueue.capacity",
    ),
    Metric(
        "telemetry_series_overflow_total",
        "counter",
        "Times that a label value was over the cap and became _other.",
        {"label": ("destination",)},
        "LabelCap.overflowed",
    ),
    Metric(
        "telemetry_scrape_failures_total",
        "counter",
        "Parts of a scrape that could not be read from the bus and are missing in it.",
        {},
        "telemetry",
    ),
    Metric("observer_failures_total", "counter", "Calls that observers raised in.", {"observer": ANY}, "Hub.failures"),
)

BY_NAME: dict[str, Metric] = {metric.name: metric for metric in METRICS}


class SpanKindOf(NamedTuple):
    """A span. `name` has the bounded part in capitals. `links` say to what, `source` from which facts."""

    name: str
    kind: Literal["PRODUCER", "CONSUMER", "CLIENT", "INTERNAL"]
    when: str
    attributes: tuple[str, ...]
    source: tuple[FactType, ...]
    links: tuple[str, ...] = ()
    events: tuple[str, ...] = ()


_MESSAGING = (
    "messaging.system",
    "messaging.operation.name",
    "messaging.operation.type",
    "messaging.destination.name",
    "messaging.destination.template",
    "messaging.message.id",
    "server.address",
    "server.port",
    "glassbus.bus",
)

SPANS: tuple[SpanKindOf, ...] = (
    SpanKindOf(
        "publish DESTINATION",
        "PRODUCER",
        "one for a publish that is sampled or failed",
        (*_MESSAGING, "glassbus.outcome", "error.type", "glassbus.keep"),
        (
            facts.MessagePublished,
            facts.MessageUnrouted,
            facts.DuplicateRecognised,
            facts.PublishRefused,
            facts.PublishLeftUncertain,
            facts.MessageSpooled,
        ),
        ("stranger",),
    ),
    SpanKindOf(
        "process DESTINATION",
        "CONSUMER",
        "one for each attempt that is sampled, failed, or follows a failure",
        (
            *_MESSAGING,
            "messaging.consumer.group.name",
            "glassbus.attempt",
            "glassbus.max_attempts",
            "glassbus.published_at",
            "glassbus.replays",
            "glassbus.redelivered",
            "glassbus.given_back",
            "error.type",
            "glassbus.keep",
        ),
        (facts.AttemptFailed, facts.DeliveryGivenBack, facts.SettlementRefused, facts.AttemptOverdue),
        ("previous_attempt", "publish", "stranger"),
        ("overdue",),
    ),
    SpanKindOf(
        "error DESTINATION",
        "INTERNAL",
        "one for each error; under its attempt or publish, or a root",
        (
            "error.type",
            "glassbus.bus",
            "glassbus.error.component",
            "glassbus.error.category",
            "glassbus.error.severity",
            "glassbus.error.id",
            "glassbus.error.fingerprint",
            "glassbus.summarised",
            "glassbus.keep",
        ),
        (
            facts.AttemptFailed,
            facts.DeliveryDeadLettered,
            facts.PublishRefused,
            facts.PublishLeftUncertain,
            facts.TransportFailed,
            facts.SettlementRefused,
            facts.OwnerLost,
            facts.LedgerUnbalanced,
            facts.ObserverFailed,
            facts.CodecFellBack,
            facts.ConnectionLost,
            facts.CredentialsRefreshed,
            facts.RecoveryConcluded,
            facts.IntakePaused,
            facts.SubscriptionPaused,
            facts.EscalationNotified,
            facts.ErrorReported,
            facts.JournalFailed,
            facts.EmergencyStopBegan,
            facts.EmergencyReconciled,
            facts.ManifestQuarantined,
        ),
        events=("exception",),
    ),
    SpanKindOf(
        "recover DESTINATION",
        "INTERNAL",
        "one for each recovery: of a delivery when it is decided, under the failed attempt; of a component "
        "(`recover endpoint`) when it has ended, under the loss of its connection, or a root",
        (
            "messaging.message.id",
            "glassbus.bus",
            "glassbus.subscription",
            "glassbus.attempt",
            "glassbus.recovery.action",
            "glassbus.recovery.outcome",
            "glassbus.recovery.delay_s",
            "glassbus.recovery.next_attempt",
            "glassbus.recovery.postponed",
            "glassbus.recovery.target",
            "glassbus.recovery.limit",
            "glassbus.error.category",
            "glassbus.keep",
        ),
        (
            facts.RetryScheduled,
            facts.DeliveryDeadLettered,
            facts.RecoveryConcluded,
            facts.LoadShed,
            facts.LoadRegained,
        ),
    ),
    SpanKindOf(
        "settle DESTINATION",
        "CLIENT",
        "one for each settlement that is not the acknowledgement of a success",
        (
            *_MESSAGING,
            "messaging.consumer.group.name",
            "glassbus.attempt",
            "glassbus.settlement",
            "glassbus.reason",
            "error.type",
            "glassbus.keep",
        ),
        (
            facts.DeliveryDeadLettered,
            facts.DeliveryExpired,
            facts.DeliveryDiscarded,
            facts.DeadLetterDiscarded,
            facts.SettlementRefused,
        ),
    ),
    SpanKindOf(
        "replay DESTINATION",
        "PRODUCER",
        "one for each replay; the root of a new trace for the attempts after it",
        (*_MESSAGING, "messaging.consumer.group.name", "glassbus.replays", "glassbus.keep"),
        (facts.DeadLetterReplayed,),
        ("publish", "last_failure", "stranger"),
    ),
    SpanKindOf(
        "breaker NAME FROM->TO",
        "INTERNAL",
        "one for each transition; under the attempt that tipped it, or a root",
        (
            "glassbus.bus",
            "glassbus.breaker.name",
            "glassbus.breaker.kind",
            "glassbus.breaker.from_state",
            "glassbus.breaker.to_state",
            "glassbus.reason",
            "glassbus.keep",
        ),
        (facts.BreakerStateChanged,),
        ("cause", "opening"),
    ),
    SpanKindOf(
        "connection ENDPOINT",
        "INTERNAL",
        "one for each change: the store or broker is lost, works again, new credentials were asked for, the spool was "
        "forwarded",
        (
            "glassbus.bus",
            "glassbus.connection.state",
            "glassbus.connection.down_s",
            "glassbus.connection.attempts",
            "glassbus.connection.failed_over_from",
            "glassbus.spool.forwarded",
            "glassbus.spool.remaining",
            "glassbus.operation",
            "glassbus.keep",
        ),
        (
            facts.TransportFailed,
            facts.TransportRecovered,
            facts.ConnectionLost,
            facts.ConnectionRestored,
            facts.CredentialsRefreshed,
            facts.SpoolForwarded,
        ),
    ),
    SpanKindOf(
        "overflow SUBSCRIPTION",
        "INTERNAL",
        "one for each action about a full queue",
        ("glassbus.bus", "glassbus.subscription", "glassbus.overflow.action", "glassbus.keep"),
        (facts.OverflowHandled,),
    ),
    SpanKindOf(
        "shutdown",
        "INTERNAL",
        "one when the bus has stopped, and one more when that was an emergency",
        (
            "glassbus.bus",
            "glassbus.given_back",
            "glassbus.discarded",
            "glassbus.reason",
            "glassbus.saved",
            "glassbus.within_deadline",
            "glassbus.keep",
        ),
        (facts.BusStopped, facts.EmergencyStopEnded),
    ),
    SpanKindOf(
        "escalate NAME",
        "CLIENT",
        "one for each notification",
        (
            "glassbus.bus",
            "glassbus.escalation.channel",
            "glassbus.escalation.event",
            "glassbus.escalation.outcome",
            "glassbus.escalation.notification",
            "glassbus.error.severity",
            "glassbus.error.fingerprint",
            "glassbus.keep",
        ),
        (facts.EscalationNotified,),
    ),
    SpanKindOf(
        "fault TARGET",
        "INTERNAL",
        "one when a fault is injected and one when it is taken away; never unless somebody asked for faults",
        ("glassbus.bus", "glassbus.fault.kind", "glassbus.fault.state", "glassbus.fault.hits", "glassbus.keep"),
        (facts.FaultInjected, facts.FaultHealed),
    ),
)


class Projection(NamedTuple):
    """What a fact becomes. `no_span` and `no_metric` say why, where there is none."""

    metrics: tuple[str, ...] = ()
    no_span: str = ""
    no_metric: str = ""


_STATE = "a state, read when it is scraped"
_SETTLED = ("messages_settled_total", "message_age_seconds")
_PUBLISH = ("messages_published_total", "publish_duration_seconds")

#: Every fact, with the metrics it is counted in. Its spans are those that name it as their source.
PROJECTIONS: dict[FactType, Projection] = {
    facts.MessagePublished: Projection(no_metric="accepted messages are counted by the core (PublishTally)"),
    facts.MessageUnrouted: Projection(_PUBLISH),
    facts.DuplicateRecognised: Projection(_PUBLISH),
    facts.PublishRefused: Projection((*_PUBLISH, "errors_total")),
    facts.PublishLeftUncertain: Projection((*_PUBLISH, "errors_total")),
    facts.BackpressureApplied: Projection(
        ("backpressure_seconds_total",), no_span="the wait is in the publish span, a refusal in its error"
    ),
    facts.OverflowHandled: Projection(("overflow_actions_total",)),
    facts.DeliveryHandled: Projection(
        no_span="a sampled attempt's span ends with its handler; an unsampled success has none",
        no_metric="handled deliveries are counted by the core (Tally)",
    ),
    facts.DeliveryRedelivered: Projection(("redeliveries_total",), no_span="an attribute of the attempt that follows"),
    facts.AttemptFailed: Projection(("process_duration_seconds", "errors_total")),
    facts.AttemptOverdue: Projection(no_metric="a state, read when it is scraped (handlers_overdue)"),
    facts.AttemptAbandoned: Projection(
        no_span="the AttemptFailed and DeliveryDeadLettered stated with it have theirs",
        no_metric="handlers_limit shows the slot as lost",
    ),
    facts.SlotRegained: Projection(
        no_span="its delivery has ended; nothing is decided here", no_metric="handlers_limit shows the slot again"
    ),
    facts.RetryScheduled: Projection(no_metric="counted when it ends (RecoveryEnded)"),
    facts.RecoveryEnded: Projection(
        ("recovery_attempts_total", "recovery_duration_seconds"), no_span="the attempt that ended it has its own"
    ),
    facts.DeliveryDeadLettered: Projection((*_SETTLED, "dead_letters_total", "errors_total")),
    facts.DeliveryExpired: Projection(_SETTLED),
    facts.DeliveryDiscarded: Projection(_SETTLED),
    facts.DeliveryGivenBack: Projection(no_metric="not charged and not settled: nothing happened to it"),
    facts.SettlementRefused: Projection(("errors_total",)),
    facts.BreakerStateChanged: Projection(("breaker_transitions_total",)),
    facts.SubscriptionDeclared: Projection(no_span="the program's own doing", no_metric=_STATE),
    facts.SubscriptionPaused: Projection(("errors_total",)),
    facts.SubscriptionResumed: Projection(no_span="an operator's own doing", no_metric=_STATE),
    facts.SubscriptionForgotten: Projection(no_span="an operator's own doing", no_metric=_STATE),
    facts.DeadLetterReplayed: Projection(no_metric=_STATE),
    facts.DeadLetterDiscarded: Projection(no_metric=_STATE),
    facts.TransportFailed: Projection(("errors_total", "connection_up")),
    facts.TransportRecovered: Projection(("reconnects_total", "connection_up")),
    facts.OwnerLost: Projection(("errors_total",)),
    facts.LedgerUnbalanced: Projection(("errors_total",)),
    facts.BusStarted: Projection(no_span="it decides nothing", no_metric=_STATE),
    facts.BusStopped: Projection(no_metric=_STATE),
    facts.ObserverFailed: Projection(("errors_total",)),
    facts.CodecFellBack: Projection(("errors_total",)),
    facts.TimeoutAdapted: Projection(no_span="the retry of the attempt that timed out has one", no_metric=_STATE),
    facts.LoadShed: Projection(no_metric=_STATE),
    facts.LoadRegained: Projection(no_metric=_STATE),
    facts.IntakePaused: Projection(("errors_total",)),
    facts.IntakeResumed: Projection(no_span="the recovery that ended has one", no_metric=_STATE),
    facts.RecoveryStarted: Projection(
        no_span="its span is made when it ends", no_metric="counted when it ends (RecoveryConcluded)"
    ),
    facts.RecoveryConcluded: Projection(("recovery_attempts_total", "recovery_duration_seconds", "errors_total")),
    facts.ConnectionLost: Projection(("errors_total",)),
    facts.ConnectionRestored: Projection(("reconnects_total",)),
    facts.CredentialsRefreshed: Projection(("errors_total",)),
    facts.MessageSpooled: Projection(_PUBLISH),
    facts.SpoolForwarded: Projection(no_metric=_STATE),
    facts.HealthChanged: Projection(no_span="what moved it has spans of its own", no_metric=_STATE),
    facts.EscalationOpened: Projection(no_span="each of its notifications has one", no_metric=_STATE),
    facts.EscalationNotified: Projection(("escalations_total", "errors_total")),
    facts.EscalationAcknowledged: Projection(no_span="an operator's own doing", no_metric=_STATE),
    facts.EscalationResolved: Projection(no_span="the notification about it has one", no_metric=_STATE),
    facts.EmergencyStopBegan: Projection(("errors_total",)),
    facts.EmergencyStopEnded: Projection(no_metric=_STATE),
    facts.EmergencyReconciled: Projection(("errors_total",)),
    facts.ManifestQuarantined: Projection(("errors_total",)),
    facts.ErrorReported: Projection(("errors_total",)),
    facts.JournalFailed: Projection(("errors_total",)),
    facts.FaultInjected: Projection(no_metric="what it causes is counted; injected faults are not of production"),
    facts.FaultHealed: Projection(no_metric="what it causes is counted; injected faults are not of production"),
}

#: All that a breaker may do; used by the tests and the reference.
LEGAL_MOVES = tuple((a.value, b.value) for a, after in LEGAL.items() for b in sorted(after))
