"""The requests that the NATS thread has taken and not yet answered."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from glassbus.errors import BusNotRunning, GlassbusError, TransportError
from glassbus.transport.nats.requests import (
    Answers,
    Call,
    Claim,
    Close,
    Flush,
    Forsake,
    Publish,
    Request,
    Settlement,
)


class Backlog:
    """Requests by kind, each kind in the order in which it came."""

    def __init__(self) -> None:
        self.settlements: list[Settlement] = []
        #: Settlements in an entry that is under way.
        self.settling: list[Settlement] = []
        self.publishes: list[Publish] = []
        self.claims: dict[str, deque[asyncio.Future[Any]]] = {}
        self.calls: list[Call] = []
        self.forsaken: list[Publish] = []
        self.close: Close | None = None
        self._flushes: list[Flush] = []

    @property
    def somebody_waits(self) -> bool:
        """For a delivery or for room: things that another process can bring about."""
        return bool(self.publishes or any(self.claims.values()))

    def take(self, inbox: deque[Request]) -> None:
        while inbox:
            request = inbox.popleft()
            if isinstance(request, Settlement):
                self.settlements.append(request)
            elif isinstance(request, Claim):
                self.claims.setdefault(request.name, deque()).append(request.future)
            elif isinstance(request, Publish):
                self.publishes.append(request)
            elif isinstance(request, Call):
                self.calls.append(request)
            elif isinstance(request, Flush):
                self._flushes.append(request)
            elif isinstance(request, Forsake):
                request.publish.forsaken = True
                self.forsaken.append(request.publish)
            else:
                self.close = request

    def next_deadline(self) -> float:
        """When the first publish that waits for room has waited long enough; monotonic."""
        return min((p.deadline for p in self.publishes if p.slowed is not None), default=float("inf"))

    def flushed(self, answers: Answers) -> None:
        """Answer those who wait for settlements, when there are none left."""
        if self._flushes and not self.settlements and not self.settling:
            answers.results.extend((flush.future, None) for flush in self._flushes)
            self._flushes = []

    def disconnected(self, error: GlassbusError, answers: Answers) -> None:
        """There is no connection: what would wait for one without limit is refused, nothing of it was sent."""
        answers.failed.extend((p.future, error) for p in self.publishes)
        answers.failed.extend((call.future, error) for call in self.calls)
        self.publishes, self.calls = [], []

    def closing(self, answers: Answers) -> None:
        """Nothing new is begun: publishers and claimers are sent away."""
        refused = BusNotRunning("the bus is stopping; this message was not stored")
        answers.failed.extend((p.future, refused) for p in self.publishes)
        closed = TransportError("the store is being closed")
        answers.failed.extend((future, closed) for futures in self.claims.values() for future in futures)
        answers.failed.extend((call.future, closed) for call in self.calls)
        self.publishes, self.claims, self.calls = [], {}, []

    def closed(self, given_back: int, answers: Answers) -> None:
        """All is stored."""
        if self.close is not None and self.close.future is not None:
            answers.results.append((self.close.future, given_back))
        self.close = None

    def refuse_all(self, answers: Answers, error: Exception) -> None:
        """Nothing will be stored any more."""
        futures: list[asyncio.Future[Any]] = [p.future for p in self.publishes]
        futures += [call.future for call in self.calls]
        for waiting in self.claims.values():
            futures += waiting
        answers.failed.extend((future, error) for future in futures)
        answers.refused.extend(self.settling)
        answers.refused.extend(self.settlements)
        self.publishes, self.calls, self.claims = [], [], {}
        self.settlements, self.settling = [], []
        self.flushed(answers)
        self.closed(0, answers)
