"""Facts as spans: one span for one decision, linked to its cause.

A message that the head sampler took has a live span for each attempt. Any other
has none until it fails: then the spans of that attempt are made from its fact, with
their true times, and from there on its attempts are live.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import Token
from types import TracebackType
from typing import assert_never

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Span, SpanContext, TracerProvider, get_current_span, set_span_in_context

from glassbus.facts import (
    AttemptAbandoned,
    AttemptFailed,
    AttemptOverdue,
    BackpressureApplied,
    BreakerStateChanged,
    BusStarted,
    BusStopped,
    DeadLetterDiscarded,
    DeadLetterReplayed,
    Delivery,
    DeliveryDeadLettered,
    DeliveryDiscarded,
    DeliveryExpired,
    DeliveryGivenBack,
    DeliveryHandled,
    DeliveryRedelivered,
    DuplicateRecognised,
    Fact,
    LedgerUnbalanced,
    MessagePublished,
    MessageUnrouted,
    ObserverFailed,
    OverflowHandled,
    OwnerLost,
    PublishLeftUncertain,
    PublishRefused,
    RecoveryEnded,
    RetryScheduled,
    SettlementRefused,
    SlotRegained,
    SubscriptionDeclared,
    SubscriptionForgotten,
    SubscriptionPaused,
    SubscriptionResumed,
    TransportFailed,
    TransportRecovered,
    current_delivery,
)
from glassbus.message import Envelope
from glassbus.observer import NO_SCOPE
from glassbus.telemetry.failures import failure_of
from glassbus.telemetry.governor import FloodBudget
from glassbus.telemetry.outlet import (
    NOWHERE,
    Outlet,
    context_of,
    global_provider,
    outlet_for,
    place_of,
)
from glassbus.telemetry.propagation import (
    TRACEPARENT,
    TRACESTATE,
    Lineage,
    Place,
    new_span_id,
    parse,
    random_bits,
    replay_place,
    trace_id_of,
    write,
)
from glassbus.telemetry.spans import SpanWriter, ns

#: Publishes under way, live attempts without an answer: at most so many are remembered.
_PENDING_MAX = 4096


class _Live:
    """A span that is current while its handler runs. It ends when the outcome is known."""

    __slots__ = ("_token", "_tracing", "delivery", "span", "start_ns")

    def __init__(self, tracing: Tracing, delivery: Delivery, span: Span, start_ns: int) -> None:
        self._tracing = tracing
        self.delivery = delivery
        self.span = span
        self.start_ns = start_ns
        self._token: Token[Context] | None = None

    def __enter__(self) -> None:
        self._token = otel_context.attach(set_span_in_context(self.span))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            otel_context.detach(self._token)
        self._tracing.left(self, error)

    def end(self, at: float) -> None:
        """End it without an error."""
        self.span.end(max(self.start_ns, ns(at)))


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
    ) -> None:
        self.writer = writer
        self.lineage = lineage
        self.budget = budget or FloodBudget()
        #: Spans not made because their failure site was over its flood budget.
        self.summarised = 0
        self._connection = connection
        self._wall = wall
        self._explicit = provider is not None
        self._failures = failures
        self._provider: TracerProvider | None = None
        self._outlet: Outlet = NOWHERE
        self._resolve(provider)
        self._publishing: dict[int, int] = {}
        self._live: dict[Delivery, _Live] = {}
        self._muted: Delivery | None = None
        self._opened: dict[str, Place] = {}
        self._down: Place | None = None

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
        outlet = self.outlet
        span = get_current_span()
        if span is not INVALID_SPAN:
            context = span.get_span_context()
            if context.is_valid:
                self._continue(headers, outlet, place_of(context), context)
                return
        delivery = current_delivery.get()
        if delivery is not None and (outlet.recording or TRACEPARENT in delivery.envelope.headers):
            # An attempt without a live span: what it publishes stays in its trace, unsampled like it.
            write(headers, self.lineage.trail(delivery).own._replace(sampled=False))
            return
        if headers and TRACEPARENT in headers:
            given = parse(headers)
            if given is not None:
                self._continue(headers, outlet, given, context_of(given, remote=True))
                return
            del headers[TRACEPARENT]
            headers.pop(TRACESTATE, None)
        bound = outlet.bound
        if bound == 0:
            return
        low = random_bits(64)
        if bound is not None and low >= bound:
            return
        # The low bits are the ones that samplers of the SDK look at, here and in every process after.
        trace_id = random_bits(64) << 64 | low or 1
        if bound is None and not outlet.samples(trace_id, None):
            return
        headers[TRACEPARENT] = f"00-{trace_id:032x}-{new_span_id():016x}-01"

    def _continue(self, headers: dict[str, str], outlet: Outlet, parent: Place, context: SpanContext) -> None:
        if not outlet.samples(parent.trace_id, context):
            write(headers, parent._replace(sampled=False))
        elif not outlet.recording:
            write(headers, parent)
        else:
            own = Place(parent.trace_id, new_span_id(), True, parent.state)
            write(headers, own)
            self._publishing[own.span_id] = parent.span_id
            if len(self._publishing) > _PENDING_MAX:
                self._publishing.pop(next(iter(self._publishing)), None)

    # Around handlers

    def scope(self, work: Delivery, /) -> AbstractContextManager[None]:
        headers = work.envelope.headers
        if work.attempt == 1 and not work.replays and (not headers or TRACEPARENT not in headers):
            return NO_SCOPE
        outlet = self.outlet
        if not outlet.recording:
            return NO_SCOPE
        trail = self.lineage.trail(work)
        if work.attempt == 1 and not work.replays and not trail.origin.sampled:
            return NO_SCOPE
        start_ns = ns(work.started_at or self._wall())
        data = self.writer.process(work, trail, self.lineage.previous(work), start_ns, 0)
        live = _Live(self, work, outlet.start(data), start_ns)
        self._live[work] = live
        if len(self._live) > _PENDING_MAX:
            self._live.pop(next(iter(self._live)), None)
        return live

    def left(self, live: _Live, error: BaseException | None) -> None:
        """The handler of a live attempt has ended. When it failed, the fact will say how."""
        if error is None and self._live.pop(live.delivery, None) is not None:
            live.end(self._wall())

    # Facts

    def show(self, fact: Fact) -> None:
        """Make the spans that `fact` calls for."""
        outlet = self.outlet
        if not outlet.recording:
            return
        match fact:
            case AttemptFailed():
                self._attempt_failed(fact)
            case RetryScheduled():
                self._retry_scheduled(fact)
            case DeliveryDeadLettered():
                self._dead_lettered(fact)
            case RecoveryEnded():
                # The attempt that it led to is a span; nothing more to show.
                if fact.outcome == "succeeded":
                    self.lineage.ended(fact.delivery)
            case MessagePublished():
                self._published(fact.envelope, fact.destination, fact.at, fact.duration_s, "accepted")
            case MessageUnrouted():
                self._published(fact.envelope, fact.destination, fact.at, fact.duration_s, "unrouted")
            case DuplicateRecognised():
                self._published(fact.envelope, fact.destination, fact.at, fact.duration_s, "duplicate")
            case PublishLeftUncertain():
                self._publish_failed(fact, fact.envelope, "uncertain")
            case PublishRefused():
                self._publish_failed(fact, Envelope(fact.message_id, fact.topic, b"", "", {}), "rejected")
            case DeliveryGivenBack():
                self._given_back(fact)
            case SettlementRefused():
                self._settlement_refused(fact)
            case DeliveryExpired():
                self._settled(fact.delivery, fact.at, "expire", "expired")
            case DeliveryDiscarded():
                self._settled(fact.delivery, fact.at, "discard", fact.reason)
            case DeadLetterDiscarded():
                self._dead_letter_discarded(fact)
            case DeadLetterReplayed():
                self._replayed(fact)
            case BreakerStateChanged():
                self._breaker_moved(fact)
            case AttemptOverdue():
                live = self._live.get(fact.delivery)
                if live is not None:
                    live.span.add_event("overdue", {"glassbus.timeout_s": fact.timeout_s}, ns(fact.at))
            case TransportFailed():
                self._transport_failed(fact)
            case TransportRecovered():
                self._transport_recovered(fact)
            case OverflowHandled():
                self._overflowed(fact)
            case BusStopped():
                self._stopped(fact)
            case OwnerLost() | LedgerUnbalanced() | ObserverFailed():
                self._bare_error(fact)
            case (
                AttemptAbandoned()
                | BackpressureApplied()
                | BusStarted()
                | DeliveryHandled()
                | DeliveryRedelivered()
                | SlotRegained()
                | SubscriptionDeclared()
                | SubscriptionForgotten()
                | SubscriptionPaused()
                | SubscriptionResumed()
            ):
                pass  # no span of their own: `catalogue.PROJECTIONS` says why
            case _:
                assert_never(fact)

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
        delivery = current_delivery.get()
        if delivery is not None:
            return self.lineage.trail(delivery).own
        return Place(random_bits(128) or 1, 0, True)

    def shown(self, delivery: Delivery) -> Place | None:
        """The span of the attempt of `delivery` whose failure was the last fact shown; None when it has none."""
        if not self._outlet.recording or delivery is self._muted:
            return None
        return self.lineage.trail(delivery).own

    # Publishing

    def _published(self, envelope: Envelope, destination: str, at: float, duration_s: float, outcome: str) -> None:
        place = parse(envelope.headers) if envelope.headers else None
        if place is None or not place.sampled:
            return
        parent = self._publishing.pop(place.span_id, 0)
        self._outlet.emit(self.writer.publish(envelope, destination, place, parent, at, duration_s, outcome))

    def _publish_failed(self, fact: PublishLeftUncertain | PublishRefused, envelope: Envelope, outcome: str) -> None:
        failure = failure_of(fact)
        assert failure is not None
        skipped = self._admit(failure.site, 2)
        if skipped < 0:
            return
        headed = parse(envelope.headers) if envelope.headers else None
        if headed is not None and headed.sampled:
            place, parent = headed, self._publishing.pop(headed.span_id, 0)
        else:
            around = headed or self._around()
            trace_id = around.trace_id if around.span_id or not envelope.id else trace_id_of(envelope.id)
            place, parent = Place(trace_id, new_span_id(), True, around.state), around.span_id
        text = self.writer.text
        shown = Envelope(text(envelope.id), text(envelope.topic), b"", "", {})
        span = self.writer.publish(shown, fact.destination, place, parent, fact.at, fact.duration_s, outcome, failure)
        self._outlet.emit(span)
        self._outlet.emit(self.writer.error(failure, place, place.span_id, ns(fact.at), skipped))

    # Attempts

    def _attempt_failed(self, fact: AttemptFailed) -> None:
        delivery, outlet = fact.delivery, self._outlet
        failure = failure_of(fact)
        assert failure is not None
        live = self._live.pop(delivery, None)
        previous = self.lineage.previous(delivery)
        self.lineage.failed(delivery)
        skipped = self._admit(failure.site, 2)
        self._muted = delivery if skipped < 0 else None
        if skipped < 0:
            return
        trail = self.lineage.trail(delivery)
        start_ns, end_ns = _times(delivery, fact.at, fact.duration_s)
        if live is not None:
            start_ns = live.start_ns
        span = self.writer.process(delivery, trail, previous, start_ns, max(start_ns, end_ns), failure)
        if live is not None:
            outlet.end(live.span, span)
        else:
            outlet.emit(span)
        outlet.emit(self.writer.error(failure, trail.own, trail.own.span_id, span.end_ns, skipped))

    def _retry_scheduled(self, fact: RetryScheduled) -> None:
        delivery = fact.delivery
        if delivery is self._muted:
            self.summarised += 1
            return
        own = self.lineage.trail(delivery).own
        self._outlet.emit(
            self.writer.recover(
                delivery,
                own,
                ns(fact.at - fact.handling_s),
                ns(fact.at),
                fact.action,
                "scheduled",
                **{
                    "glassbus.recovery.delay_s": fact.delay_s,
                    "glassbus.recovery.next_attempt": fact.next_attempt,
                    "glassbus.recovery.postponed": fact.postponed,
                },
            )
        )

    def _dead_lettered(self, fact: DeliveryDeadLettered) -> None:
        delivery, outlet = fact.delivery, self._outlet
        at_ns = ns(fact.at)
        failure = failure_of(fact)
        if failure is None:
            if delivery is self._muted:
                self.summarised += 2
                return
            at = self.lineage.trail(delivery).own
        else:
            # The handler was not run now, and of the attempts whose owner died there are no spans.
            skipped = self._admit(failure.site, 3)
            if skipped < 0:
                return
            at = self.lineage.origin(delivery)
            outlet.emit(self.writer.error(failure, at, at.span_id, at_ns, skipped))
        start_ns = ns(fact.at - fact.handling_s)
        outlet.emit(self.writer.recover(delivery, at, start_ns, at_ns, "dead_letter", "dead_lettered"))
        outlet.emit(self.writer.settle(delivery, at, at_ns, "dead_letter", fact.reason))

    def _given_back(self, fact: DeliveryGivenBack) -> None:
        live = self._live.pop(fact.delivery, None)
        if live is not None:
            live.span.set_attribute("glassbus.given_back", fact.reason)
            live.end(fact.at)

    def _settlement_refused(self, fact: SettlementRefused) -> None:
        failure = failure_of(fact)
        assert failure is not None
        live = self._live.pop(fact.delivery, None)
        if live is not None:
            live.end(fact.at)
        skipped = self._admit(failure.site, 2)
        if skipped >= 0:
            own = self.lineage.trail(fact.delivery).own
            settle = self.writer.settle(fact.delivery, own, ns(fact.at), fact.wanted, failure.kind, failure.message)
            self._outlet.emit(settle)
            self._outlet.emit(self.writer.error(failure, own, settle.place.span_id, ns(fact.at), skipped))

    def _settled(self, delivery: Delivery, at: float, operation: str, reason: str) -> None:
        if self._admit(f"{operation}:{delivery.subscription}", 1) >= 0:
            under = self.lineage.previous(delivery) or self.lineage.origin(delivery)
            self._outlet.emit(self.writer.settle(delivery, under, ns(at), operation, reason))

    # Dead letters

    def _last_failure(self, fact: DeadLetterReplayed | DeadLetterDiscarded, replays: int) -> Place:
        return self.lineage.attempt(fact.delivery, fact.report.retry_count + 1, replays)

    def _replayed(self, fact: DeadLetterReplayed) -> None:
        delivery = fact.delivery
        if self._admit(f"replay:{delivery.subscription}", 1) < 0:
            return
        before = max(0, delivery.replays - 1)
        origin = replay_place(delivery, before) if before else self.lineage.published(delivery)
        place = replay_place(delivery, max(1, delivery.replays))
        self._outlet.emit(
            self.writer.replay(delivery, place, origin, self._last_failure(fact, before), ns(fact.at)),
        )

    def _dead_letter_discarded(self, fact: DeadLetterDiscarded) -> None:
        if self._admit(f"discard:{fact.delivery.subscription}", 1) >= 0:
            failed = self._last_failure(fact, fact.delivery.replays)
            self._outlet.emit(self.writer.settle(fact.delivery, failed, ns(fact.at), "discard", "dead_letter"))

    # The bus itself

    def _breaker_moved(self, fact: BreakerStateChanged) -> None:
        if self._admit(f"breaker:{fact.breaker}", 1) < 0:
            return
        causes = [self.lineage.trail(cause).own for cause in fact.causes]
        at = causes.pop() if causes else Place(random_bits(128) or 1, 0, True)
        opening = None if causes else self._opened.get(fact.breaker)
        move = (fact.from_state, fact.to_state)
        span = self.writer.breaker(fact.breaker, fact.kind, move, fact.reason, at, ns(fact.at), causes, opening)
        if fact.to_state in ("open", "forced_open"):
            self._opened[fact.breaker] = span.place
        self._outlet.emit(span)

    def _transport_failed(self, fact: TransportFailed) -> None:
        failure = failure_of(fact)
        assert failure is not None
        at_ns = ns(fact.at)
        if self._down is None:
            root = Place(random_bits(128) or 1, 0, True)
            change = {"glassbus.connection.state": "down", "glassbus.operation": fact.operation}
            span = self.writer.happening(
                f"connection {self._connection}", root, at_ns, at_ns, change, self.writer.text(fact.error)
            )
            self._down = span.place
            self._outlet.emit(span)
        skipped = self._admit(failure.site, 1)
        if skipped >= 0:
            self._outlet.emit(self.writer.error(failure, self._down, self._down.span_id, at_ns, skipped))

    def _transport_recovered(self, fact: TransportRecovered) -> None:
        at = self._down or Place(random_bits(128) or 1, 0, True)
        self._down = None
        change = {"glassbus.connection.state": "up", "glassbus.connection.down_s": fact.after_s}
        self._outlet.emit(
            self.writer.happening(f"connection {self._connection}", at, ns(fact.at - fact.after_s), ns(fact.at), change)
        )

    def _overflowed(self, fact: OverflowHandled) -> None:
        if self._admit(f"overflow:{fact.subscription}", 1) >= 0:
            change = {"glassbus.subscription": fact.subscription, "glassbus.overflow.action": fact.action}
            name, at_ns = f"overflow {fact.subscription}", ns(fact.at)
            self._outlet.emit(self.writer.happening(name, self._around(), at_ns, at_ns, change))

    def _stopped(self, fact: BusStopped) -> None:
        change = {
            "glassbus.given_back": fact.given_back,
            "glassbus.discarded": fact.discarded,
            "glassbus.within_deadline": fact.within_deadline,
        }
        root = Place(random_bits(128) or 1, 0, True)
        self._outlet.emit(self.writer.happening("shutdown", root, ns(fact.at), ns(fact.at), change))

    def _bare_error(self, fact: OwnerLost | LedgerUnbalanced | ObserverFailed) -> None:
        failure = failure_of(fact)
        assert failure is not None
        skipped = self._admit(failure.site, 1)
        if skipped >= 0:
            at = Place(random_bits(128) or 1, 0, True)
            self._outlet.emit(self.writer.error(failure, at, 0, ns(fact.at), skipped))


def _times(delivery: Delivery, at: float, duration_s: float) -> tuple[int, int]:
    """Start and end of an attempt, in ns; from the end when its start is not known."""
    start = delivery.started_at or at - duration_s
    return ns(start), ns(start + duration_s)
