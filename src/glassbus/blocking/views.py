"""Parts of the bus whose methods are to be awaited, as plain calls."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping
from typing import Any

from glassbus.blocking.loop import LoopThread
from glassbus.bus import MessageBus
from glassbus.deadletters import DeadLetter
from glassbus.policy.breaker import BreakerState


class BlockingDeadLetters:
    """The dead-letter queue: `list`, `get`, `replay`, `discard`, as `MessageBus.dead_letters` has them."""

    def __init__(self, core: MessageBus, loop: LoopThread) -> None:
        self._core = core
        self._loop = loop

    def list(self, limit: int = 100, **filters: Any) -> builtins.list[DeadLetter]:
        """At most `limit` dead letters that match every filter given, newest first."""
        return self._loop.call(self._core.dead_letters.list, limit, **filters)

    def get(self, dead_letter_id: str) -> DeadLetter:
        """One dead letter. Raises UnknownDeadLetter."""
        return self._loop.call(self._core.dead_letters.get, dead_letter_id)

    def replay(self, *ids: str) -> int:
        """Put dead letters back in their queues as new; how many. All or none. Raises UnknownDeadLetter."""
        return self._loop.call(self._core.dead_letters.replay, *ids)

    def discard(self, *ids: str) -> int:
        """Remove dead letters for good; how many. All or none. Raises UnknownDeadLetter."""
        return self._loop.call(self._core.dead_letters.discard, *ids)


class BlockingBreaker:
    """One subscription's kill switch. Each method returns when what it did is stored."""

    def __init__(self, subscription: str, core: MessageBus, loop: LoopThread) -> None:
        self._subscription = subscription
        self._core = core
        self._loop = loop

    @property
    def state(self) -> BreakerState:
        return self._core.breakers[self._subscription].state

    def force_open(self) -> None:
        """Stop handing out messages until `reset`."""
        self._do("force_open")

    def disable(self) -> None:
        """Forced closed: never trips, until `reset`."""
        self._do("disable")

    def reset(self) -> None:
        """Closed and automatic again, with nothing counted."""
        self._do("reset")

    def _do(self, what: str) -> None:
        async def do() -> None:
            await getattr(self._core.breakers[self._subscription], what)()

        self._loop.call(do)


class BlockingBreakers(Mapping[str, BlockingBreaker]):
    """Kill switches by the name of their subscription, for those that the bus runs."""

    def __init__(self, core: MessageBus, loop: LoopThread) -> None:
        self._core = core
        self._loop = loop

    def __getitem__(self, subscription: str) -> BlockingBreaker:
        self._core.breakers[subscription]  # raises UnknownSubscription
        return BlockingBreaker(subscription, self._core, self._loop)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._core.breakers))

    def __len__(self) -> int:
        return len(self._core.breakers)
