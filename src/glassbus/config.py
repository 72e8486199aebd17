"""Settings and addresses, with credentials that never show."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from glassbus.errors import ConfigurationError

SCHEMES = ("memory", "sqlite")


class Address:
    """A transport URL. `str` and `repr` show everything but its credentials."""

    __slots__ = ("_secret", "host", "options", "path", "port", "scheme")

    def __init__(self, url: str) -> None:
        if not isinstance(url, str) or "://" not in url:
            raise ConfigurationError(
                f"transport URL {redact(str(url))!r} has no scheme; write memory:// or sqlite:///path/to/file.db"
            )
        try:
            parts = urlsplit(url)
            self.port = parts.port
        except ValueError as error:
            raise ConfigurationError(f"transport URL {redact(url)!r} is malformed: {redact(str(error))}") from None
        self.scheme = parts.scheme
        if self.scheme not in SCHEMES:
            raise ConfigurationError(
                f"unknown transport {self.scheme!r} in {redact(url)!r}; known are "
                + ", ".join(f"{s}://" for s in SCHEMES)
            )
        self.host = parts.hostname or ""
        self.path = unquote(parts.path)
        self.options = dict(parse_qsl(parts.query, keep_blank_values=True))
        self._secret = (parts.username, parts.password)

    @property
    def credentials(self) -> tuple[str | None, str | None]:
        """User name and password, for the connection alone."""
        return self._secret

    def __str__(self) -> str:
        host = f"{self.host}:{self.port}" if self.port else self.host
        return f"{self.scheme}://{host}{self.path}"

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"


_USERINFO = re.compile(r"(?<=://)[^/@\s]*@")


def redact(text: str) -> str:
    """`text` without the credentials of any URL in it."""
    return _USERINFO.sub("***@", text)


def addresses(url: str | Iterable[str]) -> list[Address]:
    """The failover set that `url` names: one URL, several joined by commas, or a list."""
    if isinstance(url, str):
        urls = [part.strip() for part in url.split(",")]
    else:
        urls = list(url)
    if not urls or urls == [""]:
        raise ConfigurationError("no transport URL given")
    return [Address(one) for one in urls]


class KillSwitch(msgspec.Struct, frozen=True):
    """When a failing subscription pauses itself and keeps its messages.

    It trips when, within `window` seconds, at least `minimum` distinct deliveries were
    seen and at least `ratio` of them fail at their latest attempt. After `open_for` seconds it lets
    `probes` deliveries through; all must be handled for it to close.
    """

    window: float = 60.0
    minimum: int = 20
    ratio: float = 0.5
    open_for: float = 3.0
    probes: int = 3
    enabled: bool = True

    def __post_init__(self) -> None:
        if self.window <= 0 or self.minimum < 1 or not 0 < self.ratio <= 1 or self.open_for < 0 or self.probes < 1:
            raise ConfigurationError(
                "KillSwitch needs window > 0, minimum >= 1, 0 < ratio <= 1, open_for >= 0 and probes >= 1"
            )


class Settings(msgspec.Struct, frozen=True):
    """What a bus is made with, checked. Durations in seconds, sizes in bytes."""

    name: str = "default"
    publish_timeout: float = 5.0
    payload_bytes_max: int = 1024 * 1024
    capacity: int = 100_000
    spill_dir: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.\-]{1,64}", self.name):
            raise ConfigurationError(f"bus name {self.name!r} must be 1 to 64 letters, digits, '-', '_' or '.'")
        if self.publish_timeout < 0:
            raise ConfigurationError(f"publish_timeout must be 0 or more, not {self.publish_timeout}")
        if self.payload_bytes_max < 1 or self.capacity < 1:
            raise ConfigurationError("payload_bytes_max and capacity must be at least 1")
