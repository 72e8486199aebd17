"""Which messages begin a sampled trace, and the header that they are given.

A sampler of the SDK takes a trace when 64 of its random bits are below a bound. Drawn once for each message, that is a
run of independent chances, and the gaps between those taken have a geometric distribution: so it is the next gap that
is drawn here, and a message that is not taken costs a subtraction. All of it is drawn, and the header written out,
before a message is taken: that one is to wait for its handler hardly longer than the others.
"""

from __future__ import annotations

import math

from glassbus.telemetry.propagation import TRACEPARENT, Place, chance, new_span_id, random_below, random_bits, remember

_ALL = 1 << 64


class Roots:
    """Belongs to one bus's loop. `left` may be counted down by whoever asks: below 0 the message is to be taken."""

    __slots__ = ("_ready", "bound", "left")

    def __init__(self) -> None:
        #: What the countdown was drawn for: for another one `aim` first.
        self.bound: int | None = None
        self.left = 0
        self._ready: tuple[str, Place, int] | None = None

    def aim(self, bound: int) -> None:
        """Sample messages whose 64 bits are below `bound` from now on; 1 at least."""
        self.bound = bound
        self.left = self._gap()
        self._ready = self._drawn()

    def begin(self, headers: dict[str, str]) -> None:
        """Begin a sampled trace in `headers`."""
        header, place, self.left = self._ready or self._drawn()
        self._ready = None
        headers[TRACEPARENT] = header
        remember(header, place)

    def prepare(self) -> None:
        """Have ready what the next one is given. Called when there is time."""
        if self._ready is None and self.bound:
            self._ready = self._drawn()

    def _drawn(self) -> tuple[str, Place, int]:
        """A header, what it says, and how many messages come before the one after it."""
        # The low bits are the ones that samplers of the SDK look at, here and in every process after.
        trace_id = random_bits(64) << 64 | random_below(self.bound or 1) or 1
        place = Place(trace_id, new_span_id(), True)
        return f"00-{trace_id:032x}-{place.span_id:016x}-01", place, self._gap()

    def _gap(self) -> int:
        share = (self.bound or 0) / _ALL
        return 0 if share >= 1.0 else int(math.log(1.0 - chance()) / math.log1p(-share))

    def after_fork(self) -> None:
        """In the child: what was drawn is the parent's."""
        self.bound = self._ready = None
