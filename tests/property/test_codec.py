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

from glassbus.codec import CODECS, DEPTH_MAX, JSON, MSGPACK, RAW, Codec, check_codecs, encode_with_any
from glassbus.errors import ConfigurationError, InvalidPayload, PayloadUndecodable

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
    assert sorted(CODECS) == ["json", "msgpack", "raw"]
    assert all(name == codec.name for name, codec in CODECS.items())


PACKED = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXT | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT | st.integers(0, 9), inner, max_size=5),
    max_leaves=40,
)


@given(PACKED)
def test_msgpack_round_trip(payload: Any) -> None:
    assert MSGPACK.decoder(Any)(MSGPACK.encode(payload)) == payload


@given(st.binary(max_size=200))
def test_msgpack_from_anywhere_decodes_or_is_refused(body: bytes) -> None:
    with contextlib.suppress(PayloadUndecodable):
        MSGPACK.decoder(Any)(body)


@pytest.mark.parametrize("shape", ["[", "{", "mixed"])
def test_msgpack_has_the_same_exact_depth_limit(shape: str) -> None:
    deepest = wrapped({"text": b"\x91" * 400}, DEPTH_MAX - 1, shape)
    assert MSGPACK.decoder(Any)(MSGPACK.encode(deepest)) == deepest
    for deeper in (wrapped(deepest, 1, shape), wrapped(1, 100_000, shape)):
        with pytest.raises(InvalidPayload, match="deeper"):
            MSGPACK.encode(deeper)


def test_msgpack_takes_models_and_typed_payloads() -> None:
    assert MSGPACK.decoder(Order)(MSGPACK.encode(Order(17, math.inf))) == Order(17, math.inf)
    assert MSGPACK.decoder(Line)(MSGPACK.encode(Line("a", 2))) == Line("a", 2)
    pydantic = pytest.importorskip("pydantic")
    Model = pydantic.create_model("Model", order_id=(int, ...))  # noqa: N806 - a class
    assert MSGPACK.decoder(Model)(MSGPACK.encode(Model(order_id=3))) == Model(order_id=3)
    with pytest.raises(PayloadUndecodable, match="Model"):
        MSGPACK.decoder(Model)(MSGPACK.encode({"order_id": "many"}))


@pytest.mark.parametrize("payload", [2**64, object(), Hostile()])
def test_what_msgpack_cannot_encode_is_refused(payload: Any) -> None:
    with pytest.raises(InvalidPayload, match="MessagePack"):
        MSGPACK.encode(payload)


class Upper:
    """A codec of a user's."""

    name = "upper"
    content_type = "text/plain"

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def encode(self, payload: Any, /) -> bytes:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer or str(payload).upper().encode()

    def decoder(self, kind: Any, /) -> Any:
        def decode(body: bytes) -> str:
            if isinstance(self.answer, BaseException):
                raise self.answer
            return body.decode().lower()

        return decode


def test_the_first_of_the_list_that_can_carry_it_does() -> None:
    refused = InvalidPayload("no NaN in JSON")
    codec, body = encode_with_any([RAW, MSGPACK, Upper()], math.nan, refused)
    assert codec is MSGPACK
    assert math.isnan(MSGPACK.decoder(Any)(body))


def test_what_none_can_carry_says_what_each_said() -> None:
    with pytest.raises(InvalidPayload, match=r"no JSON of it; msgpack: .*MessagePack.*; raw: .*takes bytes"):
        encode_with_any([MSGPACK, RAW], 2**64, InvalidPayload("no JSON of it"))


def test_a_codec_of_a_users_is_taken_and_guarded() -> None:
    [json, upper] = check_codecs([JSON, Upper()])
    assert json is JSON
    assert upper.decoder(Any)(upper.encode("abc")) == "abc"
    for wrong in (KeyError("x"), SystemExit(), 17, "text"):
        [codec] = check_codecs([Upper(wrong)])
        with pytest.raises(InvalidPayload, match="codec 'upper'"):
            codec.encode("abc")
    [codec] = check_codecs([Upper(GeneratorExit())])
    with pytest.raises(PayloadUndecodable, match="codec 'upper'"):
        codec.decoder(Any)(b"abc")


class Impostor(Upper):
    name = "json"


class Loud(Upper):
    name = "Pickle!"


@pytest.mark.parametrize(
    ("codecs", "complaint"),
    [
        (JSON, "list of codecs"),
        ("json", "list of codecs"),
        (["json"], "no codec"),
        ([contextlib], "no codec"),
        ([Loud()], "no codec"),
        ([JSON, JSON], "twice"),
        ([Impostor()], "belongs to"),
        ([], "empty"),
    ],
)
def test_a_list_that_cannot_work_is_refused_by_name(codecs: Any, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        check_codecs(codecs)


def test_the_codecs_of_glassbus_are_codecs() -> None:
    ours: tuple[Codec, ...] = (JSON, MSGPACK, RAW)
    assert check_codecs(ours) == ours
