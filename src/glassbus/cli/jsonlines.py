"""JSON lines from a file or a pipe, read strictly: what is doubtful is named, not guessed at."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from glassbus.cli.common import CommandError

#: Longer lines are refused unread. A payload may take 1 MiB, and JSON text a little more than its payload.
LINE_BYTES_MAX = 4 * 1024 * 1024
_CHUNK = 64 * 1024
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1


class Line(NamedTuple):
    """One line that was not blank, of `size` bytes. `bad` says what is wrong with it; empty when `value` is good."""

    number: int
    value: Any
    bad: str = ""
    size: int = 0


def parse(text: bytes) -> Any:
    """The JSON value in `text`. Raises ValueError for anything that another reader might take otherwise."""
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_int=_whole,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1} is 0x{text[error.start]:02x}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} is there twice")
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _whole(digits: str) -> int:
    number = int(digits) if len(digits) <= 20 else _INT_MAX + 1
    if not _INT_MIN <= number <= _INT_MAX:
        raise ValueError(f"integer {digits[:24]}{'…' if len(digits) > 24 else ''} does not fit in 64 bits")
    return number


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"number {digits[:24]} is too large")
    return number


class Splitter:
    """Bytes as they come in, lines as they go out."""

    def __init__(self) -> None:
        self.number = 0
        self._rest = bytearray()
        self._skipping = False

    def feed(self, chunk: bytes) -> list[Line]:
        """The lines that end in `chunk`."""
        lines: list[Line] = []
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._add(piece, lines)
            self._end(lines)
        self._add(rest, lines)
        return lines

    def end(self) -> list[Line]:
        """The last line, when it has no line break."""
        lines: list[Line] = []
        if self._rest:
            self._end(lines)
        return lines

    def _add(self, piece: bytes, lines: list[Line]) -> None:
        if self._skipping:
            return
        self._rest += piece
        if len(self._rest) > LINE_BYTES_MAX:
            lines.append(Line(self.number + 1, None, f"longer than {LINE_BYTES_MAX:,} bytes"))
            self._skipping = True
            self._rest.clear()

    def _end(self, lines: list[Line]) -> None:
        self.number += 1
        text = bytes(self._rest).strip(b" \t\r")
        self._rest.clear()
        if self._skipping:
            self._skipping = False
            return
        if self.number == 1:
            text = text.removeprefix(b"\xef\xbb\xbf")
        if not text:
            return
        try:
            lines.append(Line(self.number, parse(text), size=len(text)))
        except ValueError as error:
            lines.append(Line(self.number, None, str(error)))


class LineReader:
    """Reads lines on a thread of its own, so that a pipe that says nothing blocks nobody.

    It reads the bare descriptor: a thread that hangs in Python's own stdin would be in the
    way when the interpreter ends. At most about 4 MiB are read ahead. Belongs to the running loop.
    """

    def __init__(self, source: str) -> None:
        """`source` is a path, or `-` for stdin. Raises CommandError when it cannot be opened."""
        self.name = "stdin" if source == "-" else source
        try:
            self._descriptor = 0 if source == "-" else os.open(source, os.O_RDONLY)
            os.fstat(self._descriptor)
        except OSError as error:
            raise CommandError(f"cannot read {self.name}: {error.strerror}") from None
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._chunks: queue.Queue[list[Line] | None] = queue.Queue(maxsize=64)
        self._lines: deque[Line] = deque()
        self._closed = False
        self._error = ""
        self.ended = False
        threading.Thread(target=self._read, name="glassbus-input", daemon=True).start()

    async def take(self, count_max: int, wait_s: float | None = None) -> list[Line]:
        """At most `count_max` lines, as many as there are now; waits for the first.

        Empty after `wait_s` seconds without one, or at the end (then `ended` is true). Raises CommandError
        when reading fails.
        """
        try:
            async with asyncio.timeout(wait_s):
                while not self._lines and not self.ended:
                    self._collect()
                    if self._lines or self.ended:
                        break
                    await self._arrived.wait()
        except TimeoutError:
            return []
        while len(self._lines) < count_max and not self.ended and not self._chunks.empty():
            self._collect()
        if not self._lines and self._error:
            raise CommandError(f"cannot read {self.name}: {self._error}")
        return [self._lines.popleft() for _ in range(min(count_max, len(self._lines)))]

    @property
    def exhausted(self) -> bool:
        """Whether the end was reached and everything before it was taken."""
        return self.ended and not self._lines

    def close(self) -> None:
        """Read no more."""
        self._closed = True
        while not self._chunks.empty():
            self._chunks.get_nowait()

    def _collect(self) -> None:
        self._arrived.clear()
        while not self._chunks.empty():
            chunk = self._chunks.get_nowait()
            if chunk is None:
                self.ended = True
                return
            self._lines.extend(chunk)
            if chunk:
                return

    def _read(self) -> None:
        splitter = Splitter()
        try:
            while not self._closed and (chunk := os.read(self._descriptor, _CHUNK)):
                self._put(splitter.feed(chunk))
        except OSError as error:
            self._error = error.strerror or type(error).__name__
        else:
            self._put(splitter.end())
        self._put(None)
        if self._descriptor:
            os.close(self._descriptor)

    def _put(self, chunk: list[Line] | None) -> None:
        while not self._closed:
            try:
                self._chunks.put(chunk, timeout=0.5)
            except queue.Full:
                continue
            self._tell(self._arrived.set)
            return

    def _tell(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop has closed: nobody waits for lines any more
            self._closed = True
