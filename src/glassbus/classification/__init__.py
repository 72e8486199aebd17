"""What kind of failure an exception is, and how bad: from its type, the numbers it carries, and what caused it.

In this order; the first answer counts.

1. Rules that users gave to the bus.
2. The exception's type and its ancestors, nearest first. Types of other packages are known by name (`families`);
   an `OSError` without a type of its own goes by its errno, a wrapper by what it wraps.
   A `TypeError` or `ValueError` raised within a serializer is the serializer's.
3. An HTTP status on it, or on its `response`.
4. What it was raised from (`__cause__`); else what was being handled when it was raised (`__context__`),
   unless `from None` says that this does not matter.

So a type that says what it means is believed, whatever caused it, and one that says nothing is as its cause.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from glassbus import errors
from glassbus.classification import codes
from glassbus.classification.families import FAMILIES
from glassbus.classification.verdicts import (
    ACCESS,
    CLASSIFICATIONS,
    CONNECTION,
    CORRUPT,
    EXHAUSTED,
    EXIT,
    FATAL,
    HANGING,
    LIMITED,
    MISCONFIGURED,
    OVERFLOW,
    PROCESSING,
    TIMEOUT,
    UNKNOWN,
    UNREADABLE,
    Classification,
    Finding,
    Look,
)
from glassbus.errors import ErrorCategory, ErrorSeverity

__all__ = [
    "CLASSIFICATIONS",
    "UNKNOWN",
    "Classification",
    "Classifier",
    "Rule",
    "RuleFailed",
    "Standing",
    "classify",
    "standing_of",
]

#: A user's rule: an answer, or None where it has none.
Rule = Callable[[BaseException], Classification | None]
#: Told which rule raised, or answered nonsense, and what it raised.
RuleFailed = Callable[[Rule, BaseException], None]

#: Looked at most so many exceptions of one chain of causes and groups.
_LOOKED_AT_MAX = 64


def _of_uncertain(error: BaseException) -> Finding:
    """A publish whose outcome is not known is as what made it so."""
    return CONNECTION if error.__cause__ is None else error.__cause__


def _of_tls(error: BaseException) -> Finding:
    """The alert of the other side, by which it says that it does not accept our certificate."""
    reason = getattr(error, "reason", None)
    refused = isinstance(reason, str) and any(word in reason for word in ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED"))
    return ACCESS if refused else CONNECTION


#: Modules in which a TypeError or ValueError means: this value cannot be written, or these bytes cannot be read.
_SERIALIZERS = ("json.encoder", "json.decoder", "json", "pickle", "copyreg", "xml.etree.ElementTree", "plistlib")


def _of_serializer(error: BaseException) -> Finding:
    """`json.dumps(object())` raises a plain TypeError, from within json."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_next is None and trace.tb_frame.f_globals.get("__name__") in _SERIALIZERS:
            return UNREADABLE
        trace = trace.tb_next
    return UNREADABLE if _unpicklable(error) else PROCESSING


def _unpicklable(error: BaseException) -> bool:
    first = error.args[0] if error.args else None
    return type(first) is str and first.startswith(("cannot pickle ", "Can't pickle "))


# Looked up along the exception type's MRO, so the nearest ancestor wins.
_BY_TYPE: dict[type[BaseException], Classification | Look] = {
    ConnectionError: CONNECTION,
    socket.gaierror: CONNECTION,
    socket.herror: CONNECTION,
    asyncio.IncompleteReadError: CONNECTION,
    ssl.SSLError: _of_tls,
    ssl.SSLCertVerificationError: ACCESS,
    errors.TransportError: CONNECTION,
    errors.EndpointRefused: ACCESS,
    errors.StoreCorrupt: CORRUPT,
    errors.StoreReadOnly: ACCESS,
    errors.StoreTooNew: MISCONFIGURED,
    errors.PublishUncertain: _of_uncertain,
    errors.BreakerOpen: CONNECTION,
    TimeoutError: TIMEOUT,
    errors.HandlerAbandoned: HANGING,
    PermissionError: ACCESS,
    MemoryError: EXHAUSTED,
    errors.BrokerUnreachable: CONNECTION,
    errors.StorageFull: EXHAUSTED,
    RecursionError: LIMITED,
    errors.BusOverloaded: LIMITED,
    errors.QueueFull: OVERFLOW,
    errors.SpoolFull: OVERFLOW,
    asyncio.QueueFull: OVERFLOW,
    UnicodeError: UNREADABLE,
    msgspec.MsgspecError: UNREADABLE,
    asyncio.LimitOverrunError: UNREADABLE,
    errors.PayloadUndecodable: UNREADABLE,
    errors.InvalidPayload: UNREADABLE,
    errors.ConfigurationError: MISCONFIGURED,
    ImportError: MISCONFIGURED,
    errors.OwnerDied: FATAL,
    SystemError: FATAL,
    SystemExit: EXIT,
    OSError: codes.by_errno,
    ValueError: _of_serializer,
    TypeError: _of_serializer,
    LookupError: PROCESSING,
    ArithmeticError: PROCESSING,
    AssertionError: PROCESSING,
    AttributeError: _of_serializer,
    NameError: PROCESSING,
    EOFError: PROCESSING,
    BufferError: PROCESSING,
}

_SEVERITY_ORDER: dict[ErrorSeverity, int] = {severity: order for order, severity in enumerate(ErrorSeverity)}


def classify(error: BaseException) -> Classification:
    """Category and severity of `error` by the built-in rules. Never raises; any thread.

    A group that nothing else is known about is as its most severe member.
    """
    try:
        return _look(error, set()) or UNKNOWN
    except BaseException:  # noqa: BLE001 - an exception may raise at any touch, and is then unknown
        return UNKNOWN


class Standing(NamedTuple):
    """What `classify` says of every failure of one site (type and stack) that `holds` is true of.

    `says`, `carries`, `within`: it also took that its text, its attributes, and what was being handled
    when it was raised told nothing else.
    """

    classification: Classification
    says: bool = False
    carries: bool = False
    within: bool = False

    def holds(self, error: BaseException) -> bool:
        """Raises whatever a hostile exception raises."""
        if self.says and _unpicklable(error):
            return False
        if self.carries and not codes.STATUS_NAMES.isdisjoint(error.__dict__):
            return False
        return not self.within or error.__context__ is None or error.__suppress_context__


def standing_of(error: BaseException) -> Standing | None:
    """What is known of the site of `error`; None where each of its failures must be looked at. Never raises."""
    try:
        return _standing(error)
    except BaseException:  # noqa: BLE001 - as in `classify`
        return None


def _standing(error: BaseException) -> Standing | None:
    kind = type(error)
    for ancestor in kind.__mro__:
        known = _BY_TYPE.get(ancestor)
        if known is _of_serializer:
            return None if _unpicklable(error) else Standing(classify(error), says=True)
        if known is not None:
            return Standing(known) if isinstance(known, tuple) else None
        family = FAMILIES.get(ancestor.__module__.partition(".")[0])
        if family is not None:
            if family.look is not None:
                return None
            named = family.names.get(ancestor.__name__)
            if named is not None:
                return Standing(named)
    if error.__cause__ is not None or any(map(_may_carry, kind.__mro__)):
        return None
    found = Standing(UNKNOWN, carries=True, within=True)
    return found if found.holds(error) else None


def _may_carry(kind: type) -> bool:
    """Whether exceptions of `kind` may carry more than their `__dict__` shows: a status, or others."""
    if kind is object or kind is BaseException:
        return False
    if kind is BaseExceptionGroup:
        return True
    members = vars(kind)
    return not codes.STATUS_NAMES.isdisjoint(members) or "__getattr__" in members or "__getattribute__" in members


class Classifier:
    """`classify`, after the rules of a user. `failed` is told of a rule that raises or lies; the next one is asked."""

    def __init__(self, rules: tuple[Rule, ...] = (), failed: RuleFailed | None = None) -> None:
        self.rules = rules
        self._failed = failed

    def __call__(self, error: BaseException) -> Classification:
        """Category and severity of `error`. Never raises."""
        for rule in self.rules:
            try:
                found = rule(error)
                if found is None:
                    continue
                category, severity = found
                return ErrorCategory(category), ErrorSeverity(severity)
            except BaseException as raised:  # noqa: BLE001 - a user's rule may raise or answer anything
                if self._failed is not None:
                    self._failed(rule, raised)
        return classify(error)


def _look(error: BaseException, seen: set[int]) -> Classification | None:
    if id(error) in seen or len(seen) >= _LOOKED_AT_MAX:
        return None
    seen.add(id(error))
    found = _by_type(error, seen)
    if found is not None:
        return found
    if isinstance(error, BaseExceptionGroup):
        members = [_look(member, seen) for member in error.exceptions[:_LOOKED_AT_MAX]]
        return max((m for m in members if m), key=lambda m: _SEVERITY_ORDER[m[1]], default=None)
    status = _touch(codes.by_status, error, seen)
    if status is not None:
        return status
    cause = error.__cause__
    if cause is None and not error.__suppress_context__:
        cause = error.__context__
    return None if cause is None else _look(cause, seen)


def _by_type(error: BaseException, seen: set[int]) -> Classification | None:
    asked = None
    for ancestor in type(error).__mro__:
        known = _BY_TYPE.get(ancestor)
        if known is not None:
            found = known if isinstance(known, tuple) else _touch(known, error, seen)
            if found is not None:
                return found
        package = ancestor.__module__.partition(".")[0]
        family = FAMILIES.get(package)
        if family is None:
            continue
        if family.look is not None and asked != package:
            asked = package
            found = _touch(family.look, error, seen)
            if found is not None:
                return found
        named = family.names.get(ancestor.__name__)
        if named is not None:
            return named
    return None


def _touch(look: Look, error: BaseException, seen: set[int]) -> Classification | None:
    """What `look` finds. An exception whose attributes raise has not told us anything."""
    try:
        found = look(error)
    except BaseException:  # noqa: BLE001 - properties of foreign exceptions may raise anything
        return None
    return _look(found, seen) if isinstance(found, BaseException) else found
