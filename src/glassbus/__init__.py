"""Glassbus: a message bus you can see through.

Every error, every recovery attempt and every breaker transition is a fact that
logs, traces and metrics show. See README and docs/ARCHITECTURE.md.
"""

from glassbus.blocking import CircuitBreaker, ErrorRecoveryManager, ProductionMessageBus
from glassbus.bus import Drained, MessageBus, default_observers, telemetry_observers
from glassbus.codec import Codec
from glassbus.config import Credentials, KillSwitch, Overflow, Spool
from glassbus.deadletters import DeadLetter
from glassbus.errors import (
    AttemptsSpent,
    BreakerOpen,
    BrokerUnreachable,
    BusNotRunning,
    BusOverloaded,
    ConfigurationError,
    EndpointRefused,
    EndpointUnreachable,
    ErrorCategory,
    ErrorReport,
    ErrorSeverity,
    GlassbusError,
    HandlerAbandoned,
    HandlerCancelled,
    HandlerTimedOut,
    HandlingError,
    InvalidHeaders,
    InvalidMessage,
    InvalidPattern,
    InvalidPayload,
    InvalidTopic,
    MessageConflict,
    OwnerDied,
    PayloadUndecodable,
    PublishError,
    PublishRejected,
    PublishUncertain,
    QueueFull,
    ShippedFileMissing,
    SpoolFull,
    StorageFull,
    StoreCorrupt,
    StoreLocked,
    StoreReadOnly,
    StoreTooNew,
    SubscriptionExists,
    TransportError,
    UnknownDeadLetter,
    UnknownEscalation,
    UnknownMessage,
    UnknownSubscription,
    WouldBlockLoop,
    redact_errors,
)
from glassbus.facts import Delivery, Fact
from glassbus.message import Level, Message, Outgoing, Priority, Receipt
from glassbus.observer import Observer, Propagator
from glassbus.policy.breaker import BreakerState
from glassbus.policy.failover import Reconnect
from glassbus.policy.ledger import Account, Audit, Ledger
from glassbus.policy.retry import Retry
from glassbus.policy.timeouts import AdaptiveTimeout
from glassbus.record.errorlog import ErrorLogger
from glassbus.record.journal import JournalSettings
from glassbus.record.logs import LoggingObserver
from glassbus.recovery.channels import Alertmanager, Webhook
from glassbus.recovery.connections import Connection
from glassbus.recovery.escalation import Escalation
from glassbus.recovery.health import Health, HealthStatus
from glassbus.story import Story


def _telemetry(bus: MessageBus) -> Observer:
    # Imported when the first bus is made, so that importing the package stays quick.
    from glassbus.telemetry import observe

    observer = observe(bus, registry=bus.registry, tracer_provider=bus.tracer_provider, wall=bus.clock.wall)
    for other in bus.hub.observers:
        if isinstance(other, LoggingObserver):
            other.trace_of = observer.trace_of
    bus.hub.names_traces = observer.trace_of
    return observer


default_observers.append(lambda _bus: LoggingObserver())
telemetry_observers.append(_telemetry)

__version__ = "0.1.0"

__all__ = [
    "Account",
    "AdaptiveTimeout",
    "Alertmanager",
    "AttemptsSpent",
    "Audit",
    "BreakerOpen",
    "BreakerState",
    "BrokerUnreachable",
    "BusNotRunning",
    "BusOverloaded",
    "CircuitBreaker",
    "Codec",
    "ConfigurationError",
    "Connection",
    "Credentials",
    "DeadLetter",
    "Delivery",
    "Drained",
    "EndpointRefused",
    "EndpointUnreachable",
    "ErrorCategory",
    "ErrorLogger",
    "ErrorRecoveryManager",
    "ErrorReport",
    "ErrorSeverity",
    "Escalation",
    "Fact",
    "GlassbusError",
    "HandlerAbandoned",
    "HandlerCancelled",
    "HandlerTimedOut",
    "HandlingError",
    "Health",
    "HealthStatus",
    "InvalidHeaders",
    "InvalidMessage",
    "InvalidPattern",
    "InvalidPayload",
    "InvalidTopic",
    "JournalSettings",
    "KillSwitch",
    "Ledger",
    "Level",
    "LoggingObserver",
    "Message",
    "MessageBus",
    "MessageConflict",
    "Observer",
    "Outgoing",
    "Overflow",
    "OwnerDied",
    "PayloadUndecodable",
    "Priority",
    "ProductionMessageBus",
    "Propagator",
    "PublishError",
    "PublishRejected",
    "PublishUncertain",
    "QueueFull",
    "Receipt",
    "Reconnect",
    "Retry",
    "ShippedFileMissing",
    "Spool",
    "SpoolFull",
    "StorageFull",
    "StoreCorrupt",
    "StoreLocked",
    "StoreReadOnly",
    "StoreTooNew",
    "Story",
    "SubscriptionExists",
    "TransportError",
    "UnknownDeadLetter",
    "UnknownEscalation",
    "UnknownMessage",
    "UnknownSubscription",
    "Webhook",
    "WouldBlockLoop",
    "__version__",
    "redact_errors",
]
