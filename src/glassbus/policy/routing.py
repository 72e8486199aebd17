"""Which topic patterns match which topics.

`*` stands for exactly one part, a last `>` for one or more parts. What the bus publishes for itself, below
`glassbus.`, is not meant by a pattern that begins with either.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from functools import lru_cache
from typing import TypeVar

Value = TypeVar("Value")

#: The destination label of a topic that nobody declared.
OTHER = "_other"
#: What one `ByTopic` may take, and about what an entry takes besides its topic's letters, and a value of its own.
_BYTES_MAX = 384 * 1024
_ENTRY_BYTES, _VALUE_BYTES = 125, 500


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
    for_all = pattern.startswith(("*", ">"))
    return re.compile((r"(?!glassbus\.)" if for_all else "") + r"\.".join(parts))


def matches(pattern: str, topic: str) -> bool:
    """Whether a subscription to `pattern` wants messages of `topic`."""
    return pattern == topic or bool(compile_pattern(pattern).fullmatch(topic))


def is_exact(pattern: str) -> bool:
    return "*" not in pattern and ">" not in pattern


class ByTopic(dict[str, Value]):
    """What was found out about topics, remembered within 384 KiB, whatever topics a stranger thinks of.

    Full, it forgets all of them: what it held is found out again. Not thread-safe.
    """

    __slots__ = ("_room", "_values")

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[Hashable, Value] = {}
        self._room = _BYTES_MAX

    def keep(self, topic: str, value: Value, alike: Hashable) -> Value:
        """Remember `value`, or the one that was kept as `alike` before: one for all topics that are treated alike."""
        if len(topic) + _ENTRY_BYTES > self._room:
            self.clear()
        if alike not in self._values:
            self._values[alike] = value
            self._room -= _VALUE_BYTES
        found = self[topic] = self._values[alike]
        self._room -= len(topic) + _ENTRY_BYTES
        return found

    def clear(self) -> None:
        super().clear()
        self._values.clear()
        self._room = _BYTES_MAX


def destination(topic: str, patterns: Iterable[str]) -> str:
    """The bounded label of `topic`: itself where declared, else the first pattern that matches, else `_other`."""
    found = OTHER
    for pattern in patterns:
        if pattern == topic:
            return topic
        if found == OTHER and matches(pattern, topic):
            found = pattern
    return found
