"""What an operator does to a running bus."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Self

from glassbus.bus.looking import Looking
from glassbus.bus.subscribing import Subscribing
from glassbus.errors import ConfigurationError, GlassbusError, UnknownSubscription
from glassbus.facts import SubscriptionForgotten, SubscriptionPaused, SubscriptionResumed
from glassbus.transport import Forced


class Drained(frozenset[str]):
    """What `drain` left behind: the subscriptions that still hold messages, none when all is done.

    `complete` says whether all is done. `reasons` says for each why it was left: paused,
    breaker_open, due_later or stopped.
    """

    reasons: Mapping[str, str]

    def __new__(cls, reasons: Mapping[str, str]) -> Self:
        made = super().__new__(cls, reasons)
        made.reasons = dict(reasons)
        return made

    @property
    def complete(self) -> bool:
        return not self


class Operating(Subscribing, Looking):
    """Pause, resume, reload, reconnect, forget; and waiting until nothing is left to do."""

    async def drain(self, timeout: float | None = None) -> Drained:  # noqa: ASYNC109 - raises, as asyncio.timeout would
        """Wait until the subscriptions that this bus runs have nothing left to do, waiting retries included.

        Those held by a pause or an open breaker, and messages due later (`delay`), are left and
        named in the result; when the bus stops, all that still hold messages are. Raises
        TimeoutError after `timeout` seconds, if given.
        """
        self._check_started()
        async with asyncio.timeout(timeout):
            while self._state == "running":
                if self._declaring:
                    await asyncio.wait(self._declaring)
                await self._transport.flush()
                busy, left = self._unfinished()
                if not busy:
                    await self._transport.flush()  # what the store has taken last is told too
                    return Drained(left)
                await self._progress()
        while self._state == "stopping":  # noqa: ASYNC110 - the stop at work has a deadline of its own
            await asyncio.sleep(0.01)
        accounts = self._transport.ledger().accounts
        return Drained({name: "stopped" for name in self._workers if name in accounts and accounts[name].pending})

    async def _progress(self) -> None:
        """Wait until something is settled here. Another process may do the work, so not for long."""
        settled = asyncio.Event()
        timer = asyncio.get_running_loop().call_later(0.05, settled.set)
        workers = list(self._workers.values())
        for worker in workers:
            worker.on_settled.add(settled.set)
        try:
            await settled.wait()
        finally:
            timer.cancel()
            for worker in workers:
                worker.on_settled.discard(settled.set)

    def _unfinished(self) -> tuple[bool, dict[str, str]]:
        busy, left = False, {}
        accounts = self._transport.ledger().accounts
        for name, worker in self._workers.items():
            account = accounts.get(name)
            if account is None:
                continue
            waiting = account.ready + account.retrying + account.in_flight
            if worker.gate.state_name != "running" and not worker.in_flight:
                if waiting or account.scheduled:
                    left[name] = worker.gate.state_name
            elif waiting:
                busy = True
            elif account.scheduled:
                left[name] = "due_later"
        return busy, left

    def pause(self, subscription: str) -> asyncio.Future[None]:
        """Stop handing out messages of `subscription`, in every process, and keep them.

        Awaiting the result waits until that is stored. Raises UnknownSubscription.
        """
        return self._hold(subscription, paused=True)

    def resume(self, subscription: str) -> asyncio.Future[None]:
        """End a `pause`, also one that the bus made here. Awaiting the result waits until that is stored."""
        self._reconfiguration.resume(subscription)
        return self._hold(subscription, paused=False)

    async def reload(self) -> tuple[str, ...]:
        """Read the configuration again and put it in force: all of it at once, without a restart.

        Returns the subscriptions that it names and this bus does not have: another bus may, or they are misspelt.
        Raises ConfigurationError, naming each key that cannot work, and TransportError; then nothing is changed.
        """
        if self._state != "running":
            raise ConfigurationError(f"bus {self.name!r} is {self._state}: it reloads while it runs")
        return await self._reconfiguration.reload()

    def _hold(
        self, subscription: str, *, paused: bool | None = None, forced: Forced | None = None
    ) -> asyncio.Future[None]:
        """Store a changed hold. It takes effect at once here, and stored it holds for all."""
        asyncio.get_running_loop()  # fails on another thread, before anything is changed
        self._check_started()
        known = self._transport.queues()
        if subscription not in known:
            raise UnknownSubscription(f"no subscription {subscription!r}; known are {sorted(known)}")
        worker = self._workers.get(subscription)
        if worker is not None:
            worker.gate.hold(worker.gate.held.changed(paused, forced))
        return self._in_background("hold", self._store_hold(subscription, paused, forced))

    async def _store_hold(self, subscription: str, paused: bool | None, forced: Forced | None) -> None:
        try:
            before = await self._transport.set_hold(subscription, paused=paused, forced=forced)
        except BaseException:
            stored = self._transport.queues().get(subscription)
            worker = self._workers.get(subscription)
            if worker is not None and stored is not None:
                worker.gate.hold(stored.hold)
            raise
        if paused is not None and paused != before.paused:
            kind = SubscriptionPaused if paused else SubscriptionResumed
            self.hub.state(kind(at=self._wall(), subscription=subscription))

    async def reconnect(self) -> None:
        """Dial the broker anew at once, endpoints that refused us included: for when what was wrong is mended.

        Returns once connected, at once where that is so already. Raises TransportError, which says why not.
        """
        self._check_started()
        if self._endpoint is None:
            raise ConfigurationError(f"bus {self.name!r} has no broker to connect to: its store is {self.address}")
        await self._endpoint.reconnect()

    async def forget(self, subscription: str) -> int:
        """Remove a subscription from the store, with all it holds; how many deliveries were discarded.

        Raises UnknownSubscription. What fails leaves it as it was, and running.
        """
        running = self._workers.get(subscription)
        if running is not None and running.runs(asyncio.current_task()):
            raise GlassbusError("a handler cannot await forget() of its own subscription; start a task for it")
        worker = self._workers.pop(subscription, None)
        try:
            if worker is not None:
                await worker.stop(self.settings.publish_timeout)
                await self._transport.flush()
            discarded = await self._transport.forget(subscription)
        except BaseException:
            kept = self._subscriptions.get(subscription)
            if worker is not None and kept is not None and self._state == "running":
                self._in_background("declare", self._run_late(kept))
            raise
        self._subscriptions.pop(subscription, None)
        self._learn()
        self.hub.state(SubscriptionForgotten(at=self._wall(), subscription=subscription, discarded=discarded))
        return discarded
