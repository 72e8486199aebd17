"""What can go wrong, described once as data: for tests, for the demo, and for drills of alerts.

A scenario says which fault strikes where, what must be stated while it does, and what after it heals.
`drill` (in `drill.py`) puts one upon a bus and checks that.
"""

from __future__ import annotations

from typing import Any

import msgspec

from glassbus import facts as f
from glassbus.bus import MessageBus
from glassbus.errors import ConfigurationError, ErrorCategory, shown
from glassbus.facts import Fact, FactType
from glassbus.faults.injection import Injection, inject
from glassbus.faults.kinds import (
    ClockJump,
    CorruptPayload,
    Crash,
    DiskFull,
    DropConnection,
    Fault,
    Hang,
    MemoryPressure,
    Raise,
    Refuse,
    SlowDisk,
    TelemetryDown,
)
from glassbus.faults.schedule import Always, Schedule

_C = ErrorCategory


class Stated(msgspec.Struct, frozen=True):
    """A fact of this type, with these values in its fields."""

    kind: FactType
    fields: tuple[tuple[str, Any], ...] = ()

    def fits(self, fact: Fact) -> bool:
        return type(fact) is self.kind and all(getattr(fact, name) == value for name, value in self.fields)

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.fields)
        return f"{self.kind.__name__}({given})" if given else self.kind.__name__


def stated(kind: FactType, /, **fields: Any) -> Stated:
    """A fact of type `kind`. Raises ConfigurationError for a field that it does not have."""
    unknown = fields.keys() - set(kind.__struct_fields__)
    if unknown:
        raise ConfigurationError(f"{kind.__name__} has no field {sorted(unknown)}")
    return Stated(kind, tuple(fields.items()))


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that goes wrong.

    `{handler}` in `target` stands for the subscription that it befalls. `while_struck` must be stated
    before it heals, `once_healed` after. `capacity` is what the queue must be small enough for, where that matters.
    `durable`: it needs a store on disk; `crash`: it ends the process.
    """

    name: str
    summary: str
    fault: Fault
    target: str
    category: ErrorCategory | None = None
    probability: float = 1.0
    schedule: Schedule = Always()
    limit: int | None = None
    while_struck: tuple[Stated, ...] = ()
    once_healed: tuple[Stated, ...] = ()
    capacity: int | None = None
    durable: bool = False
    crash: bool = False

    def on(self, bus: MessageBus, handler: str = "*", **changed: Any) -> Injection:
        """Its fault, upon `bus`; `changed` replaces options of `inject`. Raises as `inject` does."""
        options: dict[str, Any] = {
            "probability": self.probability,
            "schedule": self.schedule,
            "limit": self.limit,
            **changed,
        }
        return inject(bus, self.fault, self.target.replace("{handler}", handler), **options)


_FAILED = stated(f.AttemptFailed)
_RETRIED = stated(f.RetryScheduled)
_RECOVERED = stated(f.RecoveryEnded, outcome="succeeded")
_OPENED = stated(f.BreakerStateChanged, kind="subscription", to_state="open")
_CLOSED = stated(f.BreakerStateChanged, kind="subscription", to_state="closed")

#: One for each category, and then what else can go wrong.
SCENARIOS: dict[str, Scenario] = {
    one.name: one
    for one in (
        Scenario(
            name="connection_error",
            category=_C.CONNECTION_ERROR,
            summary="what a handler depends on refuses every connection: its kill switch opens, and closes again",
            fault=Refuse(),
            target="handler:{handler}",
            while_struck=(_FAILED, _RETRIED, _OPENED),
            once_healed=(_RECOVERED, _CLOSED),
        ),
        Scenario(
            name="message_processing_error",
            category=_C.MESSAGE_PROCESSING_ERROR,
            summary="a handler raises for one message in three: those are tried again",
            fault=Raise(ValueError, "this order cannot be read (injected)"),
            target="handler:{handler}",
            probability=0.3,
            while_struck=(_FAILED, _RETRIED, _RECOVERED),
        ),
        Scenario(
            name="serialization_error",
            category=_C.SERIALIZATION_ERROR,
            summary="three payloads arrive damaged: their bytes are kept as dead letters",
            fault=CorruptPayload(),
            target="codec:decode",
            limit=3,
            while_struck=(_FAILED, stated(f.DeliveryDeadLettered, reason="not_retryable")),
        ),
        Scenario(
            name="queue_overflow",
            category=_C.QUEUE_OVERFLOW,
            summary="a handler stands still while messages come in: its queue fills up, and slows its publishers",
            fault=Hang(),
            target="handler:{handler}",
            capacity=20,
            while_struck=(stated(f.BackpressureApplied),),
        ),
        Scenario(
            name="timeout_error",
            category=_C.TIMEOUT_ERROR,
            summary="half of a handler's calls never come back: they are cut off, and made again",
            fault=Hang(),
            target="handler:{handler}",
            probability=0.5,
            while_struck=(_FAILED, _RETRIED),
            once_healed=(_RECOVERED,),
        ),
        Scenario(
            name="authentication_error",
            category=_C.AUTHENTICATION_ERROR,
            summary="what a handler depends on takes its credentials no more",
            fault=Raise(PermissionError, "401: the token has expired (injected)"),
            target="handler:{handler}",
            while_struck=(_FAILED, _RETRIED, _OPENED),
            once_healed=(_RECOVERED, _CLOSED),
        ),
        Scenario(
            name="resource_exhaustion",
            category=_C.RESOURCE_EXHAUSTION,
            summary="a handler runs out of memory: fewer run at once, and more again when it is over",
            fault=MemoryPressure(),
            target="handler:{handler}",
            probability=0.3,
            while_struck=(_FAILED, _RETRIED, stated(f.LoadShed)),
            once_healed=(stated(f.LoadRegained),),
        ),
        Scenario(
            name="configuration_error",
            category=_C.CONFIGURATION_ERROR,
            summary="a handler finds that a module it needs is missing: its kill switch opens, and keeps the messages",
            fault=Raise(ModuleNotFoundError, "No module named 'prices' (injected)"),
            target="handler:{handler}",
            while_struck=(_FAILED, _OPENED),
            once_healed=(_RECOVERED, _CLOSED),
        ),
        Scenario(
            name="lost_answers",
            category=_C.CONNECTION_ERROR,
            summary="connections break after the work is done, so that it is done twice",
            fault=DropConnection(),
            target="handler:{handler}",
            probability=0.3,
            while_struck=(_FAILED, _RETRIED, _RECOVERED),
        ),
        Scenario(
            name="uncertain_publishes",
            category=_C.CONNECTION_ERROR,
            summary="the answers to publishes are lost: they are repeated with the same ids, and stored once",
            fault=DropConnection(),
            target="transport:publish",
            probability=0.3,
            while_struck=(stated(f.PublishLeftUncertain), stated(f.DuplicateRecognised)),
        ),
        Scenario(
            name="store_down",
            category=_C.CONNECTION_ERROR,
            summary="the store takes and gives nothing: what was handled is kept until it can be recorded",
            fault=Refuse(),
            target="transport:*",
            while_struck=(stated(f.TransportFailed),),
            once_healed=(stated(f.TransportRecovered),),
        ),
        Scenario(
            name="disk_full",
            category=_C.RESOURCE_EXHAUSTION,
            summary="no disk space is free: publishes are refused, acknowledgements still taken",
            fault=DiskFull(),
            target="disk",
            while_struck=(stated(f.PublishRefused, reason="storage_full"),),
        ),
        Scenario(
            name="slow_disk",
            summary="each commit takes 200 ms longer: everything is slower, and nothing else",
            fault=SlowDisk(0.2),
            target="disk",
        ),
        Scenario(
            name="clock_jump",
            summary="the wall clock jumps an hour ahead, and back: retries and timeouts do not notice",
            fault=ClockJump(3600.0),
            target="clock",
        ),
        Scenario(
            name="telemetry_down",
            summary="nobody takes traces and metrics: messages do not notice",
            fault=TelemetryDown(),
            target="telemetry",
        ),
        Scenario(
            name="crash",
            summary="the process is killed in the middle of a message: the next run takes it up",
            fault=Crash(),
            target="handler:{handler}",
            durable=True,
            crash=True,
        ),
    )
}


def scenario_of(name: str) -> Scenario:
    """The scenario of this name. Raises ConfigurationError, naming those there are."""
    found = SCENARIOS.get(name)
    if found is None:
        raise ConfigurationError(f"no scenario {shown(name)}; there are {', '.join(SCENARIOS)}")
    return found
