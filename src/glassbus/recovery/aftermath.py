"""What the start after an emergency stop makes of what that wrote down: verify, restore, compare with the store."""

from __future__ import annotations

from pathlib import Path

from glassbus.clock import Clock
from glassbus.config import Settings
from glassbus.errors import GlassbusError, TransportError, safe_text
from glassbus.facts import Delivery, EmergencyReconciled, ManifestQuarantined, transport_failed
from glassbus.observer import Hub
from glassbus.recovery import manifest as manifests
from glassbus.recovery.manifest import Manifest
from glassbus.recovery.places import Lock, lock_place, numbered, refuse_links
from glassbus.transport import DeadLetterRecord, Finds, Spills, Transport, sealed
from glassbus.transport import spill as spills

MANIFEST, SPILL = "manifest.jsonl", "spill.jsonl"

_Held = list[Delivery | DeadLetterRecord]


def name_of(bus: str, number: int) -> str:
    """A manifest's name within the state directory."""
    return f"emergency/{bus}/{number}.{MANIFEST}"


class Aftermath:
    """What earlier processes of a bus left in `folder`, if anything. Nothing here fails: damage is stated and put
    aside, and what cannot be read now stays for the next start.

    `adopted`: the place whose spill file the transport restores and keeps, with its lock; (None, None) for none.
    """

    def __init__(self, settings: Settings, folder: Path | None, hub: Hub, clock: Clock) -> None:
        self.adopted: tuple[int, Lock] | tuple[None, None] = (None, None)
        self._settings = settings
        self._folder = folder
        self._hub = hub
        self._clock = clock
        self._own: _Held = []
        self._locks: dict[int, Lock] = {}
        self._found: list[tuple[int, Manifest]] = []
        self._spilled: dict[int, list[tuple[str, str]]] = {}
        self._left: set[int] = set()  # places whose spill file the transport has not restored

    def look(self, transport: Transport) -> None:
        """Before `transport` is opened: verify all of it, and have the transport restore what was spilled."""
        try:
            if isinstance(transport, Spills) and transport.spill_path is not None:
                self._own = self._read_spill(transport.spill_path)
            if self._folder is not None and self._folder.is_dir():
                refuse_links(self._folder)
                self._look_at(self._folder, transport)
        except OSError as error:
            self._failed("look", error)

    def _failed(self, what: str, error: BaseException) -> None:
        self._hub.state(transport_failed(self._clock.wall(), f"emergency {what}", error))

    def _look_at(self, folder: Path, transport: Transport) -> None:
        held: dict[int, _Held] = {}
        sealed.sweep(folder)
        for number in sorted({*numbered(folder, MANIFEST), *numbered(folder, SPILL)}):
            lock = lock_place(folder, number)
            if lock is None:
                continue  # its process lives, and is about to end
            self._locks[number] = lock
            manifest = self._read_manifest(folder / f"{number}.{MANIFEST}")
            if manifest is not None:
                self._found.append((number, manifest))
            found = self._read_spill(folder / f"{number}.{SPILL}")
            # What it spilled is beside it, or where the transport itself spills.
            self._spilled[number] = [(one.envelope.id, one.subscription) for one in found or self._own]
            if found:
                held[number] = found
                self._left.add(number)
        if not held or not isinstance(transport, Spills):
            return
        if transport.spill_path is None:
            self._adopt(folder, transport, held)
        else:
            self._hand_over(folder, transport.spill_path, held)
        self._left.clear()

    def _adopt(self, folder: Path, transport: Spills, held: dict[int, _Held]) -> None:
        """Have the transport restore what memory buses of this name left, all of it from one file."""
        mine = min(held)
        path = folder / f"{mine}.{SPILL}"
        if len(held) > 1:
            spills.spill(path, [one for found in held.values() for one in found])
            for number in held.keys() - {mine}:
                (folder / f"{number}.{SPILL}").unlink()
        transport.keep_in(path)
        # Held for as long as this process lives: nobody else may restore it too.
        self.adopted = (mine, self._locks.pop(mine))

    def _hand_over(self, folder: Path, path: Path, held: dict[int, _Held]) -> None:
        """Put what memory buses of this name left into the spill file that the transport restores anyway."""
        # Of a start that ended between the two steps, each is there twice.
        every = {(one.envelope.id, one.subscription): one for found in held.values() for one in found}
        known = {(one.envelope.id, one.subscription) for one in self._own}
        spills.spill(path, [*self._own, *(one for key, one in every.items() if key not in known)])
        for number in held:
            (folder / f"{number}.{SPILL}").unlink()

    def _read_manifest(self, path: Path) -> Manifest | None:
        try:
            return manifests.read(path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            self._quarantine(path, error)
            return None

    def _read_spill(self, path: Path) -> _Held:
        try:
            return spills.read(path)
        except FileNotFoundError:
            return []
        except ValueError as error:
            self._quarantine(path, error)
            return []

    def _quarantine(self, path: Path, error: ValueError) -> None:
        moved_to = sealed.move_aside(path).name
        why = safe_text(error, 300)
        self._hub.state(ManifestQuarantined(at=self._clock.wall(), manifest=path.name, moved_to=moved_to, error=why))

    async def reconcile(self, transport: Transport) -> None:
        """`transport` is open, and nothing runs yet: state what is missing."""
        for number in sorted(self._left):
            error = TransportError(
                f"{len(self._spilled[number])} messages in {number}.{SPILL} were not restored and stay there: "
                f"a memory:// bus named {self._settings.name!r} with this state directory restores them"
            )
            self._failed("restore", error)
        for number, manifest in self._found:
            try:
                await self._reconcile(number, manifest, transport)
            except (GlassbusError, OSError) as error:
                self._failed("reconcile", error)
        self._found.clear()
        self.release()

    async def _reconcile(self, number: int, manifest: Manifest, transport: Transport) -> None:
        assert self._folder is not None
        if number in self._left:
            restored, missing = 0, len(manifest.saved)
        elif manifest.spilled:
            found = self._spilled[number]
            restored, missing = len(found), manifests.of_spilled(manifest, found)
        else:
            wanted = {saved.key for saved in manifest.saved}
            # One that cannot look messages up has only its ledger to tell.
            kept = await transport.find(sorted(wanted)) if isinstance(transport, Finds) else wanted
            restored, missing = len(kept), manifests.missing(manifest, kept, transport.ledger())
        path = self._folder / f"{number}.{MANIFEST}"
        if number in self._left:
            pass  # for the start that can restore it
        elif missing:
            _keep_for_people(path)
        else:
            path.unlink()
        self._hub.state(
            EmergencyReconciled(
                at=self._clock.wall(),
                manifest=name_of(self._settings.name, number),
                saved=len(manifest.saved),
                restored=restored,
                missing=missing,
            )
        )

    def release(self) -> None:
        """Let go of every place but the adopted one. Idempotent."""
        while self._locks:
            self._locks.popitem()[1].release()


def _keep_for_people(path: Path) -> None:
    number = 1
    while (kept := path.with_suffix(f".missing.{number}")).exists():
        number += 1
    path.replace(kept)
