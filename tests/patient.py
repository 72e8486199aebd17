"""The least that keeps a transport connected, for tests of the transport alone. A bus brings a real supervisor."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from glassbus.config import Address
from glassbus.errors import EndpointUnreachable
from glassbus.transport import Dialer, Listener

_AGAIN_S = 0.5


class Patient:
    """Dials the addresses in their order, the same again every half second once one of them was lost."""

    def __init__(self, addresses: Sequence[Address], listener: Listener) -> None:
        self._addresses = addresses
        self._listener = listener
        self._up = asyncio.Event()
        self._dialling: asyncio.Task[None] | None = None
        self._dialer: Dialer
        self._stopped = False

    async def start(self, dialer: Dialer, /) -> None:
        self._dialer = dialer
        failure: EndpointUnreachable | None = None
        for address in self._addresses:
            try:
                await dialer.dial(address, None)
            except EndpointUnreachable as error:
                failure = failure or error
            else:
                self._up.set()
                return
        assert failure is not None
        raise failure

    def lost(self, _error: BaseException, /) -> None:
        self._up.clear()
        if not self._stopped and (self._dialling is None or self._dialling.done()):
            self._dialling = asyncio.get_running_loop().create_task(self._dial_again())

    async def _dial_again(self) -> None:
        while True:
            if await self._dial_one():
                self._up.set()
                return
            await asyncio.sleep(_AGAIN_S)

    async def _dial_one(self) -> bool:
        for address in self._addresses:
            answered = True
            try:
                await self._dialer.dial(address, None)
            except EndpointUnreachable:
                answered = False  # the next one may be there, or this one later
            except Exception as error:
                self._listener.broken(error)
                await asyncio.Event().wait()  # until `stop`
            if answered:
                return True
        return False

    async def connected(self) -> None:
        await self._up.wait()

    def up(self) -> bool:
        return self._up.is_set()

    async def stop(self) -> None:
        self._stopped = True
        self._up.clear()
        if self._dialling is not None:
            self._dialling.cancel()
            await asyncio.gather(self._dialling, return_exceptions=True)
        await self._dialer.hang_up()
