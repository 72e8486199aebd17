"""What a PromQL expression names: metrics with their matchers, and labels. Whether it parses is promtool's to say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from glassbus.drill.durations import Token, tokens
from glassbus.telemetry.catalogue import METRICS

#: What others export and our alerts and runbooks read. Seen on the versions in deploy/versions.env.
FOREIGN = frozenset(
    [
        "up",
        "scrape_duration_seconds",
        "ALERTS",
        "ALERTS_FOR_STATE",
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
        "process_start_time_seconds",
        "prometheus_config_last_reload_successful",
        "prometheus_notifications_alertmanagers_discovered",
        "prometheus_notifications_dropped_total",
        "prometheus_notifications_errors_total",
        "prometheus_notifications_queue_length",
        "prometheus_rule_evaluation_failures_total",
        "prometheus_rule_group_last_duration_seconds",
        "alertmanager_config_last_reload_successful",
        "alertmanager_notifications_failed_total",
        "alertmanager_notifications_total",
        "otelcol_exporter_enqueue_failed_spans",
        "otelcol_exporter_queue_capacity",
        "otelcol_exporter_queue_size",
        "otelcol_exporter_send_failed_spans",
        "otelcol_exporter_sent_spans",
        "otelcol_process_memory_rss",
        "otelcol_processor_memory_limiter_refused_spans",
        "otelcol_processor_tail_sampling_new_trace_id_received",
        "otelcol_processor_tail_sampling_sampling_trace_dropped_too_early",
        "otelcol_receiver_accepted_spans",
        "otelcol_receiver_refused_spans",
    ]
)
#: Labels that Prometheus, the collector or a rule of ours puts on.
OTHER_LABELS = frozenset(
    [
        "alertmanager",
        "alertname",
        "alertstate",
        "bus",
        "exporter",
        "instance",
        "integration",
        "job",
        "le",
        "receiver",
        "rule_group",
        "unresolved",
    ]
)
_WORDS = frozenset(
    [
        "and",
        "or",
        "unless",
        "by",
        "without",
        "on",
        "ignoring",
        "group_left",
        "group_right",
        "bool",
        "offset",
        "inf",
        "nan",
    ]
)
_LISTS = frozenset(["by", "without", "on", "ignoring", "group_left", "group_right"])
_ENDINGS = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
#: Every name under which something of the catalogue is scraped, with the labels it has and their values.
CATALOGUED: dict[str, dict[str, tuple[str, ...]]] = {
    metric.full_name + ending: metric.labels for metric in METRICS for ending in _ENDINGS[metric.type]
}


class Matcher(NamedTuple):
    label: str
    sign: str
    value: str


class Selector(NamedTuple):
    """A metric as an expression selects it; `metric` is empty where only matchers say which."""

    metric: str
    matchers: tuple[Matcher, ...]


def _meaningful(expression: str) -> list[Token]:
    return [token for token in tokens(expression) if token.kind not in ("space", "comment")]


def selectors(expression: str) -> Iterator[Selector]:
    for name, braces, _ in _walk(expression):
        if name is not None:
            matchers = re.findall(r"""(\w+)(=~|!~|!=|=)(?:"((?:[^"\\]|\\.)*)"|'([^']*)')""", braces)
            yield Selector(name, tuple(Matcher(label, sign, one or two) for label, sign, one, two in matchers))


def listed_labels(expression: str) -> set[str]:
    """Labels that are named in by (…), on (…) and their like."""
    return {label for _, _, labels in _walk(expression) for label in labels}


def _walk(expression: str) -> Iterator[tuple[str | None, str, tuple[str, ...]]]:
    found = _meaningful(expression)
    at = 0
    while at < len(found):
        token = found[at]
        after = found[at + 1].text if at + 1 < len(found) else ""
        if token.kind == "name" and token.text in _LISTS and after == "(":
            end = next(i for i in range(at, len(found)) if found[i].text == ")")
            yield None, "", tuple(one.text for one in found[at + 2 : end] if one.text != ",")
            at = end
        elif token.text == "{" or (
            token.kind == "name" and token.text.lower() not in _WORDS and after not in ("(", "by", "without")
        ):
            start = at if token.text == "{" else at + 1
            braces = ""
            if start < len(found) and found[start].text == "{":
                end = next(i for i in range(start, len(found)) if found[i].text == "}")
                braces = "".join(one.text for one in found[start + 1 : end])
                at = end
            yield ("" if token.text == "{" else token.text), braces, ()
        at += 1


def problems(expression: str, recorded: set[str], placeholders: frozenset[str] = frozenset()) -> list[str]:
    """What an expression names that nobody exports. `placeholders` are values that a reader replaces."""
    said: list[str] = []
    for selector in selectors(expression):
        metrics = [selector.metric]
        if not selector.metric:
            pattern = next(m.value for m in selector.matchers if m.label == "__name__")
            metrics = [name for name in (*CATALOGUED, *FOREIGN) if re.fullmatch(pattern, name)] or [pattern]
        for metric in metrics:
            if metric in CATALOGUED:
                said += _wrong_labels(metric, selector.matchers, placeholders)
            elif metric not in recorded and metric not in FOREIGN:
                said.append(f"nobody exports {metric}")
    known = OTHER_LABELS.union(*CATALOGUED.values(), {"component", "reason"})
    return said + [f"no metric has the label {label}" for label in listed_labels(expression) - known]


def _wrong_labels(metric: str, matchers: tuple[Matcher, ...], placeholders: frozenset[str]) -> Iterator[str]:
    labels = CATALOGUED[metric]
    for label, sign, value in matchers:
        if label in ("bus", "job", "instance", "__name__") or (label == "le" and metric.endswith("_bucket")):
            continue
        if label not in labels:
            yield f"{metric} has no label {label}"
            continue
        values = value.split("|") if sign in ("=~", "!~") else [value]
        allowed = labels[label]
        for one in values:
            if allowed and one not in allowed and one not in placeholders:
                yield f"{label} of {metric} is never {one!r}"
