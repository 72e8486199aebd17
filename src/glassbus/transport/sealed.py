"""Small files that must not be half-read: lines, then a seal with their number and checksum.

A file appears whole or not at all (written beside, fsynced, renamed, its folder fsynced), readable by its owner only.
A damaged one is moved aside, and nothing of it is used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec

from glassbus.files import open_regular, private_folders, sync_folder

_SEAL_BYTES_MAX = 1024
#: Far more than a process holds in memory; what is larger was never written here.
_BYTES_MAX = 8 * 1024**3


class Damaged(Exception):
    """A sealed file is not what was written. `moved_to` is where it is now."""

    def __init__(self, name: str, why: str, moved_to: str) -> None:
        super().__init__(f"{name} is damaged ({why}); it was moved to {moved_to}")
        self.name = name
        self.why = why
        self.moved_to = moved_to


class _Seal(msgspec.Struct):
    deliveries: int  # the number of lines; the name is of the first use of this form
    checksum: str


def _checksum(body: bytes) -> str:
    return blake2b(body, digest_size=32).hexdigest()


def write(path: Path, lines: Sequence[bytes]) -> None:
    """Write `lines` (none with a line break in it) to `path`, durable on return. Blocks. Raises OSError."""
    body = b"".join(line + b"\n" for line in lines)
    seal = msgspec.json.encode(_Seal(len(lines), _checksum(body)))
    private_folders(path.parent)
    try:
        _replace(path, body + seal + b"\n")
    except FileNotFoundError:  # a `sweep` came before the lock was taken
        _replace(path, body + seal + b"\n")
    sync_folder(path.parent)


def _replace(path: Path, text: bytes) -> None:
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(beside, flags, 0o600), "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # tells `sweep` that its writer lives
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read(path: Path) -> list[bytes]:
    """The lines of `path`. Raises FileNotFoundError, OSError, and ValueError when it is damaged or no regular file."""
    text = _contents(path)
    body, seal_line = text[: text.rstrip(b"\n").rfind(b"\n") + 1], text.rstrip(b"\n").rpartition(b"\n")[2]
    try:
        seal = msgspec.json.decode(seal_line, type=_Seal)
    except msgspec.MsgspecError:
        raise ValueError("it has no seal: it was cut short, or is something else") from None
    lines = body.splitlines()
    if seal.deliveries != len(lines) or seal.checksum != _checksum(body):
        raise ValueError("its checksum does not match")
    return lines


def _contents(path: Path) -> bytes:
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EINVAL):  # a link; a socket; a pipe, device or folder
            raise ValueError("it is no regular file") from None
        raise
    found = os.fstat(descriptor)
    with os.fdopen(descriptor, "rb") as file:
        # The end first: what has no seal may be of any size, and is not read.
        file.seek(max(0, found.st_size - _SEAL_BYTES_MAX))
        if b'"checksum"' not in file.read(_SEAL_BYTES_MAX):
            raise ValueError("it has no seal: it was cut short, or is something else")
        if found.st_size > _BYTES_MAX:
            raise ValueError(f"it is larger than {_BYTES_MAX} bytes")
        file.seek(0)
        return file.read(found.st_size)


def sweep(folder: Path, prefix: str = "") -> None:
    """Remove what writers that were killed left beside the files of `folder` whose names begin so. Raises OSError."""
    for path in sorted(folder.glob("*.tmp")):
        if not path.name.startswith(prefix):
            continue
        # What was renamed meanwhile, is no file, or belongs to a writer that lives (BlockingIOError) stays.
        with contextlib.suppress(OSError), os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)


def move_aside(path: Path) -> Path:
    """Rename a damaged file so that nobody reads it again, and keep it for people. Raises OSError."""
    aside = path.with_suffix(".damaged")
    number = 1
    while aside.exists():
        aside = path.with_suffix(f".damaged.{number}")
        number += 1
    path.replace(aside)
    return aside
