"""Which topic patterns match which topics.

`*` stands for exactly one part, a last `>` for one or more parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

#: The destination label of a topic that nobody declared.
OTHER = "_other"


@lru_cache(maxsize=16_384)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A regular expression that fully matches the topics of `pattern`."""
    parts = []
    for part in pattern.split("."):
        if part == "*":
            parts.append(r"[^.]+")
        elif part == ">":
            parts.append(r"[^.]+(?:\.[^.]+)*")
        else:
            parts.append(re.escape(part))
    return re.compile(r"\.".join(parts))


def matches(pattern: str, topic: str) -> bool:
    """Whether a subscription to `pattern` wants messages of `topic`."""
    return pattern == topic or bool(compile_pattern(pattern).fullmatch(topic))


def is_exact(pattern: str) -> bool:
    return "*" not in pattern and ">" not in pattern


def destination(topic: str, patterns: Iterable[str]) -> str:
    """The bounded label of `topic`: itself where declared, else the first pattern that matches, else `_other`."""
    found = OTHER
    for pattern in patterns:
        if pattern == topic:
            return topic
        if found == OTHER and matches(pattern, topic):
            found = pattern
    return found
