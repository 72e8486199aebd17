"""The stream that a bus is kept in: made as it must be, or found to be as it must be."""

from __future__ import annotations

from typing import Any

import msgspec

from glassbus.errors import StoreCorrupt, StoreTooNew
from glassbus.transport.nats.connection import Link, NotFound, StoreRefused
from glassbus.transport.nats.records import VERSION

_MARK = "glassbus.version"
#: What must be so in a stream of ours, whoever made it.
_NEEDED: dict[str, Any] = {
    "retention": "limits",
    "storage": "file",
    "discard": "new",
    "max_age": 0,
    "max_msgs_per_subject": -1,
    "allow_direct": True,
    "sealed": False,
    "deny_delete": False,
    "deny_purge": False,
}


class Place(msgspec.Struct, frozen=True):
    """Where a bus is kept. `max_bytes` 0: as much as the account may."""

    name: str
    replicas: int = 1
    max_bytes: int = 0

    @property
    def stream(self) -> str:
        return f"glassbus-{self.name}"

    @property
    def prefix(self) -> str:
        return f"glassbus.{self.name}"

    @property
    def entries(self) -> str:
        """Matches all that is followed: the subjects below."""
        return f"{self.prefix}.e.*"

    @property
    def plain(self) -> str:
        """Entries that are needed only until a snapshot."""
        return f"{self.prefix}.e.o"

    @property
    def bearing(self) -> str:
        """Entries that hold messages or reports."""
        return f"{self.prefix}.e.m"

    @property
    def head(self) -> str:
        """Its last message says where the newest snapshot is."""
        return f"{self.prefix}.head"

    def snapshot(self, seq: int) -> str:
        return f"{self.prefix}.s.{seq}"

    def body(self, token: str) -> str:
        return f"{self.prefix}.b.{token}"


class Found(msgspec.Struct, frozen=True):
    """A stream as it is. `created` names this very stream; `max_bytes` 0: no limit of its own."""

    created: str
    max_bytes: int
    used_bytes: int


async def ensure(link: Link, place: Place, *, make: bool) -> Found:
    """The stream of `place`, made if there is none. Raises StoreCorrupt, StoreTooNew, and what `Link.api` does.

    `make` false: it must be there.
    """
    try:
        info = await link.api(f"STREAM.INFO.{place.stream}")
    except NotFound:
        if not make:
            raise StoreCorrupt(
                f"the stream {place.stream} was deleted on {link.address} while this bus ran; nothing more is stored"
            ) from None
        info = await _create(link, place)
    check(info, place, str(link.address))
    limit = int(info["config"].get("max_bytes", -1))
    return Found(str(info["created"]), max(0, limit), int(info["state"]["bytes"]))


async def _create(link: Link, place: Place) -> dict[str, Any]:
    config = {
        **_NEEDED,
        "name": place.stream,
        "subjects": [f"{place.prefix}.>"],
        "num_replicas": place.replicas,
        "max_bytes": place.max_bytes or -1,
        "metadata": {_MARK: str(VERSION)},
        "description": "A Glassbus store. Written and read by Glassbus alone.",
    }
    try:
        return await link.api(f"STREAM.CREATE.{place.stream}", config)
    except StoreRefused as error:
        if error.code == 10058:  # another process has just made it, a little otherwise
            return await link.api(f"STREAM.INFO.{place.stream}")
        raise


def check(info: dict[str, Any], place: Place, where: str) -> None:
    """Raises StoreCorrupt when the stream is not one of ours, StoreTooNew when a later Glassbus made it."""
    config = info["config"]
    mark = (config.get("metadata") or {}).get(_MARK)
    if mark is None:
        raise StoreCorrupt(
            f"{where} has a stream {place.stream} that Glassbus did not make; name another store in the URL, "
            "nats://host/name"
        )
    if not str(mark).isdigit() or int(mark) > VERSION:
        raise StoreTooNew(
            f"the stream {place.stream} on {where} was made by a later version of Glassbus (its version {mark!r}, this "
            f"one knows {VERSION}); upgrade Glassbus, or name another store"
        )
    wrong = [name for name, needed in _NEEDED.items() if config.get(name, _default(needed)) != needed]
    if config.get("subjects") != [f"{place.prefix}.>"]:
        wrong.append("subjects")
    if config.get("mirror") or config.get("sources"):
        wrong.append("sources")
    if wrong:
        raise StoreCorrupt(
            f"the stream {place.stream} on {where} has other settings than Glassbus needs "
            f"({', '.join(sorted(wrong))}); put them back, or name another store"
        )


def _default(needed: Any) -> Any:
    return False if isinstance(needed, bool) else needed
