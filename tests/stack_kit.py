"""Asking the servers of a running stack, and waiting for what they will have."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
from collections.abc import Callable
from typing import Any, TypeVar

from local_stack import Stack

from tests.server_kit import fetch

#: Seconds within which anything that is waited for must have come: far more than it takes.
SOON_S = 60.0

Found = TypeVar("Found")


def until(look: Callable[[], Found], enough: Callable[[Found], bool] = bool, within_s: float = SOON_S) -> Found:
    """What `look` finds once that is enough, or what it finds when the time is over: assert on it."""
    deadline = time.monotonic() + within_s
    while True:
        found = look()
        if enough(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def spans_of(stack: Stack, trace_id: str) -> dict[str, dict[str, Any]]:
    """The spans of a trace that Jaeger has by now, by their id."""
    try:
        found = json.loads(fetch(f"{stack.url('jaeger:16686')}/api/v3/traces/{trace_id}"))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return {}
        raise
    scopes = [scope for one in found["result"].get("resourceSpans", []) for scope in one.get("scopeSpans", [])]
    return {span["spanId"]: span for scope in scopes for span in scope.get("spans", [])}


def attributes(of: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a span or a link as plain values."""
    return {one["key"]: next(iter(one["value"].values())) for one in of.get("attributes", [])}


def prometheus(stack: Stack, api: str, **parameters: str) -> Any:
    """The `data` of an answer of Prometheus' API, such as `query`."""
    asked = urllib.parse.urlencode(parameters)
    return json.loads(fetch(f"{stack.url('prometheus:9090')}/api/v1/{api}?{asked}"))["data"]


def series(stack: Stack, query: str) -> list[dict[str, Any]]:
    """The series of an instant query."""
    found: list[dict[str, Any]] = prometheus(stack, "query", query=query)["result"]
    return found


def value(stack: Stack, query: str) -> float:
    """The sum over all series of an instant query; 0 without any."""
    return sum(float(one["value"][1]) for one in series(stack, query))
