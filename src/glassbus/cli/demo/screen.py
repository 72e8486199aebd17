"""The demo live in the terminal."""

from __future__ import annotations

import time

from rich.console import Console, Group, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.table import Table
from rich.text import Text

from glassbus.cli.common import duration
from glassbus.cli.demo.state import Demo, Row, View
from glassbus.cli.demo.watch import News

_HEALTH = {"healthy": "bold green", "degraded": "bold yellow", "critical": "bold red"}
_MOODS = {"good": ("✓", "green"), "warn": ("↻", "yellow"), "bad": ("✗", "bold red"), "dim": ("·", "bright_black")}


class Screen:
    """Draws the whole terminal a few times a second, and gives it back as it was."""

    interval_s = 0.25

    def __init__(self, demo: Demo, colour: bool) -> None:
        self._demo = demo
        self._console = Console(highlight=False, markup=False, emoji=False, no_color=not colour)
        self._live = Live(console=self._console, screen=True, auto_refresh=False)

    def start(self) -> None:
        self._live.start()

    def show(self) -> None:
        self._live.update(self._draw(self._demo.view()), refresh=True)

    def stop(self) -> None:
        self._live.stop()

    def _draw(self, view: View) -> RenderableType:
        width, height = self._console.size
        table = self._subscriptions(view, width)
        rows = len(view.rows) + 2
        layout = Layout()
        layout.split_column(
            Layout(self._header(view, width), name="header", size=3),
            Layout(table, name="subscriptions", size=rows),
            Layout(self._news(height - rows - 6, width), name="news"),
            Layout(_ledger(view, width), name="ledger", size=3),
        )
        return layout

    def _header(self, view: View, width: int) -> RenderableType:
        first = Text.assemble(
            (" glassbus demo ", "bold reverse"),
            "  ",
            ("● " + view.health, _HEALTH.get(view.health, "bold")),
            f"   {view.phase} {duration(view.elapsed_s)}",
            f"   in {view.records:,}",
            f"   handled {view.rate:,.0f}/s",
        )
        first.append("   payments ")
        first.append("DOWN" if view.outage else "up", "bold red" if view.outage else "green")
        where = f" input {self._demo.feed.feed.name}"
        if self._demo.feed.feed.rounds:
            where += f", round {self._demo.feed.feed.rounds + 1}"
        second = Text(f"{where}   {self._demo.metrics_url or 'no metrics endpoint'}", "bright_black")
        for line in (first, second):
            line.truncate(width, overflow="ellipsis")
        return Group(first, second)

    def _subscriptions(self, view: View, width: int) -> Table:
        table = Table(box=None, pad_edge=True, padding=(0, 1), header_style="bold", expand=True)
        table.add_column("subscription", no_wrap=True, ratio=2)
        for heading in ("/s", "handled", "in flight", "waiting", "retries", "dead"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True, ratio=2, min_width=14)
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

    def _news(self, lines: int, width: int) -> RenderableType:
        news = list(self._demo.watch.news)[-max(1, lines - 1) :]
        return Group(Text(" what happened", "bold"), *(_line(item, width) for item in news))


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
        return Text("◧ half-open", "yellow")
    if row.state == "running":
        return Text("● running", "green")
    return Text(row.state.replace("_", " "), "bright_black")


def _ledger(view: View, width: int) -> RenderableType:
    total = view.total
    places = [
        ("pending", total.pending),
        ("in flight", total.in_flight),
        ("handled", total.handled),
        ("dead-lettered", total.dead_lettered),
        ("expired", total.expired),
        ("discarded", total.discarded),
    ]
    if width < 110:
        places = [place for place in places if place[1] or place[0] in ("pending", "in flight", "handled")]
    line = Text(" ledger  ", "bold")
    line.append(f"accepted {total.accepted:,} = ")
    line.append(" + ".join(f"{name} {number:,}" for name, number in places))
    line.append("  ✓ balanced" if view.balanced else "  ✗ NOT BALANCED", "bold green" if view.balanced else "bold red")
    hint = Text(" Ctrl-C ends it cleanly", "bright_black")
    return Group(Text(""), line, hint)
