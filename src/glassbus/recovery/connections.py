"""Connections as they are now, for telemetry, health and operators. Read on any thread."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from glassbus.policy.breaker import BreakerState


class Connection(msgspec.Struct, frozen=True):
    """An endpoint as it is now. `since`: wall seconds of its last change, 0.0 for none; `breaker`: its breaker's state.

    `round_trip_age_s`: since it last answered, None before it ever did. `spooled`: messages that wait for a broker.
    """

    endpoint: str
    up: bool
    since: float
    round_trip_age_s: float | None
    breaker: str
    spooled: int = 0


class EndpointBreaker:
    """The breaker of one endpoint, in the form that telemetry reads (`BreakerView`)."""

    kind = "endpoint"
    subscription = ""

    def __init__(self, name: str, state: Callable[[], BreakerState]) -> None:
        self.name = name
        self.succeeded_count = self.failed_count = self.refused = 0
        self.since = 0.0
        self.answered_at: float | None = None
        self._state = state

    @property
    def state(self) -> str:
        return self._state().value
