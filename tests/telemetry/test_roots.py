"""The countdown samples as one draw for each message would, and the SDK's samplers would take what it writes."""

from __future__ import annotations

import math
import os
from itertools import pairwise

import pytest
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

from glassbus.telemetry import propagation
from glassbus.telemetry.propagation import parse
from glassbus.telemetry.roots import Roots

ALL = 1 << 64


def taken(roots: Roots, messages: int, *, prepared: bool) -> list[tuple[int, int]]:
    """(which message, its trace id) of those that were taken."""
    found = []
    for number in range(messages):
        roots.left -= 1
        if roots.left >= 0:
            continue
        headers: dict[str, str] = {}
        roots.begin(headers)
        place = parse(headers)
        assert place is not None
        assert place.sampled
        found.append((number, place.trace_id))
        if prepared:
            roots.prepare()
    return found


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("share", [1e-6, 0.01, 0.3, 0.999, 1.0])
def test_the_share_and_the_gaps_are_those_of_independent_draws(share: float, prepared: bool) -> None:
    propagation._random.seed(20_261_124)
    sampler, roots, messages = TraceIdRatioBased(share), Roots(), 200_000
    roots.aim(sampler.bound)
    found = taken(roots, messages, prepared=prepared)
    deviation = math.sqrt(messages * share * (1 - share))
    assert abs(len(found) - messages * share) <= 5 * deviation
    assert len({trace_id for _, trace_id in found}) == len(found)
    for _, trace_id in found[:1000]:
        assert sampler.should_sample(None, trace_id, "publish").decision is Decision.RECORD_AND_SAMPLE
    neighbours = sum(b - a == 1 for (a, _), (b, _) in pairwise(found))
    expected = len(found) * share
    assert abs(neighbours - expected) <= 5 * math.sqrt(max(1.0, expected * (1 - share))) + 1


def test_another_share_holds_from_the_next_message_on() -> None:
    roots = Roots()
    roots.aim(1)  # next to none
    assert roots.left > 10**6
    roots.aim(ALL)
    assert len(taken(roots, 10, prepared=True)) == 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_does_not_give_what_was_ready_in_its_parent() -> None:
    """As telemetry does after a fork."""
    roots = Roots()
    roots.aim(ALL)
    (ready,) = taken(roots, 1, prepared=True)
    assert roots._ready is not None
    told = roots._ready[1].trace_id
    roots.after_fork()
    assert roots.bound is None  # so whoever asks aims anew
    roots.aim(ALL)
    assert told not in {trace_id for _, trace_id in [ready, *taken(roots, 3, prepared=True)]}
