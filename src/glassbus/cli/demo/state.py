"""One look at the running demo, as plain values: what the screen, the lines and the closing account show."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import msgspec

from glassbus.bus import MessageBus
from glassbus.cli.demo.feed import Spiced
from glassbus.cli.demo.strike import Strike
from glassbus.cli.demo.watch import Watch
from glassbus.policy.ledger import Account, Ledger

#: Rates are taken over this many seconds.
_WINDOW_S = 3.0


class Row(msgspec.Struct, frozen=True):
    """One subscription now. `rate` is handled deliveries a second."""

    name: str
    account: Account
    rate: float
    retries: int
    state: str
    breaker: str


class View(msgspec.Struct, frozen=True):
    """Everything at one moment. Counts are of this run, but for `total`: that is the ledger of the store."""

    elapsed_s: float
    phase: str
    health: str
    outage: bool
    fault: str
    records: int
    total: Account
    balanced: bool
    handled: int
    rate: float
    rows: tuple[Row, ...]


class Demo:
    """The running demo, for those who show it. Belongs to the bus's loop."""

    def __init__(self, bus: MessageBus, watch: Watch, feed: Spiced, url: str) -> None:
        self.bus = bus
        self.watch = watch
        self.feed = feed
        self.url = url
        #: `starting`, `running` or `draining`.
        self.phase = "starting"
        self.metrics_url = ""
        self.notes: list[str] = []
        self.started, self.started_wall = time.monotonic(), time.time()
        self.is_down: Callable[[], bool] = lambda: False
        #: The scenario that is played, if any.
        self.strike: Strike | None = None
        #: How long messages were taken in.
        self.intake_s = 0.0
        #: The ledger before this run.
        self.before = Ledger({})
        self._samples: deque[tuple[float, dict[str, int]]] = deque()

    def view(self) -> View:
        now = time.monotonic()
        ledger = self.bus.ledger()
        handled = {name: account.handled for name, account in ledger.accounts.items()}
        self._samples.append((now, handled))
        while len(self._samples) > 2 and self._samples[1][0] <= now - _WINDOW_S:
            self._samples.popleft()
        since, then = self._samples[0]
        over_s = max(now - since, 1e-3)
        states = {worker.name: worker for worker in self.bus.subscribers()}
        ours = {name: place for place, name in enumerate(sorted(states, key=_is_not_intake))}
        rows = tuple(
            Row(
                name=name,
                account=account,
                rate=(account.handled - then.get(name, 0)) / over_s,
                retries=self.watch.retries[name],
                state=states[name].state if name in states else "not run here",
                breaker=states[name].gate.state if name in states else "",
            )
            # Ours first, in the order of the service: it is the way of a message.
            for name, account in sorted(
                ledger.accounts.items(), key=lambda item: (ours.get(item[0], len(ours)), item[0])
            )
        )
        return View(
            elapsed_s=now - self.started,
            phase=self.phase,
            health=self.bus.health().status.value,
            outage=self.is_down(),
            fault=self.strike.scenario.name if self.strike is not None and self.strike.in_place else "",
            records=self.feed.records,
            total=ledger.total,
            balanced=ledger.balanced,
            handled=ledger.total.handled - self.before.total.handled,
            rate=sum(row.rate for row in rows),
            rows=rows,
        )


def _is_not_intake(name: str) -> bool:
    return not name.startswith("intake")
