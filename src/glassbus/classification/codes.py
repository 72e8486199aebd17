"""Numbers that exceptions carry: errno, HTTP status, SQLSTATE, and the codes of SQLite, MySQL, gRPC and JetStream.

The reading functions touch attributes of foreign objects, which may raise anything: whoever calls them guards that.
"""

from __future__ import annotations

import errno
from typing import Any

from glassbus.classification.verdicts import (
    ACCESS,
    CONNECTION,
    CORRUPT,
    EXHAUSTED,
    LIMITED,
    MISCONFIGURED,
    PROCESSING,
    TIMEOUT,
    UNREADABLE,
    Classification,
    Finding,
)


def _errnos(verdict: Classification, names: str) -> dict[int, Classification]:
    """Names that this platform does not have are left out."""
    return {getattr(errno, name): verdict for name in names.split() if hasattr(errno, name)}


_BY_ERRNO: dict[int, Classification] = {
    **_errnos(
        CONNECTION,
        "ECONNREFUSED ECONNRESET ECONNABORTED EPIPE ENETDOWN ENETUNREACH ENETRESET EHOSTDOWN EHOSTUNREACH ENOTCONN "
        "ESHUTDOWN EADDRNOTAVAIL EPROTO ENOLINK ECOMM EIO ESTALE EREMOTEIO ENODEV ENXIO",
    ),
    **_errnos(TIMEOUT, "ETIMEDOUT ETIME"),
    **_errnos(ACCESS, "EACCES EPERM EROFS EKEYEXPIRED EKEYREVOKED EKEYREJECTED"),
    **_errnos(EXHAUSTED, "ENOSPC EDQUOT ENOMEM EMFILE ENFILE"),
    **_errnos(LIMITED, "EAGAIN ENOBUFS ENOLCK EUSERS"),
    **_errnos(MISCONFIGURED, "EADDRINUSE EAFNOSUPPORT EPROTONOSUPPORT EPFNOSUPPORT ENOEXEC ENOSYS"),
}


def by_errno(error: BaseException) -> Finding:
    """An OSError that has no type of its own: by its number, else as a failure of this piece of work."""
    number = getattr(error, "errno", None)
    return _BY_ERRNO.get(number, PROCESSING) if type(number) is int else PROCESSING


def of_status(status: object) -> Classification | None:
    """An HTTP status of 400 to 599.

    429 asks us to send less, which is what shedding load does. 502 and 503 say that what we want is not there now,
    like a refused connection. Any other status is about this request: 500 is the other side's bug, met with it.
    """
    if not isinstance(status, int) or not 400 <= status <= 599:
        return None
    return _BY_STATUS.get(int(status), PROCESSING)


_BY_STATUS: dict[int, Classification] = {
    401: ACCESS,
    403: ACCESS,
    407: ACCESS,
    511: ACCESS,
    408: TIMEOUT,
    504: TIMEOUT,
    429: LIMITED,
    507: EXHAUSTED,
    415: UNREADABLE,
    502: CONNECTION,
    503: CONNECTION,
    521: CONNECTION,
    522: CONNECTION,
    523: CONNECTION,
    524: TIMEOUT,
}


_STATUS = ("status_code", "status", "http_status")
#: Attributes by which `by_status` can find anything.
STATUS_NAMES = frozenset({"response", *_STATUS})


def by_status(error: BaseException) -> Finding:
    """By the HTTP status that it, or its `response`, carries."""
    response = getattr(error, "response", None)
    for holder in (error,) if response is None else (response, error):
        for name in _STATUS:
            found = of_status(getattr(holder, name, None))
            if found is not None:
                return found
    return None


def by_http_code(error: BaseException) -> Finding:
    """By an HTTP status in `code`, as urllib, JetStream and Google's libraries have it."""
    return of_status(getattr(error, "code", None))


# https://www.postgresql.org/docs/current/errcodes-appendix.html
_BY_SQLSTATE: dict[str, Classification] = {
    "08": CONNECTION,
    "0B": CONNECTION,
    "28": ACCESS,
    "42501": ACCESS,
    "3D": MISCONFIGURED,
    "F0": MISCONFIGURED,
    "53": EXHAUSTED,
    "53300": LIMITED,
    "54": LIMITED,
    "55P03": TIMEOUT,
    "57014": TIMEOUT,
    "25P03": TIMEOUT,
    "57": CONNECTION,
    "58": CONNECTION,
    "XX001": CORRUPT,
    "XX002": CORRUPT,
    "22P02": UNREADABLE,
    "22P03": UNREADABLE,
    "22021": UNREADABLE,
}


def by_sqlstate(error: BaseException) -> Finding:
    """PostgreSQL and others: five characters, the first two of which are its class."""
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if not isinstance(state, str) or len(state) != 5:
        return None
    return _BY_SQLSTATE.get(state) or _BY_SQLSTATE.get(state[:2]) or PROCESSING


# https://www.sqlite.org/rescode.html: primary result codes. BUSY and LOCKED say that another has it now.
_BY_SQLITE: dict[int, Classification] = {
    1: PROCESSING,  # ERROR: the statement, or the schema, is wrong
    3: ACCESS,  # PERM
    5: CONNECTION,  # BUSY
    6: CONNECTION,  # LOCKED
    7: EXHAUSTED,  # NOMEM
    8: ACCESS,  # READONLY
    9: TIMEOUT,  # INTERRUPT, which is how statements are given a time limit
    10: CONNECTION,  # IOERR
    11: CORRUPT,  # CORRUPT
    13: EXHAUSTED,  # FULL
    14: MISCONFIGURED,  # CANTOPEN
    17: PROCESSING,  # SCHEMA
    18: PROCESSING,  # TOOBIG
    19: PROCESSING,  # CONSTRAINT
    20: PROCESSING,  # MISMATCH
    21: PROCESSING,  # MISUSE
    22: LIMITED,  # NOLFS
    23: ACCESS,  # AUTH
    25: PROCESSING,  # RANGE
    26: CORRUPT,  # NOTADB
}
_SQLITE_IOERR_NOMEM = 10 | 12 << 8


def by_sqlite(error: BaseException) -> Finding:
    """The standard library's sqlite3, from Python 3.11 on."""
    code = getattr(error, "sqlite_errorcode", None)
    if type(code) is not int:
        return None
    return EXHAUSTED if code == _SQLITE_IOERR_NOMEM else _BY_SQLITE.get(code & 0xFF)


# https://dev.mysql.com/doc/mysql-errors/8.0/en/
_BY_MYSQL: dict[int, Classification] = {
    **dict.fromkeys((1044, 1045, 1142, 1143, 1227, 1698), ACCESS),
    **dict.fromkeys((1021, 1037, 1038, 1041, 1114), EXHAUSTED),
    **dict.fromkeys((1040, 1203, 1226), LIMITED),
    **dict.fromkeys((1205, 1317, 3024), TIMEOUT),
    **dict.fromkeys((1053, 1927, 2002, 2003, 2005, 2006, 2013, 2055), CONNECTION),
    **dict.fromkeys((1046, 1049, 1146), MISCONFIGURED),
    **dict.fromkeys((1062, 1064, 1213), PROCESSING),
}


def by_mysql(error: BaseException) -> Finding:
    """PyMySQL, mysqlclient and their kin: a number first."""
    number = error.args[0] if error.args else None
    return _BY_MYSQL.get(number) if type(number) is int else None


# https://grpc.io/docs/guides/status-codes/
_BY_GRPC: dict[str, Classification] = {
    "UNAVAILABLE": CONNECTION,
    "ABORTED": CONNECTION,
    "CANCELLED": TIMEOUT,
    "DEADLINE_EXCEEDED": TIMEOUT,
    "UNAUTHENTICATED": ACCESS,
    "PERMISSION_DENIED": ACCESS,
    "RESOURCE_EXHAUSTED": LIMITED,
    "UNIMPLEMENTED": MISCONFIGURED,
    "DATA_LOSS": CORRUPT,
}


def by_grpc(error: BaseException) -> Finding:
    """`code()` gives a status with a name."""
    code: Any = getattr(error, "code", None)
    name = getattr(code(), "name", None) if callable(code) else None
    return _BY_GRPC.get(name, PROCESSING) if isinstance(name, str) else None


# https://github.com/nats-io/nats-server/blob/main/server/errors.json
_BY_JETSTREAM: dict[int, Classification] = {
    10023: EXHAUSTED,  # insufficient resources
    10028: EXHAUSTED,  # memory resources exceeded
    10047: EXHAUSTED,  # storage resources exceeded
    10002: LIMITED,  # resource limits of the account
    10039: MISCONFIGURED,  # JetStream is not enabled for the account
    10076: MISCONFIGURED,  # JetStream is not enabled
}


def by_jetstream(error: BaseException) -> Finding:
    """`err_code` of the server, else its `code`, which is an HTTP status."""
    number = getattr(error, "err_code", None)
    known = _BY_JETSTREAM.get(number) if type(number) is int else None
    return known or by_http_code(error)


def by_aws(error: BaseException) -> Finding:
    """botocore's ClientError. Throttling comes as 400, so the name of the error counts before the status."""
    response: Any = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None
    name = str(response.get("Error", {}).get("Code", ""))
    if any(word in name for word in ("Throttl", "TooManyRequests", "LimitExceeded", "ThroughputExceeded", "SlowDown")):
        return LIMITED
    if any(word in name for word in ("AccessDenied", "ExpiredToken", "InvalidClientTokenId", "UnrecognizedClient")):
        return ACCESS
    return of_status(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
