"""What telemetry reads from a bus when it is scraped. The core keeps it; nothing here changes it.

Every method may be called on any thread while the bus runs, so each returns a
snapshot (a fresh list or dict, or an immutable value), never a live collection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from glassbus.policy.ledger import Ledger
from glassbus.policy.retry import Retry
from glassbus.record.tally import Buckets, PublishTally, Tally
from glassbus.recovery.connections import Connection
from glassbus.recovery.guard import BreakerView
from glassbus.transport import QueueState


class SubscriberView(Protocol):
    """A subscription that this process runs, as it is now."""

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str:
        """One of `catalogue.SUBSCRIPTION_STATES`: running, paused, breaker_open, stopped."""

    @property
    def in_flight(self) -> int:
        """Attempts that run now."""

    @property
    def limit(self) -> int:
        """Most attempts that may run at once."""

    @property
    def overdue(self) -> int:
        """Of those in flight, the ones past their timeout."""

    @property
    def timeout_s(self) -> float:
        """The timeout in force; 0.0 for none."""

    @property
    def retry(self) -> Retry: ...
    @property
    def handling(self) -> Mapping[str, Buckets]:
        """Seconds spent on handling failures, by error category. Live: copied before it is read."""


class HealthView(Protocol):
    """`status` is healthy, degraded, critical or unknown; `ready`: takes messages and hands them out."""

    @property
    def status(self) -> str: ...
    @property
    def ready(self) -> bool: ...


class Source(Protocol):
    """A bus, as telemetry reads it. Held weakly: when the bus is gone its series go too."""

    @property
    def name(self) -> str: ...
    @property
    def transport(self) -> str:
        """The scheme: memory, sqlite, …"""

    @property
    def address(self) -> str:
        """Name and place without credentials."""

    @property
    def untrusted(self) -> tuple[str, ...]:
        """Topics (patterns) of strangers: their trace context is linked to, never continued."""

    def tallies(self) -> Iterable[Tally]: ...
    def publish_tallies(self) -> Iterable[PublishTally]: ...
    def subscribers(self) -> Iterable[SubscriberView]: ...
    def breaker_views(self) -> Iterable[BreakerView]: ...
    def queues(self) -> Mapping[str, QueueState]: ...
    def ledger(self) -> Ledger: ...
    def health(self) -> HealthView: ...
    def observer_failures(self) -> Mapping[str, int]:
        """Raised calls of each observer, by its name (`Hub.failures`, copied)."""

    def round_trip_age_s(self) -> float | None:
        """Seconds since the store last answered; None before it ever did."""

    def disk_free_bytes(self) -> int | None:
        """Free space where the store is; None when it has no disk."""

    def journal_dropped(self) -> int:
        """Journal lines that were dropped or folded into a summary; only grows."""

    def connections(self) -> Iterable[Connection]:
        """The endpoints of a broker; none where the store is embedded."""

    def escalation_channels(self) -> Iterable[str]:
        """The names of the channels by which people are told."""

    def escalations_open(self) -> Mapping[str, int]:
        """Escalations that are not resolved, by severity."""

    def error_memory_bytes(self) -> int:
        """About how much memory the records of errors take."""
