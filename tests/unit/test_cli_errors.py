"""`glassbus errors`: what an operator asks of a store whose bus runs, or died, in text, JSON and HTML."""

from __future__ import annotations

import asyncio
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Command, failing, make_store
from journal_kit import Kept, ended, failed

from glassbus import Message, MessageBus, Retry
from glassbus.errors import ErrorCategory, ErrorSeverity
from glassbus.record.report import text_report
from glassbus.record.report_html import html_report
from glassbus.testing import VirtualClock, run_virtual

VERBS = ("list", "stats", "trends", "report")


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store whose bus is gone: three failures of one place, with hostile texts."""
    return make_store(tmp_path / "orders.db", failing("first", "second", "<script>\x1b[31m third"))


@pytest.fixture
def day(tmp_path: Path) -> Path:
    """A day of failures until now: one steady, one that rose, one of long ago, one flood."""
    kept = Kept(tmp_path / "state", flood_per_s=10)
    now = time.time()
    for quarter in range(95, -1, -1):
        at = now - quarter * 900 - 30
        for n in range(10):
            kept.state(failed(at + n, f"steady-{quarter}-{n}", fingerprint="5teady", text="as always"))
        for n in range(80 if quarter == 0 else 4):
            kept.state(failed(at + n / 10, f"rising-{quarter}-{n}", fingerprint="deadbeef01", text="more and more"))
        if quarter > 80:
            kept.state(
                failed(at, f"old-{quarter}", fingerprint="01d", category=ErrorCategory.TIMEOUT_ERROR, text="long ago"),
                ended(at, f"old-{quarter}"),
            )
    for n in range(200):
        kept.state(failed(int(now) - 10 + n / 1000, f"flood-{n}", fingerprint="f100d", severity=ErrorSeverity.CRITICAL))
    assert kept.journal.close(20.0)
    return tmp_path / "state"


def found(glassbus: Command) -> Any:
    return json.loads(glassbus.out)


# list


def test_list_shows_the_newest_first_with_where_and_what(glassbus: Command, url: str) -> None:
    assert glassbus("errors", "list", "--url", url) == 0
    heading, *rows = glassbus.out.splitlines()
    assert heading.split() == ["at", "severity", "category", "where", "message", "attempt", "fingerprint", "error"]
    assert [row.split()[4] for row in rows] == ["m-3", "m-2", "m-1"]
    assert all("medium" in row and "message_processing_error" in row and "charge" in row for row in rows)
    assert "ValueError: <script>\\x1b[31m third" in rows[0]
    assert "\x1b" not in glassbus.out


def test_list_takes_filters(glassbus: Command, day: Path) -> None:
    for words, wanted in (
        (["--fingerprint", "dead", "--since", "5m"], {"deadbeef01"}),
        (["--category", "timeout_error"], {"01d"}),
        (["--severity", "critical"], {"f100d"}),
        (["--message-id", "old-90"], {"01d"}),
        (["--subscription", "nobody"], set()),
        (["--until", "20h", "--since", "21h"], {"5teady", "deadbeef01", "01d"}),
    ):
        assert glassbus("errors", "list", "--state-dir", day, "--json", "--limit", "1000", *words) == 0
        lines = found(glassbus)
        assert {line["report"]["fingerprint"] for line in lines} == wanted, words
    assert glassbus("errors", "list", "--state-dir", day, "--subscription", "nobody") == 0
    assert glassbus.out == "no errors match\n"


def test_a_flood_is_a_row_with_its_number(glassbus: Command, day: Path) -> None:
    assert glassbus("errors", "list", "--state-dir", day, "--severity", "critical") == 0
    assert "(190 more alike)" in glassbus.out
    assert glassbus("errors", "list", "--state-dir", day, "--severity", "critical", "--json") == 0
    assert sum(line["count"] for line in found(glassbus)) == 200


def test_limit_and_until_page_through(glassbus: Command, url: str) -> None:
    assert glassbus("errors", "list", "--url", url, "--limit", "2") == 0
    assert "there may be more: --until" in glassbus.out
    assert len(glassbus.out.splitlines()) == 4


# show


def test_show_tells_a_fingerprint_whole(glassbus: Command, url: str) -> None:
    glassbus("errors", "list", "--url", url, "--json")
    fingerprint = found(glassbus)[0]["report"]["fingerprint"]
    for given in (fingerprint, fingerprint[:6]):
        assert glassbus("errors", "show", given, "--url", url) == 0
        assert f"fingerprint  {fingerprint}" in glassbus.out
        assert "in make_store.<locals>.run.<locals>.charge" in glassbus.out
        assert 'raise ValueError(message.payload["fail"])' in glassbus.out
        assert "new: 3 now" in glassbus.out
        assert "\x1b" not in glassbus.out
    assert glassbus("errors", "show", fingerprint, "--url", url, "--json") == 0
    told = found(glassbus)
    assert told["fingerprints"][0]["count"] == 3
    assert "ValueError" in told["fingerprints"][0]["stack_trace"]


def test_show_takes_a_message_id_and_an_error_id_too(glassbus: Command, url: str) -> None:
    for given in ("m-2", "m-2:charge:0.1"):
        assert glassbus("errors", "show", given, "--url", url) == 0
        assert "ValueError: second" in glassbus.out
        assert "m-3" not in glassbus.out


def test_show_of_what_is_not_there_and_of_what_is_not_clear_is_refused(glassbus: Command, day: Path) -> None:
    assert glassbus("errors", "show", "nothing-like-it", "--state-dir", day) == 2
    assert "no error of nothing-like-it" in glassbus.err
    kept = Kept(day)
    kept.state(failed(time.time(), fingerprint="deadbeef02"))
    kept.journal.close()
    assert glassbus("errors", "show", "deadbeef", "--state-dir", day) == 2
    assert "begins several fingerprints: deadbeef01, deadbeef02" in glassbus.err


# stats, trends, report


def test_stats_count_errors_and_recoveries(glassbus: Command, day: Path) -> None:
    assert glassbus("errors", "stats", "--state-dir", day, "--json") == 0
    counted = found(glassbus)
    total = 96 * 10 + 95 * 4 + 80 + 15 + 200
    assert counted["total_errors"] == total
    assert counted["categories"] == {"connection_error": total - 15, "timeout_error": 15}
    assert counted["recoveries"]["succeeded"] == 15
    assert counted["recovery_success_rate"] == 1.0
    assert glassbus("errors", "stats", "--state-dir", day) == 0
    assert f"{total:,} since" in glassbus.out
    assert "100.0% of 15 attempts succeeded" in glassbus.out


def test_trends_tell_what_rises_and_what_is_gone(glassbus: Command, day: Path) -> None:
    assert glassbus("errors", "trends", "--state-dir", day, "--json") == 0
    told = {one["name"]: one["direction"] for one in found(glassbus)}
    assert told == {
        "deadbeef01": "rising",
        "f100d": "new",
        "5teady": "steady",
        "01d": "gone",
        "connection_error": "rising",
        "timeout_error": "gone",
    }
    assert glassbus("errors", "trends", "--state-dir", day) == 0
    assert re.search(r"▲ rising +deadbeef01 +\d+ +4 ", glassbus.out)
    assert glassbus("errors", "trends", "--state-dir", day, "--until", "2h") == 0
    assert "rising" not in glassbus.out


def test_a_report_is_for_people(glassbus: Command, day: Path) -> None:
    assert glassbus("errors", "report", "--state-dir", day) == 0
    assert "What changes (now is the last" in glassbus.out
    assert "▲ rising  fingerprint  deadbeef01 ConnectionRefusedError: more and more" in glassbus.out
    assert "Most frequent of 4 fingerprints" in glassbus.out


class Page(HTMLParser):
    """What a browser would load or run, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "line", "rect", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(text: str) -> Page:
    """Well-formed, without scripts, and with nothing from elsewhere."""
    page = Page(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "srcset")]
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    assert "default-src 'none'" in text
    return page


def test_the_page_needs_nothing_else_and_runs_nothing(glassbus: Command, day: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    assert glassbus("errors", "report", "--state-dir", day, "--html", target) == 0
    assert glassbus.out == f"wrote {target}\n"
    page = check_page(target.read_text())
    assert "deadbeef01" in page.text
    assert "svg" in page.tags
    assert "▲ rising" in page.text
    assert glassbus("errors", "report", "--state-dir", day, "--html", "-") == 0
    check_page(glassbus.out)


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>\x1b]0;owned\x07\u202e\ud800'


def test_hostile_texts_stay_texts_in_every_report() -> None:
    kept = Kept(None)
    kept.state(
        failed(text=HOSTILE, fingerprint=HOSTILE, exception_type=HOSTILE, category=HOSTILE, severity=HOSTILE),
        failed(text=HOSTILE, fingerprint="other", component=HOSTILE),
    )
    page = check_page(kept.journal.report_html())
    assert "<script>alert(1)</script>" in page.text
    for text in (kept.journal.report_text(), kept.journal.report_html()):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
        text.encode()


def test_a_journal_without_errors_is_reported_as_such() -> None:
    analysis = Kept(None).journal.analysis()
    assert "No errors were recorded" in text_report(analysis)
    assert "No errors were recorded" in check_page(html_report(analysis)).text


# Sources


def test_it_works_while_the_bus_runs(glassbus: Command, tmp_path: Path) -> None:
    async def run() -> list[str]:
        bus = MessageBus(f"sqlite:///{tmp_path}/live.db", telemetry=False)

        @bus.subscribe("orders.*", name="charge", retry=Retry(max_attempts=1))
        async def charge(message: Message[Any]) -> None:
            raise ValueError("while it runs")

        async with bus:
            await bus.publish("orders.created", {}, message_id="m-1")
            await bus.drain()
            await asyncio.to_thread(bus.journal.flush)
            status = await asyncio.to_thread(glassbus, "errors", "list", "--url", f"sqlite:///{tmp_path}/live.db")
            assert status == 0
            return glassbus.out.splitlines()

    assert "while it runs" in asyncio.run(run())[1]


def test_an_empty_store_says_where_the_journal_would_be(glassbus: Command, tmp_path: Path) -> None:
    url = make_store(tmp_path / "orders.db")
    for verb in VERBS:
        assert glassbus("errors", verb, "--url", url) == 0
    assert glassbus("errors", "list", "--url", url) == 0
    assert glassbus.out == f"no errors: {tmp_path}/orders.db.state/journal is made at the first one\n"
    assert not (tmp_path / "orders.db.state").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_what_cannot_be_read_is_one_line_and_status_2(
    glassbus: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    for words, why in (
        ([], "no store named"),
        (["--url", "memory://"], "memory:// lives inside the process"),
        (["--url", f"sqlite:///{tmp_path}/none.db"], "there is no store"),
        (["--url", "nats://localhost"], "give --state-dir"),
        (["--state-dir", tmp_path / "none"], "there is no folder"),
        (["--state-dir", tmp_path, "--url", "memory://"], "not both"),
    ):
        assert glassbus("errors", verb, *words) == 2, words
        assert why in glassbus.err
        assert glassbus.err.count("\n") == 1
    assert glassbus("errors", "report", "--state-dir", tmp_path, "--html", tmp_path / "no" / "where.html") == 2
    assert "cannot write" in glassbus.err


def test_what_is_missing_is_noted(glassbus: Command, day: Path) -> None:
    (newest,) = (day / "journal").glob("*.jsonl")
    with newest.open("ab") as file:
        file.write(b'{"kind":"lost","at":1.0,"count":7}\n{"kind":"fact","numb')
    assert glassbus("errors", "stats", "--state-dir", day) == 0
    assert "note: 7 entries never reached the disk" in glassbus.err
    assert "note: 1 torn lines were passed over" in glassbus.err
    assert glassbus("errors", "report", "--state-dir", day) == 0
    assert "Not complete:" in glassbus.out


def test_lines_that_count_wildly_break_nothing(glassbus: Command, day: Path) -> None:
    (newest,) = (day / "journal").glob("*.jsonl")
    report = '{"error_id":"e","timestamp":1,"category":"c","severity":"s","message":"m","fingerprint":"wild"}'
    with newest.open("a") as file:
        for count, at in ((10**9, time.time()), (2**63, time.time()), (-5, 1.0), (3, -1e300), (3, 1e300)):
            line = f'"at":{at},"since":{at},"fact":"AttemptFailed","count":{count},"error":true,"report":{report}'
            file.write(f'{{"kind":"flood",{line}}}\n')
    for verb in VERBS:
        assert glassbus("errors", verb, "--state-dir", day) == 0, glassbus.err
    assert glassbus("errors", "show", "wild", "--state-dir", day) == 0, glassbus.err
    assert "1,000,000,000; first" in glassbus.out
    assert "4 torn lines" in glassbus.err


def test_in_virtual_time_the_journal_has_the_times_of_the_bus(tmp_path: Path) -> None:
    async def run(_clock: VirtualClock) -> list[float]:
        bus = MessageBus(f"sqlite:///{tmp_path}/v.db", telemetry=False)

        @bus.subscribe("orders.*", name="charge", retry=Retry(max_attempts=3, base_delay=60.0))
        async def charge(message: Message[Any]) -> None:
            raise ValueError("x")

        async with bus:
            await bus.publish("orders.created", {}, message_id="m-1")
            await bus.drain()
        return [entry.at for entry in bus.journal.story("m-1")]

    times = run_virtual(run)
    assert times == sorted(times)
    assert times[0] >= 1_700_000_000
