"""Which spans show a fact about a delivery, from what the journal keeps of it.

Ids follow from the delivery by rule, so they can be told long after the spans were exported, on any thread. What
depends on more (whose span was current, what a spent budget had delayed) is not told: better no id than a wrong one.
"""

from __future__ import annotations

import re

from glassbus import facts as f
from glassbus.errors import ErrorReport
from glassbus.telemetry.propagation import Lineage, Place, replay_place

#: Facts about the attempt that their delivery was claimed for.
_OF_ATTEMPT = frozenset(
    {
        f.AttemptFailed,
        f.AttemptAbandoned,
        f.RetryScheduled,
        f.SettlementRefused,
    }
)
#: Dead letters of which no handler has failed: their spans are below the publish or the replay.
_NEVER_RAN = frozenset({"owner_died", "overflow"})
_HEX = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}")


def named(lineage: Lineage, kind: f.FactType, delivery: f.Delivery, reason: str) -> dict[str, str]:
    """See `observer.TraceOf`. A delivery with `recovering` is on its way to another attempt, or at it."""
    if kind in _OF_ATTEMPT or (kind is f.DeliveryDeadLettered and reason not in _NEVER_RAN):
        trail = lineage.trail(delivery)
        above = trail.origin if trail.parent and trail.origin.sampled else None
        return _told(trail.own, above.span_id if above is not None else 0)
    if kind is f.DeliveryDeadLettered:
        return _below(lineage.origin(delivery))
    if kind is f.DeadLetterReplayed:
        return _told(replay_place(delivery, max(1, delivery.replays)))
    if kind is f.RecoveryEnded and reason == "succeeded":
        return _told(lineage.trail(delivery).own)
    if kind in (f.DeliveryExpired, f.DeliveryDiscarded) and delivery.attempt <= 1:
        return _below(lineage.origin(delivery))
    return {}


def _below(origin: Place) -> dict[str, str]:
    """Something below a publish or replay whose own span is not known."""
    return _told(origin._replace(span_id=0), origin.span_id if origin.sampled else 0)


def _told(place: Place, parent: int = 0) -> dict[str, str]:
    told = {"trace_id": f"{place.trace_id:032x}"}
    if place.span_id:
        told["span_id"] = f"{place.span_id:016x}"
    if parent:
        told["parent_id"] = f"{parent:016x}"
    return told


def failed_place(report: ErrorReport) -> Place | None:
    """The attempt that a dead letter died of, as its report has kept it: true whichever bus reads it."""
    trace, span = (report.context.get(name) for name in ("trace_id", "span_id"))
    if not (isinstance(trace, str) and isinstance(span, str) and _HEX.fullmatch(f"{trace}-{span}")):
        return None
    return Place(int(trace, 16), int(span, 16), True)


def never_failed(delivery: f.Delivery, report: ErrorReport) -> bool:
    """Whether a dead letter died without a failed attempt that has a span: its queue was full, or its owners died."""
    return not delivery.attempt or ("trace_id" in report.context and "span_id" not in report.context)
