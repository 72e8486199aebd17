"""Which endpoint of a failover set to dial next, and when. Pure: told what happened and what time it is.

    new --> waiting <--> dialling --> up --> waiting …
               ^            |
               +- refused <-+      every endpoint refuses us; each is looked at again, rarely

Each endpoint has a breaker, a count of failures in a row, and a time before which it is left alone: after a
failure a random one with full jitter, doubling up to `max_delay`; once its breaker is open, the breaker's wait and
some jitter. The endpoint whose time has come first is dialled; of several, that used last, then the nearest after
it in the list. On a loss the others' time is `failover_after` away, so the endpoint in use gets a few tries of
its own. While the one in use works there is no going back to an earlier one: moving would cost a loss.

An endpoint that refuses our credentials although they were refreshed is given up: its breaker is forced open,
and it is dialled again only each `refused_again` seconds, or when an operator says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

import msgspec

from glassbus.errors import ConfigurationError, shown
from glassbus.policy.breaker import Breaker, BreakerState, ConsecutiveFailures, Transition
from glassbus.policy.retry import Retry

#: Spread over so many seconds, processes that lost one broker together do not dial it together.
_SPREAD_S = 1.0


class Reconnect(msgspec.Struct, frozen=True):
    """How a broker's connection is watched, and made again when it is lost. Times in seconds.

    A round trip is made every `probe_every`; without an answer within `probe_timeout` the connection counts as
    lost. Tries wait a random time up to `base_delay`, doubling to `max_delay`. One takes at most `dial_timeout`, which
    leaves time to read a large store; silence is noticed sooner. After `failures` in a row the endpoint's breaker
    opens, and lets one try through each `open_for` (and up to 1 s more). Other endpoints of the set are tried from
    `failover_after` on. A connection that did not hold for `steady_after` does not start the delays anew. A start
    tries for `start_timeout`, and waits for the try that is then under way. New credentials are waited for
    `credentials_timeout`; an endpoint that refuses them is looked at again each `refused_again` (infinity: never).
    """

    base_delay: float = 0.1
    max_delay: float = 2.0
    failures: int = 5
    open_for: float = 2.0
    failover_after: float = 1.0
    steady_after: float = 5.0
    dial_timeout: float = 30.0
    start_timeout: float = 10.0
    probe_every: float = 3.0
    probe_timeout: float = 3.0
    credentials_timeout: float = 5.0
    refused_again: float = 300.0

    def __post_init__(self) -> None:
        if type(self.failures) is not int or self.failures < 1:
            raise ConfigurationError(f"Reconnect.failures must be a whole number from 1 on, not {shown(self.failures)}")
        for name in (name for name in self.__struct_fields__ if name != "failures"):
            value = getattr(self, name)
            endless = name == "refused_again" and value == math.inf
            if type(value) not in (int, float) or not (0 < value < math.inf or endless):
                raise ConfigurationError(f"Reconnect.{name} must be more than 0 seconds and finite, not {shown(value)}")
        if self.max_delay < self.base_delay:
            raise ConfigurationError("Reconnect.max_delay must be at least base_delay")


class Link(StrEnum):
    """Where the one connection that is wanted stands."""

    NEW = "new"
    WAITING = "waiting"
    DIALLING = "dialling"
    UP = "up"
    REFUSED = "refused"
    STOPPED = "stopped"


LEGAL: dict[Link, frozenset[Link]] = {
    Link.NEW: frozenset({Link.WAITING, Link.STOPPED}),
    Link.WAITING: frozenset({Link.DIALLING, Link.STOPPED}),
    Link.DIALLING: frozenset({Link.UP, Link.WAITING, Link.REFUSED, Link.STOPPED}),
    Link.UP: frozenset({Link.WAITING, Link.STOPPED}),
    Link.REFUSED: frozenset({Link.DIALLING, Link.WAITING, Link.STOPPED}),
    Link.STOPPED: frozenset(),
}


class Dial(msgspec.Struct, frozen=True):
    """Dial this endpoint now. `trial`: it refused us before, and is looked at again."""

    endpoint: int
    trial: bool = False


class Moved(NamedTuple):
    """The breaker of an endpoint moved."""

    endpoint: int
    transition: Transition[str]


class _Endpoint:
    def __init__(self, settings: Reconnect) -> None:
        self.breaker: Breaker[str] = Breaker(ConsecutiveFailures(settings.failures), open_for_s=settings.open_for)
        self.due = 0.0
        self.failures = 0
        self.permit = 0

    @property
    def refused(self) -> bool:
        return self.breaker.state is BreakerState.FORCED_OPEN


class FailoverSet:
    """The endpoints `0 .. count - 1`, of which one is to be connected. `now` is monotonic seconds, `uniform` chance.

    Call `next`; when it says Dial, do, and tell `connected`, `failed` or `refused`. `lost` when the connection is gone.
    `take_moves` gives what the breakers did since it was last asked.
    """

    def __init__(self, count: int, settings: Reconnect, uniform: Callable[[], float]) -> None:
        if count < 1:
            raise ConfigurationError("a failover set needs at least one endpoint")
        self.link = Link.NEW
        #: The endpoint in use, or used last; before the first connection, the first.
        self.current = 0
        #: Dials since the loss.
        self.attempts = 0
        #: Credentials were refreshed since the last connection that held; they are not asked for again.
        self.refreshed = False
        self._settings = settings
        self._uniform = uniform
        self._backoff = Retry(
            immediate=0, base_delay=float(settings.base_delay), max_delay=float(settings.max_delay), multiplier=2.0
        )
        self._endpoints = [_Endpoint(settings) for _ in range(count)]
        self._dialled = 0
        self._up_at = -math.inf
        self._moves: list[Moved] = []

    def breaker(self, endpoint: int) -> Breaker[str]:
        return self._endpoints[endpoint].breaker

    def take_moves(self) -> list[Moved]:
        taken, self._moves = self._moves, []
        return taken

    def _move(self, to: Link) -> None:
        if to is self.link:
            return
        if to not in LEGAL[self.link]:
            raise AssertionError(f"illegal move of a connection {self.link} -> {to}")
        self.link = to

    def _moved(self, endpoint: int, transition: Transition[str] | None) -> None:
        if transition is not None:
            self._moves.append(Moved(endpoint, transition))

    # What to do

    def start(self, now: float) -> None:
        """Dial the first at once, the others `failover_after` later."""
        self._move(Link.WAITING)
        for number, one in enumerate(self._endpoints):
            one.due = now if number == 0 else now + self._settings.failover_after

    def next(self, now: float) -> Dial | float:
        """The endpoint to dial now, or the time at which to ask again (infinity: only `reset` helps)."""
        if self.link not in (Link.WAITING, Link.REFUSED):
            raise AssertionError(f"nothing is to be dialled while {self.link}")
        for endpoint in self._in_turn(refused=False):
            one = self._endpoints[endpoint]
            if one.due > now:
                break
            self._moved(endpoint, one.breaker.tick(now + 1e-6))
            permit = one.breaker.admit(now)
            if permit is None:  # a probe that never ended still has the permit
                one.due = now + self._settings.open_for
                continue
            one.permit = permit
            return self._dial(endpoint, trial=False)
        for endpoint in self._in_turn(refused=True):
            if self._endpoints[endpoint].due <= now:
                self.refreshed = False
                return self._dial(endpoint, trial=True)
        return min(one.due for one in self._endpoints)

    def _in_turn(self, *, refused: bool) -> list[int]:
        count = len(self._endpoints)
        wanted = [n for n in range(count) if self._endpoints[n].refused is refused]
        return sorted(wanted, key=lambda n: (self._endpoints[n].due, (n - self.current) % count))

    def _dial(self, endpoint: int, *, trial: bool) -> Dial:
        self._move(Link.DIALLING)
        self._dialled = endpoint
        self.attempts += 1
        return Dial(endpoint, trial)

    # What happened

    def connected(self, now: float) -> None:
        """The dial succeeded."""
        one = self._endpoints[self._dialled]
        if one.refused:
            self._moved(self._dialled, one.breaker.reset())
        else:
            self._moved(self._dialled, one.breaker.succeeded(None, now, one.permit))
        self.current = self._dialled
        self._up_at = now
        self._move(Link.UP)

    def failed(self, now: float) -> None:
        """The dial failed, but a later one may work."""
        one = self._endpoints[self._dialled]
        if one.refused:
            one.due = now + self._settings.refused_again
        else:
            one.failures += 1
            self._moved(self._dialled, one.breaker.failed(None, "", now, one.permit))
            one.due = now + self._delay(one)
        self._move(self._resting())

    def _delay(self, one: _Endpoint) -> float:
        if one.breaker.state is BreakerState.OPEN:
            return self._settings.open_for + _SPREAD_S * self._uniform()
        return self._backoff.delay(max(1, one.failures), self._uniform)

    def refused(self, now: float) -> None:
        """The endpoint does not take our credentials, and there are no others to try."""
        one = self._endpoints[self._dialled]
        one.failures = 0
        one.due = now + self._settings.refused_again * (1 + 0.1 * self._uniform())
        self._moved(self._dialled, one.breaker.force_open())
        self._move(self._resting())

    def _resting(self) -> Link:
        return Link.REFUSED if all(one.refused for one in self._endpoints) else Link.WAITING

    def put_off(self, now: float) -> None:
        """The dial was not made after all."""
        one = self._endpoints[self._dialled]
        one.breaker.release(one.permit)
        one.due = now + self._settings.base_delay
        self.attempts -= 1
        self._move(self._resting())

    def tick(self, now: float) -> None:
        """Half-open the breakers whose wait is over; for while the connection is up, when nobody asks `next`."""
        for number, one in enumerate(self._endpoints):
            self._moved(number, one.breaker.tick(now))

    @property
    def on_trial(self) -> bool:
        """Whether the endpoint dialled refused us before."""
        return self._endpoints[self._dialled].refused

    def lost(self, now: float) -> None:
        """The connection is gone."""
        steady = now - self._up_at >= self._settings.steady_after
        self.attempts = 0
        if steady:
            self.refreshed = False
        for number, one in enumerate(self._endpoints):
            if one.refused:  # those that may work go first
                one.due = max(one.due, now + self._settings.max_delay + self._settings.failover_after)
                continue
            if steady:
                one.failures = 0
            if number == self.current:
                one.failures += not steady
                one.due = now + self._delay(one)
            elif one.breaker.state is BreakerState.OPEN:
                one.due = max(now + self._settings.failover_after, one.breaker.opened_at + self._settings.open_for)
            else:
                one.due = now + self._settings.failover_after
        self._move(Link.WAITING)

    def reset(self, now: float) -> None:
        """An operator says that things are mended: dial all anew, those that refused us too. Not while dialling."""
        self.refreshed = False
        for number, one in enumerate(self._endpoints):
            if one.breaker.state is not BreakerState.DISABLED:
                self._moved(number, one.breaker.reset())
            one.failures = 0
            one.due = now if number == self.current else now + self._settings.failover_after
        if self.link is Link.REFUSED:
            self._move(Link.WAITING)

    def stop(self) -> None:
        self._move(Link.STOPPED)
