"""The demo as plain lines, for a pipe, a log or a screen reader: one a second, and the news that matter."""

from __future__ import annotations

from glassbus.cli.demo.state import Demo
from glassbus.cli.demo.watch import News

_MARKS = {"good": "+", "warn": "!", "bad": "x", "dim": "-"}


class Lines:
    """Prints. Repeated news are printed the first time; the closing account counts them."""

    interval_s = 1.0

    def __init__(self, demo: Demo) -> None:
        self._demo = demo
        demo.watch.on_news = self._news

    def start(self) -> None:
        print(f"glassbus demo on {self._demo.url}, input: {self._demo.feed.feed.name}", flush=True)
        for note in self._demo.notes:
            print(f"  {note}", flush=True)

    def show(self) -> None:
        view = self._demo.view()
        total = view.total
        waiting = "" if view.phase == "running" else f" {view.phase}"
        print(
            f"{view.elapsed_s:7.1f} s {view.health}{waiting}: {view.records:,} in, {view.handled:,} handled "
            f"({view.rate:,.0f}/s), {total.in_flight:,} in flight, {total.pending:,} waiting, "
            f"{sum(row.retries for row in view.rows):,} retries, {total.dead_lettered:,} dead; "
            f"ledger {'balanced' if view.balanced else 'NOT BALANCED'}",
            flush=True,
        )

    def stop(self) -> None:
        self._demo.watch.on_news = None

    def _news(self, news: News) -> None:
        at_s = news.at - self._demo.started_wall
        print(f"{max(0.0, at_s):7.1f} s   {_MARKS[news.mood]} {news.text}", flush=True)
