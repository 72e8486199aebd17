"""Everything that can go wrong, as types.

GlassbusError
├── ConfigurationError            a setting, URL or subscription that cannot work
│   ├── InvalidPattern            a subscription's topic pattern is malformed
│   ├── SubscriptionExists        the same subscription name twice on one bus
│   └── UnknownSubscription       no subscription of that name
├── PublishError
│   ├── PublishRejected           certainly not stored; `reason` says why
│   │   ├── InvalidMessage        the message itself is wrong
│   │   │   ├── InvalidTopic
│   │   │   ├── InvalidHeaders
│   │   │   └── InvalidPayload
│   │   ├── MessageConflict       this id was used for another body
│   │   ├── QueueFull             no room, and waiting for it did not help
│   │   ├── BrokerUnreachable     no connection and no spool: nothing was sent
│   │   ├── SpoolFull             the broker is away, and the local spool holds all it may
│   │   ├── StorageFull           free disk space is below the reserve
│   │   ├── BusOverloaded         resources run out; intake is paused for a while
│   │   └── BusNotRunning         the bus is not started, or is stopping
│   └── PublishUncertain          may be stored: publish again with the same id
├── TransportError                the store or broker failed
│   ├── StoreCorrupt
│   ├── StoreLocked
│   ├── StoreReadOnly
│   ├── StoreTooNew               written by a later version of Glassbus
│   ├── EndpointUnreachable       no connection to a broker; also a ConnectionError
│   └── EndpointRefused           the broker refused our credentials or rights; also a PermissionError
├── HandlingError                 why a delivery failed without the handler raising
│   ├── HandlerTimedOut           also a TimeoutError
│   ├── HandlerCancelled          a CancelledError that nobody here caused
│   ├── HandlerAbandoned          it ran past `abandon_after`; its slot is lost
│   ├── OwnerDied                 the process died while handling it
│   ├── AttemptsSpent             a lowered `max_attempts` allows no further attempt
│   └── PayloadUndecodable        the stored bytes do not fit the handler's type
├── UnknownDeadLetter             no dead letter of that id
├── UnknownEscalation             no escalation of that fingerprint is open
├── UnknownMessage                neither the journal nor the store knows a message of that id
├── ShippedFileMissing            the installation lacks a file that ships; also a FileNotFoundError
├── WouldBlockLoop                a blocking call in a thread whose event loop it would stop; also a RuntimeError
└── BreakerOpen                   refused by a circuit breaker; also a RuntimeError
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import msgspec


class GlassbusError(Exception):
    """Root of every exception that Glassbus raises on purpose."""


class ConfigurationError(GlassbusError, ValueError):
    """A setting, URL or subscription cannot work as given."""


class InvalidPattern(ConfigurationError):
    """A subscription's topic pattern is malformed."""


class SubscriptionExists(ConfigurationError):
    """A bus already has a subscription of this name."""


class UnknownSubscription(ConfigurationError, LookupError):
    """No subscription of this name is known."""


class PublishError(GlassbusError):
    """A publish did not succeed."""


class PublishRejected(PublishError):
    """The message is certainly not stored. `reason` is a short constant for programs."""

    reason = "rejected"


class InvalidMessage(PublishRejected, ValueError):
    """The message itself is wrong; publishing it again cannot help."""

    reason = "invalid"


class InvalidTopic(InvalidMessage):
    """The topic is not a dotted name of ASCII letters, digits, `-` and `_`."""

    reason = "invalid_topic"


class InvalidHeaders(InvalidMessage):
    """A header, id, key or option cannot be carried."""

    reason = "invalid_headers"


class InvalidPayload(InvalidMessage):
    """The payload cannot be encoded, or is too large or too deep."""

    reason = "invalid_payload"


class MessageConflict(PublishRejected):
    """The id was published within the duplicate window with another body."""

    reason = "conflict"

    def __init__(self, message_id: str) -> None:
        super().__init__(
            f"message id {message_id!r} was already published with a different topic or body; "
            "give each message its own id"
        )
        self.message_id = message_id


class QueueFull(PublishRejected):
    """A subscription's queue had no room within `publish_timeout`. Nothing was stored."""

    reason = "queue_full"

    def __init__(self, subscription: str, capacity: int, waited_s: float) -> None:
        super().__init__(
            f"queue of subscription {subscription!r} is full ({capacity} messages) after waiting {waited_s:.3g} s; "
            "publish slower, raise its capacity, or give it more consumers"
        )
        self.subscription = subscription
        self.capacity = capacity
        self.waited_s = waited_s


class SpoolFull(PublishRejected):
    """The broker cannot be reached, and what waits in the local spool leaves no room. Nothing was stored."""

    reason = "spool_full"


class BrokerUnreachable(PublishRejected):
    """There is no connection to the broker and no spool to wait in. Nothing was sent: publish again later."""

    reason = "unreachable"


class StorageFull(PublishRejected):
    """Free space is below the reserve that keeps acknowledgements possible."""

    reason = "storage_full"


class BusOverloaded(PublishRejected):
    """Resources run out and shedding load did not help, so the bus takes nothing for a few seconds: publish later."""

    reason = "overloaded"


class BusNotRunning(PublishRejected):
    """The bus takes no messages now: it is not started, or it is stopping."""

    reason = "not_running"


class PublishUncertain(PublishError):
    """The message may or may not be stored.

    Publish it again **with the same id** (`message_id`): within the duplicate window a
    second copy is recognised, so the retry is safe whichever way the first one went.
    """

    def __init__(self, message_id: str, cause: str) -> None:
        super().__init__(
            f"it is not known whether message {message_id!r} was stored ({cause}); "
            f"publish it again with message_id={message_id!r}"
        )
        self.message_id = message_id
        #: Every id of the batch, for `publish_many`: all of them are to be published again.
        self.message_ids: tuple[str, ...] = (message_id,)


class TransportError(GlassbusError):
    """The store or broker failed."""


class StoreCorrupt(TransportError):
    """The database file is damaged or is not a Glassbus store."""


class StoreLocked(TransportError):
    """Another program holds the database for longer than the busy timeout."""


class StoreReadOnly(TransportError):
    """The database or its folder cannot be written."""


class StoreTooNew(TransportError):
    """The database was written by a later version of Glassbus."""


class EndpointUnreachable(TransportError, ConnectionError):
    """A broker cannot be reached, does not answer, or the connection to it broke."""


class EndpointRefused(TransportError, PermissionError):
    """A broker refused our credentials, or what they may do is too little."""


class HandlingError(GlassbusError):
    """Why a delivery failed although its handler raised nothing."""


class HandlerTimedOut(HandlingError, TimeoutError):
    """The handler ran longer than its timeout."""


class HandlerCancelled(HandlingError):
    """The handler ended with a CancelledError that the bus did not cause."""


class HandlerAbandoned(HandlingError, TimeoutError):
    """The handler ignored its timeout until `abandon_after`; its slot is lost until it returns."""


class OwnerDied(HandlingError):
    """The process that ran the handler died in every attempt."""


class AttemptsSpent(HandlingError):
    """The attempts already made are as many as `max_attempts` allows now."""


class PayloadUndecodable(HandlingError):
    """The stored bytes cannot be decoded to the type that the handler asks for."""


class UnknownDeadLetter(GlassbusError, LookupError):
    """No dead letter of this id."""


class WouldBlockLoop(GlassbusError, RuntimeError):
    """A blocking call was made in a thread that runs an event loop, which would stand still; nothing was done."""


class UnknownMessage(GlassbusError, LookupError):
    """Neither the journal nor the store knows a message of that id, any more or at all."""


class UnknownEscalation(GlassbusError, LookupError):
    """No escalation of this fingerprint is open here."""


class ShippedFileMissing(GlassbusError, FileNotFoundError):
    """A file that ships with the package is not where it belongs: the installation is incomplete."""


class BreakerOpen(GlassbusError, RuntimeError):
    """A circuit breaker refused the call; it was not made."""


class ErrorCategory(StrEnum):
    """What kind of failure it is; decides how it is recovered."""

    CONNECTION_ERROR = "connection_error"
    MESSAGE_PROCESSING_ERROR = "message_processing_error"
    SERIALIZATION_ERROR = "serialization_error"
    QUEUE_OVERFLOW = "queue_overflow"
    TIMEOUT_ERROR = "timeout_error"
    AUTHENTICATION_ERROR = "authentication_error"
    RESOURCE_EXHAUSTION = "resource_exhaustion"
    CONFIGURATION_ERROR = "configuration_error"


class ErrorSeverity(StrEnum):
    """How bad it is; decides who is told."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


class ErrorReport(msgspec.Struct):
    """One failure, as bounded strings: never a frame, never a live exception.

    The first twelve fields may be given by position, in this order. `escalated`: somebody has been or will be told.
    `timestamp` is wall time in seconds. `message` is capped at 1 KiB and
    `stack_trace` at 16 KiB. `fingerprint` is the same for the same failure site.
    """

    error_id: str
    timestamp: float
    category: ErrorCategory
    severity: ErrorSeverity
    message: str
    exception_type: str = ""
    stack_trace: str = ""
    context: dict[str, Any] = msgspec.field(default_factory=dict)
    recovery_attempted: bool = False
    recovery_successful: bool = False
    retry_count: int = 0
    escalated: bool = False
    fingerprint: str = ""
    component: str = "handler"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON-ready values."""
        built: dict[str, Any] = msgspec.to_builtins(self)
        return built


_WORD = re.compile(r"\S+")
#: How much further than it is shown a text is read, so that what is redacted in it is not cut in two.
_BEYOND = 1024

_also: Callable[[str], str] | None = None


def redact(text: str) -> str:
    """`text` without the credentials of any URL in it."""
    return _WORD.sub(_without_userinfo, text) if "://" in text else text


def _without_userinfo(found: re.Match[str]) -> str:
    # To the last '@': a password may hold '@' or '/' that somebody forgot to encode.
    word = found[0]
    begin, end = word.find("://"), word.rfind("@")
    return f"{word[: begin + 3]}***{word[end:]}" if 0 <= begin < end else word


def _cut(text: str, cap: int) -> str:
    """The first `cap` characters; of a URL that this would cut in two only the scheme: the cut may be in a password."""
    if len(text) <= cap:
        return text
    text = text[:cap]
    word = "" if not text or text[-1].isspace() else text.rsplit(None, 1)[-1]
    begin = word.find("://")
    return text if begin < 0 else text[: len(text) - len(word) + begin + 3]


def redact_errors(also: Callable[[str], str] | None) -> None:
    """From now on show of the text of any exception only what `also` makes of it, in this whole process.

    It is given what is left without credentials of URLs, and its answer goes into reports, dead letters, the journal,
    log lines, spans, notifications and what callers are told. None: only credentials of URLs are taken out, as from
    the start. May be called on any thread; where it raises, the text is not shown at all.
    """
    global _also
    _also = also


def redacted(text: str) -> str:
    """`text`, of an exception or about one, as it may be shown. Never raises."""
    also, text = _also, redact(text)
    if also is None:
        return text
    try:
        return str.__str__(also(text))
    except BaseException as raised:  # noqa: BLE001 - it is the program's, and may raise anything
        return f"<redaction raised {type_name(type(raised))}>"


def safe_text(error: BaseException, cap: int = 1024) -> str:
    """`str(error)`, capped, redacted (see `redact_errors`), for any exception however hostile. Never raises."""
    try:
        text = str(error)
        plain = type(text) is str and len(text) <= cap and text.isascii() and text.isprintable()
        if plain and "://" not in text and _also is None:
            return text  # nothing to cut, to escape or to take out: so are most
        # str.__str__: the answer may be of a subclass with methods of its own.
        text = _cut(str.__str__(text), cap + _BEYOND)
        text = text.encode("utf-8", "replace").decode()
    except BaseException as raised:  # noqa: BLE001 - a user's __str__ may raise anything
        return f"<{type_name(type(error))} whose __str__ raised {type_name(type(raised))}>"
    text = redacted(text)
    if not text.isprintable():  # an escape sequence must not reach a terminal by way of a log
        text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return text if len(text) <= cap else text[: cap - 1] + "…"


def type_name(kind: type) -> str:
    """The bare name of `kind`, for any class however hostile its metaclass. Never raises."""
    name: str = type.__dict__["__name__"].__get__(kind)
    return name


def shown(value: object, cap: int = 80) -> str:
    """`repr(value)`, capped and without credentials of URLs, for any value however hostile. Never raises."""
    try:
        return redact(_cut(str.__str__(repr(value)), cap + _BEYOND))[:cap]
    except BaseException:  # noqa: BLE001 - a user's __repr__ may raise anything
        return f"<a {type_name(type(value))} that cannot be shown>"
