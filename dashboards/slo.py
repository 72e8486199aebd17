"""The objective, and the recorded series of the alerts that hold it: the only recording rules that boards read."""

from __future__ import annotations

from glassbus.telemetry.catalogue import BY_NAME

#: Of 1,000 deliveries that end, 999 are handled within the deadline.
OBJECTIVE, DEADLINE_S = 0.999, 60.0
BUDGET = 1 - OBJECTIVE
#: Recorded by alerts/glassbus.rules.yml: the share of deliveries that were not handled in time, by window.
LATE = "bus_subscription:glassbus_messages_late:ratio_rate{window}"

assert DEADLINE_S in BY_NAME["message_age_seconds"].bounds, "the deadline is a bucket, so that it can be counted"
