"""Why it was decided so, in a sentence: from what the facts say, which a damaged or older journal may not."""

from __future__ import annotations

from typing import Any

from glassbus.record.entries import Entry
from glassbus.record.wording import span

_UNREADABLE = "PayloadUndecodable"


def number(value: Any) -> float:
    """`value` if it is a number that can be counted with, else 0."""
    return float(value) if type(value) in (int, float) and value == value else 0.0


def _count(value: Any) -> int:
    return int(number(value))


def of_retry(entry: Entry) -> str:
    fields = entry.fields
    immediate = _count(fields.get("immediate"))
    if fields.get("action") == "immediate_retry":
        return f"immediate retry {entry.attempt} of {immediate}" if immediate else ""
    if fields.get("postponed"):
        return "postponed: the retry budget of the subscription is spent"
    ceiling_s = number(fields.get("ceiling_s"))
    drawn = f"backoff: drawn from 0 to {span(ceiling_s)}" if ceiling_s else "backoff"
    if _count(fields.get("max_attempts")) and not immediate and entry.report is not None:
        return f"{drawn}; no retry is made at once for {entry.report.category}"
    return drawn


def of_dead_letter(entry: Entry) -> str:
    fields, report = entry.fields, entry.report
    kind = report.exception_type.rpartition(".")[2] if report is not None else "that error"
    most = _count(fields.get("max_attempts"))
    match fields.get("reason"):
        case "attempts_spent" if most and entry.attempt >= most:
            return f"all {most} attempts were made" if most > 1 else "the only attempt was made"
        case "attempts_spent":
            were = "attempt was" if entry.attempt == 1 else "attempts were"
            return f"{entry.attempt} {were} made, and the rule allows no more"
        case "not_retryable" if kind == _UNREADABLE:
            return "its payload cannot be read, so every attempt would fail alike"
        case "not_retryable":
            return f"another attempt would not help: {kind} is not retried here"
        case "abandoned":
            return "its handler still ran long past its timeout and could not be stopped (abandon_after)"
        case "owner_died":
            which = "its only attempt" if entry.attempt == 1 else f"each of {entry.attempt} attempts"
            return f"its process died, or lost its lease, in {which}"
        case "overflow":
            return f"its queue was full: {report.message}" if report is not None else "its queue was full"
        case reason:
            return str(reason or "").replace("_", " ")


def of_redelivery(entry: Entry) -> str:
    if entry.fields.get("reason") == "lease_expired":
        return f"attempt {entry.attempt - 1} has no end: its process gave no sign until its lease ran out"
    return f"attempt {entry.attempt - 1} has no end: its process died"


def of_breaker(entry: Entry) -> str:
    fields = entry.fields
    what = "kill switch" if fields.get("kind") == "subscription" else f"breaker {fields.get('breaker', '')}"
    reason = fields.get("reason")
    return f"{what} {fields.get('from_state')} -> {fields.get('to_state')}" + (f": {reason}" if reason else "")


def of_load(entry: Entry) -> str:
    limit, whole = _count(entry.fields.get("limit")), _count(entry.fields.get("concurrency"))
    low = ", low priority held back" if entry.fields.get("low_priority_held") else ""
    return f"{limit} of {whole} attempts at once{low}"


def of_codec(entry: Entry) -> str:
    return f"the payload is not {entry.fields.get('declared')}; {entry.fields.get('used')} could read it"


def of_overdue(entry: Entry) -> str:
    return f"the handler passed its timeout of {span(number(entry.fields.get('timeout_s')))} and still ran"


def of_given_back(entry: Entry) -> str:
    why = {"stopping": "its bus stopped", "breaker_open": "the kill switch was open"}
    return f"{why.get(str(entry.fields.get('reason')), 'the bus itself ended the attempt')}; the attempt is not charged"


def of_discard(entry: Entry) -> str:
    why = {
        "stopped": "its bus in memory stopped, with nowhere to save it",
        "forgotten": "its subscription was forgotten",
        "dead_letter": "an operator discarded the dead letter",
    }
    return why.get(str(entry.fields.get("reason")), "an operator discarded the dead letter")


def of_refused(entry: Entry) -> str:
    return f"the lease had passed to another owner, so the outcome {entry.fields.get('wanted')} was not stored"


def of_error(entry: Entry) -> str:
    return str(entry.fields.get("error") or entry.fields.get("reason") or "")
