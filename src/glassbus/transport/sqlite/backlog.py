"""The requests that the writer has taken and not yet answered."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from glassbus.errors import BusNotRunning, TransportError, UnknownSubscription
from glassbus.transport.sqlite.books import Books
from glassbus.transport.sqlite.claiming import Claims
from glassbus.transport.sqlite.requests import (
    Answers,
    Call,
    Claim,
    Close,
    Flush,
    Publish,
    Remember,
    Request,
    Settlement,
)


class Batch(NamedTuple):
    """What one transaction takes. Without `exchange` it admits nothing and gives nothing out."""

    settlements: list[Settlement]
    calls: list[Call]
    publishes: list[Publish]
    exchange: bool = True

    @property
    def size(self) -> int:
        return len(self.settlements) + len(self.calls) + len(self.publishes)

    def undone(self) -> None:
        """The transaction was rolled back, for certain."""
        for request in self.publishes:
            request.stored = ()


class Backlog:
    """Requests by kind, each kind in the order in which it came."""

    def __init__(self) -> None:
        self.settlements: list[Settlement] = []
        self.publishes: list[Publish] = []
        self.claims: Claims = {}
        self.claimed_anew: set[str] = set()
        self.calls: list[Call] = []
        self.remember: list[Remember] = []
        self.close: Close | None = None
        self._slowed = 0  # of `publishes`, the first ones: they wait for room
        self._flushes: list[Flush] = []

    @property
    def urgent(self) -> bool:
        """Whether there is something new that a transaction can do at once."""
        return bool(self.settlements or len(self.publishes) > self._slowed or self.calls or self.remember or self.close)

    @property
    def somebody_waits(self) -> bool:
        """For a delivery or for room: things that another process can bring about."""
        return bool(self.publishes or any(self.claims.values()))

    def take(self, inbox: deque[Request]) -> None:
        while inbox:
            request = inbox.popleft()
            kind = type(request)
            if kind is Settlement:
                self.settlements.append(request)  # type: ignore[arg-type]
            elif kind is Publish:
                self.publishes.append(request)  # type: ignore[arg-type]
            elif isinstance(request, Claim):
                waiting = self.claims.get(request.name)
                if waiting is None:
                    waiting = self.claims[request.name] = deque()
                waiting.append(request.future)
                self.claimed_anew.add(request.name)
            elif isinstance(request, Call):
                self.calls.append(request)
            elif isinstance(request, Flush):
                self._flushes.append(request)
            elif isinstance(request, Remember):
                self.remember.append(request)
            elif isinstance(request, Close):
                self.close = request

    def next_deadline(self) -> float:
        """When the first publish that waits for room has waited long enough; monotonic."""
        return min((p.deadline for p in self.publishes[: self._slowed]), default=float("inf"))

    def first_to_give_up(self) -> float:
        """When the first publish of all has waited long enough for a store that fails; monotonic."""
        return min((p.give_up_at for p in self.publishes), default=float("inf"))

    def answered(self, batch: Batch, waiting: list[Publish]) -> None:
        """`batch` is done, but for the publishes of it that are `waiting` for room."""
        if len(batch.settlements) == len(self.settlements):
            self.settlements = []
        else:
            del self.settlements[: len(batch.settlements)]
        if batch.exchange:
            self.claimed_anew.clear()
            self.calls = self._without(self.calls, batch.calls)
            self.publishes = waiting + self._without(self.publishes, batch.publishes)
            self._slowed = len(waiting)

    @staticmethod
    def _without(all_: list, done: list) -> list:  # type: ignore[type-arg]
        if len(all_) == len(done):
            return []
        gone = set(map(id, done))
        return [request for request in all_ if id(request) not in gone]

    def flushed(self, answers: Answers) -> None:
        """Answer those who wait for settlements, when there are none left."""
        if self._flushes and not self.settlements:
            answers.results.extend((flush.future, None) for flush in self._flushes)
            self._flushes = []

    def drop(self, publishes: Iterable[Publish]) -> None:
        """These were answered without being stored."""
        gone = set(map(id, publishes))
        self._slowed -= sum(id(p) in gone for p in self.publishes[: self._slowed])
        self.publishes = [p for p in self.publishes if id(p) not in gone]

    def fail_unknown(self, books: Books, answers: Answers) -> None:
        """Claims of subscriptions that do not exist, or no longer."""
        for name in [n for n in self.claims if n not in books.queues]:
            error = UnknownSubscription(f"no subscription {name!r}; known are {sorted(books.queues)}")
            answers.failed.extend((future, error) for future in self.claims.pop(name))

    def closing(self, answers: Answers) -> None:
        """Nothing new is begun: publishers and claimers are sent away."""
        refused = BusNotRunning("the bus is stopping; this message was not stored")
        answers.failed.extend((p.future, refused) for p in self.publishes)
        self.publishes, self._slowed = [], 0
        closed = TransportError("the store is being closed")
        answers.failed.extend((future, closed) for futures in self.claims.values() for future in futures)
        self.claims = {}

    def closed(self, given_back: int, answers: Answers) -> None:
        """The last transaction is stored."""
        if self.close is not None and self.close.future is not None:
            answers.results.append((self.close.future, given_back))
        self.close = None

    def refuse_all(self, answers: Answers, error: Exception) -> None:
        """The writer is at its end: nothing will be stored any more."""
        futures: list[asyncio.Future[Any]] = [p.future for p in self.publishes]
        futures += [call.future for call in self.calls]
        for waiting in self.claims.values():
            futures += waiting
        answers.failed.extend((future, error) for future in futures)
        answers.refused.extend(self.settlements)
        self.settlements = []
        self.flushed(answers)
        if self.close is not None and self.close.future is not None:
            answers.results.append((self.close.future, 0))
        self.__init__()  # type: ignore[misc]
