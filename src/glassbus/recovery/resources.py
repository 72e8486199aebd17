"""When memory, descriptors, threads or disk run out: less is run at once, and if that does not help, less is taken.

Each subscription sheds its own load; the intake is the bus's. Both heal by themselves.
"""

from __future__ import annotations

from collections.abc import Callable

from glassbus.clock import Clock
from glassbus.errors import ErrorCategory
from glassbus.facts import Delivery, IntakePaused, IntakeResumed, LoadRegained, LoadShed
from glassbus.observer import Hub
from glassbus.policy.shedding import Shed, Shedding
from glassbus.recovery.guard import ComponentBreakers, Recovery

_EXHAUSTION = ErrorCategory.RESOURCE_EXHAUSTION
#: The intake is not paused for longer than this at a time, in seconds: then it is tried again.
INTAKE_PAUSE_MAX_S = 15.0
#: Nor for less.
_INTAKE_PAUSE_MIN_S = 1.0


class Intake:
    """Whether the bus takes messages. Belongs to its loop; `paused` may be read anywhere."""

    def __init__(self, hub: Hub, clock: Clock, changed: Callable[[], None]) -> None:
        """`changed` is called after each pause and each resumption."""
        self._hub = hub
        self._clock = clock
        self._changed = changed
        self._paused_at = 0.0
        self._failing: set[str] = set()
        #: Why publishes are refused; empty while they are taken.
        self.paused = ""

    def pause(self, subscription: str, reason: str) -> None:
        """Refuse publishes until `subscription` is well, and for 15 s at most."""
        self._failing.add(subscription)
        if self.paused:
            return
        self.paused = reason
        self._paused_at = self._clock.monotonic()
        self._changed()
        self._hub.state(IntakePaused(at=self._clock.wall(), reason=reason))

    def waits_for(self, subscription: str) -> bool:
        """Whether it is paused until `subscription` is well."""
        return bool(self.paused) and subscription in self._failing

    def well(self, subscription: str) -> None:
        """Attempts of `subscription` succeed again."""
        self._failing.discard(subscription)

    def look(self) -> None:
        """Take messages again if it is time. Called about once a second."""
        if not self.paused:
            return
        paused_s = self._clock.monotonic() - self._paused_at
        if paused_s >= INTAKE_PAUSE_MAX_S or (paused_s >= _INTAKE_PAUSE_MIN_S and not self._failing):
            self.paused = ""
            self._failing.clear()
            self._changed()
            self._hub.state(IntakeResumed(at=self._clock.wall(), after_s=paused_s))


class LoadShedding:
    """Sheds the load of one subscription, and takes it up again. Belongs to the bus's loop.

    `resize` is told how many attempts may run at once; `hold_back` whether low priority is held back, and
    answers whether the transport does so.
    """

    def __init__(
        self,
        name: str,
        concurrency: int,
        *,
        hub: Hub,
        clock: Clock,
        breakers: ComponentBreakers,
        intake: Intake,
        resize: Callable[[int], None],
        hold_back: Callable[[bool], bool],
    ) -> None:
        self._name = name
        self._load = Shedding(concurrency)
        self._hub = hub
        self._clock = clock
        self._breakers = breakers
        self._intake = intake
        self._resize = resize
        self._hold_back = hold_back
        self._low_held = False
        self._recovery: Recovery | None = None
        self._attempt = 0
        self._first_at: float | None = None

    @property
    def limit(self) -> int:
        return self._load.limit

    @property
    def shed(self) -> bool:
        """Whether anything is held back now."""
        return self._load.shed

    def resize(self, concurrency: int) -> None:
        """All is `concurrency` from now on."""
        self._load.resize(concurrency)
        self._resize(self._load.limit)

    def exhausted(self, delivery: Delivery, error: BaseException, started: float) -> None:
        """An attempt that began at `started` ran out of a resource.

        A delivery that did so before says nothing new: one poisonous message sheds once.
        """
        now = self._clock.monotonic()
        again = delivery.recovering is not None and delivery.recovering[0] == _EXHAUSTION
        found = self._load.exhausted(float("-inf") if again else started, now)
        if found is Shed.NOTHING:
            return
        if self._first_at is None:
            self._first_at = now
        if found is Shed.AT_BOTTOM and self._recovery is not None:
            self._recovery.failed(error, delivery)
            self._recovery = None
        if self._recovery is None and not self._intake.waits_for(self._name):
            self._begin(error)
        if found is Shed.HALVED:
            self._apply()
            self._state(LoadShed)

    def _begin(self, error: BaseException) -> None:
        self._attempt += 1
        self._recovery = self._breakers.begin(
            "resources",
            _EXHAUSTION,
            "shed",
            self._name,
            error=error,
            attempt=self._attempt,
            first_failed_at=self._first_at,
        )
        if self._recovery is None:
            self._intake.pause(self._name, f"resources run out in {self._name}, and shedding its load does not help")

    def succeeded(self) -> None:
        """Attempts have succeeded since the last call."""
        self._load.succeeded()

    def look(self) -> None:
        """Take a step back towards all, if it is time. Called about once a second."""
        if not self._load.regain(self._clock.monotonic()):
            return
        if self._load.proven:
            self._intake.well(self._name)
            if self._recovery is not None:
                self._recovery.succeeded()
                self._recovery = None
            self._attempt, self._first_at = 0, None
        self._apply()
        self._state(LoadRegained)
        if not self._load.shed:
            self._rested()

    def _rested(self) -> None:
        self._call_off()
        self._intake.well(self._name)
        self._attempt, self._first_at = 0, None
        self._breakers.healed("resources", _EXHAUSTION)

    def stop(self) -> None:
        """The worker stops: what was begun is called off."""
        self._call_off()

    def _call_off(self) -> None:
        if self._recovery is not None:
            self._recovery.cancelled()
            self._recovery = None

    def _apply(self) -> None:
        self._resize(self._load.limit)
        if self._low_held != self._load.low_held:
            self._low_held = self._hold_back(self._load.low_held) and self._load.low_held

    def _state(self, kind: type[LoadShed] | type[LoadRegained]) -> None:
        self._hub.state(
            kind(
                at=self._clock.wall(),
                subscription=self._name,
                limit=self._load.limit,
                concurrency=self._load.full,
                low_priority_held=self._low_held,
            )
        )
