"""Payloads to bytes and back, by explicit codecs. Never pickle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from glassbus.errors import InvalidPayload, PayloadUndecodable

#: Nesting that a payload may have; deeper ones are refused before they can exhaust a stack.
DEPTH_MAX = 64


class Codec(Protocol):
    """Turns payloads into bytes and back. Pure: no I/O, no code from the payload is run."""

    name: str
    content_type: str

    def encode(self, payload: Any, /) -> bytes:
        """Bytes of `payload`. Raises InvalidPayload with the reason."""

    def decoder(self, kind: Any, /) -> Callable[[bytes], Any]:
        """A function from bytes to `kind`. It raises PayloadUndecodable."""


def _find_nonfinite(value: Any, path: str = "payload") -> str | None:
    """Path of the first NaN or infinity in JSON-like `value`."""
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    if isinstance(value, dict):
        for key, item in value.items():
            found = _find_nonfinite(item, f"{path}[{key!r}]")
            if found:
                return found
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            found = _find_nonfinite(item, f"{path}[{index}]")
            if found:
                return found
    return None


def _depth(body: bytes) -> int:
    """Deepest nesting of brackets in JSON text, an upper bound (brackets in strings count too)."""
    depth = deepest = 0
    for byte in body:
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def _value_depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max((_value_depth(item) for item in value.values()), default=0)
    if isinstance(value, list | tuple | set | frozenset):
        return 1 + max((_value_depth(item) for item in value), default=0)
    return 0


class JsonCodec:
    """JSON, the default: readable in every tool, and strict (no NaN, 64-bit integers)."""

    name = "json"
    content_type = "application/json"

    def __init__(self) -> None:
        self._encode = msgspec.json.Encoder().encode

    def encode(self, payload: Any, /) -> bytes:
        try:
            body = self._encode(payload)
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
            raise InvalidPayload(f"payload cannot be encoded as JSON: {error}") from None
        except RecursionError:
            raise InvalidPayload(f"payload is nested deeper than {DEPTH_MAX} levels, or contains itself") from None
        # A non-finite float is written as null, so only a body with a null can hide one.
        if b"null" in body:
            self._refuse_nonfinite(payload)
        # Fewer than 2 x DEPTH_MAX brackets cannot nest deeper; count() is far cheaper than a walk.
        if body.count(b"[") + body.count(b"{") > DEPTH_MAX and _depth(body) > DEPTH_MAX:
            depth = _value_depth(msgspec.json.decode(body))
            if depth > DEPTH_MAX:
                raise InvalidPayload(f"payload is nested {depth} levels deep; at most {DEPTH_MAX} are allowed")
        return body

    def _refuse_nonfinite(self, payload: Any) -> None:
        found = _find_nonfinite(msgspec.to_builtins(payload))
        if found:
            raise InvalidPayload(f"{found} is NaN or infinite, which JSON cannot carry; send null or a string instead")

    def decoder(self, kind: Any, /) -> Callable[[bytes], Any]:
        return _guarded(_json_decode(kind), self.name, kind)


def _json_decode(kind: Any) -> Callable[[bytes], Any]:
    return msgspec.json.Decoder(_native(kind)).decode if _native(kind) is kind else _pydantic(kind)


def _native(kind: Any) -> Any:
    """`kind` where msgspec can decode it itself; None for a pydantic model."""
    return None if hasattr(kind, "model_validate_json") else kind


def _pydantic(kind: Any) -> Callable[[bytes], Any]:
    validate: Callable[[bytes], Any] = kind.model_validate_json
    return validate


def _guarded(decode: Callable[[bytes], Any], codec: str, kind: Any) -> Callable[[bytes], Any]:
    def guarded(body: bytes) -> Any:
        try:
            return decode(body)
        except (ValueError, TypeError, RecursionError, msgspec.MsgspecError) as error:
            wanted = getattr(kind, "__name__", None) or str(kind)
            raise PayloadUndecodable(f"payload is not {codec} of {wanted}: {error}") from error

    return guarded


class RawCodec:
    """Bytes as they are."""

    name = "raw"
    content_type = "application/octet-stream"

    def encode(self, payload: Any, /) -> bytes:
        if not isinstance(payload, bytes | bytearray | memoryview):
            raise InvalidPayload(f"the raw codec takes bytes, not {type(payload).__name__}")
        return bytes(payload)

    def decoder(self, kind: Any, /) -> Callable[[bytes], Any]:
        return _as_is


def _as_is(body: bytes) -> Any:
    return body


JSON = JsonCodec()
RAW = RawCodec()

#: Every codec a stored message may name. A fixed list: nothing is ever imported by name.
CODECS: dict[str, Codec] = {JSON.name: JSON, RAW.name: RAW}
