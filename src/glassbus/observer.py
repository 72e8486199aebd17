"""The seam: observers see what happened and can never change it.

Everything outside the core (logs, journal, traces, metrics) hangs on here.
The hub guards every call: an observer that raises is counted and reported to
the others, and the outcome of the work is the same as if it were not there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from types import TracebackType
from typing import Protocol, get_args, runtime_checkable

from glassbus.errors import safe_text as safe_text  # it was born here, and is needed below
from glassbus.facts import Delivery, DeliveryHandled, Fact, FactType, MessagePublished, ObserverFailed, Work

ALL_FACTS: frozenset[FactType] = frozenset(get_args(Fact))

#: Names the spans that show a fact about a delivery: `trace_id`, and `span_id` and `parent_id` where they are known,
#: in hex; nothing while nobody records traces. It is given the delivery, which need have no payload, and the reason or
#: outcome in the fact. Called on any thread, at any time after.
TraceOf = Callable[[FactType, Delivery, str], dict[str, str]]

#: What `scope` returns when there is nothing to wrap; the hub then skips it at no cost.
NO_SCOPE: AbstractContextManager[None] = nullcontext()


class Observer(Protocol):
    """Sees what happened; can never change it.

    Called on the thread where it happened: on the bus's loop, or for `scope` on
    the thread that runs a plain handler. Must not block. What it raises is
    counted in `observer_failures_total` and goes no further.

    An observer may carry an attribute `interests`, a set of fact types, read once
    when it is added; without it, it is shown every one. With `scopes_plain` False its `scope` is
    not asked about first attempts of messages without headers, which are nearly all. A method
    `enter_worker` is called in the context that the handlers of a subscription each get a copy of.
    """

    def on_fact(self, fact: Fact, /) -> None: ...

    def scope(self, work: Work, /) -> AbstractContextManager[None]:
        """Entered and left around the handler, in the handler's own context."""
        return NO_SCOPE


@runtime_checkable
class Propagator(Protocol):
    """Carries the trace context in message headers."""

    def inject(self, headers: dict[str, str], /) -> None: ...


def _has_scope(observer: Observer) -> bool:
    return getattr(type(observer), "scope", Observer.scope) is not Observer.scope


class Hub:
    """Shows facts to observers, guarded."""

    def __init__(self, wall: Callable[[], float], observers: Iterable[Observer] = ()) -> None:
        self._wall = wall
        self._counting = threading.Lock()
        self._interests: dict[int, frozenset[FactType]] = {}
        self._observers: tuple[Observer, ...] = ()
        self._by_type: dict[FactType, tuple[Observer, ...]] = dict.fromkeys(ALL_FACTS, ())
        self._scoping: tuple[Observer, ...] = ()
        self.shows_happy = False
        self.scopes = self.scopes_plain = False
        self._only_scope: Callable[[Work], AbstractContextManager[None]] | None = None
        #: The observer that shows traces, if there is one, says in which.
        self.names_traces: TraceOf | None = None
        #: Raised calls for each observer, by its name.
        self.failures: dict[str, int] = {}
        for observer in observers:
            self.add(observer)

    @property
    def observers(self) -> tuple[Observer, ...]:
        return self._observers

    def add(self, observer: Observer) -> None:
        interests = getattr(observer, "interests", None)
        self._interests[id(observer)] = ALL_FACTS if interests is None else frozenset(interests)
        self._set((*self._observers, observer))

    def remove(self, observer: Observer) -> None:
        self._interests.pop(id(observer), None)
        self._set(tuple(o for o in self._observers if o is not observer))

    def _set(self, observers: tuple[Observer, ...]) -> None:
        self._observers = observers
        self._by_type = {kind: tuple(o for o in observers if kind in self._interests[id(o)]) for kind in ALL_FACTS}
        self._scoping = tuple(o for o in observers if _has_scope(o))
        # Asked for each message, so kept ready: does anyone wrap handlers, or want the facts of the happy path?
        self.scopes = bool(self._scoping)
        self.scopes_plain = any(getattr(o, "scopes_plain", True) for o in self._scoping)
        self._only_scope = self._scoping[0].scope if len(self._scoping) == 1 else None
        self.shows_happy = self.wants(MessagePublished) or self.wants(DeliveryHandled)

    def wants(self, kind: FactType) -> bool:
        """Whether anyone would see a fact of this type; if not, do not build it."""
        return bool(self._by_type[kind])

    def state(self, fact: Fact) -> None:
        """Show `fact` to everyone who asked for its type. Never raises."""
        for observer in self._by_type[type(fact)]:
            try:  # `show`, written out: several see each failure
                observer.on_fact(fact)
            except BaseException as error:
                self.failed(observer, type(fact).__name__, error)

    def scope(self, work: Work) -> AbstractContextManager[None]:
        """One context manager around the handler for all observers. Never raises, never swallows."""
        if self._only_scope is not None:  # one observer wraps handlers: the usual case, asked for each message
            observer = self._scoping[0]
            try:
                manager = self._only_scope(work)
            except BaseException as error:
                self.failed(observer, "scope", error)
                return NO_SCOPE
            return NO_SCOPE if manager is NO_SCOPE else _GuardedOne(self, observer, manager)
        entered: list[tuple[Observer, AbstractContextManager[None]]] = []
        for observer in self._scoping:
            try:
                manager = observer.scope(work)
            except BaseException as error:
                self.failed(observer, "scope", error)
            else:
                if manager is not NO_SCOPE:
                    entered.append((observer, manager))
        return _Guarded(self, entered) if entered else NO_SCOPE

    def trace_of(self, kind: FactType, delivery: Delivery, reason: str) -> dict[str, str]:
        """See `TraceOf`. Never raises."""
        if self.names_traces is None:
            return {}
        try:
            return self.names_traces(kind, delivery, reason)
        except BaseException as error:
            self.failed(self.names_traces, "trace_of", error)
            return {}

    def enter_worker(self, context: Context) -> None:
        """Let observers make `context` ready, which the handlers of a subscription each get a copy of. Never raises."""
        for observer in self._observers:
            enter = getattr(observer, "enter_worker", None)
            if enter is not None:
                try:
                    context.run(enter)
                except BaseException as error:
                    self.failed(observer, "enter_worker", error)

    def show(self, observer: Observer, fact: Fact) -> None:
        """Show `fact` to one observer. Never raises."""
        try:
            observer.on_fact(fact)
        except BaseException as error:
            self.failed(observer, type(fact).__name__, error)

    def failed(self, observer: object, during: str, error: BaseException) -> None:
        """Count that `observer` raised, and tell the others. Never raises."""
        name = self._count_failure(observer)
        fact = ObserverFailed(
            at=self._wall(), observer=name, during=during, error=f"{type(error).__name__}: {safe_text(error)}"
        )
        for other in [o for o in self._by_type[ObserverFailed] if o is not observer]:
            try:
                other.on_fact(fact)
            except BaseException:
                # Counted, not stated again: two failing observers must not call each other for ever.
                self._count_failure(other)

    def _count_failure(self, observer: object) -> str:
        name = type(observer).__name__
        with self._counting:  # a plain handler's scope fails on its own thread
            self.failures[name] = self.failures.get(name, 0) + 1
        return name


class _GuardedOne:
    """As `_Guarded`, for the usual case of one."""

    __slots__ = ("_entered", "_hub", "_manager", "_observer")

    def __init__(self, hub: Hub, observer: Observer, manager: AbstractContextManager[None]) -> None:
        self._hub = hub
        self._observer = observer
        self._manager = manager
        self._entered = False

    def __enter__(self) -> None:
        try:
            self._manager.__enter__()
        except BaseException as error:
            self._hub.failed(self._observer, "scope", error)
        else:
            self._entered = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._entered:
            return
        try:
            self._manager.__exit__(kind, error, trace)
        except BaseException as raised:
            if raised is not error:
                self._hub.failed(self._observer, "scope", raised)
        if error is not None:
            # A scope that threw it on has put frames of its own at its end: it came from where it came from.
            BaseException.with_traceback(error, trace)


class _Guarded:
    """Enters and leaves the scopes of several observers; what they raise or answer changes nothing."""

    __slots__ = ("_entered", "_hub", "_managers")

    def __init__(self, hub: Hub, managers: list[tuple[Observer, AbstractContextManager[None]]]) -> None:
        self._hub = hub
        self._managers = managers
        self._entered: list[tuple[Observer, AbstractContextManager[None]]] = []

    def __enter__(self) -> None:
        for observer, manager in self._managers:
            try:
                manager.__enter__()
            except BaseException as error:
                self._hub.failed(observer, "scope", error)
            else:
                self._entered.append((observer, manager))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for observer, manager in reversed(self._entered):
            try:
                manager.__exit__(kind, error, trace)
            except BaseException as raised:
                if raised is not error:
                    self._hub.failed(observer, "scope", raised)
            if error is not None:
                # A scope that threw it on has put frames of its own at its end: it came from where it came from.
                BaseException.with_traceback(error, trace)
