"""Spans that are current while a handler runs, and end when its outcome is known."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Token
from functools import partial
from threading import get_ident
from types import TracebackType

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import Span, get_current_span, set_span_in_context

from glassbus.facts import Delivery
from glassbus.telemetry.around import Around
from glassbus.telemetry.attempts import AttemptSpans
from glassbus.telemetry.light import LightSpan
from glassbus.telemetry.outlet import Outlet
from glassbus.telemetry.owntime import OwnTime
from glassbus.telemetry.propagation import Hint, Lineage, slim
from glassbus.telemetry.spans import ns


class Live:
    """One running attempt. As a context manager it makes its span current."""

    __slots__ = ("_attempts", "_began", "_thread", "_token", "delivery", "hint", "outlet", "span", "start_ns")

    def __init__(
        self, attempts: LiveAttempts, outlet: Outlet, delivery: Delivery, hint: Hint, start_ns: int, span: Span
    ) -> None:
        self._attempts = attempts
        self.outlet = outlet
        self.delivery = delivery
        self.hint = hint
        self.start_ns = start_ns
        self.span = span
        self._token: Token[Context] | None = None
        self._began, self._thread = 0.0, 0

    def times(self, began: float) -> None:
        """The making of it is timed from `began` until it is entered."""
        self._began, self._thread = began, get_ident()

    def __enter__(self) -> None:
        self._token = otel_context.attach(set_span_in_context(self.span))
        if self._began and self._thread == get_ident():  # not where a plain handler runs on a thread of its own
            self._attempts.own_time.end(self._began, self._attempts.around.scope_s)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        own_time = self._attempts.own_time
        began = own_time.begin()
        if self._token is not None:
            otel_context.detach(self._token)
        if error is None:
            self._attempts.succeeded(self)
        own_time.end(began)


def leave_span() -> None:
    """Have no span current in this context from now on."""
    if get_current_span().get_span_context().is_valid:
        otel_context.attach(Context())


class LiveAttempts:
    """The running attempts of a bus that have a span. Thread-safe: each step is one step of a dict.

    An attempt that has failed stays here until the fact about it says how; `told` hears of one that succeeded
    (without its payload), how long it took, and when it ended, in wall seconds.
    """

    def __init__(
        self,
        spans: AttemptSpans,
        lineage: Lineage,
        wall: Callable[[], float],
        told: Callable[[Delivery, float, float], None],
        own_time: OwnTime,
        around: Around = Around(),  # noqa: B008 - it cannot be changed
    ) -> None:
        self._spans = spans
        self._told = told
        self._lineage = lineage
        self._wall = wall
        self.own_time = own_time
        self.around = around
        self._open: dict[Delivery, Live] = {}
        self._slimmed: tuple[Delivery, Delivery] | None = None

    def begin(self, delivery: Delivery, outlet: Outlet, began: float) -> Live:
        """`began`: see `OwnTime.begin`."""
        hint = self._lineage.hint(delivery)
        start_ns = ns(delivery.started_at or self._wall())
        span = outlet.start(
            lambda: self._spans.process(delivery, hint, start_ns, 0)[0], lambda: self._lineage.trail(delivery).own
        )
        live = self._open[delivery] = Live(self, outlet, delivery, hint, start_ns, span)
        if began:
            live.times(began)
        return live

    def get(self, delivery: Delivery) -> Live | None:
        return self._open.get(delivery)

    def pop(self, delivery: Delivery) -> Live | None:
        """The open attempt of `delivery`, for the caller to end."""
        return self._open.pop(delivery, None)

    def succeeded(self, live: Live) -> None:
        if self._open.pop(live.delivery, None) is not None:
            at = self._wall()
            self.end(live, at)
            if live.outlet.keeps_ids:
                self._told(self.slim(live.delivery), max(0.0, at - live.start_ns / 1e9), at)

    def end(self, live: Live, at: float) -> None:
        """End a popped attempt that has not failed, or of which nobody said so."""
        end_ns = max(live.start_ns, ns(at))
        live.span.end(end_ns)
        if isinstance(live.span, LightSpan):
            delivery = self.slim(live.delivery)
            make = partial(self._spans.process, delivery, live.hint, live.start_ns, end_ns, live.span)
            live.outlet.tell(make, 1, delivery.attempt > 1 or delivery.replays > 0)

    def end_all(self, at: float) -> None:
        """The bus is gone: what became of attempts that are still open, nobody will say."""
        for delivery in list(self._open):
            live = self._open.pop(delivery, None)
            if live is not None:
                self.end(live, at)

    def slim(self, delivery: Delivery) -> Delivery:
        """`delivery` without its payload, made once for the run of facts about one attempt."""
        last = self._slimmed
        if last is None or last[0] is not delivery:
            last = self._slimmed = (delivery, slim(delivery))
        return last[1]
