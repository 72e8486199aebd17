"""A record of the facts that a bus states, and assertions on it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from glassbus.facts import Fact, FactType
from glassbus.observer import Hub, Observer

SomeFact = TypeVar("SomeFact", bound=Fact)


class RecordingObserver(Observer):
    """Keeps every fact it is shown, in order. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._facts: list[Fact] = []

    def on_fact(self, fact: Fact, /) -> None:
        with self._lock:
            self._facts.append(fact)

    @property
    def facts(self) -> tuple[Fact, ...]:
        with self._lock:
            return tuple(self._facts)

    def of(self, kind: type[SomeFact]) -> list[SomeFact]:
        """The facts of one type."""
        return [fact for fact in self.facts if isinstance(fact, kind)]

    def names(self) -> list[str]:
        """The names of the facts' types, in order."""
        return [type(fact).__name__ for fact in self.facts]

    def clear(self) -> None:
        with self._lock:
            self._facts.clear()


class _Bus(Protocol):
    """A bus: something with a hub."""

    @property
    def hub(self) -> Hub: ...


class _OnAnotherThread(Protocol):
    """A bus that runs on a thread of its own, where its observers are told."""

    @property
    def core(self) -> _Bus: ...
    def flush_facts(self, timeout: float = 5.0) -> bool: ...


@contextmanager
def expect_facts(
    source: RecordingObserver | Hub | _Bus | _OnAnotherThread, *kinds: FactType, exactly: bool = False
) -> Iterator[RecordingObserver]:
    """Assert that the block makes `source` (a bus of either kind, its hub, or a recorder) state facts of these types.

    Yields what is stated meanwhile; of a `ProductionMessageBus` also what was reported in the block and is told
    a moment later.

    A type named twice must be stated at least twice. `exactly`: these, in this order, and
    no others. What the block raises goes through unchanged.
    """
    seen = RecordingObserver()
    if isinstance(source, RecordingObserver):
        before = len(source.facts)
        yield seen
        for fact in source.facts[before:]:
            seen.on_fact(fact)
    else:
        flush_facts = getattr(source, "flush_facts", None)
        core = source.core if hasattr(source, "core") else source
        hub = core if isinstance(core, Hub) else core.hub
        hub.add(seen)
        try:
            yield seen
            if flush_facts is not None:
                flush_facts()
        finally:
            hub.remove(seen)
    stated = seen.names()
    wanted = [kind.__name__ for kind in kinds]
    listing = "\n  ".join(stated) or "(nothing)"
    if exactly and stated != wanted:
        raise AssertionError(f"expected exactly {', '.join(wanted) or 'nothing'}; stated were:\n  {listing}")
    missing = Counter(wanted) - Counter(stated)
    if missing:
        short = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in missing.items())
        raise AssertionError(f"not stated: {short}; stated were:\n  {listing}")
