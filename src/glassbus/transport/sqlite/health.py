"""When the store fails: what is certain, what is not, and when to try again."""

from __future__ import annotations

from collections.abc import Sequence

import apsw

from glassbus.classification import classify
from glassbus.errors import (
    ErrorCategory,
    GlassbusError,
    PublishRejected,
    PublishUncertain,
    StorageFull,
    StoreCorrupt,
    TransportError,
)
from glassbus.facts import TransportFailed, TransportRecovered
from glassbus.transport.sqlite.backlog import Backlog, Batch
from glassbus.transport.sqlite.requests import Answers, Publish, Remember
from glassbus.transport.sqlite.store import Store, Trouble, translate, trouble

_BACKOFF_S, _BACKOFF_MAX_S = 0.05, 1.0


class Health:
    """How the store fares. Belongs to the writer thread.

    Certain: what failed before its commit is not stored. After a commit that failed with an
    I/O error the store is reopened, checked, its log moved into the database and synced, and
    a small commit made, which overwrites whatever the failed one may have left in the log.
    Then the batch is simply tried again: what did get stored is recognised by its id.
    """

    def __init__(self, store: Store, backlog: Backlog) -> None:
        self._store = store
        self._backlog = backlog
        self._failed_since: float | None = None
        self._failures = 0
        self._settle_at_most = 0
        self._error: GlassbusError | None = None
        self.retry_at = 0.0
        self.reopen = False
        self.full = False
        self.careful = False
        self.reconcile = False
        self.one_by_one = 0

    @property
    def failing(self) -> bool:
        return self._failed_since is not None

    def batch(self) -> Batch:
        """What the next transaction shall take: all that waits, or less while the store fails."""
        backlog = self._backlog
        settlements = backlog.settlements
        if self._settle_at_most:
            settlements = settlements[: self._settle_at_most]
        if self.full and settlements:
            return Batch(settlements, [], [], exchange=False)
        batch = Batch(settlements, backlog.calls, backlog.publishes)
        return _first_of(batch) if self.one_by_one else batch

    def failed(self, error: apsw.Error, phase: str, batch: Batch, monotonic: float, wall: float) -> Answers:
        """A transaction failed in `phase` and was rolled back. Raises what the store cannot go on after."""
        what = trouble(error)
        failure = translate(error, self._store.name)
        if what is Trouble.CORRUPT:
            raise failure from error
        uncertain = phase == "commit" and what is not Trouble.FULL and what is not Trouble.BUSY
        answers = Answers()
        answers.facts.append(
            TransportFailed(
                at=wall, operation=phase, error=str(failure), category=_category(failure), uncertain=uncertain
            )
        )
        if self._failed_since is None:
            self._failed_since = monotonic
        self._failures += 1
        self._error = failure
        self.careful = self.careful or uncertain
        self.reconcile = self.reconcile or uncertain
        for request in batch.publishes:
            if uncertain and request.stored:
                request.uncertain = request.stored
        batch.undone()
        for settlement in batch.settlements:
            settlement.uncertain = settlement.uncertain or uncertain
        self._fail_calls(batch, failure, answers)
        backoff_s = min(_BACKOFF_MAX_S, _BACKOFF_S * 2 ** min(self._failures - 1, 10))
        if what is Trouble.FULL:
            self.full = True
            self._settle_at_most = max(1, len(batch.settlements) // 2)
            self._refuse(batch.publishes, answers)
        elif what is Trouble.BUSY:
            backoff_s = _BACKOFF_S  # SQLite has waited already
            self.give_up_overdue(monotonic, answers)
        else:
            self.reopen = True
            backoff_s = 0.0 if self._failures == 1 else backoff_s
        self.retry_at = monotonic + backoff_s
        return answers

    def _fail_calls(self, batch: Batch, failure: GlassbusError, answers: Answers) -> None:
        error = failure if isinstance(failure, TransportError) else TransportError(str(failure))
        answers.failed.extend((call.future, error) for call in batch.calls)
        done = set(map(id, batch.calls))
        self._backlog.calls = [call for call in self._backlog.calls if id(call) not in done]

    def give_up_overdue(self, monotonic: float, answers: Answers) -> None:
        """Answer the publishes that have waited long enough for the store to work again."""
        self._refuse([p for p in self._backlog.publishes if p.give_up_at <= monotonic], answers)

    def _refuse(self, publishes: Sequence[Publish], answers: Answers) -> None:
        for request in publishes:
            if request.uncertain:
                cause = str(self._error)
                answers.failed.append((request.future, PublishUncertain(request.batch[0].id, cause)))
                self._backlog.remember.append(Remember(request))
            elif self.full:
                answers.failed.append((request.future, StorageFull(f"{self._error}; nothing was stored")))
            else:
                answers.failed.append((request.future, PublishRejected(f"not stored: {self._error}")))
        self._backlog.drop(publishes)

    def try_reopen(self, monotonic: float, wall: float) -> Answers | None:
        """Make sure of the store after an I/O error; None when it works again. Raises StoreCorrupt."""
        try:
            self._store.close()
            self._store.open()
            self._store.checkpoint()
            self._store.probe()
        except StoreCorrupt:
            raise
        except apsw.Error as error:
            return self.failed(error, "reopen", Batch([], [], []), monotonic, wall)
        except GlassbusError as error:
            self._error = error
            self._failures += 1
            self.retry_at = monotonic + min(_BACKOFF_MAX_S, _BACKOFF_S * 2 ** min(self._failures - 1, 10))
            failed = TransportFailed(
                at=wall, operation="reopen", error=str(error), category=_category(error), uncertain=False
            )
            answers = Answers()
            answers.facts.append(failed)
            return answers
        self.reopen = False
        return None

    def make_space(self) -> None:
        """A full disk blocks acknowledgements too: let the log be used again from its start."""
        if self.full:
            self._store.try_checkpoint()

    def worked(self, batch: Batch, answers: Answers, monotonic: float, wall: float) -> None:
        """The transaction of `batch` was stored."""
        self.careful = self.reconcile = False
        if self.one_by_one:
            self.one_by_one -= 1
        if self._failed_since is None:
            return
        if not batch.exchange:
            # Acknowledgements fit on the full disk; whether anything new does is not known yet.
            self._settle_at_most *= 2
            return
        answers.facts.append(TransportRecovered(at=wall, after_s=monotonic - self._failed_since))
        self._failed_since = None
        self._failures = 0
        self.retry_at = 0.0
        self.full = False
        self._settle_at_most = 0

    def isolate(self, error: Exception, batch: Batch) -> Answers:
        """Something unforeseen was raised. Find which request did it, and fail that one alone.

        Raises `error` when no request is to blame.
        """
        answers = Answers()
        batch.undone()
        if batch.size > 1:
            self.one_by_one = batch.size
            return answers
        if batch.calls:
            answers.failed.append((batch.calls[0].future, error))
            self._backlog.calls.remove(batch.calls[0])
        elif batch.publishes:
            text = f"this message cannot be stored: {type(error).__name__}: {error}"
            answers.failed.append((batch.publishes[0].future, PublishRejected(text)))
            self._backlog.drop(batch.publishes)
        else:
            raise error
        self.one_by_one = max(0, self.one_by_one - 1)
        return answers


def _first_of(batch: Batch) -> Batch:
    if batch.settlements:
        return Batch(batch.settlements[:1], [], [])
    if batch.calls:
        return Batch([], batch.calls[:1], [])
    return Batch([], [], batch.publishes[:1])


def _category(failure: GlassbusError) -> ErrorCategory:
    return classify(failure)[0]
