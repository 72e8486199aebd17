"""Numbered places in a folder, each with a lock that one living process holds.

The operating system drops the lock the moment a process dies, however it dies, so what a dead one left is known.
"""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from collections.abc import Callable
from pathlib import Path

from glassbus.files import private_folders

_PLACES_MAX = 1000


class Lock:
    """The lock of one place, held from construction to `release`. Raises BlockingIOError when another has it."""

    def __init__(self, path: Path) -> None:
        flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            self.release()
            raise
        _live.add(self)

    def release(self) -> None:
        """Idempotent. The file stays: removing it could let two in at once."""
        descriptor, self._descriptor = self._descriptor, -1
        _live.discard(self)
        if descriptor >= 0:
            os.close(descriptor)


# A forked child shares the lock: it must let go, or it would keep a dead parent's lock alive.
_live: weakref.WeakSet[Lock] = weakref.WeakSet()


def _after_fork() -> None:
    for lock in list(_live):
        lock.release()


os.register_at_fork(after_in_child=_after_fork)


def refuse_links(folder: Path) -> None:
    """Raises OSError when `folder` (`STATE_DIR/KIND/BUS`), or the one it is in, is a symbolic link."""
    for one in (folder.parent, folder):
        if one.is_symlink():
            raise OSError(errno.ELOOP, "it is a symbolic link", str(one))


def take_place(folder: Path, fits: Callable[[int], bool] = lambda _number: True) -> tuple[int, Lock]:
    """The first place in `folder` that is free and `fits`, with its lock. Makes the folder. Raises OSError."""
    refuse_links(folder)
    private_folders(folder)
    for number in range(_PLACES_MAX):
        if not fits(number):
            continue
        lock = lock_place(folder, number)
        if lock is not None:
            return number, lock
    raise OSError(f"all {_PLACES_MAX} places in {folder.name} are taken")


def lock_place(folder: Path, number: int) -> Lock | None:
    """The lock of one place, or None while a living process has it. Raises OSError."""
    try:
        return Lock(folder / f"{number}.lock")
    except BlockingIOError:
        return None


def is_live(folder: Path, number: int) -> bool:
    """Whether a living process has the place. Raises OSError."""
    lock = lock_place(folder, number)
    if lock is None:
        return True
    lock.release()
    return False


def numbered(folder: Path, suffix: str) -> list[int]:
    """The places that have a file `N.SUFFIX`."""
    names = [path.name.removesuffix(f".{suffix}") for path in folder.glob(f"*.{suffix}")]
    return sorted(int(name) for name in names if name.isdecimal() and name.isascii())
