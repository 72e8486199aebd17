"""What is written to the stream: entries, each a list of operations, in the order in which they take effect.

An entry is one JetStream message, so all of it is stored or nothing. An operation says
what its owner wants; whether it takes effect is decided when it is read back, by
every reader alike (`state.py`). The tags and the order of fields are stored: never
renumber, never reorder, add at the end with a default.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from glassbus.errors import StoreCorrupt
from glassbus.message import Envelope

#: Of this format. A stream that says more is refused.
VERSION = 1

#: (number of the delivery, its version): the operation is void if the delivery has moved on since.
Target = tuple[int, int]


class Sent(msgspec.Struct, array_like=True, gc=False):
    """One message. `digest`: its id must be recognised. `parts`: its body is kept apart at `place`, in so many."""

    id: str
    topic: str
    codec: str
    headers: dict[str, str]
    body: bytes
    priority: int = 1
    key: str | None = None
    published_at: float = 0.0
    due_at: float = 0.0
    expires_at: float = 0.0
    digest: bytes = b""
    parts: int = 0
    place: str = ""

    def envelope(self, body: bytes, *, expires: bool) -> Envelope:
        return Envelope(
            self.id,
            self.topic,
            body,
            self.codec,
            self.headers,
            self.priority,
            self.key,
            self.published_at,
            self.due_at,
            self.expires_at if expires else 0.0,
            bool(self.digest),
        )


class _Op(msgspec.Struct, array_like=True, gc=False):
    pass


class Register(_Op, tag=1):
    """The writer of this entry is an owner from now on, and consumes from these subscriptions."""

    consuming: list[str]
    lease_s: float


class Renew(_Op, tag=2):
    """The owner lives, and has read the stream up to `seen`."""

    seen: int


class Leave(_Op, tag=3):
    """The owner gives back what it has, uncharged, and is no owner any more."""


class Expel(_Op, tag=4):
    """`owner` is lost, unless it wrote anything after its entry number `number`. `why` indexes `state.REDELIVERED`."""

    owner: str
    number: int
    why: int


class Declare(_Op, tag=5):
    name: str
    pattern: str
    capacity: int
    strict_key: bool
    consume: bool
    displace: bool = True
    expand: float = 1.0
    expand_for: float = 60.0


class Forget(_Op, tag=6):
    name: str


class SetHold(_Op, tag=7):
    name: str
    paused: bool | None
    forced: str | None


class Publish(_Op, tag=8):
    """All of `messages` behind those of the owner's `parts` Parts of the same number, or nothing.

    `waited`: it has waited for room as long as it would. `may_grow`: queues may grow for it.
    """

    messages: list[Sent]
    part_of: int = 0
    parts: int = 0
    waited: bool = False
    may_grow: bool = True


class Part(_Op, tag=9):
    """Messages of a publish that is too large for one entry; the `Publish` with this number ends it.

    Without messages it drops what came before.
    """

    part_of: int
    messages: list[Sent]


class Claim(_Op, tag=10):
    """Each target that is still to be had is the owner's, its attempt counted."""

    targets: list[Target]


class Handled(_Op, tag=11):
    targets: list[Target]


class Settle(_Op, tag=12):
    """Any end of an attempt but success. `about`: category, exception type and fingerprint of the report."""

    delivery: int
    version: int
    state: int
    attempt: int
    delay_s: float = 0.0
    recovering: tuple[str, str] | None = None
    first_failed_at: float = 0.0
    reason: str = ""
    report: bytes = b""
    about: tuple[str, str, str] = ("", "", "")


class Expire(_Op, tag=13):
    targets: list[Target]


class Replay(_Op, tag=14):
    letters: list[int]


class Discard(_Op, tag=15):
    letters: list[int]


class Remember(_Op, tag=16):
    """Know these ids from now on: (id, digest, where it went)."""

    ids: list[tuple[str, bytes, list[int]]]


class Contract(_Op, tag=17):
    """The expansion of these subscriptions is over, if all that is pending fits."""

    names: list[str]


class Swept(_Op, tag=18):
    """What nobody needed of the entries up to `upto` was deleted from the stream."""

    upto: int


Op = (
    Register
    | Renew
    | Leave
    | Expel
    | Declare
    | Forget
    | SetHold
    | Publish
    | Part
    | Claim
    | Handled
    | Settle
    | Expire
    | Replay
    | Discard
    | Remember
    | Contract
    | Swept
)


class Entry(msgspec.Struct, array_like=True, gc=False):
    """`number` counts an owner's entries up; one that does not is late, and void. `at` is the owner's wall time."""

    owner: str
    number: int
    at: float
    ops: list[Op]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Entry)


def encode(entry: Entry) -> bytes:
    return _encoder.encode(entry)


def decode(stored: bytes, place: str) -> Entry:
    """Raises StoreCorrupt, naming `place`."""
    try:
        return _decoder.decode(stored)
    except msgspec.MsgspecError as error:
        raise StoreCorrupt(f"{place} is not an entry of a Glassbus store: {error}") from error


def size(messages: Sequence[Sent]) -> int:
    """About how many bytes these take in an entry."""
    return sum(
        len(m.body) + len(m.id) + len(m.topic) + 100 + sum(len(k) + 3 * len(v) + 6 for k, v in m.headers.items())
        for m in messages
    )
