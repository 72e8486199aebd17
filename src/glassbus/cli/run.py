"""`glassbus run module:bus`: run the bus of a program until a signal ends it."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassbus.cli.common import EXIT_INTERRUPTED, EXIT_OK, CommandError, number
from glassbus.errors import GlassbusError, safe_text

if TYPE_CHECKING:
    from glassbus.bus import MessageBus

_NOTES = """\
MODULE is imported with the current folder on its path, and ATTRIBUTE is a MessageBus that is not started, such as
`glassbus run shop.service:bus`. The first SIGINT or SIGTERM ends it: nothing more is taken in, running handlers
finish within the deadline, the rest is given back. A second one does not wait for them. SIGQUIT is an emergency
stop: what is held is written down in the state directory, and all is over within 10 seconds. SIGHUP reads the
configuration of the bus again (MessageBus(configuration=...)).

/metrics, /healthz and /readyz are served at $GLASSBUS_HTTP (default 127.0.0.1:9464). With OTEL_EXPORTER_OTLP_ENDPOINT
set, traces are exported there, unless the program has set a tracer provider of its own.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _NOTES
    parser.add_argument("target", metavar="MODULE:ATTRIBUTE", help="where the MessageBus is")
    parser.add_argument(
        "--deadline",
        type=number(0, 1e7),
        default=30.0,
        metavar="S",
        help="seconds for handlers to finish (default: 30)",
    )
    parser.add_argument(
        "--log-level",
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="what goes to stderr, unless the program sets up logging itself (default: info)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from glassbus.cli.hosting import exported_traces

    bus = find_bus(arguments.target)
    if not logging.getLogger().handlers:
        logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with exported_traces(f"glassbus-{bus.name}"):
        return asyncio.run(_serve(bus, arguments.deadline))


def find_bus(target: str) -> MessageBus:
    """The bus that `module:attribute` names. Raises CommandError; a program's own error is shown whole."""
    from glassbus.bus import MessageBus

    module_name, colon, path = target.partition(":")
    if not colon or not module_name or not path:
        raise CommandError(f"{target!r} is not MODULE:ATTRIBUTE, such as shop.service:bus")
    found: Any = _import(module_name)
    shown = module_name
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            buses = [key for key, value in getattr(found, "__dict__", {}).items() if isinstance(value, MessageBus)]
            hint = f"; it has {', '.join(buses)}" if buses else ""
            raise CommandError(f"{shown} has no attribute {name!r}{hint}") from None
        shown = f"{shown}:{name}" if shown == module_name else f"{shown}.{name}"
    if not isinstance(found, MessageBus):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise CommandError(f"{target} is {what}, not a MessageBus that was made")
    return found


def _import(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only when it is the module itself that is missing: one that it imports is its own error.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise CommandError(f"no module named {error.name!r} here ({here}) or on the path of Python") from None
        _show(error)
        raise CommandError(f"importing {name} failed: {error}") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the program's own code runs here, so any type can come
        _show(error)
        raise CommandError(f"importing {name} failed with {type(error).__name__}") from None


def _show(error: BaseException) -> None:
    """The traceback, from the program's own first line on."""
    trace = error.__traceback__
    while trace is not None and (
        "importlib" in trace.tb_frame.f_code.co_filename or trace.tb_frame.f_globals is globals()
    ):
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)


async def _serve(bus: MessageBus, deadline_s: float) -> int:
    from glassbus.cli.hosting import serve_somewhere, stop_signals

    asked = asyncio.Event()
    hurried = asyncio.Event()

    def signalled(name: str) -> None:
        if asked.is_set():
            hurried.set()
            print(f"{name} again: not waiting for handlers", file=sys.stderr, flush=True)
        else:
            asked.set()
            print(f"{name}: stopping within {deadline_s:g} s; once more to stop now", file=sys.stderr, flush=True)

    server, _ = serve_somewhere(bus, "")
    with stop_signals(signalled), server:
        await bus.start()
        bus.emergency_on_signals(signal.SIGQUIT)
        loop, reloads = asyncio.get_running_loop(), set[asyncio.Task[None]]()

        def hung_up() -> None:
            task = loop.create_task(_reload(bus))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        loop.add_signal_handler(signal.SIGHUP, hung_up)
        print(f"running {bus!r}; metrics at {server.url}/metrics", file=sys.stderr, flush=True)
        waiting = [asyncio.create_task(asked.wait()), asyncio.create_task(_ended(bus))]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if not asked.is_set():
            await (bus.emergency.stop("") if bus.emergency.began else bus.stop(deadline_s))
            if bus.emergency.began:
                raise CommandError(f"the bus made an emergency stop: {bus.emergency.reason}")
            health = bus.health()
            raise CommandError(f"the bus stopped by itself: {health.checks[0].detail}")
        return await _stop(bus, deadline_s, hurried)


async def _reload(bus: MessageBus) -> None:
    """Read the configuration again; what is wrong with it leaves the last known good in force."""
    try:
        await bus.reload()
    except GlassbusError as error:
        print(f"SIGHUP: not reloaded: {safe_text(error, 2000)}", file=sys.stderr, flush=True)
    else:
        print("SIGHUP: configuration reloaded", file=sys.stderr, flush=True)


async def _ended(bus: MessageBus) -> None:
    """Return when the bus stops without being asked: its store cannot go on, or the program stopped it."""
    while bus.running:  # noqa: ASYNC110 - a bus has no event for it, and a fifth of a second is soon enough
        await asyncio.sleep(0.2)


async def _stop(bus: MessageBus, deadline_s: float, hurried: asyncio.Event) -> int:
    stopping = asyncio.create_task(bus.stop(deadline_s))
    hurry = asyncio.create_task(hurried.wait())
    await asyncio.wait([stopping, hurry], return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if stopping.done():
        stopping.result()
        return EXIT_OK
    stopping.cancel()
    await asyncio.wait([stopping], timeout=2.0)
    if not stopping.done():
        # A store keeps what it has through a sudden end; a handler that does not give way must not hold us.
        os._exit(EXIT_INTERRUPTED)
    return EXIT_INTERRUPTED
