"""What is shown of an exception's text: never a URL's credentials, never what a program's own redaction takes out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus.errors import redact, redact_errors, redacted, safe_text, shown

PASSWORD = "CANARY-0123456789-CANARY"
URL = f"https://user:{PASSWORD}@bank.example/pay"
#: The rule itself, which takes long on long texts: from a scheme to the last '@' of the same word.
RULE = re.compile(r"(?<=://)\S*@")


@pytest.fixture
def own_redaction() -> Iterator[Any]:
    yield redact_errors
    redact_errors(None)


@given(st.text("ab@:/ \n", max_size=60))
def test_credentials_are_taken_out_by_the_rule(text: str) -> None:
    assert redact(text) == RULE.sub("***@", text)


@given(st.integers(0, 2200), st.sampled_from(["x", " ", "x ", "://", "@"]), st.sampled_from([80, 300, 1024]))
def test_no_cut_shows_a_part_of_a_password(before: int, filling: str, cap: int) -> None:
    text = (filling * before)[:before] + URL + " and more" * 200
    for told in (safe_text(ValueError(text), cap), shown(text, cap)):
        assert len(told) <= cap
        assert not any(PASSWORD[at : at + 4] in told for at in range(len(PASSWORD) - 3))


def test_a_text_that_is_cut_far_from_any_url_is_cut_where_it_should_be() -> None:
    assert safe_text(ValueError("x" * 5000), 100) == "x" * 99 + "…"
    assert safe_text(ValueError(f"{URL} failed"), 100) == "https://***@bank.example/pay failed"


def test_a_programs_own_redaction_is_asked_after_ours(own_redaction: Any) -> None:
    asked = []

    def also(text: str) -> str:
        asked.append(text)
        return text.replace("4111", "[card]")

    own_redaction(also)
    assert safe_text(ValueError(f"card 4111 at {URL}")) == "card [card] at https://***@bank.example/pay"
    assert redacted("4111") == "[card]"
    assert PASSWORD not in asked[0]
    own_redaction(None)
    assert safe_text(ValueError("4111")) == "4111"


def test_what_it_takes_out_is_not_cut_in_two(own_redaction: Any) -> None:
    own_redaction(lambda text: re.sub(r"\d{16}", "[card]", text))
    told = safe_text(ValueError("x" * 75 + " 4111111111111111"), 80)
    assert "4" not in told


@pytest.mark.parametrize(
    ("also", "told"),
    [
        (lambda _: 1 / 0, "<redaction raised ZeroDivisionError>"),
        (lambda _: None, "<redaction raised TypeError>"),
        (lambda _: (_ for _ in ()).throw(SystemExit), "<redaction raised SystemExit>"),
    ],
)
def test_a_redaction_that_fails_shows_nothing(own_redaction: Any, also: Any, told: str) -> None:
    own_redaction(also)
    assert safe_text(ValueError("secret")) == told


@pytest.mark.parametrize("letters", [900, 1100, 5000])
def test_a_password_longer_than_all_that_is_read_does_not_show_either(letters: int) -> None:
    text = f"at https://user:{'CANARY' * letters}@bank.example"
    assert safe_text(ValueError(text), 300) in ("at https://***@bank.example", "at https://")
    assert "CANARY" not in shown(text)
