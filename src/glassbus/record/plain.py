"""Values as bounded, plain ones: what a record may keep and write.

A record outlives what it tells of. So it never holds a frame, an exception or a payload, only text and
numbers, however the report was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from hashlib import blake2b
from typing import Any

import msgspec

from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity, safe_text, shown, type_name

TEXT_CAP = 1024
STACK_CAP = 16 * 1024
_ITEMS_MAX = 32
_DEPTH_MAX = 3
_INTEGER_MAX = 2**63


def text(value: object, cap: int = TEXT_CAP) -> str:
    """`value` as text of at most `cap` characters that can be encoded. Never raises."""
    if isinstance(value, BaseException):
        return safe_text(value, cap)
    made = str.__str__(value) if isinstance(value, str) else shown(value, cap)
    if len(made) > cap:
        made = made[: cap - 1] + "…"
    return made if made.isascii() else made.encode("utf-8", "replace").decode()


def plain(value: object, depth: int = _DEPTH_MAX) -> Any:
    """`value` as JSON-ready values of bounded size; bytes are only counted. Never raises."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is float:
        return value if math.isfinite(value) else str(value)  # type: ignore[arg-type]
    if kind is int:
        return value if -_INTEGER_MAX <= value < _INTEGER_MAX else text(value)  # type: ignore[operator]
    if isinstance(value, str):
        return text(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if depth > 0 and kind is dict:
        pairs = list(value.items())[:_ITEMS_MAX]  # type: ignore[attr-defined]
        return {text(name, 100): plain(one, depth - 1) for name, one in pairs}
    if depth > 0 and kind in (list, tuple):
        return [plain(one, depth - 1) for one in value[:_ITEMS_MAX]]  # type: ignore[index]
    return text(value, 200)


def plain_report(report: ErrorReport) -> ErrorReport:
    """`report` itself where all of it is plain and bounded, else a copy that is. Never raises."""
    changed: dict[str, Any] = {}
    for name, cap in _TEXTS.items():
        value = getattr(report, name)
        kept = text(value, cap)
        if type(value) not in _STRINGS or kept != value:
            changed[name] = kept
    if type(report.timestamp) is not float or not math.isfinite(report.timestamp):
        changed["timestamp"] = _seconds(report.timestamp)
    for name in ("recovery_attempted", "recovery_successful", "escalated"):
        if type(getattr(report, name)) is not bool:
            changed[name] = getattr(report, name) is not None
    if type(report.retry_count) is not int or abs(report.retry_count) > 2**31:
        changed["retry_count"] = 0
    if not _is_plain(report.context):
        changed["context"] = _plain_context(report.context)
    if changed.get("fingerprint", report.fingerprint) == "":
        changed["fingerprint"] = fingerprint_of(report)
    return msgspec.structs.replace(report, **changed) if changed else report


def _is_plain(context: object) -> bool:
    if type(context) is not dict or len(context) > _ITEMS_MAX:
        return False
    for name, value in context.items():
        if type(name) is not str or type(value) not in _ATOMS or plain(value) != value:
            return False
        if len(name) > 100 or not (name.isascii() or text(name) == name):
            return False
    return True


def _plain_context(context: object) -> dict[str, Any]:
    try:
        pairs = dict(context) if isinstance(context, Mapping) else {"context": context}
        made: dict[str, Any] = plain(pairs)
    except BaseException as error:  # noqa: BLE001 - a mapping of a user's may raise anything
        return {"context": f"unreadable: {described(error)}"}
    return made


_TEXTS = {
    "error_id": 300,
    "category": 100,
    "severity": 100,
    "message": TEXT_CAP,
    "exception_type": 300,
    "stack_trace": STACK_CAP,
    "fingerprint": 100,
    "component": 100,
}
_ATOMS = frozenset({str, int, float, bool, type(None)})
_STRINGS = frozenset({str, ErrorCategory, ErrorSeverity})


def _seconds(value: object) -> float:
    """Wall seconds of a timestamp however it was given; 0 where it says nothing."""
    if isinstance(value, datetime):
        with suppress(OverflowError, ValueError, OSError):  # a year that no clock shows
            return value.timestamp()
    if type(value) is int and abs(value) < 2**53:
        return float(value)
    return 0.0


def fingerprint_of(report: ErrorReport) -> str:
    """Of a report that nobody gave one: by what kind of failure it is, for its text differs each time."""
    words = (text(report.category), text(report.exception_type), text(report.component))
    return blake2b("|".join(words).encode(), digest_size=8).hexdigest()


def described(value: object) -> str:
    """The type of `value`, for an error that says what was given instead."""
    return type_name(type(value))
