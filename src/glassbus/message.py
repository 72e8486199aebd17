"""What users publish and get back, and the rules for topics."""

from __future__ import annotations

import re
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, Generic

import msgspec

from glassbus.errors import InvalidHeaders, InvalidPattern, InvalidTopic

if TYPE_CHECKING:
    # With a default, so that plain `Message` satisfies strict checkers; at run time it needs Python 3.13.
    from typing_extensions import TypeVar

    Payload = TypeVar("Payload", default=Any)
else:
    from typing import TypeVar

    Payload = TypeVar("Payload")

TOPIC_LENGTH_MAX = 255
KEY_LENGTH_MAX = 255
MESSAGE_ID_LENGTH_MAX = 128
HEADERS_MAX = 64
HEADERS_BYTES_MAX = 16 * 1024
#: Header names that only the bus and its transports may set.
RESERVED_HEADERS = ("glassbus-", "nats-", "x-death")
#: First tokens that brokers and the bus keep for themselves.
RESERVED_TOPICS = frozenset({"glassbus", "amq", "_INBOX"})

_PART = r"[A-Za-z0-9_\-]+"
_TOPIC = re.compile(rf"{_PART}(?:\.{_PART})*")
_PATTERN = re.compile(rf"(?:{_PART}|\*)(?:\.(?:{_PART}|\*))*(?:\.>)?|>")
_TEXT = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_HEADER_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
# No control characters, and no lone surrogates: those are no text in any encoding.
_HEADER_VALUE = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]*")


class Priority(IntEnum):
    """Weighted, not strict: a higher one goes first more often, the lowest never starves."""

    LOW = 0
    NORMAL = 1
    HIGH = 2
    CRITICAL = 3


class Level(StrEnum):
    """What an accepted message survives."""

    MEMORY = "memory"
    PROCESS = "process"
    DISK = "disk"
    QUORUM = "quorum"


class Message(msgspec.Struct, Generic[Payload], frozen=True):
    """One message as a handler sees it.

    `published_at` is wall time in seconds. The payload was decoded for this
    attempt alone, so changing it affects nobody else.
    """

    id: str
    topic: str
    payload: Payload
    headers: dict[str, str]
    priority: Priority = Priority.NORMAL
    key: str | None = None
    published_at: float = 0.0


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """Proof that a message was accepted.

    `level` says what it now survives. `subscriptions` names the queues it went
    to: none means that nobody wants it. `duplicate` is true when this id had
    been accepted before, and nothing was stored this time.
    """

    message_id: str
    level: Level
    subscriptions: tuple[str, ...]
    duplicate: bool = False


class Outgoing(msgspec.Struct, frozen=True):
    """One message for `publish_many`, with the options of `publish`."""

    topic: str
    payload: Any = None
    message_id: str | None = None
    key: str | None = None
    priority: Priority = Priority.NORMAL
    headers: dict[str, str] | None = None
    delay: float = 0.0
    expires_in: float | None = None


# No instance can be part of a reference cycle, so the collector need not look at it.
class Envelope(msgspec.Struct, frozen=True, gc=False):
    """A message as a transport keeps it: the payload is bytes.

    Times are wall seconds; 0.0 means none. `remember` asks the transport to
    recognise this id again for the duplicate window.
    """

    id: str
    topic: str
    body: bytes
    codec: str
    headers: dict[str, str]
    priority: int = 1
    key: str | None = None
    published_at: float = 0.0
    due_at: float = 0.0
    expires_at: float = 0.0
    remember: bool = False

    def __repr__(self) -> str:
        # Payload and headers may hold secrets: they never reach a log by way of a repr.
        return f"Envelope(id={self.id!r}, topic={self.topic!r}, bytes={len(self.body)})"


def check_topic(topic: object) -> str:
    """`topic` when it is a valid name to publish to. Raises InvalidTopic."""
    if not isinstance(topic, str):
        raise InvalidTopic(f"topic must be a str, not {type(topic).__name__}")
    if len(topic) > TOPIC_LENGTH_MAX:
        raise InvalidTopic(f"topic is {len(topic)} characters long; at most {TOPIC_LENGTH_MAX} are allowed")
    if not _TOPIC.fullmatch(topic):
        raise InvalidTopic(
            f"topic {topic!r} is not a dotted name: use ASCII letters, digits, '-' and '_' in parts joined by '.'"
        )
    if topic.partition(".")[0] in RESERVED_TOPICS:
        raise InvalidTopic(f"topic {topic!r} starts with a reserved name ({', '.join(sorted(RESERVED_TOPICS))})")
    return topic


def check_pattern(pattern: object) -> str:
    """`pattern` when it is valid to subscribe to. Raises InvalidPattern."""
    if not isinstance(pattern, str) or len(pattern) > TOPIC_LENGTH_MAX or not _PATTERN.fullmatch(pattern):
        shown = repr(pattern)[:80]
        raise InvalidPattern(
            f"pattern {shown} is not a dotted name; '*' stands for one part, a last '>' for one or more parts"
        )
    return pattern


def check_text(what: str, value: object, length_max: int) -> str:
    """`value` when it is short printable ASCII. Raises InvalidHeaders naming `what`."""
    if not isinstance(value, str) or len(value) > length_max or not _TEXT.fullmatch(value):
        shown = repr(value)[:80]
        raise InvalidHeaders(f"{what} {shown} must be 1 to {length_max} printable ASCII characters")
    return value


def check_headers(headers: object) -> dict[str, str]:
    """A copy of `headers` when every one can be carried by every transport. Raises InvalidHeaders."""
    if not isinstance(headers, dict):
        raise InvalidHeaders(f"headers must be a dict of str to str, not {type(headers).__name__}")
    if len(headers) > HEADERS_MAX:
        raise InvalidHeaders(f"{len(headers)} headers; at most {HEADERS_MAX} are allowed")
    size = 0
    for name, value in headers.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise InvalidHeaders(f"header name {repr(name)[:80]} must be ASCII letters, digits, '-', '_' or '.'")
        if name.lower().startswith(RESERVED_HEADERS):
            raise InvalidHeaders(f"header {name!r} is reserved for the bus and its transports")
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise InvalidHeaders(f"value of header {name!r} must be a str without control characters")
        size += len(name) + (len(value) if value.isascii() else len(value.encode()))
    if size > HEADERS_BYTES_MAX:
        raise InvalidHeaders(f"headers take {size} bytes; at most {HEADERS_BYTES_MAX} are allowed")
    return dict(headers)
