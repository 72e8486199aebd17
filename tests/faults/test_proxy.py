"""The faulty proxy, on a real server on the loopback: each fault is what it says, and is gone when healed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from glassbus.errors import ConfigurationError
from glassbus.faults.proxy import FaultyProxy, on_thread

#: Real seconds: more than anything here takes, and a bound on what must not come.
SOON_S = 30.0
SILENCE_S = 0.2


@asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """A server that says back what it hears."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, port: int) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def say(self, data: bytes) -> bytes:
        self.writer.write(data)
        await self.writer.drain()
        async with asyncio.timeout(SOON_S):
            return await self.reader.readexactly(len(data))

    async def hears_nothing(self) -> bool:
        try:
            async with asyncio.timeout(SILENCE_S):
                await self.reader.read(1)
        except TimeoutError:
            return True
        return False

    async def is_reset(self) -> bool:
        try:
            async with asyncio.timeout(SOON_S):
                while await self.reader.read(65536):
                    pass
        except ConnectionResetError:
            return True
        return False

    def close(self) -> None:
        self.writer.transport.abort()


def play(scenario: Callable[[FaultyProxy], Awaitable[None]]) -> None:
    async def run() -> None:
        async with echo() as port, FaultyProxy("127.0.0.1", port) as proxy:
            await scenario(proxy)

    asyncio.run(run())


def test_it_passes_what_is_said_both_ways_and_an_orderly_end() -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        client = await Client.to(proxy.port)
        assert await client.say(b"x" * 300_000) == b"x" * 300_000
        assert (proxy.connections, proxy.open) == (1, 1)
        client.writer.write_eof()
        assert await client.reader.read() == b""
        client.close()

    play(scenario)


def test_drop_resets_what_is_there_and_lets_new_ones_through() -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        client = await Client.to(proxy.port)
        await client.say(b"hello")
        proxy.drop()
        assert await client.is_reset()
        client.close()
        again = await Client.to(proxy.port)
        assert await again.say(b"again") == b"again"
        again.close()

    play(scenario)


def test_refuse_is_a_port_on_which_nobody_listens() -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        client = await Client.to(proxy.port)
        await client.say(b"hello")
        proxy.refuse(drop=False)
        assert await client.say(b"still") == b"still"
        with pytest.raises(ConnectionRefusedError):
            await Client.to(proxy.port)
        proxy.refuse()
        assert await client.is_reset()
        client.close()
        port = proxy.port
        proxy.heal()
        await asyncio.sleep(0)
        async with asyncio.timeout(SOON_S):
            while True:
                try:
                    again = await Client.to(port)
                    break
                except ConnectionRefusedError:
                    await asyncio.sleep(0.01)
        assert await again.say(b"again") == b"again"
        again.close()

    play(scenario)


def test_healing_takes_the_port_back_even_if_something_held_it_meanwhile() -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        proxy.refuse()
        with socket.socket() as squatter:
            squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            squatter.bind(("127.0.0.1", proxy.port))
            squatter.listen()
            proxy.heal()
            await asyncio.sleep(SILENCE_S)
        async with asyncio.timeout(SOON_S):
            while True:
                try:
                    client = await Client.to(proxy.port)
                    break
                except ConnectionError:
                    await asyncio.sleep(0.01)
        assert await client.say(b"hello") == b"hello"
        client.close()

    play(scenario)


def test_a_partition_is_silent_and_what_it_held_back_comes_afterwards() -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        client = await Client.to(proxy.port)
        await client.say(b"hello")
        proxy.partition()
        client.writer.write(b"held")
        assert await client.hears_nothing()
        late = await Client.to(proxy.port)
        late.writer.write(b"late")
        assert await late.hears_nothing()
        proxy.heal()
        async with asyncio.timeout(SOON_S):
            assert await client.reader.readexactly(4) == b"held"
            assert await late.reader.readexactly(4) == b"late"
        client.close()
        late.close()

    play(scenario)


def test_a_partition_one_way_leaves_it_half_open() -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        client = await Client.to(proxy.port)
        await client.say(b"hello")
        proxy.partition("to_client")
        client.writer.write(b"said")
        assert await client.hears_nothing()
        proxy.heal()
        async with asyncio.timeout(SOON_S):
            assert await client.reader.readexactly(4) == b"said"
        client.close()

    play(scenario)


def test_truncate_breaks_off_in_the_middle() -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        client = await Client.to(proxy.port)
        await client.say(b"hello")
        proxy.truncate(7)
        client.writer.write(b"0123456789")
        assert await client.is_reset()
        client.close()
        again = await Client.to(proxy.port)
        assert await again.say(b"again") == b"again"
        again.close()

    play(scenario)


def test_delay_holds_each_piece_back() -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        client = await Client.to(proxy.port)
        await client.say(b"hello")
        proxy.delay(0.1)
        started = asyncio.get_running_loop().time()
        await client.say(b"slow")
        assert asyncio.get_running_loop().time() - started >= 0.2, "there and back"
        client.close()

    play(scenario)


def test_a_server_that_is_not_there_is_a_reset() -> None:
    async def run() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            async with FaultyProxy("127.0.0.1", port) as proxy:
                client = await Client.to(proxy.port)
                assert await client.is_reset()
                client.close()

    asyncio.run(run())


def test_a_proxy_on_a_thread_takes_the_same_orders() -> None:
    async def run() -> None:
        async with echo() as port:
            with on_thread("127.0.0.1", port) as proxy:
                client = await Client.to(proxy.port)
                assert await client.say(b"hello") == b"hello"
                proxy.partition()
                client.writer.write(b"held")
                assert await client.hears_nothing()
                proxy.heal()
                async with asyncio.timeout(SOON_S):
                    assert await client.reader.readexactly(4) == b"held"
                proxy.truncate(100)
                proxy.delay(0.0)
                proxy.refuse(drop=False)
                proxy.drop()
                assert await client.is_reset()
                assert proxy.connections == 1
                client.close()

    asyncio.run(run())


def test_orders_that_make_no_sense_are_refused() -> None:
    async def scenario(proxy: FaultyProxy) -> None:
        orders: tuple[Callable[[], None], ...] = (
            lambda: proxy.partition("sideways"),  # type: ignore[arg-type]
            lambda: proxy.delay(-1),
            lambda: proxy.delay(float("nan")),
            lambda: proxy.truncate(1.5),  # type: ignore[arg-type]
        )
        for order in orders:
            with pytest.raises(ConfigurationError):
                order()

    play(scenario)
