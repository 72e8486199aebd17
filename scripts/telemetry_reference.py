"""Writes docs/reference/telemetry.md from the catalogue; `--check` fails when it is not current."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from glassbus.facts import FactType
from glassbus.observer import ALL_FACTS
from glassbus.telemetry.catalogue import METRICS, PROJECTIONS, SPANS, Metric

TARGET = Path(__file__).parent.parent / "docs" / "reference" / "telemetry.md"

INTRODUCTION = """# Telemetry: every metric, span and fact

Made from `src/glassbus/telemetry/catalogue.py` by `make reference`. A test fails when this page is not current, when
something is emitted that is not declared there, and when a fact has neither a span nor a reason to have none.

Names of metrics begin with `glassbus_` and carry the label `bus`. A gauge of a shared store (queues, dead letters,
unaccounted messages, escalations) reads the same from every process: take `max by (bus, …)` of it, never a sum over
instances. A label value beyond the first 200 of its label becomes `_other`. Spans have the instrumentation scope
`glassbus`; those that tell of a failure carry `glassbus.keep = true` and are exported at any sampling rate.

Names, kinds and attributes that begin with `messaging.` are those of the OpenTelemetry conventions, version 1.44.0. A
`process` span is a child of its message's `publish`, as the conventions allow where messages are handled one by one; a
delayed retry is in a trace of its own, linked to the attempt before. Topics that strangers may write to are given to
the bus: `MessageBus(untrusted=["partner.>"])`. What a stranger's `traceparent` names is linked to and never continued,
and whether such a message is sampled is decided where it is handled. When it is published here with such a header, the
message carries that on as `linked-traceparent`. Baggage is neither sent nor taken up.

Payloads, headers and keys are in no span, metric, log line or notification, nor in the `repr` of a message. The texts
of exceptions are, capped and without credentials of URLs; `glassbus.redact_errors(function)` takes out what a program
knows of, everywhere at once.
"""


def render() -> str:
    parts = [INTRODUCTION, "## Metrics\n", *map(_metric, METRICS), "## Spans\n"]
    for span in SPANS:
        parts.append(f"### `{span.name}`\n\n{span.kind}; {span.when}.\n")
        parts.append(_listed("Attributes", span.attributes))
        if span.links:
            parts.append(_listed("Links (their attribute `glassbus.link` says which)", span.links))
        if span.events:
            parts.append(_listed("Events", span.events))
        parts.append(_listed("Made from", [kind.__name__ for kind in span.source]))
    parts.append(
        "## Facts\n\nWhat the core states, and what becomes of it.\n\n"
        "| fact | says | spans | metrics |\n|---|---|---|---|"
    )
    parts.extend(_facts())
    return "\n".join(parts) + "\n"


def _metric(metric: Metric) -> str:
    lines = [
        f"### `{metric.full_name}`\n",
        f"{metric.type.capitalize()}{f', in {metric.unit}' if metric.unit else ''}. {metric.help}\n",
    ]
    for label, values in metric.labels.items():
        lines.append(
            f"- `{label}`: {', '.join(f'`{value}`' for value in values) if values else 'as the program declares'}"
        )
    if metric.bounds:
        lines.append(f"- buckets up to: {', '.join(f'{bound:g}' for bound in metric.bounds)}")
    lines.append(f"- source: {metric.source}\n")
    return "\n".join(lines)


def _listed(title: str, names: tuple[str, ...] | list[str]) -> str:
    return f"{title}: {', '.join(f'`{name}`' for name in names)}\n"


def _facts() -> Iterator[str]:
    spans: dict[FactType, list[str]] = {}
    for span in SPANS:
        for kind in span.source:
            spans.setdefault(kind, []).append(f"`{span.name}`")
    for kind in sorted(ALL_FACTS, key=lambda kind: kind.__name__):
        projection = PROJECTIONS[kind]
        shown = ", ".join(spans.get(kind, [])) or f"none: {projection.no_span}"
        counted = ", ".join(f"`{name}`" for name in projection.metrics) or f"none: {projection.no_metric}"
        yield f"| `{kind.__name__}` | {_says(kind)} | {shown} | {counted} |"


def _says(kind: FactType) -> str:
    text = vars(kind).get("__doc__") or ""
    return inspect.cleandoc(text).split("\n\n")[0].replace("\n", " ").replace("|", "\\|") or "(its name says it)"


def main() -> int:
    text = render()
    if "--check" in sys.argv[1:]:
        current = TARGET.exists() and TARGET.read_text() == text
        if not current:
            print(f"{TARGET.name} is not current: run `make reference`", file=sys.stderr)
        return 0 if current else 1
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
