"""Addresses keep their secrets, whatever is wrong with them, and settings that cannot work are refused."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus.config import Address, KillSwitch, Settings, addresses, redact
from glassbus.errors import ConfigurationError

CANARY = "c4n4ry"
NAN, INF = float("nan"), float("inf")

LEAKY = [
    f"sqlite://user:{CANARY}@host/path.db",
    f"sqlite://{CANARY}@host/path.db",
    f"sqlite://user:{CANARY}@host:notaport/path.db",
    f"sqlite://user:x/{CANARY}@host/path.db",
    f"sqlite://user:{CANARY}/x@host/path.db",
    f"sqlite://user:a@{CANARY}@host/path.db",
    f"sqlite://user:a:{CANARY}@host/path.db",
    f"sqlite://user:{CANARY}@[::1/path.db",
    f"sqlite://user:{CANARY} x@host:1x/p",
    f"sqlite://user:{CANARY}#@host:12/p",
    f"sqlite://user:{CANARY}?@host:12/p",
    f"sqlite://user:{CANARY}\u2100@host/p",
    f"sqlite://host/path.db?password={CANARY}",
    f"memory://user:{CANARY}@",
    f"kafka://user:{CANARY}@host",
    f"kafka://host/?token={CANARY}",
    f"user:{CANARY}@host",
    f"://user:{CANARY}@host",
    f"sqlite:/user:{CANARY}@host",
    f"sqlite ://user:{CANARY}@host",
    f"{CANARY}",
    f"memory://,sqlite://user:{CANARY},x@host:bad/p",
    f"memory://, sqlite://user:{CANARY}@host:99999/p",
    CANARY.encode(),
    [f"sqlite://u:{CANARY}@h:no/p"],
]


def shown_by(url: Any) -> str:
    """Everything that a person could see of an address, or of its refusal. Its path and host are no secrets."""
    try:
        made = addresses(url)
    except ConfigurationError as error:
        return f"{error} {error!r} {''.join(traceback.format_exception(error))}"
    return "".join(f"{a} {a!r} {[str(x) for x in made]}" for a in made)


@pytest.mark.parametrize("url", LEAKY, ids=range(len(LEAKY)))
def test_credentials_never_show(url: Any) -> None:
    assert CANARY not in shown_by(url)


SECRET = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)


@given(SECRET, st.sampled_from(["sqlite", "memory", "amqp", "sq lite", ""]), st.sampled_from(["", ":12", ":x", "]"]))
def test_no_password_shows_whatever_characters_it_has(password: str, scheme: str, port: str) -> None:
    secret = f"{CANARY}{password}{CANARY}"
    try:
        shown = str(Address(f"{scheme}://user:{secret}@host{port}/data"))
    except ConfigurationError as error:
        shown = str(error)
    # A '/', '?' or '#' that nobody encoded ends the host part for every URL parser, so what follows is a path.
    assert CANARY not in shown or set("/?#") & set(password)


def test_an_address_has_its_parts() -> None:
    address = Address("sqlite:////var/data/my%20store.db?durability=process&x=")
    assert (address.scheme, address.host, address.port) == ("sqlite", "", None)
    assert address.path == "//var/data/my store.db"
    assert address.options == {"durability": "process", "x": ""}
    assert address.credentials == (None, None)
    assert str(address) == "sqlite:////var/data/my store.db"


def test_credentials_are_there_for_the_connection() -> None:
    address = Address("sqlite://user:p%40ss@[::1]:12/x")
    assert address.credentials == ("user", "p%40ss")
    assert str(address) == "sqlite://[::1]:12/x"
    assert repr(address) == "Address('sqlite://[::1]:12/x')"


def test_several_addresses_are_a_failover_set() -> None:
    assert [str(a) for a in addresses("sqlite:///a.db, sqlite:///b.db,memory://")] == [
        "sqlite:///a.db",
        "sqlite:///b.db",
        "memory://",
    ]
    assert [str(a) for a in addresses(["memory://", "sqlite:///a,b.db"])] == ["memory://", "sqlite:///a,b.db"]


@pytest.mark.parametrize("url", ["", " ", [], "orders.db", "kafka://x", "sqlite", ":memory:", "://"])
def test_what_is_no_address_is_refused(url: Any) -> None:
    with pytest.raises(ConfigurationError):
        addresses(url)


@pytest.mark.parametrize("one", [None, 5, b"memory://", object()])
def test_an_address_is_a_str(one: Any) -> None:
    with pytest.raises(ConfigurationError):
        Address(one)


def test_redaction_in_running_text() -> None:
    text = f"cannot reach nats://u:{CANARY}@a:4222, amqp://u:{CANARY}/x@b and http://plain/x"
    assert redact(text) == "cannot reach nats://***@a:4222, amqp://***@b and http://plain/x"
    assert redact("no URL at all, me@example.com") == "no URL at all, me@example.com"


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 0},
        {"window": NAN},
        {"window": INF},
        {"minimum": 0},
        {"ratio": 0},
        {"ratio": 1.1},
        {"ratio": NAN},
        {"open_for": -1},
        {"open_for": NAN},
        {"open_for": INF},
        {"probes": 0},
    ],
)
def test_a_kill_switch_that_cannot_work_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        KillSwitch(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "a b"},
        {"name": "a\n"},
        {"name": "../x"},
        {"name": "x" * 65},
        {"name": None},
        {"publish_timeout": -1},
        {"publish_timeout": NAN},
        {"publish_timeout": INF},
        {"payload_bytes_max": 0},
        {"capacity": 0},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Settings(**wrong)


def test_a_bus_name_cannot_be_a_path() -> None:
    assert Settings(name="orders-1_b.c").name == "orders-1_b.c"
    for name in (".", ".."):
        with pytest.raises(ConfigurationError):
            Settings(name=name)


def test_the_defaults_are_as_documented() -> None:
    assert KillSwitch() == KillSwitch(window=60.0, minimum=20, ratio=0.5, open_for=3.0, probes=3, enabled=True)
    assert Settings() == Settings("default", 5.0, 1_048_576, 100_000, None)


def test_the_least_that_can_work_is_taken() -> None:
    assert KillSwitch(window=0.5, minimum=1, ratio=1, open_for=0, probes=1).probes == 1
    assert KillSwitch(ratio=0.01).ratio == 0.01
    assert Settings(publish_timeout=0, payload_bytes_max=1, capacity=1).capacity == 1
