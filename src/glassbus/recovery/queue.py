"""Full queues that grow, as recoveries: begun when one grows, concluded when it shrank or had to refuse all the same.

The other rungs of the ladder are single steps, which the transport takes and states. Growing
is the one that may not help: where it keeps failing, the breaker of ("queue", queue_overflow)
opens, and queues stay as they are until it lets one try again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from glassbus.errors import ErrorCategory
from glassbus.facts import OverflowHandled
from glassbus.policy.breaker import BreakerState
from glassbus.recovery.guard import ComponentBreakers, Recovery
from glassbus.transport import QueueState

_OVERFLOW = ErrorCategory.QUEUE_OVERFLOW


class Growth:
    """Guards the rung "expand" of a bus. Belongs to its loop."""

    def __init__(self, breakers: ComponentBreakers, let_grow: Callable[[bool], None]) -> None:
        """`let_grow` has the transport take that rung, or leave it out."""
        self._breakers = breakers
        self._let_grow = let_grow
        self._allowed = True
        self._growing: dict[str, Recovery] = {}

    def saw(self, fact: OverflowHandled) -> None:
        """A rung was taken by this process."""
        name = fact.subscription
        if fact.action == "expand":
            self._conclude(name)
            recovery = self._breakers.begin("queue", _OVERFLOW, "expand", name)
            if recovery is not None:
                self._growing[name] = recovery
        elif fact.action == "refuse" and name in self._growing:
            self._growing.pop(name).failed(f"QueueFull: full again, with {fact.capacity} messages")
        elif fact.action == "contract":
            self._conclude(name)
        self._decide()

    def look(self, queues: Callable[[], Mapping[str, QueueState]]) -> None:
        """About once a second. What another process took back, or what is gone, is concluded too."""
        if self._growing:
            found = queues()
            for name in list(self._growing):
                if name not in found or not found[name].expanded_until:
                    self._conclude(name)
        self._decide()

    def _conclude(self, name: str) -> None:
        recovery = self._growing.pop(name, None)
        if recovery is not None:
            recovery.succeeded()

    def _decide(self) -> None:
        """Half-open, one may try, and the others wait for how that goes."""
        state = self._breakers.state("queue", _OVERFLOW)
        allowed = state in (BreakerState.CLOSED, BreakerState.DISABLED) or (
            state is BreakerState.HALF_OPEN and not self._growing
        )
        if allowed != self._allowed:
            self._allowed = allowed
            self._let_grow(allowed)
