"""The one thread that writes: when it does, and for how long it sleeps. Its answers go to the loop in one call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import apsw

from glassbus.clock import Clock
from glassbus.errors import TransportError
from glassbus.transport.sqlite import upkeep
from glassbus.transport.sqlite.backlog import Backlog, Batch
from glassbus.transport.sqlite.mailbox import Mailbox
from glassbus.transport.sqlite.membership import Membership
from glassbus.transport.sqlite.requests import Answers, Close, Request
from glassbus.transport.sqlite.rounds import Rounds
from glassbus.transport.sqlite.store import Store, disk_free, translate

#: How often to look whether another process has written, while somebody waits for it, in seconds.
POLL_S = 0.02
#: How often to look after owners, old ids and the file itself, in seconds.
UPKEEP_S = 0.5
_NEVER = float("inf")


class Writer:
    """The writer's thread and its state between transactions.

    `start`, `put`, `abandon` and `join` are for the loop, the rest runs on the thread. `post`
    takes answers to the loop, in order; False means that the loop is gone. Then what it had
    in flight is given back, and the thread ends.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        member: Membership,
        post: Callable[[Answers], bool],
        loop_is_gone: Callable[[], bool],
        *,
        reserve_bytes: int,
        ask_space: Callable[[str], int] = disk_free,
    ) -> None:
        self.mailbox = Mailbox(clock)
        self._store = store
        self._clock = clock
        self._member = member
        self._post_to_loop = post
        self._loop_is_gone = loop_is_gone
        self._backlog = Backlog()
        self._rounds = Rounds(store, clock, member, self._backlog, reserve_bytes=reserve_bytes, ask_space=ask_space)
        self.declare = self._rounds.declare
        self._thread = threading.Thread(target=self._run, name="glassbus-sqlite", daemon=True)
        self._opened: asyncio.Future[None] | None = None
        self._abandoned = False
        self._orphaned = False  # the loop is gone: nobody wants anything any more
        self._closing = False
        self._upkeep_at = 0.0
        self._poll_at = 0.0

    # For the loop

    def start(self, opened: asyncio.Future[None]) -> None:
        """Start the thread; `opened` tells when the store can be used, or why not."""
        self._opened = opened
        self._clock.attach(self.mailbox)
        self._thread.start()

    def put(self, request: Request) -> None:
        """Hand a request over; `mailbox.wake` must follow. Does not block."""
        self.mailbox.put(request)
        if self.mailbox.closed:
            self._refuse_all(TransportError(f"the store {self._store.name} is closed"))

    def hold_back_low(self, name: str, held: bool) -> None:
        """Takes effect in the next transaction."""
        names = self._rounds.books.low_held_back
        (names.add if held else names.discard)(name)

    @property
    def may_grow(self) -> bool:
        return self._rounds.may_grow

    @may_grow.setter
    def may_grow(self, allowed: bool) -> None:
        self._rounds.may_grow = allowed

    def abandon(self) -> None:
        """Stop as soon as possible: the deadline of `close` has passed."""
        self._abandoned = True
        self.mailbox.poke()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread's end. It blocks, briefly once `close` has been answered."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # The thread

    def _run(self) -> None:
        assert self._opened is not None
        try:
            answers = self._rounds.open()
        except BaseException as error:  # noqa: BLE001 - whatever it is, who waits for `open` is told
            failure = translate(error, self._store.name) if isinstance(error, apsw.Error) else error
            answers = Answers()
            answers.failed.append((self._opened, failure))
            self._end(answers)
            return
        answers.results.append((self._opened, None))
        self._post(answers)
        self._upkeep_at = self._clock.monotonic() + UPKEEP_S
        try:
            while not self._step():
                pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the bus is told and nobody waits for ever
            failure = translate(error, self._store.name) if isinstance(error, apsw.Error) else error
            answers = Answers()
            answers.broken = failure
            self._end(answers, TransportError(f"the store cannot go on: {failure}"))

    def _step(self) -> bool:
        """Do what there is to do, or sleep; whether this was the end."""
        backlog = self._backlog
        backlog.take(self.mailbox.items)
        if self._abandoned or (self._orphaned and self._rounds.health.failing):
            self._end(Answers())
            return True
        if self._orphaned and backlog.close is None:
            backlog.close = Close(None)
        if backlog.close is not None and not self._closing:
            self._closing = True
            answers = Answers()
            backlog.closing(answers)
            self._post(answers)
        answers = Answers()
        backlog.flushed(answers)
        self._post(answers)
        try:
            wanted = self._wanted()
        except apsw.Error as error:
            self._post(self._rounds.failed(error, "read", Batch([], [], [])))
            return False
        if not wanted:
            self._sleep()
            return False
        answers = self._rounds.run(closing=self._closing)
        if self._rounds.over:
            self._end(answers)
            return True
        self._post(answers)
        return False

    def _wanted(self) -> bool:
        """Whether there is something to do in a transaction now."""
        now, backlog, health = self._clock.monotonic(), self._backlog, self._rounds.health
        if now < health.retry_at:
            answers = Answers()
            health.give_up_overdue(now, answers)
            self._post(answers)
            return False
        if health.failing:
            return True
        if now >= self._upkeep_at:
            self._look_around(now)
        if backlog.urgent:
            return True
        if backlog.claimed_anew:
            names, backlog.claimed_anew = backlog.claimed_anew, set()
            queues = self._rounds.books.queues
            if any(name not in queues or (queues[name].claimable and not queues[name].hold.held) for name in names):
                return True
        retry, scheduled, expiry = self._rounds.next_due
        if now >= min(retry, self._member.renew_at, backlog.next_deadline()):
            return True
        if (
            self._clock.wall() >= min(scheduled, expiry, self._rounds.contract_at)
            or self._member.suspects_others
            or self._rounds.old_ids
        ):
            return True
        if now >= self._poll_at:
            self._poll_at = now + (POLL_S if backlog.somebody_waits else UPKEEP_S)
            return self._rounds.books.stale(self._store.connection)
        return False

    def _look_around(self, now: float) -> None:
        """What is checked now and then outside a transaction: the file, and the other owners."""
        self._upkeep_at = now + UPKEEP_S
        if self._store.moved():
            raise TransportError(
                f"{self._store.name} or its -wal file was deleted or replaced while it was open; nothing more is stored"
            )
        self._orphaned = self._orphaned or self._loop_is_gone()
        self._member.look(self._rounds.books, now)
        self._rounds.old_ids = upkeep.has_old_ids(self._store.connection, self._clock.wall())

    def _sleep(self) -> None:
        now, health = self._clock.monotonic(), self._rounds.health
        if now < health.retry_at:
            # Nothing else is done meanwhile, housekeeping neither.
            at = housekeeping = min(health.retry_at, self._backlog.first_to_give_up())
        else:
            housekeeping = min(self._upkeep_at, self._poll_at, self._member.renew_at)
            retry, scheduled, expiry = self._rounds.next_due
            # A little late: a sum of floats that fell short of the time would wake us for nothing, again and again.
            wall_due = now + min(scheduled, expiry, self._rounds.contract_at) - self._clock.wall() + 1e-6
            at = min(retry, wall_due, self._backlog.next_deadline())
        # A clock that tests move is not asked to stop for housekeeping, which never ends, unless
        # there are others to look after.
        due = min(at, housekeeping) if len(self._rounds.books.owners) > 1 else at
        self.mailbox.sleep(max(0.0, min(at, housekeeping) - now), None if due == _NEVER else due)

    # Answers and the end

    def _post(self, answers: Answers) -> None:
        if answers and not self._post_to_loop(answers):
            self._orphaned = True

    def _end(self, answers: Answers, error: Exception | None = None) -> None:
        """Let go of everything. What is still asked for is refused."""
        self._store.close()
        self._member.leave()
        self._clock.detach(self.mailbox)
        self._post_to_loop(answers)
        self.mailbox.close()
        self._refuse_all(error or TransportError(f"the store {self._store.name} is closed"))

    def _refuse_all(self, error: Exception) -> None:
        left, answers = Backlog(), Answers()
        self._backlog.refuse_all(answers, error)
        left.take(self.mailbox.items)
        left.refuse_all(answers, error)
        if answers:
            self._post_to_loop(answers)
