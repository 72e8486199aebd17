"""Codecs: what goes in comes out, and what cannot be carried is refused with a typed error."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus.codec import CODECS, DEPTH_MAX, JSON, RAW
from glassbus.errors import InvalidPayload, PayloadUndecodable

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCALAR = (
    st.none()
    | st.booleans()
    | st.integers(-(10**300), 10**300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
PAYLOAD = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5), max_leaves=40
)


@given(PAYLOAD)
def test_json_round_trip(payload: Any) -> None:
    assert JSON.decoder(Any)(JSON.encode(payload)) == payload


@given(st.binary())
def test_raw_round_trip(payload: bytes) -> None:
    assert RAW.decoder(bytes)(RAW.encode(payload)) == payload
    assert RAW.decoder(Any)(RAW.encode(bytearray(payload))) == payload


@given(st.binary(max_size=200))
def test_bytes_from_anywhere_decode_or_are_refused(body: bytes) -> None:
    with contextlib.suppress(PayloadUndecodable):
        JSON.decoder(Any)(body)


def wrapped(payload: Any, depth: int, shape: str = "[") -> Any:
    for n in range(depth):
        payload = [payload] if (shape == "[" or (shape == "mixed" and n % 2)) else {"k": payload}
    return payload


@pytest.mark.parametrize("shape", ["[", "{", "mixed"])
@pytest.mark.parametrize("leaf", [1, None, "]]]]}}}}" * 50, '\\"[{' * 50, "\\", '"'])
def test_the_depth_limit_is_exact_whatever_the_strings_hold(shape: str, leaf: Any) -> None:
    deepest = wrapped({"text": leaf}, DEPTH_MAX - 1, shape)
    assert JSON.decoder(Any)(JSON.encode(deepest)) == deepest
    with pytest.raises(InvalidPayload, match="nested deeper than"):
        JSON.encode(wrapped(deepest, 1, shape))


@given(PAYLOAD, st.integers(0, DEPTH_MAX + 10))
def test_depth_is_refused_exactly_beyond_the_limit(payload: Any, extra: int) -> None:
    def depth(value: Any) -> int:
        if isinstance(value, dict):
            return 1 + max(map(depth, value.values()), default=0)
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    deep = wrapped([payload, ["]" * 9]], extra)
    if depth(deep) <= DEPTH_MAX:
        JSON.encode(deep)
    else:
        with pytest.raises(InvalidPayload):
            JSON.encode(deep)


def test_a_wide_payload_with_many_brackets_is_not_deep() -> None:
    wide = [{"lines": [{"sku": "a[b]{c}", "n": n}]} for n in range(500)]
    assert JSON.decoder(Any)(JSON.encode(wide)) == wide


def test_very_deep_and_self_containing_payloads_are_refused_and_exhaust_nothing() -> None:
    endless: list[Any] = []
    endless.append(endless)
    looped: dict[str, Any] = {}
    looped["self"] = {"again": looped}
    for payload in (endless, looped, wrapped(1, 900), wrapped(None, 300), wrapped(1, 100_000)):
        with pytest.raises(InvalidPayload, match="deeper"):
            JSON.encode(payload)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [lambda n: n, lambda n: [1, n], lambda n: {"a": {"b": [None, n]}}, lambda n: (n,)])
def test_nan_and_infinity_are_refused_wherever_they_are(number: float, place: Any) -> None:
    with pytest.raises(InvalidPayload, match="NaN or infinite"):
        JSON.encode(place(number))


def test_the_error_names_where_the_nan_is() -> None:
    with pytest.raises(InvalidPayload, match=r"payload\['lines'\]\[1\]\['price'\]"):
        JSON.encode({"lines": [{"price": 1.5}, {"price": math.nan}]})


def test_null_and_the_word_null_are_fine() -> None:
    for payload in (None, {"a": None}, ["null", {"null": None}]):
        assert JSON.decoder(Any)(JSON.encode(payload)) == payload


class Order(msgspec.Struct):
    order_id: int
    price: float = 0.0


@dataclasses.dataclass
class Line:
    sku: str
    count: int


def test_typed_payloads_round_trip() -> None:
    assert JSON.decoder(Order)(JSON.encode(Order(17, 2.5))) == Order(17, 2.5)
    assert JSON.decoder(Line)(JSON.encode(Line("a", 2))) == Line("a", 2)
    assert JSON.decoder(list[Line])(JSON.encode([Line("a", 2)])) == [Line("a", 2)]
    with pytest.raises(InvalidPayload, match="NaN"):
        JSON.encode(Order(1, math.nan))


def test_a_pydantic_model_round_trips_both_ways() -> None:
    pydantic = pytest.importorskip("pydantic")
    Model = pydantic.create_model("Model", order_id=(int, ...), price=(float, 0.0))  # noqa: N806 - a class
    body = JSON.encode({"inside": Model(order_id=17)})
    assert JSON.decoder(Any)(body) == {"inside": {"order_id": 17, "price": 0.0}}
    assert JSON.decoder(Model)(JSON.encode(Model(order_id=3))) == Model(order_id=3)
    with pytest.raises(PayloadUndecodable, match="Model"):
        JSON.decoder(Model)(b'{"order_id": "many"}')
    with pytest.raises(InvalidPayload, match="NaN"):
        JSON.encode(Model(order_id=1, price=math.nan))


class Hostile:
    """A model whose own code fails."""

    def model_dump(self) -> Any:
        raise RuntimeError("no dump today")

    @classmethod
    def model_validate_json(cls, body: bytes) -> Any:
        raise ZeroDivisionError("no model today")


@pytest.mark.parametrize(
    "payload",
    [10**5000, {"n": [10**5000]}, "\ud800", {"\ud800": 1}, object(), {1, object()}, {(1, 2): 3}, lambda: 1, Hostile()],
    ids=[
        "5,000 digits",
        "nested digits",
        "surrogate",
        "surrogate key",
        "object",
        "set",
        "tuple key",
        "function",
        "dump",
    ],
)
def test_what_cannot_be_encoded_is_refused(payload: Any) -> None:
    with pytest.raises(InvalidPayload, match="cannot be encoded"):
        JSON.encode(payload)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Any, b"1" * 5000),
        (Any, b"NaN"),
        (Any, b"[Infinity]"),
        (Any, b"1e999"),
        (Any, b"[" * 100_000),
        (Any, b'{"a":' * 5000),
        (Any, b""),
        (Any, b"\xff\xfe"),
        (Any, b'{"a":1} {"b":2}'),
        (Order, b'{"order_id":"x"}'),
        (Order, b"{}"),
        (dict, b"[1]"),
        (Hostile, b"{}"),
    ],
)
def test_what_cannot_be_decoded_is_refused(kind: Any, body: bytes) -> None:
    with pytest.raises(PayloadUndecodable):
        JSON.decoder(kind)(body)


def test_raw_takes_bytes_and_gives_them_only_to_who_asks_for_bytes() -> None:
    with pytest.raises(InvalidPayload, match="takes bytes, not dict"):
        RAW.encode({})
    with pytest.raises(PayloadUndecodable, match="raw bytes, and the handler asks for dict"):
        RAW.decoder(dict)(b"{}")


def test_the_list_of_codecs_is_fixed() -> None:
    assert sorted(CODECS) == ["json", "raw"]
    assert all(name == codec.name for name, codec in CODECS.items())
