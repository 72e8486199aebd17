"""Spans and log records against the published semantic conventions for messaging, of the version that they name.

https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/ and …/exceptions/; the registry's values come
from the `opentelemetry-semantic-conventions` package.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import pkgutil
from typing import Any

import pytest
from opentelemetry.semconv import _incubating, attributes
from opentelemetry.semconv._incubating.attributes.messaging_attributes import (
    MessagingOperationTypeValues,
    MessagingSystemValues,
)
from opentelemetry.semconv.schemas import Schemas
from opentelemetry.trace import SpanKind
from prometheus_client import CollectorRegistry

from glassbus import KillSwitch, Message, MessageBus, PublishRejected, Retry
from glassbus.observer import ALL_FACTS
from glassbus.telemetry import observe
from glassbus.telemetry.catalogue import SPANS
from glassbus.telemetry.outlet import SCHEMA_URL
from glassbus.telemetry.spans import SpanWriter
from glassbus.testing import VirtualClock, run_virtual
from tests.facts_kit import ENVELOPE, sample

#: The registry's kind for each type of operation. A send is PRODUCER where its context is the creation context.
KINDS = {
    "create": SpanKind.PRODUCER,
    "send": SpanKind.PRODUCER,
    "receive": SpanKind.CLIENT,
    "process": SpanKind.CONSUMER,
    "settle": SpanKind.CLIENT,
}
REQUIRED = {"messaging.system", "messaging.operation.name", "messaging.operation.type", "messaging.destination.name"}


def registry() -> set[str]:
    """Every attribute name that is published, stable or not."""
    names: set[str] = set()
    for package in (attributes, importlib.import_module(f"{_incubating.__name__}.attributes")):
        for module in pkgutil.iter_modules(package.__path__):
            found = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
            names.update(value for key, value in found.items() if key.isupper() and isinstance(value, str))
    return names


PUBLISHED = registry()
#: Published, but replaced by others.
DEPRECATED = {"messaging.operation", "messaging.destination_publish.name", "exception.escaped"}


def test_the_schema_that_is_named_is_a_published_one() -> None:
    assert SCHEMA_URL in {schema.value for schema in Schemas}


@pytest.mark.parametrize("span", SPANS, ids=lambda span: span.name)
def test_attributes_that_are_not_ours_are_the_registrys(span: Any) -> None:
    theirs = {name for name in span.attributes if not name.startswith("glassbus.")}
    assert theirs <= PUBLISHED - DEPRECATED


@pytest.fixture
def troubled(spans: Any) -> Any:
    """All that a bus says of messages: published, refused, handled, retried, dead, replayed, expired, discarded."""
    kept = spans(1.0)

    async def scenario(clock: VirtualClock) -> None:
        bus = MessageBus(clock=clock, registry=CollectorRegistry(), tracer_provider=kept.provider, publish_timeout=0.0)

        @bus.subscribe("orders.*", name="charge", retry=Retry(max_attempts=2), kill_switch=KillSwitch(enabled=False))
        async def charge(message: Message[Any]) -> None:
            if message.payload:
                raise ValueError

        async with bus:
            for payload in (0, 1, 2):
                await bus.publish("orders.created", payload)
            await bus.publish("orders.created", expires_in=0.5, delay=1.0)
            await bus.publish("nobody")
            with contextlib.suppress(PublishRejected):
                await bus.publish("not a topic")
            await bus.drain()
            await asyncio.sleep(10.0)
            first, second = await bus.dead_letters.list()
            await bus.dead_letters.replay(first.id)
            await bus.dead_letters.discard(second.id)
            await bus.drain()

    run_virtual(scenario)
    # And the facts that only other stores state.
    bus = MessageBus(telemetry=False)
    observer = observe(bus, registry=CollectorRegistry(), tracer_provider=kept.provider, wall=lambda: 100.0)
    for kind in ALL_FACTS:
        observer.on_fact(sample(kind))
    return kept


def test_operations_have_the_names_kinds_and_attributes_that_the_conventions_ask_for(troubled: Any) -> None:
    seen = set()
    for span in troubled.all():
        said = span.attributes
        operation = said.get("messaging.operation.type")
        if operation is None:
            # A happening of the bus itself: no operation of messaging, and of no messaging kind.
            assert span.kind in (SpanKind.INTERNAL, SpanKind.CLIENT), span.name
            assert not {name for name in said if name.startswith("messaging.")} - {"messaging.message.id"}
            continue
        seen.add(operation)
        assert said.keys() >= REQUIRED, span.name
        assert operation in {value.value for value in MessagingOperationTypeValues}
        assert span.kind is KINDS[operation], span.name
        assert said["messaging.system"] == "glassbus"
        destination = said.get("messaging.destination.template", said["messaging.destination.name"])
        assert span.name == f"{said['messaging.operation.name']} {destination}"
    assert seen == {"send", "process", "settle"}


def test_error_type_is_there_exactly_where_something_failed(troubled: Any) -> None:
    for span in troubled.all():
        failed = span.status.status_code.name == "ERROR"
        if "messaging.operation.type" in span.attributes or span.name.startswith("error"):
            assert ("error.type" in span.attributes) == failed, span.name
        # What went well is left unset, not claimed to be OK.
        assert span.status.status_code.name != "OK"


def test_exceptions_are_events_of_the_published_form(troubled: Any) -> None:
    events = [event for span in troubled.named("error") for event in span.events]
    assert events
    for event in events:
        assert event.name == "exception"
        assert {"exception.type", "exception.message"} <= set(event.attributes)
        assert set(event.attributes) <= PUBLISHED - DEPRECATED


@pytest.mark.parametrize(
    ("transport", "system"), [("memory", "glassbus"), ("sqlite", "glassbus"), ("nats", "nats"), ("amqp", "rabbitmq")]
)
def test_the_system_is_the_brokers_where_there_is_one(transport: str, system: str) -> None:
    published = {value.value for value in MessagingSystemValues}
    # The registry allows others where it lists none; a broker that it lists goes by its name there.
    assert system in published or transport in ("memory", "sqlite", "nats")
    writer = SpanWriter("default", transport, lambda _: None, lambda text: text)
    assert writer._messaging("publish", "send", ENVELOPE, "t")["messaging.system"] == system


@pytest.mark.parametrize(
    ("address", "server"),
    [
        ("nats://one:4222", {"server.address": "one", "server.port": 4222}),
        ("nats://[::1]", {"server.address": "::1"}),
        ("nats://one:4222,nats://two:4222", {}),
        ("memory://", {}),
        ("sqlite:///shop.db", {}),
    ],
)
def test_a_brokers_address_is_told_where_there_is_one(address: str, server: dict[str, Any]) -> None:
    writer = SpanWriter("default", address.partition(":")[0], lambda _: None, lambda text: text, address)
    said = writer._messaging("publish", "send", ENVELOPE, "t")
    assert {name: value for name, value in said.items() if name.startswith("server.")} == server
