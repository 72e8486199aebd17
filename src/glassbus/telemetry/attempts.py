"""The spans of publishes, of attempts and of what was decided about them, made from little, on any thread.

Each method gets a `slim` delivery or envelope, so that a queue of spans holds no payload.
"""

from __future__ import annotations

from glassbus.facts import Delivery
from glassbus.message import Envelope
from glassbus.record.failures import Failure
from glassbus.telemetry.light import LightSpan
from glassbus.telemetry.outlet import SpanData
from glassbus.telemetry.propagation import Hint, Lineage, Place
from glassbus.telemetry.spans import SpanWriter, ns


class AttemptSpans:
    def __init__(self, writer: SpanWriter, lineage: Lineage) -> None:
        self._writer = writer
        self._lineage = lineage

    def published(
        self,
        envelope: Envelope,
        destination: str,
        place: Place,
        parent: int,
        at: float,
        duration_s: float,
        outcome: str,
    ) -> tuple[SpanData]:
        """A sampled publish."""
        return (self._writer.publish(envelope, destination, place, parent, at, duration_s, outcome),)

    def process(
        self, delivery: Delivery, hint: Hint, start_ns: int, end_ns: int, running: LightSpan | None = None
    ) -> tuple[SpanData]:
        """One attempt. `running`: the span that was current while it ran, if it had one."""
        trail = self._lineage.trail(delivery)
        strangers = self._lineage.strangers(delivery.envelope)
        previous = self._lineage.previous(delivery, hint)
        span = self._writer.process(delivery, trail, previous, start_ns, end_ns, strangers)
        if running is not None:
            running.add_to(span)
        return (span,)

    def failed(
        self,
        delivery: Delivery,
        hint: Hint,
        start_ns: int,
        end_ns: int,
        failure: Failure,
        summarised: int,
        running: LightSpan | None,
    ) -> tuple[SpanData, SpanData]:
        """A failed attempt and its error."""
        (span,) = self.process(delivery, hint, start_ns, end_ns)
        self._writer.fail(span, failure)
        if running is not None:
            running.add_to(span)
        return span, self.error(delivery, failure, end_ns, summarised)

    def error(self, delivery: Delivery, failure: Failure, at_ns: int, summarised: int) -> SpanData:
        own = self._lineage.trail(delivery).own
        return self._writer.error(failure, own, own.span_id, at_ns, summarised)

    def retry(
        self,
        delivery: Delivery,
        at: float,
        handling_s: float,
        action: str,
        delay_s: float,
        next_attempt: int,
        postponed: bool,
    ) -> tuple[SpanData]:
        own = self._lineage.trail(delivery).own
        span = self._writer.recover(delivery, own, ns(at - handling_s), ns(at), action, "scheduled")
        span.attributes["glassbus.recovery.delay_s"] = delay_s
        span.attributes["glassbus.recovery.next_attempt"] = next_attempt
        span.attributes["glassbus.recovery.postponed"] = postponed
        return (span,)

    def dead(
        self, delivery: Delivery, at: float, handling_s: float, reason: str, failure: Failure | None, summarised: int
    ) -> list[SpanData]:
        """Put to rest. `failure`: the error when no failed attempt has told it, because no handler was run."""
        under: Place = self._lineage.trail(delivery).own
        at_ns = ns(at)
        spans = []
        if failure is not None:
            # Of the attempts whose owner died there are no spans.
            under = self._lineage.origin(delivery)
            spans.append(self._writer.error(failure, under, under.span_id, at_ns, summarised))
        spans.append(self._writer.recover(delivery, under, ns(at - handling_s), at_ns, "dead_letter", "dead_lettered"))
        spans.append(self._writer.settle(delivery, under, at_ns, "dead_letter", reason))
        return spans
