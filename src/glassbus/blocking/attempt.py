"""One attempt at a recovery: the report, the managers that a program put into the context, and what they answered.

Managers are other people's code: they may raise anything, answer anything or nothing, and are asked
in the caller's thread. None of it gets out, but KeyboardInterrupt on the main thread: the person at the keyboard.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from glassbus.errors import ErrorCategory, safe_text, shown, type_name

_TEXT_CAP = 300


class Outcome(NamedTuple):
    """How an attempt went. `told`: its end was, or will be, told elsewhere."""

    ok: bool
    action: str
    error: str = ""
    told: bool = False


class Answer(NamedTuple):
    """What a manager said. `asked` is False when there is no such manager or method."""

    asked: bool
    value: Any = None
    error: str = ""

    @property
    def done(self) -> bool:
        """A command was carried out: nothing was raised, and it did not say False."""
        return self.asked and not self.error and (self.value is None or _truth(self.value))

    @property
    def yes(self) -> bool:
        """A question was answered with something true; nothing is no answer."""
        return self.asked and not self.error and _truth(self.value)


class Attempt:
    """The report and its context, whatever they are: nothing here raises."""

    def __init__(self, report: Any, context: Any) -> None:
        self.report = report
        self.context: Mapping[str, Any] = context if isinstance(context, Mapping) else {}
        self.category = category_of(_read(report, "category"))
        #: Whether the breaker let it begin.
        self.begun = False

    @property
    def retry_count(self) -> int:
        count = _read(self.report, "retry_count")
        return count if type(count) is int and count >= 0 else 0

    def mark(self, **values: Any) -> None:
        """Write what happened into the report, as far as it lets itself be written."""
        for name, value in values.items():
            with contextlib.suppress(Exception):  # a report of some other kind, without the field
                if isinstance(self.report, dict):
                    self.report[name] = value
                else:
                    setattr(self.report, name, value)

    def find(self, *names: str) -> Any:
        """The first of `names` in the context, else in the report's own; None where there is none."""
        for holder in (self.context, _read(self.report, "context")):
            for name in names:
                value = _item(holder, name)
                if value is not None:
                    return value
        return None

    def has(self, manager: str, method: str) -> bool:
        """Whether the context has a manager of that name that can do it."""
        try:
            return callable(getattr(self.context.get(manager), method, None))
        except Exception:  # noqa: BLE001 - a manager that cannot be looked at is none
            return False

    def offer(self, name: str, value: Any) -> None:
        """Put a result into the context, where that is a dict of the caller's."""
        if isinstance(self.context, dict):
            with contextlib.suppress(Exception):  # a dict of a class that refuses it
                self.context[name] = value

    def ask(self, manager: str, method: str, *arguments: Any) -> Answer:
        """Call `method` of the manager of that name, if there is one that has it."""
        try:
            held = self.context.get(manager)
            function = getattr(held, method, None) if held is not None else None
            if not callable(function):
                return Answer(asked=False)
            value = function(*arguments)
        except BaseException as error:  # a manager may raise anything: it did not do it
            if from_keyboard(error):
                raise
            return Answer(True, None, f"{manager}.{method}: {described(error)}")
        if dropped(value):
            return Answer(True, None, f"{manager}.{method} is async and was not run: give a plain function")
        return Answer(True, value)


def from_keyboard(error: BaseException) -> bool:
    """Whether it is the person at the keyboard, who ends the main thread's call whatever it is in."""
    return issubclass(type(error), KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


def dropped(answer: Any) -> bool:
    """Whether `answer` is a coroutine or the like, which has done nothing; it is closed then."""
    if not inspect.isawaitable(answer):
        return False
    close = getattr(answer, "close", None)
    if callable(close):
        close()
    return True


def category_of(value: Any) -> ErrorCategory:
    """A category from one, from its name in any case, or from another enum's member of that value."""
    if isinstance(value, Enum):
        value = value.value
    try:
        return ErrorCategory(str.lower(value))
    except Exception:  # noqa: BLE001 - anything else is a failure of processing
        return ErrorCategory.MESSAGE_PROCESSING_ERROR


def described(error: BaseException) -> str:
    return f"{type_name(type(error))}: {safe_text(error, _TEXT_CAP)}"


def named(value: Any) -> str:
    """A short text for what is recovered."""
    return value[:128] if type(value) is str else shown(value) if value is not None else ""


def _read(holder: Any, name: str) -> Any:
    try:
        return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
    except Exception:  # noqa: BLE001 - a property of a foreign report
        return None


def _item(holder: Any, name: str) -> Any:
    try:
        return holder[name]
    except Exception:  # noqa: BLE001 - not there, or not a mapping at all
        return None


def _truth(value: Any) -> bool:
    try:
        return bool(value)
    except Exception:  # noqa: BLE001 - an answer that cannot be read is none
        return False
