"""Topics, patterns, headers, ids and keys: what is valid is kept as it is, everything else is refused by type."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus.errors import GlassbusError, InvalidHeaders, InvalidPattern, InvalidTopic, PublishRejected
from glassbus.message import (
    HEADERS_BYTES_MAX,
    HEADERS_MAX,
    KEY_LENGTH_MAX,
    MESSAGE_ID_LENGTH_MAX,
    TOPIC_LENGTH_MAX,
    Envelope,
    Level,
    Outgoing,
    Priority,
    Receipt,
    check_headers,
    check_pattern,
    check_text,
    check_topic,
)

BAD_TOPICS = [
    "",
    " ",
    "a b",
    " a",
    "a ",
    "a\n",
    "a\r\nPUB x",
    "a\tb",
    "a\x00b",
    "a\x1bb",
    "..",
    "a..b",
    ".a",
    "a.",
    "../../etc/passwd",
    "a/b",
    "a\\b",
    "a.*",
    "*",
    ">",
    "a.>",
    "a.#",
    "$JS.API",
    "_INBOX.x",
    "amq.direct",
    "glassbus.metrics",
    "glassbus",
    "ünïcode",
    "а.b",  # noqa: RUF001 - a Cyrillic look-alike
    "x" * 256,
    "x" * 10_000,
    'x"; DROP TABLE messages; --',
]


@pytest.mark.parametrize("topic", [*BAD_TOPICS, None, 7, b"bytes", ["a"]], ids=lambda t: repr(t)[:24])
def test_bad_topics_are_refused(topic: object) -> None:
    with pytest.raises(InvalidTopic) as caught:
        check_topic(topic)
    assert isinstance(caught.value, PublishRejected)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value).replace(repr(topic), "")


@pytest.mark.parametrize("topic", ["a", "orders.created", "A-1_b.2", "-", "x" * TOPIC_LENGTH_MAX, "amqp.x", "inbox"])
def test_good_topics_are_kept(topic: str) -> None:
    assert check_topic(topic) == topic


@given(st.text())
def test_any_text_is_a_topic_or_refused_by_type(text: str) -> None:
    try:
        kept = check_topic(text)
    except InvalidTopic:
        return
    assert kept == text
    assert text.isascii()
    assert not set(text) & set(" \r\n\t\x00*>#$/\\\"'")
    assert all(text.split("."))


@pytest.mark.parametrize("pattern", ["*", ">", "a.*", "*.b", "a.*.c", "a.>", "*.>", "a.b.c"])
def test_good_patterns_are_kept(pattern: str) -> None:
    assert check_pattern(pattern) == pattern


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "a b",
        "a.>.b",
        ">.a",
        "a.b>",
        "a*",
        "**",
        "a..b",
        "a.",
        ".a",
        "a.\n",
        "a\r\n.b",
        "x" * 300,
        None,
        3,
        b"a",
        "a.#",
    ],
    ids=lambda p: repr(p)[:24],
)
def test_bad_patterns_are_refused(pattern: object) -> None:
    with pytest.raises(InvalidPattern) as caught:
        check_pattern(pattern)
    assert len(str(caught.value)) < 300


@given(st.text())
def test_any_text_is_a_pattern_or_refused_by_type(text: str) -> None:
    try:
        assert check_pattern(text) == text
    except InvalidPattern:
        return
    assert text.isascii()


@pytest.mark.parametrize(
    "headers",
    [
        {"a b": "x"},
        {"": "x"},
        {"a:b": "x"},
        {"a\r\nb": "x"},
        {"ü": "x"},
        {"n" * 129: "x"},
        {"a": "x\r\ny"},
        {"a": "x\n"},
        {"a": "\x00"},
        {"a": "\x1b[31m"},
        {"a": "\x7f"},
        {"a": "\x85"},
        {"a": "\ud800"},
        {"a": 1},
        {"a": None},
        {"a": b"bytes"},
        {1: "x"},
        {"glassbus-attempt": "9"},
        {"Glassbus-Attempt": "9"},
        {"Nats-Msg-Id": "x"},
        {"x-death": "x"},
        {"X-Death": "x"},
        [("a", "b")],
        "a=b",
        None,
        {f"h{n}": "" for n in range(HEADERS_MAX + 1)},
        {"a": "x" * HEADERS_BYTES_MAX},
        {"a": "ü" * (HEADERS_BYTES_MAX // 2)},
    ],
    ids=lambda h: repr(h)[:24],
)
def test_bad_headers_are_refused(headers: object) -> None:
    with pytest.raises(InvalidHeaders) as caught:
        check_headers(headers)
    assert len(str(caught.value)) < 300


def test_good_headers_are_copied() -> None:
    headers = {"traceparent": "00-ab-cd-01", "x.y_z-1": "any text: ü, 漢字, even ' and \"", "empty": ""}
    kept = check_headers(headers)
    assert kept == headers
    assert kept is not headers
    assert len(check_headers({f"h{n}": "" for n in range(HEADERS_MAX)})) == HEADERS_MAX
    assert check_headers({"a": "x" * (HEADERS_BYTES_MAX - 1)})


@given(st.dictionaries(st.text(max_size=8), st.text(), max_size=5))
def test_any_headers_are_kept_or_refused_by_type_and_survive_utf8(headers: dict[str, str]) -> None:
    try:
        kept = check_headers(headers)
    except InvalidHeaders:
        return
    assert kept == headers
    assert all(name.encode().decode() == name and value.encode().decode() == value for name, value in kept.items())


@pytest.mark.parametrize("value", ["", " ", " a", "a ", "a\n", "a\x00", "ü", "x" * 129, None, 5, b"a"])
def test_bad_ids_and_keys_are_refused(value: object) -> None:
    with pytest.raises(InvalidHeaders, match="message id"):
        check_text("message id", value, 128)


@pytest.mark.parametrize("value", ["a", "a b", "01J-x/y:z", "x" * 128])
def test_good_ids_and_keys_are_kept(value: str) -> None:
    assert check_text("key", value, 128) == value


def test_an_envelope_shows_neither_payload_nor_headers() -> None:
    envelope = Envelope("m", "t", b"canary", "json", {"token": "canary"})
    assert "canary" not in repr(envelope)
    assert "canary" not in str(envelope)
    assert issubclass(InvalidTopic, GlassbusError)


def test_the_limits_and_defaults_are_as_documented() -> None:
    assert (TOPIC_LENGTH_MAX, KEY_LENGTH_MAX, MESSAGE_ID_LENGTH_MAX) == (255, 255, 128)
    assert (HEADERS_MAX, HEADERS_BYTES_MAX) == (64, 16_384)
    assert [p.value for p in Priority] == [0, 1, 2, 3]  # stored: never renumbered
    assert [p.name for p in Priority] == ["LOW", "NORMAL", "HIGH", "CRITICAL"]
    assert check_pattern("x" * TOPIC_LENGTH_MAX)
    envelope = Envelope("m", "t", b"", "json", {})
    assert (envelope.priority, envelope.key, envelope.remember) == (1, None, False)
    assert (envelope.published_at, envelope.due_at, envelope.expires_at) == (0.0, 0.0, 0.0)
    outgoing = Outgoing("t")
    assert (outgoing.delay, outgoing.expires_in, outgoing.priority) == (0.0, None, Priority.NORMAL)
    assert not Receipt("m", Level.MEMORY, ()).duplicate
