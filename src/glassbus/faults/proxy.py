"""A TCP proxy that fails on purpose: put it between a bus and its broker, and break the line as lines break.

    async with FaultyProxy("127.0.0.1", 4222) as proxy:
        bus = MessageBus(f"nats://127.0.0.1:{proxy.port}/orders")
        …
        proxy.partition()          # nothing goes through any more, and nobody is told
        await asyncio.sleep(5)
        proxy.heal()

`on_thread` runs one for programs without a loop, and beside a loop that a test wants to block.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from glassbus.errors import ConfigurationError, shown

Result = TypeVar("Result")
Way = Literal["both", "to_server", "to_client"]

_CHUNK = 64 * 1024
#: Discards what is unsent and sends a reset instead of an orderly end.
_RESET = struct.pack("ii", 1, 0)


class FaultyProxy:
    """Passes connections on to `host:port` until told otherwise. Its own port is `port`, chosen if 0 was given.

    Faults last until `heal`, and may be combined. All methods belong to its loop, and take effect at once;
    none waits. `connections` counts those accepted so far, `open` those there are.
    """

    def __init__(self, host: str, port: int, *, listen_port: int = 0, listen_host: str = "127.0.0.1") -> None:
        self.port = listen_port
        self.connections = 0
        self._server_host, self._server_port = host, port
        self._listen_host = listen_host
        self._lines: set[_Line] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: asyncio.Server | None = None
        self._refusing = False
        self._moves = {"to_server": asyncio.Event(), "to_client": asyncio.Event()}
        self._delay_s = 0.0
        self._left: int | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen. Raises OSError when the port is taken."""
        self.heal()
        await self._listen()

    async def stop(self) -> None:
        """Reset every connection and listen no more. Idempotent."""
        self._refusing = True
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        self.drop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def open(self) -> int:
        return len(self._lines)

    # Faults

    def heal(self) -> None:
        """Pass everything on again, what a partition held back included."""
        self._delay_s, self._left = 0.0, None
        for moves in self._moves.values():
            moves.set()
        if self._refusing:
            self._refusing = False
            self._keep(self._listen_again())

    def drop(self) -> None:
        """Reset every connection there is, once; new ones pass."""
        for line in list(self._lines):
            line.reset()

    def refuse(self, *, drop: bool = True) -> None:
        """Refuse new connections, as a port on which nobody listens; `drop` resets those there are."""
        self._refusing = True
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        if drop:
            self.drop()

    def partition(self, way: Way = "both") -> None:
        """Let nothing through, and tell nobody: connections stay, new ones are made and hear nothing.

        One `way` alone leaves connections half open.
        """
        if way not in ("both", "to_server", "to_client"):
            raise ConfigurationError(f"a partition is 'both', 'to_server' or 'to_client', not {shown(way)}")
        for name, moves in self._moves.items():
            if way in ("both", name):
                moves.clear()

    def delay(self, seconds: float) -> None:
        """Hold each piece of data back for so long, each way."""
        if type(seconds) not in (int, float) or not 0 <= seconds <= 3600:
            raise ConfigurationError(f"a delay is 0 to 3600 seconds, not {shown(seconds)}")
        self._delay_s = float(seconds)

    def truncate(self, size: int) -> None:
        """Let `size` more bytes through, to whichever side, then reset the connection in the middle of what it says."""
        if type(size) is not int or size < 0:
            raise ConfigurationError(f"so many bytes as go through are 0 or more, not {shown(size)}")
        self._left = size

    # The work

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen_again(self) -> None:
        """Take the port back; something else may hold it for a moment, as a child that was forked meanwhile does."""
        while not self._refusing:
            try:
                await self._listen()
            except OSError:
                await asyncio.sleep(0.05)
            else:
                return

    async def _listen(self) -> None:
        if self._listening is None:
            self._listening = await asyncio.start_server(self._accept, self._listen_host, self.port)
            self.port = self._listening.sockets[0].getsockname()[1]
            if self._refusing:  # said meanwhile
                self._listening.close()
                self._listening = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        line = _Line(writer)
        self._lines.add(line)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            # Nothing of a connection that is made during a partition reaches the server.
            await self._moves["to_server"].wait()
            server_reader, server_writer = await asyncio.open_connection(self._server_host, self._server_port)
            line.add(server_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(line, reader, server_writer, "to_server"))
                group.create_task(self._pump(line, server_reader, writer, "to_client"))
        except (OSError, ExceptionGroup):
            line.reset()  # the server is not there, or one side has broken off: so must the other
        except asyncio.CancelledError:
            line.reset()  # `stop`; a stream's handler that ends cancelled would be logged
        finally:
            line.close()
            self._lines.discard(line)
            self._tasks.discard(task)

    async def _pump(self, line: _Line, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str) -> None:
        while True:
            await self._moves[way].wait()
            data = await source.read(_CHUNK)
            await self._moves[way].wait()  # what was read before the partition is held back too
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
                await self._moves[way].wait()
            if not data:
                break
            if self._left is not None:
                data, self._left = data[: self._left], self._left - len(data[: self._left])
            if data:
                sink.write(data)
                await sink.drain()
            if self._left == 0:
                self._left = None
                line.reset()
                return
        if not sink.is_closing() and sink.can_write_eof():
            sink.write_eof()


class _Line:
    """One connection through the proxy: the client's end and the server's."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self._ends = [client]
        self._over = False

    def add(self, server: asyncio.StreamWriter) -> None:
        self._ends.append(server)
        if self._over:
            self.reset()

    def reset(self) -> None:
        self._over = True
        for end in self._ends:
            found: socket.socket | None = end.get_extra_info("socket")
            if found is not None:
                with contextlib.suppress(OSError):  # it is gone already
                    found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.transport.abort()

    def close(self) -> None:
        for end in self._ends:
            end.close()


class ThreadedProxy:
    """A `FaultyProxy` on a thread of its own: the same faults, from any thread, in effect when the call returns."""

    def __init__(self, proxy: FaultyProxy, loop: asyncio.AbstractEventLoop) -> None:
        self._proxy = proxy
        self._loop = loop

    @property
    def port(self) -> int:
        return self._proxy.port

    @property
    def connections(self) -> int:
        return self._proxy.connections

    @property
    def open(self) -> int:
        return self._proxy.open

    def heal(self) -> None:
        self._call(self._proxy.heal)

    def drop(self) -> None:
        self._call(self._proxy.drop)

    def refuse(self, *, drop: bool = True) -> None:
        self._call(lambda: self._proxy.refuse(drop=drop))

    def partition(self, way: Way = "both") -> None:
        self._call(lambda: self._proxy.partition(way))

    def delay(self, seconds: float) -> None:
        self._call(lambda: self._proxy.delay(seconds))

    def truncate(self, size: int) -> None:
        self._call(lambda: self._proxy.truncate(size))

    def _call(self, work: Callable[[], Result]) -> Result:
        async def run() -> Result:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(5.0)


@contextlib.contextmanager
def on_thread(host: str, port: int, *, listen_port: int = 0) -> Iterator[ThreadedProxy]:
    """A proxy on a thread of its own, for as long as the block lasts. Raises OSError when the port is taken."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="glassbus-proxy", daemon=True)
    thread.start()
    proxy: FaultyProxy | None = None

    async def start() -> FaultyProxy:
        made = FaultyProxy(host, port, listen_port=listen_port)
        await made.start()
        return made

    try:
        proxy = asyncio.run_coroutine_threadsafe(start(), loop).result(5.0)
        yield ThreadedProxy(proxy, loop)
    finally:
        if proxy is not None:
            asyncio.run_coroutine_threadsafe(proxy.stop(), loop).result(5.0)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5.0)
        loop.close()
