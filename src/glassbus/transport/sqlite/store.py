"""The database file: how it is opened, checked and closed, and what SQLite's errors mean.

Nothing else in Glassbus opens the file: closing any other descriptor of it in this
process would drop SQLite's locks.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Sequence
from enum import Enum
from hashlib import blake2b
from pathlib import Path
from typing import Any

import apsw

from glassbus.errors import (
    ConfigurationError,
    GlassbusError,
    StorageFull,
    StoreCorrupt,
    StoreLocked,
    StoreReadOnly,
    TransportError,
)
from glassbus.files import private_folders, sync_folder
from glassbus.transport.sqlite import schema
from glassbus.transport.sqlite.sql import select

#: Below this size a store is checked in full whenever it is opened; above, `audit` does it.
CHECK_BYTES_MAX = 256 * 1024 * 1024
#: How often the free space of the disk is asked for, in seconds.
_SPACE_EVERY_S = 0.25

# One creation at a time in this process: see the module's docstring.
_creating = threading.Lock()


class Trouble(Enum):
    """What an error of SQLite asks for."""

    BUSY = "busy"  # another connection holds the lock: try again
    FULL = "full"  # no space: nothing was stored
    IO = "io"  # the disk failed: reopen and check before going on
    READ_ONLY = "read_only"
    CORRUPT = "corrupt"  # cannot go on
    OTHER = "other"


def trouble(error: apsw.Error) -> Trouble:
    match error:
        case apsw.BusyError() | apsw.LockedError():
            return Trouble.BUSY
        case apsw.FullError():
            return Trouble.FULL
        case apsw.CorruptError() | apsw.NotADBError():
            return Trouble.CORRUPT
        case apsw.ReadOnlyError() | apsw.PermissionsError() | apsw.AuthError():
            return Trouble.READ_ONLY
        case apsw.IOError() | apsw.CantOpenError() | apsw.ProtocolError():
            return Trouble.IO
    return Trouble.OTHER


def translate(error: apsw.Error, path: str) -> GlassbusError:
    """The same failure in Glassbus's words: which file, and what to do."""
    detail = str(error)
    match trouble(error):
        case Trouble.BUSY:
            return StoreLocked(
                f"{path} is locked by another program ({detail}); close whatever holds a transaction open on it"
            )
        case Trouble.FULL:
            return StorageFull(f"no space left for {path} ({detail}); free some disk space")
        case Trouble.CORRUPT:
            return StoreCorrupt(
                f"{path} is damaged or not a database ({detail}); it was not changed. "
                "Restore it from a backup, or move it away to start with an empty store"
            )
        case Trouble.READ_ONLY:
            return StoreReadOnly(f"{path} cannot be written ({detail}); make the file and its folder writable")
    return TransportError(f"the store {path} failed: {type(error).__name__}: {detail}")


def digest(topic: str, codec: str, body: bytes) -> bytes:
    """What tells two messages of one id apart."""
    return blake2b(f"{topic}\0{codec}\0".encode() + body, digest_size=16).digest()


def _digest(*values: Any) -> bytes:
    return digest(*values)


_Inode = tuple[int, int]


class Store:
    """One connection to the file. Belongs to the thread that uses it; construction does no I/O.

    `durability` "disk" syncs each commit; "process" leaves syncing to the operating
    system, so that power loss can take the latest commits.
    """

    def __init__(self, path: str | os.PathLike[str], durability: str = "disk", busy_timeout_s: float = 5.0) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.durability = durability
        self.busy_timeout_s = busy_timeout_s
        self.migrations: Sequence[str] = schema.MIGRATIONS
        self._connection: apsw.Connection | None = None
        self._inode: _Inode | None = None
        self._log_inode: _Inode | None = None
        self._space_at = float("-inf")
        self._space = 0

    @property
    def connection(self) -> apsw.Connection:
        assert self._connection is not None, "the store is not open"
        return self._connection

    def open(self) -> None:
        """Connect, creating the file (0600) and its folders (0700) or migrating as needed.

        Raises ConfigurationError for a path that cannot be a store: a folder, or a symbolic
        link (whoever could plant one would choose the file). Otherwise StoreCorrupt,
        StoreTooNew, StoreReadOnly, StoreLocked or TransportError; the file is then unchanged.
        """
        try:
            with _creating:
                self._place()
                self._connection = self._connect()
            self._prepare(self._connection)
        except apsw.Error as error:
            self.close()
            raise self._cannot_open(error) from error
        except BaseException:
            self.close()
            raise
        self._inode = _inode(self.path)
        self._log_inode = None

    def _place(self) -> None:
        """Make sure there is a regular file to open."""
        try:
            if not self.path.parent.exists():
                private_folders(self.path.parent)
            # The folder's own links are followed once, here; SQLite is then told to follow none.
            self.path = self.path.parent.resolve(strict=True) / self.path.name
            try:
                mode = self.path.lstat().st_mode
            except FileNotFoundError:
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
                with contextlib.suppress(FileExistsError):  # another process was faster
                    os.close(os.open(self.path, flags, 0o600))
                    sync_folder(self.path.parent)
                return
        except (PermissionError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
            raise StoreReadOnly(f"cannot create the store {self.name}: {error.strerror}") from error
        except OSError as error:
            raise TransportError(f"cannot create the store {self.name}: {error.strerror}") from error
        if stat.S_ISDIR(mode):
            raise ConfigurationError(f"{self.name} is a folder; name the database file in it")
        if stat.S_ISLNK(mode):
            raise ConfigurationError(f"{self.name} is a symbolic link; name the file it points to")
        if not stat.S_ISREG(mode):
            raise ConfigurationError(f"{self.name} is not a regular file")

    def _connect(self) -> apsw.Connection:
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_NOFOLLOW
        connection = apsw.Connection(str(self.path), flags=flags)
        connection.set_busy_timeout(int(self.busy_timeout_s * 1000))
        return connection

    def _prepare(self, connection: apsw.Connection) -> None:
        for pragma, value in (("trusted_schema", False), ("cell_size_check", True), ("mmap_size", 0)):
            connection.pragma(pragma, value)
        schema.identify(connection, self.name, len(self.migrations))
        if self.path.stat().st_size <= CHECK_BYTES_MAX:
            self.check()
        mode = connection.pragma("journal_mode", "wal")
        if mode != "wal":
            raise TransportError(
                f"{self.name} cannot use a write-ahead log (journal mode is {mode!r}); use a local disk"
            )
        connection.pragma("synchronous", "full" if self.durability == "disk" else "normal")
        connection.pragma("journal_size_limit", 64 * 1024 * 1024)
        schema.migrate(connection, self.name, self.migrations)
        # Waiting for a lock then polls every millisecond, where the busy handler sleeps up to 100.
        connection.setlk_timeout(int(self.busy_timeout_s * 1000), 0)
        connection.create_scalar_function("glassbus_digest", _digest, 3, deterministic=True)

    def _cannot_open(self, error: apsw.Error) -> GlassbusError:
        if trouble(error) is Trouble.IO and not os.access(self.path.parent, os.W_OK):
            return StoreReadOnly(f"the folder of {self.name} cannot be written; make it writable")
        if isinstance(error, apsw.CantOpenError) and not os.access(self.path, os.R_OK | os.W_OK):
            return StoreReadOnly(f"{self.name} cannot be opened for writing; make the file and its folder writable")
        return translate(error, self.name)

    def check(self) -> None:
        """Read the whole file for damage. Raises StoreCorrupt."""
        found = [row[0] for row in select(self.connection, "PRAGMA quick_check(3)")]
        if found != ["ok"]:
            raise StoreCorrupt(
                f"{self.name} is damaged ({'; '.join(map(str, found))}). "
                "Restore it from a backup, or move it away to start with an empty store"
            )

    def begin(self) -> None:
        self.connection.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self.connection.execute("COMMIT")

    def rollback(self) -> None:
        """End a transaction that failed. SQLite has often done so itself."""
        if self._connection is not None and self._connection.in_transaction:
            with contextlib.suppress(apsw.Error):  # the caller reopens the file, which undoes it as well
                self._connection.execute("ROLLBACK")

    def checkpoint(self) -> None:
        """Move what the log holds into the database and sync it. Raises BusyError while readers hold it back."""
        self.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)

    def try_checkpoint(self) -> None:
        """Move what can be moved without waiting, so that the log need not grow."""
        if self._connection is not None:
            with contextlib.suppress(apsw.Error):  # it is only to help: the next commit tells whether it did
                self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def probe(self) -> None:
        """One small commit, to know that commits work."""
        self.begin()
        self.connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'probe'")
        self.commit()

    def moved(self) -> bool:
        """Whether the file or its write-ahead log was deleted or replaced under us: what we write would be lost.

        A program in this process that opens the file with another copy of SQLite (Python's own
        sqlite3) does that without meaning to: its close() drops our locks and removes the log.
        """
        log = _inode(self.path.with_name(f"{self.path.name}-wal"))
        if self._log_inode is None:
            self._log_inode = log  # the log comes with the first commit
        return _inode(self.path) != self._inode or log != self._log_inode

    def free_space(self, now: float, ask: Callable[[str], int] | None = None) -> int:
        """Bytes free on the disk, asked at most four times a second."""
        if now - self._space_at >= _SPACE_EVERY_S or now < self._space_at:
            self._space_at = now
            self._space = (ask or disk_free)(str(self.path.parent))
        return self._space

    def close(self) -> None:
        """Let go of the file. Idempotent; never raises."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(apsw.Error):  # nothing to do about it: every commit is already on disk
                connection.close(force=True)


def _inode(path: Path) -> _Inode | None:
    """What file `path` is now; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def disk_free(folder: str) -> int:
    """Bytes that this process may still write in `folder`'s file system."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
