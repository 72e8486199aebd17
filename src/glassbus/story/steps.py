"""Entries of a journal as steps of a story, and how things were around them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec

from glassbus.record.entries import Entry
from glassbus.record.telling import Process, Told
from glassbus.record.wording import span
from glassbus.story import reasons
from glassbus.story.model import Around, Failure, Step
from glassbus.story.reasons import number

#: The kind of step that a fact becomes, where that is not its name in other letters.
_KINDS = {
    "AttemptFailed": "attempt",
    "RecoveryEnded": "attempt",
    "RetryScheduled": "retry",
    "DeliveryDeadLettered": "dead_lettered",
    "DeadLetterReplayed": "replayed",
    "DeadLetterDiscarded": "discarded",
    "DeliveryDiscarded": "discarded",
    "DeliveryRedelivered": "redelivered",
    "DeliveryExpired": "expired",
    "DeliveryGivenBack": "given_back",
    "AttemptOverdue": "overdue",
    "AttemptAbandoned": "abandoned",
    "MessageSpooled": "spooled",
    "MessageUnrouted": "unrouted",
    "DuplicateRecognised": "duplicate",
    "PublishLeftUncertain": "publish_uncertain",
    "ErrorReported": "reported",
    "BreakerStateChanged": "breaker",
    "SubscriptionPaused": "paused",
    "SubscriptionResumed": "resumed",
}
_WHY: dict[str, Callable[[Entry], str]] = {
    "RetryScheduled": reasons.of_retry,
    "DeliveryDeadLettered": reasons.of_dead_letter,
    "DeadLetterReplayed": lambda _: "an operator put it back into its queue, attempts at 0",
    "DeadLetterDiscarded": reasons.of_discard,
    "DeliveryDiscarded": reasons.of_discard,
    "DeliveryRedelivered": reasons.of_redelivery,
    "DeliveryExpired": lambda _: "expires_in had passed before it was handled",
    "DeliveryGivenBack": reasons.of_given_back,
    "AttemptOverdue": reasons.of_overdue,
    "AttemptAbandoned": lambda _: "its slot is lost until the handler returns",
    "SlotRegained": lambda _: "the abandoned handler returned after all; what it did is not used",
    "SettlementRefused": reasons.of_refused,
    "CodecFellBack": reasons.of_codec,
    "MessageSpooled": lambda _: "the broker was away: kept in the local spool, to be forwarded",
    "MessageUnrouted": lambda _: "no subscription wanted it: it went nowhere",
    "DuplicateRecognised": lambda _: "its id had been accepted before; nothing was stored",
    "PublishLeftUncertain": reasons.of_error,
    "PublishRefused": reasons.of_error,
    "BreakerStateChanged": reasons.of_breaker,
    "SubscriptionPaused": lambda e: str(e.fields.get("reason") or "by an operator"),
    "SubscriptionResumed": lambda _: "messages are handed out again",
    "LoadShed": reasons.of_load,
    "LoadRegained": reasons.of_load,
    "IntakePaused": reasons.of_error,
    "IntakeResumed": lambda _: "publishes are taken again",
}
_OWN = frozenset({"action", "delay_s", "next_attempt", "duration_s", "outcome", "ran_s"})
_CAPITAL = re.compile(r"(?<!^)(?=[A-Z])")


class Made(NamedTuple):
    """A step, the subscription it is of, and the name of the journal that told it."""

    step: Step
    subscription: str
    journal: str


def steps_of(told: Told) -> list[Made]:
    """The message's own steps in time order, each attempt and its end with how things were around it."""
    surroundings = _Surroundings(told.around)
    made: list[Made] = []
    for entry, process in told.entries:
        surroundings.move_to(entry.at)
        if entry.fact == "RecoveryEnded" and entry.fields.get("outcome") != "succeeded":
            continue  # the failed attempt has been told
        around = surroundings.around(process.name, entry.subscription) if entry.subscription else None
        made.append(Made(step_of(entry, process, around), entry.subscription, process.name))
    return made


def moves_around(told: Told, subscription: str, journals: frozenset[str], since: float, until: float) -> list[Step]:
    """What moved around a subscription between two times, in the processes that had its message at work."""
    return [
        step_of(entry, process, None)
        for entry, process in told.around
        if since <= entry.at <= until
        and entry.fact not in ("BusStarted", "BusStopped")
        and entry.subscription in ("", subscription)
        and (process.name in journals or entry.fact in ("SubscriptionPaused", "SubscriptionResumed"))
    ]


def step_of(entry: Entry, process: Process, around: Around | None) -> Step:
    fact, fields = entry.fact, entry.fields
    kind = _KINDS.get(fact) or _CAPITAL.sub("_", fact).lower()
    duration_s: float | None = None
    if fact == "AttemptFailed":
        duration_s = number(fields.get("duration_s"))
    elif fact == "AttemptAbandoned":
        duration_s = number(fields.get("ran_s"))
    started_at = entry.started_at or (max(0.0, entry.at - duration_s) if duration_s is not None else 0.0)
    why = _WHY[fact](entry) if fact in _WHY else ""
    if fact == "RecoveryEnded":
        why = f"recovered {span(number(fields.get('duration_s')))} after its first failure"
    delay_s = number(fields.get("delay_s")) if kind == "retry" else None
    return Step(
        at=entry.at,
        kind=kind,
        why=why,
        attempt=0 if kind == "replayed" else entry.attempt,
        replays=entry.replays,
        outcome={"AttemptFailed": "failed", "RecoveryEnded": "handled"}.get(fact, ""),
        started_at=started_at if kind == "attempt" else 0.0,
        duration_s=duration_s,
        error=Failure.of(entry.report) if entry.report is not None else None,
        delay_s=delay_s,
        due_at=entry.at + delay_s if delay_s is not None else 0.0,
        trace_id=entry.trace_id,
        span_id=entry.span_id,
        parent_id=entry.parent_id,
        process=process.pid,
        around=around,
        details=_details(kind, fields),
    )


def _details(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    if kind == "retry":
        return {name: value for name, value in fields.items() if name != "delay_s"}
    return {name: value for name, value in fields.items() if name not in _OWN}


class _State(msgspec.Struct):
    """What one process last told of each thing."""

    breakers: dict[str, str]
    switches: dict[str, str]
    loads: dict[str, int]
    intake_paused: bool = False


class _Surroundings:
    """Moves through time, oldest first. A bus that starts begins with all breakers closed."""

    def __init__(self, around: Iterable[tuple[Entry, Process]]) -> None:
        self._left = list(around)[::-1]
        self._states: dict[str, _State] = {}
        # An operator's pause is stored, and holds for all.
        self._paused: dict[str, bool] = {}

    def move_to(self, at: float) -> None:
        while self._left and self._left[-1][0].at <= at:
            self._take(*self._left.pop())

    def _take(self, entry: Entry, process: Process) -> None:
        fields, name = entry.fields, entry.subscription
        state = self._states.setdefault(process.name, _State({}, {}, {}))
        match entry.fact:
            case "BusStarted":
                self._states[process.name] = _State({}, {}, {})
            case "BreakerStateChanged" if fields.get("kind") == "subscription":
                state.switches[name] = str(fields.get("to_state"))
            case "BreakerStateChanged":
                state.breakers[str(fields.get("breaker"))] = str(fields.get("to_state"))
            case "SubscriptionPaused" | "SubscriptionResumed":
                self._paused[name] = entry.fact == "SubscriptionPaused"
            case "LoadShed" | "LoadRegained":
                limit, whole = number(fields.get("limit")), number(fields.get("concurrency"))
                state.loads[name] = int(limit) if limit < whole else 0
            case "IntakePaused" | "IntakeResumed":
                state.intake_paused = entry.fact == "IntakePaused"

    def around(self, process: str, subscription: str) -> Around:
        paused = self._paused.get(subscription, False)
        state = self._states.get(process)
        if state is None:
            return Around(paused=paused)
        return Around(
            kill_switch=state.switches.get(subscription, "closed"),
            paused=paused,
            breakers={name: value for name, value in state.breakers.items() if value != "closed"},
            load_limit=state.loads.get(subscription, 0),
            intake_paused=state.intake_paused,
        )
