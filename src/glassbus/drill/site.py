"""A process with buses that drills befall, scraped like any service.

    python -m glassbus.drill.site '{"port": 9464, "place": "/tmp/x", "plays": {"paused": "module:Class"}}'

It obeys lines on stdin, `strike NAME`, `heal NAME` and `stop NAME`, and answers each on stdout with `ok NAME` or
`failed NAME why`. The end of stdin is the end of whoever started it, and so its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from glassbus.drill.scenes.base import Scene
from glassbus.errors import safe_text, type_name
from glassbus.server import serve

#: What it prints when its buses run and it is scraped.
READY = "ready"
_ERROR_CAP = 500
_SWITCH_S = 0.0005


async def run(plays: Mapping[str, str], place: Path, port: int) -> None:
    """Serve these plays until stdin ends."""
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[str] = asyncio.Queue()
    threading.Thread(target=_read, args=(loop, lines), daemon=True).start()
    scenes: dict[str, Scene] = {}
    for name, made_by in plays.items():
        folder = place / name
        folder.mkdir(parents=True, exist_ok=True)
        module, _, kind = made_by.partition(":")
        scenes[name] = getattr(import_module(module), kind)(name, folder)
    for scene in scenes.values():
        await scene.start()
    with serve((), f"127.0.0.1:{port}"):
        print(READY, flush=True)  # noqa: T201 - the protocol
        tasks: set[asyncio.Task[None]] = set()
        while True:
            verb, _, name = (await lines.get()).partition(" ")
            task = asyncio.create_task(_obey(verb, scenes[name]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


async def _obey(verb: str, scene: Scene) -> None:
    try:
        await {"strike": scene.strike, "heal": scene.heal, "stop": scene.stop}[verb]()
        said = f"ok {scene.name}"
    except Exception as error:  # noqa: BLE001 - told to who asked, who fails the drill
        why = safe_text(error, _ERROR_CAP).replace("\n", " ")
        said = f"failed {scene.name} {type_name(type(error))}: {why}"
    print(said, flush=True)  # noqa: T201 - the protocol


def _read(loop: asyncio.AbstractEventLoop, lines: asyncio.Queue[str]) -> None:
    for line in sys.stdin:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to end
            loop.call_soon_threadsafe(lines.put_nowait, line.strip())
    # Nothing here is worth an orderly end, and a scene may hang on purpose.
    os._exit(0)


def main() -> None:
    given = json.loads(sys.argv[1])
    # A scrape must not wait long for a loop that is at work.
    sys.setswitchinterval(_SWITCH_S)
    asyncio.run(run(given["plays"], Path(given["place"]), int(given["port"])))


if __name__ == "__main__":
    main()
