"""What kind of failure it is, told from its type; and the text of exceptions, however hostile."""

from __future__ import annotations

import asyncio
import json
import pickle
import socket
import ssl

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus import errors
from glassbus.errors import CLASSIFICATIONS, ErrorCategory, ErrorReport, ErrorSeverity, classify, safe_text

C, S = ErrorCategory, ErrorSeverity


class OwnConnectionError(ConnectionError):
    """A subclass that nobody named."""


class Unknown(Exception):
    """Says nothing about itself."""


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "category", "severity"),
    [
        (ConnectionRefusedError(), C.CONNECTION_ERROR, S.HIGH),
        (OwnConnectionError(), C.CONNECTION_ERROR, S.HIGH),
        (socket.gaierror(), C.CONNECTION_ERROR, S.HIGH),
        (ssl.SSLError(), C.CONNECTION_ERROR, S.HIGH),
        (ssl.SSLCertVerificationError(), C.AUTHENTICATION_ERROR, S.HIGH),
        (errors.StoreLocked(), C.CONNECTION_ERROR, S.HIGH),
        (TimeoutError(), C.TIMEOUT_ERROR, S.HIGH),
        (asyncio.TimeoutError(), C.TIMEOUT_ERROR, S.HIGH),  # noqa: UP041 - the name users write
        (errors.HandlerTimedOut(), C.TIMEOUT_ERROR, S.HIGH),
        (errors.HandlerAbandoned(), C.TIMEOUT_ERROR, S.CRITICAL),
        (PermissionError(), C.AUTHENTICATION_ERROR, S.HIGH),
        (MemoryError(), C.RESOURCE_EXHAUSTION, S.CRITICAL),
        (RecursionError(), C.RESOURCE_EXHAUSTION, S.HIGH),
        (errors.StorageFull(), C.RESOURCE_EXHAUSTION, S.CRITICAL),
        (errors.QueueFull("s", 1, 0.0), C.QUEUE_OVERFLOW, S.HIGH),
        (asyncio.QueueFull(), C.QUEUE_OVERFLOW, S.HIGH),
        (json.JSONDecodeError("x", "y", 0), C.SERIALIZATION_ERROR, S.MEDIUM),
        (pickle.PicklingError(), C.SERIALIZATION_ERROR, S.MEDIUM),
        (UnicodeDecodeError("utf-8", b"", 0, 1, ""), C.SERIALIZATION_ERROR, S.MEDIUM),
        (msgspec.ValidationError(), C.SERIALIZATION_ERROR, S.MEDIUM),
        (errors.PayloadUndecodable(), C.SERIALIZATION_ERROR, S.MEDIUM),
        (errors.InvalidPayload(), C.SERIALIZATION_ERROR, S.MEDIUM),
        (errors.ConfigurationError(), C.CONFIGURATION_ERROR, S.HIGH),
        (ModuleNotFoundError(), C.CONFIGURATION_ERROR, S.HIGH),
        (errors.OwnerDied(), C.MESSAGE_PROCESSING_ERROR, S.CRITICAL),
        (ValueError(), C.MESSAGE_PROCESSING_ERROR, S.MEDIUM),
        (KeyError(), C.MESSAGE_PROCESSING_ERROR, S.MEDIUM),
        (ZeroDivisionError(), C.MESSAGE_PROCESSING_ERROR, S.MEDIUM),
        (AssertionError(), C.MESSAGE_PROCESSING_ERROR, S.MEDIUM),
        (SystemExit(), C.MESSAGE_PROCESSING_ERROR, S.HIGH),
        (Unknown(), C.MESSAGE_PROCESSING_ERROR, S.LOW),
        (caused(Unknown(), TimeoutError()), C.TIMEOUT_ERROR, S.HIGH),
        (caused(Unknown(), caused(Unknown(), ConnectionError())), C.CONNECTION_ERROR, S.HIGH),
        (caused(ValueError(), ConnectionError()), C.MESSAGE_PROCESSING_ERROR, S.MEDIUM),  # its own type speaks first
        (ExceptionGroup("g", [ValueError(), ConnectionError()]), C.CONNECTION_ERROR, S.HIGH),
        (ExceptionGroup("g", [ExceptionGroup("h", [TimeoutError()])]), C.TIMEOUT_ERROR, S.HIGH),
        (ExceptionGroup("g", [Unknown()]), C.MESSAGE_PROCESSING_ERROR, S.LOW),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else str(v),
)
def test_the_category_follows_the_type(error: BaseException, category: C, severity: S) -> None:
    assert classify(error) == (category, severity)
    assert classify(error) in CLASSIFICATIONS


def every_subclass(kind: type[BaseException]) -> set[type[BaseException]]:
    direct = type.__subclasses__(kind)
    return set(direct).union(*map(every_subclass, direct))


def test_every_exception_type_there_is_has_a_declared_classification() -> None:
    kinds = every_subclass(BaseException)
    assert len(kinds) > 100
    for kind in kinds:
        found = errors._by_type(kind)
        assert found is None or found in CLASSIFICATIONS


def test_a_circle_of_causes_ends() -> None:
    a, b = Unknown(), Unknown()
    a.__cause__, b.__cause__ = b, a
    assert classify(a) == (C.MESSAGE_PROCESSING_ERROR, S.LOW)


class Raises(Exception):
    def __str__(self) -> str:
        raise SystemExit("no text for you")


class NotText(Exception):
    def __str__(self) -> str:
        return 7  # type: ignore[return-value]


class Loud(str):
    def isascii(self) -> bool:
        raise RuntimeError

    def encode(self, *_: object) -> bytes:  # type: ignore[override]
        raise RuntimeError

    def __len__(self) -> int:
        raise RuntimeError

    def __getitem__(self, *_: object) -> str:
        raise RuntimeError


class Lies(Exception):
    def __str__(self) -> str:
        return Loud("canary")


def test_the_text_of_a_hostile_exception_is_safe() -> None:
    assert safe_text(Raises()) == "<Raises whose __str__ raised SystemExit>"
    assert safe_text(NotText()) == "<NotText whose __str__ raised TypeError>"
    assert safe_text(Lies()) == "canary"
    assert type(safe_text(Lies())) is str
    assert safe_text(ValueError("\ud800x")) == "?x"


@given(st.text(), st.integers(1, 50))
def test_text_is_capped_and_can_always_be_written(text: str, cap: int) -> None:
    shown = safe_text(ValueError(text), cap)
    assert len(shown) <= cap
    shown.encode()
    assert all(c.isprintable() or c in "\n\t" for c in shown), "an escape sequence could reach a terminal"
    if len(text) <= cap and text.isascii() and text.isprintable():
        assert shown == text


def test_huge_text_is_cut_before_anything_else_is_done_with_it() -> None:
    assert len(safe_text(ValueError("x" * 50_000_000))) == 1024


def test_a_report_is_plain_values() -> None:
    report = ErrorReport(error_id="e", timestamp=1.0, category=C.TIMEOUT_ERROR, severity=S.HIGH, message="m")
    shown = report.to_dict()
    assert json.loads(json.dumps(shown)) == shown
    assert (shown["category"], shown["severity"]) == ("timeout_error", "high")
