"""A file of lines that several threads and processes append to, with rotation that loses none."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
import time
import weakref
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from glassbus.files import FSYNC_EVERY_S, Fsync, lock, open_regular, private_folder, unlock, write_all

#: Rotated files that are always kept, however large they are.
KEPT_MIN = 50
#: What rotated files may take on disk before the oldest beyond those go, in bytes.
_KEPT_BYTES = 512 * 1024 * 1024
#: How many files may be rotated before their sum is taken again.
_SWEEP_EVERY = 64


class SharedLines:
    """Appends whole lines to `path`. Thread-safe, and safe with other processes that do the same.

    A line is in the file when `append` returns, and in one piece: writers take turns by a lock file. The file is
    renamed to a name of its own before it would grow beyond `size_max` bytes. Rotated files go, oldest first, only
    when there are more than `KEPT_MIN` and they take more than `kept_bytes` together.
    """

    def __init__(self, path: Path, size_max: int, fsync: Fsync = "interval", kept_bytes: int = _KEPT_BYTES) -> None:
        self.path = path
        self.size_max = size_max
        self.kept_bytes = max(kept_bytes, KEPT_MIN * size_max)
        self.fsync: Fsync = fsync
        self.unsynced = False
        self._guard = threading.Lock()
        self._file = self._lock_file = -1
        self._size = -1
        self._synced_at = 0.0
        self._rotations = itertools.count()
        self._sweep_in = 0
        _live.add(self)

    def append(self, line: bytes) -> None:
        """Write `line` and a line break. Raises OSError when it is not in the file.

        When a write fails half-way, what it wrote is taken back.
        """
        with self._guard:
            self._take_lock()
            try:
                self._append(line + b"\n")
            finally:
                unlock(self._lock_file)

    def sync(self) -> None:
        """Bring what was written to the disk itself. Raises OSError."""
        with self._guard:
            self._sync()

    def close(self) -> None:
        """Release the files; the next `append` opens them again. Raises OSError when the last lines stay unsynced."""
        with self._guard:
            try:
                self._sync()
            finally:
                self._release()

    def _take_lock(self) -> None:
        """Lock out the others. The lock file is looked up by name: its folder may have been removed and made anew."""
        name = self.path.with_name(f".{self.path.stem}.lock")
        if self._lock_file >= 0 and not _is(self._lock_file, name):
            self._release()
        if self._lock_file < 0:
            private_folder(self.path.parent)
            self._lock_file = open_regular(name, os.O_RDWR | os.O_CREAT)
        lock(self._lock_file)

    def _append(self, data: bytes) -> None:
        size = self._opened()
        if size and size + len(data) > self.size_max:
            self._rotate()
            size = self._opened()
        if size != self._size and size and os.pread(self._file, 1, size - 1) != b"\n":
            data = b"\n" + data  # a process was killed in the middle of its line: ours begins on a new one
        try:
            write_all(self._file, data)
        except OSError:
            self._size = -1
            with suppress(OSError):  # then the next writer finds the torn line and begins a new one
                os.ftruncate(self._file, size)
            raise
        self._size = size + len(data)
        self.unsynced = True
        now = time.monotonic()
        if self.fsync == "always" or (self.fsync == "interval" and now - self._synced_at >= FSYNC_EVERY_S):
            self._sync()

    def _opened(self) -> int:
        """Have the file that bears the name open, and its size."""
        if self._file >= 0 and not _is(self._file, self.path):  # rotated by another process, or removed
            self._close_file()
        if self._file < 0:
            self._file = open_regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            self._size = -1
        return os.fstat(self._file).st_size

    def _sync(self) -> None:
        self._synced_at = time.monotonic()
        if self.unsynced and self._file >= 0 and self.fsync != "never":
            os.fsync(self._file)
        self.unsynced = False

    def _rotate(self) -> None:
        self._sync()
        while True:
            now = time.time()
            stamp = f"{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%S.%f}"
            aside = self.path.with_name(
                f"{self.path.stem}_{stamp}_{os.getpid()}_{next(self._rotations)}{self.path.suffix}"
            )
            if not os.path.lexists(aside):
                break
        self.path.rename(aside)
        self._close_file()
        if self._sweep_in == 0:
            self._sweep()
        self._sweep_in = (self._sweep_in or _SWEEP_EVERY) - 1

    def _sweep(self) -> None:
        sizes = []
        for path in rotated(self.path):
            with suppress(OSError):  # another process has removed it already
                sizes.append((path, path.stat().st_size))
        total = sum(size for _, size in sizes)
        for path, size in sizes[: max(0, len(sizes) - KEPT_MIN)]:
            if total <= self.kept_bytes:
                return
            with suppress(OSError):  # another process has removed it already, or it is tried again next time
                path.unlink()
            total -= size

    def _close_file(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def _release(self) -> None:
        self._close_file()
        lock_file, self._lock_file = self._lock_file, -1
        if lock_file >= 0:
            os.close(lock_file)

    def _after_fork(self) -> None:
        """In the child: a lock shared with the parent would lock neither out."""
        self._guard = threading.Lock()
        with suppress(OSError):  # whatever is wrong with the descriptors, they are not ours
            self._release()


def rotated(path: Path) -> list[Path]:
    """The rotated files of `path`, oldest first."""
    return sorted(path.parent.glob(f"{path.stem}_*{path.suffix}"))


def _is(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        named, opened = os.lstat(path), os.fstat(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise
    return stat.S_ISREG(named.st_mode) and (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


_live: weakref.WeakSet[SharedLines] = weakref.WeakSet()


def _forked() -> None:
    for lines in list(_live):
        lines._after_fork()


os.register_at_fork(after_in_child=_forked)
