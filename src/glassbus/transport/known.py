"""Ids that callers gave, remembered in memory for a while: the same id again is a duplicate, or a conflict."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from glassbus.errors import MessageConflict
from glassbus.message import Envelope
from glassbus.transport import Stored

#: How long an id given by the caller is recognised again, in seconds.
DUPLICATE_WINDOW_S = 600.0


class _Known(NamedTuple):
    until: float  # wall seconds
    digest: bytes  # of topic and body
    subscriptions: tuple[str, ...]


class Recognised(NamedTuple):
    """What each message of a batch will yield, the places of those that are new, and the ids to remember."""

    stored: list[Stored]
    new: list[int]
    ids: dict[str, _Known]


class KnownIds:
    """The ids of the last ten minutes."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}  # in the order in which they are forgotten

    def look(self, batch: Sequence[Envelope], wanting: Sequence[tuple[str, ...]], now: float) -> Recognised:
        """What of `batch` is new; `wanting`: the subscriptions of each. Changes nothing. Raises MessageConflict."""
        while self._known:
            oldest = next(iter(self._known))
            if self._known[oldest].until > now:
                break
            del self._known[oldest]
        found = Recognised([], [], {})
        for place, (envelope, names) in enumerate(zip(batch, wanting, strict=True)):
            if envelope.remember:
                digest = blake2b(envelope.topic.encode() + b"\0" + envelope.body, digest_size=16).digest()
                known = found.ids.get(envelope.id) or self._known.get(envelope.id)
                if known is not None:
                    if known.digest != digest:
                        raise MessageConflict(envelope.id)
                    found.stored.append(Stored(known.subscriptions, duplicate=True))
                    continue
                found.ids[envelope.id] = _Known(now + DUPLICATE_WINDOW_S, digest, names)
            found.stored.append(Stored(names))
            found.new.append(place)
        return found

    def remember(self, recognised: Recognised) -> None:
        """The batch is stored."""
        self._known.update(recognised.ids)
