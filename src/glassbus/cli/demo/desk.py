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
#: Comes all the time, and is about nothing.
_DEAD_MAN = "deadman"

#: Takes a mood, a line of news, and what makes two of them the same. Any thread may call it.
Tell = Callable[[Mood, str, str], None]


class Desk:
    """For `glassbus.server.serve`. Any thread may call it."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def __call__(self, path: str, body: bytes | None) -> tuple[int, bytes] | None:
        if found := re.fullmatch(r"/runbooks/(\w+)(?:\.md)?", path, re.ASCII):
            return _runbook(found[1]) if body is None else None
        if found := re.fullmatch(r"/notifications/([\w-]+)", path, re.ASCII):
            return self._notified(found[1], body) if body is not None else None
        return None

    def _notified(self, receiver: str, body: bytes) -> tuple[int, bytes]:
        try:
            told = [_said(alert) for alert in json.loads(body)["alerts"]]
        except (ValueError, LookupError, TypeError, AttributeError):
            return 400, b"not a notification of Alertmanager\n"
        if receiver != _DEAD_MAN:
            for mood, name, text in told:
                self._tell(mood, f"Alertmanager tells {receiver}: {text}", f"{receiver} {name} {mood}")
        return 200, b"told\n"


def _said(alert: dict[str, Any]) -> tuple[Mood, str, str]:
    name = str(alert["labels"]["alertname"])
    summary = alert.get("annotations", {}).get("summary") or name
    over = alert["status"] == "resolved"
    return "good" if over else "bad", name, f"{'resolved: ' if over else ''}{printable(str(summary), _TEXT_MAX)}"


def _runbook(alert: str) -> tuple[int, bytes] | None:
    try:
        return 200, shipped.find(f"alerts/runbooks/{alert}.md").read_bytes()
    except ShippedFileMissing:
        return None
