"""What a bus can be asked."""

from __future__ import annotations

from asyncio import get_running_loop

from glassbus.bus.parts import Parts
from glassbus.errors import TransportError, UnknownMessage, shown
from glassbus.observer import safe_text
from glassbus.policy.ledger import Audit, Ledger
from glassbus.record.tally import PublishTally, Tally
from glassbus.record.telling import Told
from glassbus.recovery.connections import Connection
from glassbus.recovery.guard import BreakerView
from glassbus.recovery.health import Health
from glassbus.story import FORGETS, Story, ask, tell
from glassbus.transport import QueueState, Spools, Transport
from glassbus.worker import Worker


class Looking(Parts):
    """Nothing here changes anything. `health`, `ledger` and `queues` may be asked on any thread."""

    @property
    def transport(self) -> str:
        """The scheme of its transport."""
        return self._addresses[0].scheme

    @property
    def address(self) -> str:
        """Where its messages are, without credentials."""
        return self._transport.address

    @property
    def store(self) -> Transport:
        """What keeps its messages, for commands that look at it."""
        return self._transport

    @property
    def untrusted(self) -> tuple[str, ...]:
        """The topics, as patterns, whose messages come from strangers."""
        return self.settings.untrusted

    @property
    def running(self) -> bool:
        return self._state == "running"

    @property
    def stopped(self) -> bool:
        """Whether it takes nothing more, ever: it has stopped, or is about to."""
        return self._state in ("stopping", "stopped")

    def ledger(self) -> Ledger:
        """Where every accepted delivery is, as the store has it; after a stop, as it was left.

        Raises TransportError before the bus is started.
        """
        self._check_started()
        return self._transport.ledger()

    def queues(self) -> dict[str, QueueState]:
        """Every subscription in the store, run by this process or not. Raises as `ledger` does."""
        self._check_started()
        return self._transport.queues()

    async def audit(self) -> Audit:
        """Recount every row of the store against its ledger. Reads all of it: not for a tight loop."""
        return await self._transport.audit()

    async def explain(self, message_id: str) -> Story:
        """All that is known of one message: where it is, each attempt and decision and why, and in which traces.

        From the journal, of every process that shares the state directory, and from the store. A message that never
        failed has no lines in the journal: of it, only where it waits is known. Reads files, on a thread.
        Raises UnknownMessage, and TransportError before the bus is started.
        """
        self._check_started()
        found: list[Told] = []
        read = self.clock.on_thread(lambda: found.append(self.journal.told(message_id)))
        await get_running_loop().run_in_executor(None, read)
        told, asked = found[0], None
        try:
            asked = await ask(self._transport, message_id) if self._state == "running" else None
        except TransportError as error:  # a broker that is away: what the journal knows is told all the same
            told = told._replace(notes=(*told.notes, f"the store could not be asked: {safe_text(error, 300)}"))
        story = tell(message_id, told, asked, self._wall())
        if story is None:
            raise UnknownMessage(f"nothing is known of a message {shown(message_id)}: {FORGETS}")
        return story

    def health(self) -> Health:
        """How the bus is now. Rates are of the last 5 minutes; what cannot be told is `unknown`."""
        return self._pulse.health(self._state)

    @property
    def health_status(self) -> str:
        """What `health` said at the last look, about a second ago. Asks nothing."""
        return self._pulse.status.value if self._state == "running" else "unknown"

    # What telemetry reads (see telemetry.source.Source)

    def tallies(self) -> list[Tally]:
        """Counts of what subscriptions of this process handled, by destination."""
        return [tally for worker in list(self._workers.values()) for tally in list(worker.tallies.values())]

    def publish_tallies(self) -> list[PublishTally]:
        """Counts of what was published here, by destination."""
        return list(self._publisher.tallies.values())

    def subscribers(self) -> list[Worker]:
        """The subscriptions that this process runs, as they are now."""
        return list(self._workers.values())

    def breaker_views(self) -> list[BreakerView]:
        """Their breakers and those of recovering components, as they are now."""
        endpoints = self._endpoint.breaker_views() if self._endpoint is not None else []
        gates = (worker.gate for worker in list(self._workers.values()))
        return [*gates, *self.component_breakers.views(), *endpoints, *self.further_breakers()]

    def connections(self) -> list[Connection]:
        """Each endpoint of a broker as it is now; none where the store is embedded."""
        if self._endpoint is None:
            return []
        return self._endpoint.connections(self._transport.spooled() if isinstance(self._transport, Spools) else 0)

    def escalation_channels(self) -> list[str]:
        """The channels by which people are told."""
        return [lane.name for lane in self.escalations.channels()]

    def escalations_open(self) -> dict[str, int]:
        """Escalations that are not resolved, by severity."""
        return {severity.value: count for severity, count in self.escalations.open_by_severity().items()}

    def observer_failures(self) -> dict[str, int]:
        """How often each observer raised, by its name."""
        return dict(self.hub.failures)

    def round_trip_age_s(self) -> float | None:
        """Seconds since the store last answered; None before it ever did."""
        answered_at = self._pulse.answered_at
        return None if answered_at is None else self._monotonic() - answered_at

    def loop_age_s(self) -> float:
        """Seconds since the loop last turned; more than a few mean that something blocks it."""
        return self._monotonic() - self._pulse.turned_at

    def disk_free_bytes(self) -> int | None:
        """Free space where the store is; None when it has no disk."""
        return self._transport.disk_free_bytes()

    def journal_dropped(self) -> int:
        """Entries that the journal keeps nowhere, or only as a number in a summary."""
        return self.journal.dropped

    def error_memory_bytes(self) -> int:
        """About how much memory the records of errors take: journal, statistics, stacks of failure sites."""
        return self.journal.memory_bytes() + self._sites.memory_bytes()
