"""Which trace each message, attempt and replay is in, and how headers say so.

A sampled message carries a W3C `traceparent` header, written once at publish. All
else follows by rule from what travels with the delivery anyway, so that any
process can name the span of any attempt without a header being rewritten:

- the trace of an unsampled message is derived from its id;
- the span of an attempt is derived from (message id, subscription, attempt, replays);
- attempt 1 and immediate retries are in the trace of the publish, a delayed retry
  starts a trace of its own, a replay starts one for the attempts after it.

On a topic that strangers may write to, a header names no parent: whoever writes it could put
spans into any trace, and have everything sampled. There the trace is derived from the
message's id like an unsampled one's, but so that nobody can choose it, and what the header
names is linked to.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from glassbus.facts import Delivery
from glassbus.message import Envelope

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
#: A `traceparent` to be linked to: what a stranger's message said, when it was published here.
LINKED = "linked-traceparent"
#: W3C asks for at least 512 characters; longer ones are dropped whole, never cut.
TRACESTATE_LENGTH_MAX = 512

_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_USUAL_LENGTH, _WRITTEN_MAX = 55, 256
_written: dict[str, Place] = {}
_REMEMBERED_MAX = 4096
_SPAN_BITS = (1 << 64) - 1

_random = random.Random()  # noqa: S311  # ids must be unique, not secret
os.register_at_fork(after_in_child=_random.seed)  # or a child would repeat its parent's ids
random_bits = _random.getrandbits
random_below, chance = _random.randrange, _random.random


class Place(NamedTuple):
    """A span as others refer to it. `span_id` 0: the trace is known, but no span to be a child of."""

    trace_id: int
    span_id: int
    sampled: bool
    state: str = ""


def parse(headers: Mapping[str, str]) -> Place | None:
    """The place that `headers` name, or None when there is none or it is malformed."""
    header, state = headers.get(TRACEPARENT, ""), headers.get(TRACESTATE, "")
    if state or len(header) != _USUAL_LENGTH:
        return _place(header, state)
    # Asked several times of a message on its way, and mostly where it was written.
    found = _written.get(header)
    return found if found is not None else remember(header, _place(header, ""))


def begin(headers: dict[str, str], trace_id: int) -> None:
    """Begin a trace in `headers`, sampled."""
    place = Place(trace_id, new_span_id(), True)
    header = headers[TRACEPARENT] = f"00-{trace_id:032x}-{place.span_id:016x}-01"
    remember(header, place)


def remember(header: str, place: Place | None) -> Place | None:
    """Keep what a `traceparent` of the usual length says for who asks `parse`, for a while."""
    if place is not None:
        if len(_written) >= _WRITTEN_MAX:
            _written.clear()
        _written[header] = place
    return place


def _place(header: str, state: str) -> Place | None:
    found = _TRACEPARENT.fullmatch(header)
    if found is None:
        return None
    version, trace, span, flags, rest = found.groups()
    trace_id, span_id = int(trace, 16), int(span, 16)
    if not trace_id or not span_id or (version == "00" and rest):
        return None
    return Place(trace_id, span_id, bool(int(flags, 16) & 1), state if len(state) <= TRACESTATE_LENGTH_MAX else "")


def linked(headers: Mapping[str, str]) -> Place | None:
    """What `headers` name to be linked to."""
    return _place(headers.get(LINKED, ""), "") if headers and LINKED in headers else None


def write(headers: dict[str, str], place: Place, sampled: bool) -> None:
    """Put `place` into `headers`, replacing what they said before."""
    headers[TRACEPARENT] = f"00-{place.trace_id:032x}-{place.span_id:016x}-{'01' if sampled else '00'}"
    if place.state:
        headers[TRACESTATE] = place.state
    elif TRACESTATE in headers:
        del headers[TRACESTATE]


def new_span_id() -> int:
    return random_bits(64) or 1


def trace_id_of(message_id: str) -> int:
    """The trace of a message whose headers name none: its id itself when that is 128 bits in lower-case hex."""
    if len(message_id) == 32:
        try:
            number = int(message_id, 16)
        except ValueError:
            number = 0
        if number and f"{number:032x}" == message_id:  # int() also takes signs, blanks and underscores
            return number
    return _derived(message_id)[0]


def _derived(text: str) -> tuple[int, int]:
    """(trace id, span id) that every process derives alike from `text`."""
    number = int.from_bytes(blake2b(text.encode(), digest_size=24, person=b"glassbus").digest(), "big")
    return number >> 64 or 1, number & _SPAN_BITS or 1


def _attempt_ids(delivery: Delivery, attempt: int, replays: int) -> tuple[int, int]:
    return _derived(f"{delivery.envelope.id}\0{delivery.subscription}\0{attempt}\0{replays}")


class Trail(NamedTuple):
    """Where one attempt stands: `own` is its span if it has one, `parent` the span id above it (0: a root).

    `origin` is the publish, or the replay that brought it back. `delayed`: it is in a trace of its own.
    """

    own: Place
    parent: int
    origin: Place
    delayed: bool


#: An attempt made here, and whether it was delayed.
Hint = tuple[int, bool] | None


def _is_delayed(delivery: Delivery) -> bool:
    return delivery.recovering is not None and delivery.recovering[1] == "delayed_retry"


def slim_envelope(envelope: Envelope) -> Envelope:
    """`envelope` without its payload, and without headers that are not ours."""
    headers = envelope.headers
    if headers:
        headers = {name: headers[name] for name in (TRACEPARENT, TRACESTATE, LINKED) if name in headers}
    return Envelope(envelope.id, envelope.topic, b"", "", headers, 1, None, envelope.published_at)


def slim(delivery: Delivery) -> Delivery:
    """What spans need of `delivery`, to be kept: without its payload, and without headers that are not ours."""
    return Delivery(
        slim_envelope(delivery.envelope),
        delivery.subscription,
        delivery.destination,
        delivery.attempt,
        None,
        delivery.redelivered,
        delivery.first_failed_at,
        delivery.recovering,
        delivery.replays,
        delivery.started_at,
    )


def _key(delivery: Delivery) -> int:
    return hash((delivery.envelope.id, delivery.subscription, delivery.replays))


class Lineage:
    """Answers where an attempt stands, and the one before it.

    `immediate(subscription)` is how many retries its policy makes at once; it decides
    where the attempt before this one was when another process made it. `untrusted(topic)` tells topics that
    strangers may write to, where there are any.
    """

    def __init__(self, immediate: Callable[[str], int], untrusted: Callable[[str], bool] | None = None) -> None:
        self._immediate = immediate
        self._untrusted = untrusted
        self._last: tuple[Delivery, int, Trail] | None = None
        # Attempts made here, from the second on: whether they were delayed. A spent retry budget
        # delays what the policy would do at once, so the policy alone does not tell.
        # Small, for a stranger can have many: the hash of what names the delivery, and 2 x attempt + delayed.
        self._delayed: dict[int, int] = {}

    def origin(self, delivery: Delivery) -> Place:
        """The publish of `delivery`, or the replay that brought it back."""
        return replay_place(delivery, delivery.replays) if delivery.replays else self.published(delivery)

    def published(self, delivery: Delivery) -> Place:
        """The publish itself, however often it was replayed since."""
        envelope = delivery.envelope
        if self.from_stranger(envelope):
            return Place(_derived(f"stranger\0{envelope.id}")[0], 0, False)
        found = parse(envelope.headers) if envelope.headers else None
        return found or Place(trace_id_of(envelope.id), 0, False)

    def from_stranger(self, envelope: Envelope) -> bool:
        """Whether its headers are anybody's word."""
        return self._untrusted is not None and self._untrusted(envelope.topic)

    def strangers(self, envelope: Envelope) -> Sequence[Place]:
        """The spans of strangers that led to a message, to be linked to."""
        if not envelope.headers:
            return ()
        named = parse(envelope.headers) if self.from_stranger(envelope) else None
        return [place for place in (named, linked(envelope.headers)) if place is not None]

    def trail(self, delivery: Delivery) -> Trail:
        """Where the attempt that `delivery` was claimed for stands. Facts come in runs, so the last one is kept."""
        last = self._last
        if last is not None and last[0] is delivery and last[1] == delivery.attempt:
            return last[2]
        origin = self.origin(delivery)
        trace_id, span_id = _attempt_ids(delivery, delivery.attempt, delivery.replays)
        if _is_delayed(delivery):
            trail = Trail(Place(trace_id, span_id, True, origin.state), 0, origin, True)
        else:
            trail = Trail(Place(origin.trace_id, span_id, True, origin.state), origin.span_id, origin, False)
        self._last = (delivery, delivery.attempt, trail)
        return trail

    def failed(self, delivery: Delivery) -> None:
        """Remember where a failed retry was, for the attempt that follows."""
        if delivery.attempt > 1:
            key = _key(delivery)
            self._delayed.pop(key, None)
            self._delayed[key] = 2 * delivery.attempt + _is_delayed(delivery)
            if len(self._delayed) > _REMEMBERED_MAX:
                self._delayed.pop(next(iter(self._delayed), key), None)

    def ended(self, delivery: Delivery) -> None:
        """Nothing follows: forget it."""
        if delivery.attempt > 1:
            self._delayed.pop(_key(delivery), None)

    def hint(self, delivery: Delivery) -> Hint:
        """What is remembered of the attempt before this one: to be taken now where `previous` is asked later."""
        if delivery.attempt < 2:
            return None
        known = self._delayed.get(_key(delivery))
        return None if known is None else (known >> 1, bool(known & 1))

    def previous(self, delivery: Delivery, hint: Hint) -> Place | None:
        """The attempt before this one; None for the first."""
        attempt = delivery.attempt - 1
        return self.attempt(delivery, attempt, delivery.replays, hint) if attempt >= 1 else None

    def attempt(self, delivery: Delivery, attempt: int, replays: int, hint: Hint = None) -> Place:
        """The span of another attempt of the same message and subscription."""
        trace_id, span_id = _attempt_ids(delivery, attempt, replays)
        known, delayed = hint if hint is not None else (0, False)
        if known != attempt:
            delayed = attempt - 1 > self._immediate(delivery.subscription)
        if delayed:
            return Place(trace_id, span_id, True)
        begun = replay_place(delivery, replays) if replays else self.published(delivery)
        return Place(begun.trace_id, span_id, True)


def replay_place(delivery: Delivery, replays: int) -> Place:
    """The span of the `replays`th replay of a delivery: the origin of the attempts after it."""
    trace_id, span_id = _derived(f"replay\0{delivery.envelope.id}\0{delivery.subscription}\0{replays}")
    return Place(trace_id, span_id, True)
