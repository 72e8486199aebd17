"""Which trace everything is in follows from what travels with a delivery, in any process."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus.facts import Delivery
from glassbus.message import Envelope
from glassbus.telemetry.propagation import Lineage, Place, begin, parse, replay_place, slim, trace_id_of, write

SAMPLED = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "tracestate": "vendor=1"}


def delivery(attempt: int = 1, action: str = "", replays: int = 0, headers: dict[str, str] | None = None) -> Delivery:
    envelope = Envelope("m-1", "orders.created", b"secret", "json", headers or {}, published_at=1.0)
    recovering = ("timeout_error", action) if action else None
    return Delivery(envelope, "charge", "orders.*", attempt=attempt, recovering=recovering, replays=replays)


def lineage(immediate: int = 1) -> Lineage:
    return Lineage(lambda _: immediate)


@given(
    trace_id=st.integers(1, 2**128 - 1),
    span_id=st.integers(1, 2**64 - 1),
    sampled=st.booleans(),
    state=st.sampled_from(["", "a=1", "a=1,b=2"]),
)
def test_what_is_written_is_read_back(trace_id: int, span_id: int, sampled: bool, state: str) -> None:
    headers = {"traceparent": "old", "tracestate": "old=1", "mine": "x"}
    place = Place(trace_id, span_id, sampled, state)
    write(headers, place, sampled)
    assert parse(headers) == place
    assert headers["mine"] == "x"
    assert ("tracestate" in headers) == bool(state)


@given(st.text(max_size=80))
def test_no_header_value_breaks_the_parser(text: str) -> None:
    parse({"traceparent": text, "tracestate": text})


@pytest.mark.parametrize(
    ("header", "valid"),
    [
        (f"00-{'a' * 32}-{'b' * 16}-01", True),
        (f"01-{'a' * 32}-{'b' * 16}-01-later", True),
        (f"00-{'a' * 32}-{'b' * 16}-01-more", False),
        (f"ff-{'a' * 32}-{'b' * 16}-01", False),
        (f"00-{'A' * 32}-{'b' * 16}-01", False),
        (f"00-{'0' * 32}-{'b' * 16}-01", False),
        (f"00-{'a' * 32}-{'0' * 16}-01", False),
        (f" 00-{'a' * 32}-{'b' * 16}-01", False),
    ],
)
def test_traceparent_is_read_as_w3c_has_it(header: str, valid: bool) -> None:
    assert (parse({"traceparent": header}) is not None) == valid


def test_a_tracestate_that_is_too_long_is_dropped_whole() -> None:
    place = parse({**SAMPLED, "tracestate": "a=" + "x" * 600})
    assert place is not None
    assert place.state == ""


@pytest.mark.parametrize("odd", ["+" + "1" * 31, "1_" * 16, " " + "1" * 31, "A" * 32, "0" * 32, "g" * 32, "x", ""])
def test_only_true_lower_case_hex_is_a_trace_id_as_it_is(odd: str) -> None:
    found = trace_id_of(odd)
    assert 0 < found < 2**128
    assert f"{found:032x}" != odd
    assert trace_id_of("0a" * 16) == int("0a" * 16, 16)


def test_another_process_derives_the_same_ids() -> None:
    program = (
        "from glassbus.facts import Delivery; from glassbus.message import Envelope\n"
        "from glassbus.telemetry.propagation import Lineage\n"
        "d = Delivery(Envelope('m-1', 'orders.created', b'', '', {}), 'charge', 'orders.*', attempt=3,"
        " recovering=('timeout_error', 'delayed_retry'))\n"
        "print(Lineage(lambda _: 1).trail(d).own)"
    )
    theirs = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert theirs.strip() == str(lineage().trail(delivery(3, "delayed_retry")).own)


def test_a_first_attempt_is_under_its_publish() -> None:
    trail = lineage().trail(delivery(headers=SAMPLED))
    assert trail.own.trace_id == int("ab" * 16, 16)
    assert trail.parent == int("cd" * 8, 16)
    assert trail.own.state == "vendor=1"


def test_the_attempt_before_is_found_by_the_policy_where_another_process_made_it() -> None:
    """With one immediate retry: attempt 2 in the trace of the publish, attempt 3 in its own."""
    second = lineage().trail(delivery(2, "immediate_retry"))
    third = lineage().trail(delivery(3, "delayed_retry"))
    assert lineage().previous(delivery(3, "delayed_retry"), None) == second.own
    assert lineage().previous(delivery(4, "delayed_retry"), None) == third.own
    assert lineage().previous(delivery(1), None) is None


def test_a_retry_that_the_budget_delayed_is_found_where_it_was() -> None:
    """The policy alone would say that attempt 2 was immediate."""
    here = lineage(immediate=3)
    postponed = delivery(2, "delayed_retry")
    here.failed(postponed)
    third = delivery(3, "immediate_retry")
    assert here.previous(third, here.hint(third)) == here.trail(postponed).own
    here.ended(third)
    assert here.hint(third) is None


def test_attempts_after_a_replay_are_under_it() -> None:
    replayed = delivery(1, replays=2, headers=SAMPLED)
    trail = lineage().trail(replayed)
    place = replay_place(replayed, 2)
    assert (trail.own.trace_id, trail.parent) == (place.trace_id, place.span_id)
    assert trail.own != lineage().trail(delivery(1, replays=1)).own


def test_remembered_attempts_are_bounded() -> None:
    here = lineage()
    for number in range(10_000):
        one = delivery(2, "delayed_retry")
        one.envelope = Envelope(f"m-{number}", "t", b"", "", {})
        here.failed(one)
    assert len(here._delayed) <= 4096


def test_what_is_kept_of_a_delivery_has_no_payload_and_no_foreign_header() -> None:
    kept = slim(delivery(headers={**SAMPLED, "authorization": "secret"}))
    assert kept.envelope.body == b""
    assert kept.envelope.headers == SAMPLED
    assert lineage().trail(kept) == lineage().trail(delivery(headers=SAMPLED))


def test_a_header_is_the_same_place_however_often_it_is_asked_for() -> None:
    """What was written or read here is remembered; so many that the memory is emptied in between."""
    headers: list[tuple[dict[str, str], int]] = []
    for number in range(1, 1000):
        written: dict[str, str] = {}
        begin(written, number)
        headers.append((written, number))
    for written, number in headers:
        place = parse(written)
        assert place is not None
        assert (place.trace_id, place.sampled) == (number, True)
        assert parse(written) == place == parse({**written, "tracestate": ""})
        assert written["traceparent"] == f"00-{number:032x}-{place.span_id:016x}-01"
