"""The ranks of states, worst highest, so that of several the worst is seen; and what each is called."""

from __future__ import annotations

from dashboards.look import BAD, CAUTION, GOOD, QUIET, State
from dashboards.promql import worst

HEALTH = (
    State(0, "healthy", GOOD),
    State(1, "unknown", QUIET),
    State(2, "degraded", CAUTION),
    State(3, "critical", BAD),
)
BREAKER = (
    State(0, "disabled", QUIET),
    State(1, "closed", GOOD),
    State(2, "half_open", CAUTION),
    State(3, "open", BAD),
    State(4, "forced_open", "purple"),
)
SUBSCRIPTION = (
    State(0, "stopped", QUIET),
    State(1, "running", GOOD),
    State(2, "paused", "purple"),
    State(3, "breaker_open", BAD),
)
#: Of a connection, which is 1 or 0.
UP = (State(1, "up", GOOD), State(0, "down", BAD))


def ranks(states: tuple[State, ...]) -> dict[str, int]:
    return {state.name: state.rank for state in states}


def health(by: str = "") -> str:
    return worst("health_status", "status", ranks(HEALTH), by)


def breakers(by: str) -> str:
    return worst("breaker_state", "state", ranks(BREAKER), by)


def subscriptions(by: str) -> str:
    return worst("subscription_state", "state", ranks(SUBSCRIPTION), by)


def breakers_not_closed() -> str:
    """How many breakers are not closed in some process; a disabled one does not count."""
    return f"count({breakers('bus breaker')} >= {ranks(BREAKER)['half_open']}) or vector(0)"


def subscriptions_held() -> str:
    """How many subscriptions are paused or held by their breaker in some process."""
    return f"count({subscriptions('bus subscription')} >= {ranks(SUBSCRIPTION)['paused']}) or vector(0)"
