"""How things look: colours, units, and from which values on something is not well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dashboards.grafana import Json
from glassbus.telemetry import catalogue

#: Colours have one meaning on all boards. CLEAR is the panel's own background.
GOOD, CAUTION, BAD, CALM, QUIET, CLEAR = "green", "orange", "red", "blue", "#8e8e8e", "transparent"

#: Grafana's units.
PER_SECOND, COUNT, SECONDS, SHARE, BYTES = "suffix:/s", "short", "s", "percentunit", "bytes"
SECONDS_EACH, TIMES, NO_UNIT = "suffix: s/s", "suffix:x", "none"

#: The same things have the same colours everywhere.
PUBLISHED = {
    "accepted": CALM, "spooled": CAUTION, "unrouted": QUIET, "duplicate": QUIET, "rejected": BAD, "uncertain": "purple",
}  # fmt: skip
SETTLED = {"handled": CALM, "dead_lettered": BAD, "expired": CAUTION, "discarded": "purple"}
OUTCOMES = {"succeeded": CALM, "late": CAUTION, "failed": BAD, "refused": "purple", "called_off": QUIET}
QUANTILES = {"p50": "super-light-blue", "p95": "light-blue", "p99": "dark-blue"}
WINDOWS = {"over 5m": "super-light-blue", "over 1h": "light-blue", "over 6h": "dark-blue"}
#: Of kinds that are neither good nor bad: none is green or red.
KINDS = ("#5794f2", "#b877d9", "#ffb357", "#6ed0e0", "#e0b400", "#ca95e5", "#a3a3c2", "#c4a27a")
CATEGORIES = dict(zip(catalogue.CATEGORIES, KINDS, strict=True))
ALERTS = {"emergency": "purple", "critical": BAD, "warning": CAUTION, "info": CALM}
SEVERITIES = {"low": QUIET, "medium": "yellow", "high": CAUTION, "critical": BAD}


class Levels(NamedTuple):
    """From which value on something needs care, and from which it is bad; with `low`, below which."""

    caution: float | None = None
    bad: float | None = None
    low: bool = False

    def steps(self, well: str) -> list[Json]:
        high = [(None, well), (self.caution, CAUTION), (self.bad, BAD)]
        low = [(None, BAD), (self.bad, CAUTION), (self.caution, well)]
        first, *rest = low if self.low else high
        return [step(*first), *(step(value, colour) for value, colour in rest if value is not None)]


class State(NamedTuple):
    """What a rank of `promql.worst` is called, and its colour."""

    rank: int
    name: str
    colour: str


def quiet(states: Sequence[State]) -> tuple[State, ...]:
    """`states` for a tile: what is well has no colour there."""
    return tuple(s._replace(colour=CLEAR) if s.colour == GOOD else s for s in states)


def step(value: float | None, colour: str) -> Json:
    """A threshold as Grafana has it: `colour` from `value` upwards."""
    return {"value": value, "color": colour}
