"""Open escalations on disk: `STATE_DIR/escalations/BUS/N.json`, one numbered place for each process that runs the bus.

A process holds the lock of its place for as long as it lives. At its start it takes the first free place, and what
processes that are gone left in others. A command that acts on an escalation of a living process leaves an order
for it (`N.RANDOM.order`), which that process carries out within two seconds; one of a dead process it changes itself.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from glassbus.files import sync_folder
from glassbus.policy.escalation import Escalated, EscalationState, moved
from glassbus.recovery.places import Lock, is_live, lock_place, numbered, refuse_links, take_place
from glassbus.transport import sealed


class Order(msgspec.Struct, frozen=True):
    """What a person wants done. `by`: who acknowledged it, or why it is resolved."""

    do: Literal["acknowledge", "resolve"]
    fingerprint: str
    by: str


class _Head(msgspec.Struct, frozen=True):
    version: int
    bus: str


class Kept(msgspec.Struct, frozen=True):
    """What one place of `bus` holds. `live`: a process has it. `error`: why it cannot be read."""

    folder: Path
    number: int
    escalations: tuple[Escalated, ...]
    live: bool = False
    error: str = ""

    @property
    def bus(self) -> str:
        return self.folder.name


def _folder_of(state_dir: str | os.PathLike[str]) -> Path:
    return Path(state_dir) / "escalations"


class Place:
    """The numbered file of this process. Blocks for as long as a file takes; each call may raise OSError.

    Not thread-safe.
    """

    def __init__(self, state_dir: str | os.PathLike[str], bus: str) -> None:
        self._folder = _folder_of(state_dir) / bus
        self._bus = bus
        self._taken: set[str] = set()  # fingerprints that were taken over from other places
        self._lock: Lock | None = None
        self._number = 0
        self._unreadable: set[str] = set()  # orders that stay where they are
        #: Damaged files that were moved aside: their names, where they are now, and what was wrong.
        self.damaged: list[tuple[str, str, str]] = []

    def _path(self, number: int, suffix: str = "json") -> Path:
        return self._folder / f"{number}.{suffix}"

    def left_behind(self) -> list[Escalated]:
        """Take a place, and over what earlier runs left open. Makes no file when there is nothing to take over.

        What is taken over from other places stays there until `write` has written it here.
        """
        refuse_links(self._folder)
        if not self._folder.is_dir():
            return []
        self._take()
        sealed.sweep(self._folder)
        found = self._read(self._number)
        for number in self._others():
            lock = lock_place(self._folder, number)
            if lock is None:
                continue
            try:
                theirs = self._read(number)
            finally:
                lock.release()
            self._taken.update(e.fingerprint for e in theirs)
            found += theirs
        return found

    def _take(self, *, empty: bool = False) -> None:
        """Lock the first free place; `empty`: one that holds nothing of an earlier run."""
        if self._lock is None:
            self._number, self._lock = take_place(self._folder, lambda n: not (empty and self._path(n).exists()))

    def _others(self) -> list[int]:
        return [number for number in numbered(self._folder, "json") if number != self._number]

    def _read(self, number: int) -> list[Escalated]:
        path = self._path(number)
        try:
            return _decode(sealed.read(path))
        except FileNotFoundError:
            return []
        except ValueError as error:
            self.damaged.append((path.name, sealed.move_aside(path).name, str(error)))
            return []

    def write(self, escalations: Sequence[Escalated]) -> None:
        """Replace what is kept here. Durable on return; the files of dead processes, taken over before, are removed."""
        if not escalations and self._lock is None:
            return
        self._take(empty=True)
        path = self._path(self._number)
        if escalations:
            head = msgspec.json.encode(_Head(1, self._bus))
            sealed.write(path, [head, *map(msgspec.json.encode, escalations)])
        else:
            path.unlink(missing_ok=True)
            sync_folder(self._folder)
        here = {escalation.fingerprint for escalation in escalations}
        for number in self._others():
            self._clear(number, here)

    def _clear(self, number: int, here: set[str]) -> None:
        lock = lock_place(self._folder, number)
        if lock is None:
            return
        try:
            # Only what is kept here now, or was, is let go of there.
            if {e.fingerprint for e in self._read(number)} <= here | self._taken:
                self._path(number).unlink(missing_ok=True)
        finally:
            lock.release()

    def orders(self) -> list[Order]:
        """What people want done here, and done with: each order is read once."""
        if self._lock is None:
            return []
        found: list[Order] = []
        for path in sorted(self._folder.glob(f"{self._number}.*.order")):
            if path.name in self._unreadable:
                continue
            try:
                wanted = [msgspec.json.decode(line, type=Order) for line in sealed.read(path)]
                path.unlink()
                found += wanted
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                if not isinstance(error, FileNotFoundError):  # then its writer has taken it back
                    self._put_aside(path, error)
        return found

    def _put_aside(self, path: Path, error: Exception) -> None:
        """Told once, and nobody else's order waits for it."""
        try:
            moved_to = path.name if isinstance(error, OSError) else sealed.move_aside(path).name
        except OSError:
            moved_to = path.name
        if moved_to == path.name:
            self._unreadable.add(path.name)
        self.damaged.append((path.name, moved_to, str(error)))

    def elsewhere(self) -> dict[str, Escalated]:
        """What other processes have open, by fingerprint."""
        if self._lock is None:
            return {}
        return {e.fingerprint: e for number in self._others() for e in _look(self._folder, number).escalations}

    def release(self) -> None:
        """Let go of the place; what is kept there is for the next start. Idempotent."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _decode(lines: Sequence[bytes]) -> list[Escalated]:
    if not lines:
        raise ValueError("it is empty")
    try:
        head = msgspec.json.decode(lines[0], type=_Head)
        if head.version != 1:
            raise ValueError(f"it is of version {head.version}, which this version does not know")
        return [msgspec.json.decode(line, type=Escalated) for line in lines[1:]]
    except msgspec.MsgspecError as error:
        raise ValueError(f"a line of it is not an escalation: {error}") from None


def _look(folder: Path, number: int) -> Kept:
    """What a place holds, changing nothing."""
    try:
        return Kept(folder, number, tuple(_decode(sealed.read(folder / f"{number}.json"))))
    except FileNotFoundError:
        return Kept(folder, number, ())
    except (OSError, ValueError) as error:
        return Kept(folder, number, (), error=str(error))


# For commands


def look(state_dir: str | os.PathLike[str]) -> list[Kept]:
    """What every process has open, living or dead. Raises OSError."""
    folders = sorted(path for path in _folder_of(state_dir).glob("*") if path.is_dir())
    for folder in folders:
        refuse_links(folder)
    found = [_look(folder, number) for folder in folders for number in numbered(folder, "json")]
    return [msgspec.structs.replace(one, live=is_live(one.folder, one.number)) for one in found]


def carry_out(kept: Kept, order: Order) -> bool:
    """Have `order` carried out where `kept` was found; False when a living process will do it soon. Raises OSError."""
    place = kept.folder / f"{kept.number}.json"
    lock = lock_place(kept.folder, kept.number)
    if lock is None:
        sealed.write(kept.folder / f"{kept.number}.{secrets.token_hex(8)}.order", [msgspec.json.encode(order)])
        return False
    try:
        changed = [_after(e, order) for e in _look(kept.folder, kept.number).escalations]
        left = [msgspec.json.encode(e) for e in changed if e is not None]
        if left:
            sealed.write(place, [msgspec.json.encode(_Head(1, kept.bus)), *left])
        else:
            place.unlink(missing_ok=True)
        return True
    finally:
        lock.release()


def _after(escalation: Escalated, order: Order) -> Escalated | None:
    if escalation.fingerprint != order.fingerprint:
        return escalation
    if order.do == "resolve":
        return None
    if escalation.state is EscalationState.ACKNOWLEDGED:
        return escalation
    return msgspec.structs.replace(moved(escalation, EscalationState.ACKNOWLEDGED), acknowledged_by=order.by)
