"""Messages that no handler of the bus had, put to rest among its dead letters, each with the report of its error.

They go through the store like any other, so they are accepted, counted, told and found as others are: published to
a topic of the bus's own, which no pattern of a program takes, claimed at once, and dead-lettered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from copy import copy
from typing import Any

from glassbus.clock import Clock
from glassbus.errors import (
    ErrorCategory,
    ErrorReport,
    ErrorSeverity,
    InvalidTopic,
    PublishError,
    StoreCorrupt,
    TransportError,
    UnknownSubscription,
)
from glassbus.facts import Delivery, DeliveryDeadLettered, DeliveryHandled, transport_failed
from glassbus.message import Envelope, check_topic
from glassbus.observer import Hub
from glassbus.policy.delivery import Decision, State
from glassbus.transport import Stored, SubscriptionSpec, Transport
from glassbus.transport.reports import decode_report, encode_report

#: The subscription that has them, and what their topics begin with.
NAME = "reported"
PREFIX = "glassbus.reported."
_HEADER = "glassbus-report"
#: In the place of a topic that nobody knows.
_UNKNOWN = "_"
_TOPIC_MAX = 200
#: As many as there may be: what is to rest is never refused for its number.
_CAPACITY = 10**12
#: How long `keep` waits for a stored message to be at rest, in seconds; it will be, by us or another process.
_REST_S = 5.0
_CLAIM_AGAIN_S = 1.0


def resting_topic(topic: object) -> str:
    """Where a message of `topic` goes to rest; of any value."""
    try:
        known = check_topic(topic)
    except InvalidTopic:
        known = ""
    return PREFIX + (known if 0 < len(known) <= _TOPIC_MAX else _UNKNOWN)


def with_report(headers: dict[str, str], report: ErrorReport) -> dict[str, str]:
    """The headers of a message that is to rest with `report`: whoever claims it has all that it takes."""
    return {**headers, _HEADER: encode_report(report).decode()}


class Resting:
    """Puts sealed messages to rest. Belongs to the bus's loop."""

    def __init__(
        self,
        transport: Callable[[], Transport],
        publish: Callable[[Envelope], Awaitable[Stored]],
        in_background: Callable[[str, Coroutine[Any, Any, None]], asyncio.Task[None]],
        declared: Callable[[], None],
        hub: Hub,
        clock: Clock,
    ) -> None:
        self._transport = transport
        self._publish = publish
        self._in_background = in_background
        self._declared = declared
        self._hub = hub
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._beginning = asyncio.Lock()
        self._kept: dict[str, asyncio.Future[None]] = {}

    async def keep(self, envelope: Envelope) -> None:
        """Return when `envelope`, whose topic and headers are as above, is stored, and as a rule at rest.

        It may be given again. Raises PublishError and TransportError, as publishing does.
        """
        await self.begin()
        at_rest = self._kept[envelope.id] = asyncio.get_running_loop().create_future()
        try:
            stored = await self._publish(envelope)
            if not stored.duplicate and stored.spooled is None:
                await asyncio.wait([at_rest], timeout=_REST_S)
        finally:
            self._kept.pop(envelope.id, None)

    async def begin(self) -> None:
        """Take what is there for it, from now on until the bus stops. Raises TransportError."""
        async with self._beginning:
            transport = self._transport()
            if self._task is not None and not self._task.done():
                if NAME in transport.queues():
                    return
                self._task.cancel()  # it was forgotten: what is claimed there now never comes
            await transport.declare(SubscriptionSpec(NAME, PREFIX + ">", _CAPACITY), consume=True)
            self._declared()
            self._task = self._in_background("reported", self._take(transport))

    async def _take(self, transport: Transport) -> None:
        while True:
            try:
                delivery = transport.claim_now(NAME) or await transport.claim(NAME)
            except UnknownSubscription:
                return  # forgotten: the next message declares it again
            except TransportError as error:
                self._hub.state(transport_failed(self._clock.wall(), f"claim of {NAME}", error))
                await asyncio.sleep(_CLAIM_AGAIN_S)
                continue
            delivery.started_at = self._clock.wall()
            handed_on = delivery.replays > 0 and await self._hand_on(delivery)
            decision = self._handled(delivery) if handed_on else self._at_rest(delivery)
            transport.settle(delivery, decision, self._recorded)

    async def _hand_on(self, delivery: Delivery) -> bool:
        """A replay: publish it to the topic that it is of. Whether a subscription has it now."""
        envelope = delivery.envelope
        topic = envelope.topic.removeprefix(PREFIX)
        if topic == _UNKNOWN:
            return False
        headers = {name: value for name, value in envelope.headers.items() if name != _HEADER}
        again = Envelope(
            f"{envelope.id}.{delivery.replays}",  # of this replay, however often it is tried
            topic,
            envelope.body,
            envelope.codec,
            headers,
            envelope.priority,
            envelope.key,
            self._clock.wall(),
            remember=True,
        )
        try:
            stored = await self._publish(again)
        except (PublishError, TransportError):
            return False  # which is told; it rests again
        return bool(stored.subscriptions) or stored.duplicate

    def _handled(self, delivery: Delivery) -> Decision:
        fact = DeliveryHandled(at=self._clock.wall(), delivery=delivery, duration_s=0.0)
        return Decision(State.HANDLED, delivery.attempt, facts=(fact,))

    def _at_rest(self, delivery: Delivery) -> Decision:
        now = self._clock.wall()
        report = _report_of(delivery)
        shown = copy(report)
        shown.context = dict(report.context)
        fact = DeliveryDeadLettered(at=now, delivery=delivery, report=shown, reason="not_retryable")
        return Decision(
            State.DEAD_LETTERED,
            delivery.attempt,
            first_failed_at=delivery.first_failed_at or report.timestamp,
            report=report,
            reason="not_retryable",
            facts=(fact,),
        )

    def _recorded(self, delivery: Delivery, decision: Decision, accepted: bool) -> None:
        if not accepted:
            return  # another process took it over meanwhile, and puts it to rest
        for fact in decision.facts:
            self._hub.state(fact)
        waiting = self._kept.get(delivery.envelope.id)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)


def _report_of(delivery: Delivery) -> ErrorReport:
    envelope = delivery.envelope
    try:
        return decode_report(envelope.headers.get(_HEADER, "").encode())
    except StoreCorrupt:
        # Published there by hand, or cut short: it rests all the same.
        return ErrorReport(
            error_id=f"{envelope.id}:{NAME}",
            timestamp=envelope.published_at,
            category=ErrorCategory.MESSAGE_PROCESSING_ERROR,
            severity=ErrorSeverity.MEDIUM,
            message="the report of its error cannot be read",
            context={"message_id": envelope.id, "topic": envelope.topic.removeprefix(PREFIX)},
        )
