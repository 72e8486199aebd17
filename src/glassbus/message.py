"""What users publish and get back, and the rules for topics."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, Generic

import msgspec

from glassbus.errors import ConfigurationError, InvalidHeaders, InvalidPattern, InvalidTopic, shown, type_name

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

_SECRET = frozenset({"payload", "headers", "key"})

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


class _Discreet(msgspec.Struct, frozen=True):
    """Payload, headers and key may hold secrets: no repr takes them into a log, or to a tool that shows locals."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in self.__struct_fields__ if name not in _SECRET]


class Message(_Discreet, Generic[Payload], frozen=True):
    """One message as a handler sees it. Its repr shows neither payload nor headers nor key.

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


class Outgoing(_Discreet, frozen=True):
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
        return f"Envelope(id={self.id!r}, topic={self.topic!r}, bytes={len(self.body)})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("id", self.id), ("topic", self.topic), ("bytes", len(self.body))]


def _plain(value: object) -> str | None:
    """`value` as a `str` of exactly that type, which has no methods of a user's; None when it is no string."""
    return str.__str__(value) if issubclass(type(value), str) else None


def check_topic(topic: object) -> str:
    """`topic` as a plain string when it is a valid name to publish to. Raises InvalidTopic."""
    name = _plain(topic)
    if name is None:
        raise InvalidTopic(f"topic must be a str, not {type_name(type(topic))}")
    if len(name) > TOPIC_LENGTH_MAX:
        raise InvalidTopic(f"topic is {len(name)} characters long; at most {TOPIC_LENGTH_MAX} are allowed")
    if not _TOPIC.fullmatch(name):
        raise InvalidTopic(
            f"topic {name!r} is not a dotted name: use ASCII letters, digits, '-' and '_' in parts joined by '.'"
        )
    if name.partition(".")[0] in RESERVED_TOPICS:
        raise InvalidTopic(f"topic {name!r} starts with a reserved name ({', '.join(sorted(RESERVED_TOPICS))})")
    return name


def check_pattern(pattern: object) -> str:
    """`pattern` as a plain string when it is valid to subscribe to. Raises InvalidPattern."""
    name = _plain(pattern)
    if name is None or len(name) > TOPIC_LENGTH_MAX or not _PATTERN.fullmatch(name):
        raise InvalidPattern(
            f"pattern {shown(pattern)} is not a dotted name; '*' stands for one part, a last '>' for one or more parts"
        )
    return name


def check_patterns(option: str, patterns: object) -> tuple[str, ...]:
    """`patterns`, each valid to subscribe to. Raises ConfigurationError naming `option`, or InvalidPattern."""
    if isinstance(patterns, str | bytes) or not isinstance(patterns, Iterable):
        raise ConfigurationError(f"{option} must be a list of topic patterns, not {shown(patterns)}")
    return tuple(check_pattern(pattern) for pattern in patterns)


def check_text(what: str, value: object, length_max: int) -> str:
    """`value` as a plain string when it is short printable ASCII. Raises InvalidHeaders naming `what`."""
    text = _plain(value)
    if text is None or len(text) > length_max or not _TEXT.fullmatch(text):
        raise InvalidHeaders(f"{what} {shown(value)} must be 1 to {length_max} printable ASCII characters")
    return text


def check_headers(headers: object) -> dict[str, str]:
    """A plain copy of `headers` when every one can be carried by every transport. Raises InvalidHeaders."""
    if not issubclass(type(headers), dict):
        raise InvalidHeaders(f"headers must be a dict of str to str, not {type_name(type(headers))}")
    given: list[tuple[object, object]] = list(dict.items(headers))  # type: ignore[arg-type]
    if len(given) > HEADERS_MAX:
        raise InvalidHeaders(f"{len(given)} headers; at most {HEADERS_MAX} are allowed")
    size = 0
    carried: dict[str, str] = {}
    for given_name, given_value in given:
        name, value = _plain(given_name), _plain(given_value)
        if name is None or not _HEADER_NAME.fullmatch(name):
            raise InvalidHeaders(f"header name {shown(given_name)} must be ASCII letters, digits, '-', '_' or '.'")
        if name.lower().startswith(RESERVED_HEADERS):
            raise InvalidHeaders(f"header {name!r} is reserved for the bus and its transports")
        if value is None or not _HEADER_VALUE.fullmatch(value):
            raise InvalidHeaders(f"value of header {name!r} must be a str without control characters")
        carried[name] = value
        size += len(name) + (len(value) if value.isascii() else len(value.encode()))
    if size > HEADERS_BYTES_MAX:
        raise InvalidHeaders(f"headers take {size} bytes; at most {HEADERS_BYTES_MAX} are allowed")
    return carried
