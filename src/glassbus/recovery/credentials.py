"""Asking a user's function for credentials, whatever it does: it may be plain or async, hang, raise or lie."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import Any

from glassbus.clock import Clock
from glassbus.config import Credentials
from glassbus.errors import ConfigurationError, safe_text, shown, type_name
from glassbus.handler import Threads

#: Gives credentials, or user name and password; plain or async. A plain one runs on a thread.
CredentialsSource = Callable[[], Any]


class CredentialsRefused(Exception):
    """No credentials are to be had; why, as text."""


def check_source(source: object) -> CredentialsSource | None:
    """`source` when it can be asked. Raises ConfigurationError."""
    if source is not None and not callable(source):
        raise ConfigurationError(
            f"credentials must be a function that returns Credentials, not {shown(type(source).__name__)}: "
            "constant ones belong into the URL"
        )
    return source


class Vault:
    """Asks for credentials. Belongs to the loop."""

    def __init__(self, source: CredentialsSource, clock: Clock) -> None:
        self._source = source
        self._clock = clock
        self._threads: Threads | None = None

    async def ask(self) -> Credentials:
        """New credentials. Raises CredentialsRefused and nothing else, but may hang: bound it."""
        if self._threads is None:
            self._threads = Threads(asyncio.get_running_loop(), self._clock, "credentials")
        if inspect.iscoroutinefunction(self._source):
            answer = await self._awaited(self._source())
        else:
            answer = await self._threads.run(copy_context(), self._call)
            if inspect.isawaitable(answer):
                answer = await self._awaited(answer)
        if isinstance(answer, CredentialsRefused):
            raise answer
        return _checked(answer)

    def _call(self) -> Any:
        try:
            return self._source()
        except BaseException as error:  # noqa: BLE001 - it is a user's; told as text, it can do nothing more
            return _failure(error)

    async def _awaited(self, answer: Awaitable[Any]) -> Any:
        task = asyncio.current_task()
        before = task.cancelling() if task is not None else 0
        try:
            return await answer
        except BaseException as error:
            if task is not None and task.cancelling() > before:
                raise  # we ourselves are to end
            return _failure(error)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.close()


def _failure(error: BaseException) -> CredentialsRefused:
    return CredentialsRefused(f"it raised {type_name(type(error))}: {safe_text(error, 200)}")


def _checked(answer: object) -> Credentials:
    """A copy in plain strings, so that no code of a user's is in it. Errors show none of it."""
    if type(answer) is tuple and len(answer) == 2:
        fields: dict[str, object] = {"user": answer[0], "password": answer[1]}
    elif isinstance(answer, Credentials):
        fields = {name: getattr(answer, name) for name in Credentials.__struct_fields__}
    else:
        raise CredentialsRefused(
            f"it returned a {type_name(type(answer))}, not Credentials or a pair of user name and password"
        )
    plain: dict[str, str] = {}
    for name, given in fields.items():
        if given is None:
            continue
        if not issubclass(type(given), str):
            raise CredentialsRefused(f"its {name} is a {type_name(type(given))}, not a str")
        plain[name] = str.__str__(given)
    if not plain:
        raise CredentialsRefused("it returned no user name, token or file")
    return Credentials(**plain)
