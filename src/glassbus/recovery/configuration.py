"""A configuration that can be read again while the bus runs, and what to do when it cannot work.

    read ──valid──> applied, and saved as the last known good
      └───not─────> the last known good stays in force; at a start without one, the subscriptions whose
                    part cannot work are paused and keep their messages, and the source is read again

A handler that fails with a configuration error has the source read again. A subscription whose deliveries
end that way, several in a row, is paused, and tried again from time to time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Protocol

from glassbus.clock import Clock
from glassbus.errors import ConfigurationError, ErrorCategory, GlassbusError, safe_text
from glassbus.facts import Delivery
from glassbus.observer import Hub
from glassbus.policy.breaker import BreakerState
from glassbus.recovery.guard import ComponentBreakers, Recovery
from glassbus.recovery.sources import ConfigurationSource, LastKnownGood

_ERROR = ErrorCategory.CONFIGURATION_ERROR
#: Deliveries in a row that end with a configuration error before their subscription is paused.
GIVEN_UP_MAX = 3
#: How soon a source that failed is read again, and how often at most failing handlers have it read, in seconds.
READ_AGAIN_S = 5.0
#: How soon a subscription that was paused for its handler is tried again, in seconds.
TRY_AGAIN_S = 15.0
#: What a problem of the configuration as a whole is filed under.
WHOLE = ""

#: What is wrong with a configuration, by subscription.
Problems = dict[str, str]


class Tunable(Protocol):
    """The bus, as far as a configuration changes it."""

    def check(self, values: Mapping[str, Any], /) -> Problems:
        """What cannot work, each complaint naming its key; empty when all can."""

    def adopt(self, values: Mapping[str, Any], without: Problems, /) -> None:
        """What the bus starts with, but for the subscriptions `without`."""

    def apply(self, values: Mapping[str, Any], /) -> Awaitable[None]:
        """Put `values`, which were checked, in force: all, or none where it raises what the store raised."""


class Gates(Protocol):
    """Holds a subscription back in this process, or lets it go on. Unknown names do nothing."""

    def hold_here(self, subscription: str, reason: str, /) -> None: ...
    def let_go(self, subscription: str, /) -> None: ...
    def try_again(self, subscription: str, /) -> None:
        """Let it go on for now: `hold_here` or `let_go` follows, and tells what came of it."""

    def subscriptions(self) -> list[str]: ...


class Configuration:
    """Of one bus. Belongs to its loop."""

    def __init__(
        self,
        source: ConfigurationSource | None,
        saved: LastKnownGood,
        *,
        hub: Hub,
        clock: Clock,
        breakers: ComponentBreakers,
        tunable: Tunable,
        gates: Gates,
        in_background: Callable[[str, Coroutine[Any, Any, None]], object],
    ) -> None:
        self._source = source
        self._saved = saved
        self._hub = hub
        self._monotonic, self._wall = clock.monotonic, clock.wall
        self._breakers = breakers
        self._tunable = tunable
        self._gates = gates
        self._in_background = in_background
        self._one_at_a_time = asyncio.Lock()
        self._in_force: dict[str, Any] | None = None
        #: Why subscriptions are paused because the configuration cannot work; WHOLE stands for all.
        self._problems: Problems = {}
        self._broken_since: float | None = None
        self._read_at = float("-inf")
        self._recovering = False
        self._attempt = 0
        # Handlers that fail with configuration errors
        self._given_up: dict[str, int] = {}
        self._try_at: dict[str, float] = {}
        self._trying: set[str] = set()

    # Reading

    async def start(self) -> None:
        """Read the source before the subscriptions start. What cannot work is stated, and paused: it raises nothing."""
        if self._source is None:
            return
        values, problems = await self._read()
        if not problems:
            self._tunable.adopt(values, {})
            await self._now_in_force(values)
            return
        self._broken_since = self._monotonic()
        error = _error(problems)
        recovery = self._begin(error)
        if recovery is not None:
            recovery.failed(error)
        last = self._last_known_good(error)
        try:
            found = await self._source.on_thread(self._saved.load)
            complaints = {WHOLE: "there is none"} if found is None else self._tunable.check(found)
        except ConfigurationError as damaged:
            found, complaints = None, {WHOLE: safe_text(damaged)}
        if found is not None and not complaints:
            self._tunable.adopt(found, {})
            self._in_force = found
            last.succeeded()
            return
        last.failed(_error(complaints))
        self._problems = problems
        if WHOLE not in problems:
            self._tunable.adopt(values, problems)

    def why_paused(self, subscription: str) -> str:
        """Why `subscription` must not start; empty when it may."""
        return self._problems.get(WHOLE) or self._problems.get(subscription, "")

    def cannot_work(self, subscription: str, problem: str) -> None:
        """A subscription that was bound later cannot work with the configuration in force."""
        self._problems[subscription] = problem

    async def reload(self) -> None:
        """Read the source again and put it in force, for an operator: no breaker is asked.

        Raises ConfigurationError when it cannot work, or there is no source, and what the store raises; nothing is
        changed then.
        """
        if self._source is None:
            raise ConfigurationError(
                "this bus has no configuration to reload; give it one: MessageBus(configuration=…)"
            )
        async with self._one_at_a_time:
            recovery = self._breakers.unguarded("configuration", _ERROR, "reload", self._source.described)
            await self._reload(recovery, None, by_operator=True)
            self._breakers.healed("configuration", _ERROR)

    async def _recover(self, error: BaseException | None, cause: Delivery | None) -> None:
        """Read the source again, for a handler that failed, or because it could not be read before."""
        try:
            async with self._one_at_a_time:
                recovery = self._begin(error)
                if recovery is not None:
                    await self._reload(recovery, cause)
        except GlassbusError:
            return  # stated by the recovery; it is tried again
        finally:
            self._recovering = False

    def _begin(self, error: BaseException | None) -> Recovery | None:
        assert self._source is not None
        self._attempt += 1
        return self._breakers.begin(
            "configuration",
            _ERROR,
            "reload",
            self._source.described,
            error=error,
            attempt=self._attempt,
            first_failed_at=self._broken_since,
        )

    async def _reload(self, recovery: Recovery, cause: Delivery | None, *, by_operator: bool = False) -> None:
        try:
            values, problems = await self._read()
            if problems:
                raise _error(problems)
            same = values == self._in_force and self._broken_since is None
            if not same:
                await self._tunable.apply(values)
        except Exception as error:
            recovery.failed(error, cause)
            last = self._last_known_good(error)
            if self._in_force is None:
                last.failed("there is none")
            else:
                last.succeeded()
            raise
        except BaseException:
            recovery.cancelled()
            raise
        if same and not by_operator:  # then it cannot have helped
            recovery.failed("nothing in it has changed", cause)
            return
        recovery.succeeded()
        if not same:
            await self._now_in_force(values)

    async def _read(self) -> tuple[dict[str, Any], Problems]:
        assert self._source is not None
        self._read_at = self._monotonic()
        try:
            values = await self._source.load()
        except ConfigurationError as error:
            return {}, {WHOLE: safe_text(error)}
        return values, self._tunable.check(values)

    def _last_known_good(self, error: BaseException) -> Recovery:
        assert self._source is not None
        return self._breakers.unguarded(
            "configuration", _ERROR, "last_known_good", self._source.described, error=safe_text(error, 300)
        )

    async def _now_in_force(self, values: dict[str, Any]) -> None:
        self._in_force = values
        self._broken_since = None
        self._attempt = 0
        self._problems = {}
        for name in self._gates.subscriptions():
            self.release(name)
        assert self._source is not None
        try:
            await self._source.on_thread(lambda: self._saved.save(values, self._wall()))
        except OSError as error:
            self._hub.failed(self, "saving the last known good", error)

    # Handlers that fail with a configuration error

    def handler_failed(self, subscription: str, delivery: Delivery, error: BaseException) -> None:
        """An attempt failed with a configuration error: read the source again, if it was not just read."""
        if subscription in self._trying:
            self._pause(subscription)
        if self._source is not None and self._monotonic() >= self._read_at + READ_AGAIN_S:
            self._recover_soon(error, delivery)

    def handler_gave_up(self, subscription: str) -> None:
        """A delivery was dead-lettered for a configuration error."""
        count = self._given_up[subscription] = self._given_up.get(subscription, 0) + 1
        if count >= GIVEN_UP_MAX and subscription not in self._try_at:
            self._pause(subscription)

    def handler_succeeded(self, subscription: str) -> None:
        """Attempts of `subscription` succeed."""
        if self._given_up.pop(subscription, None) is None and subscription not in self._trying:
            return
        if subscription in self._trying:
            self._trying.discard(subscription)
            self._gates.let_go(subscription)
        if not self._given_up and self._broken_since is None:
            self._breakers.healed("configuration", _ERROR)

    def _pause(self, subscription: str) -> None:
        self._trying.discard(subscription)
        self._try_at[subscription] = self._monotonic() + TRY_AGAIN_S
        count = self._given_up.get(subscription, 0)
        self._gates.hold_here(
            subscription, f"configuration: {count} deliveries in a row ended with a configuration error"
        )

    def release(self, subscription: str) -> None:
        """Let `subscription` go on, whatever it was paused for here."""
        self._problems.pop(subscription, None)
        self._try_at.pop(subscription, None)
        self._trying.discard(subscription)
        self._given_up.pop(subscription, None)
        self._gates.let_go(subscription)

    def look(self) -> None:
        """Try again what it is time for. Called about once a second."""
        now = self._monotonic()
        due = [name for name, at in self._try_at.items() if now >= at]
        for name in due:
            del self._try_at[name]
            self._trying.add(name)
            self._gates.try_again(name)
        if self._source is None or now < self._read_at + READ_AGAIN_S:
            return
        shut = self._breakers.state("configuration", _ERROR) is BreakerState.OPEN
        if (due or self._broken_since is not None) and not shut:
            self._recover_soon(None, None)

    def _recover_soon(self, error: BaseException | None, cause: Delivery | None) -> None:
        if not self._recovering:
            self._recovering = True
            self._in_background("reload", self._recover(error, cause))

    def stop(self) -> None:
        if self._source is not None:
            self._source.close()


def _error(problems: Problems) -> ConfigurationError:
    return ConfigurationError("; ".join(problems.values()))
