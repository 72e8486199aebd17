"""What the journals tell of one message: its own entries, what happened around it, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from glassbus import facts as f
from glassbus.facts import FactType
from glassbus.record.entries import Entry, FactLine, FloodLine, StartLine, encode, entry_of_line
from glassbus.record.reading import JournalReader

#: Facts that tell in which state things were when an attempt ran.
AROUND: frozenset[FactType] = frozenset(
    {
        f.BreakerStateChanged,
        f.SubscriptionPaused,
        f.SubscriptionResumed,
        f.SubscriptionForgotten,
        f.LoadShed,
        f.LoadRegained,
        f.IntakePaused,
        f.IntakeResumed,
        f.BusStarted,
        f.BusStopped,
    }
)
_AROUND_NAMES = frozenset(kind.__name__ for kind in AROUND)
_NEEDLES = (
    *(b'"fact":' + encode(name) for name in sorted(_AROUND_NAMES)),
    b'{"kind":"flood"',
    b'{"kind":"lost"',
)


class Process(NamedTuple):
    """Who stated something: the name of its journal, and what its files say of it."""

    name: str
    pid: int = 0
    bus: str = ""
    level: str = ""


class Told(NamedTuple):
    """`entries` are of the message, `around` of what was around it, each with its process, oldest first.

    `floods` are lines that stand for many. `notes` are sentences about what cannot be read.
    """

    entries: list[tuple[Entry, Process]]
    around: list[tuple[Entry, Process]]
    floods: list[FloodLine]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, entries: Iterable[tuple[Entry, Process]], floods: list[FloodLine], notes: tuple[str, ...]) -> Told:
        """`entries` in any order, of the message and of what is in AROUND."""
        told = sorted(entries, key=lambda pair: (pair[0].at, pair[0].number))
        around = [pair for pair in told if pair[0].fact in _AROUND_NAMES and not pair[0].message_id]
        mine = [pair for pair in told if pair[0].fact not in _AROUND_NAMES or pair[0].message_id]
        return cls(mine, around, floods, notes)


def told_by(reader: JournalReader, message_id: str) -> Told:
    """What the files of all processes tell. Decodes only the lines that may matter; reads all files."""
    found: list[tuple[Entry, Process]] = []
    floods: list[FloodLine] = []
    for start, line in reader.found(*_needle("", message_id), *_NEEDLES):
        if isinstance(line, FloodLine):
            floods.append(line)
        elif line.message_id == message_id or (not line.message_id and line.fact in _AROUND_NAMES):
            found.append((entry_of_line(line), _process(start)))
    return Told.of(found, floods, reader.notes())


def ids_like(reader: JournalReader, beginning: str, limit: int) -> list[str]:
    """Ids of messages in the journals that begin so, at most `limit`, sorted."""
    found: set[str] = set()
    for _, line in reader.found(*(needle[:-1] for needle in _needle("message_id", beginning))):
        if isinstance(line, FactLine) and line.message_id.startswith(beginning):
            found.add(line.message_id)
    return sorted(found)[:limit]


def ids_of_trace(reader: JournalReader, trace_id: str, limit: int) -> list[str]:
    """Ids of messages of which something is in a trace, at most `limit`, sorted."""
    lines = reader.found(*_needle("trace_id", trace_id))
    found = {line.message_id for _, line in lines if isinstance(line, FactLine) and line.trace_id == trace_id}
    return sorted(found)[:limit]


def _needle(field: str, value: str) -> tuple[bytes, ...]:
    """How `value` stands in a line, after the name of its field if one is given; nothing when no line can hold it."""
    try:
        written = encode(value)
    except UnicodeEncodeError:  # half of a surrogate pair: how Python reads arguments that are no UTF-8
        return ()
    return (b'"%s":%s' % (field.encode(), written) if field else written,)


def _process(start: StartLine | None) -> Process:
    return Process("", 0) if start is None else Process(start.process, start.pid, start.bus, start.level)
