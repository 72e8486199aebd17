"""How each category is recovered with the managers of the program that asks.

Each strategy tries what mends the cause. Where that is not to be had and there is a message to save, it is tried
again later (`message_queue.requeue_message`) while retries are left, and then dead-lettered
(`dead_letter_queue.add_message`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from glassbus.blocking.attempt import Attempt, Outcome, named
from glassbus.errors import ErrorCategory

#: By how much a timeout or a capacity grows, and what is left of the load.
TIMEOUT_FACTOR, CAPACITY_FACTOR, LOAD_FACTOR = 1.5, 1.5, 0.5


class Later(Protocol):
    """What a strategy may have done later, on the timer."""

    def backoff_s(self, category: ErrorCategory, retry: int, /) -> float:
        """Seconds before retry number `retry`, from 0; the first is made at once."""

    def retries(self, category: ErrorCategory, /) -> int: ...
    def requeue(self, attempt: Attempt, message: Any, delay_s: float, /) -> bool:
        """Give `message` back to its queue later; False when that cannot be promised."""

    def reconnect(self, attempt: Attempt, connection_id: Any, /) -> None:
        """Go on trying, later."""


class Strategy:
    """A built-in strategy. Calling it answers as a user's own would: whether it worked."""

    def __init__(self, recover: Callable[[Attempt, Later], Outcome], later: Later) -> None:
        self._recover = recover
        self._later = later

    def __call__(self, report: Any, context: Mapping[str, Any] | None = None) -> bool:
        return self.run(Attempt(report, context)).ok

    def run(self, attempt: Attempt) -> Outcome:
        return self._recover(attempt, self._later)


def spent(attempt: Attempt, later: Later) -> bool:
    return attempt.retry_count >= later.retries(attempt.category)


def message_of(attempt: Attempt) -> Any:
    return attempt.find("message", "original_message")


def dead_letter(attempt: Attempt, why: str = "") -> Outcome:
    """Put the message to rest with its report, where there are a message and a place for it."""
    message = message_of(attempt)
    if message is None:
        return Outcome(False, "none", why or "there is no message to save")
    answer = attempt.ask("dead_letter_queue", "add_message", message, attempt.report)
    if answer.done:
        return Outcome(True, "dead_letter", why)
    return Outcome(False, "dead_letter", answer.error or why or "there is no dead_letter_queue that took it")


def redeliver(attempt: Attempt, later: Later, why: str = "", *, counted: bool = False) -> Outcome:
    """Try the message again, else dead-letter it. `counted`: this try is in the report's count already."""
    message = message_of(attempt)
    before = attempt.retry_count - counted
    if message is None or before >= later.retries(attempt.category):
        return dead_letter(attempt, why or "no retries are left")
    if not attempt.has("message_queue", "requeue_message"):
        return dead_letter(attempt, why or "there is no message_queue to try it again with")
    delay_s = later.backoff_s(attempt.category, before)
    attempt.mark(retry_count=before + 1)
    # Without a dead-letter queue a requeue that fails later would lose the message: then it is made now.
    caught = delay_s > 0 and attempt.has("dead_letter_queue", "add_message")
    if caught and later.requeue(attempt, message, delay_s):
        return Outcome(True, "delayed_retry", told=True)
    answer = attempt.ask("message_queue", "requeue_message", message)
    return Outcome(True, "immediate_retry") if answer.done else dead_letter(attempt, answer.error or "it was refused")


def connection(attempt: Attempt, later: Later) -> Outcome:
    """Reconnect now; on failure go on trying on the timer, and say that it has not worked yet."""
    connection_id = attempt.find("connection_id", "connection")
    if spent(attempt, later):
        return redeliver(attempt, later)
    answer = attempt.ask("connection_manager", "reconnect", connection_id)
    if answer.yes:
        return Outcome(True, "reconnect")
    if not answer.asked:
        return redeliver(attempt, later, "there is no connection_manager to reconnect with")
    attempt.mark(retry_count=attempt.retry_count + 1)
    if not spent(attempt, later):
        later.reconnect(attempt, connection_id)
    why = answer.error or f"{named(connection_id)} could not be reconnected"
    if message_of(attempt) is None:
        return Outcome(False, "reconnect", why)
    return redeliver(attempt, later, why, counted=True)


def processing(attempt: Attempt, later: Later) -> Outcome:
    return redeliver(attempt, later)


def serialization(attempt: Attempt, later: Later) -> Outcome:
    """Another way to write it; what comes of that is in the context as `serialized_data`."""
    data = attempt.find("data", "message", "original_message")
    if data is not None and not spent(attempt, later):
        attempt.mark(retry_count=attempt.retry_count + 1)
        answer = attempt.ask("serializer", "fallback_serialize", data)
        if answer.asked and not answer.error and answer.value is not None and answer.value is not False:
            attempt.offer("serialized_data", answer.value)
            return Outcome(True, "fallback_codec")
        return dead_letter(attempt, answer.error or "no serializer could write it")
    return dead_letter(attempt)


def overflow(attempt: Attempt, later: Later) -> Outcome:
    """Slow the publishers, and expand the queue where it can be; else the message goes to rest."""
    name = attempt.find("queue_name", "queue")
    slowed = attempt.ask("queue_manager", "apply_backpressure", name)
    if attempt.ask("queue_manager", "can_expand_capacity", name).yes:
        expanded = attempt.ask("queue_manager", "expand_capacity", name, CAPACITY_FACTOR)
        if expanded.done:
            return Outcome(True, "expand")
    if slowed.done:
        return Outcome(True, "backpressure")
    return dead_letter(attempt, slowed.error or "there is no queue_manager that made room")


def timeout(attempt: Attempt, later: Later) -> Outcome:
    """Give the operation more time; then try its message, if it has one, again."""
    if spent(attempt, later):
        return dead_letter(attempt)
    operation = attempt.find("operation", "operation_name", "operation_id")
    answer = attempt.ask("timeout_manager", "increase_timeout", operation, TIMEOUT_FACTOR)
    if message_of(attempt) is not None and attempt.has("message_queue", "requeue_message"):
        return redeliver(attempt, later)
    attempt.mark(retry_count=attempt.retry_count + 1)
    if answer.done:
        return Outcome(True, "increase_timeout")
    return dead_letter(attempt, answer.error or "there is no timeout_manager to give it more time")


def authentication(attempt: Attempt, later: Later) -> Outcome:
    """Refresh the credentials, once, and connect with them. A second refusal is not answered by asking again."""
    if spent(attempt, later):
        return dead_letter(attempt)
    target = attempt.find("connection_id", "connection", "operation")
    attempt.mark(retry_count=attempt.retry_count + 1)
    answer = attempt.ask("credential_manager", "refresh_credentials", target)
    if not answer.done:
        return dead_letter(attempt, answer.error or "there is no credential_manager that refreshed them")
    connected = attempt.ask("connection_manager", "reconnect", target)
    if connected.asked and not connected.yes:
        return dead_letter(attempt, connected.error or "the new credentials did not reconnect it")
    return Outcome(True, "refresh_credentials")


def resources(attempt: Attempt, later: Later) -> Outcome:
    """Do less; else slow the publishers; else put the message aside for later."""
    answer = attempt.ask("resource_manager", "reduce_load", LOAD_FACTOR)
    if answer.done:
        return Outcome(True, "shed")
    slowed = attempt.ask("queue_manager", "apply_backpressure", attempt.find("queue_name", "queue"))
    if slowed.done:
        return Outcome(True, "backpressure")
    return redeliver(attempt, later, answer.error or slowed.error)


def configuration(attempt: Attempt, later: Later) -> Outcome:
    """Load the configuration anew; else go back to the last that worked."""
    loaded = attempt.ask("configuration_manager", "reload")
    if loaded.done:
        return Outcome(True, "reload")
    restored = attempt.ask("configuration_manager", "restore_last_known_good")
    if restored.done:
        return Outcome(True, "last_known_good")
    return dead_letter(attempt, loaded.error or restored.error or "there is no configuration_manager to ask")


#: By category, in the order in which they are documented.
BUILT_IN: dict[ErrorCategory, Callable[[Attempt, Later], Outcome]] = {
    ErrorCategory.CONNECTION_ERROR: connection,
    ErrorCategory.MESSAGE_PROCESSING_ERROR: processing,
    ErrorCategory.SERIALIZATION_ERROR: serialization,
    ErrorCategory.QUEUE_OVERFLOW: overflow,
    ErrorCategory.TIMEOUT_ERROR: timeout,
    ErrorCategory.AUTHENTICATION_ERROR: authentication,
    ErrorCategory.RESOURCE_EXHAUSTION: resources,
    ErrorCategory.CONFIGURATION_ERROR: configuration,
}
