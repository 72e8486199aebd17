"""Facts as spans: one span for one decision, linked to its cause.

A message that the head sampler took has a live span for each attempt. Any other
has none until it fails: then the spans of that attempt are made from its fact, with
their true times, and from there on its attempts are live.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import assert_never

from opentelemetry.trace import SpanContext, TracerProvider, get_current_span

from glassbus import facts as f
from glassbus.message import Envelope
from glassbus.observer import NO_SCOPE
from glassbus.record.failures import Failure
from glassbus.telemetry.around import around
from glassbus.telemetry.attempts import AttemptSpans
from glassbus.telemetry.governor import FloodBudget
from glassbus.telemetry.light import LightSpan
from glassbus.telemetry.live import LiveAttempts
from glassbus.telemetry.outlet import (
    NOWHERE,
    Outlet,
    SpanData,
    context_of,
    current_context,
    global_provider,
    outlet_for,
    place_of,
)
from glassbus.telemetry.owntime import OwnTime
from glassbus.telemetry.propagation import (
    TRACEPARENT,
    TRACESTATE,
    Lineage,
    Place,
    begin,
    new_span_id,
    parse,
    random_bits,
    replay_place,
    slim_envelope,
    trace_id_of,
    write,
)
from glassbus.telemetry.roots import Roots
from glassbus.telemetry.shown import failed_place, never_failed
from glassbus.telemetry.spans import SpanWriter, ns
from glassbus.telemetry.surroundings import Surroundings, new_trace

#: Publishes under way: of so many the parent is remembered.
_PENDING_MAX = 4096
#: What samplers of the SDK look at.
_LOW_BITS = (1 << 64) - 1


class Tracing:
    """The spans of one bus. Thread-safe; never blocks beyond what the program's own processors do.

    `provider` None means the global one, looked at anew each time: the program may set it
    after the bus was made. `failures` gives the processor for failure spans, or None for the provider's own.
    """

    def __init__(
        self,
        writer: SpanWriter,
        lineage: Lineage,
        *,
        connection: str,
        wall: Callable[[], float],
        provider: TracerProvider | None = None,
        failures: Callable[[], object] = lambda: None,
        budget: FloodBudget | None = None,
        succeeded: Callable[[f.Delivery, float, float], None] = lambda _delivery, _duration_s, _at: None,
    ) -> None:
        self.writer = writer
        self.lineage = lineage
        self.budget = budget or FloodBudget()
        #: Spans not made because their failure site was over its flood budget.
        self.summarised = 0
        self._connection = connection
        self._explicit = provider is not None
        self._failures = failures
        self._provider: TracerProvider | None = None
        self._outlet: Outlet = NOWHERE
        self._resolve(provider)
        # Parents of publishes under way, by the header that was written.
        self._publishing: dict[str, int] = {}
        self._attempts = AttemptSpans(writer, lineage)
        self.own_time = OwnTime()
        self.around = around()
        self._roots = Roots()
        self._live = LiveAttempts(self._attempts, lineage, wall, succeeded, self.own_time, self.around)
        self._muted: f.Delivery | None = None
        # The span of the publish that the last fact told of.
        self._publish: Place | None = None
        self._around_it = Surroundings(writer, lineage, connection=connection, emit=self._emit, admit=self._admit)

    def _resolve(self, provider: TracerProvider | None) -> Outlet:
        self._provider = provider
        self._outlet = outlet_for(provider, self._failures)
        self.writer.value_bytes_max = self._outlet.value_bytes_max
        return self._outlet

    @property
    def outlet(self) -> Outlet:
        if self._explicit:
            return self._outlet
        provider = global_provider()
        return self._outlet if provider is self._provider else self._resolve(provider)

    # Into headers

    def inject(self, headers: dict[str, str], /) -> None:
        """Continue the current trace in `headers`, or start one if the sampler takes it.

        An unsampled message outside any trace gets no header; its trace follows from its id.
        """
        outlet = self._outlet if self._explicit or global_provider() is self._provider else self.outlet
        if current_context():
            context = get_current_span().get_span_context()
            if context.is_valid:
                self._continue(headers, outlet, place_of(context), context)
                return
        delivery = f.current_delivery.get()
        if delivery is not None and (outlet.recording or TRACEPARENT in delivery.envelope.headers):
            # An attempt without a live span: what it publishes stays in its trace, unsampled like it.
            write(headers, self.lineage.trail(delivery).own, False)
            return
        if headers and TRACEPARENT in headers:
            given = parse(headers)
            if given is not None:
                self._continue(headers, outlet, given, context_of(given, remote=True))
                return
            del headers[TRACEPARENT]
            headers.pop(TRACESTATE, None)
        bound, roots = outlet.bound, self._roots
        if not bound:
            if bound is None:  # a sampler of the program's own
                self._ask(headers, outlet)
            return
        if bound != roots.bound:
            roots.aim(bound)
        roots.left -= 1
        if roots.left >= 0:
            return
        began = self.own_time.begin()
        roots.begin(headers)
        self.own_time.end(began, self.around.header_s)

    def _ask(self, headers: dict[str, str], outlet: Outlet) -> None:
        began = self.own_time.begin()
        trace_id = random_bits(128) or 1
        if outlet.samples(trace_id, None):
            begin(headers, trace_id)
        self.own_time.end(began, self.around.header_s)

    def _continue(self, headers: dict[str, str], outlet: Outlet, parent: Place, context: SpanContext) -> None:
        if not outlet.samples(parent.trace_id, context):
            write(headers, parent, False)
        elif not outlet.recording:
            write(headers, parent, True)
        else:
            own = Place(parent.trace_id, new_span_id(), True, parent.state)
            write(headers, own, True)
            self._publishing[headers[TRACEPARENT]] = parent.span_id
            if len(self._publishing) > _PENDING_MAX:
                self._publishing.pop(next(iter(self._publishing)), None)

    # Around handlers

    def scope(self, work: f.Delivery, /) -> AbstractContextManager[None]:
        headers = work.envelope.headers
        first = work.attempt == 1 and not work.replays
        if first and (not headers or TRACEPARENT not in headers):
            return NO_SCOPE
        began = self.own_time.begin()
        outlet = self.outlet
        if not outlet.recording or (first and not self.lineage.origin(work).sampled):
            return NO_SCOPE
        return self._live.begin(work, outlet, began)

    def scope_among_strangers(self, work: f.Delivery, /) -> AbstractContextManager[None]:
        """As `scope`, for a bus with untrusted topics: whether their messages are sampled is decided here."""
        if work.attempt > 1 or work.replays or not self.lineage.from_stranger(work.envelope):
            return self.scope(work)
        began = self.own_time.begin()
        outlet = self.outlet
        if not outlet.recording or not _samples_root(outlet, self.lineage.origin(work).trace_id):
            return NO_SCOPE
        return self._live.begin(work, outlet, began)

    # Facts

    def show_published(self, fact: f.MessagePublished) -> f.Delivery | Place | None:
        """The only fact of the happy path, of a sampled message: its span, and what shows it, as `shown` has it."""
        if not self.outlet.recording:
            return None
        self._published(fact.envelope, fact.destination, fact.at, fact.duration_s, "accepted")
        self._roots.prepare()
        return self.shown(fact)

    def after_fork(self) -> None:
        """In the child."""
        self.budget.after_fork()
        self._roots.after_fork()

    def show_failed(self, fact: f.AttemptFailed, failure: Failure) -> f.Delivery | None:
        """As `show` and `shown`, for the most frequent fact of all that goes wrong."""
        if not self.outlet.recording:
            return None
        self._attempt_failed(fact, failure)
        delivery = fact.delivery
        return self._live.slim(delivery) if self._outlet.keeps_ids and delivery is not self._muted else None

    def show_retry(self, fact: f.RetryScheduled) -> None:
        if self.outlet.recording:
            self._retry_scheduled(fact)

    def show(self, fact: f.Fact, failure: Failure | None) -> None:
        """Make the spans that `fact` calls for. `failure` is what `failure_of` says of it."""
        if not self.outlet.recording:
            return
        match fact:
            case f.AttemptFailed() | f.RetryScheduled():
                pass  # by `show_failed` and `show_retry`
            case f.DeliveryDeadLettered():
                self._dead_lettered(fact, failure)
            case f.RecoveryEnded():
                # The attempt that it led to is a span; nothing more to show.
                if fact.outcome == "succeeded":
                    self.lineage.ended(fact.delivery)
            case f.MessagePublished():
                self._published(fact.envelope, fact.destination, fact.at, fact.duration_s, "accepted")
            case f.MessageUnrouted():
                self._published(fact.envelope, fact.destination, fact.at, fact.duration_s, "unrouted")
            case f.DuplicateRecognised():
                self._published(fact.envelope, fact.destination, fact.at, fact.duration_s, "duplicate")
            case f.PublishLeftUncertain():
                self._publish_failed(fact, _known(failure), fact.envelope, "uncertain")
            case f.PublishRefused():
                given = Envelope(fact.message_id, fact.topic, b"", "", {})
                self._publish_failed(fact, _known(failure), given, "rejected")
            case f.DeliveryGivenBack():
                self._given_back(fact)
            case f.SettlementRefused():
                self._settlement_refused(fact, _known(failure))
            case f.DeliveryExpired():
                self._settled(fact.delivery, fact.at, "expire", "expired")
            case f.DeliveryDiscarded():
                self._settled(fact.delivery, fact.at, "discard", fact.reason)
            case f.DeadLetterDiscarded():
                self._dead_letter_discarded(fact)
            case f.DeadLetterReplayed():
                self._replayed(fact)
            case f.BreakerStateChanged():
                self._around_it.breaker_moved(fact)
            case f.AttemptOverdue():
                live = self._live.get(fact.delivery)
                if live is not None:
                    live.span.add_event("overdue", {"glassbus.timeout_s": fact.timeout_s}, ns(fact.at))
            case f.TransportFailed():
                self._around_it.transport_failed(fact, _known(failure))
            case f.TransportRecovered():
                self._around_it.transport_recovered(fact)
            case f.MessageSpooled():
                self._published(fact.envelope, fact.destination, fact.at, fact.duration_s, "spooled")
            case f.ConnectionLost():
                self._around_it.connection_lost(fact, _known(failure))
            case f.ConnectionRestored():
                self._around_it.connection_restored(fact)
            case f.CredentialsRefreshed():
                self._around_it.credentials_refreshed(fact, failure)
            case f.SpoolForwarded():
                self._around_it.forwarded(fact)
            case f.RecoveryConcluded():
                self._around_it.recovered(fact, failure)
            case f.LoadShed() | f.LoadRegained():
                self._around_it.load_changed(fact, self._around())
            case f.EscalationNotified():
                self._around_it.notified(fact, failure)
            case f.EmergencyStopEnded():
                self._around_it.emergency_ended(fact)
            case f.FaultInjected() | f.FaultHealed():
                self._around_it.fault(fact)
            case f.CodecFellBack():
                self._around_it.error_at(fact, failure, self._around())
            case f.OverflowHandled():
                self._around_it.overflowed(fact, self._around())
            case f.BusStopped():
                self._live.end_all(fact.at)
                self._around_it.stopped(fact)
            case (
                f.EmergencyReconciled()
                | f.EmergencyStopBegan()
                | f.ErrorReported()
                | f.IntakePaused()
                | f.JournalFailed()
                | f.LedgerUnbalanced()
                | f.ManifestQuarantined()
                | f.ObserverFailed()
                | f.OwnerLost()
                | f.SubscriptionPaused()
            ):
                self._around_it.error_at(fact, failure, new_trace())
            case (
                f.AttemptAbandoned()
                | f.BackpressureApplied()
                | f.BusStarted()
                | f.DeliveryHandled()
                | f.DeliveryRedelivered()
                | f.SlotRegained()
                | f.SubscriptionDeclared()
                | f.SubscriptionForgotten()
                | f.SubscriptionResumed()
                | f.EscalationAcknowledged()
                | f.EscalationOpened()
                | f.EscalationResolved()
                | f.HealthChanged()
                | f.IntakeResumed()
                | f.RecoveryStarted()
                | f.TimeoutAdapted()
            ):
                pass  # no span of their own: `catalogue.PROJECTIONS` says why
            case _:
                assert_never(fact)

    def _emit(self, span: SpanData) -> None:
        self._outlet.emit(span)

    def _admit(self, site: str, spans: int) -> int:
        """As `FloodBudget.admit`; what is only counted is `spans` spans."""
        skipped = self.budget.admit(site)
        if skipped < 0:
            self.summarised += spans
        return skipped

    def _around(self) -> Place:
        """What is going on here: the current span, the attempt that runs, or a new trace."""
        context = get_current_span().get_span_context()
        if context.is_valid:
            return place_of(context)
        delivery = f.current_delivery.get()
        if delivery is not None:
            return self.lineage.trail(delivery).own
        return Place(random_bits(128) or 1, 0, True)

    def shown(self, fact: f.Fact) -> Place | None:
        """The span that shows `fact`, the last one that was shown; None without any."""
        found, self._publish = self._publish, None
        return found if self._outlet.keeps_ids else None

    # Publishing

    def _published(self, envelope: Envelope, destination: str, at: float, duration_s: float, outcome: str) -> None:
        header = envelope.headers.get(TRACEPARENT, "")
        if not header.endswith("1"):
            return  # for certain not sampled, like most
        parent = self._publishing.pop(header, 0) if self._publishing else 0
        place = self._publish = parse(envelope.headers)
        if place is not None and place.sampled:
            make = partial(
                self._attempts.published, slim_envelope(envelope), destination, place, parent, at, duration_s, outcome
            )
            self._outlet.tell(make, 1, False)

    def _publish_failed(
        self, fact: f.PublishLeftUncertain | f.PublishRefused, failure: Failure, envelope: Envelope, outcome: str
    ) -> None:
        skipped = self._admit(failure.site, 2)
        if skipped < 0:
            return
        headed = parse(envelope.headers) if envelope.headers else None
        if headed is not None and headed.sampled:
            place, parent = headed, self._publishing.pop(envelope.headers[TRACEPARENT], 0)
        else:
            around = headed or self._around()
            trace_id = around.trace_id if around.span_id or not envelope.id else trace_id_of(envelope.id)
            place, parent = Place(trace_id, new_span_id(), True, around.state), around.span_id
        self._publish = place
        text = self.writer.text
        shown = Envelope(text(envelope.id), text(envelope.topic), b"", "", {})
        span = self.writer.publish(shown, fact.destination, place, parent, fact.at, fact.duration_s, outcome, failure)
        self._outlet.emit(span)
        self._outlet.emit(self.writer.error(failure, place, place.span_id, ns(fact.at), skipped))

    # Attempts

    def _attempt_failed(self, fact: f.AttemptFailed, failure: Failure) -> None:
        delivery, outlet = fact.delivery, self._outlet
        live = self._live.pop(delivery)
        hint = None
        if delivery.attempt > 1:
            hint = self.lineage.hint(delivery)
            self.lineage.failed(delivery)
        skipped = self._admit(failure.site, 2)
        self._muted = delivery if skipped < 0 else None
        if skipped < 0:
            return
        start_ns, end_ns = _times(delivery, fact.at, fact.duration_s)
        kept = self._live.slim(delivery)
        running = live.span if live is not None else None
        if running is None or isinstance(running, LightSpan):
            make = partial(self._attempts.failed, kept, hint, start_ns, end_ns, failure, skipped, running)
            outlet.tell(make, 2)
        else:
            span, error = self._attempts.failed(kept, hint, start_ns, end_ns, failure, skipped, None)
            outlet.end(running, span)
            outlet.emit(error)

    def _retry_scheduled(self, fact: f.RetryScheduled) -> None:
        delivery = fact.delivery
        if delivery is self._muted:
            self.summarised += 1
            return
        make = partial(
            self._attempts.retry,
            self._live.slim(delivery),
            fact.at,
            fact.handling_s,
            fact.action,
            fact.delay_s,
            fact.next_attempt,
            fact.postponed,
        )
        self._outlet.tell(make, 1)

    def _dead_lettered(self, fact: f.DeliveryDeadLettered, failure: Failure | None) -> None:
        delivery = fact.delivery
        self.lineage.ended(delivery)
        skipped = 0
        if failure is not None:
            skipped = self._admit(failure.site, 3)
            if skipped < 0:
                return
        elif delivery is self._muted:
            self.summarised += 2
            return
        kept = self._live.slim(delivery)
        make = partial(self._attempts.dead, kept, fact.at, fact.handling_s, fact.reason, failure, skipped)
        self._outlet.tell(make, 3 if failure is not None else 2)

    def _given_back(self, fact: f.DeliveryGivenBack) -> None:
        live = self._live.pop(fact.delivery)
        if live is not None:
            live.span.set_attribute("glassbus.given_back", fact.reason)
            self._live.end(live, fact.at)

    def _settlement_refused(self, fact: f.SettlementRefused, failure: Failure) -> None:
        live = self._live.pop(fact.delivery)
        if live is not None:
            self._live.end(live, fact.at)
        skipped = self._admit(failure.site, 2)
        if skipped >= 0:
            own = self.lineage.trail(fact.delivery).own
            settle = self.writer.settle(fact.delivery, own, ns(fact.at), fact.wanted, failure.kind, failure.message)
            self._outlet.emit(settle)
            self._outlet.emit(self.writer.error(failure, own, settle.place.span_id, ns(fact.at), skipped))

    def _settled(self, delivery: f.Delivery, at: float, operation: str, reason: str) -> None:
        if self._admit(f"{operation}:{delivery.subscription}", 1) >= 0:
            under = self.lineage.previous(delivery, self.lineage.hint(delivery)) or self.lineage.origin(delivery)
            self._outlet.emit(self.writer.settle(delivery, under, ns(at), operation, reason))

    # Dead letters

    def _last_failure(self, fact: f.DeadLetterReplayed | f.DeadLetterDiscarded, replays: int) -> Place | None:
        """The attempt that it died of; None where no handler of ours failed."""
        kept = failed_place(fact.report)
        if kept is not None or never_failed(fact.delivery, fact.report):
            return kept
        return self.lineage.attempt(fact.delivery, fact.report.retry_count + 1, replays)

    def _replayed(self, fact: f.DeadLetterReplayed) -> None:
        delivery = fact.delivery
        if self._admit(f"replay:{delivery.subscription}", 1) < 0:
            return
        before = max(0, delivery.replays - 1)
        origin = replay_place(delivery, before) if before else self.lineage.published(delivery)
        place = replay_place(delivery, max(1, delivery.replays))
        failed, strangers = self._last_failure(fact, before), self.lineage.strangers(delivery.envelope)
        self._outlet.emit(self.writer.replay(delivery, place, origin, failed, ns(fact.at), strangers))

    def _dead_letter_discarded(self, fact: f.DeadLetterDiscarded) -> None:
        if self._admit(f"discard:{fact.delivery.subscription}", 1) >= 0:
            failed = self._last_failure(fact, fact.delivery.replays) or self.lineage.origin(fact.delivery)
            self._outlet.emit(self.writer.settle(fact.delivery, failed, ns(fact.at), "discard", "dead_letter"))


def _samples_root(outlet: Outlet, trace_id: int) -> bool:
    bound = outlet.bound
    return outlet.samples(trace_id, None) if bound is None else trace_id & _LOW_BITS < bound


def _known(failure: Failure | None) -> Failure:
    assert failure is not None, "failure_of knows every fact that is an error"
    return failure


def _times(delivery: f.Delivery, at: float, duration_s: float) -> tuple[int, int]:
    """Start and end of an attempt, in ns; from the end when its start is not known."""
    start = delivery.started_at or at - duration_s
    return ns(start), ns(start + duration_s)
