"""What a bus is made of, for the parts of its face to work with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from glassbus.clock import Clock
from glassbus.codec import Codec
from glassbus.config import Address, Settings
from glassbus.deadletters import DeadLetters
from glassbus.errors import TransportError
from glassbus.message import Level
from glassbus.observer import Hub, Observer
from glassbus.publisher import Publisher
from glassbus.pulse import Pulse
from glassbus.record.fingerprint import FailureSites
from glassbus.record.journal import Journal
from glassbus.recovery.emergency import Emergency
from glassbus.recovery.endpoint import EndpointSupervisor
from glassbus.recovery.escalation import Escalations
from glassbus.recovery.guard import BreakerView, ComponentBreakers
from glassbus.recovery.queue import Growth
from glassbus.recovery.resources import Intake
from glassbus.subscription import Subscription
from glassbus.switches import Breakers
from glassbus.transport import Transport
from glassbus.tuning import Reconfiguration
from glassbus.worker import Worker


class Parts:
    """Made by `MessageBus.__init__`. All of it belongs to the bus's loop."""

    settings: Settings
    clock: Clock
    hub: Hub
    journal: Journal
    escalations: Escalations
    emergency: Emergency
    intake: Intake
    component_breakers: ComponentBreakers
    dead_letters: DeadLetters
    breakers: Breakers
    further_breakers: Callable[[], Sequence[BreakerView]]
    looks_only: bool
    _addresses: list[Address]
    _codecs: tuple[Codec, ...]
    _monotonic: Callable[[], float]
    _wall: Callable[[], float]
    _state: str
    _loop: asyncio.AbstractEventLoop | None
    _starting: asyncio.Task[Any] | None
    _transport: Transport
    _endpoint: EndpointSupervisor | None
    _level: Level
    _patience_s: float
    _publisher: Publisher
    _pulse: Pulse
    _sites: FailureSites
    _growth: Growth
    _reconfiguration: Reconfiguration
    _subscriptions: dict[str, Subscription]
    _workers: dict[str, Worker]
    _declaring: set[asyncio.Task[None]]
    #: What keeps publishes from going straight to the store: subscriptions being declared, a paused intake.
    _bars: set[object]
    _tasks: set[asyncio.Task[None]]

    @property
    def name(self) -> str:
        return self.settings.name

    def observe(self, observer: Observer) -> None:
        """Show facts to `observer` from now on. One with `inject` also writes message headers."""
        self.hub.add(observer)
        self._publisher.adopt(observer)

    def _check_started(self) -> None:
        if self._state in ("new", "starting"):
            raise TransportError(f"bus {self.name!r} is not started: its store is not open yet")

    def _learn(self) -> None:
        """Take over the stored subscriptions, also those that another process declared."""
        self._publisher.learn([state.spec.pattern for state in self._transport.queues().values()])

    def _in_background(self, what: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` as a task that is kept, and whose failure is stated."""

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            error = None if task.cancelled() else task.exception()
            if error is not None:
                self._pulse.state_failure(what, error)

        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task
