"""Where escalations go: Alertmanager, a webhook, the log; and what a channel of your own must be.

A channel is told on a thread of its own. What it raises is counted and tried again; how long it takes holds up
nobody but itself.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from glassbus.errors import ConfigurationError, ErrorSeverity, shown
from glassbus.policy.escalation import Escalated, Event
from glassbus.recovery.posting import Target, post

logger = logging.getLogger("glassbus.escalation")

#: How often an Alertmanager is told what is still open, in seconds.
REFRESH_S = 60.0
#: An Alertmanager that hears no more of an alert resolves it by itself after this long, in seconds.
FORGOTTEN_AFTER_S = 4 * REFRESH_S
_CHUNK = 200
_NAME = re.compile(r"[a-z0-9_\-]{1,40}")


class Notice(msgspec.Struct, frozen=True):
    """What a channel is told of one escalation of `bus`. `at` is wall seconds; `reason`: why it was resolved.

    `notification` counts what the channel was told of this escalation, from 1.
    """

    event: Event
    escalation: Escalated
    bus: str
    at: float
    notification: int
    reason: str = ""


class Channel(Protocol):
    """Somewhere to tell people. Any thread, one call at a time; may block and may raise anything.

    `name` labels its metrics and is unique on a bus; it wants escalations of severity `at_least` and worse. `batch`
    is the most notices of one call. With `refresh_s` above 0 it is shown all that is open every so many seconds,
    and what is over a few times more, as an Alertmanager needs it.
    """

    @property
    def name(self) -> str: ...
    @property
    def at_least(self) -> ErrorSeverity: ...
    @property
    def batch(self) -> int: ...
    @property
    def refresh_s(self) -> float: ...

    def send(self, notices: Sequence[Notice], /) -> None:
        """Return when all of them are delivered."""


class _Posting(msgspec.Struct, frozen=True):
    """What both kinds of HTTP channels are given. `repr` shows neither the path of the URL nor any header."""

    url: str
    name: str = ""
    at_least: ErrorSeverity = ErrorSeverity.LOW
    timeout: float = 2.0
    headers: Mapping[str, str] = {}

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name if isinstance(self.name, str) else ""):
            raise ConfigurationError(f"the name of a channel is 1 to 40 of a-z 0-9 _ -, not {shown(self.name)}")
        if not isinstance(self.at_least, ErrorSeverity):
            raise ConfigurationError(f"at_least is an ErrorSeverity, not {shown(self.at_least)}")
        if type(self.timeout) not in (int, float) or not 0 < self.timeout <= 60 or math.isnan(self.timeout):
            raise ConfigurationError(f"timeout is more than 0 and at most 60 seconds, not {shown(self.timeout)}")
        self._target()

    def _target(self) -> Target:
        return Target(self.url, headers=self.headers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._target())!r}, name={self.name!r}, at_least={self.at_least.value!r})"

    __str__ = __repr__

    def __rich_repr__(self) -> Any:
        yield str(self._target())
        yield "name", self.name


class Alertmanager(_Posting, frozen=True):
    """An Alertmanager, by its API v2: `url` is its own, such as `http://alertmanager:9093`.

    It is told what is open every minute, with an end some minutes ahead, so that what a bus that died had opened ends
    there by itself. Name one channel for each member of a cluster; they agree among themselves.

    An alert has the labels `alertname` (Glassbus and the name of the escalation), `severity` (low, medium, high or
    critical), `fingerprint`, `bus` and `source="glassbus"`, which no alert rule has.
    """

    name: str = "alertmanager"

    @property
    def batch(self) -> int:
        return _CHUNK

    @property
    def refresh_s(self) -> float:
        return REFRESH_S

    def _target(self) -> Target:
        return Target(self.url, below="/api/v2/alerts", headers=self.headers)

    def send(self, notices: Sequence[Notice], /) -> None:
        target = self._target()
        for start in range(0, len(notices), _CHUNK):
            alerts = [_alert(notice) for notice in notices[start : start + _CHUNK]]
            post(target, msgspec.json.encode(alerts), timeout_s=self.timeout)


def _alert(notice: Notice) -> dict[str, Any]:
    escalation = notice.escalation
    annotations = {"summary": escalation.summary, "seen": str(escalation.seen)}
    if escalation.acknowledged_by:
        annotations["acknowledged_by"] = escalation.acknowledged_by
    if notice.reason:
        annotations["resolved_because"] = notice.reason
    ends_at = notice.at if notice.event == "resolved" else notice.at + FORGOTTEN_AFTER_S
    return {
        "labels": {
            "alertname": f"Glassbus{escalation.name}",
            "severity": escalation.severity.value,
            "fingerprint": escalation.fingerprint,
            "bus": notice.bus,
            "source": "glassbus",
        },
        "annotations": annotations,
        "startsAt": _time(min(escalation.opened_at, notice.at)),
        "endsAt": _time(ends_at),
    }


class Webhook(_Posting, frozen=True):
    """Posts one JSON object for each notice to `url`, with `headers` (such as Authorization).

    The object has `version` (1), `event` (opened, still_open, acknowledged or resolved), `notification`, `bus`, `at`,
    `reason`, and under `escalation` what `glassbus escalations list --json` shows.
    """

    name: str = "webhook"

    @property
    def batch(self) -> int:
        return 1

    @property
    def refresh_s(self) -> float:
        return 0.0

    def send(self, notices: Sequence[Notice], /) -> None:
        target = self._target()
        for notice in notices:
            post(target, msgspec.json.encode(as_json(notice)), timeout_s=self.timeout)


def as_json(notice: Notice) -> dict[str, Any]:
    return {
        "version": 1,
        "source": "glassbus",
        "event": notice.event,
        "notification": notice.notification,
        "bus": notice.bus,
        "at": _time(notice.at),
        "reason": notice.reason,
        "escalation": described(notice.escalation),
    }


def described(escalation: Escalated) -> dict[str, Any]:
    """An escalation as plain values, for people and programs. Times are ISO 8601 in UTC."""
    return {
        "fingerprint": escalation.fingerprint,
        "name": escalation.name,
        "severity": escalation.severity.value,
        "state": escalation.state.value,
        "summary": escalation.summary,
        "opened_at": _time(escalation.opened_at),
        "seen_at": _time(escalation.seen_at),
        "seen": escalation.seen,
        "acknowledged_by": escalation.acknowledged_by,
        "ends": escalation.ends.value,
    }


class Log(msgspec.Struct, frozen=True):
    """The channel that is always there: lines of the logger `glassbus.escalation`."""

    name: str = "log"
    at_least: ErrorSeverity = ErrorSeverity.LOW

    @property
    def batch(self) -> int:
        return 50

    @property
    def refresh_s(self) -> float:
        return 0.0

    def send(self, notices: Sequence[Notice], /) -> None:
        for notice in notices:
            escalation = notice.escalation
            urgent = notice.event in ("opened", "still_open")
            worst = escalation.severity is ErrorSeverity.CRITICAL
            logger.log(
                (logging.CRITICAL if worst else logging.ERROR) if urgent else logging.WARNING,
                "escalation %s: %s [%s] %s%s bus=%s fingerprint=%s",
                notice.event.replace("_", " "),
                escalation.name,
                escalation.severity.value,
                ascii(escalation.summary)[1:-1] if not escalation.summary.isprintable() else escalation.summary,
                f" ({notice.reason})" if notice.reason else "",
                notice.bus,
                escalation.fingerprint,
                extra={"glassbus": as_json(notice)},
            )


def _time(at: float) -> str:
    # Alertmanager reads RFC 3339; a clock far from any year that it can tell must not keep an alert from it.
    at = min(max(at, 0.0), 253_402_300_799.0)
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
