"""Our text of a scrape is the client's, byte for byte."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from glassbus import telemetry
from glassbus.record.tally import Buckets
from glassbus.telemetry.catalogue import METRICS
from glassbus.telemetry.encoder import Writer
from glassbus.telemetry.metrics import BusCollector, _families
from glassbus.telemetry.propagation import Place
from glassbus.telemetry.scrape import Scrape

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

values = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(["", "a%sb", '"', "\\", "\n"])
numbers = st.integers(0, 10**18).map(float) | st.floats(0, allow_infinity=False) | st.sampled_from([0.0, 1e6, 0.1])


class Kept:
    """A collector of one scrape, for the client's encoders."""

    def __init__(self, scrape: Scrape) -> None:
        self.scrape = scrape

    def collect(self) -> object:
        return _families(self.scrape)


@st.composite
def scrapes(draw: st.DrawFn) -> Scrape:
    scrape = Scrape()
    for metric in draw(st.lists(st.sampled_from(METRICS), max_size=6)):
        labels = tuple(draw(values) for _ in range(1 + len(metric.labels)))
        place = Place(draw(st.integers(1, 2**128 - 1)), draw(st.integers(1, 2**64 - 1)), True)
        if metric.type == "histogram":
            buckets = Buckets(metric.bounds)
            for value in draw(st.lists(numbers, max_size=5)):
                buckets.observe(value)
            scrape.observe(metric.name, labels, buckets)
        else:
            scrape.add(metric.name, labels, draw(numbers))
        if metric.type != "gauge" and draw(st.booleans()):
            scrape.examples[metric.name, labels, 0] = (place, draw(numbers), draw(st.floats(0, 2e9)))
    return scrape


@settings(max_examples=200)
@given(scrapes(), scrapes())
def test_it_writes_what_the_client_writes(one: Scrape, two: Scrape) -> None:
    writer = Writer()
    for scrape in (one, two, one):  # kept templates must not tell of the scrape before
        assert b"".join(writer.parts(scrape, False)) == generate_latest(Kept(scrape))  # type: ignore[arg-type]
        theirs = generate_openmetrics(Kept(scrape))  # type: ignore[no-untyped-call]
        assert b"".join([*writer.parts(scrape, True), b"# EOF\n"]) == theirs


@pytest.mark.parametrize("accept", ["", "text/plain", OPENMETRICS, "application/openmetrics-text", "*/*"])
def test_a_whole_registry_reads_the_same_with_other_collectors_in_it(accept: str) -> None:
    registry = CollectorRegistry()
    Counter("others", "Of somebody else.", registry=registry).inc()
    collector = BusCollector()
    registry.register(collector)
    encode, content_type = choose_encoder(accept)
    theirs = encode(registry)
    ours = collector.exposition(registry, accept)
    assert (content_type, sorted(theirs.splitlines())) == (ours[0], sorted(ours[1].splitlines()))
    assert ours[1].endswith(b"# EOF\n") == theirs.endswith(b"# EOF\n")


def test_a_registry_without_a_bus_is_the_client_s_affair() -> None:
    registry = CollectorRegistry()
    Counter("others", "Of somebody else.", registry=registry).inc()
    assert telemetry.exposition(registry)[1] == generate_latest(registry)
