"""What the tests of the command share: a store with something in it, and the command run in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from glassbus import Message, MessageBus, Outgoing, Retry
from glassbus.cli import main


class Command:
    """Runs `glassbus …` in this process and keeps what it wrote."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: object) -> int:
        self._capsys.readouterr()
        status = main([str(word) for word in words])
        self.out, self.err = self._capsys.readouterr()
        return status


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


def make_store(path: Path, messages: Iterable[Outgoing] = ()) -> str:
    """A store with the subscription `charge` on `orders.*`, which handles what is no failure; its URL.

    A payload {"fail": TEXT} is dead-lettered after its only attempt, with a ValueError of that text.
    """

    async def run() -> None:
        bus = MessageBus(url_of(path), telemetry=False)

        @bus.subscribe("orders.*", name="charge", retry=Retry(max_attempts=1))
        async def charge(message: Message[Any]) -> None:
            if isinstance(message.payload, dict) and "fail" in message.payload:
                raise ValueError(message.payload["fail"])

        async with bus:
            await bus.publish_many(messages)
            await bus.drain(60.0)

    asyncio.run(run())
    return url_of(path)


def failing(*texts: str) -> list[Outgoing]:
    return [Outgoing("orders.created", {"fail": text}, f"m-{number}") for number, text in enumerate(texts, 1)]


def payloads(url: str) -> list[Any]:
    """Handle what is pending for `charge` and return the payloads in order."""
    seen: list[Any] = []

    async def run() -> None:
        bus = MessageBus(url, telemetry=False)

        @bus.subscribe("orders.*", name="charge")
        async def charge(message: Message[Any]) -> None:
            seen.append(message)

        async with bus:
            await bus.drain(60.0)

    asyncio.run(run())
    return seen
