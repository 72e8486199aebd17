"""What a story is made of. Its JSON is these fields by these names: adding some is no change, anything else is."""

from __future__ import annotations

from typing import Any

import msgspec

from glassbus.errors import ErrorReport
from glassbus.message import Priority
from glassbus.record.plain import text

FORMAT = 1


class Failure(msgspec.Struct, frozen=True):
    """An error, in short. `error_id` is that of its report; `glassbus errors show FINGERPRINT` has its stack."""

    category: str
    severity: str
    type: str
    message: str
    fingerprint: str
    error_id: str
    component: str

    @classmethod
    def of(cls, report: ErrorReport) -> Failure:
        return cls(
            str(report.category),
            str(report.severity),
            report.exception_type,
            text(report.message),
            report.fingerprint,
            report.error_id,
            report.component,
        )


class Around(msgspec.Struct, frozen=True):
    """How things were in a process at one moment, as far as its journal tells.

    `kill_switch` is the state of the breaker before the subscription, `breakers` those of others that were not closed
    (by name), `load_limit` how many attempts ran at once while load was shed (0: it was not).
    """

    kill_switch: str = "closed"
    paused: bool = False
    breakers: dict[str, str] = {}
    load_limit: int = 0
    intake_paused: bool = False

    @property
    def calm(self) -> bool:
        return self == _CALM


_CALM = Around()


class Step(msgspec.Struct, frozen=True):
    """One thing that happened. Times are wall seconds, 0.0 where there is none; `duration_s` is None where unknown.

    `kind`: attempt, retry, dead_lettered, replayed, redelivered, expired, discarded, given_back, overdue, abandoned,
    slot_regained, settlement_refused, codec_fell_back, breaker, paused, resumed, load_shed, load_regained,
    intake_paused, intake_resumed, spooled, duplicate, unrouted, publish_uncertain, publish_refused, reported; a later
    version may know more. `why` says it in a sentence. `attempt` counts within `replays`. `outcome` of an attempt:
    failed or handled. A retry has `delay_s` and is due at `due_at`. `process` is the process id of who did it (0:
    unknown). The trace is in hex, empty where none was recorded. `details` are further fields of the fact.
    """

    at: float
    kind: str
    why: str = ""
    attempt: int = 0
    replays: int = 0
    outcome: str = ""
    started_at: float = 0.0
    duration_s: float | None = None
    error: Failure | None = None
    delay_s: float | None = None
    due_at: float = 0.0
    trace_id: str = ""
    span_id: str = ""
    parent_id: str = ""
    process: int = 0
    around: Around | None = None
    details: dict[str, Any] = {}


class Now(msgspec.Struct, frozen=True):
    """Where a delivery is. `state`: ready, scheduled, retrying, in_flight, dead_lettered, handled, expired, discarded,
    or unknown.

    `source` is the store, or the journal where the store was not asked; `certain` is False for what is only inferred.
    `text` says it in a sentence. `due_at`, `owner`, `owner_lives`, `waits_for_key` and `redelivered` are
    as in `transport.Located`; `held`: paused or forced_open, by an operator. `consumers`: processes that take messages
    of it, None where that is unknown. Of a dead letter: its `dead_letter` id, `reason` and `error`.
    """

    state: str
    text: str
    source: str
    certain: bool = True
    since: float = 0.0
    due_at: float = 0.0
    expires_at: float = 0.0
    attempt: int = 0
    owner: str = ""
    owner_lives: bool | None = None
    waits_for_key: bool = False
    redelivered: str = ""
    held: str = ""
    consumers: int | None = None
    dead_letter: str = ""
    reason: str = ""
    error: Failure | None = None


class DeliveryStory(msgspec.Struct, frozen=True):
    """A message on its way through one subscription; `steps` are oldest first."""

    subscription: str
    now: Now
    steps: tuple[Step, ...] = ()


class Published(msgspec.Struct, frozen=True):
    """`level` is that at which the bus publishes that told of it first. `complete`: these are all `subscriptions`.

    `trace_id` is the trace of the publish and of the attempts that continue it; `sampled`: it has a span of its own.
    """

    topic: str
    at: float
    level: str
    subscriptions: tuple[str, ...]
    complete: bool
    priority: str = Priority.NORMAL.name.lower()
    key: str | None = None
    trace_id: str = ""
    sampled: bool = False


class TraceOfStory(msgspec.Struct, frozen=True):
    """A trace: what of the story it `holds`, the trace that it is `linked_to`, and where to see it (`url`)."""

    trace_id: str
    holds: tuple[str, ...]
    linked_to: str = ""
    url: str = ""


class Story(msgspec.Struct, frozen=True):
    """All that is known of one message, told at wall time `told_at`.

    `publishing` are steps that concern no single subscription. `notes` say what is missing, and why. `store`: where
    it was looked for, empty when no store was asked.
    """

    format: int
    message_id: str
    told_at: float
    published: Published
    publishing: tuple[Step, ...]
    deliveries: tuple[DeliveryStory, ...]
    traces: tuple[TraceOfStory, ...]
    notes: tuple[str, ...]
    store: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The story as plain JSON-ready values."""
        built: dict[str, Any] = msgspec.to_builtins(self)
        return built
