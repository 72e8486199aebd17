"""Who has the store open, and how the others learn of its death.

An owner holds an exclusive `flock` on a file of its own for as long as it lives; the
operating system drops it the moment the process dies, however it dies. A process that
hangs keeps its lock, so there is a lease as well, on the clock that all processes of
one boot share.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import subprocess
import sys
import weakref
from pathlib import Path

from glassbus.errors import StoreReadOnly, TransportError
from glassbus.transport.sqlite.books import Owner

#: How long an owner that gives no sign keeps its deliveries, and how often it gives one, in seconds.
LEASE_S = 30.0
RENEW_S = 10.0

_SUFFIX = ".lock"


def boot_id() -> str:
    """Names this boot of the machine: monotonic times of another boot mean nothing."""
    with contextlib.suppress(OSError):  # not Linux
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # then a constant: leases still work
            found = subprocess.run(
                ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"],
                capture_output=True,
                text=True,
                timeout=5,
                check=True,
            )
            return found.stdout.strip()
    return "unknown"


class OwnerLock:
    """The lock of one owner, held from construction to `release`."""

    def __init__(self, folder: Path, boot: str) -> None:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.is_symlink():
                raise TransportError(f"{folder} is a symbolic link; remove it")
            while True:
                self.token = f"{boot[:8]}-{secrets.token_hex(8)}"
                self.path = folder / f"{self.token}{_SUFFIX}"
                flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
                self._descriptor = os.open(self.path, flags, 0o600)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
                if self.path.exists():
                    break
                # Somebody took the file for a dead process's between our two steps, and removed it.
                os.close(self._descriptor)
        except PermissionError as error:
            raise StoreReadOnly(f"cannot write in {folder}: {error.strerror}; make it writable") from error
        except OSError as error:
            raise TransportError(f"cannot lock a file in {folder}: {error.strerror}; use a local disk") from error
        _live.add(self)

    def release(self) -> None:
        """Remove the file and drop the lock. Idempotent."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            self.forsake()

    def forsake(self) -> None:
        """Close our descriptor. In a forked child this leaves the parent's lock alone."""
        descriptor, self._descriptor = self._descriptor, -1
        _live.discard(self)
        if descriptor >= 0:
            os.close(descriptor)


# A forked child shares the lock: it must let go, or it would keep a dead parent's lock alive.
_live: weakref.WeakSet[OwnerLock] = weakref.WeakSet()


def _after_fork() -> None:
    for lock in list(_live):
        lock.forsake()


os.register_at_fork(after_in_child=_after_fork)


def lock_is_free(folder: Path, token: str, *, remove: bool = False) -> bool:
    """Whether nobody holds the lock of owner `token`: that process is dead. `remove`: then delete its file."""
    path = folder / f"{token}{_SUFFIX}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False  # it cannot be told: the lease decides
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if remove:
            path.unlink(missing_ok=True)
    except OSError:  # held, or it cannot be told
        return False
    finally:
        os.close(descriptor)
    return True


def lost(owner: Owner, folder: Path, boot: str, monotonic: float) -> int:
    """0 while `owner` lives, else why it is lost: an index into `schema.REDELIVERED`."""
    if lock_is_free(folder, owner.token):
        return 1
    if owner.boot_id == boot and owner.lease_until < monotonic:
        return 2
    return 0


def sweep(folder: Path, tokens: set[str]) -> None:
    """Remove lock files of dead processes that never got as far as the store's table."""
    for path in folder.glob(f"*{_SUFFIX}"):
        token = path.name.removesuffix(_SUFFIX)
        if token not in tokens:
            lock_is_free(folder, token, remove=True)
