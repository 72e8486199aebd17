"""How Hypothesis searches.

In CI (`GLASSBUS_CI=1`, or `CI` as hosted runners set it) property tests run the same examples every time, so that a
change is judged by what it changes. Who develops searches at random, a little in every run; who asks for it, at length:
`make test ARGS="tests/property --hypothesis-profile=nightly"`. What a search finds becomes an `@example` of its test.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "quick",
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],  # machines may be slow
)
quick = settings.get_profile("quick")
settings.register_profile("ci", quick, derandomize=True, database=None)
settings.register_profile("nightly", quick, max_examples=2000, stateful_step_count=100)
_IN_CI = any(os.environ.get(name) for name in ("GLASSBUS_CI", "CI"))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if _IN_CI else "quick"))
