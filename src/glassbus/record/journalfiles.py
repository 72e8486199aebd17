"""The journal's files: one family for each process, rotated by size, bounded over all of them."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from glassbus.files import (
    FSYNC_EVERY_S,
    Fsync,
    lock,
    open_regular,
    private_folder,
    sync_folder,
    write_all,
)
from glassbus.observer import TraceOf
from glassbus.record.entries import (
    FORMAT,
    FloodLine,
    LostLine,
    Record,
    StartLine,
    encode,
    fact_line,
    site_line,
)

FOLDER = "journal"
SUFFIX = ".jsonl"

#: Many small files, of processes that ended soon, are no reason to drop large ones.
_SMALL_FILES = 20
_SITES_MAX = 4096
_CHUNK_BYTES = 256 * 1024

Item = Record | FloodLine | LostLine


class JournalFiles:
    """Appends lines to a family of files in `state_dir`/journal. One thread writes.

    A family belongs to one process: its name holds when it began, the boot, the process id and a random part. Each
    file begins with a line that says whose it is, and holds each stack once. Together the files of all processes
    take at most `files` x `file_bytes`; beyond that the oldest that no process writes is removed. Files are made for
    their owner only, and never through a symbolic link.
    """

    def __init__(self, state_dir: Path, bus: str, file_bytes: int, files: int, fsync: Fsync) -> None:
        self.state_dir = state_dir
        self.folder = state_dir / FOLDER
        self.fsync: Fsync = fsync
        self.unsynced = False
        #: Names the trace of what is written, and the level that the first line of each file tells.
        self.trace_of: TraceOf | None = None
        self.level = ""
        #: Entries that could not be made into a line; a line in their place says so.
        self.unwritable = 0
        self._bus = bus
        self._file_bytes = file_bytes
        self._bytes_max = file_bytes * files
        self._count_max = files * _SMALL_FILES
        self._begin()

    def _begin(self) -> None:
        began = f"{datetime.fromtimestamp(time.time(), UTC):%Y%m%dT%H%M%S}"
        self.process = f"{began}-{_boot()[:8]}-{os.getpid()}-{secrets.token_hex(3)}"
        self._number = 0
        self._file = -1
        self._path = self.folder
        self._size = 0
        self._synced_at = 0.0
        self._sites: set[str] = set()

    def write(self, items: deque[Item]) -> None:
        """Write `items` and take out what is written. Raises OSError; then those left are not."""
        self._check()
        lines: list[bytes] = []
        taken = size = 0
        for item in list(items):
            made = self._lines(item)
            if self._file < 0 or (self._size > 0 and self._size + size + len(made) > self._file_bytes):
                self._write(lines, items, taken)
                lines, taken, size = [], 0, 0
                self._rotate()
                made = self._lines(item)  # a new file has no stacks yet
            lines.append(made)
            taken += 1
            size += len(made)
            if size >= _CHUNK_BYTES:
                self._write(lines, items, taken)
                lines, taken, size = [], 0, 0
        self._write(lines, items, taken)
        if self.fsync == "always" or time.monotonic() - self._synced_at >= FSYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        """Bring what was written to the disk itself, unless `fsync` is "never". Raises OSError."""
        if self.unsynced and self._file >= 0 and self.fsync != "never":
            os.fsync(self._file)
        self.unsynced = False
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Idempotent; the next `write` begins a new file. Raises OSError when the last lines cannot be synced."""
        try:
            self.sync()
        finally:
            self.forsake()

    def forsake(self) -> None:
        """Close the file without a sync."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def after_fork(self) -> None:
        """In the child: the file is the parent's; ours will be another family."""
        with suppress(OSError):  # whatever is wrong with the descriptor, it is not ours
            self.forsake()
        self.unsynced = False
        self._begin()

    def _check(self) -> None:
        """Raises OSError when our file is no longer where it was: what we write there nobody will find."""
        if self._file < 0:
            return
        with suppress(FileNotFoundError, NotADirectoryError):  # told below
            named, opened = os.lstat(self._path), os.fstat(self._file)
            if (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino):
                return
        self.forsake()
        raise OSError(errno.ENOENT, "the journal's file was removed", self._path.name)

    def _lines(self, item: Item) -> bytes:
        if isinstance(item, FloodLine | LostLine):
            return encode(item) + b"\n"
        try:
            made = encode(fact_line(item, self.trace_of)) + b"\n"
        except Exception:  # noqa: BLE001 - one entry that cannot be told must not stop those after it
            self.unwritable += 1
            return encode(LostLine(item[1], 1)) + b"\n"
        report = item[6]
        if report is not None and report.stack_trace and report.fingerprint not in self._sites:
            if len(self._sites) >= _SITES_MAX:
                self._sites.clear()
            self._sites.add(report.fingerprint)
            made = encode(site_line(report)) + b"\n" + made
        return made

    def _write(self, lines: list[bytes], items: deque[Item], taken: int) -> None:
        if not lines:
            return
        data = b"".join(lines)
        try:
            write_all(self._file, data)
        except OSError:
            with suppress(OSError):  # then a torn line stays, which readers pass over
                os.ftruncate(self._file, self._size)
            self._sites.clear()  # their lines may be among those taken back
            raise
        self._size += len(data)
        self.unsynced = True
        for _ in range(taken):
            items.popleft()

    def _rotate(self) -> None:
        self.close()
        private_folder(self.state_dir)
        private_folder(self.folder)
        if self.folder.is_symlink():
            raise OSError(errno.ELOOP, "it is a symbolic link", str(self.folder))
        self._number += 1
        path = self.folder / f"{self.process}.{self._number:06}{SUFFIX}"
        descriptor = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL)
        try:
            lock(descriptor)  # it lives as long as we do, and tells others that the file is in use
            line = StartLine(FORMAT, self.process, os.getpid(), self._bus, time.time(), self.level)
            start = encode(line) + b"\n"
            write_all(descriptor, start)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        self._file, self._path, self._size = descriptor, path, len(start)
        self._sites.clear()
        self._prune()
        if self.fsync != "never":
            sync_folder(self.folder)

    def _prune(self) -> None:
        """Remove the oldest files until all fit. Never ours, nor one that another process writes."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):  # another process has removed it already
                status = path.lstat()
                found.append((status.st_mtime_ns, path.name, path, status.st_size))
        found.sort()
        # Room for the file just begun is taken now, so that the bound holds while it grows.
        total, count = sum(one[3] for one in found) - self._size + self._file_bytes, len(found)
        for _, _, path, size in found:
            if total <= self._bytes_max and count <= self._count_max:
                return
            if path != self._path and _unused(path):
                with suppress(OSError):  # gone already, or tried again at the next file
                    path.unlink()
                    total, count = total - size, count - 1


def journal_files(state_dir: Path) -> list[Path]:
    """The files of all processes, in the order in which each process wrote them."""
    return sorted((state_dir / FOLDER).glob(f"*{SUFFIX}"))


def _unused(path: Path) -> bool:
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except OSError:  # it cannot be told: leave it
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a living process writes it
        return False
    finally:
        os.close(descriptor)
    return True


def _boot() -> str:
    """Names this boot of the machine, where it can be told."""
    with suppress(OSError):  # not Linux
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "boot"
