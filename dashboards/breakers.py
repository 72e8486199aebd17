"""What is held back: breakers, paused subscriptions, and the connections to stores and brokers."""

from __future__ import annotations

from dashboards import look
from dashboards import panels as p
from dashboards import promql as q
from dashboards.frame import CELL, Board, of, runbook, to_board, to_board_of, to_traces
from dashboards.look import Levels
from dashboards.panels import Column
from dashboards.states import (
    BREAKER,
    SUBSCRIPTION,
    UP,
    breakers,
    breakers_not_closed,
    subscriptions,
    subscriptions_held,
)

_TRANSITIONS = to_traces("Its transitions in Jaeger", {"glassbus.breaker.name": of("breaker")})
_MOVED = f"({q.grown('breaker_transitions_total', by='bus breaker from_state to_state')} >= 1)"

#: 0 for embedded stores, which have none.
_SPOOLED = " or ".join(
    f"sum by (bus, instance) ({spooled})"
    for spooled in (q.select("spool_messages"), f"0 * {q.select('connection_up')}")
)

_TILES = (
    p.tile(
        "Breakers not closed",
        "Breakers that are open, forced open or trying, in any process. Good: 0. If not: the timeline below shows "
        "which, and since when.",
        breakers_not_closed(),
        levels=Levels(bad=1),
        runbook=runbook("GlassbusBreakerStuckOpen"),
    ),
    p.tile(
        "Subscriptions held",
        "Subscriptions that are paused or held by their breaker. Good: 0. If not: their messages wait and are kept.",
        subscriptions_held(),
        levels=Levels(caution=1),
        links=[to_board("glassbus-queues")],
        runbook=runbook("GlassbusSubscriptionHeld"),
    ),
    p.tile(
        "Times opened in the range",
        "How often breakers opened in the range shown. Good: 0. If not: one that opens again and again sees a fault "
        "that passes and returns: make it stay open longer, or mend what it guards.",
        q.grown("breaker_transitions_total", from_state="closed", to_state="open"),
        levels=Levels(caution=1, bad=10),
        decimals=0,
        runbook=runbook("GlassbusBreakerFlapping"),
    ),
    p.tile(
        "Connections down",
        "Stores and brokers that do not answer a process. Good: 0. If not: publishes are spooled or refused; the bus "
        "reconnects by itself.",
        f"count({q.select('connection_up')} == 0) or vector(0)",
        levels=Levels(bad=1),
        runbook=runbook("GlassbusConnectionDown"),
    ),
    p.tile(
        "Longest without an answer",
        "Time since a store or broker last answered, of the worst. Good: under 10 s. If not: it hangs, or the network "
        "between drops packets without a word.",
        f"max({q.select('last_round_trip_age_seconds')})",
        look.SECONDS,
        Levels(10, 30),
        none="never",
        runbook=runbook("GlassbusStoreSilent"),
    ),
    p.tile(
        "Spooled here",
        "Messages kept on this side until the broker is back; 0 for embedded stores. Good: 0. If not: they are "
        "forwarded when it returns; watch the disk meanwhile.",
        f"sum({_SPOOLED})",
        levels=Levels(caution=1),
        runbook=runbook("GlassbusSpoolFilling"),
    ),
)

_BREAKERS = (
    p.row("Breakers"),
    p.timeline(
        "State of each breaker, the worst of all processes",
        "Breakers of subscriptions (kill switches), endpoints and the bus's own recoveries. Good: green. If not: red "
        "refuses calls until its time is over, orange tries a few, purple was forced by somebody.",
        {"{{bus}}/{{breaker}}": breakers("bus breaker")},
        BREAKER,
        links=[_TRANSITIONS],
        runbook=runbook("GlassbusBreakerStuckOpen"),
        w=14,
        h=12,
    ),
    p.table(
        "Transitions in the range",
        "Which breaker moved where, how often. Good: an empty table. If not: click a breaker for the traces, whose "
        "links lead to the failures that tipped it.",
        {"times": Column(q.otherwise(_MOVED, "breaker", "none moved"), look.COUNT)},
        first=("bus", "breaker", "from_state", "to_state"),
        links={"breaker": [to_traces("Its transitions in Jaeger", {"glassbus.breaker.name": CELL})]},
        widths={"bus": 80, "from_state": 95, "to_state": 95, "times": 70},
        w=10,
        h=12,
    ),
    p.graph(
        "Transitions",
        "Moves of breakers a second, by where to. Good: none. If not: open and half_open by turns means that the fault "
        "lasts.",
        {"{{to_state}}": q.rate("breaker_transitions_total", by="to_state")},
        look.PER_SECOND,
        bars=True,
        stacked=True,
        colours={s.name: s.colour for s in BREAKER},
        runbook=runbook("GlassbusBreakerFlapping"),
    ),
    p.graph(
        "Calls through breakers",
        "Calls a second, by outcome. Good: all succeeded. If not: failed ones count towards opening; refused ones were "
        "spared a call that would have failed.",
        {"{{outcome}}": q.rate("breaker_calls_total", by="outcome")},
        look.PER_SECOND,
        stacked=True,
        colours=look.OUTCOMES,
    ),
    p.bars(
        "Failing calls, by breaker",
        "Share of the calls through each breaker that failed, in the range shown. Good: under 5 %. If not: by default "
        "a kill switch opens when half of at least 20 deliveries fail within a minute.",
        {
            "{{bus}}/{{breaker}}": q.share(
                q.grown("breaker_calls_total", by="bus breaker", outcome="failed"),
                q.grown("breaker_calls_total", by="bus breaker", outcome=("succeeded", "failed")),
            )
        },
        look.SHARE,
        Levels(0.05, 0.5),
        top=1.0,
        links=[_TRANSITIONS],
    ),
)

_HELD = (
    p.row("Subscriptions"),
    p.timeline(
        "State of each subscription, the worst of all processes",
        "Whether it takes messages. Good: running. If not: breaker_open ends by itself when its probes work; paused "
        "ends when somebody resumes it.",
        {"{{bus}}/{{subscription}}": subscriptions("bus subscription")},
        SUBSCRIPTION,
        links=[to_board_of("glassbus-queues", "subscription", of("subscription"))],
        runbook=runbook("GlassbusSubscriptionHeld"),
        w=24,
    ),
)

_CONNECTIONS = (
    p.row("Connections"),
    p.timeline(
        "Stores and brokers, of each process",
        "Whether the broker is connected, or the embedded store answered its last call. Good: green. If not: the bus "
        "tries again by itself, then the next of a failover set.",
        {"{{endpoint}} of {{instance}}": f"max by (endpoint, instance) ({q.select('connection_up')})"},
        UP,
        links=[to_traces("What connections did, in Jaeger", {"glassbus.connection.state": "down"})],
        runbook=runbook("GlassbusConnectionDown"),
        w=16,
    ),
    p.graph(
        "Time since the last answer",
        "Good: a few seconds, up and down. If not: a line that climbs is a store or broker that no longer answers.",
        {"{{endpoint}} of {{instance}}": f"max by (endpoint, instance) ({q.select('last_round_trip_age_seconds')})"},
        look.SECONDS,
        line=30,
        runbook=runbook("GlassbusStoreSilent"),
    ),
    p.graph(
        "Reconnects",
        "Times that a store or broker worked again, in the range up to there. Good: flat. If not: a stair is a "
        "connection that breaks again and again: look at the network and the broker's limits.",
        {"{{endpoint}}": q.grown("reconnects_total", by="endpoint", over="5m")},
        look.COUNT,
        bars=True,
        runbook=runbook("GlassbusConnectionFlapping"),
    ),
    p.graph(
        "Spooled, waiting for the broker",
        "Messages that are kept on this side; 0 for embedded stores. Good: 0. If not: falls by itself when the broker "
        "is back.",
        {"{{bus}} at {{instance}}": _SPOOLED},
        look.COUNT,
        runbook=runbook("GlassbusSpoolFilling"),
    ),
    p.graph(
        "Free space where the store is",
        "Good: well above 1 GB. If not: below a reserve publishes are refused, while acknowledgements still go "
        "through: make room.",
        {"{{bus}} at {{instance}}": f"min by (bus, instance) ({q.select('disk_free_bytes')})"},
        look.BYTES,
        runbook=runbook("GlassbusDiskSpaceLow"),
    ),
)

BOARD = Board(
    "glassbus-breakers",
    "What is held back, since when and by what; and whether stores and brokers answer.",
    (*_TILES, *_BREAKERS, *_HELD, *_CONNECTIONS),
    marks=("Breakers that opened", "Breakers that closed"),
)
