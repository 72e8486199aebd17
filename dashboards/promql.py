"""PromQL whose names are the catalogue's: an unknown metric, label or value is an error while the boards are built.

Every query on a metric of ours is narrowed by the board's variables. `by` names labels, apart by spaces; other keywords
are label values: one, several, or `Other(...)`. Everything here raises `Unknown`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from glassbus.telemetry.catalogue import BY_NAME, Metric

#: At least four scrapes, so that a rate has enough samples; and all that the board shows.
RATE, RANGE = "$__rate_interval", "$__range"

#: The families of ours whose samples carry the trace of one that was counted.
EXEMPLIFIED = tuple(
    BY_NAME[name].full_name for name in ("errors_total", "process_duration_seconds", "publish_duration_seconds")
)

#: Labels that every scrape of a bus has.
EVERYWHERE = ("job", "instance", "bus")
_NARROWED = (*EVERYWHERE, "destination", "subscription")

#: What other programs tell and our boards show, with its labels. The variables do not narrow it: its jobs are others.
FOREIGN: dict[str, tuple[str, ...]] = {
    "up": ("job", "instance"),
    "scrape_duration_seconds": ("job", "instance"),
    "process_cpu_seconds_total": ("job", "instance"),
    "process_resident_memory_bytes": ("job", "instance"),
    "ALERTS": ("alertname", "alertstate", "severity"),
    "ALERTS_FOR_STATE": ("alertname", "severity"),
    "prometheus_rule_evaluation_failures_total": ("rule_group",),
    "prometheus_notifications_dropped_total": (),
    "alertmanager_notifications_failed_total": ("integration",),
    "otelcol_receiver_accepted_spans": ("receiver",),
    "otelcol_receiver_refused_spans": ("receiver",),
    "otelcol_exporter_sent_spans": ("exporter",),
    "otelcol_exporter_send_failed_spans": ("exporter",),
    "otelcol_exporter_enqueue_failed_spans": ("exporter",),
    "otelcol_exporter_queue_size": ("exporter",),
    "otelcol_exporter_queue_capacity": ("exporter",),
    "otelcol_processor_tail_sampling_sampling_trace_dropped_too_early": (),
    "traces_span_metrics_calls_total": ("service_name",),
}


class Unknown(Exception):
    """A metric, label or value that nobody tells."""


class Other(str):
    """Any value but this one."""


class Like(str):
    """Any value that this regular expression matches whole."""


Wanted: TypeAlias = str | tuple[str, ...]


def recorded(rule: str, by: str = "bus subscription") -> str:
    """A selector of what a recording rule of ours gives, whose labels are `by`."""
    return rule + _braced([_narrowed(label) for label in by.split()])


def select(name: str, /, **wanted: Wanted) -> str:
    """A selector of our metric `name`, named without prefix."""
    metric = _metric(name)
    return _selector(metric.full_name, metric, wanted)


def rate(name: str, /, by: str = "", over: str = RATE, **wanted: Wanted) -> str:
    """How many a second, summed over instances."""
    return f"sum{_by(name, by)} (rate({select(name, **wanted)}[{over}]))"


def grown(name: str, /, by: str = "", over: str = RANGE, **wanted: Wanted) -> str:
    """How many more within `over`, summed over instances."""
    return f"sum{_by(name, by)} (increase({select(name, **wanted)}[{over}]))"


def now(name: str, /, by: str = "", **wanted: Wanted) -> str:
    """A gauge that is the same from every process of a store: `bus` comes first of its labels."""
    return f"max{_by(name, f'bus {by}')} ({select(name, **wanted)})"


def each(name: str, /, by: str = "", **wanted: Wanted) -> str:
    """A gauge that each process tells of itself, summed over them."""
    return f"sum{_by(name, f'bus {by}')} ({select(name, **wanted)})"


def count(name: str, /, by: str = "", over: str = RATE, **wanted: Wanted) -> str:
    """How many observations a second of a histogram."""
    metric = _metric(name)
    return f"sum{_by(name, by)} (rate({_selector(metric.full_name + '_count', metric, wanted)}[{over}]))"


def buckets(name: str, /, by: str = "", over: str = RATE, **wanted: Wanted) -> str:
    """How many observations a second, up to each bound of a histogram."""
    metric = _metric(name)
    return f"sum{_by(name, f'le {by}')} (rate({_selector(metric.full_name + '_bucket', metric, wanted)}[{over}]))"


def under(bound: float, name: str, /, by: str = "", over: str = RANGE, **wanted: Wanted) -> str:
    """How many more observations of a histogram within `over`, of at most one of its bounds."""
    metric = _metric(name)
    if bound not in metric.bounds:
        raise Unknown(f"{name} has no bucket that ends at {bound}")
    written = f"{bound:g}|{bound}".replace(".", "[.]")  # clients write 60 and 60.0
    series = _selector(metric.full_name + "_bucket", metric, wanted, f'le=~"{written}"')
    return f"sum{_by(name, by)} (increase({series}[{over}]))"


def quantile(q: float, name: str, /, by: str = "", over: str = RATE, **wanted: Wanted) -> str:
    """The value that a share `q` of observations stays under."""
    return f"histogram_quantile({q}, {buckets(name, by, over, **wanted)})"


def worst(name: str, label: str, ranks: Mapping[str, int], /, by: str = "", **wanted: Wanted) -> str:
    """Of a gauge that is 1 for one value of `label`: the rank of that value; where several are joined, the highest."""
    ranked = (f"{select(name, **{label: value}, **wanted)} * {rank}" for value, rank in ranks.items())
    return f"max{_by(name, by)} ({' or '.join(ranked)})"


def began(expr: str) -> str:
    """`expr`, a selector, where it has a value and had none one step before."""
    return f"{expr} unless {expr} offset $__interval"


def appeared(name: str, /, by: str) -> str:
    """The `by` that there are and were not one step before."""
    seen, joined = select(name), f"group{_by(name, by)}"
    return f"{joined} ({seen}) unless {joined} ({seen} offset $__interval)"


def stepped(name: str, /, by: str, **wanted: Wanted) -> str:
    """By how much a counter has grown since one step before, where it has."""
    seen, joined = select(name, **wanted), f"sum{_by(name, by)}"
    return f"{joined} ({seen}) - {joined} ({seen} offset $__interval) > 0"


def otherwise(expr: str, label: str, text: str) -> str:
    """`expr`, or where it is empty one line with the value 0 whose `label` says `text`."""
    return f'{expr} or (label_replace(vector(0), "{label}", "{text}", "", "") unless on () {expr})'


def share(part: str, whole: str) -> str:
    """`part` of `whole`; nothing where `whole` is 0."""
    return f"{part} / ({whole} > 0)"


def foreign(name: str, /, **wanted: Wanted) -> str:
    """A selector of a metric of another program."""
    labels = FOREIGN.get(name)
    if labels is None:
        raise Unknown(f"{name} is not among FOREIGN")
    if unknown := wanted.keys() - set(labels):
        raise Unknown(f"{name} has no label {sorted(unknown)}")
    return name + _braced([_matcher(label, value) for label, value in wanted.items()])


def label_values(label: str, *names: str, within: str = "") -> str:
    """The query of a variable: the values of `label` in our metrics `names`, narrowed by the variables `within`."""
    for name in names:
        _by(name, f"{label} {within}")
    chosen = [_matcher("__name__", tuple(_metric(name).full_name for name in names))]
    return f"label_values({_braced(chosen + [_narrowed(other) for other in within.split()])}, {label})"


def foreign_values(label: str, name: str) -> str:
    """The query of a variable: the values of `label` in a metric of another program."""
    foreign(name, **{label: ""})
    return f"label_values({name}, {label})"


def _metric(name: str) -> Metric:
    metric = BY_NAME.get(name)
    if metric is None:
        raise Unknown(f"{name} is not in the catalogue")
    return metric


def _selector(series: str, metric: Metric, wanted: Mapping[str, Wanted], *more: str) -> str:
    labels = ("bus", *metric.labels)
    for label, values in wanted.items():
        if label not in labels:
            raise Unknown(f"{metric.name} has no label {label}")
        allowed = metric.labels.get(label)
        for value in (values,) if isinstance(values, str) else values:
            if allowed and value not in allowed:
                raise Unknown(f"{label} of {metric.name} is never {value}")
    narrowed = [_narrowed(label) for label in _NARROWED if label in (*EVERYWHERE, *labels) and label not in wanted]
    return series + _braced([*narrowed, *(_matcher(label, value) for label, value in wanted.items()), *more])


def _by(name: str, by: str) -> str:
    labels = by.split()
    if unknown := set(labels) - {*EVERYWHERE, "le", *_metric(name).labels}:
        raise Unknown(f"{name} has no label {sorted(unknown)}")
    return f" by ({', '.join(labels)})" if labels else ""


def _narrowed(label: str) -> str:
    return f'{label}=~"${label}"'


def _matcher(label: str, value: Wanted) -> str:
    if isinstance(value, Other):
        return f'{label}!="{value}"'
    if isinstance(value, Like):
        return f'{label}=~"{value}"'
    return f'{label}="{value}"' if isinstance(value, str) else f'{label}=~"{"|".join(value)}"'


def _braced(matchers: list[str]) -> str:
    return "{" + ", ".join(matchers) + "}" if matchers else ""
