"""What fails, how often, whether it is getting worse, and whether recovery works."""

from __future__ import annotations

from dashboards import look
from dashboards import panels as p
from dashboards import promql as q
from dashboards.frame import CELL, Board, of, runbook, to_board, to_board_of, to_traces
from dashboards.look import Levels
from dashboards.panels import Column

#: What the mission asks of error handling, and of recovery.
HANDLING_S, RECOVERY_S = 0.01, 30.0

_OF_CATEGORY = to_traces("Traces of these errors in Jaeger", {"glassbus.error.category": of("category")})
_FAILED = q.count("process_duration_seconds", outcome="failed")
_PLACES = f"topk(10, {q.grown('errors_total', by='destination component category severity')} >= 1)"
_LATELY = q.rate("errors_total", by="category", over="5m")
_ENDED = ("succeeded", "failed")


def _recovered(by: str = "", over: str = q.RATE) -> str:
    return q.share(
        q.grown("recovery_attempts_total", by, over, outcome="succeeded"),
        q.grown("recovery_attempts_total", by, over, outcome=_ENDED),
    )


_TILES = (
    p.tile(
        "Errors",
        "Errors a second: each failed attempt, and each failure of the bus's own parts. Good: near 0. If not: the "
        "categories below say what kind, the table where.",
        q.rate("errors_total"),
        look.PER_SECOND,
        Levels(caution=0.01),
    ),
    p.tile(
        "Serious ones in the range",
        "Errors of high and critical severity in the range shown. Good: 0. If not: `glassbus errors top` names the "
        "fingerprints behind them.",
        q.grown("errors_total", severity=("high", "critical")),
        levels=Levels(bad=1),
        decimals=0,
    ),
    p.tile(
        "Attempts that fail",
        "Share of attempts that fail now. Good: under 5 %. If not: above half, retries outnumber messages, and what "
        "the handlers call is probably down.",
        q.share(_FAILED, q.count("process_duration_seconds")),
        look.SHARE,
        Levels(0.05, 0.5),
        none="no traffic",
        runbook=runbook("GlassbusRetryStorm"),
    ),
    p.tile(
        "Recoveries that work",
        "Share of the recoveries ended in the range shown that worked. Good: above 90 %. If not: retrying does not "
        "mend it; look at the category and at what it needs.",
        _recovered(over=q.RANGE),
        look.SHARE,
        Levels(0.9, 0.5, low=True),
        none="none needed",
        runbook=runbook("GlassbusRecoveryIneffective"),
    ),
    p.tile(
        "Time to recover, p95",
        "From a delivery's first failure to the end of the attempt that a recovery led to. Good: under "
        f"{RECOVERY_S:g} s. If not: the fault lasts, or backoff is long; see the graph below by action.",
        q.quantile(0.95, "recovery_duration_seconds", over=q.RANGE),
        look.SECONDS,
        Levels(RECOVERY_S, 10 * RECOVERY_S),
        none="none needed",
    ),
    p.tile(
        "Cost of an error, p99",
        "Time from catching an exception to having decided and stored what follows. Promised: under "
        f"{HANDLING_S * 1e3:g} ms. Good: under 1 ms. If not: the store or an observer is slow.",
        q.quantile(0.99, "error_handling_seconds", over=q.RANGE),
        look.SECONDS,
        Levels(HANDLING_S / 2, HANDLING_S),
        none="none",
        links=[to_board("glassbus-telemetry")],
        runbook=runbook("GlassbusErrorHandlingSlow"),
    ),
)

_ERRORS = (
    p.row("Errors"),
    p.graph(
        "By category",
        "Errors a second, by what kind they are. Good: near 0. If not: click one for its traces; docs/errors.md says "
        "what the bus does about each category.",
        {"{{category}}": q.rate("errors_total", by="category")},
        look.PER_SECOND,
        stacked=True,
        colours=look.CATEGORIES,
        links=[_OF_CATEGORY],
    ),
    p.graph(
        "By severity",
        "Errors a second, by how bad they are. Good: no red. If not: critical ones have been escalated: "
        "`glassbus escalations list`.",
        {"{{severity}}": q.rate("errors_total", by="severity")},
        look.PER_SECOND,
        stacked=True,
        colours=look.SEVERITIES,
        links=[to_traces("Traces of these errors in Jaeger", {"glassbus.error.severity": of("severity")})],
    ),
    p.graph(
        "Getting worse?",
        "Each category's rate in the last 5 minutes, in multiples of its mean in the last hour. Good: at or below 1. "
        "If not: above 1 it rises; `glassbus errors trends` tells which fingerprint is new.",
        {"{{category}}": q.share(_LATELY, f"avg_over_time({_LATELY}[1h:30s])")},
        look.TIMES,
        colours=look.CATEGORIES,
        line=1,
        links=[_OF_CATEGORY],
    ),
    p.table(
        "Where, in the range shown",
        "The ten places with most errors. Good: an empty table. If not: click a category for its traces, a destination "
        "to see it alone.",
        {
            "errors": Column(q.otherwise(_PLACES, "category", "none"), look.COUNT),
        },
        first=("severity", "category", "component", "destination"),
        links={
            "category": [to_traces("Traces of these errors in Jaeger", {"glassbus.error.category": CELL})],
            "destination": [to_board_of("glassbus-errors", "destination", CELL)],
        },
        w=16,
        h=9,
    ),
    p.bars(
        "Attempts that fail, by subscription",
        "Share of each subscription's attempts that fail now. Good: under 5 %. If not: its handler, or what it calls.",
        {
            "{{bus}}/{{subscription}}": q.share(
                q.count("process_duration_seconds", by="bus subscription", outcome="failed"),
                q.count("process_duration_seconds", by="bus subscription"),
            )
        },
        look.SHARE,
        Levels(0.05, 0.5),
        top=1.0,
        links=[to_traces("Its failures in Jaeger", {"glassbus.subscription": of("subscription")})],
        runbook=runbook("GlassbusRetryStorm"),
        h=9,
    ),
)

_RECOVERY = (
    p.row("Recovery"),
    p.graph(
        "Recoveries ended",
        "Recoveries a second, by how they ended; each counts once, when the attempt it led to ends. Good: all "
        "succeeded. If not: failed ones are tried again until the attempts are used up.",
        {"{{outcome}}": q.rate("recovery_attempts_total", by="outcome")},
        look.PER_SECOND,
        stacked=True,
        colours=look.OUTCOMES,
        runbook=runbook("GlassbusRecoveryIneffective"),
    ),
    p.graph(
        "Share that work, by action",
        "Of each kind of recovery, the share that worked. Good: near 100 %. If not: that action does not help against "
        "this failure.",
        {"{{action}}": _recovered(by="action")},
        look.SHARE,
        top=1.0,
        links=[to_traces("These recoveries in Jaeger", {"glassbus.recovery.action": of("action")})],
        runbook=runbook("GlassbusRecoveryIneffective"),
    ),
    p.graph(
        "What is done",
        "Recoveries a second, by action: retries of deliveries, and what the bus does for its own parts (reconnect, "
        "shed, reload …). Good: mostly immediate retries. If not: delayed ones mean that faults last.",
        {"{{action}}": f"{q.rate('recovery_attempts_total', by='action')} > 0"},
        look.PER_SECOND,
        stacked=True,
        links=[to_traces("These recoveries in Jaeger", {"glassbus.recovery.action": of("action")})],
        runbook=runbook("GlassbusComponentFailing"),
    ),
    p.graph(
        "Time to recover",
        f"From the first failure to the end of the attempt that a recovery led to. Good: p95 under {RECOVERY_S:g} s. "
        "If not: the fault lasts longer than the backoff.",
        {f"p{n}": q.quantile(n / 100, "recovery_duration_seconds") for n in (50, 95, 99)},
        look.SECONDS,
        colours=look.QUANTILES,
        line=RECOVERY_S,
        log=True,
    ),
    p.heatmap(
        "Spread of that time",
        "How many recoveries a second took how long. Good: all low down. If not: cells high up are messages "
        "that waited through an outage.",
        q.buckets("recovery_duration_seconds"),
        look.SECONDS,
        w=8,
    ),
    p.graph(
        "Cost of handling an error",
        f"From catching an exception to having stored the decision. Promised: p99 under {HANDLING_S * 1e3:g} ms. Good: "
        "under 1 ms. If not: the store is slow, or an observer is.",
        {f"p{n}": q.quantile(n / 100, "error_handling_seconds") for n in (50, 95, 99)},
        look.SECONDS,
        colours=look.QUANTILES,
        line=HANDLING_S,
        log=True,
        runbook=runbook("GlassbusErrorHandlingSlow"),
    ),
)

_PEOPLE = (
    p.row("People told"),
    p.graph(
        "Notifications",
        "Notifications a second, by channel and outcome. Good: few, all sent. If not: a failed one is tried again, but "
        "the channel is broken; suppressed ones were over its rate limit.",
        {"{{channel}} {{outcome}}": q.rate("escalations_total", by="channel outcome")},
        look.PER_SECOND,
        bars=True,
        stacked=True,
        colours={"/ sent$/": look.CALM, "/ failed$/": look.BAD, "/ suppressed$/": look.QUIET},
        runbook=runbook("GlassbusEscalationsUndelivered"),
        w=12,
    ),
    p.graph(
        "Open escalations",
        "Failures that people were told of and that are not resolved, by severity. Good: 0. If not: `glassbus "
        "escalations list`; acknowledge what you work on.",
        {"{{severity}}": f"sum by (severity) ({q.now('escalations_open', by='severity')})"},
        look.COUNT,
        stacked=True,
        colours=look.SEVERITIES,
        runbook=runbook("GlassbusEscalationsOpen"),
        w=12,
    ),
)

BOARD = Board(
    "glassbus-errors",
    "What fails, whether it gets worse, and whether recovery works. Choose a destination to drill down to it.",
    (*_TILES, *_ERRORS, *_RECOVERY, *_PEOPLE),
    marks=("Breakers that opened", "Starts and deploys"),
)
