"""One stack for all tests of this folder: Jaeger, collector, Alertmanager, Prometheus, as `make stack` starts them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from local_stack import SERVERS, Stack

from glassbus.drill.receiver import Receiver
from tests.server_kit import need


@pytest.fixture(scope="session")
def told() -> Iterator[Receiver]:
    """Whom the Alertmanager of `stack` notifies."""
    with Receiver() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def stack(told: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Quicker than the defaults: a second between scrapes and evaluations, two to decide on a trace."""
    for server in SERVERS:
        need(server)
    quick = {"GLASSBUS_DECISION_WAIT": "2s", "GLASSBUS_SPANMETRICS_FLUSH": "1s"}
    place = tmp_path_factory.mktemp("stack")
    with Stack(place, tuned=quick, every="1s", told=told.url.removeprefix("http://")) as running:
        yield running
