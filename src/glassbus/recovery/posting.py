"""One HTTP POST to a server that may be slow, broken or hostile: bounded in time, and nothing of its answer is used.

Only the status counts. Redirects are not followed, proxies of the environment are not asked, the body is
not read, and neither the URL nor anything the server said is in an error's text.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import re
import socket
import ssl
import threading
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from glassbus.errors import ConfigurationError, type_name

#: The whole of a request, as a multiple of the timeout that each of its steps has.
TOTAL = 3
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")


class NotDelivered(Exception):
    """The server did not say that it took the request. Shows nothing that came from it but its status."""


class Target:
    """Where to post: an http or https URL, taken apart. `str` and `repr` show scheme, host and port alone: a secret
    may be in the path or the query of a webhook as well as before the `@`.

    Raises ConfigurationError, which shows nothing of the URL.
    """

    __slots__ = ("headers", "host", "path", "port", "secure")

    def __init__(self, url: object, *, below: str = "", headers: Mapping[str, str] | None = None) -> None:
        problem = "the URL of a channel must be http://host[:port]/… or https://host[:port]/…"
        if not isinstance(url, str) or not url.isascii() or not url.isprintable() or " " in url:
            raise ConfigurationError(f"{problem}, in printable ASCII without blanks")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise ConfigurationError(f"{problem}; this one is malformed") from None
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigurationError(problem)
        if parts.fragment or (below and parts.query):
            raise ConfigurationError(f"{problem}, without a {'fragment' if parts.fragment else 'query'}")
        self.secure = parts.scheme == "https"
        self.host = host
        self.port = port or (443 if self.secure else 80)
        self.path = (parts.path.rstrip("/") + below if below else parts.path or "/") + (
            f"?{parts.query}" if parts.query else ""
        )
        self.headers = _checked({} if headers is None else headers)
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self.headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}"

    def __repr__(self) -> str:
        return f"Target({str(self)!r})"


def _checked(headers: object) -> dict[str, str]:
    if not isinstance(headers, Mapping):
        raise ConfigurationError("the headers of a channel must be a dict of str to str")
    for name, value in headers.items():
        fine = isinstance(name, str) and _HEADER_NAME.fullmatch(name) and isinstance(value, str)
        if not fine or not value.isascii() or not value.isprintable():
            raise ConfigurationError("a header of a channel has a name or a value that HTTP cannot carry")
    return dict(headers)


def post(target: Target, body: bytes, *, timeout_s: float) -> None:
    """Post JSON, and return once the server has answered 2xx. Blocks, for `TOTAL` times `timeout_s` at most (and for as
    long as the operating system looks up the host's name). Raises NotDelivered."""
    try:
        status = _exchange(target, body, timeout_s)
    except TimeoutError:
        raise NotDelivered(f"{target} did not answer in time") from None
    except socket.gaierror as error:
        raise NotDelivered(f"{target}: the name of the host cannot be resolved ({error.errno})") from None
    except ssl.SSLCertVerificationError:
        raise NotDelivered(f"{target}: its certificate cannot be verified") from None
    except OSError as error:
        why = error.strerror if error.errno and not isinstance(error, ssl.SSLError) else ""
        raise NotDelivered(f"{target}: {type_name(type(error))}{f' ({why})' if why else ''}") from None
    except (http.client.HTTPException, ValueError) as error:
        raise NotDelivered(f"{target} did not answer in HTTP ({type_name(type(error))})") from None
    if 300 <= status < 400:
        raise NotDelivered(f"{target} answered {status}: redirects are not followed")
    if not 200 <= status < 300:
        raise NotDelivered(f"{target} answered {status}")


def _exchange(target: Target, body: bytes, timeout_s: float) -> int:
    sock = socket.create_connection((target.host, target.port), timeout_s)
    # Each step has `timeout_s`; a server that sends a byte at a time has all of it.
    over = threading.Event()

    def drop() -> None:
        over.set()
        # Not SSLSocket's own, which takes its state away from the thread that reads.
        with contextlib.suppress(OSError):  # it ended by itself at this very moment
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    dropped = threading.Timer(TOTAL * timeout_s, drop)
    dropped.daemon = True
    try:
        if target.secure:
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=target.host, do_handshake_on_connect=False)
        dropped.start()
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        connection = http.client.HTTPConnection(target.host, target.port, timeout=timeout_s)
        connection.sock = sock
        headers = {"Content-Type": "application/json", "User-Agent": "glassbus", "Connection": "close"}
        connection.request("POST", target.path, body, {**headers, **target.headers})
        with connection.getresponse() as response:
            if over.is_set():  # what came before we hung up looks like a whole answer
                raise TimeoutError
            return response.status
    except (OSError, http.client.HTTPException, ValueError, AttributeError):
        if over.is_set():  # however the end that we made of it looks
            raise TimeoutError from None
        raise
    finally:
        dropped.cancel()
        sock.close()
