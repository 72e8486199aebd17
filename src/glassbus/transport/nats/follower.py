"""Reads the stream's entries in their order, without a gap, for as long as one connection lasts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from nats.aio.msg import Msg

from glassbus.errors import EndpointUnreachable, TransportError
from glassbus.transport.nats.connection import ANSWER_S, Link

#: How often the server gives a sign when there is nothing to read, and after how long without one it is lost.
HEARTBEAT_S = 1.0
SILENCE_S = 5.0
_NANO = 1_000_000_000


class Follower:
    """An ordered consumer. `on_entry(seq, data)` is called for each entry behind `after`, in order.

    What it raises ends the following; `on_failed` is told.
    """

    def __init__(
        self,
        link: Link,
        stream: str,
        subjects: str,
        after: int,
        on_entry: Callable[[int, bytes], None],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self.seq = after
        self._link = link
        self._stream = stream
        self._subjects = subjects
        self._on_entry = on_entry
        self._on_failed = on_failed
        self._consumer = ""
        self._subscription: Any = None
        self._read = 0  # by this consumer
        self._generation = 0
        self._heard = time.monotonic()
        self._restarting: asyncio.Task[None] | None = None
        self._closed = False
        self._progress = asyncio.Event()

    async def start(self) -> int:
        """Begin behind `seq`; how many entries are there to be read at this moment."""
        self._generation += 1
        generation = self._generation

        async def on_message(message: Msg) -> None:
            if generation == self._generation and not self._closed:
                await self._on_message(message)

        inbox, self._subscription = await self._link.subscribe(on_message)
        self._read = 0
        config: dict[str, Any] = {
            "deliver_subject": inbox,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self.seq + 1,
            "ack_policy": "none",
            "max_deliver": 1,
            "filter_subject": self._subjects,
            "flow_control": True,
            "idle_heartbeat": int(HEARTBEAT_S * _NANO),
            "inactive_threshold": 30 * _NANO,
            "mem_storage": True,
            "num_replicas": 1,
        }
        made = await self._link.api(f"CONSUMER.CREATE.{self._stream}", {"stream_name": self._stream, "config": config})
        self._consumer = str(made["name"])
        self._heard = time.monotonic()
        return int(made.get("num_pending", 0)) + int(made.get("delivered", {}).get("consumer_seq", 0))

    async def catch_up(self) -> None:
        """Start, and return when all that is there now was read. Raises TransportError."""
        there = await self.start()
        await self._reach(there)

    async def barrier(self) -> None:
        """Return when all that is in the stream at this moment was read. Raises TransportError."""
        info = await self._link.api(f"CONSUMER.INFO.{self._stream}.{self._consumer}")
        await self._reach(int(info.get("num_pending", 0)) + int(info.get("delivered", {}).get("consumer_seq", 0)))

    async def _reach(self, count: int) -> None:
        consumer = self._consumer
        while self._read < count and not self._closed:
            self._progress.clear()
            before = self._read
            try:
                async with asyncio.timeout(ANSWER_S):
                    await self._progress.wait()
            except TimeoutError as error:
                if self._read == before:
                    raise EndpointUnreachable(f"{self._link.address} does not send what its stream holds") from error
            if self._consumer != consumer:
                return  # a new consumer: whoever asks again gets its answer from that one

    async def close(self) -> None:
        """Read no more. Idempotent."""
        self._closed = True
        self._progress.set()
        if self._restarting is not None:
            self._restarting.cancel()

    async def release(self) -> None:
        """Let the server forget the consumer now, not when it notices that nobody listens."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None and self._consumer:
            try:
                await subscription.unsubscribe()
                await self._link.api(f"CONSUMER.DELETE.{self._stream}.{self._consumer}")
            except Exception:  # noqa: BLE001 - it forgets by itself after a while
                return

    @property
    def silent_s(self) -> float:
        """For how long the server has sent nothing, neither entry nor heartbeat."""
        return time.monotonic() - self._heard

    async def _on_message(self, message: Msg) -> None:
        self._heard = time.monotonic()
        if message.headers and message.headers.get("Status") == "100":
            await self._on_control(message)
            return
        seq, read = _places(message.reply)
        if read != self._read + 1:
            self._restart()
            return
        self._read = read
        try:
            if seq > self.seq:
                self._on_entry(seq, message.data)
                self.seq = seq
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing behind it may be read
            self._closed = True
            self._on_failed(error)
        self._progress.set()

    async def _on_control(self, message: Msg) -> None:
        headers = message.headers or {}
        if message.reply:  # flow control: it waits for a sign that we have read so far
            await self._link.send(message.reply)
        stalled = headers.get("Nats-Consumer-Stalled")
        if stalled:
            await self._link.send(stalled)
        last = headers.get("Nats-Last-Consumer")
        if last is not None and int(last) != self._read:
            self._restart()

    def _restart(self) -> None:
        """Something was not delivered: a new consumer goes on behind what was read last."""
        if self._restarting is None or self._restarting.done():
            self._restarting = asyncio.get_running_loop().create_task(self._start_again())

    async def _start_again(self) -> None:
        try:
            old, self._subscription = self._subscription, None
            if old is not None:
                await old.unsubscribe()
            await self.start()
        except TransportError as error:
            self._on_failed(error)
        except Exception as error:  # noqa: BLE001 - nobody awaits this task
            self._on_failed(EndpointUnreachable(f"the stream cannot be followed: {type(error).__name__}"))


def _places(reply: str) -> tuple[int, int]:
    """Where an entry is in the stream, and its count in the consumer, from `$JS.ACK.…`."""
    tokens = reply.split(".")
    first = 5 if len(tokens) == 9 else 7  # with domain and account in front where there are more
    return int(tokens[first]), int(tokens[first + 1])
