"""The seam: whatever an observer does, nothing changes but the count of its failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar, copy_context
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus.facts import (
    BusStarted,
    Delivery,
    DeliveryHandled,
    Fact,
    MessagePublished,
    ObserverFailed,
    SubscriptionPaused,
)
from glassbus.message import Envelope
from glassbus.observer import ALL_FACTS, NO_SCOPE, Hub, Observer
from glassbus.testing import RecordingObserver

FACT = SubscriptionPaused(at=1.0, subscription="s")
WORK = Delivery(Envelope("m", "t", b"", "json", {}), "s", "t", 1)


class OwnBaseException(BaseException):
    """Not an Exception."""


BAD = [
    ValueError,
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    asyncio.CancelledError,
    StopIteration,
    OwnBaseException,
]


class Raiser(Observer):
    def __init__(self, kind: type[BaseException] = ValueError) -> None:
        self.kind = kind
        self.calls = 0

    def on_fact(self, fact: Fact, /) -> None:
        self.calls += 1
        raise self.kind


class OtherRaiser(Raiser):
    pass


class Scoping(Observer):
    """Wraps handlers, and notes when."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def on_fact(self, fact: Fact, /) -> None:
        """Only scopes matter here."""

    @contextmanager
    def scope(self, work: Delivery, /) -> Iterator[None]:
        self.log.append(f"+{self.name}")
        try:
            yield
        finally:
            self.log.append(f"-{self.name}")


@pytest.mark.parametrize("kind", BAD)
def test_an_observer_that_raises_changes_nothing_and_is_counted(kind: type[BaseException]) -> None:
    before, after = RecordingObserver(), RecordingObserver()
    hub = Hub(lambda: 5.0, [before, Raiser(kind), after])
    hub.state(FACT)
    for recorder in (before, after):
        assert recorder.of(SubscriptionPaused) == [FACT]
        (failed,) = recorder.of(ObserverFailed)
        assert (failed.at, failed.observer, failed.during) == (5.0, "Raiser", "SubscriptionPaused")
        assert kind.__name__ in failed.error
    assert hub.failures == {"Raiser": 1}


def test_two_that_raise_do_not_call_each_other_for_ever() -> None:
    first, second, recorder = Raiser(), OtherRaiser(), RecordingObserver()
    hub = Hub(lambda: 0.0, [first, second, recorder])
    hub.state(FACT)
    # Each is shown the fact, and once the failure of the other.
    assert (first.calls, second.calls) == (2, 2)
    assert hub.failures == {"Raiser": 2, "OtherRaiser": 2}
    assert recorder.names().count("ObserverFailed") == 2


def test_an_exception_with_a_hostile_text_is_told_all_the_same() -> None:
    class Hostile(Exception):
        def __str__(self) -> str:
            raise SystemExit

    recorder = RecordingObserver()
    Hub(lambda: 0.0, [Raiser(Hostile), recorder]).state(FACT)
    assert "whose __str__ raised SystemExit" in recorder.of(ObserverFailed)[0].error


def test_each_sees_only_what_it_asked_for() -> None:
    class Choosy(RecordingObserver):
        interests = frozenset({SubscriptionPaused})

    class Deaf(RecordingObserver):
        interests: frozenset[Any] = frozenset()

    choosy, deaf, all_ears = Choosy(), Deaf(), RecordingObserver()
    hub = Hub(lambda: 0.0)
    assert not hub.wants(SubscriptionPaused)
    hub.add(choosy)
    hub.add(deaf)
    assert hub.wants(SubscriptionPaused)
    assert not hub.wants(BusStarted)
    hub.add(all_ears)
    started = BusStarted(at=0.0, bus="b", transport="memory://")
    hub.state(FACT)
    hub.state(started)
    assert choosy.facts == (FACT,)
    assert deaf.facts == ()
    assert all_ears.facts == (FACT, started)
    hub.remove(all_ears)
    assert not hub.wants(BusStarted)
    hub.remove(all_ears)  # twice does no harm
    assert hub.observers == (choosy, deaf)


def test_an_observer_with_broken_interests_is_refused_and_nothing_else_changes() -> None:
    class Broken(RecordingObserver):
        @property
        def interests(self) -> Any:
            raise RuntimeError("asked once too often")

    recorder = RecordingObserver()
    hub = Hub(lambda: 0.0, [recorder])
    with pytest.raises(RuntimeError):
        hub.add(Broken())
    hub.state(FACT)
    assert recorder.facts == (FACT,)
    assert hub.observers == (recorder,)


def test_interests_are_read_once_so_they_cannot_change_later() -> None:
    class Fickle(RecordingObserver):
        reads = 0

        @property
        def interests(self) -> Any:
            self.reads += 1
            if self.reads > 1:
                raise RuntimeError
            return [SubscriptionPaused]

    fickle, hub = Fickle(), Hub(lambda: 0.0)
    hub.add(fickle)
    hub.add(RecordingObserver())
    hub.state(FACT)
    assert fickle.facts == (FACT,)


def test_every_fact_of_the_union_can_be_stated() -> None:
    hub = Hub(lambda: 0.0)
    assert frozenset(get_args(Fact)) == ALL_FACTS
    assert not any(hub.wants(kind) for kind in ALL_FACTS)


# Scopes


def test_scopes_are_left_in_reverse() -> None:
    log: list[str] = []
    hub = Hub(lambda: 0.0, [Scoping("a", log), RecordingObserver(), Scoping("b", log), Scoping("c", log)])
    assert hub.scopes
    with hub.scope(WORK):
        log.append("run")
    assert log == ["+a", "+b", "+c", "run", "-c", "-b", "-a"]


def test_without_scopes_there_is_nothing_to_enter() -> None:
    class SaysNo(Observer):
        def on_fact(self, fact: Fact, /) -> None:
            """Not interested."""

        def scope(self, work: Delivery, /) -> AbstractContextManager[None]:
            return NO_SCOPE

    assert not Hub(lambda: 0.0, [RecordingObserver()]).scopes
    assert Hub(lambda: 0.0, [RecordingObserver()]).scope(WORK) is NO_SCOPE
    assert Hub(lambda: 0.0, [SaysNo()]).scope(WORK) is NO_SCOPE


class Manager:
    """A context manager that does as it is told, for one step of its life."""

    def __init__(self, enter: Any = None, leave: Any = None) -> None:
        self._enter, self._leave = enter, leave

    def __enter__(self) -> None:
        if self._enter is not None:
            raise self._enter

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> Any:
        if isinstance(self._leave, type):
            raise self._leave
        return self._leave


class Scoper(Observer):
    def __init__(self, manager: Any) -> None:
        self.manager = manager

    def on_fact(self, fact: Fact, /) -> None:
        """Only its scope matters."""

    def scope(self, work: Delivery, /) -> Any:
        if isinstance(self.manager, type) and issubclass(self.manager, BaseException):
            raise self.manager
        return self.manager


@contextmanager
def swallows() -> Iterator[None]:
    with suppress(BaseException):
        yield


@contextmanager
def replaces() -> Iterator[None]:
    try:
        yield
    except BaseException:
        raise RuntimeError("something else") from None


@contextmanager
def never_yields() -> Iterator[None]:
    return
    yield


@contextmanager
def yields_twice() -> Iterator[None]:
    yield
    yield


HOSTILE_SCOPES: list[tuple[str, Any, bool]] = [
    *((f"scope() raises {kind.__name__}", lambda kind=kind: kind, True) for kind in BAD),
    *((f"enter raises {kind.__name__}", lambda kind=kind: Manager(enter=kind), True) for kind in BAD),
    *((f"exit raises {kind.__name__}", lambda kind=kind: Manager(leave=kind), True) for kind in BAD),
    ("exit answers True", lambda: Manager(leave=True), False),
    ("swallows", swallows, False),
    ("replaces", replaces, False),
    ("never yields", never_yields, True),
    ("yields twice", yields_twice, False),
    ("no context manager", lambda: 7, True),
    ("None", lambda: None, True),
]


@pytest.mark.parametrize(("name", "make", "fails"), HOSTILE_SCOPES, ids=[name for name, _, _ in HOSTILE_SCOPES])
@pytest.mark.parametrize("raised", [None, ValueError, asyncio.CancelledError, SystemExit])
def test_a_hostile_scope_changes_no_outcome(
    name: str, make: Any, fails: bool, raised: type[BaseException] | None
) -> None:
    log: list[str] = []
    recorder = RecordingObserver()
    hub = Hub(lambda: 0.0, [Scoping("a", log), Scoper(make()), Scoping("b", log), recorder])
    error = raised("the handler's own") if raised else None
    caught: BaseException | None = None
    try:
        with hub.scope(WORK):
            log.append("run")
            if error is not None:
                raise error
    except BaseException as escaped:
        caught = escaped
    assert caught is error
    assert log == ["+a", "+b", "run", "-b", "-a"]
    if fails:
        assert hub.failures == {"Scoper": 1}
        assert [f.during for f in recorder.of(ObserverFailed)] == ["scope"]


def test_failures_on_many_threads_are_all_counted() -> None:
    hub = Hub(lambda: 0.0, [Scoper(ValueError)])

    def work() -> None:
        for _ in range(300):
            with hub.scope(WORK):
                pass

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hub.failures == {"Scoper": 1800}


@given(st.lists(st.sampled_from(["quiet", *(kind.__name__ for kind in BAD)]), max_size=8))
def test_any_mix_of_observers_leaves_every_quiet_one_with_every_fact(mix: list[str]) -> None:
    kinds = {kind.__name__: kind for kind in BAD}
    observers = [RecordingObserver() if name == "quiet" else Raiser(kinds[name]) for name in mix]
    hub = Hub(lambda: 0.0, observers)
    hub.state(FACT)
    raising = sum(name != "quiet" for name in mix)
    for observer in observers:
        if isinstance(observer, RecordingObserver):
            assert observer.of(SubscriptionPaused) == [FACT]
            assert len(observer.of(ObserverFailed)) == raising
    # One for the fact itself, one for each failure of another.
    assert sum(hub.failures.values()) == raising + raising * (raising - 1)


def test_the_hub_knows_whether_anyone_looks_at_the_happy_path() -> None:
    class Handled(RecordingObserver):
        interests = frozenset({DeliveryHandled})

    class Published(RecordingObserver):
        interests = frozenset({MessagePublished})

    class Neither(RecordingObserver):
        interests = frozenset({BusStarted})

    hub = Hub(lambda: 0.0, [Neither()])
    assert (hub.shows_happy, hub.scopes) == (False, False)
    for kind in (Handled, Published):
        observer = kind()
        hub.add(observer)
        assert hub.shows_happy
        hub.remove(observer)
        assert not hub.shows_happy
    assert (Hub(lambda: 0.0).shows_happy, Hub(lambda: 0.0).scopes) == (False, False)


def test_an_observer_that_scopes_nothing_plain_is_asked_only_about_the_rest() -> None:
    """Most deliveries have nothing that a scope could go by; the worker asks for `scopes_plain` before it asks."""

    class NotPlain(Scoping):
        scopes_plain = False

    hub = Hub(lambda: 0.0, [NotPlain("a", [])])
    assert (hub.scopes, hub.scopes_plain) == (True, False)
    asked = Scoping("b", [])
    hub.add(asked)
    assert hub.scopes_plain  # one that says nothing is asked about all
    hub.remove(asked)
    assert not hub.scopes_plain


def test_observers_make_the_context_of_handlers_ready_and_may_fail_at_it() -> None:
    mark: ContextVar[str] = ContextVar("mark", default="")

    class Marks(RecordingObserver):
        def enter_worker(self) -> None:
            mark.set("ready")

    class Fails(RecordingObserver):
        def enter_worker(self) -> None:
            raise OwnBaseException

    seen = Marks()
    hub = Hub(lambda: 0.0, [Fails(), seen])
    context = copy_context()
    hub.enter_worker(context)
    assert (context[mark], mark.get()) == ("ready", "")
    assert hub.failures == {"Fails": 1}
    assert [type(fact) for fact in seen.facts] == [ObserverFailed]
