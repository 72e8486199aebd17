"""Messages of errors that a program handed to the bus, with what nothing recovered: kept until they are at rest.

While the bus runs they go straight to its dead letters. Before its start, and while its store takes nothing, they
are held in memory; at the end of the program, or in an emergency, they are written to the state directory,
where the next start finds them.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import secrets
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from glassbus.bus import MessageBus
from glassbus.codec import JSON, RAW
from glassbus.errors import ErrorReport, GlassbusError, InvalidPayload, safe_text, shown
from glassbus.files import private_folder, replace_file
from glassbus.message import Envelope, Message
from glassbus.recovery.resting import NAME, resting_topic, with_report

logger = logging.getLogger("glassbus")

#: So much is held at most: what more comes is not taken, and the caller is told so.
HELD_MAX = 10_000
HELD_BYTES_MAX = 16 * 1024 * 1024
_TEXT_CAP = 1024 * 1024
#: About what an envelope takes besides its body and headers.
_EACH_BYTES = 500


class Reported:
    """What is held. Any thread may use it; `store` belongs to the bus's loop. `refused` counts what was not taken."""

    def __init__(self, state_dir: str | None) -> None:
        self.refused = 0
        self._folder = Path(state_dir).absolute() if state_dir is not None else None
        self._held: deque[Envelope] = deque()
        self._bytes = 0
        self._restored: list[Path] = []
        self._storing = False
        self.renew_lock()

    def renew_lock(self) -> None:
        self._lock = threading.RLock()  # a signal handler may come in on the thread that has it

    @property
    def waiting(self) -> int:
        return len(self._held)

    def hold(self, envelope: Envelope) -> bool:
        """Keep it in memory. False when there is no room."""
        size = _size(envelope)
        with self._lock:
            if len(self._held) >= HELD_MAX or self._bytes + size > HELD_BYTES_MAX:
                self.refused += 1
                return False
            self._add(envelope, size)
        return True

    def refuse(self) -> None:
        with self._lock:
            self.refused += 1

    def _add(self, envelope: Envelope, size: int) -> None:
        self._held.append(envelope)
        self._bytes += size
        _holding.add(self)

    async def store(self, core: MessageBus) -> None:
        """Have `core` put what is held to rest. What cannot be now stays; that is told by who refused it."""
        if self._storing:
            return
        self._storing = True
        try:
            while self._held and core.running:
                envelope = self._held[0]
                await core.resting.keep(envelope)
                with self._lock:
                    if self._held and self._held[0] is envelope:
                        self._removed(self._held.popleft())
        except GlassbusError:
            return  # each is stated as a fact; it is tried again in a while
        finally:
            self._storing = False
        self._forget_files()

    def _removed(self, envelope: Envelope) -> None:
        self._bytes -= _size(envelope)
        if not self._held:
            _holding.discard(self)

    def _forget_files(self) -> None:
        while self._restored and not self._held:
            try:
                self._restored.pop().unlink(missing_ok=True)
            except OSError as error:
                # Stored twice by the next start, which recognises most of it; somebody should see to the folder.
                logger.error("a file of kept messages cannot be removed: %s", safe_text(error, 300))

    def begin(self, core: MessageBus) -> asyncio.Task[None]:
        """`store`, beside what runs. On the loop."""
        return asyncio.get_running_loop().create_task(self.store(core), name="glassbus-reported")

    def restore(self) -> None:
        """Take over what earlier runs have written down. Blocks. Never raises."""
        if self._folder is None or not self._folder.is_dir():
            return
        for path in sorted(self._folder.glob(f"{NAME}-*.json")):
            if path in self._restored:
                continue
            try:
                kept = msgspec.json.decode(path.read_bytes(), type=list[Envelope])
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
                self._quarantine(path, error)
                continue
            with self._lock:
                for envelope in kept:  # whatever their number: they were accepted before
                    self._add(envelope, _size(envelope))
                self._restored.append(path)

    def _quarantine(self, path: Path, error: Exception) -> None:
        logger.error("kept messages in %s cannot be read; it is moved aside: %s", path, safe_text(error, 300))
        try:
            path.replace(path.with_suffix(".damaged"))
        except OSError as raised:
            logger.error("%s cannot be moved: %s", path, safe_text(raised, 300))

    def save(self) -> bool:
        """Write down what is held, for the next start. Whether nothing is left in memory alone. Never raises."""
        with self._lock:
            if not self._held:
                return True
            if self._folder is None:
                logger.error(
                    "%d messages of errors are in memory alone and end with this program: its bus has no state_dir",
                    len(self._held),
                )
                return False
            try:
                private_folder(self._folder)
                path = self._folder / f"{NAME}-{time.time_ns()}-{secrets.token_hex(4)}.json"
                replace_file(path, msgspec.json.encode(list(self._held)), "new")
            except OSError as error:
                logger.error("%d messages of errors cannot be written: %s", len(self._held), safe_text(error, 300))
                return False
            self._held.clear()
            self._bytes = 0
            _holding.discard(self)
            self._forget_files()  # what they held is in the new one
            return True

    def after_fork(self) -> None:
        """In the child: what is held is the parent's to keep."""
        self.renew_lock()
        self._held.clear()
        self._bytes = 0
        self._restored = []
        self._storing = False


def sealed(message: Any, report: ErrorReport) -> Envelope:
    """`message`, whatever it is, ready to be kept with `report`: as JSON or bytes, else as the text that shows it."""
    topic: Any = report.context.get("topic")
    payload, headers, priority, key = message, {}, 1, None
    if type(message) is Message:
        topic, payload, headers = message.topic, message.payload, message.headers
        priority, key = int(message.priority), message.key
    if type(payload) is bytes:
        codec, body = RAW.name, payload
    else:
        codec, body = JSON.name, _encoded(payload)
    return Envelope(
        f"{NAME}-{secrets.token_hex(12)}",
        resting_topic(topic),
        body,
        codec,
        with_report(headers, report),
        priority,
        key,
        time.time(),
        remember=True,
    )


def _encoded(payload: Any) -> bytes:
    try:
        return JSON.encode(payload)
    except InvalidPayload:
        text = payload if type(payload) is str else shown(payload, _TEXT_CAP)
        return JSON.encode(text.encode("utf-8", "replace").decode())


def _size(envelope: Envelope) -> int:
    return len(envelope.body) + sum(len(value) for value in envelope.headers.values()) + _EACH_BYTES


#: Those that hold something: kept although nobody else may, and saved when the program ends.
_holding: set[Reported] = set()


def _at_exit() -> None:
    for one in list(_holding):
        one.save()


def _after_fork() -> None:
    for one in list(_holding):
        one.after_fork()
    _holding.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)
