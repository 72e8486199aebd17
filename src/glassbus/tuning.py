"""What of a bus can be changed while it runs, by a configuration such as:

    [bus]
    publish_timeout = 5.0            # seconds
    payload_bytes_max = 1048576

    [subscriptions.charge]
    timeout = 2.0                    # and: abandon_after, concurrency, capacity, paused
    retry.max_attempts = 8           # every number of Retry,
    kill_switch.open_for = 10.0      # of KillSwitch,
    adaptive_timeout.cap = 2.0       # and of AdaptiveTimeout

What is not named is as `MessageBus` and `subscribe` were given it. Subscriptions that this bus does not
have are left to the buses that do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import msgspec

from glassbus.clock import Clock
from glassbus.config import Settings
from glassbus.errors import ConfigurationError, safe_text
from glassbus.observer import Hub
from glassbus.recovery.configuration import WHOLE, Configuration, Problems
from glassbus.recovery.guard import ComponentBreakers
from glassbus.recovery.sources import ConfigurationSource, LastKnownGood, Source
from glassbus.subscription import Subscription, check_settings, retuned
from glassbus.transport import SubscriptionSpec
from glassbus.worker import SETTINGS, Worker

#: Who holds a subscription back that cannot work with its configuration.
_CONFIGURATION = "configuration"

_TOP: dict[str, type] = {"bus": dict, "subscriptions": dict}
_BUS: dict[str, type] = {"publish_timeout": float, "payload_bytes_max": int}


class Tuning:
    """Checks configurations and puts them in force. Belongs to the bus's loop.

    `subscriptions` are those that the bus has, as `subscribe` made them, and `workers` those that run.
    `declare` stores a changed subscription; `bus_wide` is told the settings of the bus.
    """

    def __init__(
        self,
        settings: Settings,
        subscriptions: Mapping[str, Subscription],
        workers: Mapping[str, Worker],
        *,
        declare: Callable[[SubscriptionSpec], Awaitable[object]],
        bus_wide: Callable[[Settings], None],
    ) -> None:
        self._settings = settings
        self._subscriptions = subscriptions
        self._workers = workers
        self._declare = declare
        self._bus_wide = bus_wide
        self._parts: dict[str, Mapping[str, Any]] = {}

    def check(self, values: Mapping[str, Any], /) -> Problems:
        """What cannot work, by subscription; `WHOLE` for what is not of one."""
        problems: Problems = {}
        try:
            check_settings("the configuration", values, _TOP)
            self._settings_of(values)
            for name, part in values.get("subscriptions", {}).items():
                if not isinstance(part, dict):
                    raise ConfigurationError(f"subscriptions.{name} must be a table of settings")
        except ConfigurationError as error:
            return {WHOLE: safe_text(error)}
        parts = values.get("subscriptions", {})
        for name in sorted(parts.keys() & self._subscriptions.keys()):
            try:
                retuned(self._subscriptions[name], parts[name])
            except ConfigurationError as error:
                problems[name] = safe_text(error)
        return problems

    def _settings_of(self, values: Mapping[str, Any]) -> Settings:
        given = values.get("bus", {})
        check_settings("bus", given, _BUS)
        try:
            return msgspec.structs.replace(self._settings, **given)
        except ConfigurationError as error:
            raise ConfigurationError(f"bus: {safe_text(error)}") from None

    def effective(self, subscription: Subscription) -> Subscription:
        """`subscription` as the configuration in force wants it. Raises ConfigurationError."""
        return retuned(subscription, self._parts.get(subscription.spec.name, {}))

    def strangers(self) -> tuple[str, ...]:
        """Subscriptions that the configuration in force names and this bus does not have."""
        return tuple(sorted(self._parts.keys() - self._subscriptions.keys()))

    def adopt(self, values: Mapping[str, Any], without: Problems, /) -> None:
        """What subscriptions are to start with, but for those `without`."""
        self._bus_wide(self._settings_of(values))
        self._parts = {name: part for name, part in values.get("subscriptions", {}).items() if name not in without}

    async def apply(self, values: Mapping[str, Any], /) -> None:
        """Put `values` in force in what runs: all, or none when the store fails. Raises what it raises."""
        parts = values.get("subscriptions", {})
        wanted = {
            name: retuned(self._subscriptions[name], parts.get(name, {}))
            for name in self._workers
            if name in self._subscriptions
        }
        declared: list[SubscriptionSpec] = []
        try:
            for name, subscription in wanted.items():
                before = self._workers[name].subscription.spec
                if subscription.spec != before:
                    declared.append(before)
                    await self._declare(subscription.spec)
        except BaseException:
            for before in declared:
                await self._declare(before)
            raise
        # From here on nothing waits and nothing can fail.
        self.adopt(values, {})
        for name, subscription in wanted.items():
            worker = self._workers.get(name)
            if worker is not None:
                worker.tune(subscription)


class Holds:
    """The gates of the subscriptions that run here (`recovery.configuration.Gates`)."""

    def __init__(self, workers: Mapping[str, Worker]) -> None:
        self._workers = workers

    def hold_here(self, subscription: str, reason: str, /) -> None:
        worker = self._workers.get(subscription)
        if worker is not None:
            worker.gate.hold_here(_CONFIGURATION, reason)

    def let_go(self, subscription: str, /) -> None:
        worker = self._workers.get(subscription)
        if worker is not None:
            worker.gate.let_go(_CONFIGURATION)

    def try_again(self, subscription: str, /) -> None:
        worker = self._workers.get(subscription)
        if worker is not None:
            worker.gate.try_again(_CONFIGURATION)

    def subscriptions(self) -> list[str]:
        return list(self._workers)


class Reconfiguration:
    """The configuration of a bus and its way into what runs. Belongs to the bus's loop."""

    def __init__(
        self,
        source: Source | None,
        settings: Settings,
        subscriptions: Mapping[str, Subscription],
        workers: Mapping[str, Worker],
        *,
        hub: Hub,
        clock: Clock,
        breakers: ComponentBreakers,
        declare: Callable[[SubscriptionSpec], Awaitable[object]],
        bus_wide: Callable[[Settings], None],
        in_background: Callable[[str, Coroutine[Any, Any, None]], object],
    ) -> None:
        """Raises ConfigurationError when `source` can be none."""
        self._workers = workers
        self._tuning = Tuning(settings, subscriptions, workers, declare=declare, bus_wide=bus_wide)
        read = None if source is None else ConfigurationSource(source, clock)
        digest = "" if read is None else read.digest(settings.name)
        self.recovery = Configuration(
            read,
            LastKnownGood(None if read is None else settings.state_dir, digest),
            hub=hub,
            clock=clock,
            breakers=breakers,
            tunable=self._tuning,
            gates=Holds(workers),
            in_background=in_background,
        )

    async def reload(self) -> tuple[str, ...]:
        """Read the source again and put it in force. The subscriptions it names that this bus does not have.

        Raises what `Configuration.reload` does.
        """
        await self.recovery.reload()
        return self._tuning.strangers()

    def effective(self, subscription: Subscription) -> Subscription:
        """`subscription` as the configuration in force wants it; where that cannot work, as it is, to be paused."""
        try:
            return self._tuning.effective(subscription)
        except ConfigurationError as error:
            self.recovery.cannot_work(subscription.spec.name, safe_text(error))
            return subscription

    def prepare(self, worker: Worker) -> None:
        """Hold a worker that must not start back, before it starts."""
        why = self.recovery.why_paused(worker.name)
        if why:
            worker.gate.hold_here(_CONFIGURATION, f"configuration: {why}")
        if worker.subscription.paused:
            worker.gate.hold_here(SETTINGS, "")

    def resume(self, subscription: str) -> None:
        """An operator lets `subscription` go on, whatever the configuration holds it back for."""
        self.recovery.release(subscription)
        worker = self._workers.get(subscription)
        if worker is not None:
            worker.gate.let_go(SETTINGS)
