"""An attribute of an object, wrapped while faults are on it, and what it was when none is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from glassbus.errors import ConfigurationError, type_name

#: Makes the disturbed form of what it is given.
Wrap = Callable[[Any], Any]

_lock = threading.Lock()
_taps: dict[tuple[int, str], _Tap] = {}


class _Tap:
    """The wraps on one attribute, in the order in which they came: the last is the outermost."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner = owner  # held, so that its id stays its own
        self.name = name
        self.own = name in vars(owner)
        self.original = getattr(owner, name)
        self.wraps: list[Wrap] = []

    def fit(self) -> None:
        """Put in place what the wraps make of the original, or the original itself."""
        if self.wraps or self.own:
            current = self.original
            for wrap in self.wraps:
                current = wrap(current)
            setattr(self.owner, self.name, current)
        else:
            delattr(self.owner, self.name)


def tap(owner: object, name: str, wrap: Wrap) -> Callable[[], None]:
    """Replace attribute `name` of the instance `owner` by `wrap(attribute)`; call the result to take that back.

    Several may be on one attribute and leave in any order. When the last one has left the
    attribute is the very object that it was, or is gone again where the class had it. Thread-safe.
    Raises ConfigurationError for an owner that has no attributes of its own.
    """
    if not hasattr(owner, "__dict__"):
        raise ConfigurationError(f"a {type_name(type(owner))} has slots alone, and cannot be struck")
    key = (id(owner), name)
    with _lock:
        found = _taps.get(key)
        if found is None:
            found = _taps[key] = _Tap(owner, name)
        found.wraps.append(wrap)
        found.fit()

    def take_back() -> None:
        with _lock:
            found.wraps.remove(wrap)
            found.fit()
            if not found.wraps:
                del _taps[key]

    return take_back


def tapped() -> list[str]:
    """What is wrapped now, as `Type.attribute`; empty when no fault is in place."""
    with _lock:
        return sorted(f"{type(one.owner).__name__}.{one.name}" for one in _taps.values())
