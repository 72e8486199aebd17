"""What befalls a whole process, or the servers that watch: a drill's fault that no bus can be made to have."""

from __future__ import annotations

import abc
import asyncio
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from glassbus.drill.servers import ask
from glassbus.drill.stack import Target, alertmanager_server, write_config

if TYPE_CHECKING:
    from glassbus.drill.play import Play
    from glassbus.drill.world import World


class Outside(abc.ABC):
    """A fault outside of the buses. Made before anything runs: it may add servers and targets to the world."""

    def __init__(self, world: World, play: Play) -> None:
        self.world = world
        self.play = play

    @abc.abstractmethod
    async def strike(self) -> None:
        """Make it happen."""

    @abc.abstractmethod
    async def heal(self) -> None:
        """Undo it."""


class ProcessKilled(Outside):
    """The play's site is killed (SIGKILL); healed, it is started again."""

    async def strike(self) -> None:
        await self.world.site_of[self.play.name].kill()

    async def heal(self) -> None:
        await self.world.site_of[self.play.name].start()


class EverythingKilled(Outside):
    """Every site is killed; healed, the play's own is started again."""

    async def strike(self) -> None:
        for site in self.world.sites:
            await site.kill()

    async def heal(self) -> None:
        await self.world.site_of[self.play.name].start()


class PrometheusFrozen(Outside):
    """Prometheus stands still; healed, it goes on."""

    async def strike(self) -> None:
        self.world.frozen = True
        self.world.stack.prometheus.freeze()

    async def heal(self) -> None:
        self.world.stack.prometheus.thaw()
        self.world.frozen = False


class Refuser:
    """A webhook that takes notifications, or refuses them."""

    def __init__(self) -> None:
        self.refuses = False
        refuser = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 5.0

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", "0")))
                self.send_response(400 if refuser.refuses else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """It has nothing to say."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class AnotherAlertmanager(Outside):
    """One more Alertmanager, told by Prometheus as the first is, which tells somebody else."""

    def __init__(self, world: World, play: Play) -> None:
        super().__init__(world, play)
        self.refuser = Refuser()
        world.at_end(self.refuser.close)
        self.server = alertmanager_server(world.place, play.name, world.routing, world.pace, self.refuser.url)
        self.url = self.server.ready.removesuffix("/-/ready")
        address = self.url.removeprefix("http://")
        world.servers.append(self.server)
        world.alertmanagers.append(address)
        world.targets.append(Target("alertmanager", address, play.name))


class AlertmanagerKilled(AnotherAlertmanager):
    """It is killed; healed, it is started again."""

    async def strike(self) -> None:
        self.server.kill()

    async def heal(self) -> None:
        await self.server.started()


class ReceiverRefuses(AnotherAlertmanager):
    """Whom it tells refuses every notification."""

    async def strike(self) -> None:
        self.refuser.refuses = True

    async def heal(self) -> None:
        self.refuser.refuses = False


class BadReload(AnotherAlertmanager):
    """It is told to read its configuration again, which is broken; healed, that is whole, and read."""

    async def strike(self) -> None:
        self._config = self.world.place / f"{self.play.name}.yml"
        self._whole = self._config.read_text(encoding="utf-8")
        write_config(self._config, {"route": {"receiver": "nobody"}})
        try:
            await self._reload()
        except OSError:  # it says no, as it must
            return
        raise AssertionError("Alertmanager took a broken configuration")

    async def heal(self) -> None:
        self._config.write_text(self._whole, encoding="utf-8")
        await self._reload()

    async def _reload(self) -> None:
        await asyncio.to_thread(ask, f"{self.url}/-/reload", b"")
