"""The demo's observer: counts what the closing account tells, and keeps the latest news for the screen."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from glassbus import facts as f
from glassbus.cli.common import duration, printable
from glassbus.cli.demo.sayings import Mood, saying
from glassbus.errors import ErrorCategory, ErrorReport
from glassbus.facts import Fact
from glassbus.observer import ALL_FACTS, Observer

#: News that the screen can go back to.
_NEWS_MAX = 200
_SITES_MAX = 1000


class News:
    """One line of news. Those with the same `key` are one line, with how often and when last."""

    __slots__ = ("at", "count", "key", "mood", "text")

    def __init__(self, at: float, mood: Mood, text: str, key: str = "") -> None:
        self.at = at
        self.mood = mood
        self.text = text
        self.key = key
        self.count = 1


class Site:
    """One failure site: the same failure, over and over."""

    __slots__ = ("dead", "failures", "fingerprint", "subscription", "text")

    def __init__(self, report: ErrorReport, subscription: str) -> None:
        self.fingerprint = report.fingerprint
        self.subscription = subscription
        self.text = said(report, 200)
        self.failures = 0
        self.dead = 0


class Opening:
    """One opening of a breaker, until it was closed again (None: not yet)."""

    __slots__ = ("breaker", "closed_at", "opened_at", "reason")

    def __init__(self, breaker: str, opened_at: float, reason: str) -> None:
        self.breaker = breaker
        self.opened_at = opened_at
        self.closed_at: float | None = None
        self.reason = reason


class Watch(Observer):
    """Called on the bus's loop; read there too."""

    interests = ALL_FACTS - {f.MessagePublished, f.DeliveryHandled, f.SubscriptionDeclared, f.BusStarted, f.BusStopped}

    def __init__(self) -> None:
        self.news: deque[News] = deque(maxlen=_NEWS_MAX)
        self.sites: dict[str, Site] = {}
        self.retries: Counter[str] = Counter()
        self.failed = self.recovered = self.timeouts = 0
        self.unrouted = self.duplicates = self.refused = self.uncertain = 0
        self.slowest_recovery_s = 0.0
        self.openings: list[Opening] = []
        self.redelivered = 0
        #: Called with each piece of news when it is new, for output that scrolls.
        self.on_news: Callable[[News], None] | None = None

    def tell(self, at: float, mood: Mood, text: str, key: str = "") -> None:
        """Add a line of news, or count it on the line with the same `key`."""
        if key:
            for known in reversed(self.news):
                if known.key == key:
                    known.count += 1
                    known.at, known.text = at, text
                    self.news.remove(known)
                    self.news.append(known)
                    return
        news = News(at, mood, text, key)
        self.news.append(news)
        if self.on_news is not None:
            self.on_news(news)

    def on_fact(self, fact: Fact, /) -> None:
        match fact:
            case f.AttemptFailed():
                self._failed(fact)
            case f.RetryScheduled():
                self._retry(fact)
            case f.RecoveryEnded():
                self._recovery_ended(fact)
            case f.DeliveryDeadLettered():
                self._dead_lettered(fact)
            case f.BreakerStateChanged():
                self._breaker(fact)
            case f.MessageUnrouted():
                self.unrouted += 1
                topic = fact.envelope.topic
                self.tell(fact.at, "dim", f"nobody subscribes to {topic}: accepted, unrouted", f"unrouted {topic}")
            case f.DuplicateRecognised():
                self.duplicates += 1
                self.tell(fact.at, "dim", "a message came twice: recognised by its id, stored once", "duplicate")
            case f.PublishRefused():
                self.refused += 1
                self.tell(fact.at, "bad", f"publish refused: {printable(fact.error, 160)}", f"refused {fact.reason}")
            case f.PublishLeftUncertain():
                self.uncertain += 1
                self.tell(fact.at, "warn", "publish uncertain: repeated with the same id", "uncertain")
            case f.DeliveryRedelivered():
                self.redelivered += 1
                reason = "its owner died" if fact.reason == "owner_died" else "its lease ran out"
                subscription = fact.delivery.subscription
                self.tell(fact.at, "warn", f"{subscription}: given again, {reason}", f"redelivered {subscription}")
            case f.OwnerLost():
                held = f"{fact.deliveries} deliveries" if fact.deliveries != 1 else "1 delivery"
                self.tell(fact.at, "warn", f"another process died while it held {held}: taken over")
            case f.AttemptOverdue():
                self.tell(fact.at, "warn", f"{fact.delivery.subscription}: overdue and cannot be stopped", "overdue")
            case f.BackpressureApplied():
                text = f"{fact.subscription}: queue full, the publisher waited {duration(fact.waited_s)}"
                self.tell(fact.at, "warn", text, f"backpressure {fact.subscription}")
            case f.LedgerUnbalanced():
                self.tell(fact.at, "bad", f"LEDGER UNBALANCED: {fact.unaccounted} of {fact.subscription} unaccounted")
            case f.TransportFailed():
                text = f"store failed during {fact.operation}: {printable(fact.error, 160)}"
                self.tell(fact.at, "bad", text, f"store {fact.operation}")
            case f.TransportRecovered():
                self.tell(fact.at, "good", f"the store works again after {duration(fact.after_s)}")
            case f.SubscriptionPaused():
                self.tell(fact.at, "warn", f"{fact.subscription}: paused")
            case f.SubscriptionResumed():
                self.tell(fact.at, "good", f"{fact.subscription}: resumed")
            case f.DeadLetterReplayed():
                subscription = fact.delivery.subscription
                self.tell(fact.at, "good", f"{subscription}: dead letter replayed", f"replayed {subscription}")
            case f.ObserverFailed():
                self.tell(fact.at, "bad", f"observer {fact.observer} raised: {printable(fact.error, 160)}", "observer")
            case _:
                said_of = saying(fact)
                if said_of is not None:
                    self.tell(fact.at, *said_of)

    # The four that are counted as well as told

    def _failed(self, fact: f.AttemptFailed) -> None:
        self.failed += 1
        self.timeouts += fact.report.category is ErrorCategory.TIMEOUT_ERROR
        site = self._site(fact.report, fact.delivery.subscription)
        if site is not None:
            site.failures += 1

    def _retry(self, fact: f.RetryScheduled) -> None:
        subscription = fact.delivery.subscription
        self.retries[subscription] += 1
        when = f"in {duration(fact.delay_s)}" if fact.delay_s else "at once"
        text = f"{subscription}: attempt {fact.next_attempt} {when} after {said(fact.report, 160)}"
        self.tell(fact.at, "warn", text, f"retry {subscription} {fact.report.fingerprint}")

    def _recovery_ended(self, fact: f.RecoveryEnded) -> None:
        if fact.outcome != "succeeded":
            return
        self.recovered += 1
        self.slowest_recovery_s = max(self.slowest_recovery_s, fact.duration_s)
        if fact.duration_s >= 1.0:
            subscription = fact.delivery.subscription
            text = f"{subscription}: healed {duration(fact.duration_s)} after its first failure"
            self.tell(fact.at, "good", text, f"healed {subscription}")

    def _dead_lettered(self, fact: f.DeliveryDeadLettered) -> None:
        delivery = fact.delivery
        site = self._site(fact.report, delivery.subscription)
        if site is not None:
            site.dead += 1
        after = f"{delivery.attempt} attempts" if delivery.attempt != 1 else "1 attempt"
        text = f"{delivery.subscription}: dead-lettered after {after}: {said(fact.report, 120)}"
        self.tell(fact.at, "bad", text)

    def _breaker(self, fact: f.BreakerStateChanged) -> None:
        moved = f"breaker {fact.breaker}: {fact.from_state} -> {fact.to_state} ({fact.reason})"
        opened = fact.to_state in ("open", "forced_open")
        self.tell(fact.at, "bad" if opened else "good" if fact.to_state == "closed" else "warn", moved)
        current = next((o for o in reversed(self.openings) if o.breaker == fact.breaker and o.closed_at is None), None)
        if opened and current is None:
            self.openings.append(Opening(fact.breaker, fact.at, fact.reason))
        elif fact.to_state in ("closed", "disabled") and current is not None:
            current.closed_at = fact.at

    def _site(self, report: ErrorReport, subscription: str) -> Site | None:
        key = f"{subscription} {report.fingerprint}"
        if key not in self.sites and len(self.sites) < _SITES_MAX:
            self.sites[key] = Site(report, subscription)
        return self.sites.get(key)


def said(report: ErrorReport, cap: int) -> str:
    """A failure in one line, its type without the module."""
    return printable(f"{report.exception_type.rpartition('.')[2]}: {report.message}", cap)
