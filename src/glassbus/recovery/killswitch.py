"""The gate before a subscription: its kill switch, and what operators stored about it.

While the gate is shut the subscription claims nothing and keeps its messages.
"""

from __future__ import annotations

import asyncio

from glassbus.clock import Clock
from glassbus.config import KillSwitch
from glassbus.facts import BreakerStateChanged, Delivery, SubscriptionPaused, SubscriptionResumed, without_payload
from glassbus.observer import Hub
from glassbus.policy.breaker import Breaker, BreakerState, DistinctFailures, Transition
from glassbus.transport import Hold

_PASSING = (BreakerState.CLOSED, BreakerState.DISABLED)


class Gate:
    """Lets a subscription claim, or not. States each transition of its breaker.

    `shut`: claim nothing now. `guarded`: ask `enter` for a permit before running what was claimed.
    """

    def __init__(self, subscription: str, switch: KillSwitch, hub: Hub, clock: Clock) -> None:
        self.name = subscription
        self.kind = "subscription"
        self.subscription = subscription
        self.breaker: Breaker[Delivery] = Breaker(
            DistinctFailures(switch.window, switch.minimum, switch.ratio),
            open_for_s=switch.open_for,
            probes=switch.probes,
        )
        self.succeeded_count = self.failed_count = self.refused = 0
        self.shut = False
        self.guarded = False
        self.held = Hold()
        #: What holds it back in this process alone: the reason by who asked for it.
        self.held_here: dict[str, str] = {}
        self._tried: set[str] = set()  # of those, the ones that do not hold while it is tried again
        self._switch = switch
        self._hub = hub
        self._clock = clock
        self._paused = False
        self._closing = False
        self._waiting: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def state(self) -> str:
        return self.breaker.state.value

    @property
    def state_name(self) -> str:
        """running, paused or breaker_open."""
        if self._paused:
            return "paused"
        return "running" if self.breaker.state in (*_PASSING, BreakerState.HALF_OPEN) else "breaker_open"

    async def wait(self) -> None:
        """Return when the gate may have opened."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await waiter

    def enter(self) -> int | None:
        """A permit to run one claimed delivery, or None to give it back."""
        if self._paused or self._closing:
            return None
        permit = self.breaker.admit(self._clock.monotonic())
        if permit is None:
            self.refused += 1
        self.look()
        return permit

    def leave(self, permit: int) -> None:
        """A permit was not used up: its attempt was not ours to judge."""
        if permit:
            self.breaker.release(permit)
            self.look()

    def succeeded(self, delivery: Delivery, permit: int, now: float) -> None:
        self.succeeded_count += 1
        if self._switch.enabled:
            self._moved(self.breaker.succeeded(_key(delivery), now, permit))

    def count_successes(self, count: int) -> None:
        """`count` first attempts succeeded since the last call."""
        self.succeeded_count += count
        if self._switch.enabled:
            self.breaker.count_successes(count, self._clock.monotonic())

    def failed(self, delivery: Delivery, permit: int, now: float) -> None:
        self.failed_count += 1
        if self._switch.enabled:
            self._moved(self.breaker.failed(_key(delivery), without_payload(delivery), now, permit))

    def hold(self, hold: Hold) -> None:
        """Take over what is stored for every process."""
        self.held = hold
        self._paused = hold.paused or bool(self.held_here.keys() - self._tried)
        state = self.breaker.state
        if hold.forced == "forced_open":
            self._moved(self.breaker.force_open())
        elif hold.forced == "disabled":
            self._moved(self.breaker.disable())
        elif state in (BreakerState.FORCED_OPEN, BreakerState.DISABLED):
            self._moved(self.breaker.reset())
        self.look()

    def hold_here(self, by: str, reason: str) -> None:
        """Claim nothing in this process until `let_go`, and state why; "" where an operator asked for it."""
        new = by not in self.held_here
        self._tried.discard(by)
        self.held_here[by] = reason
        self.hold(self.held)
        if new:
            self._hub.state(SubscriptionPaused(at=self._clock.wall(), subscription=self.subscription, reason=reason))

    def try_again(self, by: str) -> None:
        """Let it go on without a word, until it is told what came of it: `hold_here` again, or `let_go`."""
        if by in self.held_here:
            self._tried.add(by)
            self.hold(self.held)

    def let_go(self, by: str) -> None:
        """End what `hold_here` began. Does nothing when it did not."""
        self._tried.discard(by)
        if self.held_here.pop(by, None) is not None:
            self.hold(self.held)
            if not self._paused:
                self._hub.state(SubscriptionResumed(at=self._clock.wall(), subscription=self.subscription))

    def tune(self, switch: KillSwitch) -> None:
        """Other settings hold from now on; what was counted under the old ones is forgotten."""
        if switch == self._switch:
            return
        self._switch = switch
        self.breaker.rule = DistinctFailures(switch.window, switch.minimum, switch.ratio)
        self.breaker.open_for_s, self.breaker.probes = switch.open_for, switch.probes
        if not switch.enabled and self.breaker.state in (BreakerState.OPEN, BreakerState.HALF_OPEN):
            self.reset()
        self.look()

    def reset(self) -> None:
        self._moved(self.breaker.reset())

    def close(self) -> None:
        """The worker stops: wake everyone who waits here."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        self._wake()

    def _moved(self, transition: Transition[Delivery] | None) -> None:
        if transition is None:
            return
        self.look()
        self._hub.state(
            BreakerStateChanged(
                at=self._clock.wall(),
                breaker=self.name,
                kind="subscription",
                subscription=self.subscription,
                from_state=transition.from_state.value,
                to_state=transition.to_state.value,
                reason=transition.reason,
                causes=transition.causes,
            )
        )
        if self.breaker.state is BreakerState.OPEN:
            loop = asyncio.get_running_loop()
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_later(self.breaker.open_for_s, self._half_open)

    def _half_open(self) -> None:
        self._timer = None
        self._moved(self.breaker.tick(self._clock.monotonic() + 1e-6))

    def look(self) -> None:
        """Derive `shut` and `guarded` from the breaker, the hold and the permits left."""
        state = self.breaker.state
        self.guarded = self._paused or self._closing or state not in _PASSING
        self.shut = not self._closing and (
            self._paused
            or state in (BreakerState.OPEN, BreakerState.FORCED_OPEN)
            or (state is BreakerState.HALF_OPEN and not self.breaker.has_permits(self._clock.monotonic()))
        )
        if not self.shut:
            self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)


def _key(delivery: Delivery) -> tuple[str, int]:
    return delivery.envelope.id, delivery.replays
