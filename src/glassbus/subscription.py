"""What `subscribe` is given, checked."""

from __future__ import annotations

import msgspec

from glassbus.config import KillSwitch
from glassbus.errors import ConfigurationError, InvalidHeaders, shown
from glassbus.handler import Handler
from glassbus.message import check_pattern, check_text
from glassbus.policy.retry import Retry
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
    kill_switch: KillSwitch | None,
) -> Subscription:
    """A subscription of what was given. Raises InvalidPattern or ConfigurationError, naming what is wrong."""
    for what, value, kind in (("retry", retry, Retry), ("kill_switch", kill_switch, KillSwitch)):
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
        spec=SubscriptionSpec(known_as, check_pattern(pattern), capacity, strict_key),
        handler=handler,
        retry=Retry() if retry is None else retry,
        timeout=timeout,
        abandon_after=abandoned_after,
        concurrency=concurrency,
        kill_switch=KillSwitch() if kill_switch is None else kill_switch,
    )
