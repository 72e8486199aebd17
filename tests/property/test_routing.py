"""Routing against a matcher that anyone can check by reading it."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus.message import check_pattern, check_topic
from glassbus.policy.routing import OTHER, ByTopic, destination, is_exact, matches

PART = st.sampled_from(["a", "b", "ab", "a-b", "A_1", "0"])
TOPIC = st.lists(PART, min_size=1, max_size=5).map(".".join)
PATTERN = st.builds(
    lambda parts, tail: ".".join([*parts, *tail]),
    st.lists(PART | st.just("*"), min_size=1, max_size=4),
    st.sampled_from([[], [">"]]),
) | st.just(">")


def naive(pattern: list[str], topic: list[str]) -> bool:
    """`*` takes one part, `>` takes one or more."""
    if not pattern:
        return not topic
    if pattern[0] == ">":
        return bool(topic)
    return bool(topic) and pattern[0] in ("*", topic[0]) and naive(pattern[1:], topic[1:])


@given(PATTERN, TOPIC)
def test_matches_as_the_naive_matcher_does(pattern: str, topic: str) -> None:
    assert matches(check_pattern(pattern), check_topic(topic)) is naive(pattern.split("."), topic.split("."))


@given(TOPIC)
def test_a_topic_is_its_own_exact_pattern(topic: str) -> None:
    assert is_exact(topic)
    assert matches(topic, topic)
    assert matches(">", topic)
    assert not matches(topic + ".x", topic)
    assert not matches(topic, topic + ".x")


@given(TOPIC, st.lists(PATTERN, max_size=6))
def test_the_destination_is_declared_and_the_most_exact(topic: str, patterns: list[str]) -> None:
    found = destination(topic, patterns)
    wanting = [p for p in patterns if naive(p.split("."), topic.split("."))]
    if topic in patterns:
        assert found == topic
    elif wanting:
        assert found == wanting[0]
    else:
        assert found == OTHER


@given(TOPIC)
def test_what_the_bus_keeps_for_itself_is_in_no_pattern_for_all(topic: str) -> None:
    assert not any(matches(pattern, f"glassbus.{topic}") for pattern in (">", "*.>", "*." + topic))
    assert matches("glassbus.>", f"glassbus.{topic}")
    assert matches(">", f"glassbus-{topic}")


@given(PATTERN)
def test_a_pattern_is_exact_only_without_wildcards(pattern: str) -> None:
    assert is_exact(pattern) is not any(part in ("*", ">") for part in pattern.split("."))


@given(st.lists(st.text("abc.", min_size=1, max_size=255), max_size=50))
def test_what_is_remembered_of_topics_is_what_was_kept(topics: list[str]) -> None:
    known: ByTopic[str] = ByTopic()
    for topic in topics:
        kept = known.keep(topic, f"route of {topic[:1]}", topic[:1])
        assert kept is known[topic]
        assert kept == f"route of {topic[:1]}"


def test_topics_that_are_treated_alike_share_a_value_until_all_is_forgotten() -> None:
    known: ByTopic[list[int]] = ByTopic()
    first = known.keep("a", [1], "same")
    assert known.keep("b", [2], "same") is first
    assert known.keep("c", [3], "other") == [3]
    known.clear()
    assert known.keep("b", [2], "same") == [2]


@pytest.mark.parametrize("length", [6, 255])
def test_a_million_topics_take_no_more_room_than_a_few(length: int) -> None:
    tracemalloc.start()
    try:
        known: ByTopic[None] = ByTopic()
        for number in range(20_000):
            known.keep(f"{number:0{length}}", None, number % 3)
            assert f"{number:0{length}}" in known
        assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
        for number in range(20_000):
            known.keep(f"{number}", None, number)
        assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
    finally:
        tracemalloc.stop()
