"""The demo live in the terminal."""

from __future__ import annotations

import time
from collections import deque

from rich.console import Console, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.table import Table
from rich.text import Text

from glassbus.cli.common import duration
from glassbus.cli.demo.state import Demo, Row, View
from glassbus.cli.demo.watch import News

_HEALTH = {"healthy": "bold green", "degraded": "bold yellow", "critical": "bold red"}
_MOODS = {"good": ("✓", "green"), "warn": ("↻", "yellow"), "bad": ("✗", "bold red"), "dim": ("·", "bright_black")}
_BARS = "▁▂▃▄▅▆▇█"
#: The curve of the rate has one bar a second.
_BARS_MAX = 40


class Screen:
    """Draws the whole terminal a few times a second, and gives it back as it was."""

    interval_s = 0.25

    def __init__(self, demo: Demo, colour: bool) -> None:
        self._demo = demo
        self._console = Console(highlight=False, markup=False, emoji=False, no_color=not colour)
        self._live = Live(console=self._console, screen=True, auto_refresh=False)
        self._rates: deque[float] = deque(maxlen=_BARS_MAX)
        self._curve_at = 0.0

    def start(self) -> None:
        self._live.start()

    def show(self) -> None:
        view = self._demo.view()
        if view.elapsed_s - self._curve_at >= 1.0:
            self._curve_at = view.elapsed_s
            self._rates.append(view.rate)
        self._live.update(self._draw(view), refresh=True)

    def stop(self) -> None:
        self._live.stop()

    def _draw(self, view: View) -> RenderableType:
        width, height = self._console.size
        table, ledger = _subscriptions(view), _ledger(view, width)
        rows = len(view.rows) + 1
        news_lines = max(1, height - rows - len(ledger) - 5)
        parts: list[tuple[RenderableType, int]] = [
            (_stacked(self._header(view, width)), 2),
            (_rule("subscriptions", width), 1),
            (table, rows),
            (_rule("what happened", width), 1),
            (_stacked([_line(item, width) for item in list(self._demo.watch.news)[-news_lines:]]), news_lines),
            (_rule("ledger", width, "Ctrl-C ends it cleanly"), 1),
            (_stacked(ledger), len(ledger)),
        ]
        layout = Layout()
        layout.split_column(*(Layout(part, size=size) for part, size in parts))
        return layout

    def _header(self, view: View, width: int) -> list[Text]:
        feed = self._demo.feed.feed
        first = Text.assemble(
            (" glassbus demo ", "bold reverse"),
            " ",
            ("● " + view.health, _HEALTH.get(view.health, "bold")),
            f"  {view.phase} {duration(view.elapsed_s)}",
            f"  handled {view.handled:,} ({view.rate:,.0f}/s) ",
        )
        first.append(_curve(self._rates, width - first.cell_len - 1), "cyan")
        second = Text(f" {view.records:,} in from {feed.name.rpartition('/')[2]}", "bright_black")
        if feed.rounds:
            second.append(f", round {feed.rounds + 1}", "bright_black")
        if self._demo.strike is not None:
            second.append("  fault ", "bright_black")
            second.append(view.fault or "none in place", "bold red" if view.fault else "green")
        else:
            second.append("  payments ", "bright_black")
            second.append("DOWN" if view.outage else "up", "bold red" if view.outage else "green")
        second.append(f"  {self._demo.metrics_url}", "bright_black")
        for line in (first, second):
            line.truncate(width, overflow="ellipsis")
        return [first, second]


def _stacked(lines: list[Text]) -> Text:
    return Text("\n", no_wrap=True, end="").join(lines)


def _rule(title: str, width: int, right: str = "") -> Text:
    line = Text.assemble(("── ", "bright_black"), (title, "bold"), " ")
    end = f" {right} ──" if right else ""
    return line.append("─" * max(0, width - line.cell_len - len(end)) + end, "bright_black")


def _curve(rates: deque[float], width: int) -> str:
    """The rates as bars, the newest at the right, at most `width` of them."""
    shown = list(rates)[-max(0, width) :] if width > 0 else []
    highest = max(shown, default=0.0)
    return "".join(_BARS[min(7, int(rate / highest * 7.99))] if highest else _BARS[0] for rate in shown)


def _subscriptions(view: View) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bright_black", expand=True)
    table.add_column("", no_wrap=True, ratio=1)
    for heading in ("/s", "handled", "in flight", "waiting", "retries", "dead"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True, width=14)
    for row in view.rows:
        account = row.account
        table.add_row(
            row.name,
            f"{row.rate:,.1f}" if row.rate < 9.95 else f"{row.rate:,.0f}",
            f"{account.handled:,}",
            _number(account.in_flight, "cyan"),
            _number(account.pending, "yellow"),
            _number(row.retries, "yellow"),
            _number(account.dead_lettered, "bold red"),
            _state(row),
        )
    return table


def _line(news: News, width: int) -> Text:
    mark, style = _MOODS[news.mood]
    often = f" x{news.count:,}" if news.count > 1 else ""
    at = time.strftime("%H:%M:%S", time.localtime(news.at))
    line = Text.assemble((f" {at} ", "bright_black"), (mark, style), " ")
    text = Text(news.text, style if news.mood != "warn" else "")
    text.truncate(max(10, width - line.cell_len - len(often) - 1), overflow="ellipsis")
    return line.append_text(text).append(often, "bold yellow")


def _number(number: int, style: str) -> Text:
    return Text(f"{number:,}", style if number else "bright_black")


def _state(row: Row) -> Text:
    if row.state == "breaker_open":
        return Text("■ breaker open", "bold red")
    if row.breaker == "half_open":
        return Text("▲ half-open", "yellow")
    if row.state == "running":
        return Text("● running", "green")
    return Text(f"○ {row.state.replace('_', ' ')}", "bright_black")


def _ledger(view: View, width: int) -> list[Text]:
    """The equation, on one line where it fits, else on two."""
    total = view.total
    first = f" accepted {total.accepted:,} = pending {total.pending:,} + in flight {total.in_flight:,}"
    first += f" + handled {total.handled:,}"
    second = f"+ dead-lettered {total.dead_lettered:,} + expired {total.expired:,} + discarded {total.discarded:,}"
    verdict = ("  ✓ balanced", "bold green") if view.balanced else ("  ✗ NOT BALANCED", "bold red")
    if len(first) + len(second) + len(verdict[0]) + 1 <= width:
        return [Text.assemble(first, " ", second, verdict)]
    return [Text(first), Text.assemble("   ", second, verdict)]
