"""What waits, who works on it, what holds publishers up, and what nobody could handle."""

from __future__ import annotations

from dashboards import look
from dashboards import panels as p
from dashboards import promql as q
from dashboards.frame import CELL, Board, of, runbook, to_board, to_board_of, to_traces
from dashboards.look import Levels
from dashboards.panels import Column
from dashboards.slo import DEADLINE_S

_SUB = "bus subscription"
_NAME = "{{bus}}/{{subscription}}"
_PENDING = ("ready", "scheduled", "retrying")
_FULL = q.share(
    f"sum by (bus, subscription) ({q.now('queue_messages', by='subscription state', state=_PENDING)})",
    q.now("queue_capacity_messages", by="subscription"),
)
_BUSY = q.share(q.each("handlers_in_flight", by="subscription"), q.each("handlers_limit", by="subscription"))
_OLDEST = q.now("queue_oldest_message_age_seconds", by="subscription")
_BURIED = f"topk(10, {q.grown('dead_letters_total', by='bus subscription category')} >= 1)"
_AGE = Levels(DEADLINE_S, 5 * DEADLINE_S)
_ITS_TRACES = to_traces("Its failures in Jaeger", {"glassbus.subscription": of("subscription")})

_TILES = (
    p.tile(
        "Waiting",
        "Deliveries that could start now and have not. Good: falls back to about 0. If not: compare what comes in with "
        "what is handled, below.",
        f"sum({q.now('queue_messages', by='subscription', state='ready')})",
    ),
    p.tile(
        "Oldest waiting",
        f"How long the one that waits longest has waited. Good: under {DEADLINE_S:g} s. If not: its subscription is "
        "slow, held, or has no consumer.",
        f"max({_OLDEST})",
        look.SECONDS,
        _AGE,
        runbook=runbook("GlassbusMessageStale"),
    ),
    p.tile(
        "Fullest queue",
        "How full the fullest queue is. Good: under 80 %. If not: a full queue slows its publishers down, then refuses "
        "them: add consumers, or find out why they are slow.",
        f"max({_FULL})",
        look.SHARE,
        Levels(0.8, 0.95),
        none="no queue",
        decimals=0,
        runbook=runbook("GlassbusQueueNearFull"),
    ),
    p.tile(
        "Handlers overdue",
        "Attempts that run past their timeout and cannot be stopped. Good: 0. If not: they keep their slots; look at "
        "what they wait for, in their threads.",
        f"sum({q.each('handlers_overdue', by='subscription')})",
        levels=Levels(caution=1),
        runbook=runbook("GlassbusHandlersOverdue"),
    ),
    p.tile(
        "Without consumer",
        "Subscriptions that no process consumes. Good: 0. If not: their messages pile up: start the service, or "
        "`glassbus` forgets the subscription when it is no longer wanted.",
        f"count({q.now('subscription_consumers', by='subscription')} == 0) or vector(0)",
        levels=Levels(bad=1),
        runbook=runbook("GlassbusSubscriptionUnconsumed"),
    ),
    p.tile(
        "Dead letters",
        "Deliveries at rest in the dead-letter queue. Good: 0. If not: `glassbus dlq list` shows them with their "
        "errors; replay or discard them.",
        f"sum({q.now('dead_letter_messages', by='subscription')})",
        levels=Levels(caution=1),
        runbook=runbook("GlassbusDeadLettersOld"),
    ),
)

_QUEUES = (
    p.row("Queues"),
    p.graph(
        "Waiting, by subscription",
        "Deliveries that could start now. Good: near 0, or falling. If not: a line that only climbs is a subscription "
        "that handles less than it gets.",
        {_NAME: q.now("queue_messages", by="subscription", state="ready")},
        look.COUNT,
        runbook=runbook("GlassbusConsumerStalled"),
    ),
    p.graph(
        "In queues, by what they wait for",
        "Deliveries by state. Good: few besides in_flight. If not: many retrying are failures that wait for their next "
        "attempt, scheduled ones are not due yet.",
        {"{{state}}": f"sum by (state) ({q.now('queue_messages', by='subscription state')})"},
        look.COUNT,
        stacked=True,
        colours={"in_flight": look.GOOD, "ready": look.CALM, "retrying": look.CAUTION, "scheduled": look.QUIET},
    ),
    p.graph(
        "Age of the oldest waiting",
        f"Good: under {DEADLINE_S:g} s. If not: a line that climbs at one second a second is a subscription where "
        "nothing starts at all.",
        {_NAME: _OLDEST},
        look.SECONDS,
        line=DEADLINE_S,
        runbook=runbook("GlassbusMessageStale"),
    ),
    p.graph(
        "In and out",
        "Messages accepted, and deliveries handled: each message has one delivery for each subscription it matches. "
        "Good: both move together. If not: handled below its usual multiple of accepted means that queues grow.",
        {
            "accepted": q.rate("messages_published_total", outcome="accepted"),
            "handled": q.rate("messages_settled_total", result="handled"),
        },
        look.PER_SECOND,
        colours={"accepted": look.CALM, "handled": look.GOOD},
        runbook=runbook("GlassbusConsumerStalled"),
    ),
    p.bars(
        "How full",
        "Share of each queue's capacity that is taken. Good: under 80 %. If not: publishers will be slowed down, then "
        "refused.",
        {_NAME: _FULL},
        look.SHARE,
        Levels(0.8, 0.95),
        top=1.0,
        runbook=runbook("GlassbusQueueNearFull"),
    ),
    p.graph(
        "Publishers held up",
        "Seconds a second that publishers wait for room. Good: 0. If not: backpressure works, and callers feel it: see "
        "which queue is full.",
        {_NAME: q.rate("backpressure_seconds_total", by=_SUB)},
        look.SECONDS_EACH,
        runbook=runbook("GlassbusQueueOverflow"),
    ),
)

_HANDLERS = (
    p.row("Handlers"),
    p.bars(
        "How busy",
        "Share of the slots of each subscription that are taken, over all processes. Good: under 80 %. If not: it is "
        "as fast as it can be: raise `concurrency`, add processes, or make the handler faster.",
        {_NAME: _BUSY},
        look.SHARE,
        Levels(0.8, 0.95),
        top=1.0,
        runbook=runbook("GlassbusHandlersLost"),
    ),
    p.graph(
        "Attempts",
        "Attempts a second, by how they ended. Good: nearly all succeeded. If not: late ones returned after their "
        "timeout, failed ones are retried.",
        {"{{outcome}}": q.count("process_duration_seconds", by="outcome")},
        look.PER_SECOND,
        stacked=True,
        colours=look.OUTCOMES,
        links=[to_board("glassbus-errors")],
        runbook=runbook("GlassbusRetryStorm"),
    ),
    p.graph(
        "Time of an attempt, p99",
        "Good: well below the timeout in the table. If not: what the handler calls is slow: open a trace.",
        {_NAME: q.quantile(0.99, "process_duration_seconds", by=_SUB)},
        look.SECONDS,
        log=True,
        links=[_ITS_TRACES],
        runbook=runbook("GlassbusHandlerSlow"),
    ),
    p.table(
        "Subscriptions",
        "One line for each. Good: no coloured cell. If not: overdue attempts cannot be stopped; a lower limit than "
        "declared means that load is shed or slots are lost.",
        {
            "waiting": Column(q.now("queue_messages", by="subscription", state="ready"), look.COUNT),
            "oldest": Column(_OLDEST, look.SECONDS, _AGE),
            "full": Column(_FULL, look.SHARE, Levels(0.8, 0.95)),
            "capacity": Column(q.now("queue_capacity_messages", by="subscription"), look.COUNT),
            "consumers": Column(
                q.now("subscription_consumers", by="subscription"), look.COUNT, Levels(caution=1, bad=1, low=True)
            ),
            "running": Column(q.each("handlers_in_flight", by="subscription"), look.COUNT),
            "limit": Column(q.each("handlers_limit", by="subscription"), look.COUNT),
            "overdue": Column(q.each("handlers_overdue", by="subscription"), look.COUNT, Levels(caution=1)),
            "timeout": Column(q.now("handler_timeout_seconds", by="subscription"), look.SECONDS),
            "dead letters": Column(q.now("dead_letter_messages", by="subscription"), look.COUNT, Levels(caution=1)),
        },
        first=("bus", "subscription"),
        links={"subscription": [to_board_of("glassbus-queues", "subscription", CELL)]},
        h=8,
    ),
)

_LOST_OWNERS = (
    p.graph(
        "Given out again",
        "Deliveries a second that are given to another process because theirs died or let its lease run out. Good: 0. "
        "If not: processes are killed, or stand still for longer than a lease.",
        {"{{reason}}": q.rate("redeliveries_total", by="reason")},
        look.PER_SECOND,
        bars=True,
        stacked=True,
        colours={"owner_died": look.BAD, "lease_expired": look.CAUTION},
        runbook=runbook("GlassbusOwnersDying"),
        w=12,
    ),
    p.graph(
        "What was done about full queues",
        "Actions a second on the overflow ladder. Good: none. If not: expand and contract are harmless; dead_letter "
        "and refuse mean that it did not suffice.",
        {"{{action}}": q.rate("overflow_actions_total", by="action")},
        look.PER_SECOND,
        bars=True,
        stacked=True,
        colours={"expand": look.CALM, "contract": look.QUIET, "dead_letter": look.CAUTION, "refuse": look.BAD},
        runbook=runbook("GlassbusQueueOverflow"),
        w=12,
    ),
)

_DEAD = (
    p.row("Dead letters"),
    p.graph(
        "At rest",
        "Dead letters of each subscription. Good: 0. If not: nobody tries them again until they are replayed.",
        {_NAME: q.now("dead_letter_messages", by="subscription")},
        look.COUNT,
        links=[_ITS_TRACES],
        runbook=runbook("GlassbusDeadLettersOld"),
    ),
    p.graph(
        "Age of the oldest",
        "How long the oldest dead letter has rested. Good: 0, or under a working day. If not: somebody has to decide: "
        "replay or discard.",
        {_NAME: q.now("dead_letter_oldest_age_seconds", by="subscription")},
        look.SECONDS,
        runbook=runbook("GlassbusDeadLettersOld"),
    ),
    p.graph(
        "Coming in",
        "Dead letters a second, by the category of their last error. Good: none. If not: many of one category have one "
        "cause: mend it, then replay all of it.",
        {"{{category}}": q.rate("dead_letters_total", by="category")},
        look.PER_SECOND,
        bars=True,
        stacked=True,
        colours=look.CATEGORIES,
        links=[to_traces("Traces of these errors in Jaeger", {"glassbus.error.category": of("category")})],
        runbook=runbook("GlassbusDeadLettersAppearing"),
    ),
    p.table(
        "Dead letters of the range shown",
        "Where they came from and why, the ten most frequent. Good: an empty table. If not: click for traces, then "
        "`glassbus dlq list --subscription NAME`.",
        {"dead letters": Column(q.otherwise(_BURIED, "category", "none"), look.COUNT)},
        first=("bus", "subscription", "category"),
        links={
            "subscription": [to_board_of("glassbus-queues", "subscription", CELL)],
            "category": [to_traces("Traces of these errors in Jaeger", {"glassbus.error.category": CELL})],
        },
        runbook=runbook("GlassbusDeadLettersAppearing"),
        h=8,
    ),
)

BOARD = Board(
    "glassbus-queues",
    "What waits and for how long, who works on it, and what nobody could handle. Choose a subscription to drill down.",
    (*_TILES, *_QUEUES, *_HANDLERS, *_LOST_OWNERS, *_DEAD),
    marks=("Breakers that opened", "Starts and deploys"),
)
