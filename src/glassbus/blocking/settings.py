"""What a `ProductionMessageBus` reads from its configuration."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from glassbus.bus import MessageBus
from glassbus.classification import Rule
from glassbus.errors import ConfigurationError, shown
from glassbus.handler import Handler
from glassbus.policy.retry import Retry
from glassbus.subscription import make_subscription

logger = logging.getLogger("glassbus")

#: Handed to MessageBus as they are, under the same name.
_OF_THE_BUS = tuple(inspect.signature(MessageBus).parameters)
#: Handed to `subscribe`, where it says nothing else.
_OF_SUBSCRIPTIONS = tuple(
    option
    for option in inspect.signature(MessageBus.subscribe).parameters
    if option not in ("self", "pattern", "name", *_OF_THE_BUS)
)
_OF_THE_MANAGER = ("retry_configs", "circuit_breaker")
_OWN = ("log_dir", "max_log_size", "log_fsync", "stop_deadline", "max_retries")
KNOWN = frozenset((*_OF_THE_BUS, *_OF_SUBSCRIPTIONS, *_OF_THE_MANAGER, *_OWN))

_NAMED_MAX = 20


class BlockingSettings(msgspec.Struct, frozen=True):
    """The configuration, sorted by whom it is for. `stop_deadline` in seconds."""

    bus: dict[str, Any]
    subscription: dict[str, Any]
    rules: tuple[Rule, ...]
    log: dict[str, Any]
    stop_deadline: float


def read(config: Mapping[str, Any]) -> BlockingSettings:
    """Sort what `config` says. Keys that nobody knows are kept where they are and named once in the log.

    Raises ConfigurationError for a key that cannot be as it is; what is for the bus, it checks itself.
    """
    unknown = [shown(key) for key in config if key not in KNOWN]
    if unknown:
        logger.warning(
            "ProductionMessageBus does not use these keys of its configuration: %s", ", ".join(unknown[:_NAMED_MAX])
        )
    rules = config.get("rules", ())
    if not isinstance(rules, list | tuple) or not all(callable(rule) for rule in rules):
        raise ConfigurationError(f"rules must be a list of callables, not {shown(rules)}")
    stop_deadline = config.get("stop_deadline", 30.0)
    if type(stop_deadline) not in (int, float) or not 0 <= stop_deadline <= 86400:
        raise ConfigurationError(f"stop_deadline must be 0 to 86,400 seconds, not {shown(stop_deadline)}")
    log = {"log_dir": config.get("log_dir", "logs")}
    for key, name in (("max_log_size", "max_log_size"), ("log_fsync", "fsync")):
        if key in config:
            log[name] = config[key]
    return BlockingSettings(
        bus={key: config[key] for key in _OF_THE_BUS if key in config} | {"rules": tuple(rules)},
        subscription=_subscription(config),
        rules=tuple(rules),
        log=log,
        stop_deadline=float(stop_deadline),
    )


def _subscription(config: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: config[key] for key in _OF_SUBSCRIPTIONS if key in config}
    if "max_retries" in config:
        retries = config["max_retries"]
        if type(retries) is not int or not 0 <= retries < 1_000_000:
            raise ConfigurationError(f"max_retries must be a whole number from 0, not {shown(retries)}")
        if "retry" in config:
            raise ConfigurationError("give max_retries or retry, not both")
        options["retry"] = Retry(max_attempts=retries + 1)
    _check(options)
    return options


def _check(options: Mapping[str, Any]) -> None:
    """What is wrong with the defaults is said here, and not at the first `subscribe`. Raises ConfigurationError."""
    parameters = inspect.signature(make_subscription).parameters
    given: dict[str, Any] = {name: None for name in parameters if name not in ("handler", "pattern")}
    given.update({"name": "any", "timeout": 30.0, "concurrency": 1, "capacity": 1, "strict_key": False}, **options)
    make_subscription(Handler(lambda message: None), "any", **given)
