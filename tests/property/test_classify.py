"""What kind of failure it is, told from its type; and the text of exceptions, however hostile."""

from __future__ import annotations

import asyncio
import concurrent.futures.process
import configparser
import contextlib
import errno
import http.client
import json
import multiprocessing
import pickle
import queue
import smtplib
import socket
import sqlite3
import ssl
import struct
import subprocess
import threading
import tomllib
import urllib.error
import warnings
import zlib
from collections.abc import Callable
from xml.etree import ElementTree

import apsw
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus import classification, errors
from glassbus.classification import (
    CLASSIFICATIONS,
    UNKNOWN,
    Classification,
    Classifier,
    Rule,
    classify,
    codes,
    standing_of,
    verdicts,
)
from glassbus.classification.families import FAMILIES
from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity, safe_text
from glassbus.record.fingerprint import FailureSites

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


def foreign(module: str, name: str, base: type[BaseException] = Exception, **attributes: object) -> BaseException:
    """An exception of a package that need not be installed."""
    return type(name, (base,), {"__module__": module, **attributes})()


def foreign_below(module: str, *names: str) -> BaseException:
    """The last of `names`, each a subclass of the one before."""
    kind: type[BaseException] = Exception
    for name in names:
        kind = type(name, (kind,), {"__module__": module})
    return kind()


def no_init(*_: object) -> None:
    """For types whose own makes files and the like."""


class Attempt:
    def __init__(self, raised: BaseException) -> None:
        self._raised = raised

    def exception(self) -> BaseException:
        return self._raised


class Response:
    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


class Status:
    def __init__(self, name: str) -> None:
        self.name = name


def raised_by(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def in_database(*statements: str, path: str = ":memory:") -> Callable[[], object]:
    def run() -> None:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
            for statement in statements:
                database.execute(statement)

    return run


def circular() -> object:
    ring: list[object] = []
    ring.append(ring)
    return json.dumps(ring)


@pytest.mark.parametrize(
    ("error", "category"),
    [
        # The operating system, by errno
        (OSError(errno.ENOSPC, ""), C.RESOURCE_EXHAUSTION),
        (OSError(errno.EDQUOT, ""), C.RESOURCE_EXHAUSTION),
        (OSError(errno.EMFILE, ""), C.RESOURCE_EXHAUSTION),
        (OSError(errno.ENFILE, ""), C.RESOURCE_EXHAUSTION),
        (OSError(errno.ENOMEM, ""), C.RESOURCE_EXHAUSTION),
        (OSError(errno.EAGAIN, ""), C.RESOURCE_EXHAUSTION),
        (OSError(errno.EACCES, ""), C.AUTHENTICATION_ERROR),
        (OSError(errno.EPERM, ""), C.AUTHENTICATION_ERROR),
        (OSError(errno.EROFS, ""), C.AUTHENTICATION_ERROR),
        (OSError(errno.ECONNREFUSED, ""), C.CONNECTION_ERROR),
        (OSError(errno.EPIPE, ""), C.CONNECTION_ERROR),
        (OSError(errno.ENETUNREACH, ""), C.CONNECTION_ERROR),
        (OSError(errno.EHOSTUNREACH, ""), C.CONNECTION_ERROR),
        (OSError(errno.EIO, ""), C.CONNECTION_ERROR),
        (OSError(errno.ETIMEDOUT, ""), C.TIMEOUT_ERROR),
        (OSError(errno.EADDRINUSE, ""), C.CONFIGURATION_ERROR),
        (OSError(errno.ENOENT, ""), C.MESSAGE_PROCESSING_ERROR),
        (OSError("no number"), C.MESSAGE_PROCESSING_ERROR),
        # The standard library
        (raised_by(lambda: json.dumps(object())), C.SERIALIZATION_ERROR),
        (raised_by(circular), C.SERIALIZATION_ERROR),
        (raised_by(lambda: json.dumps(object(), default=lambda _: int("x"))), C.MESSAGE_PROCESSING_ERROR),
        (raised_by(lambda: pickle.dumps(threading.Lock())), C.SERIALIZATION_ERROR),
        (raised_by(lambda: pickle.dumps(lambda: 0)), C.SERIALIZATION_ERROR),
        (raised_by(lambda: int("x")), C.MESSAGE_PROCESSING_ERROR),
        (raised_by(lambda: len(5)), C.MESSAGE_PROCESSING_ERROR),  # type: ignore[arg-type]
        (raised_by(lambda: struct.unpack("i", b"")), C.SERIALIZATION_ERROR),
        (raised_by(lambda: zlib.decompress(b"x")), C.SERIALIZATION_ERROR),
        (raised_by(lambda: ElementTree.XML("<")), C.SERIALIZATION_ERROR),
        (raised_by(lambda: tomllib.loads("=")), C.CONFIGURATION_ERROR),
        (raised_by(lambda: configparser.ConfigParser().get("a", "b")), C.CONFIGURATION_ERROR),
        (raised_by(queue.Queue[int](1).get_nowait), C.MESSAGE_PROCESSING_ERROR),  # Empty: control flow, if anything
        (queue.Full(), C.QUEUE_OVERFLOW),
        (concurrent.futures.TimeoutError(), C.TIMEOUT_ERROR),
        (concurrent.futures.process.BrokenProcessPool(), C.RESOURCE_EXHAUSTION),
        (subprocess.TimeoutExpired("x", 1), C.TIMEOUT_ERROR),
        (subprocess.CalledProcessError(1, "x"), C.MESSAGE_PROCESSING_ERROR),
        (subprocess.CalledProcessError(-9, "x"), C.RESOURCE_EXHAUSTION),
        (http.client.BadStatusLine(""), C.CONNECTION_ERROR),
        (urllib.error.URLError(ConnectionRefusedError()), C.CONNECTION_ERROR),
        (urllib.error.URLError(TimeoutError()), C.TIMEOUT_ERROR),
        (smtplib.SMTPAuthenticationError(535, "no"), C.AUTHENTICATION_ERROR),
        (smtplib.SMTPServerDisconnected(), C.CONNECTION_ERROR),
        (asyncio.IncompleteReadError(b"", 1), C.CONNECTION_ERROR),
        (multiprocessing.AuthenticationError(), C.AUTHENTICATION_ERROR),
        (foreign("ssl", "X", ssl.SSLError, reason="TLSV1_ALERT_UNKNOWN_CA"), C.AUTHENTICATION_ERROR),
        (SystemError(), C.MESSAGE_PROCESSING_ERROR),
        # SQLite, both ways in
        (
            raised_by(in_database("CREATE TABLE t (x UNIQUE)", *["INSERT INTO t VALUES (1)"] * 2)),
            C.MESSAGE_PROCESSING_ERROR,
        ),
        (raised_by(in_database("nonsense")), C.MESSAGE_PROCESSING_ERROR),
        (raised_by(in_database("SELECT 1", path="/nowhere/at/all.db")), C.CONFIGURATION_ERROR),
        (
            raised_by(in_database("PRAGMA max_page_count = 1", "CREATE TABLE t (x)", "CREATE TABLE u (x)")),
            C.RESOURCE_EXHAUSTION,
        ),
        (raised_by(in_database("PRAGMA query_only = 1", "CREATE TABLE t (x)")), C.AUTHENTICATION_ERROR),
        (sqlite3.OperationalError("without a number"), C.CONNECTION_ERROR),
        (foreign("x", "Locked", sqlite3.OperationalError, sqlite_errorcode=261), C.CONNECTION_ERROR),
        (foreign("x", "Damaged", sqlite3.DatabaseError, sqlite_errorcode=11), C.CONNECTION_ERROR),
        (foreign("x", "NoMemory", sqlite3.OperationalError, sqlite_errorcode=3082), C.RESOURCE_EXHAUSTION),
        (apsw.BusyError(), C.CONNECTION_ERROR),
        (apsw.FullError(), C.RESOURCE_EXHAUSTION),
        (apsw.CorruptError(), C.CONNECTION_ERROR),
        (apsw.ReadOnlyError(), C.AUTHENTICATION_ERROR),
        (apsw.CantOpenError(), C.CONFIGURATION_ERROR),
        (apsw.ConstraintError(), C.MESSAGE_PROCESSING_ERROR),
        (apsw.IOError(), C.CONNECTION_ERROR),
        # Other stores
        (foreign("psycopg", "OperationalError"), C.CONNECTION_ERROR),
        (foreign("psycopg.errors", "X", sqlstate="53100"), C.RESOURCE_EXHAUSTION),
        (foreign("psycopg2.errors", "X", pgcode="28P01"), C.AUTHENTICATION_ERROR),
        (foreign("asyncpg.exceptions", "X", sqlstate="57014"), C.TIMEOUT_ERROR),
        (foreign("asyncpg.exceptions", "X", sqlstate="57P01"), C.CONNECTION_ERROR),
        (foreign("asyncpg.exceptions", "X", sqlstate="23505"), C.MESSAGE_PROCESSING_ERROR),
        (foreign("pymysql.err", "OperationalError", args=(1205, "")), C.TIMEOUT_ERROR),
        (foreign("pymysql.err", "OperationalError", args=(1045, "")), C.AUTHENTICATION_ERROR),
        (foreign("pymysql.err", "OperationalError"), C.CONNECTION_ERROR),
        (foreign("sqlalchemy.exc", "OperationalError", orig=apsw.FullError()), C.RESOURCE_EXHAUSTION),
        (foreign("sqlalchemy.exc", "TimeoutError"), C.TIMEOUT_ERROR),
        (
            foreign_below("redis.exceptions", "RedisError", "ConnectionError", "MaxConnectionsError"),
            C.RESOURCE_EXHAUSTION,
        ),
        (
            foreign_below("redis.exceptions", "RedisError", "ConnectionError", "AuthenticationError"),
            C.AUTHENTICATION_ERROR,
        ),
        (foreign_below("redis.exceptions", "RedisError", "ConnectionError", "Newer"), C.CONNECTION_ERROR),
        (foreign("redis.exceptions", "TimeoutError"), C.TIMEOUT_ERROR),
        (foreign("pymongo.errors", "ServerSelectionTimeoutError"), C.TIMEOUT_ERROR),
        # RabbitMQ
        (
            foreign_below("aiormq.exceptions", "AMQPError", "AMQPConnectionError", "ConnectionClosed"),
            C.CONNECTION_ERROR,
        ),
        (foreign_below("aiormq.exceptions", "AMQPError", "ProbableAuthenticationError"), C.AUTHENTICATION_ERROR),
        (foreign("aiormq.exceptions", "ChannelPreconditionFailed"), C.CONFIGURATION_ERROR),
        (foreign("aiormq.exceptions", "PublishError"), C.QUEUE_OVERFLOW),
        (foreign("pamqp.exceptions", "AMQPAccessRefused"), C.AUTHENTICATION_ERROR),
        (foreign("pika.exceptions", "AMQPHeartbeatTimeout"), C.TIMEOUT_ERROR),
        # HTTP and remote calls
        (foreign("requests.exceptions", "ConnectionError", OSError), C.CONNECTION_ERROR),
        (foreign("requests.exceptions", "ReadTimeout", OSError), C.MESSAGE_PROCESSING_ERROR),  # its base has the name
        (foreign_below("requests.exceptions", "RequestException", "Timeout", "ReadTimeout"), C.TIMEOUT_ERROR),
        (foreign("requests.exceptions", "HTTPError", response=Response(403)), C.AUTHENTICATION_ERROR),
        (foreign("httpx", "HTTPStatusError", response=Response(429)), C.RESOURCE_EXHAUSTION),
        (foreign("aiohttp.client_exceptions", "ClientResponseError", status=503), C.CONNECTION_ERROR),
        (
            foreign("urllib.error", "HTTPError", urllib.error.URLError, code=504, reason="late", __init__=no_init),
            C.TIMEOUT_ERROR,
        ),
        (foreign("some.sdk", "ApiError", status_code=401), C.AUTHENTICATION_ERROR),
        (foreign("some.sdk", "ApiError", status_code=200), C.MESSAGE_PROCESSING_ERROR),
        (foreign("some.sdk", "ApiError", status="failed"), C.MESSAGE_PROCESSING_ERROR),
        (foreign("some.sdk", "ApiError", response=Response(500)), C.MESSAGE_PROCESSING_ERROR),
        (foreign("grpc._channel", "X", code=lambda _: Status("UNAVAILABLE")), C.CONNECTION_ERROR),
        (foreign("grpc.aio._call", "X", code=lambda _: Status("DEADLINE_EXCEEDED")), C.TIMEOUT_ERROR),
        (
            foreign("botocore.exceptions", "ClientError", response={"Error": {"Code": "ThrottlingException"}}),
            C.RESOURCE_EXHAUSTION,
        ),
        (foreign("urllib3.exceptions", "MaxRetryError", reason=TimeoutError()), C.TIMEOUT_ERROR),
        (foreign("tenacity", "RetryError", last_attempt=Attempt(PermissionError())), C.AUTHENTICATION_ERROR),
        # Serializers and settings
        (foreign("yaml.error", "YAMLError"), C.SERIALIZATION_ERROR),
        (foreign("pydantic_core._pydantic_core", "ValidationError", ValueError), C.SERIALIZATION_ERROR),
        (foreign("pydantic_settings.exceptions", "SettingsError", ValueError), C.CONFIGURATION_ERROR),
        (foreign("google.protobuf.message", "DecodeError"), C.SERIALIZATION_ERROR),
        # Ours
        (errors.StoreReadOnly(), C.AUTHENTICATION_ERROR),
        (errors.EndpointRefused(), C.AUTHENTICATION_ERROR),
        (errors.SpoolFull(), C.QUEUE_OVERFLOW),
        (errors.BusOverloaded(), C.RESOURCE_EXHAUSTION),
        (errors.StoreTooNew(), C.CONFIGURATION_ERROR),
        (caused(errors.PublishUncertain("m", "x"), errors.StorageFull()), C.RESOURCE_EXHAUSTION),
        (errors.PublishUncertain("m", "x"), C.CONNECTION_ERROR),
    ],
    ids=lambda v: f"{type(v).__module__}.{type(v).__name__}" if isinstance(v, BaseException) else v.value,
)
def test_families_land_where_an_engineer_expects(error: BaseException, category: C) -> None:
    assert classify(error)[0] is category
    assert classify(error) in CLASSIFICATIONS


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("NoServersError", C.CONNECTION_ERROR),
        ("NoRespondersError", C.CONNECTION_ERROR),
        ("StaleConnectionError", C.CONNECTION_ERROR),
        ("UnexpectedEOF", C.CONNECTION_ERROR),
        ("TimeoutError", C.TIMEOUT_ERROR),
        ("FlushTimeoutError", C.TIMEOUT_ERROR),
        ("AuthorizationError", C.AUTHENTICATION_ERROR),
        ("InvalidUserCredentialsError", C.AUTHENTICATION_ERROR),
        ("SlowConsumerError", C.QUEUE_OVERFLOW),
        ("OutboundBufferLimitError", C.QUEUE_OVERFLOW),
        ("MaxPayloadError", C.SERIALIZATION_ERROR),
        ("SecureConnRequiredError", C.CONFIGURATION_ERROR),
        ("BadSubjectError", C.MESSAGE_PROCESSING_ERROR),
    ],
)
def test_the_real_errors_of_nats(name: str, category: C) -> None:
    nats_errors = pytest.importorskip("nats.errors")
    kind = getattr(nats_errors, name)
    assert classify(kind.__new__(kind))[0] is category


def test_the_real_errors_of_jetstream() -> None:
    js = pytest.importorskip("nats.js.errors")
    assert classify(js.APIError(code=503, err_code=10008))[0] is C.CONNECTION_ERROR
    assert classify(js.APIError(code=500, err_code=10047))[0] is C.RESOURCE_EXHAUSTION
    assert classify(js.NotFoundError(code=404))[0] is C.MESSAGE_PROCESSING_ERROR
    assert classify(js.NoStreamResponseError())[0] is C.CONNECTION_ERROR


def test_every_declared_pair_can_come_out_and_no_other() -> None:
    """Telemetry makes a series for each pair before the first error, so none may be missing or idle."""
    known = {verdict for verdict in vars(verdicts).values() if type(verdict) is tuple}
    assert known == CLASSIFICATIONS
    answers = {answer for answer in classification._BY_TYPE.values() if isinstance(answer, tuple)}
    answers |= {answer for family in FAMILIES.values() for answer in family.names.values()}
    for name, table in vars(codes).items():
        if name.startswith("_BY_"):
            answers |= set(table.values())
    assert answers | {verdicts.UNKNOWN} == CLASSIFICATIONS


@given(st.integers(-300, 10_300), st.sampled_from(sorted(FAMILIES)))
def test_any_number_on_any_foreign_exception_has_a_declared_answer(number: int, family: str) -> None:
    numbers = ("errno", "status", "status_code", "code", "err_code", "sqlite_errorcode", "returncode")
    for name in numbers:
        assert classify(foreign(family, "X", **{name: number})) in CLASSIFICATIONS
        assert classify(foreign("x", "X", OSError, **{name: number})) in CLASSIFICATIONS
    assert classify(foreign(family, "X", args=(number,), sqlstate=f"{number:05}")) in CLASSIFICATIONS


def while_handling(cause: BaseException, error: BaseException, *, hidden: bool = False) -> BaseException:
    try:
        try:
            raise cause
        except BaseException:
            if hidden:
                raise error from None
            raise error  # noqa: B904 - without `from`, which is what is tried
    except BaseException as raised:
        return raised


def test_what_was_being_handled_counts_when_nothing_else_is_known() -> None:
    assert classify(while_handling(ConnectionError(), Unknown()))[0] is C.CONNECTION_ERROR
    assert classify(while_handling(ConnectionError(), Unknown(), hidden=True))[1] is S.LOW
    assert classify(while_handling(ConnectionError(), KeyError()))[0] is C.MESSAGE_PROCESSING_ERROR
    assert classify(while_handling(ConnectionError(), caused(Unknown(), TimeoutError())))[0] is C.TIMEOUT_ERROR


def hostile(_: object) -> object:
    raise SystemExit("do not look at me")


class Touchy(Exception):
    response = status_code = status = property(hostile)


class TouchyCode(OSError):
    errno = property(hostile)  # type: ignore[assignment]


class NoModule(Exception):
    __module__ = 5  # type: ignore[assignment]


def test_a_hostile_exception_is_unknown_and_raises_nothing() -> None:
    assert classify(Touchy()) == UNKNOWN
    assert classify(TouchyCode()) == UNKNOWN
    assert classify(NoModule()) == UNKNOWN
    assert classify(caused(Touchy(), TimeoutError()))[0] is C.TIMEOUT_ERROR, "what it was raised from still counts"


def test_a_tangle_of_groups_and_causes_ends_soon() -> None:
    members: list[Exception] = [Unknown() for _ in range(200)]
    group = ExceptionGroup("g", members)
    looked = 0

    class Counted(Exception):
        @property
        def response(self) -> None:
            nonlocal looked
            looked += 1

    for member in members:
        member.__cause__ = ExceptionGroup("h", [Counted() for _ in range(200)])
        member.__cause__.__cause__ = group
    assert classify(group) == UNKNOWN
    assert looked < 100


def rule_that(answer: object) -> Rule:
    def rule(_: BaseException) -> Classification | None:
        if isinstance(answer, BaseException):
            raise answer
        return answer  # type: ignore[return-value]

    return rule


MINE = (C.CONFIGURATION_ERROR, S.LOW)


def test_the_first_rule_with_an_answer_decides() -> None:
    classifier = Classifier((rule_that(None), rule_that(MINE), rule_that((C.TIMEOUT_ERROR, S.HIGH))))
    assert classifier(ValueError()) == MINE
    assert Classifier((rule_that(None),))(ValueError()) == classify(ValueError())


@pytest.mark.parametrize(
    "answer",
    [SystemExit(), "high", ("no such category", "low"), (C.TIMEOUT_ERROR,), 7, (None, None)],
    ids=repr,
)
def test_a_rule_that_raises_or_lies_is_passed_over_and_told(answer: object) -> None:
    told: list[tuple[Rule, BaseException]] = []
    bad = rule_that(answer)
    classifier = Classifier((bad, rule_that(MINE)), lambda rule, error: told.append((rule, error)))
    assert classifier(ValueError()) == MINE
    assert [rule for rule, _ in told] == [bad]


def test_a_rule_may_answer_in_plain_words() -> None:
    found = Classifier((rule_that(("timeout_error", "low")),))(ValueError())
    assert found == (C.TIMEOUT_ERROR, S.LOW)
    assert isinstance(found[0], ErrorCategory)
    assert isinstance(found[1], ErrorSeverity)


def test_the_same_line_may_fail_in_different_ways() -> None:
    """A report's category is of this error, not of the first one that was raised at its line."""
    sites = FailureSites()

    def fail(number: int) -> ErrorCategory:
        try:
            raise OSError(number, "")
        except OSError as error:
            return sites.describe(error, error_id="", at=0.0, component="handler", context={}).category

    assert [fail(n) for n in (errno.ENOSPC, errno.EIO)] == [C.RESOURCE_EXHAUSTION, C.CONNECTION_ERROR]


def every_subclass(kind: type[BaseException]) -> set[type[BaseException]]:
    direct = type.__subclasses__(kind)
    return set(direct).union(*map(every_subclass, direct))


def test_every_exception_type_there_is_has_a_declared_classification() -> None:
    seen = 0
    for kind in every_subclass(BaseException):
        with contextlib.suppress(TypeError), warnings.catch_warnings():  # a few cannot be made without arguments
            warnings.simplefilter("ignore", DeprecationWarning)  # nor a few without a warning of their package
            error = kind.__new__(kind)
            seen += 1
            assert classify(error) in CLASSIFICATIONS
    assert seen > 100


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


# What is kept for a failure site


class Told(Exception):
    """Carries its status as an attribute of its own."""

    def __init__(self, status: int | None = None) -> None:
        if status is not None:
            self.status_code = status


class Always503(Exception):
    status = 503


class Computed(Exception):
    @property
    def http_status(self) -> int:
        return 503


class Anything(Exception):
    def __getattr__(self, name: str) -> int:
        return 503


def describe(sites: FailureSites, error: BaseException) -> Classification:
    report = sites.describe(error, error_id="1", at=1.0, component="handler", context={})
    return report.category, report.severity


def within(error: BaseException, context: BaseException) -> BaseException:
    error.__context__ = context
    return error


@pytest.mark.parametrize(
    "errors",
    [
        (OSError(errno.ENOSPC, "full"), OSError(errno.EACCES, "no"), OSError(errno.ENOSPC, "full")),
        (TypeError("odd"), TypeError("cannot pickle '_thread.lock' object"), TypeError("odd")),
        (TypeError("cannot pickle 'module' object"), TypeError("odd")),
        (Told(), Told(401), Told(), Told(503)),
        (Told(429), Told()),
        (Unknown("a"), within(Unknown("b"), TimeoutError()), Unknown("c"), within(Unknown("d"), PermissionError())),
        (within(Unknown("a"), TimeoutError()), Unknown("b")),
        (ExceptionGroup("g", [TimeoutError()]), ExceptionGroup("g", [PermissionError()])),
        (Always503(), Computed(), Anything()),
        (ssl.SSLError(1, "x"), ssl.SSLError(1, "y")),
        (json.JSONDecodeError("x", "", 0), ValueError("y"), UnicodeDecodeError("utf-8", b"", 0, 1, "z")),
    ],
    ids=lambda errors: type(errors[0]).__name__,
)
def test_one_site_may_raise_what_is_classified_in_several_ways(errors: tuple[BaseException, ...]) -> None:
    """What is kept of a site never answers for a failure that says something else."""
    sites = FailureSites()

    def raised(error: BaseException) -> BaseException:
        held = error.__context__
        try:
            raise error
        except BaseException as caught:
            caught.__context__ = held
            return caught

    assert [describe(sites, raised(error)) for error in errors] == [classify(error) for error in errors]


@pytest.mark.parametrize("error", [ValueError("x"), TimeoutError(), OwnConnectionError(), Unknown("x"), KeyError(1)])
def test_most_sites_are_classified_once(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = FailureSites()
    first = describe(sites, error)
    monkeypatch.setattr(sites, "classify", None)  # would raise, and be told as unknown
    assert describe(sites, error) == first == classify(error)


def test_a_rule_is_asked_about_each_failure() -> None:
    """The same site, another answer: a rule may look at the instance, at the time, at anything."""
    answers = [verdicts.TIMEOUT, verdicts.ACCESS, None]
    sites = FailureSites((lambda _error: answers.pop(0),))
    assert [describe(sites, ValueError("x")) for _ in range(3)] == [
        verdicts.TIMEOUT,
        verdicts.ACCESS,
        verdicts.PROCESSING,
    ]


def test_nothing_is_kept_of_what_may_say_something_else() -> None:
    for error in (OSError(2, "x"), Always503(), Computed(), Anything(), ExceptionGroup("g", [ValueError()])):
        assert standing_of(error) is None, error
