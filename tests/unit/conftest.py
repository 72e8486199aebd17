"""Fixtures of the unit tests."""

from __future__ import annotations

import os

import pytest
from cli_kit import Command


@pytest.fixture
def glassbus(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command, in an environment that names no store and lets /metrics take any port."""
    monkeypatch.delenv("GLASSBUS_URL", raising=False)
    monkeypatch.setenv("GLASSBUS_HTTP", "127.0.0.1:0")
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    return Command(capsys)
