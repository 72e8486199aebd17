"""Which fault makes which alert: one line for every rule that ships, held to that by a test.

A rule's fault is the one that its runbook reproduces. Where a drill is not of a fault injected into a bus (a
store that no longer adds up, a clock that is ahead, a measure that is faked), its class in `scenes/` says so.
"""

from __future__ import annotations

from glassbus.drill import collectors, outside
from glassbus.drill.play import Play
from glassbus.drill.scenes import handlers, queues, stores, telemetry
from glassbus.drill.scenes.base import Scene

_ALL = (
    # The objective
    Play(
        name="burning",
        fault="one message in four fails for good",
        alerts=("GlassbusErrorBudgetBurn/1h", "GlassbusErrorBudgetBurn/6h"),
        scene=handlers.Burning,
    ),
    Play(
        name="burning-slowly",
        fault="one message in 250 fails for good",
        alerts=("GlassbusErrorBudgetBurn/1d",),
        scene=handlers.BurningSlowly,
    ),
    Play(
        name="burning-least",
        fault="one message in 500 fails for good",
        alerts=("GlassbusErrorBudgetBurn/3d",),
        scene=handlers.BurningLeast,
    ),
    # Messages and queues
    Play(
        name="unbalanced",
        fault="the store says that it accepted a delivery that is nowhere",
        alerts=("GlassbusMessagesUnaccounted",),
        scene=stores.Unbalanced,
    ),
    Play(
        name="stalled",
        fault="the store hands out no message, and answers everything else",
        alerts=("GlassbusConsumerStalled/warning",),
        scene=handlers.Stalled,
    ),
    Play(
        name="stalled-for-long",
        fault="the store hands out no message, and answers everything else, for long",
        alerts=("GlassbusConsumerStalled/critical",),
        scene=handlers.Stalled,
    ),
    Play(
        name="unconsumed",
        fault="the one process that consumes ends, another goes on publishing",
        alerts=("GlassbusSubscriptionUnconsumed/warning",),
        scene=handlers.Unconsumed,
    ),
    Play(
        name="unconsumed-for-long",
        fault="the one process that consumes ends, another goes on publishing, for long",
        alerts=("GlassbusSubscriptionUnconsumed/critical",),
        scene=handlers.Unconsumed,
    ),
    Play(
        name="stale",
        fault="messages wait while the clock goes 10 minutes ahead",
        alerts=("GlassbusMessageStale/warning",),
        scene=queues.Stale,
    ),
    Play(
        name="very-stale",
        fault="messages wait while the clock goes an hour ahead",
        alerts=("GlassbusMessageStale/critical",),
        scene=queues.VeryStale,
    ),
    Play(
        name="nearly-full",
        fault="a paused subscription's queue fills up to 85 %",
        alerts=("GlassbusQueueNearFull/warning",),
        scene=queues.NearlyFull,
    ),
    Play(
        name="almost-full",
        fault="a paused subscription's queue fills up to 97 %",
        alerts=("GlassbusQueueNearFull/critical",),
        scene=queues.AlmostFull,
    ),
    Play(
        name="filling-up",
        fault="a paused subscription's queue grows steadily",
        alerts=("GlassbusQueueFillingUp",),
        scene=queues.FillingUp,
    ),
    Play(
        name="overflowing",
        fault="a full queue refuses what is published",
        alerts=("GlassbusQueueOverflow",),
        scene=queues.Overflowing,
    ),
    Play(
        name="some-refused",
        fault="the store refuses one publish in 40",
        alerts=("GlassbusPublishesRefused/warning",),
        scene=queues.SomeRefused,
    ),
    Play(
        name="refusing",
        fault="the store refuses every publish, and nobody ends it",
        alerts=("GlassbusPublishesRefused/critical", "GlassbusCriticalUnresolved"),
        scene=queues.Refusing,
    ),
    Play(
        name="some-dead-letters",
        fault="two messages of many end as dead letters",
        alerts=("GlassbusDeadLettersAppearing/info",),
        scene=handlers.SomeDeadLetters,
    ),
    Play(
        name="dead-letters",
        fault="one message in four ends as a dead letter",
        alerts=("GlassbusDeadLettersAppearing/warning",),
        scene=handlers.Burning,
    ),
    Play(
        name="old-dead-letters",
        fault="a dead letter rests while the clock goes 5 hours ahead",
        alerts=("GlassbusDeadLettersOld/info",),
        scene=queues.OldDeadLetters,
    ),
    Play(
        name="very-old-dead-letters",
        fault="a dead letter rests while the clock goes 30 hours ahead",
        alerts=("GlassbusDeadLettersOld/warning",),
        scene=queues.VeryOldDeadLetters,
    ),
    # Handlers
    Play(
        name="overdue",
        fault="one handler of four hangs and ignores its cancellation",
        alerts=("GlassbusHandlersOverdue/warning",),
        scene=handlers.Overdue,
    ),
    Play(
        name="all-overdue",
        fault="every handler hangs and ignores its cancellation",
        alerts=("GlassbusHandlersOverdue/critical",),
        scene=handlers.AllOverdue,
    ),
    Play(
        name="lost",
        fault="the one handler hangs until its slot is given up",
        alerts=("GlassbusHandlersLost", "GlassbusHealthCritical/critical"),
        scene=handlers.Lost,
    ),
    Play(
        name="slow",
        fault="every handler takes 4.4 s of the 5 s that it has",
        alerts=("GlassbusHandlerSlow",),
        scene=handlers.Slow,
    ),
    Play(
        name="timed-out",
        fault="every second call of a handler never comes back",
        alerts=("GlassbusTimeoutStretched",),
        scene=handlers.TimedOut,
    ),
    Play(
        name="refused",
        fault="what a handler depends on refuses every connection, and no kill switch stops it",
        alerts=("GlassbusRetryStorm", "GlassbusRecoveryIneffective"),
        scene=handlers.Refused,
    ),
    Play(
        name="owners-dying",
        fault="a second process is killed in the middle of a message, again and again",
        alerts=("GlassbusOwnersDying",),
        scene=handlers.OwnersDying,
    ),
    Play(
        name="paused",
        fault="somebody paused a subscription and forgot",
        alerts=("GlassbusPauseForgotten", "GlassbusHealthCritical/warning"),
        scene=handlers.Paused,
    ),
    # Breakers and connections
    Play(
        name="held",
        fault="what a handler depends on refuses every connection: its kill switch opens",
        alerts=("GlassbusSubscriptionHeld/warning",),
        scene=handlers.Held,
    ),
    Play(
        name="held-for-long",
        fault="what a handler depends on refuses every connection: its kill switch opens, for long",
        alerts=("GlassbusSubscriptionHeld/critical",),
        scene=handlers.Held,
    ),
    Play(
        name="flapping",
        fault="what a handler depends on comes and goes: its kill switch opens each time",
        alerts=("GlassbusBreakerFlapping",),
        scene=handlers.Flapping,
    ),
    Play(
        name="down",
        fault="the store takes and gives nothing",
        alerts=("GlassbusConnectionDown/warning",),
        scene=stores.Down,
    ),
    Play(
        name="down-for-long",
        fault="the store takes and gives nothing, for long",
        alerts=("GlassbusConnectionDown/critical",),
        scene=stores.Down,
    ),
    Play(
        name="flickering",
        fault="the store is lost and found again, every second or so",
        alerts=("GlassbusConnectionFlapping", "GlassbusComponentFailing"),
        scene=stores.Flickering,
    ),
    Play(
        name="silent",
        fault="the store answers nothing and refuses nothing",
        alerts=("GlassbusStoreSilent",),
        scene=stores.Silent,
    ),
    Play(
        name="broker-lost",
        fault="the broker's connection is lost, and refused",
        alerts=("GlassbusSpoolFilling/warning", "GlassbusBreakerStuckOpen/warning"),
        scene=stores.OnBroker,
        site="broker",
        needs=("nats-server",),
    ),
    Play(
        name="broker-lost-for-long",
        fault="the broker's connection is lost, and refused, for long",
        alerts=("GlassbusBreakerStuckOpen/critical",),
        scene=stores.OnBroker,
        site="broker",
        needs=("nats-server",),
    ),
    Play(
        name="spool-full",
        fault="the broker's connection is lost, and 50,500 messages wait for it",
        alerts=("GlassbusSpoolFilling/critical",),
        scene=stores.SpoolFull,
        site="broker",
        heavy=True,
        needs=("nats-server",),
    ),
    Play(
        name="disk-filling",
        fault="512 MiB are free where the store is (the measure is faked)",
        alerts=("GlassbusDiskSpaceLow/warning",),
        scene=stores.DiskFilling,
    ),
    Play(
        name="disk-full",
        fault="no space is free where the store is (the measure is faked)",
        alerts=("GlassbusDiskSpaceLow/critical",),
        scene=stores.DiskIsFull,
    ),
    # The bus itself
    Play(
        name="slowly-classified",
        fault="a classification rule of the program's own takes 30 ms",
        alerts=("GlassbusErrorHandlingSlow",),
        scene=handlers.SlowlyClassified,
    ),
    Play(
        name="many-errors",
        fault="5,000 failures with long texts, of which a journal that is too large forgets none",
        alerts=("GlassbusErrorMemoryHigh/info",),
        scene=telemetry.ManyErrors,
        site="memory",
        heavy=True,
    ),
    Play(
        name="very-many-errors",
        fault="13,000 failures with long texts, of which a journal that is too large forgets none",
        alerts=("GlassbusErrorMemoryHigh/warning",),
        scene=telemetry.VeryManyErrors,
        site="memory",
        heavy=True,
    ),
    Play(
        name="escalated-high",
        fault="a handler keeps failing with what a rule calls high",
        alerts=("GlassbusEscalationsOpen/warning",),
        scene=handlers.High,
    ),
    Play(
        name="escalated-critical",
        fault="a handler keeps failing with what a rule calls critical",
        alerts=("GlassbusEscalationsOpen/critical",),
        scene=handlers.Critical,
    ),
    Play(
        name="untold",
        fault="the channel by which people are told refuses",
        alerts=("GlassbusEscalationsUndelivered",),
        scene=stores.Untold,
    ),
    # Telemetry
    Play(
        name="collector-refuses",
        fault="the collector refuses every batch of spans",
        alerts=("GlassbusSpansDropped/warning", "GlassbusSpanExportFailing"),
        scene=telemetry.CollectorRefuses,
        site="collector-refuses",
    ),
    Play(
        name="collector-refuses-happy",
        fault="the collector refuses every batch of spans, while no message fails",
        alerts=("GlassbusSpansDropped/info",),
        scene=telemetry.CollectorRefusesHappy,
        site="collector-refuses-happy",
    ),
    Play(
        name="collector-hangs",
        fault="the collector takes spans and never answers",
        alerts=("GlassbusSpanQueueFilling",),
        scene=telemetry.CollectorHangs,
        site="collector-hangs",
    ),
    Play(
        name="dropping",
        fault="a handler fails five times a second, of which the journal keeps one",
        alerts=("GlassbusJournalDropping",),
        scene=telemetry.Dropping,
    ),
    Play(
        name="flood",
        fault="5,500 failures at once, all alike, and 300 a second after them",
        alerts=("GlassbusSpansSummarised",),
        scene=telemetry.Flood,
        site="flood",
        heavy=True,
    ),
    Play(
        name="costly",
        fault="the exporter of spans takes 30 ms of processor for each batch",
        alerts=("GlassbusTelemetryCostly",),
        scene=telemetry.Costly,
        site="costly",
    ),
    Play(
        name="many-topics",
        fault="the program makes more subscriptions than a label may have values",
        alerts=("GlassbusSeriesOverflow",),
        scene=telemetry.ManyTopics,
        site="memory",
        heavy=True,
    ),
    Play(
        name="observer-raises",
        fault="an observer of the program's own raises at all that it is shown",
        alerts=("GlassbusObserverFailing",),
        scene=telemetry.ObserverRaises,
    ),
    Play(
        name="unreadable",
        fault="a breaker of the program's own cannot be read",
        alerts=("GlassbusScrapeIncomplete",),
        scene=telemetry.Unreadable,
        marks=({"instance": "unreadable"},),
        site="unreadable",
    ),
    # What watches
    Play(
        name="killed",
        fault="a process is killed, the only one of its bus",
        alerts=("GlassbusTargetDown", "GlassbusBusAbsent"),
        scene=Scene,
        outside=outside.ProcessKilled,
        site="killed",
        marks=({"bus": "killed"}, {"instance": "killed"}),
    ),
    Play(
        name="second-alertmanager",
        fault="one of the Alertmanagers is killed",
        alerts=("GlassbusAlertsUndelivered", "GlassbusPipelineTargetDown"),
        outside=outside.AlertmanagerKilled,
        marks=({"instance": "second-alertmanager"}, {"job": "prometheus"}),
    ),
    Play(
        name="deaf-receiver",
        fault="the receiver of one of the Alertmanagers refuses every notification",
        alerts=("GlassbusNotificationsFailing",),
        outside=outside.ReceiverRefuses,
        marks=({"instance": "deaf-receiver"},),
    ),
    Play(
        name="bad-reload",
        fault="one of the Alertmanagers is given a configuration that it cannot read",
        alerts=("GlassbusConfigReloadFailed",),
        outside=outside.BadReload,
        marks=({"instance": "bad-reload"},),
    ),
    Play(
        name="own-rule",
        fault="a rule of the user's own finds two series where it can take one",
        alerts=("GlassbusRulesFailing",),
        scene=handlers.TwoSubscriptions,
        own_rule='vector(1) * on () glassbus_handlers_limit{bus="own-rule"}',
        marks=({"job": "prometheus"},),
    ),
    # The collector
    Play(
        name="backend-gone",
        fault="Jaeger is gone, and the collector gives up after ten seconds",
        alerts=("GlassbusCollectorLosing",),
        outside=collectors.BackendGone,
        marks=({"instance": "collector-small"},),
        needs=("otelcol",),
    ),
    Play(
        name="too-many-traces",
        fault="600 traces come within the time that the collector waits, which keeps 100",
        alerts=("GlassbusTracesDecidedEarly",),
        outside=collectors.TooManyTraces,
        marks=({"instance": "collector-small"},),
        needs=("otelcol",),
    ),
    Play(
        name="collector-queue",
        fault="Jaeger is gone while 45,000 failure spans come",
        alerts=("GlassbusCollectorQueueFilling",),
        outside=collectors.QueueFills,
        marks=({"instance": "collector-large"},),
        needs=("otelcol",),
        heavy=True,
    ),
    Play(
        name="collector-memory",
        fault="the collector has no memory for more of what comes",
        alerts=("GlassbusCollectorRefusing",),
        outside=collectors.OutOfMemory,
        marks=({"instance": "collector-tight"},),
        needs=("otelcol",),
        heavy=True,
    ),
    # What blinds everything
    Play(
        name="nothing-left",
        fault="every process with a bus is killed",
        alerts=("GlassbusAbsent",),
        scene=Scene,
        outside=outside.EverythingKilled,
        site="nothing-left",
        marks=({},),
        last=True,
    ),
    Play(
        name="silence",
        fault="Prometheus stands still (SIGSTOP): what always comes must stop coming",
        alerts=("Watchdog",),
        outside=outside.PrometheusFrozen,
        marks=({},),
        last=True,
        inverted=True,
    ),
)

PLAYS: dict[str, Play] = {play.name: play for play in _ALL}
#: Which play drills a rule, by the rule's id.
BY_ALERT: dict[str, Play] = {alert: play for play in _ALL for alert in play.alerts}
