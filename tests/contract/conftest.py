"""The contract suite runs on every transport."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from suite import BACKENDS, Backend, Store


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(feature): runs only on transports that have this feature")


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    backend: Backend = request.param
    for marker in request.node.iter_markers("needs"):
        for feature in marker.args:
            if not (backend.keeps if feature == "keeps" else getattr(backend.features, feature)):
                pytest.skip(f"{backend.name} does not promise {feature}")
    return Store(backend, tmp_path)
