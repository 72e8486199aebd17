"""What the demo answers beside its metrics: the runbooks of its alerts, and Alertmanager that says whom it pages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from glassbus import shipped
from glassbus.cli.common import printable
from glassbus.cli.demo.sayings import Mood
from glassbus.errors import ShippedFileMissing

_TEXT_MAX = 300
#: Alerts told one by one of a notification; the rest are one line.
_TOLD_MAX = 20
#: Comes all the time, and is about nothing.
_DEAD_MAN = "deadman"

#: Takes a mood, a line of news, and what makes two of them the same. Any thread may call it.
Tell = Callable[[Mood, str, str], None]


class Desk:
    """For `glassbus.server.serve`. Any thread may call it."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def __call__(self, path: str, body: bytes | None) -> tuple[int, bytes] | None:
        if found := re.fullmatch(r"/runbooks/(\w{1,100})(?:\.md)?", path, re.ASCII):
            return _runbook(found[1]) if body is None else None
        if found := re.fullmatch(r"/notifications/([\w-]{1,100})", path, re.ASCII):
            return self._notified(found[1], body) if body is not None else None
        return None

    def _notified(self, receiver: str, body: bytes) -> tuple[int, bytes]:
        try:
            told = [_said(alert) for alert in json.loads(body)["alerts"]]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return 400, b"not a notification of Alertmanager\n"
        if receiver != _DEAD_MAN:
            for mood, name, text in told[:_TOLD_MAX]:
                self._tell(mood, f"Alertmanager tells {receiver}: {text}", f"{receiver} {name} {mood}")
            if more := told[_TOLD_MAX:]:
                worst: Mood = "bad" if any(mood == "bad" for mood, _, _ in more) else "good"
                self._tell(
                    worst, f"Alertmanager tells {receiver}: {len(more):,} more alerts", f"{receiver} more {worst}"
                )
        return 200, b"told\n"


def _said(alert: dict[str, Any]) -> tuple[Mood, str, str]:
    name = printable(str(alert["labels"]["alertname"]), _TEXT_MAX)
    summary = alert.get("annotations", {}).get("summary") or name
    over = alert["status"] == "resolved"
    return "good" if over else "bad", name, f"{'resolved: ' if over else ''}{printable(str(summary), _TEXT_MAX)}"


def _runbook(alert: str) -> tuple[int, bytes] | None:
    try:
        # Of those that ship, not by its path: a name from outside never reaches the file system.
        for page in shipped.files("alerts/runbooks", ".md"):
            if page.stem == alert:
                return 200, page.read_bytes()
    except ShippedFileMissing:
        return None
    return None
