"""How much Hypothesis does: little in every run, much when asked (`HYPOTHESIS_PROFILE=nightly make test`)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_SLOW_MACHINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "quick", max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=_SLOW_MACHINE
)
settings.register_profile(
    "nightly", max_examples=2000, stateful_step_count=100, deadline=None, suppress_health_check=_SLOW_MACHINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
