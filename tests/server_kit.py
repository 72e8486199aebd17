"""Real servers for tests: as drills start them, each on free loopback ports, its files in a folder of its own."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path

import pytest

from glassbus.drill.servers import READY_S, Server, ServerMissing, find_server, free_port
from glassbus.drill.servers import serving as running

__all__ = ["READY_S", "REPOSITORY", "Server", "fetch", "free_port", "need", "running"]

REPOSITORY = Path(__file__).parents[1]


def need(name: str) -> str:
    """The binary of server `name`; see `find_server`.

    Skips the test where there is none; in CI that is a failure, so that nothing is left untested unseen.
    """
    try:
        return find_server(name)
    except ServerMissing as error:
        if os.environ.get("CI") or os.environ.get("GLASSBUS_CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


def fetch(url: str) -> bytes:
    """The body of a page of a server of ours. Raises HTTPError, an OSError, where it is not answered with success."""
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - only what the tests started
        body: bytes = answer.read()
        return body
