"""JSON lines are read strictly, in pieces of any size, from files and from pipes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus.cli.common import CommandError
from glassbus.cli.jsonlines import LINE_BYTES_MAX, Line, LineReader, Splitter, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"{}", {}),
        (b'{"a": [1, 2.5, null, true, "\xc3\xa9"]}', {"a": [1, 2.5, None, True, "é"]}),
        (b"18446744073709551615", 2**64 - 1),
        (b"-9223372036854775808", -(2**63)),
        (b'"text"', "text"),
    ],
)
def test_json_is_read(text: bytes, value: Any) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1} {"b": 2}', "not JSON: Extra data"),
        (b'{"a": 1, "a": 2}', "key 'a' is there twice"),
        (b'[{"x": {"b": 1, "c": 2, "b": 3}}]', "key 'b' is there twice"),
        (b"NaN", "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b"1e999", "too large"),
        (b"18446744073709551616", "does not fit in 64 bits"),
        (b"9" * 5000, "does not fit in 64 bits"),
        (b'"\xff"', "not UTF-8: byte 2 is 0xff"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        (b'"a\tb"', "not JSON: Invalid control character"),
    ],
)
def test_what_another_reader_might_take_otherwise_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse(text)
    assert reason in str(caught.value)


def lines_of(chunks: list[bytes]) -> list[Line]:
    splitter = Splitter()
    lines = [line for chunk in chunks for line in splitter.feed(chunk)]
    return lines + splitter.end()


@given(st.lists(st.integers(0, 99), max_size=12), st.lists(st.integers(1, 40), max_size=12), st.booleans())
def test_lines_are_the_same_however_the_bytes_arrive(values: list[int], cuts: list[int], ended: bool) -> None:
    text = b"\n".join(b'{"n": %d}' % value for value in values) + (b"\n" if ended else b"")
    chunks, rest = [], text
    for cut in cuts:
        chunks.append(rest[:cut])
        rest = rest[cut:]
    assert lines_of([*chunks, rest]) == lines_of([text])
    assert [line.value["n"] for line in lines_of([text])] == values


def test_blank_lines_count_but_are_not_given_and_a_byte_order_mark_is_passed_over() -> None:
    lines = lines_of([b"\xef\xbb\xbf1\r\n\n  \n2"])
    assert [(line.number, line.value) for line in lines] == [(1, 1), (4, 2)]


def test_a_line_too_long_is_named_and_the_next_one_is_read() -> None:
    long = b'"' + b"x" * LINE_BYTES_MAX + b'"\n'
    lines = lines_of([b"1\n" + long[:1000], long[1000:] + b"2\n"])
    assert [(line.number, line.value, bool(line.bad)) for line in lines] == [
        (1, 1, False),
        (2, None, True),
        (3, 2, False),
    ]
    assert "longer than" in lines[1].bad


def test_a_file_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(b"%d\n" % n for n in range(50_000)))

    async def read() -> list[Any]:
        reader = LineReader(str(path))
        values: list[Any] = []
        while not reader.exhausted:
            taken = await reader.take(700, 1.0)
            assert len(taken) <= 700
            values += [line.value for line in taken]
        return values

    assert asyncio.run(read()) == list(range(50_000))


def test_a_pipe_that_says_nothing_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    keeper = os.open(path, os.O_RDWR)
    try:

        async def read() -> tuple[list[Line], list[Line]]:
            reader = LineReader(str(path))
            nothing = await reader.take(10, 0.01)
            os.write(keeper, b'{"a": 1}\n{"unfinished"')
            first = await reader.take(10, 5.0)
            reader.close()
            return nothing, first

        nothing, first = asyncio.run(read())
        os.write(keeper, b"\n")  # so that the thread sees that nobody reads any more
    finally:
        os.close(keeper)
    assert nothing == []
    assert [line.value for line in first] == [{"a": 1}]


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    async def read(path: Path) -> None:
        reader = LineReader(str(path))
        await reader.take(1, 5.0)

    with pytest.raises(CommandError, match="No such file"):
        asyncio.run(read(tmp_path / "absent"))
    with pytest.raises(CommandError, match="Is a directory"):
        asyncio.run(read(tmp_path))
