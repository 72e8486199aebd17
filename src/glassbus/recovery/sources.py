"""Where a configuration comes from, and where the last good one is kept. Everything read is judged plain data."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import os
import secrets
import tomllib
from collections.abc import Awaitable, Callable, Mapping
from contextvars import copy_context
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from glassbus.clock import Clock
from glassbus.errors import ConfigurationError, safe_text, shown, type_name
from glassbus.files import open_regular, private_folder, replace_file
from glassbus.handler import Threads

#: A mapping of tunables, or a way to one: a callable (plain or async), or the path of a TOML or JSON file.
Source = Callable[[], Mapping[str, Any] | Awaitable[Mapping[str, Any]]] | str | os.PathLike[str]

#: How long a source may take, in seconds.
SOURCE_TIMEOUT_S = 5.0
_BYTES_MAX = 1024 * 1024
_ITEMS_MAX = 100_000
_DEPTH_MAX = 8
_PARSERS: dict[str, Callable[[bytes], Any]] = {
    ".toml": lambda body: tomllib.loads(body.decode()),
    ".json": msgspec.json.decode,
}


class ConfigurationSource:
    """Reads a source on a thread of its own, which a source that hangs keeps, and nobody else waits for."""

    def __init__(self, source: Source, clock: Clock) -> None:
        """Raises ConfigurationError when `source` can be none."""
        self._clock = clock
        self._threads: Threads | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._read: Callable[[], Any]
        if isinstance(source, str | os.PathLike):
            path = Path(source)
            parse = _PARSERS.get(path.suffix.lower())
            if parse is None:
                raise ConfigurationError(f"the configuration file {path.name!r} must end in .toml or .json")
            self.described = path.name
            self._identity = str(path.absolute())
            self._read = lambda: parse(_contents(path))
        elif callable(source):
            name = getattr(source, "__qualname__", None)
            self.described = name if type(name) is str else type_name(type(source))
            file = getattr(getattr(source, "__code__", None), "co_filename", "")
            self._identity = f"{file}:{getattr(source, '__module__', '')}.{self.described}"
            self._read = source
        else:
            raise ConfigurationError(f"configuration must be a callable or the path of a file, not {shown(source)}")

    def digest(self, bus: str) -> str:
        """What tells this source, read by a bus of this name, from others that keep their files in the same place."""
        return hashlib.sha256(f"{bus}\n{self._identity}".encode("utf-8", "replace")).hexdigest()[:12]

    async def load(self) -> dict[str, Any]:
        """What the source says, as plain data. Raises ConfigurationError, whatever the source does."""
        try:
            async with asyncio.timeout(SOURCE_TIMEOUT_S):
                answer, is_awaitable = await self._guarded(self._ask)
                if is_awaitable:
                    answer = await _to_end(answer)
                plain: dict[str, Any] = await self._guarded(lambda: _as_plain(answer))
                return plain
        except TimeoutError:
            raise ConfigurationError(
                f"the configuration source {self.described!r} did not answer within {SOURCE_TIMEOUT_S:g} s"
            ) from None
        except _SourceFailed as failed:
            raise ConfigurationError(f"the configuration source {self.described!r} failed: {failed}") from None

    def _ask(self) -> tuple[Any, bool]:
        answer = self._read()
        return answer, inspect.isawaitable(answer)

    async def on_thread(self, function: Callable[[], Any]) -> Any:
        """Run something blocking of ours beside the loop; what it raises comes through."""
        loop = asyncio.get_running_loop()
        if self._threads is None or self._loop is not loop:  # a start that failed can be made again, on another loop
            self._threads, self._loop = Threads(loop, self._clock, "configuration"), loop
        return await self._threads.run(copy_context(), function)

    async def _guarded(self, function: Callable[[], Any]) -> Any:
        def guarded() -> tuple[Any, str]:
            try:
                return function(), ""
            except BaseException as error:  # noqa: BLE001 - it is a user's; told as text, it can do nothing more
                return None, _told(error)

        answer, failure = await self.on_thread(guarded)
        if failure:
            raise _SourceFailed(failure)
        return answer

    def close(self) -> None:
        if self._threads is not None:
            self._threads.close()


class _SourceFailed(Exception):
    """What a source raised, as text."""


async def _to_end(answer: Awaitable[Any]) -> Any:
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        return await answer
    except BaseException as error:
        if task.cancelling() > before:
            raise  # we ourselves are to end
        raise _SourceFailed(_told(error)) from None


def _told(error: BaseException) -> str:
    return (
        safe_text(error, 300)
        if type(error) is ConfigurationError
        else f"{type_name(type(error))}: {safe_text(error, 300)}"
    )


def _contents(path: Path) -> bytes:
    with path.open("rb") as file:
        return _at_most(file)


def _at_most(file: BinaryIO) -> bytes:
    body = file.read(_BYTES_MAX + 1)
    if len(body) > _BYTES_MAX:
        raise ConfigurationError(f"it is larger than {_BYTES_MAX} bytes")
    return body


def _as_plain(value: Any) -> dict[str, Any]:
    """A copy in plain types alone, so that nothing of a user's code is in it. Raises ConfigurationError."""
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"it must be a mapping, not a {type_name(type(value))}")
    room = [_ITEMS_MAX]
    plain = _copy(value, "", 0, room)
    assert isinstance(plain, dict)
    return plain


def _copy(value: Any, path: str, depth: int, room: list[int]) -> Any:
    room[0] -= 1
    if depth > _DEPTH_MAX or room[0] < 0:
        raise ConfigurationError("it is nested too deep, or too large")
    if isinstance(value, Mapping):
        copied: dict[str, Any] = {}
        for key, inner in value.items():
            if not issubclass(type(key), str):
                raise ConfigurationError(f"a key of {path or 'it'} is a {type_name(type(key))}, not a str")
            name = str.__str__(key)
            copied[name] = _copy(inner, f"{path}.{name}" if path else name, depth + 1, room)
        return copied
    # The methods of the plain types: a subclass may have any of its own.
    if issubclass(type(value), bool):
        return value
    if issubclass(type(value), int):
        return int.__int__(value)
    if issubclass(type(value), float):
        return float.__float__(value)
    if issubclass(type(value), str):
        return str.__str__(value)
    raise ConfigurationError(f"{path} is a {type_name(type(value))}; a setting is a number, a text, true or false")


class LastKnownGood:
    """The configuration that was applied last, in a file of `state_dir`, with a checksum. Blocking: for threads."""

    def __init__(self, state_dir: str | None, digest: str) -> None:
        self._path = None if state_dir is None else Path(state_dir) / f"configuration-{digest}.json"

    def save(self, values: dict[str, Any], now: float) -> None:
        """Replace the file, whole or not at all. Does nothing without a folder. Raises OSError."""
        if self._path is None:
            return
        body = msgspec.json.encode(values, order="deterministic")
        whole = msgspec.json.encode(
            {
                "format": 1,
                "saved_at": now,
                "sha256": hashlib.sha256(body).hexdigest(),
                "configuration": msgspec.Raw(body),
            }
        )
        private_folder(self._path.parent)
        replace_file(self._path, whole, f"{os.getpid()}.{secrets.token_hex(4)}")

    def load(self) -> dict[str, Any] | None:
        """What was saved; None when there is none. Raises ConfigurationError when it cannot be read, or is damaged."""
        if self._path is None:
            return None
        try:
            with os.fdopen(open_regular(self._path, os.O_RDONLY), "rb") as file:
                whole = msgspec.json.decode(_at_most(file), type=_Saved)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigurationError(f"the last known good configuration cannot be read: {safe_text(error)}") from None
        if hashlib.sha256(bytes(whole.configuration)).hexdigest() != whole.sha256:
            raise ConfigurationError("the last known good configuration is damaged: its checksum does not fit")
        return _as_plain(msgspec.json.decode(whole.configuration))


class _Saved(msgspec.Struct, frozen=True):
    format: int
    saved_at: float
    sha256: str
    configuration: msgspec.Raw
