"""One transaction for everything that waits.

In this order: settlements, what became due, calls, publishes, claims. So acknowledgements
share the commit of the publishes beside them, and a message can be accepted and claimed
by the same commit.
"""

from __future__ import annotations

from collections.abc import Callable

import apsw

from glassbus.clock import Clock
from glassbus.errors import GlassbusError, StoreCorrupt
from glassbus.transport import Hold, SubscriptionSpec
from glassbus.transport.sqlite import admin, overflowing, upkeep
from glassbus.transport.sqlite.backlog import Backlog, Batch
from glassbus.transport.sqlite.books import Books, Held
from glassbus.transport.sqlite.claiming import Claiming
from glassbus.transport.sqlite.health import Health
from glassbus.transport.sqlite.membership import Membership
from glassbus.transport.sqlite.publishing import Publishing, remember
from glassbus.transport.sqlite.requests import Answers, Call, Publish
from glassbus.transport.sqlite.settling import Settling
from glassbus.transport.sqlite.store import Store, disk_free
from glassbus.transport.sqlite.transaction import Transaction, VanishedError

_NEVER = float("inf")


class Rounds:
    """Runs transactions, and keeps what is true between them. Belongs to the writer thread.

    `over`: the last one is stored, and nothing of this process is left in the store.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        member: Membership,
        backlog: Backlog,
        *,
        reserve_bytes: int,
        ask_space: Callable[[str], int] = disk_free,
    ) -> None:
        self.books = Books()
        self.health = Health(store, backlog)
        #: When the next retry (monotonic), delayed publish and expiry (wall) are due.
        self.next_due = (_NEVER, _NEVER, _NEVER)
        #: When the time of the next expansion of a queue is over; wall.
        self.contract_at = _NEVER
        self.old_ids = False
        self.over = False
        self.may_grow = True
        self._store = store
        self._clock = clock
        self._member = member
        self._backlog = backlog
        self._reserve_bytes = reserve_bytes
        self._ask_space = ask_space
        self._in_flight: dict[int, Held] = {}
        self._suspects = 0  # of `_in_flight`
        self._due_unknown = True
        self._claimable: set[str] = set()  # subscriptions that got something after their claims were looked at

    def open(self) -> Answers:
        """Open the store and register. Raises what `Store.open` does."""
        self._store.open()
        self._store.begin()
        try:
            self.books.refresh(self._store.connection)
            txn = self._transaction()
            self._member.open(self._store.path, txn)
            self.books.save(self._store.connection)
            self._store.commit()
        except BaseException:
            self._store.rollback()
            raise
        return txn.answers

    def _transaction(self) -> Transaction:
        return Transaction(
            self._store.connection,
            self.books,
            self._member.id,
            self._clock.monotonic(),
            self._clock.wall(),
            self._in_flight,
            suspects=self._suspects,
            careful=self.health.careful,
        )

    def run(self, *, closing: bool) -> Answers:
        """One transaction, and what it leads to. Raises what the store cannot go on after.

        `closing`: it is the last one if no settlement is left out.
        """
        health = self.health
        if health.reopen:
            answers = health.try_reopen(self._clock.monotonic(), self._clock.wall())
            self.books.invalidate()
            if answers is not None:
                health.give_up_overdue(self._clock.monotonic(), answers)
                return answers
        health.make_space()
        batch = health.batch()
        claiming: Claiming | None = None
        phase = "begin"
        try:
            self._store.begin()
            phase = "write"
            others = self.books.refresh(self._store.connection)
            txn = self._transaction()
            if self._member.id not in self.books.owners:
                self._expelled(txn)
            if batch.settlements:
                Settling(txn).settle(batch.settlements)
            self._do_upkeep(txn, others)
            for call in batch.calls:
                _call(txn, call)
            for request in self._backlog.remember:
                remember(txn, request.publish)
            claiming = Claiming(txn, self._backlog.claims)
            waiting = self._exchange(txn, claiming, batch.publishes) if batch.exchange else []
            last = closing and len(batch.settlements) == len(self._backlog.settlements)
            given_back = self._leave(txn) if last else 0
            overflowing.look(txn)
            self.books.save(self._store.connection)
            if others or self._due_unknown:
                self.next_due = upkeep.next_due(txn)
            phase = "commit"
            self._store.commit()
        except VanishedError:
            self._undo(claiming)
            batch.undone()
            health.careful = True
        except apsw.ConstraintError as error:
            self._undo(claiming)
            if health.careful:
                return health.isolate(error, batch)
            batch.undone()
            health.careful = True  # an id is not as new as it should be: once more, looking first
        except apsw.Error as error:
            self._undo(claiming)
            return self.failed(error, phase, batch)
        except GlassbusError:
            self._undo(claiming)
            raise
        except Exception as error:  # noqa: BLE001 - raised again unless one request is to blame
            self._undo(claiming)
            return health.isolate(error, batch)
        else:
            self._committed(txn, batch, waiting)
            if last:
                self.over = True
                self._backlog.closed(given_back, txn.answers)
            return txn.answers
        return Answers()

    def failed(self, error: apsw.Error, phase: str, batch: Batch) -> Answers:
        return self.health.failed(error, phase, batch, self._clock.monotonic(), self._clock.wall())

    def _exchange(self, txn: Transaction, claiming: Claiming, publishes: list[Publish]) -> list[Publish]:
        """Admit publishes and satisfy claims until neither makes way for the other; who still waits for room."""
        claims = self._backlog.claims
        publishing = Publishing(
            txn, claiming, storage_full=self._no_space(txn) if publishes else "", may_grow=self.may_grow
        )
        publishing.look_up(publishes)
        waiting = publishing.admit(publishes)
        while True:
            given = False
            for name, futures in claims.items():
                queue = self.books.queues.get(name)
                if futures and queue is not None and queue.claimable:
                    given = claiming.match(queue) or given
            if not (given and waiting):
                break
            before, waiting = len(waiting), publishing.admit(waiting)
            if len(waiting) == before:
                break
        claiming.finish()
        publishing.write()
        if waiting:
            waiting = publishing.climb(waiting)
        self._claimable = {name for name in (*publishing.climbed, *claiming.look_again) if claims.get(name)}
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
        if self.health.reconcile:
            upkeep.reconcile(txn)
        self._member.expel_lost(txn)
        self._member.renew(txn)
        retry, scheduled, expiry = upkeep.next_due(txn) if others or self._due_unknown else self.next_due
        if txn.monotonic >= retry or txn.wall >= scheduled:
            upkeep.promote(txn)
            self._due_unknown = True
        if txn.wall >= expiry:
            upkeep.expire_overdue(txn)
            self._due_unknown = True
        if self.old_ids:
            upkeep.forget_old_ids(txn)

    def _expelled(self, txn: Transaction) -> None:
        """Others gave us up (we did not run for longer than our lease): what we had is theirs, and we start anew."""
        self._in_flight.clear()
        self._suspects = txn.suspects = 0
        self._member.register(txn)

    def _leave(self, txn: Transaction) -> int:
        """Give back what is in flight and strike us off; how much now waits for the next start."""
        upkeep.release(txn, self._member.id, 0)
        mine = (self.books.queues.get(name) for name in self._member.consuming)
        return sum(queue.pending for queue in mine if queue is not None)

    def _undo(self, claiming: Claiming | None) -> None:
        """The transaction failed: nothing of it is true."""
        self._store.rollback()
        self._claimable = set()
        if claiming is not None:
            claiming.undo()
        self.books.invalidate()
        self._due_unknown = True

    def _committed(self, txn: Transaction, batch: Batch, waiting: list[Publish]) -> None:
        """The transaction is stored: now it is true, and may be told."""
        in_flight, backlog, answers = self._in_flight, self._backlog, txn.answers
        for id_ in txn.ended:
            ended = in_flight.pop(id_, None)
            self._suspects -= ended is not None and ended.suspect > 0
        for held in txn.claimed:
            in_flight[held.id] = held
            self._suspects += held.suspect > 0
        backlog.answered(batch, waiting)
        backlog.claimed_anew |= self._claimable
        self._claimable = set()
        self.contract_at = min(
            (queue.expanded_until for queue in self.books.expanded if queue.expanded_until > txn.wall), default=_NEVER
        )
        backlog.remember = []
        retry, scheduled, expiry = self.next_due
        self.next_due = (min(retry, txn.retry_at), min(scheduled, txn.scheduled_at), min(expiry, txn.expiry_at))
        self.old_ids = self._due_unknown = False
        self._member.committed(txn.monotonic)
        if self.books.changed_holds:
            answers.holds.extend(self.books.changed_holds.items())
            self.books.changed_holds = {}
        self.health.worked(batch, answers, txn.monotonic, txn.wall)
        backlog.fail_unknown(self.books, answers)
        backlog.flushed(answers)

    def declare(self, txn: Transaction, spec: SubscriptionSpec, *, consume: bool) -> Hold:
        """The call behind `Transport.declare`."""
        if consume:
            self._member.consuming.add(spec.name)
        return admin.declare(txn, spec, consume=consume)


def _call(txn: Transaction, call: Call) -> None:
    if call.future.done():  # cancelled
        return
    try:
        txn.answers.results.append((call.future, call.work(txn)))
    except StoreCorrupt:
        raise
    except GlassbusError as error:  # raised before it changed anything
        txn.answers.failed.append((call.future, error))
