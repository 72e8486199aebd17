"""What the bus itself can do about an error, in the form of the managers that programs bring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from glassbus.blocking.attempt import dropped
from glassbus.blocking.loop import LoopThread
from glassbus.bus import MessageBus
from glassbus.message import Message


class Connections:
    """Connects again what a program keeps in `ProductionMessageBus.connections`."""

    def __init__(self, connections: Mapping[Any, Any], core: MessageBus) -> None:
        self._connections = connections
        self._core = core

    def knows(self, connection_id: Any) -> bool:
        """Whether there is anything here that could connect it."""
        return self._is_ours(connection_id) or self._connect(connection_id) is not None

    def reconnect(self, connection_id: Any) -> bool:
        """Whether it is connected now: its `reconnect` or `connect` was called, raised nothing and did not say False.

        The bus's own connection, by its address, mends itself: the answer is whether its store answers.
        """
        if self._is_ours(connection_id):
            return self._core.health().ready
        connect = self._connect(connection_id)
        answer = connect() if connect is not None else False
        return not dropped(answer) and (answer is None or bool(answer))

    def _is_ours(self, connection_id: Any) -> bool:
        return self._core.running and type(connection_id) is str and connection_id == self._core.address

    def _connect(self, connection_id: Any) -> Callable[[], Any] | None:
        try:
            held = self._connections.get(connection_id)
        except TypeError:  # it cannot be the key of anything
            return None
        for name in ("reconnect", "connect"):
            connect = getattr(held, name, None)
            if callable(connect):
                return connect  # type: ignore[no-any-return]  # whatever the program put there
        return None


class Queues:
    """The bus's own queues slow their publishers by themselves, and grow as their `Overflow` says."""

    def __init__(self, core: MessageBus) -> None:
        self._core = core

    def apply_backpressure(self, queue_name: Any) -> bool:
        """Whether it is a queue of the bus: its publishers wait for room then."""
        return self._core.running and queue_name in self._core.queues()


class Requeue:
    """Publishes a message again to its topic."""

    def __init__(self, topic: str, core: MessageBus, loop: LoopThread) -> None:
        self._topic = topic
        self._core = core
        self._loop = loop

    def requeue_message(self, message: Any) -> bool:
        """Whether some subscription has it now."""
        if type(message) is Message:
            receipt = self._loop.call(
                self._core.publish,
                self._topic,
                message.payload,
                key=message.key,
                priority=message.priority,
                headers=message.headers,
            )
        else:
            receipt = self._loop.call(self._core.publish, self._topic, message)
        return bool(receipt.subscriptions)
