"""What `subscribe` is given, checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from glassbus.config import KillSwitch, Overflow
from glassbus.errors import ConfigurationError, InvalidHeaders, safe_text, shown
from glassbus.handler import Handler
from glassbus.message import check_pattern, check_text
from glassbus.policy.retry import Retry
from glassbus.policy.timeouts import AdaptiveTimeout
from glassbus.transport import SubscriptionSpec

_LONGEST_S = 10 * 365 * 86400
_SLOTS_MAX = 10_000
_CAPACITY_MAX = 10**12
_NAME_LENGTH_MAX = 128


class Subscription(msgspec.Struct, frozen=True):
    """A handler bound to a pattern. Durations in seconds."""

    spec: SubscriptionSpec
    handler: Handler
    retry: Retry
    timeout: float
    abandon_after: float
    concurrency: int
    kill_switch: KillSwitch
    adaptive_timeout: AdaptiveTimeout
    #: Its configuration holds it back in this process.
    paused: bool = False


def make_subscription(
    handler: Handler,
    pattern: str,
    *,
    name: str | None,
    retry: Retry | None,
    timeout: float,
    abandon_after: float | None,
    concurrency: int,
    capacity: int,
    strict_key: bool,
    overflow: Overflow | None,
    kill_switch: KillSwitch | None,
    adaptive_timeout: AdaptiveTimeout | None,
) -> Subscription:
    """A subscription of what was given. Raises InvalidPattern or ConfigurationError, naming what is wrong."""
    for what, value, kind in (
        ("retry", retry, Retry),
        ("kill_switch", kill_switch, KillSwitch),
        ("overflow", overflow, Overflow),
        ("adaptive_timeout", adaptive_timeout, AdaptiveTimeout),
    ):
        if value is not None and not isinstance(value, kind):
            raise ConfigurationError(f"{what} must be a {kind.__name__}, not {shown(value)}")
    for what, number in (("timeout", timeout), ("abandon_after", abandon_after)):
        if number is not None and not (isinstance(number, int | float) and 0 < number <= _LONGEST_S):
            raise ConfigurationError(f"{what} must be more than 0 seconds, at most ten years, not {shown(number)}")
    for what, count, most in (("concurrency", concurrency, _SLOTS_MAX), ("capacity", capacity, _CAPACITY_MAX)):
        if not (type(count) is int and 1 <= count <= most):
            raise ConfigurationError(f"{what} must be a whole number from 1 to {most:,}, not {shown(count)}")
    if type(strict_key) is not bool:
        raise ConfigurationError(f"strict_key must be True or False, not {shown(strict_key)}")
    abandoned_after = 10 * timeout if abandon_after is None else abandon_after
    if abandoned_after < timeout:
        raise ConfigurationError(f"abandon_after ({abandoned_after!r}) must be at least timeout")
    try:
        known_as = check_text("subscription name", handler.name if name is None else name, _NAME_LENGTH_MAX)
    except InvalidHeaders as error:
        raise ConfigurationError(f"{error}; give it one with name=") from None
    return Subscription(
        spec=SubscriptionSpec(
            known_as, check_pattern(pattern), capacity, strict_key, Overflow() if overflow is None else overflow
        ),
        handler=handler,
        retry=Retry() if retry is None else retry,
        timeout=timeout,
        abandon_after=abandoned_after,
        concurrency=concurrency,
        kill_switch=KillSwitch() if kill_switch is None else kill_switch,
        adaptive_timeout=AdaptiveTimeout() if adaptive_timeout is None else adaptive_timeout,
    )


# What a configuration may change of a subscription. Numbers as they are written; 2 is a fine float.
_RETRY: dict[str, type] = {
    "max_attempts": int,
    "immediate": int,
    "base_delay": float,
    "multiplier": float,
    "max_delay": float,
    "budget": float,
    "budget_per_second": float,
}
_KILL_SWITCH: dict[str, type] = {
    "window": float,
    "minimum": int,
    "ratio": float,
    "open_for": float,
    "probes": int,
    "enabled": bool,
}
_OVERFLOW: dict[str, type] = {"displace": bool, "expand": float, "expand_for": float}
_ADAPTIVE: dict[str, type] = {"factor": float, "cap": float, "half_life": float}
_TUNABLE: dict[str, type] = {
    "timeout": float,
    "abandon_after": float,
    "concurrency": int,
    "capacity": int,
    "paused": bool,
    "retry": dict,
    "overflow": dict,
    "kill_switch": dict,
    "adaptive_timeout": dict,
}
_SHOWN = {float: "a number", int: "a whole number", bool: "true or false", dict: "a table of settings"}


def retuned(subscription: Subscription, settings: Mapping[str, Any]) -> Subscription:
    """`subscription` with `settings` of a configuration in place of its own. Raises ConfigurationError naming the key.

    Without an `abandon_after` of its own, a changed timeout keeps the relation between the two.
    """
    if not settings:
        return subscription
    where = f"subscriptions.{subscription.spec.name}"
    check_settings(where, settings, _TUNABLE)
    timeout = settings.get("timeout", subscription.timeout)
    try:
        made = make_subscription(
            subscription.handler,
            subscription.spec.pattern,
            name=subscription.spec.name,
            retry=_replaced(f"{where}.retry", subscription.retry, settings.get("retry"), _RETRY),
            timeout=timeout,
            abandon_after=settings.get("abandon_after", subscription.abandon_after / subscription.timeout * timeout),
            concurrency=settings.get("concurrency", subscription.concurrency),
            capacity=settings.get("capacity", subscription.spec.capacity),
            strict_key=subscription.spec.strict_key,
            overflow=_replaced(f"{where}.overflow", subscription.spec.overflow, settings.get("overflow"), _OVERFLOW),
            kill_switch=_replaced(
                f"{where}.kill_switch", subscription.kill_switch, settings.get("kill_switch"), _KILL_SWITCH
            ),
            adaptive_timeout=_replaced(
                f"{where}.adaptive_timeout",
                subscription.adaptive_timeout,
                settings.get("adaptive_timeout"),
                _ADAPTIVE,
            ),
        )
    except ConfigurationError as error:
        text = safe_text(error)
        raise ConfigurationError(text if text.startswith(where) else f"{where}: {text}") from None
    return msgspec.structs.replace(made, paused=settings.get("paused", False))


def check_settings(where: str, settings: object, allowed: Mapping[str, type]) -> None:
    """Raises ConfigurationError for a key that is not allowed, or a value that is not of its kind."""
    if not isinstance(settings, dict):
        raise ConfigurationError(f"{where} must be a table of settings, not {shown(settings)}")
    for key, value in settings.items():
        kind = allowed.get(key)
        if kind is None:
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it may have {', '.join(allowed)}"
            raise ConfigurationError(f"{where} has no setting {key[:80]!r}; {hint}")
        fits = (int, float) if kind is float else (kind,)
        if type(value) not in fits or (type(value) is float and not math.isfinite(value)):
            raise ConfigurationError(f"{where}.{key} must be {_SHOWN[kind]}, not {shown(value)}")


def _replaced(where: str, part: Any, settings: Any, allowed: Mapping[str, type]) -> Any:
    if settings is None:
        return part
    check_settings(where, settings, allowed)
    try:
        return msgspec.structs.replace(part, **settings)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {safe_text(error)}") from None
