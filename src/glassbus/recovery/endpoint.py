"""Keeps a broker's transport connected: watches the connection, dials again, fails over, asks for credentials.

The decisions are `policy.failover`'s; this carries them out on the loop, one dial at a time, and states what
happened. Whatever a connection does (raise anything, hang, ignore its cancellation) is a failed dial or a lost
connection, and no more. Calling something off is counted nowhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from glassbus.classification import classify
from glassbus.clock import Clock
from glassbus.config import Address, Credentials
from glassbus.errors import (
    ConfigurationError,
    EndpointRefused,
    EndpointUnreachable,
    ErrorCategory,
    TransportError,
    safe_text,
    type_name,
)
from glassbus.facts import (
    BreakerStateChanged,
    ConnectionLost,
    ConnectionRestored,
    CredentialsRefreshed,
    Fact,
    transport_failed,
)
from glassbus.policy.breaker import BreakerState
from glassbus.policy.failover import Dial, FailoverSet, Link, Reconnect
from glassbus.recovery.calls import GRACE_S, Calls
from glassbus.recovery.connections import Connection, EndpointBreaker
from glassbus.recovery.credentials import CredentialsRefused, CredentialsSource, Vault
from glassbus.recovery.guard import ComponentBreakers, Recovery
from glassbus.transport import Dialer

_CONNECTION = ErrorCategory.CONNECTION_ERROR
_AUTHENTICATION = ErrorCategory.AUTHENTICATION_ERROR
_LOOK_S = 1.0
#: How long the breaker of all reconnecting is open: a broker that is back is to be found at once, and each endpoint
#: has a breaker of its own besides.
_OPEN_FOR_S = 0.5


class EndpointSupervisor:
    """The `Supervisor` of a failover set. Belongs to the loop; the views may be read on any thread.

    It states facts by `state`; `breakers` are the bus's, for the recoveries of the component "endpoint". Without
    `credentials`, those in each address's URL are shown. With it, it is asked once when an endpoint refuses those in
    use (and before the first dial when no URL has any), and what it gave is shown to all endpoints from then on.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        state: Callable[[Fact], None],
        *,
        breakers: ComponentBreakers,
        clock: Clock,
        uniform: Callable[[], float],
        settings: Reconnect | None = None,
        credentials: CredentialsSource | None = None,
    ) -> None:
        self._addresses = list(addresses)
        self._settings = settings or Reconnect()
        self._state = state
        self._breakers = breakers
        breakers.pace("endpoint", _OPEN_FOR_S)
        self._monotonic, self._wall = clock.monotonic, clock.wall
        self._uniform = uniform
        self._set = FailoverSet(len(self._addresses), self._settings, uniform)
        self._endpoints = [self._view(number) for number in range(len(self._addresses))]
        self._vault = Vault(credentials, clock) if credentials is not None else None
        self._credentials: Credentials | None = None
        self._dialer: Dialer
        self._down_since: float | None = None
        self._error: TransportError | ConfigurationError | None = None
        self._hopeless = False
        self._lost_meanwhile: BaseException | None = None
        self._reset_wanted = False
        self._connected = asyncio.Event()
        self._kicked = asyncio.Event()
        self._loss: asyncio.Future[None] | None = None
        self._turned: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._calls = Calls()

    def _view(self, number: int) -> EndpointBreaker:
        breaker = self._set.breaker(number)
        return EndpointBreaker(str(self._addresses[number]), lambda: breaker.state)

    # What the transport asks

    async def start(self, dialer: Dialer, /) -> None:
        """Return once connected. Raises EndpointUnreachable, EndpointRefused or what a dial said cannot be mended."""
        if self._task is not None:
            raise TransportError("this supervisor was started before; make a new one")
        self._dialer = dialer
        self._set.start(self._monotonic())
        self._task = asyncio.create_task(self._supervise(), name="glassbus-endpoint")
        try:
            await self._outcome(self._settings.start_timeout)
        except BaseException:
            await self.stop()
            raise

    def lost(self, error: BaseException, /) -> None:
        if self._set.link is Link.DIALLING:
            self._lost_meanwhile = self._lost_meanwhile or error
        if self._set.link is not Link.UP:
            return
        self._connected.clear()
        self._set.lost(self._monotonic())
        self._note(self._set.current, error)
        self._endpoints[self._set.current].since = self._wall()
        if self._loss is not None and not self._loss.done():
            self._loss.set_result(None)

    async def connected(self) -> None:
        await self._connected.wait()

    def up(self) -> bool:
        return self._connected.is_set()

    async def stop(self) -> None:
        if self._set.link is Link.STOPPED:
            return
        self._set.stop()
        self._connected.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=GRACE_S)
            await self._calls.call_off()
            await self._hang_up()
        if self._vault is not None:
            self._vault.close()
        self._wake()

    # What operators and telemetry ask

    async def reconnect(self) -> None:
        """Try anew at once, endpoints that refused us included. Returns once connected; raises as `start` does."""
        if self._set.link in (Link.NEW, Link.STOPPED):
            raise TransportError("there is nothing to reconnect: the bus does not run")
        if self._set.link is Link.UP:
            return
        self._reset_wanted = True
        if self._set.link is not Link.DIALLING:
            self._reset()
        self._kicked.set()
        await self._outcome(self._settings.start_timeout)

    def breaker_views(self) -> list[EndpointBreaker]:
        return list(self._endpoints)

    def connections(self, spooled: int = 0) -> list[Connection]:
        now, current = self._monotonic(), self._set.current if self.up() else -1
        return [
            Connection(
                one.name,
                number == current,
                one.since,
                None if one.answered_at is None else now - one.answered_at,
                one.state,
                spooled,
            )
            for number, one in enumerate(self._endpoints)
        ]

    # The work

    async def _supervise(self) -> None:
        if self._vault is not None and not any(any(address.credentials) for address in self._addresses):
            answer = await self._calls.make(self._vault.ask, self._settings.credentials_timeout)
            if answer.error is None:
                self._credentials = answer.value
            # Else the dial without credentials will be refused, and they are asked for again, with facts.
        while True:
            try:
                await self._turn()
            except Exception as error:  # noqa: BLE001 - whatever is wrong, a bus without a supervisor would be worse
                self._state(transport_failed(self._wall(), "supervise", error))
                if self._set.link is Link.DIALLING:
                    self._set.failed(self._monotonic())
                await self._rest(self._settings.max_delay)

    async def _turn(self) -> None:
        """Dial, and watch the connection until it is lost; or wait until it is time to."""
        if self._set.link is Link.UP:
            await self._watch()
            return
        now = self._monotonic()
        if self._down_since is not None:
            ready_at = self._breakers.ready_at("endpoint", _CONNECTION)
            if ready_at > now and self._set.link is not Link.REFUSED:
                await self._rest(min(ready_at - now, _LOOK_S))
                return
        step = self._set.next(now)
        self._tell_moves()
        if not isinstance(step, Dial):
            await self._rest(step - now)
            return
        self._lost_meanwhile = None
        if step.trial:
            await self._refresh(step.endpoint)
        else:
            await self._redial(step.endpoint)
        self._tell_moves()
        if self._reset_wanted and not self.up():
            self._reset()
        self._reset_wanted = False
        self._wake()

    async def _redial(self, endpoint: int) -> None:
        recovery: Recovery | None = None
        if self._down_since is not None:
            action = "reconnect" if endpoint == self._set.current else "failover"
            recovery = self._begin(_CONNECTION, action, endpoint)
            if recovery is None:
                self._set.put_off(self._monotonic())
                return
        try:
            error = await self._dial(endpoint)
        except asyncio.CancelledError:
            if recovery is not None:
                recovery.cancelled()
            raise
        if error is None:
            self._succeed(endpoint, recovery)
            return
        if recovery is not None:
            recovery.failed(error)
        if isinstance(error, EndpointRefused):
            self._note(endpoint, error)
            await self._refresh(endpoint)
        else:
            self._fail(endpoint, error)

    async def _refresh(self, endpoint: int) -> None:
        """An endpoint refused us: dial it once more with new credentials, or give it up."""
        recovery = self._begin(_AUTHENTICATION, "refresh_credentials", endpoint)
        try:
            error = await self._dial_refreshed(endpoint) if recovery is not None else self._error
        except asyncio.CancelledError:
            if recovery is not None:
                recovery.cancelled()
            raise
        if error is None:
            self._succeed(endpoint, recovery)
            return
        if recovery is not None:
            recovery.failed(error)
        if isinstance(error, EndpointRefused):
            self._note(endpoint, error)
            self._count(endpoint, worked=False)
            self._set.refused(self._monotonic())
        else:
            self._fail(endpoint, error)

    async def _dial_refreshed(self, endpoint: int) -> TransportError | ConfigurationError | None:
        if self._vault is None:
            return await self._dial(endpoint) if self._set.on_trial else self._error
        if self._set.refreshed:
            return self._error
        self._set.refreshed = True
        answer = await self._calls.make(self._vault.ask, self._settings.credentials_timeout)
        why = "" if answer.error is None else self._why_no_credentials(answer.error)
        self._state(
            CredentialsRefreshed(at=self._wall(), endpoint=self._endpoints[endpoint].name, succeeded=not why, error=why)
        )
        if why:
            return EndpointRefused(f"no new credentials: {why}")
        self._credentials = answer.value
        return await self._dial(endpoint)

    def _why_no_credentials(self, error: BaseException) -> str:
        if isinstance(error, EndpointUnreachable):
            return f"the credentials function did not answer within {self._settings.credentials_timeout:g} s"
        told = safe_text(error, 300)
        return told if isinstance(error, CredentialsRefused) else f"{type_name(type(error))}: {told}"

    async def _dial(self, endpoint: int) -> TransportError | ConfigurationError | None:
        """What went wrong; None: connected."""
        self._lost_meanwhile = None
        address, credentials = self._addresses[endpoint], self._credentials
        error = (
            await self._calls.make(lambda: self._dialer.dial(address, credentials), self._settings.dial_timeout)
        ).error or self._lost_meanwhile
        if error is None:
            return None
        await self._hang_up()
        return _ours(error)

    def _succeed(self, endpoint: int, recovery: Recovery | None) -> None:
        now = self._monotonic()
        used_before = self._endpoints[self._set.current].name
        self._set.connected(now)
        one = self._endpoints[endpoint]
        one.since, one.answered_at = self._wall(), now
        self._count(endpoint, worked=True)
        if recovery is not None:
            recovery.succeeded()
        self._breakers.healed("endpoint", _CONNECTION)
        self._breakers.healed("endpoint", _AUTHENTICATION)
        self._tell_moves()
        self._loss = asyncio.get_running_loop().create_future()
        self._error = None
        down_since, self._down_since = self._down_since, None
        if down_since is not None:
            self._state(
                ConnectionRestored(
                    at=self._wall(),
                    endpoint=one.name,
                    after_s=now - down_since,
                    attempts=self._set.attempts,
                    failed_over_from=used_before if used_before != one.name else "",
                )
            )
        self._connected.set()

    def _fail(self, endpoint: int, error: TransportError | ConfigurationError) -> None:
        self._note(endpoint, error)
        self._hopeless = not isinstance(error, EndpointUnreachable)
        self._count(endpoint, worked=False)
        self._set.failed(self._monotonic())

    def _note(self, endpoint: int, error: BaseException) -> None:
        """Keep why there is no connection, and state it once for each loss."""
        self._error = ours = _ours(error)
        if self._down_since is None:
            self._down_since = self._monotonic()
            self._state(
                ConnectionLost(
                    at=self._wall(),
                    endpoint=self._endpoints[endpoint].name,
                    category=_AUTHENTICATION if isinstance(ours, EndpointRefused) else _CONNECTION,
                    error=f"{type_name(type(ours))}: {safe_text(ours, 300)}",
                )
            )

    async def _watch(self) -> None:
        """Make round trips until the connection is lost."""
        loss = self._loss
        assert loss is not None
        while not loss.done():
            pause_s = self._settings.probe_every * (0.9 + 0.2 * self._uniform())
            await asyncio.wait({loss}, timeout=pause_s)
            if loss.done():
                break
            answer = await self._calls.make(self._dialer.probe, self._settings.probe_timeout, unless=loss)
            if loss.done():
                break
            if answer.error is None:
                self._endpoints[self._set.current].answered_at = self._monotonic()
                self._set.tick(self._monotonic())
                self._tell_moves()
            else:
                self.lost(EndpointUnreachable(f"a round trip failed: {safe_text(answer.error, 200)}"))
        await self._hang_up()

    # Its tools

    async def _hang_up(self) -> None:
        answer = await self._calls.make(self._dialer.hang_up, GRACE_S)
        if answer.error is not None:
            self._state(transport_failed(self._wall(), "hang_up", _ours(answer.error)))

    async def _rest(self, seconds: float) -> None:
        """Wait, but not once somebody asks to reconnect."""
        self._kicked.clear()
        waiting = asyncio.ensure_future(self._kicked.wait())
        try:
            await asyncio.wait({waiting}, timeout=None if seconds == float("inf") else max(0.0, seconds))
        finally:
            waiting.cancel()

    async def _outcome(self, within_s: float) -> None:
        """Wait for a connection.

        Raises why there is none, once that is final, or once `within_s` and the try then under way are over.
        """
        until = self._monotonic() + within_s
        while self._set.link is not Link.UP:
            final = self._hopeless or (self._set.link is Link.REFUSED and not self._reset_wanted)
            left_s = until - self._monotonic()
            over = left_s <= 0 and self._set.link is not Link.DIALLING
            if final or over or self._set.link is Link.STOPPED:
                raise self._error or EndpointUnreachable(f"no connection within {within_s:g} s")
            if self._turned is None or self._turned.done():
                self._turned = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._turned}, timeout=left_s if left_s > 0 else None)

    def _wake(self) -> None:
        if self._turned is not None and not self._turned.done():
            self._turned.set_result(None)

    def _begin(self, category: ErrorCategory, action: str, endpoint: int) -> Recovery | None:
        return self._breakers.begin(
            "endpoint",
            category,
            action,
            self._endpoints[endpoint].name,
            error=self._error,
            attempt=max(1, self._set.attempts),
            first_failed_at=self._down_since,
        )

    def _reset(self) -> None:
        self._reset_wanted = False
        self._hopeless = False
        self._set.reset(self._monotonic())
        self._breakers.reset("endpoint", _CONNECTION)
        self._breakers.reset("endpoint", _AUTHENTICATION)
        self._tell_moves()

    def _count(self, endpoint: int, *, worked: bool) -> None:
        one = self._endpoints[endpoint]
        if worked:
            one.succeeded_count += 1
        else:
            one.failed_count += 1

    def _tell_moves(self) -> None:
        for endpoint, transition in self._set.take_moves():
            forced = transition.to_state is BreakerState.FORCED_OPEN
            self._state(
                BreakerStateChanged(
                    at=self._wall(),
                    breaker=self._endpoints[endpoint].name,
                    kind="endpoint",
                    subscription="",
                    from_state=transition.from_state.value,
                    to_state=transition.to_state.value,
                    reason="credentials refused" if forced else transition.reason,
                )
            )


def _ours(error: BaseException) -> TransportError | ConfigurationError:
    """The same failure as a fresh error of ours: no frame is kept, and nothing of a foreign class is trusted."""
    kind, text = type(error), safe_text(error, 500)
    if kind in (EndpointUnreachable, EndpointRefused, ConfigurationError, TransportError):
        return kind(text)
    text = f"{type_name(kind)}: {text}"
    if issubclass(kind, EndpointRefused) or classify(error)[0] is _AUTHENTICATION:
        return EndpointRefused(text)
    if issubclass(kind, ConfigurationError):
        return ConfigurationError(text)
    if issubclass(kind, TransportError) and not issubclass(kind, EndpointUnreachable):
        return TransportError(text)
    return EndpointUnreachable(text)
