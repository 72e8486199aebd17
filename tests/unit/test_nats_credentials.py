"""What a NATS server is shown: from the URL, or from what a credentials function gave."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from glassbus.config import Address, Credentials
from glassbus.errors import ConfigurationError, EndpointRefused
from glassbus.transport.nats.connection import _secrets

HERE = Address("nats://user:word@broker")


def test_the_url_unless_something_else_is_given() -> None:
    assert _secrets(HERE, None) == {"user": "user", "password": "word"}
    assert _secrets(Address("nats://token@broker"), None) == {"token": "token"}
    assert _secrets(Address("nats://broker"), None) == {}
    assert _secrets(HERE, Credentials("other", "new")) == {"user": "other", "password": "new"}
    assert _secrets(HERE, Credentials(token="t")) == {"token": "t"}  # noqa: S106 - no secret


def test_a_credentials_file_is_named_to_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    file = tmp_path / "bus.creds"
    file.write_text("-----BEGIN NATS USER JWT-----")
    assert _secrets(HERE, Credentials(creds_file=str(file))) == {"user_credentials": str(file)}
    with pytest.raises(EndpointRefused, match="cannot be read"):
        _secrets(HERE, Credentials(creds_file=str(tmp_path / "gone.creds")))


def test_a_credentials_file_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="nkeys"):
        _secrets(HERE, Credentials(creds_file="bus.creds"))


def test_credentials_never_show() -> None:
    shown = Credentials("user", "word", "token", "file")
    assert repr(shown) == str(shown) == "Credentials(***)"
