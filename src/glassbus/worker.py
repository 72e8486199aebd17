"""Runs one subscription: claim -> scope -> handle -> decide -> settle -> state the facts.

A worker has `concurrency` slots, each one task that claims its next delivery
when it is free. There is no task for each message and no timer for each attempt:
the worker has one alarm, set for the earliest deadline among its slots.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any

from glassbus.clock import Clock
from glassbus.errors import (
    AttemptsSpent,
    HandlerAbandoned,
    HandlerCancelled,
    HandlerTimedOut,
    HandlingError,
    OwnerDied,
    PayloadUndecodable,
)
from glassbus.facts import (
    AttemptOverdue,
    CodecFellBack,
    Delivery,
    DeliveryDeadLettered,
    DeliveryRedelivered,
    SettlementRefused,
    SlotRegained,
    current_delivery,
    transport_failed,
)
from glassbus.handler import Handler, Threads, finish, in_context, is_unfinished
from glassbus.message import Envelope
from glassbus.observer import NO_SCOPE, Hub
from glassbus.policy.delivery import (
    Abandoned,
    Decision,
    Failed,
    Handled,
    Outcome,
    Spent,
    State,
    Stopped,
    decide,
)
from glassbus.policy.retry import Retry, RetryBudget
from glassbus.record.fingerprint import FailureSites
from glassbus.record.tally import Buckets, Tally
from glassbus.recovery.handler import HandlerRecovery, Shared
from glassbus.recovery.killswitch import Gate
from glassbus.slots import CLAIM_AGAIN_S, CLEAN_UP_S, Deadlines, Slot, Slots
from glassbus.subscription import Subscription
from glassbus.transport import Transport, hold_back_low

#: A first attempt that simply worked: what `decide` says of it, without its fact.
HANDLED = Decision(State.HANDLED)

#: Who holds a subscription back that its configuration wants paused.
SETTINGS = "settings"
#: How long a slot may go on without letting the loop turn, in seconds.
_TURN_S = 0.005
_enter = current_delivery.set
_DONE = object()  # None is what a bare yield waits for


class Worker:
    """The running side of one subscription. Everything here belongs to the bus's loop."""

    def __init__(
        self,
        subscription: Subscription,
        *,
        transport: Transport,
        hub: Hub,
        clock: Clock,
        sites: FailureSites,
        uniform: Callable[[], float],
        shared: Shared,
    ) -> None:
        self.subscription = subscription
        self.name = subscription.spec.name
        self.tallies: dict[str, Tally] = {}
        self.handling: dict[str, Buckets] = {}
        self.gate = Gate(self.name, subscription.kill_switch, hub, clock)
        self.retry = subscription.retry
        self.dead_lettered = self.expired = self.recovered = 0
        self._transport = transport
        self._hub = hub
        self._clock = clock
        self._sites = sites
        self._uniform = uniform
        #: Called after each settlement is recorded; entered here while somebody waits for that.
        self.on_settled: set[Callable[[], None]] = set()
        #: Told when our own handling of an error raises: never expected.
        self.own_failure: Callable[[BaseException], None] = lambda _error: None
        self._quiet = 0
        self._claims_failed_at = float("-inf")
        self._budget = RetryBudget(subscription.retry.budget, subscription.retry.budget_per_second, clock.monotonic())
        self._slots = Slots(self.name, self._serve, self._claim_failed)
        self._recovery = HandlerRecovery(
            self.name,
            shared,
            retry=subscription.retry,
            timeout_s=subscription.timeout,
            abandon_after_s=subscription.abandon_after,
            adaptive=subscription.adaptive_timeout,
            concurrency=subscription.concurrency,
            resize=self._slots.resize,
            hold_back=lambda held: hold_back_low(transport, self.name, held),
            adapted=self._adapted,
        )
        self._deadlines = Deadlines(
            self._slots.all,
            monotonic=clock.monotonic,
            in_force=self._recovery.timeout_in_force_s,
            abandon_after_s=subscription.abandon_after,
            cancels=subscription.handler.is_async,
            overdue=self._state_overdue,
            abandon=self._abandon,
        )
        self._context = copy_context()
        hub.enter_worker(self._context)
        self._monotonic, self._wall = clock.monotonic, clock.wall
        self._argument = subscription.handler.argument
        self._function = subscription.handler.function
        # A coroutine function that takes just the message needs nothing but a context around it.
        self._simple = subscription.handler.is_simple
        subscription.handler.fell_back = self._fell_back
        self._own_timeout_s = subscription.timeout
        #: The timeout in force.
        self.timeout_s = subscription.timeout
        self._threads: Threads | None = None

    # What can be seen from outside

    @property
    def handled(self) -> int:
        return sum(tally.handled for tally in self.tallies.values())

    @property
    def settled_count(self) -> int:
        return self.handled + self.dead_lettered + self.expired

    @property
    def in_flight(self) -> int:
        return self._slots.in_flight

    @property
    def overdue(self) -> int:
        return self._slots.overdue

    @property
    def lost(self) -> int:
        """Slots whose handler was abandoned: they are lost until it returns."""
        return self._slots.lost

    @property
    def limit(self) -> int:
        """Most attempts that may run at once: slots that are neither lost nor shed."""
        return self._slots.limit

    @property
    def sheds(self) -> bool:
        """Whether load is held back because resources ran out."""
        return self._recovery.load.shed

    @property
    def state(self) -> str:
        return "stopped" if self._slots.stopping else self.gate.state_name

    def tally(self, destination: str) -> Tally:
        found = self.tallies.get(destination)
        if found is None:
            found = self.tallies[destination] = Tally(self.name, destination)
        return found

    # Starting and stopping

    def start(self) -> None:
        if not self.subscription.handler.is_async:
            self._threads = Threads(asyncio.get_running_loop(), self._clock, self.name)
        self._slots.resize(self._recovery.load.limit)

    def tune(self, subscription: Subscription) -> None:
        """Other settings hold from now on: attempts that run keep the timeout they began with."""
        before, self.subscription = self.subscription, subscription
        self.retry = subscription.retry
        if (before.retry.budget, before.retry.budget_per_second) != (self.retry.budget, self.retry.budget_per_second):
            self._budget = RetryBudget(self.retry.budget, self.retry.budget_per_second, self._monotonic())
        self._own_timeout_s = subscription.timeout
        self._deadlines.abandon_after_s = subscription.abandon_after
        self.gate.tune(subscription.kill_switch)
        self._recovery.tune(
            retry=subscription.retry,
            timeout_s=subscription.timeout,
            abandon_after_s=subscription.abandon_after,
            adaptive=subscription.adaptive_timeout,
            concurrency=subscription.concurrency,
        )
        if subscription.paused:
            self.gate.hold_here(SETTINGS, "")
        else:
            self.gate.let_go(SETTINGS)

    def _adapted(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s

    def _claim_failed(self, error: BaseException) -> None:
        now = self._monotonic()
        if now >= self._claims_failed_at + CLAIM_AGAIN_S:  # all slots fail together: told once
            self._claims_failed_at = now
            self._hub.state(transport_failed(self._wall(), f"claim of {self.name}", error))

    async def stop(self, deadline_s: float) -> None:
        """Take nothing more, let running handlers finish within `deadline_s`, give back the rest.

        When cancelled, it halts.
        """
        self._slots.close()
        self.gate.close()
        try:
            await self._slots.ended(deadline_s)
            self._slots.cancel()
            await self._slots.ended(CLEAN_UP_S if self._threads is None else 0.0)
        finally:
            self.halt()

    def halt(self) -> None:
        """Stop without waiting for anybody: what still runs is given back over its handler's head."""
        self._slots.close()
        self.gate.close()
        self._slots.cancel()
        for slot in self._slots.running():
            self._release(slot, Stopped("stopping"))
        self._deadlines.stop()
        self._recovery.stop()
        if self._threads is not None:
            self._threads.close()

    def holds(self, delivery: Delivery | None) -> bool:
        """Whether a slot has `delivery` at work."""
        return any(slot.delivery is delivery for slot in self._slots.all)

    def at_work(self) -> list[Delivery]:
        """What its handlers hold now."""
        return [slot.delivery for slot in self._slots.all if slot.delivery is not None]

    def runs(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether `task` is one of our slots, and so may not wait for our end."""
        return any(slot.task is task for slot in self._slots.all)

    # One message

    async def _serve(self, slot: Slot) -> None:
        """Claim, handle, settle, one delivery after the other, until the worker stops."""
        claim_now, claim = self._transport.claim_now, self._transport.claim
        handled_now, settle = self._transport.handled_now, self._transport.settle
        name, gate, hub, deadlines, tallies = self.name, self.gate, self._hub, self._deadlines, self.tallies
        monotonic, wall, base = self._monotonic, self._wall, self._context
        yield_at = 0.0
        while slot.open:
            if gate.shut:
                await gate.wait()
                continue
            delivery = claim_now(name)
            if delivery is None:
                delivery = await claim(name)
                yield_at = monotonic() + _TURN_S
            envelope, attempt = delivery.envelope, delivery.attempt
            if (gate.guarded or attempt != 1) and not self._admit(slot, delivery):
                continue
            slot.started = now = monotonic()
            slot.deadline = deadline = now + self._own_timeout_s
            slot.delivery = delivery
            if deadline < deadlines.at:
                deadlines.watch(deadline)
            try:
                argument = self._argument(envelope)
                context = base.copy()
                context.run(_enter, delivery)
                # Nearly every delivery is plain: a first attempt of a message without headers.
                asked = hub.scopes and (hub.scopes_plain or envelope.headers or attempt != 1 or delivery.replays)
                scope = hub.scope(delivery) if asked else NO_SCOPE
                if self._threads is not None:
                    await self._handle_on_thread(context, delivery, argument, scope)
                else:
                    if scope is NO_SCOPE and self._simple:
                        coroutine = self._function(argument)
                    else:
                        coroutine = _scoped(scope, self.subscription.handler, delivery, argument)
                    # A handler that waits for nothing is done after one step.
                    waits_for = context.run(next, coroutine.__await__(), _DONE)
                    if waits_for is not _DONE:
                        await in_context(coroutine, context, waits_for)
            except BaseException as error:  # noqa: BLE001 - a handler may raise anything; `_raised` tells them apart
                try:
                    self._raised(slot, delivery, error)
                except Exception as own:
                    if own is not error:
                        self.own_failure(own)
                    raise
            else:
                if slot.touched or attempt != 1 or hub.shows_happy:
                    self._returned(slot, delivery)
                else:
                    tally = tallies.get(delivery.destination) or self.tally(delivery.destination)
                    duration_s = monotonic() - now
                    self._quiet += 1
                    if handled_now(delivery):
                        tally.handled += 1
                        tally.duration.observe(duration_s)
                        tally.age.observe(wall() - (envelope.due_at or envelope.published_at))
                        if self.on_settled:
                            self._tell_settled()
                    else:
                        tally.duration.observe(duration_s)
                        settle(delivery, HANDLED, self._recorded)
            finally:
                slot.delivery = None
                if slot.touched:
                    slot.clear()
            if now >= yield_at:
                # Handlers that wait for nothing must not keep the loop from everyone else.
                await asyncio.sleep(0)
                yield_at = monotonic() + _TURN_S

    def _admit(self, slot: Slot, delivery: Delivery) -> bool:
        """Whether to run a delivery that the gate must judge, or that was claimed before."""
        if self.gate.guarded:
            permit = self.gate.enter()
            if permit is None:
                self._settle(delivery, Stopped("breaker_open"))
                return False
            slot.permit, slot.touched = permit, True
        if delivery.redelivered and self._hub.wants(DeliveryRedelivered):
            self._hub.state(DeliveryRedelivered(at=self._wall(), delivery=delivery, reason=delivery.redelivered))
        if delivery.attempt > self.retry.max_attempts:
            self._spent(slot, delivery)
            return False
        return True

    async def _handle_on_thread(
        self,
        context: Context,
        delivery: Delivery,
        argument: Any,
        scope: contextlib.AbstractContextManager[None],
    ) -> None:
        """Run a plain handler."""
        assert self._threads is not None

        def call() -> Any:
            with scope:
                return self.subscription.handler.call(delivery, argument)

        result = await self._threads.run(context, call)
        if result is not None and is_unfinished(result):
            await in_context(finish(result), context)

    def _returned(self, slot: Slot, delivery: Delivery) -> None:
        now = self._monotonic()
        duration_s = now - slot.started
        if slot.released:
            self._regained(slot, delivery, duration_s)
            return
        late = slot.expired
        if late:
            self._forgive(slot)
            self._recovery.timed_out(slot.allowed_s)
        elif slot.allowed_s:
            self._recovery.slow(duration_s)
        tally = self.tally(delivery.destination)
        (tally.late_duration if late else tally.duration).observe(duration_s)
        tally.late += late
        self.gate.succeeded(delivery, slot.permit, now)
        self._recovery.succeeded()
        self._settle(delivery, Handled(duration_s, late))

    def _raised(self, slot: Slot, delivery: Delivery, error: BaseException) -> None:
        caught = self._monotonic()
        duration_s = caught - slot.started
        delivery.started_at = self._wall() - duration_s
        if slot.released:
            self._regained(slot, delivery, duration_s)
            if self._foreign_cancel(slot, error):
                raise error
            return
        # By its type, not by isinstance: a hostile exception answers for its class itself.
        cancelled = issubclass(type(error), asyncio.CancelledError)
        if cancelled and self._slots.stopping and not slot.expired:
            self.gate.leave(slot.permit)
            self._settle(delivery, Stopped("stopping"))
            raise error
        foreign = self._foreign_cancel(slot, error)
        if slot.expired:
            self._forgive(slot)
            cause, error = error, HandlerTimedOut(f"handler ran longer than its timeout of {slot.allowed_s:g} s")
            error.__cause__ = None if cancelled else cause
        elif cancelled:
            error = HandlerCancelled("the handler was cancelled, and not by the bus")
        report = self._report(delivery, error)
        undecodable = issubclass(type(error), PayloadUndecodable)
        self.housekeep()
        if undecodable:
            self.gate.leave(slot.permit)  # says nothing about what the handler depends on
        else:
            self.gate.failed(delivery, slot.permit, caught)
        retryable = not undecodable and not issubclass(type(error), self.subscription.retry.dead_letter_on)
        category = report.category  # kept: an observer that is shown the report may write on it
        retry = self._recovery.retry_for(category)
        self._settle(delivery, Failed(report, duration_s, retryable, self._monotonic() - caught), retry)
        if slot.expired:
            self._recovery.timed_out(slot.allowed_s)
        self._recovery.failed(delivery, category, error, slot.started)
        self._handling(category).observe(self._monotonic() - caught)
        if foreign:
            raise asyncio.CancelledError

    def _foreign_cancel(self, slot: Slot, error: BaseException) -> bool:
        """Whether somebody outside cancelled this task: it must end then, or it would outlive its loop."""
        assert slot.task is not None
        ours = int(slot.expired and self._threads is None)
        return issubclass(type(error), asyncio.CancelledError) and slot.task.cancelling() > ours

    def _forgive(self, slot: Slot) -> None:
        """Take back our own cancellation, so that the task goes on as if it had not been."""
        if self._threads is None and slot.task is not None:
            slot.task.uncancel()

    def look(self) -> None:
        """Time has passed. Called about once a second."""
        self.housekeep()
        self.gate.look()
        self._recovery.look()

    def housekeep(self) -> None:
        """Pass on what the happy path only counted. Called about once a second, and before a failure counts."""
        quiet, self._quiet = self._quiet, 0
        if quiet:
            self.gate.count_successes(quiet)
            self._budget.earn(quiet)
            self._recovery.succeeded()

    def _regained(self, slot: Slot, delivery: Delivery, ran_s: float) -> None:
        if not slot.abandoned_at:
            return  # given back by a stop
        slot.abandoned_at = 0.0
        self._forgive(slot)
        self._hub.state(SlotRegained(at=self._wall(), delivery=delivery, ran_s=ran_s))

    def _spent(self, slot: Slot, delivery: Delivery) -> None:
        """All its attempts were made before: by owners that died, or under a policy that allowed more."""
        self.gate.leave(slot.permit)
        slot.clear()
        if delivery.redelivered:
            error: HandlingError = OwnerDied(
                f"the process died or lost its lease in each of {delivery.attempt - 1} attempts"
            )
        else:
            before = f", the last for {delivery.recovering[0]}" if delivery.recovering is not None else ""
            error = AttemptsSpent(
                f"{delivery.attempt - 1} attempts had been made{before}; max_attempts is {self.retry.max_attempts} now"
            )
        self._settle(delivery, Spent(self._report(delivery, error), bool(delivery.redelivered)))

    def _report(self, delivery: Delivery, error: BaseException) -> Any:
        envelope = delivery.envelope
        return self._sites.describe(
            error,
            error_id=f"{envelope.id}:{self.name}:{delivery.replays}.{delivery.attempt}",
            at=self._wall(),
            component="handler",
            context={
                "message_id": envelope.id,
                "topic": envelope.topic,
                "subscription": self.name,
                "attempt": delivery.attempt,
            },
            retry_count=delivery.attempt - 1,
        )

    def _handling(self, category: str) -> Buckets:
        found = self.handling.get(category)
        if found is None:
            found = self.handling[category] = Buckets()
        return found

    def _fell_back(self, envelope: Envelope, used: str) -> None:
        for slot in self._slots.all:
            if slot.delivery is not None and slot.delivery.envelope is envelope:
                self._hub.state(
                    CodecFellBack(at=self._wall(), delivery=slot.delivery, declared=envelope.codec, used=used)
                )

    # Deciding and settling

    def _settle(self, delivery: Delivery, outcome: Outcome, retry: Retry | None = None) -> None:
        decision = decide(
            delivery,
            outcome,
            self.retry if retry is None else retry,
            self._wall(),
            self._uniform,
            self._budget,
            self._monotonic(),
        )
        report = decision.report
        if report is not None:  # whoever replays it need not know how its trace was named
            dead = decision.facts[-1].delivery  # type: ignore[union-attr]
            report.context.update(self._hub.trace_of(DeliveryDeadLettered, dead, decision.reason))
        self._transport.settle(delivery, decision, self._recorded)

    def _recorded(self, delivery: Delivery, decision: Decision, accepted: bool) -> None:
        """The store has taken the decision: now it is true, and may be told."""
        if decision is HANDLED and accepted:
            tally = self.tallies[delivery.destination]
            tally.handled += 1
            tally.age.observe(self._wall() - (delivery.envelope.due_at or delivery.envelope.published_at))
            if self.on_settled:
                self._tell_settled()
            return
        if not accepted:
            self._hub.state(SettlementRefused(at=self._wall(), delivery=delivery, wanted=decision.state.name.lower()))
        elif decision.state is State.HANDLED:
            tally = self.tallies[delivery.destination]
            tally.handled += 1
            tally.age.observe(self._wall() - (delivery.envelope.due_at or delivery.envelope.published_at))
            self.recovered += delivery.attempt > 1
        elif decision.state is State.DEAD_LETTERED:
            self.dead_lettered += 1
            if decision.report is not None:
                self._recovery.dead_lettered(decision.report.category)
        elif decision.state is State.EXPIRED:
            self.expired += 1
        if decision.facts and accepted:
            for fact in decision.facts:
                self._hub.state(fact)
        if self.on_settled:
            self._tell_settled()

    def _tell_settled(self) -> None:
        for told in tuple(self.on_settled):
            told()

    # Past the deadline

    def _state_overdue(self, slot: Slot, delivery: Delivery) -> None:
        self._hub.state(AttemptOverdue(at=self._wall(), delivery=delivery, timeout_s=slot.allowed_s))

    def _abandon(self, slot: Slot, delivery: Delivery, now: float) -> None:
        ran_s = now - slot.started
        error = HandlerAbandoned(f"handler still ran after {ran_s:.3g} s and could not be stopped; its slot is lost")
        slot.abandoned_at = now
        self.gate.failed(delivery, slot.permit, now)
        self._release(slot, Abandoned(self._report(delivery, error), ran_s))

    def _release(self, slot: Slot, outcome: Outcome) -> None:
        """Settle the delivery while its handler still runs; what that yields later is not used."""
        if slot.delivery is not None and not slot.released:
            slot.released = slot.touched = True
            self._settle(slot.delivery, outcome)


async def _scoped(
    scope: contextlib.AbstractContextManager[None], handler: Handler, delivery: Delivery, argument: Any
) -> None:
    with scope:
        await handler.call(delivery, argument)
