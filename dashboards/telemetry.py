"""What seeing costs, whether all that is to be seen leaves, and whether those who watch are well."""

from __future__ import annotations

from dashboards import look
from dashboards import panels as p
from dashboards import promql as q
from dashboards.frame import Board, runbook, to_board
from dashboards.look import Levels
from dashboards.panels import Column

#: What error handling may take of memory, and telemetry of the processor.
MEMORY_BYTES, CPU_SHARE = 50e6, 0.05

_JOB = q.Like("$job")
_PROCESS = {"job": _JOB, "instance": q.Like("$instance")}
_PROCESSES = f"count({q.select('build_info')})"
_FILL = q.share(q.each("telemetry_queue_spans", by="queue"), q.each("telemetry_queue_capacity_spans", by="queue"))


def _of(name: str) -> str:
    """How many a second of another program's counter; 0 before it first counts."""
    return f"sum(rate({q.foreign(name)}[{q.RATE}])) or vector(0)"


_TILES = (
    p.tile(
        "Cost of telemetry",
        "Time spent on showing facts, on scrapes and on exporting spans, in the process where it is most, as a share "
        "of one processor. Promised: under 5 %. Good: under 2 %. If not: sample less, or scrape less often. It is "
        "measured by the clock, so on a machine that is short of processors it reads too high.",
        f"max({q.rate('telemetry_seconds_total', by='bus job instance')})",
        look.SHARE,
        Levels(CPU_SHARE / 2, CPU_SHARE),
        none="not known",
        runbook=runbook("GlassbusTelemetryCostly"),
    ),
    p.tile(
        "Memory of error records",
        "What records of errors take, of the process with most. Promised: under 50 MB. Good: flat, under 20 MB. If "
        "not: tell us: it is bounded by design.",
        f"max({q.select('error_memory_bytes')})",
        look.BYTES,
        Levels(0.4 * MEMORY_BYTES, MEMORY_BYTES),
        runbook=runbook("GlassbusErrorMemoryHigh"),
    ),
    p.tile(
        "Spans lost in the range",
        "Spans that were made and not exported. Good: 0. If not: the collector is down, slow or too small; the reasons "
        "are below. Messages do not notice.",
        f"{q.grown('telemetry_spans_dropped_total')} or vector(0)",
        levels=Levels(caution=1, bad=100),
        decimals=0,
        runbook=runbook("GlassbusSpansDropped"),
    ),
    p.tile(
        "Fullest span queue",
        "How full the fuller of the two export queues is. Good: under 50 %. If not: spans are made faster than the "
        "collector takes them, and soon the happy ones are dropped.",
        f"max({_FILL})",
        look.SHARE,
        Levels(0.5, 0.8),
        none="no exporter",
        runbook=runbook("GlassbusSpanQueueFilling"),
    ),
    p.tile(
        "Label values over the cap",
        "Times in the range that a destination was over the cap of 200 and became _other. Good: 0. If not: declare the "
        "topics with `untrusted=`, or use patterns.",
        q.grown("telemetry_series_overflow_total"),
        levels=Levels(caution=1),
        decimals=0,
        runbook=runbook("GlassbusSeriesOverflow"),
    ),
    p.tile(
        "Observers, scrapes failed",
        "Calls in the range that an observer raised in, and parts of scrapes that failed. Good: 0. If not: the log "
        "names the observer; nothing of the bus depended on it.",
        f"({q.grown('observer_failures_total')} or vector(0)) + {q.grown('telemetry_scrape_failures_total')}",
        levels=Levels(caution=1),
        decimals=0,
        runbook=runbook("GlassbusObserverFailing"),
    ),
)

_COST = (
    p.row("What it costs"),
    p.graph(
        "Cost of telemetry, by part",
        "Share of one processor that each part takes, in the mean process: showing facts, scrapes, exporting spans. "
        "Good: under 2 % in all. If not: past the line it is more than promised.",
        {"{{signal}}": f"{q.rate('telemetry_seconds_total', by='signal')} / on () group_left () {_PROCESSES}"},
        look.SHARE,
        colours={"facts": look.CALM, "scrape": look.QUIET, "export": "purple"},
        stacked=True,
        line=CPU_SHARE,
        runbook=runbook("GlassbusTelemetryCostly"),
    ),
    p.graph(
        "Handling an error, p99",
        "From catching an exception to having stored the decision. Promised: under 10 ms. Good: under 1 ms. If not: "
        "the store or an observer is slow.",
        {"{{category}}": q.quantile(0.99, "error_handling_seconds", by="category")},
        look.SECONDS,
        colours=look.CATEGORIES,
        line=0.01,
        log=True,
        links=[to_board("glassbus-errors")],
        runbook=runbook("GlassbusErrorHandlingSlow"),
    ),
    p.graph(
        "Memory of error records",
        "Of each process. Promised: under 50 MB. Good: flat. If not: compare with the errors a second: it must not "
        "grow with them.",
        {"{{bus}} at {{instance}}": f"max by (bus, instance) ({q.select('error_memory_bytes')})"},
        look.BYTES,
        line=MEMORY_BYTES,
        runbook=runbook("GlassbusErrorMemoryHigh"),
    ),
    p.graph(
        "Processors in use",
        "Processors that each process keeps busy. Good: as always for this load. If not: compare with attempts a "
        "second on Queues & dead letters.",
        {"{{instance}}": f"sum by (instance) (rate({q.foreign('process_cpu_seconds_total', **_PROCESS)}[{q.RATE}]))"},
        look.COUNT,
    ),
    p.graph(
        "Memory of each process",
        "Resident memory. Good: flat. If not: what grows is rarely the bus: its queues are in the store, its records "
        "of errors are above.",
        {"{{instance}}": f"max by (instance) ({q.foreign('process_resident_memory_bytes', **_PROCESS)})"},
        look.BYTES,
    ),
    p.graph(
        "Time of a scrape",
        "How long Prometheus takes to read a process. Good: under 0.1 s. If not: near the scrape timeout metrics go "
        "missing: look at the number of destinations.",
        {"{{instance}}": f"max by (instance) ({q.foreign('scrape_duration_seconds', **_PROCESS)})"},
        look.SECONDS,
        runbook=runbook("GlassbusScrapeIncomplete"),
    ),
)

_LEAVING = (
    p.row("Does it leave the process?"),
    p.graph(
        "Waiting for export",
        "Entries in the export queues, failures apart from the rest. Good: near 0. If not: the collector does not keep "
        "up; when a queue is full, entries are dropped and counted.",
        {"{{queue}}": q.each("telemetry_queue_spans", by="queue")},
        look.COUNT,
        colours={"spans": look.CALM, "failures": look.CAUTION},
        runbook=runbook("GlassbusSpanQueueFilling"),
    ),
    p.graph(
        "Spans lost",
        "Spans a second that were not exported, by reason. Good: none. If not: queue_full: slow collector; "
        "export_failed: it refused or is down; shut_down: the process ended first.",
        {"{{reason}}": q.rate("telemetry_spans_dropped_total", by="reason")},
        look.PER_SECOND,
        bars=True,
        stacked=True,
        colours={"queue_full": look.CAUTION, "export_failed": look.BAD, "shut_down": look.QUIET, "not_made": "purple"},
        runbook=runbook("GlassbusSpansDropped"),
    ),
    p.graph(
        "Exports that failed",
        "Batches a second that the collector did not take. Good: none. If not: is the collector up, and does it refuse "
        "for lack of memory? See below.",
        {"{{queue}}": q.rate("telemetry_export_failures_total", by="queue")},
        look.PER_SECOND,
        bars=True,
        stacked=True,
        colours={"spans": look.CALM, "failures": look.CAUTION},
        runbook=runbook("GlassbusSpanExportFailing"),
    ),
    p.graph(
        "Summed up, dropped, left out",
        "Failures told by one span with a count (over the flood budget), journal lines dropped or folded, label values "
        "over the cap. Good: none. If not: a flood is being told briefly; counters stay exact.",
        {
            "spans summed up": q.rate("telemetry_spans_summarised_total"),
            "journal lines": q.rate("journal_dropped_total"),
            "label values": q.rate("telemetry_series_overflow_total"),
        },
        look.PER_SECOND,
        runbook=runbook("GlassbusJournalDropping"),
        w=12,
    ),
    p.graph(
        "Observers that raised",
        "Calls a second that an observer raised in. Good: none. If not: the log names the observer and its error; "
        "messages did not notice.",
        {"calls": f"{q.rate('observer_failures_total')} or vector(0)"},
        look.PER_SECOND,
        bars=True,
        runbook=runbook("GlassbusObserverFailing"),
        w=12,
    ),
)

_PIPELINE = (
    p.row("Those who watch: collector, Prometheus, Alertmanager"),
    p.table(
        "What Prometheus scrapes",
        "Every target of Prometheus, and how long it takes to read. Good: none is down. If not: the red one is; alerts "
        "that need it are blind.",
        {
            "down": Column(f"1 - max by (job, instance) ({q.foreign('up')})", look.COUNT, Levels(bad=1)),
            "took": Column(f"max by (job, instance) ({q.foreign('scrape_duration_seconds')})", look.SECONDS),
        },
        first=("job", "instance"),
        widths={"job": 125, "instance": 150},
        runbook=runbook("GlassbusPipelineTargetDown"),
        w=8,
    ),
    p.graph(
        "Spans through the collector",
        "Spans a second that came in, and that left for Jaeger. Good: both move together; failures leave by two ways, "
        "so that late ones are not lost, the rest is sampled. If not: nothing leaving is a broken Jaeger or a wrong "
        "policy.",
        {
            "came in": _of("otelcol_receiver_accepted_spans"),
            "left": _of("otelcol_exporter_sent_spans"),
        },
        look.PER_SECOND,
        colours={"came in": look.CALM, "left": look.GOOD},
        h=9,
    ),
    p.graph(
        "Spans that the collector lost or refused",
        "Good: all 0. If not: refused: it is short of memory; failed: Jaeger does not take them; dropped early: more "
        "traces than it may hold (num_traces).",
        {
            "refused": _of("otelcol_receiver_refused_spans"),
            "failed to send": _of("otelcol_exporter_send_failed_spans"),
            "no room in its queue": _of("otelcol_exporter_enqueue_failed_spans"),
            "dropped early": _of("otelcol_processor_tail_sampling_sampling_trace_dropped_too_early"),
        },
        look.PER_SECOND,
        bars=True,
        stacked=True,
        runbook=runbook("GlassbusCollectorLosing"),
        h=9,
    ),
    p.graph(
        "The collector's own queue",
        "How full the queue towards Jaeger is. Good: near 0. If not: Jaeger is slow or down; the queue is on disk and "
        "survives a restart.",
        {
            "{{exporter}}": q.share(
                f"max by (exporter) ({q.foreign('otelcol_exporter_queue_size')})",
                f"max by (exporter) ({q.foreign('otelcol_exporter_queue_capacity')})",
            )
        },
        look.SHARE,
        line=0.8,
        top=1.0,
        runbook=runbook("GlassbusCollectorQueueFilling"),
    ),
    p.graph(
        "Rules that fail",
        "Evaluations a second that failed in Prometheus. Good: none. If not: an alert or a recording rule cannot be "
        "computed: Prometheus' page /rules shows the error.",
        {"evaluations": _of("prometheus_rule_evaluation_failures_total")},
        look.PER_SECOND,
        bars=True,
        runbook=runbook("GlassbusRulesFailing"),
    ),
    p.graph(
        "Notifications that do not arrive",
        "Alerts a second that Prometheus could not hand to Alertmanager, or Alertmanager to a receiver. Good: none. If "
        "not: nobody is told. Mend this first.",
        {
            "not handed over": _of("prometheus_notifications_dropped_total"),
            "not delivered": _of("alertmanager_notifications_failed_total"),
        },
        look.PER_SECOND,
        bars=True,
        colours={"not handed over": look.BAD, "not delivered": look.CAUTION},
        runbook=runbook("GlassbusAlertsUndelivered"),
    ),
)

BOARD = Board(
    "glassbus-telemetry",
    "What seeing costs, whether all of it leaves the process, and whether those who watch are well.",
    (*_TILES, *_COST, *_LEAVING, *_PIPELINE),
    marks=("Alerts", "Starts and deploys"),
    narrows=False,
)
