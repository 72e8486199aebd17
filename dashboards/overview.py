"""Are we OK? And where not, which board to open."""

from __future__ import annotations

from dashboards import look
from dashboards import panels as p
from dashboards import promql as q
from dashboards.frame import CELL, OURS, RUNBOOK_OF_CELL, Board, of, runbook, to_board, to_board_of, to_traces
from dashboards.look import Levels
from dashboards.panels import Column
from dashboards.slo import BUDGET, DEADLINE_S, LATE, OBJECTIVE
from dashboards.states import HEALTH, breakers_not_closed, health, subscriptions_held

_ALERT = "severity, alertname, bus, subscription, breaker"
_FIRING = q.foreign("ALERTS", alertname=OURS, alertstate="firing")
_SINCE = q.foreign("ALERTS_FOR_STATE", alertname=OURS)
_FIRING_FOR = f"(time() - min by ({_ALERT}) ({_SINCE}) and max by ({_ALERT}) ({_FIRING}))"
_IN_TIME = q.share(q.under(DEADLINE_S, "message_age_seconds", result="handled"), q.grown("messages_settled_total"))
_SUB = "bus subscription"

_TILES = (
    p.tile(
        "Health",
        "The worst health that a bus tells of itself, from what it handled, its breakers and its store. Good: healthy. "
        "If not: the coloured tiles beside it say where; `glassbus health` lists every check.",
        health(),
        states=look.quiet(HEALTH),
        none="no bus",
        runbook=runbook("GlassbusHealthCritical"),
    ),
    p.tile(
        "Alerts firing",
        "Alerts of ours that fire now, those for information apart. Good: 0. If not: the table below names them, each "
        "with its runbook.",
        f"count({q.foreign('ALERTS', alertname=OURS, alertstate='firing', severity=q.Other('info'))}) or vector(0)",
        levels=Levels(bad=1),
    ),
    p.tile(
        "Handled in time",
        f"Share of the deliveries ended in the range shown that were handled within {DEADLINE_S:g} s of their publish. "
        f"Good: at least {OBJECTIVE:.1%}. If not: see below which subscription it is, then its errors and its queue.",
        _IN_TIME,
        look.SHARE,
        Levels(OBJECTIVE, 0.99, low=True),
        none="no traffic",
        decimals=2,
        links=[to_board("glassbus-errors")],
        runbook=runbook("GlassbusErrorBudgetBurn"),
    ),
    p.tile(
        "Error budget left",
        f"What is left of the {BUDGET:.1%} that may miss, were the range shown the whole period. Good: above 25 %; "
        "below 0 % the objective is missed. If not: stop risky changes, and mend what the burn rate below points at.",
        f"1 - (1 - {_IN_TIME}) / {BUDGET:g}",
        look.SHARE,
        Levels(0.25, 0.0, low=True),
        none="no traffic",
        decimals=0,
        runbook=runbook("GlassbusErrorBudgetBurn"),
    ),
    p.tile(
        "Unaccounted for",
        "Deliveries that are in no place of the ledger, or in two. Good: 0, always. If not: messages are lost or the "
        "store is damaged. Keep its files, run `glassbus audit`, open the runbook.",
        f"sum({q.now('messages_unaccounted')})",
        levels=Levels(bad=1),
        runbook=runbook("GlassbusMessagesUnaccounted"),
    ),
    p.tile(
        "Processes not scraped",
        "Targets of the chosen jobs that Prometheus cannot scrape. Good: 0. If not: the process is down or cannot be "
        "reached, and everything else here is blind to it.",
        f"count({q.foreign('up', job=q.Like('$job'))} == 0) or vector(0)",
        levels=Levels(bad=1),
        links=[to_board("glassbus-telemetry")],
        runbook=runbook("GlassbusTargetDown"),
    ),
    p.tile(
        "Breakers not closed",
        "Circuit breakers that are open, forced open or trying. Good: 0. If not: what they guard fails; a subscription "
        "keeps its messages meanwhile. The board Breakers & connections says which, since when and why.",
        breakers_not_closed(),
        levels=Levels(bad=1),
        links=[to_board("glassbus-breakers")],
        runbook=runbook("GlassbusBreakerStuckOpen"),
    ),
    p.tile(
        "Subscriptions held",
        "Subscriptions that are paused or held by their breaker. Good: 0. If not: their messages wait and are kept; "
        "`glassbus health` says who paused them, the board Breakers & connections what their breaker saw.",
        subscriptions_held(),
        levels=Levels(caution=1),
        links=[to_board("glassbus-breakers")],
        runbook=runbook("GlassbusSubscriptionHeld"),
    ),
    p.tile(
        "Connections down",
        "Stores and brokers that do not answer. Good: 0. If not: publishes are spooled or refused; the bus reconnects "
        "by itself. Look at the broker and the network between.",
        f"count({q.select('connection_up')} == 0) or vector(0)",
        levels=Levels(bad=1),
        links=[to_board("glassbus-breakers")],
        runbook=runbook("GlassbusConnectionDown"),
    ),
    p.tile(
        "Oldest waiting",
        f"How long the message has waited that waits longest. Good: under {DEADLINE_S:g} s. If not: a handler is too "
        "slow, held or gone: see Queues & dead letters.",
        f"max({q.now('queue_oldest_message_age_seconds')})",
        look.SECONDS,
        Levels(DEADLINE_S, 5 * DEADLINE_S),
        links=[to_board("glassbus-queues")],
        runbook=runbook("GlassbusMessageStale"),
    ),
    p.tile(
        "Dead letters",
        "Deliveries that rest in the dead-letter queue. Good: 0. If not: nobody will try them again until they are "
        "replayed or discarded: `glassbus dlq list` shows them with their errors.",
        f"sum({q.now('dead_letter_messages', by='subscription')})",
        levels=Levels(caution=1),
        links=[to_board("glassbus-queues")],
        runbook=runbook("GlassbusDeadLettersOld"),
    ),
    p.tile(
        "Open escalations",
        "Failures that people were told of and that are not resolved. Good: 0. If not: `glassbus escalations list` "
        "shows them; acknowledge what you work on.",
        f"sum({q.now('escalations_open', by='severity')})",
        levels=Levels(caution=1),
        links=[to_board("glassbus-errors")],
        runbook=runbook("GlassbusEscalationsOpen"),
    ),
)

_NOW = (
    p.row("What is wrong"),
    p.table(
        "Alerts firing now",
        "Each alert of ours that fires, and for how long it has been so. Good: one line that says none. If not: click "
        "its name for the runbook.",
        {"for": Column(q.otherwise(_FIRING_FOR, "alertname", "none fires"), look.SECONDS)},
        first=("severity", "alertname", "bus", "subscription", "breaker"),
        links={"alertname": [RUNBOOK_OF_CELL]},
        widths={"severity": 80, "alertname": 250, "bus": 80, "subscription": 105, "breaker": 90, "for": 80},
        colours=look.ALERTS,
        w=12,
        h=8,
    ),
    p.timeline(
        "Health of each process",
        "What each process says of its bus, over time. Good: green throughout. If not: the graphs below at the same "
        "time show what changed.",
        {"{{bus}} at {{instance}}": health("bus instance")},
        HEALTH,
        runbook=runbook("GlassbusHealthCritical"),
        h=8,
    ),
)

_TRAFFIC = (
    p.row("Traffic and objective"),
    p.graph(
        "Published",
        "Publishes, by what became of them. Good: nearly all accepted; spooled while a broker is away. If not: "
        "rejected and uncertain ones reached the caller as an error: look at the store, its disk and its queues.",
        {"{{outcome}}": q.rate("messages_published_total", by="outcome")},
        look.PER_SECOND,
        stacked=True,
        colours=look.PUBLISHED,
        runbook=runbook("GlassbusPublishesRefused"),
    ),
    p.graph(
        "Settled",
        "Deliveries that came to their end, by how. Good: as many as are published, all handled. If not: dead-lettered "
        "and discarded ones need somebody, expired ones came too late.",
        {"{{result}}": q.rate("messages_settled_total", by="result")},
        look.PER_SECOND,
        stacked=True,
        colours=look.SETTLED,
        links=[to_board("glassbus-queues")],
        runbook=runbook("GlassbusDeadLettersAppearing"),
    ),
    p.graph(
        "Burn rate of the error budget",
        "How many times faster than 30 days allow the budget is used, by the worst subscription. Good: below 1. "
        "14.4 over an hour uses 2 % of a month and pages. If not: find the subscription in the table below.",
        {f"over {w}": f"max({q.recorded(LATE.format(window=w))}) / {BUDGET:g}" for w in ("5m", "1h", "6h")},
        look.TIMES,
        colours=look.WINDOWS,
        line=14.4,
        runbook=runbook("GlassbusErrorBudgetBurn"),
    ),
)

_LATENCY = (
    p.row("Latency"),
    p.graph(
        "From publish to end",
        "Time from publish to the end of the delivery, waiting and retries included. Good: "
        f"p99 under {DEADLINE_S:g} s. If not: high p99 with a low p50 is retries; both high is a queue that grows.",
        {f"p{n}": q.quantile(n / 100, "message_age_seconds") for n in (50, 95, 99)},
        look.SECONDS,
        colours=look.QUANTILES,
        line=DEADLINE_S,
        log=True,
        runbook=runbook("GlassbusMessageStale"),
    ),
    p.heatmap(
        "Time of attempts",
        "How many attempts a second took how long. Good: one strong band for each kind of handler. If not: a band that "
        "moves up is something they call that got slower; the dots are traces to open.",
        q.buckets("process_duration_seconds"),
        look.SECONDS,
        w=8,
    ),
    p.graph(
        "Handlers, p99 of an attempt",
        "Time that one attempt takes. Good: well below the subscription's timeout. If not: what the handler calls is "
        "slow: open a trace.",
        {"{{bus}}/{{subscription}}": q.quantile(0.99, "process_duration_seconds", by=_SUB)},
        look.SECONDS,
        log=True,
        links=[
            to_traces(
                "Slow attempts in Jaeger", {"messaging.consumer.group.name": of("subscription")}, slower_than="1s"
            )
        ],
        runbook=runbook("GlassbusHandlerSlow"),
    ),
)

_EACH = (
    p.row("Subscriptions"),
    p.table(
        "Subscriptions, the most failing first",
        "One line for each. Good: no coloured cell. If not: click the subscription to see its queue and dead letters.",
        {
            "attempts failing": Column(
                q.share(
                    q.count("process_duration_seconds", by=_SUB, outcome="failed"),
                    q.count("process_duration_seconds", by=_SUB),
                ),
                look.SHARE,
                Levels(0.05, 0.5),
            ),
            "handled": Column(q.rate("messages_settled_total", by=_SUB, result="handled"), look.PER_SECOND),
            "p99 of an attempt": Column(q.quantile(0.99, "process_duration_seconds", by=_SUB), look.SECONDS),
            "waiting": Column(q.now("queue_messages", by="subscription", state="ready"), look.COUNT),
            "oldest": Column(
                q.now("queue_oldest_message_age_seconds", by="subscription"),
                look.SECONDS,
                Levels(DEADLINE_S, 5 * DEADLINE_S),
            ),
            "running": Column(q.each("handlers_in_flight", by="subscription"), look.COUNT),
            "consumers": Column(
                q.now("subscription_consumers", by="subscription"), look.COUNT, Levels(caution=1, bad=1, low=True)
            ),
            "dead letters": Column(q.now("dead_letter_messages", by="subscription"), look.COUNT, Levels(caution=1)),
        },
        first=("bus", "subscription"),
        links={"subscription": [to_board_of("glassbus-queues", "subscription", CELL)]},
    ),
)

BOARD = Board(
    "glassbus-overview",
    "Are we OK? A tile without colour is well; a coloured one leads to the board that shows more.",
    (*_TILES, *_NOW, *_TRAFFIC, *_LATENCY, *_EACH),
    marks=("Alerts", "Starts and deploys"),
)
