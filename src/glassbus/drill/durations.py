"""Every duration in a PromQL expression divided by one factor, and nothing else of it changed.

The text is cut into tokens by a small lexer of PromQL and put together again as it was; only tokens that are durations
are replaced. So what a drill evaluates is what is shipped, at another speed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from glassbus.errors import ConfigurationError, shown

_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000, "y": 31_536_000_000}
_UNITS = "|".join(sorted(_MS, key=len, reverse=True))
_PART = re.compile(rf"(\d+)({_UNITS})")
_DURATION = re.compile(rf"(?:\d+(?:{_UNITS}))+(?!\w)", re.ASCII)

_TOKEN = re.compile(
    rf"""
      (?P<space>\s+)
    | (?P<comment>\#[^\n]*)
    | (?P<string>"(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' | `[^`]*`)
    | (?P<duration>{_DURATION.pattern})
    | (?P<number>0[xX][0-9a-fA-F_]+ | (?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d+)?)
    | (?P<name>[A-Za-z_:][A-Za-z0-9_:]*)
    | (?P<other>.)
    """,
    re.VERBOSE | re.ASCII | re.DOTALL,
)


class Token(NamedTuple):
    """A piece of an expression. `kind`: space, comment, string, duration, number, name or other."""

    kind: str
    text: str


def tokens(expression: str) -> Iterator[Token]:
    """The pieces of `expression`, in order; joined they are the expression."""
    at = inside = 0
    while at < len(expression):
        if inside and expression[at] == ":":  # of a subquery; elsewhere a name may begin with it
            token = Token("other", ":")
        else:
            found = _TOKEN.match(expression, at)
            assert found is not None
            assert found.lastgroup is not None
            token = Token(found.lastgroup, found[0])
        inside += (token.text == "[") - (token.text == "]")
        yield token
        at += len(token.text)


def milliseconds(duration: str) -> int:
    """The length of a Prometheus duration, such as `1h30m`, `500ms` or `0`. Raises ConfigurationError."""
    if duration == "0":
        return 0
    if not _DURATION.fullmatch(duration):
        raise ConfigurationError(f"{shown(duration)} is no duration; write 5m, 1h30m or 500ms")
    return sum(int(amount) * _MS[unit] for amount, unit in _PART.findall(duration))


def divided(duration: str, factor: float) -> str:
    """A Prometheus duration divided by `factor`, to the millisecond; what is not 0 stays at least 1 ms."""
    whole = milliseconds(duration)
    return f"{max(1, round(whole / factor)) if whole else 0}ms"


def scaled(expression: str, factor: float) -> str:
    """`expression` with each of its durations divided by `factor`: ranges, steps of subqueries, offsets.

    Raises ConfigurationError for a range, step or offset without a unit, which would be left as it is.
    """
    made: list[str] = []
    inside = 0
    before = ""
    for token in tokens(expression):
        if token.kind == "duration":
            made.append(divided(token.text, factor))
        else:
            if token.kind == "number" and (inside or before == "offset"):
                raise ConfigurationError(f"write durations with their unit, not {token.text!r}: {shown(expression)}")
            made.append(token.text)
        inside += (token.text == "[") - (token.text == "]")
        if token.kind not in ("space", "comment") and token.text not in "+-":
            before = token.text.lower()
    return "".join(made)


def longest_s(expression: str) -> float:
    """The longest duration of an expression, in seconds; 0 without any."""
    found = [milliseconds(token.text) for token in tokens(expression) if token.kind == "duration"]
    return max(found, default=0) / 1000
