"""Consumers and their JetStream server die at random, and every message is handled."""

from __future__ import annotations

import asyncio

from tests import nats_kit
from tests.simulation import shared_stream


def test_consumers_and_their_server_are_killed_and_nothing_is_lost() -> None:
    nats_kit.need_server()
    life = asyncio.run(shared_stream.live(seed=1, messages=500, kills=5))
    assert not life.problems
    assert (life.consumers_killed >= 5, life.servers_killed >= 1) == (True, True)
    assert life.runs >= life.messages
