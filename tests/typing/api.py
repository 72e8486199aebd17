"""The public face as users type it: never run, read by mypy and basedpyright.

Each line that a type checker would not take as shown is a break of the interface.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_type

import msgspec

from glassbus import (
    Account,
    AdaptiveTimeout,
    Audit,
    BreakerState,
    CircuitBreaker,
    DeadLetter,
    Delivery,
    Drained,
    ErrorCategory,
    ErrorLogger,
    ErrorRecoveryManager,
    ErrorReport,
    ErrorSeverity,
    Fact,
    Health,
    JournalSettings,
    KillSwitch,
    Ledger,
    Level,
    Message,
    MessageBus,
    Observer,
    Outgoing,
    Overflow,
    Priority,
    ProductionMessageBus,
    Propagator,
    PublishRejected,
    PublishUncertain,
    QueueFull,
    Receipt,
    Retry,
)
from glassbus.codec import JSON, MSGPACK, RAW


class Order(msgspec.Struct):
    order_id: int


@dataclass
class Refund:
    order_id: int
    reason: str


class Counter:
    """An observer: nothing to inherit."""

    def on_fact(self, fact: Fact, /) -> None:
        assert_type(fact.at, float)

    def scope(self, work: Delivery, /) -> AbstractContextManager[None]:
        return nullcontext()


class Headers:
    def inject(self, headers: dict[str, str], /) -> None:
        headers["tenant"] = "a"


def divided(error: BaseException) -> tuple[ErrorCategory, ErrorSeverity] | None:
    return (ErrorCategory.CONFIGURATION_ERROR, ErrorSeverity.LOW) if isinstance(error, ZeroDivisionError) else None


observer: Observer = Counter()
propagator: Propagator = Headers()

bus = MessageBus("sqlite:///orders.db", name="orders", observers=[observer], rules=[divided])
MessageBus()
MessageBus(["memory://"], telemetry=False, publish_timeout=1.0, capacity=10, spill_dir="spill")


# Handlers: async or plain; what they take is told by the annotation, and the decorator changes nothing.


@bus.subscribe("orders.*", retry=Retry(max_attempts=5), timeout=2.0, concurrency=8)
async def charge(message: Message[Order]) -> None:
    assert_type(message.payload, Order)
    assert_type(message.payload.order_id, int)
    assert_type(message.headers, dict[str, str])
    assert_type(message.priority, Priority)
    assert_type(message.key, str | None)


@bus.subscribe("refunds.>", name="refunds", kill_switch=KillSwitch(minimum=5), strict_key=True, overflow=Overflow())
def refund(refund: Refund) -> int:
    return refund.order_id


def settings() -> dict[str, Any]:
    return {"subscriptions": {"raw": {"concurrency": 2}}}


configured = MessageBus(configuration=settings, codecs=[JSON, MSGPACK])
from_file = MessageBus(configuration=Path("bus.toml"))


@bus.subscribe("raw", capacity=100, abandon_after=60.0, codecs=[JSON, RAW], adaptive_timeout=AdaptiveTimeout(cap=1))
async def raw(payload: dict[str, Any]) -> None: ...


taken: Callable[[Message[Order]], Coroutine[Any, Any, None]] = charge
assert_type(refund(Refund(1, "late")), int)


async def publishing() -> None:
    async with bus as entered:
        assert_type(entered, MessageBus)
        receipt = await bus.publish("orders.created", {"order_id": 17}, priority=Priority.HIGH)
        assert_type(receipt, Receipt)
        assert_type(receipt.level, Level)
        assert_type(receipt.message_id, str)
        assert_type(receipt.subscriptions, tuple[str, ...])
        assert_type(receipt.duplicate, bool)
        await bus.publish("a", Order(1), message_id="x", key="k", headers={"h": "v"}, delay=1.5, expires_in=60)
        assert_type(await bus.publish_many([Outgoing("a", 1), ("b", None)]), list[Receipt])
        try:
            await bus.publish("a")
        except QueueFull as error:
            assert_type(error.subscription, str)
        except PublishRejected as error:
            assert_type(error.reason, str)
        except PublishUncertain as error:
            await bus.publish("a", message_id=error.message_id)
        assert_type(await bus.drain(), Drained)
        assert_type((await bus.drain(timeout=5)).reasons["refunds"], str)


async def operating() -> None:
    await bus.start()
    await bus.pause("refunds")
    await bus.resume("refunds")
    assert_type(bus.breakers["refunds"].state, BreakerState)
    await bus.breakers["refunds"].force_open()
    assert_type(await bus.forget("refunds"), int)
    await bus.stop(30)


async def looking() -> None:
    ledger = bus.ledger()
    assert_type(ledger, Ledger)
    assert_type(ledger.total, Account)
    assert_type(ledger.accounts["refunds"].pending, int)
    assert_type(ledger.balanced, bool)
    assert_type(await bus.audit(), Audit)
    assert_type(bus.health(), Health)
    letters = await bus.dead_letters.list(limit=10, subscription="refunds")
    assert_type(letters, list[DeadLetter])
    for letter in letters:
        assert_type(letter.message, Message[Any])
        assert_type(letter.attempts, int)
        assert_type(letter.report, ErrorReport)
        assert_type(letter.report.category, ErrorCategory)


async def untyped(message: Message) -> None:
    assert_type(message, Message[Any])


# The blocking face


blocking = ProductionMessageBus({"url": "memory://", "max_retries": 2})


def from_threads() -> None:
    with blocking as entered:
        assert_type(entered, ProductionMessageBus)
        assert_type(blocking.subscribe("orders.*", charge, timeout=2.0), str)
        assert_type(blocking.publish("orders.created", {"order_id": 17}, key="k"), Receipt)
        assert_type(blocking.publish_many([("a", 1)]), list[Receipt])
        assert_type(blocking.drain(timeout=5), Drained)
        assert_type(blocking.dead_letters.list(limit=10, subscription="refunds"), list[DeadLetter])
        assert_type(blocking.breakers["refunds"].state, BreakerState)
        assert_type(blocking.health(), Health)
        assert_type(blocking.get_health_status(), dict[str, Any])
        assert_type(blocking.core, MessageBus)
    assert_type(blocking.stop(5), bool)


@blocking.subscribe("raw", name="raw-2")
def plain(message: Message[Order]) -> int:
    return message.payload.order_id


untouched: Callable[[Message[Order]], int] = plain


def recovering(report: ErrorReport) -> None:
    manager = ErrorRecoveryManager({"retry_configs": {"timeout_error": {"max_retries": 1}}})
    assert_type(manager.attempt_recovery(report, {"message": "m"}), bool)
    breaker = manager.circuit_breakers[ErrorCategory.TIMEOUT_ERROR]
    assert_type(breaker, CircuitBreaker)
    assert_type(CircuitBreaker(failure_threshold=5, recovery_timeout=60.0).call(float, "7"), float)
    assert_type(breaker.last_failure_time, float | None)


def recorded(report: ErrorReport) -> None:
    kept = MessageBus("sqlite:///orders.db", journal=JournalSettings(fsync="always", entries=1000))
    assert_type(kept.journal.statistics(), dict[str, Any])
    assert_type(kept.journal.report_html(), str)
    assert_type(kept.journal.reports(), list[ErrorReport])
    with ErrorLogger("logs", max_log_size=1_000_000, fsync="never") as logger:
        assert_type(logger.log_error(report), bool)
        assert_type(logger.get_error_statistics(), dict[str, Any])
