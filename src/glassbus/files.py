"""Files that only their owner reads, written so that a crash leaves them whole."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

#: When lines reach the disk itself: with each write, about once a second, or when the operating system likes.
Fsync = Literal["always", "interval", "never"]
FSYNC_CHOICES: tuple[Fsync, ...] = ("always", "interval", "never")
FSYNC_EVERY_S = 1.0

#: How long to wait for a lock that another process holds, in seconds.
_LOCK_WAIT_S = 2.0


def open_regular(path: Path, flags: int) -> int:
    """Open (or make) a regular file, never through a symbolic link, never blocking on a pipe. Raises OSError."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


def private_folder(path: Path) -> None:
    """Make `path`, for its owner only, where it is missing; what it is in may be read by others. Raises OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def private_folders(path: Path) -> None:
    """Make `path`, and what it is in, each for its owner only, where they are missing. Raises OSError."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:  # mkdir(parents=True) would make those readable by others
        private_folders(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`. Raises OSError, also when the disk takes no more of it."""
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view)
        if written == 0:
            raise OSError(errno.EIO, "the file takes no more")
        view = view[written:]


def sync_folder(path: Path) -> None:
    """Make the names in `path` durable. Raises OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def replace_file(path: Path, data: bytes, mark: str) -> None:
    """Put `data` in the place of `path`, whole or not at all, and durable on return. Raises OSError.

    `mark` tells apart the temporary files of several writers.
    """
    beside = path.with_name(f".{path.name}.{mark}.tmp")
    descriptor = open_regular(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        beside.replace(path)
    except OSError:
        with suppress(OSError):  # the first failure is the one to tell
            beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def locked(path: Path, wait_s: float = _LOCK_WAIT_S) -> Iterator[None]:
    """Hold the lock file `path` against other threads and processes.

    Raises OSError (ETIMEDOUT) when another holds it for longer than `wait_s`: a stopped process must not stop us.
    """
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        lock(descriptor, wait_s)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int, wait_s: float = _LOCK_WAIT_S) -> None:
    """Take the lock of an open file. Raises OSError (ETIMEDOUT) after `wait_s`."""
    deadline: float | None = None
    pause_s = 0.0002
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            now = time.monotonic()
            deadline = now + wait_s if deadline is None else deadline
            if now >= deadline:
                raise OSError(errno.ETIMEDOUT, f"another process held the lock for {wait_s:g} s") from None
            time.sleep(pause_s)
            pause_s = min(0.01, pause_s * 1.5)
        else:
            return


def unlock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)
