"""One connection to one NATS server, and what its errors mean. Everything here runs on the NATS thread.

The client's own reconnecting is off: a supervisor decides when and where to dial, so a
connection is made once, lost once, and never used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from nats import errors as nats_errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from glassbus.config import Address, Credentials, redact
from glassbus.errors import ConfigurationError, EndpointRefused, EndpointUnreachable, TransportError, safe_text

#: The first server whose behaviour is the one this transport was proved on.
SERVER_MIN = (2, 12, 0)
DEFAULT_PORT = 4222
#: Seconds within which a server must have let us in, answered a request, or stored what it was sent.
CONNECT_S = 3.0
ANSWER_S = 5.0
#: A server that says nothing for two of these is taken for gone, in seconds.
PING_S = 2.0

_NO_RESPONDERS = "503"
_PERMISSION = re.compile(r"permissions violation for (publish|subscription)", re.IGNORECASE)


class StoreRefused(TransportError):
    """The server took the message and said no: certainly not stored. `code` is JetStream's."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"JetStream refused it: {description} ({code})")
        self.code = code

    @property
    def full(self) -> bool:
        """Whether there is no space: in the stream, in the account, or on the server's disk."""
        return self.code in _FULL


# maximum messages/bytes exceeded, insufficient resources, no storage, limits of the account, a write that failed
_FULL = frozenset({10077, 10047, 10023, 10028, 10122, 10120, 10040})


class NotFound(TransportError):
    """The stream has no such message."""


class Link:
    """A connection. `on_lost` is called once when it breaks, and not when `close` ends it."""

    def __init__(self, address: Address, on_lost: Callable[[EndpointUnreachable | EndpointRefused], None]) -> None:
        self.address = address
        self._on_lost = on_lost
        self._client = Client()
        self._up = False
        self._denied = ""
        self._last_error: BaseException | None = None

    @property
    def max_payload(self) -> int:
        """The largest message that the server takes, in bytes."""
        return self._client.max_payload

    async def connect(self, name: str, credentials: Credentials | None) -> None:
        """Raises EndpointUnreachable, EndpointRefused or ConfigurationError."""
        try:
            async with asyncio.timeout(CONNECT_S + 1.0):
                await self._client.connect(
                    servers=[_server(self.address)],
                    name=name,
                    allow_reconnect=False,
                    # Else a refused connection is tried again and again until the time is over.
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=CONNECT_S,  # type: ignore[arg-type] # a float will do
                    ping_interval=PING_S,  # type: ignore[arg-type]
                    max_outstanding_pings=2,
                    error_cb=self._on_error,
                    closed_cb=self._on_closed,
                    pending_size=64 * 1024 * 1024,
                    **_secrets(self.address, credentials),
                    **_tls(self.address),
                )
        except Exception as error:  # noqa: BLE001 - whatever the client raises, it is not connected
            await self.close()
            cause: BaseException = error
            if isinstance(error, nats_errors.NoServersError) and self._last_error is not None:
                cause = self._last_error  # which says why
            raise self._translate(cause) from _without_secrets(cause)
        self._up = True
        version = self._client.connected_server_version
        if (version.major, version.minor, version.patch) < SERVER_MIN:
            await self.close()
            needed = ".".join(map(str, SERVER_MIN))
            raise ConfigurationError(
                f"{self.address} runs nats-server {version.major}.{version.minor}.{version.patch}; "
                f"{needed} or later is needed"
            )

    async def close(self) -> None:
        """Idempotent. Nobody is told of a loss."""
        self._up = False
        with contextlib.suppress(nats_errors.Error, OSError, TimeoutError):  # it is to be gone, and it is
            async with asyncio.timeout(1.0):
                await self._client.close()
        # A client that is refused while it connects may leave its socket open, or close it in a task of its own.
        socket = getattr(self._client, "_transport", None)
        if socket is not None:
            with contextlib.suppress(OSError, TimeoutError):  # as above
                async with asyncio.timeout(1.0):
                    socket.close()
                    await socket.wait_closed()
            # One whose peer reads nothing would wait for ever to have written all.
            writer = getattr(socket, "_io_writer", None)
            if writer is not None:
                writer.transport.abort()

    def fail(self, error: EndpointUnreachable | EndpointRefused) -> None:
        """Take the connection for lost because of what was seen on it."""
        if self._up:
            self._up = False
            self._on_lost(error)

    async def _on_error(self, error: Exception) -> None:
        self._last_error = error
        text = safe_text(error)
        if _PERMISSION.search(text):
            # What we sent was dropped, and there is no answer to wait for.
            self._denied = redact(text)
            self.fail(EndpointRefused(f"{self.address} does not allow it: {self._denied}"))

    async def _on_closed(self) -> None:
        error = self._client.last_error or self._last_error
        if error is None:
            self.fail(EndpointUnreachable(f"the connection to {self.address} ended"))
            return
        translated = self._translate(error)
        if not isinstance(translated, EndpointUnreachable | EndpointRefused):
            translated = EndpointUnreachable(safe_text(translated))
        self.fail(translated)

    def _translate(self, error: BaseException) -> TransportError | ConfigurationError:
        text = redact(safe_text(error, 300))
        if isinstance(error, TransportError | ConfigurationError):
            return error
        if _refuses(error, text):
            return EndpointRefused(f"{self.address} refused us: {text}")
        if isinstance(error, TimeoutError):
            return EndpointUnreachable(f"{self.address} did not answer within {CONNECT_S:.0f} s")
        return EndpointUnreachable(f"{self.address} cannot be reached: {text or type(error).__name__}")

    # Requests

    async def request(
        self, subject: str, payload: bytes, within_s: float = ANSWER_S, headers: dict[str, str] | None = None
    ) -> Msg:
        """Raises EndpointUnreachable when there is no answer, EndpointRefused when it is not allowed."""
        if not self._up:
            raise EndpointUnreachable(f"there is no connection to {self.address}")
        self._denied = ""
        try:
            return await self._client.request(subject, payload, timeout=within_s, headers=headers)
        except nats_errors.NoRespondersError as error:
            raise EndpointUnreachable(
                f"JetStream of {self.address} does not answer: not enabled, or not ready"
            ) from error
        except nats_errors.MaxPayloadError as error:
            raise StoreRefused(10054, f"more than the {self.max_payload} bytes that the server takes") from error
        except TimeoutError as error:
            if self._denied:
                raise EndpointRefused(f"{self.address} does not allow it: {self._denied}") from error
            raise EndpointUnreachable(f"{self.address} did not answer within {within_s:.0f} s") from error
        except (nats_errors.Error, OSError) as error:
            raise self._translate(error) from error

    async def api(self, verb: str, body: dict[str, Any] | None = None, within_s: float = ANSWER_S) -> dict[str, Any]:
        """A request to the JetStream API. Raises NotFound, StoreRefused, and what `request` does."""
        message = await self.request(f"$JS.API.{verb}", json.dumps(body).encode() if body else b"", within_s)
        return _answer(message.data)

    async def store(self, subject: str, payload: bytes, *, behind: int | None = None) -> int:
        """Publish, and wait for the server to have stored it; its sequence number.

        `behind`: only if that is where the last message of the subject is. Raises StoreRefused:
        certainly not stored; anything else: nobody knows.
        """
        headers = None if behind is None else {"Nats-Expected-Last-Subject-Sequence": str(behind)}
        message = await self.request(subject, payload, ANSWER_S, headers)
        return int(_answer(message.data)["seq"])

    async def get(self, stream: str, seq: int) -> bytes:
        """The message at `seq`. Raises NotFound."""
        return _direct(await self.request(f"$JS.API.DIRECT.GET.{stream}", json.dumps({"seq": seq}).encode()))

    async def last(self, stream: str, subject: str) -> tuple[int, bytes]:
        """The last message of `subject`, and where it is. Raises NotFound."""
        message = await self.request(f"$JS.API.DIRECT.GET.{stream}.{subject}", b"")
        data = _direct(message)
        return int((message.headers or {}).get("Nats-Sequence", 0)), data

    async def send(self, subject: str, payload: bytes = b"") -> None:
        """Send without waiting. A broken connection is told elsewhere."""
        with contextlib.suppress(nats_errors.Error, OSError):  # the one who reads the connection says so
            await self._client.publish(subject, payload)

    async def subscribe(self, on_message: Callable[[Msg], Awaitable[None]]) -> tuple[str, Any]:
        """An inbox of our own, and its subscription."""
        inbox = self._client.new_inbox()
        try:
            subscription = await self._client.subscribe(
                inbox, cb=on_message, pending_msgs_limit=-1, pending_bytes_limit=-1
            )
        except (nats_errors.Error, OSError) as error:
            raise self._translate(error) from error
        return inbox, subscription


def _answer(data: bytes) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise TransportError("the server's answer is not JSON; is something else listening there?") from error
    failure = answer.get("error")
    if failure is None:
        return answer
    code, description = int(failure.get("err_code", 0)), str(failure.get("description", ""))
    if failure.get("code") == 404:
        raise NotFound(f"{description} ({code})")
    raise StoreRefused(code, description)


def _direct(message: Msg) -> bytes:
    status = (message.headers or {}).get("Status")
    if status is None:
        return message.data
    if status == "404":
        raise NotFound("the stream has no such message")
    raise EndpointUnreachable(f"the message cannot be read now (status {status})")


def _server(address: Address) -> str:
    """The URL without its credentials, which go another way."""
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"nats://{host or 'localhost'}:{address.port or DEFAULT_PORT}"


def _secrets(address: Address, credentials: Credentials | None) -> dict[str, Any]:
    if credentials is None:
        user, password = address.credentials
        # A URL with one part before the @ gives a token, as for every NATS client.
        credentials = Credentials(user, password) if password is not None else Credentials(token=user)
    if credentials.creds_file is not None:
        return {"user_credentials": _creds_file(credentials.creds_file)}
    if credentials.token is not None:
        return {"token": credentials.token}
    return {"user": credentials.user, "password": credentials.password or ""} if credentials.user is not None else {}


def _creds_file(path: str) -> str:
    if importlib.util.find_spec("nkeys") is None:
        raise ConfigurationError("a NATS credentials file needs the package nkeys: pip install 'nats-py[nkeys]'")
    if not os.access(path, os.R_OK):
        raise EndpointRefused(f"the credentials file {path} cannot be read")
    return path


def _tls(address: Address) -> dict[str, Any]:
    authority = address.options.get("tls_ca", "")
    if not authority and address.options.get("tls") not in ("1", "true"):
        return {}
    try:
        context = ssl.create_default_context(cafile=authority or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"tls_ca of {address} cannot be read: {safe_text(error)}") from error
    return {"tls": context, "tls_hostname": address.host}


def _refuses(error: BaseException, text: str) -> bool:
    return isinstance(error, nats_errors.AuthorizationError | ssl.SSLCertVerificationError | PermissionError) or any(
        words in text.lower() for words in ("authorization violation", "authentication", "permissions violation")
    )


def _without_secrets(error: BaseException) -> BaseException | None:
    """`error` where its text may be shown as the cause of ours."""
    text = safe_text(error)
    return error if redact(text) == text else None
