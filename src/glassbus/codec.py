"""Payloads to bytes and back, by explicit codecs. Never pickle."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec

from glassbus.errors import ConfigurationError, InvalidPayload, PayloadUndecodable, safe_text, shown, type_name

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

    def bare_decoder(self, kind: Any, /) -> Callable[[bytes], Any] | None:
        """As `decoder`, but it raises what it likes; None where code of a user's may run in it."""
        return None if hasattr(kind, "model_validate_json") else msgspec.json.Decoder(kind).decode

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


class MsgpackCodec:
    """MessagePack: carries what JSON cannot (bytes inside, NaN, keys that are no strings), as compactly.

    Takes what `JsonCodec` takes, except whole numbers beyond 64 bits.
    """

    name = "msgpack"
    content_type = "application/msgpack"

    def __init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode

    def encode(self, payload: Any, /) -> bytes:
        try:
            body = self._encode(payload)
        except RecursionError:
            raise InvalidPayload(f"payload is nested deeper than {DEPTH_MAX} levels, or contains itself") from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a model's own code runs here, so any type can come
            raise InvalidPayload(f"payload cannot be encoded as MessagePack: {safe_text(error)}") from None
        # A level takes one of these bytes at least; few of them cannot nest too deep.
        if len(body) > DEPTH_MAX and len(body) - len(body.translate(None, _CONTAINERS)) > DEPTH_MAX:
            plain = msgspec.to_builtins(payload, enc_hook=_plain, builtin_types=(bytes, bytearray), str_keys=False)
            if _nests_deeper(plain, DEPTH_MAX):
                raise InvalidPayload(f"payload is nested deeper than {DEPTH_MAX} levels")
        return body

    def decoder(self, kind: Any, /) -> Callable[[bytes], Any]:
        validate = getattr(kind, "model_validate", None)  # a pydantic model makes itself of plain values
        decode = msgspec.msgpack.Decoder(Any if validate is not None else kind).decode

        def decode_or_refuse(body: bytes) -> Any:
            try:
                return decode(body) if validate is None else validate(decode(body))
            except Exception as error:  # a model's own validators run here, so any type can come
                raise PayloadUndecodable(f"payload is not MessagePack of {_shown(kind)}: {safe_text(error)}") from error

        return decode_or_refuse


#: First bytes of arrays and maps in MessagePack.
_CONTAINERS = bytes([*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF])


def _nests_deeper(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            inner
            for one in layer
            if isinstance(one, dict | list | tuple | set | frozenset)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not layer:
            return False
    return True


JSON = JsonCodec()
RAW = RawCodec()
MSGPACK = MsgpackCodec()

#: The codecs that every bus can read. A fixed list: nothing is ever imported by name.
CODECS: dict[str, Codec] = {codec.name: codec for codec in (JSON, MSGPACK, RAW)}

_NAME = re.compile(r"[a-z0-9][a-z0-9_.+\-]{0,31}")


class _Guarded:
    """A user's codec, which may raise or answer anything."""

    def __init__(self, codec: Codec) -> None:
        self.name = codec.name
        self.content_type = codec.content_type
        self._codec = codec

    def encode(self, payload: Any, /) -> bytes:
        try:
            body = self._codec.encode(payload)
        except (InvalidPayload, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - it is a user's
            raise InvalidPayload(f"codec {self.name!r} failed: {type_name(type(error))}: {safe_text(error)}") from None
        if type(body) is not bytes:
            raise InvalidPayload(f"codec {self.name!r} made a {type_name(type(body))} of the payload, not bytes")
        return body

    def decoder(self, kind: Any, /) -> Callable[[bytes], Any]:
        decode = self._codec.decoder(kind)

        def decode_or_refuse(body: bytes) -> Any:
            try:
                return decode(body)
            except (PayloadUndecodable, KeyboardInterrupt):
                raise
            except BaseException as error:  # it is a user's
                raise PayloadUndecodable(f"codec {self.name!r} failed: {safe_text(error)}") from error

        return decode_or_refuse


def check_codecs(codecs: object) -> tuple[Codec, ...]:
    """An explicit list of codecs, in the order to try them. Raises ConfigurationError naming what is wrong."""
    if isinstance(codecs, str) or not isinstance(codecs, Iterable):
        raise ConfigurationError(f"codecs must be a list of codecs, such as [JSON, MSGPACK], not {shown(codecs)}")
    checked: dict[str, Codec] = {}
    for codec in codecs:
        name = getattr(codec, "name", None)
        if not (
            type(name) is str
            and _NAME.fullmatch(name)
            and type(getattr(codec, "content_type", None)) is str
            and callable(getattr(codec, "encode", None))
            and callable(getattr(codec, "decoder", None))
        ):
            raise ConfigurationError(
                f"{shown(codec)} is no codec: it needs a short lower-case name, a content_type, encode and decoder"
            )
        if name in checked:
            raise ConfigurationError(f"codec {name!r} stands in the list twice")
        if name in CODECS and CODECS[name] is not codec:
            raise ConfigurationError(f"the name {name!r} belongs to a codec of Glassbus; give yours another")
        checked[name] = codec if name in CODECS else _Guarded(codec)
    if not checked:
        raise ConfigurationError("codecs is empty; name at least one, such as JSON")
    return tuple(checked.values())


def encode_with_any(codecs: Iterable[Codec], payload: Any, refused: InvalidPayload) -> tuple[Codec, bytes]:
    """The first of `codecs` that can carry `payload`, and its bytes. Raises InvalidPayload naming what each said."""
    said = [safe_text(refused)]
    for codec in codecs:
        try:
            return codec, codec.encode(payload)
        except InvalidPayload as error:
            said.append(f"{codec.name}: {safe_text(error)}")
    raise refused if len(said) == 1 else InvalidPayload("; ".join(said))
