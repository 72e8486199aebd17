"""The one thread that writes: everything waiting goes into one transaction, and its answers out in one call.

A transaction runs, in this order: settlements, what became due, calls, publishes, claims.
So acknowledgements share the commit of the publishes beside them, and a message can be
accepted and claimed by the same commit.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import apsw

from glassbus.clock import Clock
from glassbus.errors import GlassbusError, StoreCorrupt, TransportError
from glassbus.transport import Hold, SubscriptionSpec
from glassbus.transport.sqlite import admin, upkeep
from glassbus.transport.sqlite.backlog import Backlog, Batch
from glassbus.transport.sqlite.books import Books, Held
from glassbus.transport.sqlite.claiming import Claiming
from glassbus.transport.sqlite.health import Health
from glassbus.transport.sqlite.mailbox import Mailbox
from glassbus.transport.sqlite.membership import Membership
from glassbus.transport.sqlite.publishing import Publishing, remember
from glassbus.transport.sqlite.requests import Answers, Call, Close, Publish, Request
from glassbus.transport.sqlite.settling import Settling
from glassbus.transport.sqlite.store import Store, disk_free, translate
from glassbus.transport.sqlite.transaction import Transaction, VanishedError

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
        self._reserve_bytes = reserve_bytes
        self._ask_space = ask_space
        self._thread = threading.Thread(target=self._run, name="glassbus-sqlite", daemon=True)
        self._opened: asyncio.Future[None] | None = None
        self._abandoned = False
        self._orphaned = False  # the loop is gone: nobody wants anything any more
        self._books = Books()
        self._backlog = Backlog()
        self._health = Health(store, self._backlog)
        self._in_flight: dict[int, Held] = {}
        self._suspects = 0  # of `_in_flight`
        self._next_due = (_NEVER, _NEVER, _NEVER)
        self._due_unknown = True
        self._old_ids = False
        self._closing = False
        self._upkeep_at = 0.0
        self._poll_at = 0.0
        self._given_back = 0

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
        answers = Answers()
        try:
            self._open(answers)
        except BaseException as error:  # noqa: BLE001 - whatever it is, who waits for `open` is told
            failure = translate(error, self._store.name) if isinstance(error, apsw.Error) else error
            answers.failed.append((self._opened, failure))
            self._end(answers)
            return
        answers.results.append((self._opened, None))
        self._post(answers)
        try:
            while not self._step():
                pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the bus is told and nobody waits for ever
            failure = translate(error, self._store.name) if isinstance(error, apsw.Error) else error
            answers = Answers()
            answers.broken = failure
            self._end(answers, TransportError(f"the store cannot go on: {failure}"))

    def _open(self, answers: Answers) -> None:
        self._store.open()
        self._store.begin()
        try:
            self._books.refresh(self._store.connection)
            txn = self._transaction()
            self._member.open(self._store.path, txn)
            self._books.save(self._store.connection)
            self._store.commit()
        except BaseException:
            self._store.rollback()
            raise
        answers.facts.extend(txn.answers.facts)
        self._upkeep_at = self._clock.monotonic() + UPKEEP_S

    def _transaction(self) -> Transaction:
        return Transaction(
            self._store.connection,
            self._books,
            self._member.id,
            self._clock.monotonic(),
            self._clock.wall(),
            self._in_flight,
            suspects=self._suspects,
            careful=self._health.careful,
        )

    def _step(self) -> bool:
        """Do what there is to do, or sleep; whether this was the end."""
        backlog = self._backlog
        backlog.take(self.mailbox.items)
        if self._abandoned or (self._orphaned and self._health.failing):
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
        if answers:
            self._post(answers)
        try:
            wanted = self._wanted()
        except apsw.Error as error:
            self._failed(error, "read", Batch([], [], []))
            return False
        if wanted:
            return self._transact()
        self._sleep()
        return False

    def _wanted(self) -> bool:
        """Whether there is something to do in a transaction now."""
        now, backlog, health = self._clock.monotonic(), self._backlog, self._health
        if now < health.retry_at:
            answers = Answers()
            health.give_up_overdue(now, answers)
            if answers:
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
            queues = self._books.queues
            if any(name not in queues or (queues[name].claimable and not queues[name].hold.held) for name in names):
                return True
        retry, scheduled, expiry = self._next_due
        if now >= min(retry, self._member.renew_at, backlog.next_deadline()):
            return True
        if self._clock.wall() >= min(scheduled, expiry) or self._member.suspects_others or self._old_ids:
            return True
        if now >= self._poll_at:
            self._poll_at = now + (POLL_S if backlog.somebody_waits else UPKEEP_S)
            return self._books.stale(self._store.connection)
        return False

    def _look_around(self, now: float) -> None:
        """What is checked now and then outside a transaction: the file, and the other owners."""
        self._upkeep_at = now + UPKEEP_S
        if self._store.moved():
            raise TransportError(
                f"{self._store.name} was deleted or replaced while it was open; nothing more is stored"
            )
        self._orphaned = self._orphaned or self._loop_is_gone()
        self._member.look(self._books, now)
        self._old_ids = upkeep.has_old_ids(self._store.connection, self._clock.wall())

    def _sleep(self) -> None:
        now, health = self._clock.monotonic(), self._health
        if now < health.retry_at:
            # Nothing else is done meanwhile, housekeeping neither.
            at = housekeeping = min(health.retry_at, self._backlog.first_to_give_up())
        else:
            housekeeping = min(self._upkeep_at, self._poll_at, self._member.renew_at)
            retry, scheduled, expiry = self._next_due
            # A little late: a sum of floats that fell short of the time would wake us for nothing, again and again.
            wall_due = now + min(scheduled, expiry) - self._clock.wall() + 1e-6
            at = min(retry, wall_due, self._backlog.next_deadline())
        # A clock that tests move is not asked to stop for housekeeping, which never ends, unless
        # there are others to look after.
        due = min(at, housekeeping) if len(self._books.owners) > 1 else at
        self.mailbox.sleep(max(0.0, min(at, housekeeping) - now), None if due == _NEVER else due)

    # One transaction

    def _transact(self) -> bool:
        """Run one transaction; whether it was the last."""
        health = self._health
        if health.reopen:
            answers = health.try_reopen(self._clock.monotonic(), self._clock.wall())
            self._books.invalidate()
            if answers is not None:
                health.give_up_overdue(self._clock.monotonic(), answers)
                self._post(answers)
                return False
        health.make_space()
        batch = health.batch()
        claiming: Claiming | None = None
        phase = "begin"
        try:
            self._store.begin()
            phase = "write"
            others = self._books.refresh(self._store.connection)
            txn = self._transaction()
            if self._member.id not in self._books.owners:
                self._expelled(txn)
            if batch.settlements:
                Settling(txn).settle(batch.settlements)
            self._do_upkeep(txn, others)
            for call in batch.calls:
                self._call(txn, call)
            for request in self._backlog.remember:
                remember(txn, request.publish)
            claiming = Claiming(txn, self._backlog.claims)
            waiting = self._exchange(txn, claiming, batch.publishes) if batch.exchange else []
            last = self._closing and len(batch.settlements) == len(self._backlog.settlements)
            if last:
                self._leave(txn)
            self._books.save(self._store.connection)
            if others or self._due_unknown:
                self._next_due = upkeep.next_due(txn)
            phase = "commit"
            self._store.commit()
        except VanishedError:
            self._undo(claiming)
            batch.undone()
            health.careful = True
        except apsw.ConstraintError as error:
            self._undo(claiming)
            if health.careful:
                self._isolate(error, batch)
            else:  # an id is not as new as it should be: once more, looking first
                batch.undone()
                health.careful = True
        except apsw.Error as error:
            self._undo(claiming)
            self._failed(error, phase, batch)
        except GlassbusError:
            self._undo(claiming)
            raise
        except Exception as error:  # noqa: BLE001 - raised again unless one request is to blame
            self._undo(claiming)
            self._isolate(error, batch)
        else:
            return self._committed(txn, batch, waiting, last=last)
        return False

    def _exchange(self, txn: Transaction, claiming: Claiming, publishes: list[Publish]) -> list[Publish]:
        """Admit publishes and satisfy claims until neither makes way for the other; who still waits for room."""
        claims = self._backlog.claims
        publishing = Publishing(txn, claiming, storage_full=self._no_space(txn) if publishes else "")
        publishing.look_up(publishes)
        waiting = publishing.admit(publishes)
        while True:
            given = False
            for name, futures in claims.items():
                queue = self._books.queues.get(name)
                if futures and queue is not None and queue.claimable:
                    given = claiming.match(queue) or given
            if not (given and waiting):
                break
            before, waiting = len(waiting), publishing.admit(waiting)
            if len(waiting) == before:
                break
        waiting = publishing.refuse_overdue(waiting)
        claiming.finish()
        publishing.write()
        return waiting

    def _no_space(self, txn: Transaction) -> str:
        free = self._store.free_space(txn.monotonic, self._ask_space)
        if free >= self._reserve_bytes:
            return ""
        return (
            f"only {free // 1024:,} KiB are free for {self._store.name}, less than the reserve of "
            f"{self._reserve_bytes // 1024:,} KiB that keeps acknowledgements possible; free some disk space"
        )

    def _do_upkeep(self, txn: Transaction, others: bool) -> None:
        if self._health.reconcile:
            upkeep.reconcile(txn)
        self._member.expel_lost(txn)
        self._member.renew(txn)
        retry, scheduled, expiry = upkeep.next_due(txn) if others or self._due_unknown else self._next_due
        if txn.monotonic >= retry or txn.wall >= scheduled:
            upkeep.promote(txn)
            self._due_unknown = True
        if txn.wall >= expiry:
            upkeep.expire_overdue(txn)
            self._due_unknown = True
        if self._old_ids:
            upkeep.forget_old_ids(txn)

    def _expelled(self, txn: Transaction) -> None:
        """Others gave us up (we did not run for longer than our lease): what we had is theirs, and we start anew."""
        self._in_flight.clear()
        self._suspects = txn.suspects = 0
        self._member.register(txn)

    def _call(self, txn: Transaction, call: Call) -> None:
        if call.future.done():  # cancelled
            return
        try:
            txn.answers.results.append((call.future, call.work(txn)))
        except StoreCorrupt:
            raise
        except GlassbusError as error:  # raised before it changed anything
            txn.answers.failed.append((call.future, error))

    def declare(self, txn: Transaction, spec: SubscriptionSpec, *, consume: bool) -> Hold:
        """The call behind `Transport.declare`."""
        if consume:
            self._member.consuming.add(spec.name)
        return admin.declare(txn, spec, consume=consume)

    def _leave(self, txn: Transaction) -> None:
        upkeep.release(txn, self._member.id, 0)
        mine = (self._books.queues.get(name) for name in self._member.consuming)
        self._given_back = sum(queue.pending for queue in mine if queue is not None)

    def _isolate(self, error: Exception, batch: Batch) -> None:
        answers = Answers()
        self._health.isolate(error, batch, answers)
        self._post(answers)

    def _failed(self, error: apsw.Error, phase: str, batch: Batch) -> None:
        self._post(self._health.failed(error, phase, batch, self._clock.monotonic(), self._clock.wall()))

    def _undo(self, claiming: Claiming | None) -> None:
        """The transaction failed: nothing of it is true."""
        self._store.rollback()
        if claiming is not None:
            claiming.undo()
        self._books.invalidate()
        self._due_unknown = True

    def _committed(self, txn: Transaction, batch: Batch, waiting: list[Publish], *, last: bool) -> bool:
        """The transaction is stored: now it is true, and may be told."""
        in_flight, backlog, answers = self._in_flight, self._backlog, txn.answers
        for id_ in txn.ended:
            ended = in_flight.pop(id_, None)
            self._suspects -= ended is not None and ended.suspect > 0
        for held in txn.claimed:
            in_flight[held.id] = held
            self._suspects += held.suspect > 0
        backlog.answered(batch, waiting)
        backlog.remember = []
        retry, scheduled, expiry = self._next_due
        self._next_due = (min(retry, txn.retry_at), min(scheduled, txn.scheduled_at), min(expiry, txn.expiry_at))
        self._old_ids = self._due_unknown = False
        self._member.committed(txn.monotonic)
        if self._books.changed_holds:
            answers.holds.extend(self._books.changed_holds.items())
            self._books.changed_holds = {}
        self._health.worked(batch, answers, txn.monotonic, txn.wall)
        backlog.fail_unknown(self._books, answers)
        backlog.flushed(answers)
        if last:
            assert backlog.close is not None
            if backlog.close.future is not None:
                answers.results.append((backlog.close.future, self._given_back))
            backlog.close = None
            self._end(answers)
            return True
        if answers:
            self._post(answers)
        return False

    # Answers and the end

    def _post(self, answers: Answers) -> None:
        if not self._post_to_loop(answers):
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
