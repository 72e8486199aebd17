"""Payloads to bytes and back, by explicit codecs. Never pickle."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec

from glassbus.errors import InvalidPayload, PayloadUndecodable, safe_text

#: Nesting that a payload may have; deeper ones are refused before they can exhaust a stack.
DEPTH_MAX = 256


class Codec(Protocol):
    """Turns payloads into bytes and back. Pure: no I/O, no code from the payload is run."""

    name: str
    content_type: str

    def encode(self, payload: Any, /) -> bytes:
        """Bytes of `payload`. Raises InvalidPayload with the reason."""

    def decoder(self, kind: Any, /) -> Callable[[bytes], Any]:
        """A function from bytes to `kind`, which raises PayloadUndecodable.

        Raises TypeError when nothing could be decoded to `kind`.
        """


class JsonCodec:
    """JSON, the default: readable in every tool, and strict (no NaN, no infinity, bounded nesting).

    Takes what msgspec takes (dicts, lists, dataclasses, `msgspec.Struct`, dates, …) and pydantic models.
    """

    name = "json"
    content_type = "application/json"

    def __init__(self) -> None:
        self._encode = msgspec.json.Encoder(enc_hook=_plain).encode

    def encode(self, payload: Any, /) -> bytes:
        try:
            body = self._encode(payload)
        except RecursionError:
            raise InvalidPayload(f"payload is nested deeper than {DEPTH_MAX} levels, or contains itself") from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a model's own code runs here, so any type can come
            raise InvalidPayload(f"payload cannot be encoded as JSON: {safe_text(error)}") from None
        # Fewer brackets than this cannot nest too deep, and count() is far cheaper than a look.
        if len(body) > 2 * DEPTH_MAX and body.count(b"[") + body.count(b"{") > DEPTH_MAX and _too_deep(body):
            raise InvalidPayload(f"payload is nested deeper than {DEPTH_MAX} levels")
        # A non-finite float is written as null, so only a body with a null can hide one.
        if body.rfind(b"null") >= 0:  # half the time of `in`
            found = _find_nonfinite(msgspec.to_builtins(payload, enc_hook=_plain))
            if found:
                raise InvalidPayload(
                    f"{found} is NaN or infinite, which JSON cannot carry; send null or a string instead"
                )
        return body

    def decoder(self, kind: Any, /) -> Callable[[bytes], Any]:
        # A pydantic model decodes itself; everything else is msgspec's.
        decode = getattr(kind, "model_validate_json", None) or msgspec.json.Decoder(kind).decode

        def decode_or_refuse(body: bytes) -> Any:
            try:
                return decode(body)
            except Exception as error:  # a model's own validators run here, so any type can come
                raise PayloadUndecodable(f"payload is not JSON of {_shown(kind)}: {safe_text(error)}") from error

        return decode_or_refuse


def _plain(value: Any) -> Any:
    """A pydantic model as plain values."""
    dump = getattr(type(value), "model_dump", None)
    if dump is None:
        raise NotImplementedError(f"objects of type {type(value).__name__} are not supported")
    return dump(value)


_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_BRACES_TO_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _too_deep(body: bytes) -> bool:
    """Whether JSON text nests deeper than DEPTH_MAX. Strings, which may hold brackets, do not count."""
    brackets = _STRING.sub(b"", body).translate(_BRACES_TO_BRACKETS, _NOT_BRACKETS)
    for _ in range(DEPTH_MAX):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")  # takes away the innermost level
    return bool(brackets)


def _find_nonfinite(value: Any, path: str = "payload") -> str | None:
    """Path of the first NaN or infinity in JSON-like `value`."""
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple | set | frozenset):
        items = enumerate(value)
    for key, item in items:
        found = _find_nonfinite(item, f"{path}[{key!r}]")
        if found:
            return found
    return None


def _shown(kind: Any) -> str:
    return getattr(kind, "__name__", None) or str(kind)


class RawCodec:
    """Bytes as they are."""

    name = "raw"
    content_type = "application/octet-stream"

    def encode(self, payload: Any, /) -> bytes:
        if not isinstance(payload, bytes | bytearray | memoryview):
            raise InvalidPayload(f"the raw codec takes bytes, not {type(payload).__name__}")
        return bytes(payload)

    def decoder(self, kind: Any, /) -> Callable[[bytes], Any]:
        if kind in (Any, object, bytes):
            return bytes

        def refuse(body: bytes) -> Any:
            raise PayloadUndecodable(f"payload is raw bytes, and the handler asks for {_shown(kind)}")

        return refuse


JSON = JsonCodec()
RAW = RawCodec()

#: Every codec a stored message may name. A fixed list: nothing is ever imported by name.
CODECS: dict[str, Codec] = {JSON.name: JSON, RAW.name: RAW}
