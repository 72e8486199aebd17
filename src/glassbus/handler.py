"""A user's function as a handler: what it takes, and how it is run.

Each run has a context of its own, a copy, so nothing it sets leaks to the next
message. An async handler is driven step by step inside the worker's own task
(no task for each message); a plain one runs on a thread that we own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import inspect
import queue
import threading
import types
import typing
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextvars import Context
from typing import Any

from glassbus.clock import Clock
from glassbus.codec import CODECS, JSON, RAW, Codec
from glassbus.errors import ConfigurationError, PayloadUndecodable, safe_text, shown, type_name
from glassbus.facts import Delivery
from glassbus.message import Envelope, Message, Priority

_PRIORITIES = tuple(Priority)
_UNREAD: Any = object()
_NOT_STARTED = object()  # None is what a bare yield waits for
_Inbox = queue.SimpleQueue[Callable[[], None] | None]


class Handler:
    """What a function takes and how it is called.

    Its first parameter gets the message: a `Message` when it is annotated `Message`,
    `Message[T]` (payload decoded to T) or not at all; with any other annotation, the payload itself,
    decoded to that type. A second required parameter gets the `Delivery`.
    """

    def __init__(self, function: Callable[..., Any], codecs: Sequence[Codec] = ()) -> None:
        """`codecs` are what to try, in this order, when a payload is not what its message declares."""
        if not callable(function):
            raise ConfigurationError(f"a handler must be callable, not {type(function).__name__}")
        if _any_of(function, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
            raise ConfigurationError(
                f"the handler {shown(function)} has a yield in it: calling it runs none of its body; take the yield out"
            )
        self.function = function
        self.is_async = _is_async(function)
        self.wants_message, self.kind, self.wants_delivery = _parameters(function)
        self.is_simple = inspect.iscoroutinefunction(function) and not self.wants_delivery
        self._codecs = codecs
        known: tuple[Codec, ...] = (JSON, RAW, *codecs)
        self._decoders = {codec.name: _decoder(codec, self.kind) for codec in known}
        bare = JSON.bare_decoder(self.kind)
        self._bare = {} if bare is None else {JSON.name: bare}
        #: Told of a payload that only another codec than the declared one could read, and which.
        self.fell_back: Callable[[Envelope, str], None] = _nobody

    @property
    def name(self) -> str:
        """The qualified name, without `<locals>`."""
        inner = self.function
        while isinstance(inner, functools.partial):
            inner = inner.func
        qualified = getattr(inner, "__qualname__", type(inner).__qualname__)
        return str(qualified).rpartition("<locals>.")[2]

    def argument(self, envelope: Envelope) -> Any:
        """What to call the handler with. Raises PayloadUndecodable."""
        try:
            payload = self._bare[envelope.codec](envelope.body)
        except Exception:  # noqa: BLE001 - what is wrong, or is not there, is found out again, with care
            payload = _UNREAD
        if payload is _UNREAD:
            payload = self._decode(envelope)
        if not self.wants_message:
            return payload
        return Message(
            envelope.id,
            envelope.topic,
            payload,
            envelope.headers,
            _PRIORITIES[envelope.priority],
            envelope.key,
            envelope.published_at,
        )

    def _decode(self, envelope: Envelope) -> Any:
        decode = self._decoders.get(envelope.codec) or self._further_decoder(envelope.codec)
        try:
            return decode(envelope.body)
        except PayloadUndecodable as error:
            return self._fall_back(envelope, error)

    def _further_decoder(self, name: str) -> Callable[[bytes], Any]:
        """For a codec that is not on the list. It may be one that Glassbus can read all the same."""
        if name in CODECS:
            self._decoders[name] = decode = CODECS[name].decoder(self.kind)
            return decode

        def refuse(body: bytes) -> Any:
            raise PayloadUndecodable(f"unknown codec {name!r}; known are {', '.join(sorted(self._decoders))}")

        return refuse

    def _fall_back(self, envelope: Envelope, error: PayloadUndecodable) -> Any:
        said = [safe_text(error)]
        for codec in self._codecs:
            if codec.name == envelope.codec:
                continue
            try:
                payload = self._decoders[codec.name](envelope.body)
            except PayloadUndecodable as further:
                said.append(f"nor by {codec.name}: {safe_text(further)}")
            else:
                self.fell_back(envelope, codec.name)
                return payload
        raise error if len(said) == 1 else PayloadUndecodable("; ".join(said)) from error

    def call(self, delivery: Delivery, argument: Any) -> Any:
        if self.wants_delivery:
            return self.function(argument, delivery)
        return self.function(argument)


def _nobody(envelope: Envelope, used: str) -> None:
    """A handler that no worker runs."""


def _decoder(codec: Codec, kind: Any) -> Callable[[bytes], Any]:
    if CODECS.get(codec.name) is codec:
        return codec.decoder(kind)
    try:
        return codec.decoder(kind)
    except BaseException as error:  # noqa: BLE001 - it is a user's
        raise ConfigurationError(f"codec {codec.name!r} has no decoder for {shown(kind)}: {safe_text(error)}") from None


def _is_async(function: Callable[..., Any]) -> bool:
    return _any_of(function, inspect.iscoroutinefunction)


def _any_of(function: Callable[..., Any], *kinds: Callable[[Any], bool]) -> bool:
    """Whether calling it is calling a function of one of these kinds."""
    while isinstance(function, functools.partial):
        function = function.func
    return any(kind(function) or kind(getattr(type(function), "__call__", None)) for kind in kinds)


def is_unfinished(result: Any) -> bool:
    """Whether what a plain handler returned is work that is still to be done."""
    return inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result)


async def finish(result: Any) -> None:
    """Do the work that a plain handler returned.

    Raises TypeError for a generator: its body has not run, and nobody would run it.
    """
    if inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise TypeError("the handler returned a generator, whose body has not run")
    await result


def _parameters(function: Callable[..., Any]) -> tuple[bool, Any, bool]:
    """(wants a Message, payload type, wants the Delivery) of a handler."""
    shown = getattr(function, "__qualname__", repr(function))
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True, Any, False  # a builtin without a signature takes the message
    required = [
        p
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if (not positional and not variadic) or len(required) > 2:
        raise ConfigurationError(
            f"handler {shown} must take the message, and may take the delivery as a second parameter; "
            f"it takes {len(required)}"
        )
    if not positional:
        return True, Any, False
    hint = _hint(function, positional[0].name, shown)
    if hint is Message or hint is inspect.Parameter.empty:
        return True, Any, len(required) == 2
    if typing.get_origin(hint) is Message:
        return True, typing.get_args(hint)[0], len(required) == 2
    return False, hint, len(required) == 2


def _hint(function: Callable[..., Any], parameter: str, shown: str) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    target = function if inspect.isroutine(function) else getattr(type(function), "__call__", function)
    if parameter not in getattr(target, "__annotations__", {}):
        return inspect.Parameter.empty
    try:
        return typing.get_type_hints(target)[parameter]
    except NameError as error:
        raise ConfigurationError(
            f"the type of parameter {parameter!r} of handler {shown} cannot be resolved ({error}); "
            "define it at module level"
        ) from None


@types.coroutine
def in_context(
    coroutine: Coroutine[Any, Any, Any], context: Context, waits_for: Any = _NOT_STARTED
) -> Generator[Any, Any, Any]:
    """Await `coroutine` in the current task, each step run in `context`.

    `waits_for` is what it yielded when its first step was already run.

    What it yields up goes to the loop, what comes back (values, errors, cancellation)
    goes down, so timeouts, task groups and cancellation inside it work as in any task.
    """
    run = context.run
    if waits_for is _NOT_STARTED:
        try:
            waits_for = run(coroutine.send, None)
        except StopIteration as stop:
            return stop.value
    while True:
        try:
            sent = yield waits_for
        except BaseException as error:  # noqa: BLE001 - whatever it is, the coroutine is to get it
            try:
                waits_for = run(coroutine.throw, error)
            except StopIteration as stop:
                return stop.value
        else:
            try:
                waits_for = run(coroutine.send, sent)
            except StopIteration as stop:
                return stop.value


class Threads:
    """Daemon threads for plain handlers: one for each that runs, reused, never waited for at exit.

    A thread cannot be stopped, so one that hangs is simply not idle again.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Clock, name: str) -> None:
        self._loop = loop
        self._clock = clock
        self._name = name
        self._idle: list[_Inbox] = []
        self._closed = False
        self._started = 0

    async def run(self, context: Context, function: Callable[[], Any]) -> Any:
        """Run `function` in `context` on a thread; its result or exception."""
        ended: asyncio.Future[Any] = self._loop.create_future()
        inbox = self._idle.pop() if self._idle else self._spawn()

        def job() -> None:
            try:
                result = context.run(function)
            except BaseException as error:  # noqa: BLE001 - it is handed to the worker, which decides
                self._answer(inbox, ended, None, error)
            else:
                self._answer(inbox, ended, result, None)

        inbox.put(self._clock.on_thread(job))
        return await ended

    def _answer(self, inbox: _Inbox, ended: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        # A loop closed while the handler hung refuses the call: nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._resolve, inbox, ended, result, error)

    def _resolve(self, inbox: _Inbox, ended: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        if self._closed:
            inbox.put(None)
        else:
            self._idle.append(inbox)
        if ended.done():
            return
        if error is None:
            ended.set_result(result)
        elif issubclass(type(error), StopIteration):
            # A future refuses StopIteration; the handler raised it all the same.
            ended.set_exception(RuntimeError("handler raised StopIteration"))
        else:
            try:
                ended.set_exception(error)
            except BaseException:  # noqa: BLE001 - a hostile exception answers for its class itself
                ended.set_exception(RuntimeError(f"handler raised a {type_name(type(error))} that cannot be passed on"))

    def _spawn(self) -> _Inbox:
        inbox: _Inbox = queue.SimpleQueue()
        self._started += 1
        thread = threading.Thread(
            target=_serve, args=(inbox,), name=f"glassbus-{self._name}-{self._started}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # what the system says is EAGAIN, which Python does not pass on
            raise BlockingIOError(errno.EAGAIN, f"no thread can be started for a handler: {error}") from error
        return inbox

    def close(self) -> None:
        """End the idle threads; a hanging one ends when its handler returns."""
        self._closed = True
        for inbox in self._idle:
            inbox.put(None)
        self._idle.clear()


def _serve(inbox: _Inbox) -> None:
    while (job := inbox.get()) is not None:
        job()
