"""A report on errors as text: what fails, whether it is more than usual, whether it heals."""

from __future__ import annotations

from glassbus.record.analysis import Analysis
from glassbus.record.trends import Trend
from glassbus.record.wording import ARROWS, compared, line, moment, rate, span, sparkline

_TRENDS_MAX = 15
_TOP_MAX = 10
_TEXT_MAX = 90


def text_report(analysis: Analysis) -> str:
    """The report for a terminal or a ticket; lines of at most some 130 characters."""
    sections = [_head(analysis), _changes(analysis), _frequent(analysis)]
    if analysis.notes:
        sections.append("Not complete:\n" + "\n".join(f"  {line(note, 200)}" for note in analysis.notes))
    return "\n\n".join(sections) + "\n"


def _head(analysis: Analysis) -> str:
    numbers = analysis.statistics
    hour = f"last hour {numbers['recent_errors_1h']:,} ({rate(numbers['error_rate_1h'])})"
    day = f"last 24 hours {numbers['recent_errors_24h']:,}"
    lines = [
        f"Errors of {line(analysis.source, 100)} at {moment(analysis.now)}",
        f"  {hour}, {day}, in all {numbers['total_errors']:,} since {moment(numbers['since'])}",
        f"  last 24 hours  |{sparkline(analysis.bars.get('total', []), 96)}|",
    ]
    for title, counts in (("severity", "severity_distribution"), ("category", "categories")):
        ordered = sorted(numbers[counts].items(), key=lambda pair: -pair[1])
        lines.append(f"  {title}  " + (", ".join(f"{line(name, 60)} {number:,}" for name, number in ordered) or "-"))
    lines.append("  recovery  " + recovery_text(analysis))
    return "\n".join(lines)


def recovery_text(analysis: Analysis) -> str:
    """How many recoveries succeeded, and how long they took."""
    numbers = analysis.statistics
    ended = numbers["recoveries"]["succeeded"] + numbers["recoveries"]["failed"]
    if not ended:
        return "none attempted"
    told = f"{numbers['recovery_success_rate']:.1%} of {ended:,} attempts succeeded"
    if numbers["mttr_seconds"] is not None:
        told += f", {span(numbers['mttr_seconds'])} from the first failure on average"
    return told


def _changes(analysis: Analysis) -> str:
    if not analysis.trends:
        return "No errors were recorded in this time."
    shown = [trend for trend in analysis.trends if trend.direction != "steady"] or analysis.trends
    what = "Nothing changes" if shown is analysis.trends else "What changes"
    lines = [f"{what} (now is the last {span(shown[0].recent_s)}, against the day before):"]
    lines += [f"  {trend_text(trend)}" for trend in shown[:_TRENDS_MAX]]
    if len(shown) > _TRENDS_MAX:
        lines.append(f"  and {len(shown) - _TRENDS_MAX:,} more")
    return "\n".join(lines)


def trend_text(trend: Trend) -> str:
    """A trend in one line."""
    name = line(trend.name, 60) if trend.kind == "category" else f"{line(trend.name, 60)} {line(named(trend), 60)}"
    when = f"last {moment(trend.last_seen)}" if trend.direction == "gone" else f"{trend.recent:,} now"
    if trend.direction == "new":
        when += f", first {moment(trend.first_seen)}"
    past = "" if trend.direction == "new" else f", {compared(trend.recent, trend.usual, trend.ratio)}"
    return f"{ARROWS[trend.direction]} {trend.direction:<8}{trend.kind:<12} {name}: {when}{past}"


def named(trend: Trend) -> str:
    """What fails, in words: the type and the text of its latest occurrence."""
    return f"{trend.exception_type.removeprefix('glassbus.errors.') or trend.category}: {trend.message}".rstrip(": ")


def _frequent(analysis: Analysis) -> str:
    top = sorted((one for one in analysis.trends if one.kind == "fingerprint"), key=lambda one: -one.count)
    if not top:
        return "Most frequent: none"
    lines = [f"Most frequent of {len(top):,} fingerprints:"]
    for trend in top[:_TOP_MAX]:
        lines.append(
            f"  {trend.count:>9,} x  {line(trend.name, 60):<16}  {line(trend.severity, 60):<8} "
            f"{line(trend.category, 60)}; first {moment(trend.first_seen)}, last {moment(trend.last_seen)}"
        )
        lines.append(f"               {line(named(trend), _TEXT_MAX)}")
    return "\n".join(lines)
