"""Binding handlers to topics."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from glassbus.bus.parts import Parts
from glassbus.codec import Codec, check_codecs
from glassbus.config import KillSwitch, Overflow
from glassbus.errors import ConfigurationError, SubscriptionExists
from glassbus.facts import SubscriptionDeclared
from glassbus.handler import Handler
from glassbus.message import check_pattern
from glassbus.policy.retry import Retry
from glassbus.policy.timeouts import AdaptiveTimeout
from glassbus.recovery.handler import Shared
from glassbus.subscription import Subscription, make_subscription
from glassbus.worker import Worker

Function = TypeVar("Function", bound=Callable[..., Any])


class Subscribing(Parts):
    """A subscription of a running bus is declared in the background, and publishes wait for that."""

    _random: random.Random

    def subscribe(
        self,
        pattern: str,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: float = 30.0,
        abandon_after: float | None = None,
        concurrency: int = 1,
        capacity: int | None = None,
        strict_key: bool = False,
        overflow: Overflow | None = None,
        kill_switch: KillSwitch | None = None,
        adaptive_timeout: AdaptiveTimeout | None = None,
        codecs: Iterable[Codec] | None = None,
    ) -> Callable[[Function], Function]:
        """Bind a handler to the topics that `pattern` matches (`*` one part, a last `>` one or more).

        A decorator: `bus.subscribe("orders.*")(handler)` is the call. `name` (default: the handler's
        qualified name) is what the subscription is known by: on a durable transport it
        collects messages from its first start on, also while no process runs it. The handler
        may be async or plain; what it takes is told by its annotation (see `Handler`). It
        is cancelled after `timeout`; if it goes on all the same it keeps its slot until
        `abandon_after` (default 10 x timeout), when its message is dead-lettered. At most `concurrency`
        attempts run at once, and at most `capacity` messages wait; `overflow` says what a full queue does after its
        publishers have waited (see `Overflow`). A `kill_switch` is on by default
        (`KillSwitch(enabled=False)` turns it off): it pauses a subscription whose deliveries mostly fail.
        `strict_key` holds back the messages of a key while one of them waits for a retry. After an attempt
        timed out later ones get more, for a while (`AdaptiveTimeout(cap=1)` turns that off). `codecs` are tried in
        their order on a payload that is not what its message declares; by default those given to the bus.

        Raises InvalidPattern, SubscriptionExists, ConfigurationError.
        """

        known = self._codecs if codecs is None else check_codecs(codecs)
        check_pattern(pattern)  # here and not at the handler: `@bus.subscribe` without a pattern is found at once

        def bind(function: Function) -> Function:
            self._bind(
                make_subscription(
                    Handler(function, known),
                    pattern,
                    name=name,
                    retry=retry,
                    timeout=timeout,
                    abandon_after=abandon_after,
                    concurrency=concurrency,
                    capacity=self.settings.capacity if capacity is None else capacity,
                    strict_key=strict_key,
                    overflow=overflow,
                    kill_switch=kill_switch,
                    adaptive_timeout=adaptive_timeout,
                )
            )
            return function

        return bind

    def _bind(self, subscription: Subscription) -> None:
        known_as = subscription.spec.name
        if known_as in self._subscriptions:
            raise SubscriptionExists(f"bus {self.name!r} already has a subscription {known_as!r}; give one a name=")
        if self._state in ("stopping", "stopped"):
            raise ConfigurationError(f"bus {self.name!r} is {self._state}: subscribe before it stops")
        self._subscriptions[known_as] = subscription
        if self._state == "running":
            task = self._in_background("declare", self._run_late(subscription))
            for waits in (self._declaring, self._bars):
                waits.add(task)
                task.add_done_callback(waits.discard)

    async def _declare(self, subscription: Subscription) -> Worker:
        """Declare a subscription in the store, and make its worker."""
        subscription = self._reconfiguration.effective(subscription)
        spec = subscription.spec
        hold = await self._transport.declare(spec, consume=True)
        worker = Worker(
            subscription,
            transport=self._transport,
            hub=self.hub,
            clock=self.clock,
            sites=self._sites,
            uniform=self._random.random,
            shared=Shared(self.hub, self.clock, self.component_breakers, self.intake, self._reconfiguration.recovery),
        )
        worker.own_failure = self.emergency.error_handling_failed
        worker.tally(spec.pattern)
        self._workers[spec.name] = worker
        worker.gate.hold(hold)
        self.hub.state(SubscriptionDeclared(at=self._wall(), subscription=spec.name, pattern=spec.pattern))
        self._reconfiguration.prepare(worker)
        return worker

    async def _run_late(self, subscription: Subscription) -> None:
        (await self._declare(subscription)).start()
        self._learn()
