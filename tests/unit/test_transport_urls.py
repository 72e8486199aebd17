"""Transport URLs: what can be meant is taken, what cannot is refused by name before anything is opened."""

from __future__ import annotations

import pytest

from glassbus import ConfigurationError, Level, MessageBus


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("orders.db", "no scheme"),
        ("redis://host/0", "redis"),
        ("sqlite://orders.db", "three or four"),
        ("sqlite:///", "names no file"),
        ("sqlite:///folder/", "names no file"),
        ("sqlite:///a.db?synchronous=off", "synchronous"),
        ("sqlite:///a.db?durability=none", "durability"),
        ("memory://?durability=disk", "durability"),
        ("memory:///path", "no path"),
        ("sqlite:///a.db,sqlite:///b.db", "failover"),
        ("", "no transport URL"),
        (3, "URL"),
    ],
)
def test_a_url_that_cannot_work_is_refused_by_name(url: object, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        MessageBus(url, telemetry=False)  # type: ignore[arg-type]


def test_durability_can_be_chosen_in_the_url_or_as_an_argument() -> None:
    def level(url: str, **options: str) -> Level:
        return MessageBus(url, telemetry=False, **options)._transport.features.level  # type: ignore[arg-type]

    assert level("sqlite:///a.db") == Level.DISK
    assert level("sqlite:///a.db?durability=process") == Level.PROCESS
    assert level("sqlite:///a.db", durability="process") == Level.PROCESS
