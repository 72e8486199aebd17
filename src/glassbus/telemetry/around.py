"""What the core does for the sake of telemetry, where telemetry reads no clock: measured once in a process.

For a sampled message it checks a header, builds and shows a fact, and enters and leaves a scope under guard.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from types import TracebackType
from typing import NamedTuple

from glassbus.facts import Delivery, Fact, MessagePublished
from glassbus.message import Envelope, Level, check_headers
from glassbus.observer import Hub, Observer

_TIMES = 50
_ROUNDS = 3


class Around(NamedTuple):
    """CPU seconds, each time: of a header that was written, a fact that is shown, a publish that is, and a scope."""

    header_s: float = 0.0
    fact_s: float = 0.0
    publish_s: float = 0.0
    scope_s: float = 0.0


class _Scope:
    def __enter__(self) -> None:
        """Nothing of its own."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing of its own."""


class _Nothing(Observer):
    interests = frozenset({MessagePublished})

    def on_fact(self, fact: Fact, /) -> None:
        """Nothing of its own."""

    def scope(self, work: Delivery, /) -> AbstractContextManager[None]:
        return _Scope()


@cache
def around() -> Around:
    """Takes about a millisecond, the first time."""
    hub = Hub(lambda: 0.0, [_Nothing()])
    headers = {"traceparent": f"00-{1:032x}-{1:016x}-01"}
    envelope = Envelope("0" * 32, "a.topic", b"", "json", headers)
    delivery = Delivery(envelope, "subscription", "a.topic", 1)

    def told() -> MessagePublished:
        return MessagePublished(
            at=0.0,
            envelope=envelope,
            destination="a.topic",
            level=Level.MEMORY,
            subscriptions=("subscription",),
            duration_s=0.0,
        )

    fact = told()

    def header() -> None:
        dict.update({}, check_headers(dict(headers)))

    def scope() -> None:
        with hub.scope(delivery):
            pass

    return Around(_each(header), _each(lambda: hub.state(fact)), _each(lambda: hub.state(told())), _each(scope))


def _each(call: Callable[[], None]) -> float:
    """The least of some rounds: what disturbs one is not its own."""
    found = []
    for _ in range(_ROUNDS):
        began = time.thread_time()
        for _ in range(_TIMES):
            call()
        found.append((time.thread_time() - began) / _TIMES)
    return min(found)
