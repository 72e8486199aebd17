"""Who must know of what: escalations as a table of states.

    open --a channel was told--> notified --a person has it--> acknowledged
      \\_____________________________ | ______________________________/
                                     v
                                 resolved        (the end; the same fingerprint then opens a new one)

Pure: wall seconds come in as `now`, what changed comes out. An escalation that gets worse is resolved
and opened again, so that its severity is the same for as long as it is open.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

import msgspec

from glassbus.errors import ErrorSeverity

#: More escalations than this are not kept at once; those that come then are counted, and one stands for them.
OPEN_MAX = 1000
#: The fingerprint and the name of that one.
FULL = "too-many-escalations"

#: Least to most.
SEVERITIES = (ErrorSeverity.LOW, ErrorSeverity.MEDIUM, ErrorSeverity.HIGH, ErrorSeverity.CRITICAL)
RANK = {severity: rank for rank, severity in enumerate(SEVERITIES)}


class EscalationState(StrEnum):
    OPEN = "open"
    NOTIFIED = "notified"
    ACKNOWLEDGED = "acknowledged"
    RESOLVED = "resolved"


_S = EscalationState

LEGAL: dict[EscalationState, frozenset[EscalationState]] = {
    _S.OPEN: frozenset({_S.NOTIFIED, _S.ACKNOWLEDGED, _S.RESOLVED}),
    _S.NOTIFIED: frozenset({_S.ACKNOWLEDGED, _S.RESOLVED}),
    _S.ACKNOWLEDGED: frozenset({_S.RESOLVED}),
    _S.RESOLVED: frozenset(),
}


class IllegalTransition(ValueError):
    """An escalation cannot move so: a mistake in this program."""


class Ends(StrEnum):
    """What resolves an escalation by itself; a person may always."""

    HEALING = "healing"  #: a fact that says so; after a restart, quiet too, for nobody may say it then
    QUIET = "quiet"  #: it is not seen again for a while
    PERSON = "person"  #: nothing


class Alarm(msgspec.Struct, frozen=True):
    """Why somebody must know. `heals` names what a healing fact ends; the same as that fact's key."""

    fingerprint: str
    name: str
    severity: ErrorSeverity
    summary: str
    ends: Ends = Ends.QUIET
    heals: str = ""


class Escalated(msgspec.Struct, frozen=True, kw_only=True):
    """One escalation as it is now. Times are wall seconds, 0.0 for never; `seen` counts how often it was raised."""

    fingerprint: str
    name: str
    severity: ErrorSeverity
    summary: str
    ends: Ends
    heals: str = ""
    state: EscalationState = EscalationState.OPEN
    opened_at: float
    seen_at: float
    seen: int = 1
    told_at: float = 0.0
    acknowledged_by: str = ""
    #: It was taken over from an earlier run, and has not been seen in this one.
    inherited: bool = False


Event = Literal["opened", "still_open", "acknowledged", "resolved"]


class Change(msgspec.Struct, frozen=True):
    """What became of an escalation, for the channels. `reason`: why it was resolved."""

    event: Event
    escalation: Escalated
    reason: str = ""


def moved(escalation: Escalated, to: EscalationState) -> Escalated:
    """`escalation` in the state `to`. Raises IllegalTransition."""
    if to not in LEGAL[escalation.state]:
        raise IllegalTransition(f"escalation {escalation.fingerprint} cannot go from {escalation.state} to {to}")
    return msgspec.structs.replace(escalation, state=to)


class Book:
    """The escalations that are open: one for each fingerprint at a time.

    After `renotify_s` without an acknowledgement the channels are told again; what ends by quiet ends
    `quiet_s` after it was last seen. Not thread-safe.
    """

    def __init__(self, *, renotify_s: float, quiet_s: float) -> None:
        self.renotify_s = renotify_s
        self.quiet_s = quiet_s
        #: Alarms for which there was no room.
        self.refused = 0
        self._open: dict[str, Escalated] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self) -> list[Escalated]:
        """The worst first, then the oldest."""
        return sorted(self._open.values(), key=lambda e: (-RANK[e.severity], e.opened_at))

    def healers(self) -> set[str]:
        """What the escalations that are open wait for."""
        return {one.heals for one in self._open.values()}

    def get(self, fingerprint: str) -> Escalated | None:
        return self._open.get(fingerprint)

    def inherit(self, kept: Iterable[Escalated], now: float) -> int:
        """Take over what an earlier run left open; how many. What is open here already stays as it is."""
        taken = 0
        for escalation in kept:
            fits = len(self._open) < OPEN_MAX and escalation.state is not EscalationState.RESOLVED
            if escalation.fingerprint not in self._open and fits:
                # Its quiet time counts from now: nobody was there to see.
                self._open[escalation.fingerprint] = msgspec.structs.replace(escalation, inherited=True, seen_at=now)
                taken += 1
        return taken

    def raised(self, alarm: Alarm, now: float) -> list[Change]:
        """Somebody must know of `alarm`: opens an escalation, unless one of its fingerprint is."""
        known = self._open.get(alarm.fingerprint)
        changes: list[Change] = []
        if known is not None and RANK[alarm.severity] <= RANK[known.severity]:
            self._open[alarm.fingerprint] = msgspec.structs.replace(
                known, seen=known.seen + 1, seen_at=max(now, known.seen_at), inherited=False
            )
            return changes
        if known is not None:
            changes.append(self._resolved(known, f"it got worse: {alarm.severity} now"))
        elif len(self._open) >= OPEN_MAX:
            self.refused += 1
            if alarm.fingerprint == FULL or FULL in self._open:
                return changes
            summary = f"{OPEN_MAX:,} escalations are open, so others are only counted: resolve some"
            alarm = Alarm(FULL, "TooManyEscalations", ErrorSeverity.CRITICAL, summary)
        opened = Escalated(
            fingerprint=alarm.fingerprint,
            name=alarm.name,
            severity=alarm.severity,
            summary=alarm.summary,
            ends=alarm.ends,
            heals=alarm.heals,
            opened_at=now,
            seen_at=now,
            told_at=now,
        )
        self._open[alarm.fingerprint] = opened
        return [*changes, Change("opened", opened)]

    def healed(self, key: str, reason: str) -> list[Change]:
        """What `key` names works again: ends every escalation that it heals."""
        return [self._resolved(e, reason) for e in list(self._open.values()) if e.heals == key]

    def told(self, fingerprint: str) -> bool:
        """A channel was told; whether that is the first time."""
        known = self._open.get(fingerprint)
        if known is None or known.state is not EscalationState.OPEN:
            return False
        self._open[fingerprint] = moved(known, EscalationState.NOTIFIED)
        return True

    def acknowledge(self, fingerprint: str, by: str) -> Change | None:
        """A person has it: it is not told again. None when that was so already. Raises KeyError."""
        known = self._open[fingerprint]
        if known.state is EscalationState.ACKNOWLEDGED:
            return None
        held = msgspec.structs.replace(moved(known, EscalationState.ACKNOWLEDGED), acknowledged_by=by)
        self._open[fingerprint] = held
        return Change("acknowledged", held)

    def resolve(self, fingerprint: str, reason: str) -> Change:
        """A person says that it is over. Raises KeyError."""
        return self._resolved(self._open[fingerprint], reason)

    def look(self, now: float) -> list[Change]:
        """Time has passed: end what was quiet for long enough, and tell again what nobody has taken."""
        changes: list[Change] = []
        for known in list(self._open.values()):
            if known.seen_at > now or known.told_at > now:  # the wall clock was set back
                known = msgspec.structs.replace(known, seen_at=min(now, known.seen_at), told_at=min(now, known.told_at))
                self._open[known.fingerprint] = known
            by_quiet = known.ends is Ends.QUIET or (known.ends is Ends.HEALING and known.inherited)
            if by_quiet and now - known.seen_at >= self.quiet_s:
                since = "the restart" if known.inherited else "it was last seen"
                changes.append(self._resolved(known, f"quiet for {self.quiet_s:g} s since {since}"))
            elif known.state is not EscalationState.ACKNOWLEDGED and now - known.told_at >= self.renotify_s:
                again = self._open[known.fingerprint] = msgspec.structs.replace(known, told_at=now)
                changes.append(Change("still_open", again))
        return changes

    def _resolved(self, escalation: Escalated, reason: str) -> Change:
        del self._open[escalation.fingerprint]
        return Change("resolved", moved(escalation, EscalationState.RESOLVED), reason)
