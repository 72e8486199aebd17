"""The report as one HTML page: no scripts, nothing from elsewhere, everything escaped."""

from __future__ import annotations

from html import escape

from glassbus.errors import ErrorSeverity
from glassbus.record.analysis import Analysis
from glassbus.record.plots import Bars, bars_svg, colours, spark_svg
from glassbus.record.report import named
from glassbus.record.trends import Trend
from glassbus.record.wording import ARROWS, compared, line, moment, rate, span

_SEVERITIES = frozenset(severity.value for severity in ErrorSeverity)
_TRENDS_MAX = 40
_TOP_MAX = 25

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #d8dde3; --paper: #ffffff; --card: #f6f8fa;
  --bad: #b3261e; --warn: #8a5a00; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa5b1; --line: #30363d; --paper: #0d1117;
  --card: #161b22; --bad: #ff7b72; --warn: #e3b341; --good: #56d364; } }
body { margin: 0 auto; max-width: 1080px; padding: 24px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 17px; margin: 32px 0 8px; } p { margin: 4px 0; }
.soft { color: var(--soft); } .tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.tile { flex: 1 1 150px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; }
.tile b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 4px 0 8px; font-size: 13px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 600; } th, td { padding: 6px 12px 6px 0;
  border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; } td.quiet { white-space: nowrap; }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; } svg { display: block; max-width: 100%; }
svg.plot { width: 100%; height: auto; min-width: 700px; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } .grid { stroke: var(--line); }
.rising, .new, .critical, .high { color: var(--bad); font-weight: 600; } .falling, .gone { color: var(--good); }
.medium { color: var(--warn); } .notes { border-left: 3px solid var(--warn); padding-left: 12px; }
.spark { fill: var(--soft); }
"""


def html_report(analysis: Analysis) -> str:
    """A whole HTML document, to be opened in a browser or attached to a ticket."""
    title = f"Errors of {line(analysis.source, 120)}"
    since = moment(analysis.statistics["since"])
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">at {moment(analysis.now)}; times are UTC; counts since {since}</p>',
        _notes(analysis),
        _tiles(analysis),
        _plot(analysis, "Errors by category, last 24 hours", "category:"),
        _plot(analysis, "Errors by severity, last 24 hours", "severity:"),
        _plot(analysis, "Recoveries, last 24 hours", "recovery:"),
        _trends(analysis),
        _frequent(analysis),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _notes(analysis: Analysis) -> str:
    if not analysis.notes:
        return ""
    told = "".join(f"<p>{escape(line(note, 300))}</p>" for note in analysis.notes)
    return f'<div class="notes">{told}</div>'


def _tiles(analysis: Analysis) -> str:
    numbers = analysis.statistics
    rising = sum(trend.direction in ("rising", "new") for trend in analysis.trends if trend.kind == "fingerprint")
    ended = numbers["recoveries"]["succeeded"] + numbers["recoveries"]["failed"]
    recovered = f"of {ended:,} recoveries succeeded" if ended else "no recoveries ended"
    if numbers["mttr_seconds"] is not None:
        recovered += f", in {span(numbers['mttr_seconds'])} on average"
    tiles = [
        (f"{numbers['recent_errors_1h']:,}", f"in the last hour ({rate(numbers['error_rate_1h'])})"),
        (f"{numbers['recent_errors_24h']:,}", "in the last 24 hours"),
        (f"{numbers['total_errors']:,}", "in all"),
        (f"{numbers['recovery_success_rate']:.1%}" if ended else "-", recovered),
        (f"{rising:,}", "fingerprints rising or new"),
    ]
    made = "".join(f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in tiles)
    return f'<div class="tiles">{made}</div>'


def _plot(analysis: Analysis, title: str, prefix: str) -> str:
    series = {
        name.removeprefix(prefix): bars for name, bars in analysis.bars.items() if name.startswith(prefix) and any(bars)
    }
    if not series:
        return ""
    paint = colours(list(series))
    legend = "".join(
        f'<span><i style="background:{paint[name]}"></i>{escape(line(name, 60))} ({sum(bars):,})</span>'
        for name, bars in series.items()
    )
    svg = bars_svg(Bars(series, paint, analysis.now), title)
    return f'<h2>{escape(title)}</h2><div class="legend">{legend}</div><div class="wide">{svg}</div>'


def _trends(analysis: Analysis) -> str:
    if not analysis.trends:
        return "<h2>Trends</h2><p>No errors were recorded in this time.</p>"
    rows = []
    for trend in analysis.trends[:_TRENDS_MAX]:
        words = "" if trend.kind == "category" else f"<br>{escape(line(named(trend), 160))}"
        rows.append(
            f'<tr><td class="quiet {trend.direction}">{ARROWS[trend.direction]} {trend.direction}</td>'
            f"<td><code>{escape(line(trend.name, 80))}</code>{words}</td>"
            f'<td class="number">{trend.recent:,}</td>'
            f'<td class="quiet">{escape(_past(trend))}</td>'
            f"<td>{spark_svg([*trend.windows, trend.recent])}</td></tr>"
        )
    more = len(analysis.trends) - _TRENDS_MAX
    rest = f'<p class="soft">and {more:,} more</p>' if more > 0 else ""
    return (
        "<h2>Trends</h2>"
        f'<p class="soft">The last {span(analysis.trends[0].recent_s)} against the day before. Rising and falling: by '
        "half at least, by more than chance explains, and outside of what nine in ten quarters of an hour held.</p>"
        '<div class="wide"><table><tr><th>trend</th><th>category or fingerprint</th><th class="number">now</th>'
        f"<th>before</th><th>last 24 hours</th></tr>{''.join(rows)}</table></div>{rest}"
    )


def _style(severity: str) -> str:
    return severity if severity in _SEVERITIES else ""


def _past(trend: Trend) -> str:
    if trend.direction == "new":
        return f"first seen {moment(trend.first_seen)}"
    if trend.direction == "gone":
        return f"last seen {moment(trend.last_seen)}"
    return compared(trend.recent, trend.usual, trend.ratio)


def _frequent(analysis: Analysis) -> str:
    top = sorted((one for one in analysis.trends if one.kind == "fingerprint"), key=lambda one: -one.count)
    if not top:
        return ""
    rows = "".join(
        f'<tr><td class="number">{one.count:,}</td><td class="{_style(one.severity)}">'
        f"{escape(line(one.severity, 60))}</td>"
        f"<td>{escape(line(one.category, 60))}</td>"
        f"<td><code>{escape(line(one.name, 80))}</code><br>{escape(line(named(one), 200))}</td>"
        f'<td class="quiet">{moment(one.first_seen)}<br>{moment(one.last_seen)}</td></tr>'
        for one in top[:_TOP_MAX]
    )
    return (
        "<h2>Most frequent</h2>"
        '<div class="wide"><table><tr><th class="number">count</th><th>severity</th><th>category</th>'
        f"<th>fingerprint and latest text</th><th>first and last seen</th></tr>{rows}</table></div>"
    )
