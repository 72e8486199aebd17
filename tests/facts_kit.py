"""One plausible fact of each type, made from its fields, for tests that must see them all."""

from __future__ import annotations

from typing import Any

from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity
from glassbus.facts import Delivery, Fact, FactType
from glassbus.message import Envelope, Level

ENVELOPE = Envelope("m-1", "orders.created", b'{"card": "secret-in-payload"}', "json", {"h": "secret-in-header"})
DELIVERY = Delivery(ENVELOPE, "charge", "orders.*", 2, first_failed_at=90.0)
REPORT = ErrorReport(
    error_id="m-1:charge:0.2",
    timestamp=100.0,
    category=ErrorCategory.CONNECTION_ERROR,
    severity=ErrorSeverity.HIGH,
    message="refused",
    exception_type="ConnectionRefusedError",
    fingerprint="f00d",
)

_BY_NAME: dict[str, Any] = {
    "at": 100.0,
    "envelope": ENVELOPE,
    "delivery": DELIVERY,
    "report": REPORT,
    "level": Level.MEMORY,
    "category": ErrorCategory.CONNECTION_ERROR,
    "severity": ErrorSeverity.HIGH,
    "subscriptions": ("charge",),
    "causes": (DELIVERY,),
    "kind": "endpoint",
    "component": "endpoint",
    "from_state": "closed",
    "to_state": "open",
    "from_status": "healthy",
    "to_status": "critical",
    "event": "opened",
    "missing": 1,
    "succeeded": False,
}
#: Where the same field name has other values.
_BY_TYPE: dict[tuple[str, str], Any] = {
    ("OverflowHandled", "action"): "expand",
    ("RetryScheduled", "action"): "delayed_retry",
    ("RecoveryEnded", "action"): "delayed_retry",
    ("RecoveryEnded", "outcome"): "failed",
    ("RecoveryStarted", "action"): "reconnect",
    ("RecoveryConcluded", "action"): "reconnect",
    ("RecoveryConcluded", "outcome"): "failed",
    ("EscalationNotified", "outcome"): "failed",
    ("DeliveryDeadLettered", "reason"): "owner_died",
    ("DeliveryDiscarded", "reason"): "forgotten",
    ("DeliveryGivenBack", "reason"): "stopping",
    ("DeliveryRedelivered", "reason"): "owner_died",
    ("OwnerLost", "reason"): "owner_died",
    ("OwnerLost", "deliveries"): 3,
}
_PLAIN: dict[str, Any] = {"str": "something", "int": 2, "float": 1.5, "bool": True}


def sample(kind: FactType, **fields: Any) -> Fact:
    """A fact of `kind`; `fields` replaces values."""
    values: dict[str, Any] = {}
    for name, annotation in zip(kind.__struct_fields__, _annotations(kind), strict=True):
        for found in (_BY_TYPE.get((kind.__name__, name)), _BY_NAME.get(name)):
            if found is not None:
                values[name] = found
                break
        else:
            values[name] = _PLAIN[annotation]
    return kind(**{**values, **fields})


def _annotations(kind: FactType) -> list[str]:
    found: dict[str, str] = {}
    for ancestor in reversed(kind.__mro__):
        found.update(vars(ancestor).get("__annotations__", {}))
    return [found[name] for name in kind.__struct_fields__]
