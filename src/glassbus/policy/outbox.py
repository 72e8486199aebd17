"""What one channel is still to be told of escalations: what waits, how fast it may go, and when to try again."""

from __future__ import annotations

from collections.abc import Iterable

from glassbus.errors import ErrorSeverity
from glassbus.policy.escalation import RANK, Change, Escalated


class Bucket:
    """Lets `per_minute` through on average, and at most `burst` at once."""

    def __init__(self, per_minute: float, burst: int) -> None:
        self._per_s = per_minute / 60.0
        self._burst = float(burst)
        self._tokens = float(burst)
        self._at: float | None = None

    def has(self, now: float) -> bool:
        """Whether `take` would let one through."""
        if self._at is not None and now > self._at:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        return self._tokens >= 1.0

    def take(self, now: float) -> bool:
        if not self.has(now):
            return False
        self._tokens -= 1.0
        return True


class Outbox:
    """What one channel is still to be told: of each escalation, the newest event. Times are monotonic seconds.

    Over the rate limit an event waits, and is `suppressed`, told once. After a failure the channel is
    left alone for a while that doubles, up to a minute. At most one batch is out at a time.
    """

    BACKOFF_S, BACKOFF_MAX_S = 1.0, 60.0

    def __init__(self, at_least: ErrorSeverity, bucket: Bucket, batch: int) -> None:
        self._least = RANK[at_least]
        self._bucket = bucket
        self._batch = batch
        self._waiting: dict[str, Change] = {}
        self._limited: set[str] = set()
        self._heard: set[str] = set()
        self._failures = 0
        self.retry_at = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def wants(self, escalation: Escalated) -> bool:
        return RANK[escalation.severity] >= self._least

    def heard(self, fingerprint: str) -> None:
        """The channel was told of it, perhaps by an earlier run."""
        self._heard.add(fingerprint)

    def add(self, change: Change) -> None:
        """Tell the channel of `change`, unless it is not for it, or it never heard of what is over."""
        fingerprint = change.escalation.fingerprint
        if not self.wants(change.escalation):
            return
        waits = self._waiting.get(fingerprint)
        if change.event == "resolved" and fingerprint not in self._heard:
            if waits is not None:
                self._forget(fingerprint)
            return
        if waits is not None and waits.event == "opened" and change.event == "still_open":
            return  # it is told that it is open as soon as it can be told anything
        self._waiting[fingerprint] = change

    def take(self, now: float) -> tuple[list[Change], list[Change]]:
        """The next batch to send, the worst first, and what is newly held back by the rate limit."""
        batch: list[Change] = []
        held: list[Change] = []
        if now < self.retry_at or not self._waiting:
            return batch, held
        if len(self._limited) == len(self._waiting) and not self._bucket.has(now):
            return batch, held  # all that waits is over the limit, and was told so
        for change in sorted(self._waiting.values(), key=lambda c: -RANK[c.escalation.severity]):
            if len(batch) >= self._batch:
                break
            fingerprint = change.escalation.fingerprint
            if self._bucket.take(now):
                batch.append(change)
                self._forget(fingerprint)
                self._heard.add(fingerprint)  # it may hear of it even if that fails: then it must hear of the end too
            elif fingerprint not in self._limited:
                self._limited.add(fingerprint)
                held.append(change)
        return batch, held

    def sent(self, batch: Iterable[Change]) -> None:
        """The channel has taken `batch`."""
        self.works()
        for change in batch:
            if change.event == "resolved":
                self._heard.discard(change.escalation.fingerprint)

    def failed(self, batch: Iterable[Change], now: float) -> None:
        """`batch` was not taken, or has not said so: it is tried again, unless something newer is to be told."""
        self.retry_at = now + min(self.BACKOFF_MAX_S, self.BACKOFF_S * 2 ** min(self._failures, 10))
        self._failures += 1
        for change in batch:
            fingerprint = change.escalation.fingerprint
            newer = self._waiting.get(fingerprint)
            if newer is None or newer.event == "still_open":
                self._waiting[fingerprint] = change

    def works(self) -> None:
        self._failures = 0
        self.retry_at = 0.0

    @property
    def ready(self) -> bool:
        """Whether something waits that neither a failure nor the rate limit holds up."""
        return not self._failures and len(self._waiting) > len(self._limited)

    def _forget(self, fingerprint: str) -> None:
        del self._waiting[fingerprint]
        self._limited.discard(fingerprint)
