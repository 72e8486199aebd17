"""Error reports as bytes, for stores that keep them with dead letters."""

from __future__ import annotations

from typing import Any

import msgspec

from glassbus.errors import ErrorReport, StoreCorrupt, safe_text, shown, type_name


def encode_report(report: ErrorReport) -> bytes:
    """As JSON. Never raises: what JSON cannot carry is kept as its `repr`, lone surrogates replaced."""
    try:
        return msgspec.json.encode(report, enc_hook=_shown)
    except (UnicodeEncodeError, TypeError, ValueError, OverflowError, RecursionError):
        plain: dict[str, Any] = {}
        for name in report.__struct_fields__:
            value = getattr(report, name)
            plain[name] = _clean(value) if isinstance(value, str) else value
        plain["context"] = {"unreadable": _clean(shown(report.context, 1024))}
        return msgspec.json.encode(plain)


def decode_report(stored: bytes | str) -> ErrorReport:
    """Raises StoreCorrupt."""
    try:
        return msgspec.json.decode(stored, type=ErrorReport)
    except msgspec.MsgspecError as error:
        raise StoreCorrupt(
            f"a stored error report is not readable ({type_name(type(error))}): {safe_text(error)}"
        ) from error


def _shown(value: Any) -> str:
    return shown(value, 1024)


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
