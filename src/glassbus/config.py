"""Settings and addresses, with credentials that never show."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import msgspec

from glassbus.errors import ConfigurationError, shown
from glassbus.errors import redact as redact  # it is needed below

SCHEMES = ("memory", "sqlite", "nats")
_YEAR_S = 365 * 86400


class Credentials(msgspec.Struct, frozen=True):
    """What a broker is shown to be let in. Neither `str` nor `repr` shows any of it.

    User name and password, or a token, or the path of a NATS credentials file (`.creds`).
    """

    user: str | None = None
    password: str | None = None
    token: str | None = None
    creds_file: str | None = None

    def __repr__(self) -> str:
        return "Credentials(***)"

    __str__ = __repr__


class Address:
    """A transport URL. `str` and `repr` show everything but its credentials and options.

    Raises ConfigurationError, which shows no more of a malformed URL than its scheme:
    nobody can tell which part of it is the password.
    """

    __slots__ = ("_secret", "host", "options", "path", "port", "scheme")

    def __init__(self, url: str) -> None:
        scheme, separator, _ = url.partition("://") if isinstance(url, str) else ("", "", "")
        if not separator or not _SCHEME.fullmatch(scheme):
            raise ConfigurationError("a transport URL has no scheme; write memory:// or sqlite:///path/to/file.db")
        scheme = scheme.lower()
        if scheme not in SCHEMES:
            known = ", ".join(f"{s}://" for s in SCHEMES)
            raise ConfigurationError(f"unknown transport {scheme}://; known are {known}")
        parts = _split(url)
        if parts is None:
            raise ConfigurationError(f"the {scheme}:// URL is malformed; percent-encode what is special in a password")
        self.scheme = scheme
        self.port = parts.port
        self.host = parts.hostname or ""
        self.path = unquote(parts.path)
        self.options = dict(parse_qsl(parts.query, keep_blank_values=True))
        self._secret = (parts.username, parts.password)

    @property
    def credentials(self) -> tuple[str | None, str | None]:
        """User name and password, for the connection alone."""
        return self._secret

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}" if self.port else f"{self.scheme}://{host}{self.path}"

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"


def _split(url: str) -> SplitResult | None:
    """The parts of `url`, or None: what urllib says about a malformed URL quotes it, so it goes no further."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises when it is no number
    except ValueError:
        return None
    return parts


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]{0,31}")


def addresses(url: str | Iterable[str]) -> list[Address]:
    """The failover set that `url` names: one URL, several joined by commas, or a list."""
    if not isinstance(url, str | list | tuple):
        raise ConfigurationError(f"a transport URL is a str, or a list of them, not {type(url).__name__}")
    # A comma joins URLs only before a scheme: passwords and file names have commas too.
    urls = re.split(r",\s*(?=[A-Za-z][A-Za-z0-9+.\-]*://)", url.strip()) if isinstance(url, str) else list(url)
    if not urls or urls == [""]:
        raise ConfigurationError("no transport URL given")
    return [Address(one) for one in urls]


def default_state_dir(urls: list[Address]) -> str | None:
    """Beside the store, where it is a file; None where there is none."""
    path = urls[0].path[1:]
    return f"{path}.state" if urls[0].scheme == "sqlite" and path else None


class KillSwitch(msgspec.Struct, frozen=True):
    """When a failing subscription pauses itself and keeps its messages.

    It trips when, within `window` seconds, at least `minimum` distinct deliveries were
    seen and at least `ratio` of them fail at their latest attempt. After `open_for` seconds it lets
    `probes` deliveries through; all must be handled for it to close. `enabled=False` turns it off.
    """

    window: float = 60.0
    minimum: int = 20
    ratio: float = 0.5
    open_for: float = 3.0
    probes: int = 3
    enabled: bool = True

    def __post_init__(self) -> None:
        if not (
            0 < self.window < math.inf
            and self.minimum >= 1
            and 0 < self.ratio <= 1
            and 0 <= self.open_for < math.inf
            and self.probes >= 1
        ):
            raise ConfigurationError(
                "KillSwitch needs window > 0, minimum >= 1, 0 < ratio <= 1, open_for >= 0 and probes >= 1, all finite"
            )


class Overflow(msgspec.Struct, frozen=True):
    """What a full queue may do once its publishers have waited, before it refuses.

    `displace`: dead-letter pending messages of lower priorities than the one that comes. `expand`:
    grow to so many times its capacity, 1 (not at all) to 1.5, for `expand_for` seconds; it grows again only once all
    that is pending fits into its own capacity again.
    """

    displace: bool = True
    expand: float = 1.5
    expand_for: float = 60.0

    def __post_init__(self) -> None:
        numbers = all(type(n) in (int, float) for n in (self.expand, self.expand_for))
        if not (type(self.displace) is bool and numbers and 1 <= self.expand <= 1.5 and 0 < self.expand_for <= _YEAR_S):
            raise ConfigurationError(
                "Overflow needs displace True or False, 1 <= expand <= 1.5, and expand_for more than 0 seconds, "
                f"at most a year; not {shown(self.displace)}, {shown(self.expand)}, {shown(self.expand_for)}"
            )


class Spool(msgspec.Struct, frozen=True):
    """How much a bus on a broker keeps in a local file of its `state_dir` while the broker cannot be reached.

    A publish that finds `max_messages`, or `max_bytes` of payload, waiting there is refused (`SpoolFull`).
    `enabled=False`: nothing is kept, and publishing fails while the broker is away.
    """

    max_messages: int = 100_000
    max_bytes: int = 256 * 1024 * 1024
    enabled: bool = True

    def __post_init__(self) -> None:
        whole = type(self.max_messages) is int and type(self.max_bytes) is int and type(self.enabled) is bool
        if not whole or self.max_messages < 1 or self.max_bytes < 1:
            raise ConfigurationError("Spool needs max_messages >= 1 and max_bytes >= 1, and enabled True or False")


class Settings(msgspec.Struct, frozen=True):
    """What a bus is made with, checked. Durations in seconds, sizes in bytes."""

    name: str = "default"
    publish_timeout: float = 5.0
    payload_bytes_max: int = 1024 * 1024
    capacity: int = 100_000
    spill_dir: str | None = None
    state_dir: str | None = None
    untrusted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,63}", self.name):
            raise ConfigurationError(
                f"bus name {self.name!r} must be 1 to 64 letters, digits, '-', '_' or '.', not starting with '.'"
            )
        if not 0 <= self.publish_timeout < math.inf:
            raise ConfigurationError(f"publish_timeout must be 0 or more and finite, not {self.publish_timeout}")
        if self.payload_bytes_max < 1 or self.capacity < 1:
            raise ConfigurationError("payload_bytes_max and capacity must be at least 1")
