"""A drill evaluates what ships at another speed: durations of expressions are divided, and nothing else changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus import ConfigurationError
from glassbus.drill.durations import divided, longest_s, milliseconds, scaled, tokens
from glassbus.drill.rules import rules_of, shipped_groups

UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000, "y": 31_536_000_000}
FACTORS = st.integers(1, 100)

lengths = st.lists(
    st.tuples(st.integers(1, 999), st.sampled_from(list(UNITS))), min_size=1, max_size=3, unique_by=lambda part: part[1]
)
durations = lengths.map(lambda parts: "".join(f"{amount}{unit}" for amount, unit in parts))
#: What looks like a duration and is none, or holds one that is not to be touched.
others = st.sampled_from(
    [
        "5",
        "1.5",
        "0x1d",
        "1e3",
        ".5",
        "Inf",
        "job:rate5m",
        "m5m",
        "up",
        '"5m"',
        "'a 1h'",
        "`30s`",
        '"\\"5m"',
        "# 5m\n",
        "+",
    ]
)
spaces = st.sampled_from([" ", "\n  ", "\t"])


@given(st.lists(st.one_of(durations, others), max_size=12), spaces, FACTORS)
def test_durations_are_divided_and_everything_else_is_left(parts: list[str], space: str, factor: int) -> None:
    plain = [part for part in parts if milliseconds_or_none(part) is None]
    expected = space.join(part if part in plain else divided(part, factor) for part in parts)
    assert scaled(space.join(parts), factor) == expected


def milliseconds_or_none(text: str) -> int | None:
    try:
        return milliseconds(text) if text[:1].isdigit() and text != "0" else None
    except ConfigurationError:
        return None


@given(st.text(alphabet="ab5mhs0.:[]{}()'\"`\\#\n -+@,é", max_size=40))
def test_the_tokens_of_any_text_are_the_text(text: str) -> None:
    assert "".join(token.text for token in tokens(text)) == text


@given(durations, FACTORS)
def test_a_divided_duration_is_right_to_the_millisecond_and_never_nothing(duration: str, factor: int) -> None:
    whole, part = milliseconds(duration), milliseconds(divided(duration, factor))
    assert part >= 1
    assert part == 1 or abs(part * factor - whole) <= factor / 2


@given(durations, durations)
def test_ranges_steps_and_offsets_are_durations(one: str, other: str) -> None:
    text = f"max_over_time(rate(a:b_total{{x='1h'}}[{one}])[{one}:{other}]) offset -{other} > 5"
    assert scaled(text, 1000) == text.replace(f"[{one}", f"[{divided(one, 1000)}").replace(
        f":{other}]", f":{divided(other, 1000)}]"
    ).replace(f"-{other} ", f"-{divided(other, 1000)} ")


@pytest.mark.parametrize("text", ["x[5]", "x[5m:60]", "x offset 5", "x OFFSET -5", "x [ 300 ]"])
def test_a_range_without_a_unit_is_refused_rather_than_left_as_it_is(text: str) -> None:
    with pytest.raises(ConfigurationError, match="write durations with their unit"):
        scaled(text, 60)


@pytest.mark.parametrize("text", ["", "5", "m", "5 m", "-5m", "5m6", "1.5h", "five"])
def test_what_is_no_duration_is_said_so(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is no duration"):
        milliseconds(text)


def test_nothing_lasts_nothing() -> None:
    assert divided("0", 60) == divided("0s", 60) == "0ms"


@pytest.mark.parametrize("rule", rules_of(shipped_groups()).values(), ids=lambda rule: rule.id)
def test_every_shipped_expression_comes_back_when_it_is_made_slower_again(rule: object) -> None:
    expression = getattr(rule, "expression", "")
    assert longest_s(scaled(expression, 60)) == pytest.approx(longest_s(expression) / 60)
    assert scaled(scaled(expression, 60), 1 / 60) == scaled(expression, 1)
