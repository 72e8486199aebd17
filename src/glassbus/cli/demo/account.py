"""The closing account: what came in, what became of it, and the proof that nothing is missing."""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import Protocol

import msgspec

from glassbus.bus import MessageBus
from glassbus.cli.common import count, duration, equation, opened_store, own_command, paint, printable
from glassbus.cli.demo.feed import Spiced
from glassbus.cli.demo.state import Demo
from glassbus.cli.demo.strike import Strike
from glassbus.cli.demo.watch import Opening, Site, Watch
from glassbus.config import addresses, default_state_dir
from glassbus.policy.ledger import Account, Audit, Ledger

_SITES_SHOWN = 5
_STOP_MAX_S = 5.0


class Closing(msgspec.Struct, frozen=True, kw_only=True):
    """What `print_account` tells. `run` counts this run alone, `ledger` is all that the store ever took."""

    balanced: bool
    why_ended: str
    elapsed_s: float
    intake_s: float
    feed: Spiced
    unusable: int
    first_unusable: str
    watch: Watch
    before: Ledger
    ledger: Ledger
    audit: Audit
    url: str
    durable: bool
    log: Path
    strike: Strike | None = None

    @property
    def as_it_must(self) -> bool:
        """Whether a fault that was asked for had the consequences it must have."""
        if self.strike is None:
            return True
        result = self.strike.result
        return result is not None and not result.missing and result.balanced


class Ran(Protocol):
    """The demo that ran."""

    bus: MessageBus
    demo: Demo
    feed: Spiced
    watch: Watch
    url: str
    log: Path
    why_ended: str
    unusable: int
    first_unusable: str
    strike: Strike | None


async def close_account(ran: Ran) -> Closing:
    """Stop the bus and count. A store on disk is opened afresh for that: what counts is what is stored."""
    durable = addresses(ran.url)[0].scheme != "memory"
    if durable:
        await ran.bus.stop(_STOP_MAX_S)
        async with opened_store(ran.url) as store:
            ledger, audit = store.ledger(), await store.audit()
    else:
        ledger, audit = ran.bus.ledger(), await ran.bus.audit()
        await ran.bus.stop(_STOP_MAX_S)
    return Closing(
        balanced=ledger.balanced and audit.ok,
        why_ended=ran.why_ended or "the bus stopped by itself",
        elapsed_s=time.monotonic() - ran.demo.started,
        intake_s=ran.demo.intake_s,
        feed=ran.feed,
        unusable=ran.unusable,
        first_unusable=ran.first_unusable,
        watch=ran.watch,
        before=ran.demo.before,
        ledger=ledger,
        audit=audit,
        url=ran.url,
        durable=durable,
        log=ran.log,
        strike=ran.strike,
    )


def print_account(closing: Closing, traces: str) -> None:
    """The account on stdout. `traces` says where they went, if anywhere."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for heading, text, style in _lines(closing, traces):
        lines = [text] if style == "copy" else textwrap.wrap(text, max(40, width - 12), break_on_hyphens=False) or [""]
        for number, line in enumerate(lines):
            name = paint(f"{'' if number else heading:<10}", "bold")
            print(f"{name} {paint(line, style)}".rstrip())


#: (heading, text, style); what is in the style "copy" is not wrapped, so that it can be copied.
Told = tuple[str, str, str]


def _lines(c: Closing, traces: str) -> list[Told]:
    run = _less(c.ledger.total, c.before.total)
    watch = c.watch
    told: list[Told] = [("", "", ""), ("ended", f"by {c.why_ended} after {duration(c.elapsed_s)}", "")]
    told += _input(c)
    told.append(("accepted", count(run.accepted, "delivery", "deliveries"), ""))
    left_before = c.before.total.pending + c.before.total.in_flight
    if left_before:
        given_again = f", {watch.redelivered:,} of them of a process that died" if watch.redelivered else ""
        told.append(("", f"{count(left_before, 'delivery', 'deliveries')} of an earlier run taken up{given_again}", ""))
    settled = run.handled + run.dead_lettered + run.expired
    share = f" ({run.handled / settled:.2%} of those settled)" if settled > 0 else ""
    told.append(("handled", f"{run.handled:,}{share}", ""))
    retries = count(sum(watch.retries.values()), "retry", "retries")
    told.append(("failed", f"{count(watch.failed, 'attempt')}, {watch.timeouts:,} by timeout; {retries}", ""))
    slowest = f", the slowest {duration(watch.slowest_recovery_s)} after its first failure" if watch.recovered else ""
    told.append(("recovered", f"{count(watch.recovered, 'delivery', 'deliveries')}{slowest}", ""))
    told += _dead(run, watch)
    told += _breakers(watch.openings)
    if c.strike is not None:
        told += [("fault" if not number else "", *line) for number, line in enumerate(c.strike.told())]
    left = c.ledger.total.pending + c.ledger.total.in_flight
    if left and c.durable:
        where = ", ".join(
            f"{n} {a.pending + a.in_flight:,}" for n, a in c.ledger.accounts.items() if a.pending + a.in_flight
        )
        told.append(("left", f"{count(left, 'delivery', 'deliveries')} for the next run: {where}", "warn"))
    told += _proof(c)
    return told + _where(c, traces)


def _input(c: Closing) -> list[Told]:
    feed = c.feed.feed
    rounds = f", read {feed.rounds + 1} times over" if feed.rounds else ""
    source = f"{count(c.feed.records, 'record')} from {printable(feed.name, 200)}{rounds}, in {duration(c.intake_s)}"
    told = [("input", f"{source}; {c.feed.added:,} odd ones added", "")]
    if feed.bad or c.unusable:
        bad = feed.bad + c.unusable
        first = printable(feed.first_bad or c.first_unusable, 200)
        told.append(("", f"{count(bad, 'line')} could not be used; the first: {first}", "warn"))
    if c.watch.unrouted or c.watch.duplicates:
        duplicates = count(c.watch.duplicates, "duplicate")
        told.append(("", f"{c.watch.unrouted:,} unrouted (nobody subscribes), {duplicates} recognised", ""))
    return told


def _dead(run: Account, watch: Watch) -> list[Told]:
    told: list[Told] = [("dead", count(run.dead_lettered, "dead letter"), "bad" if run.dead_lettered else "good")]
    sites = sorted((site for site in watch.sites.values() if site.dead), key=_dead_of, reverse=True)
    told += [
        ("", f"{site.dead:,} x {site.subscription}: {site.text} [{site.fingerprint}]", "")
        for site in sites[:_SITES_SHOWN]
    ]
    elsewhere = run.dead_lettered - sum(site.dead for site in watch.sites.values())
    if elsewhere > 0:
        told.append(("", f"{elsewhere:,} by other processes", ""))
    if len(sites) > _SITES_SHOWN:
        told.append(("", f"and {count(len(sites) - _SITES_SHOWN, 'other failure')}", ""))
    return told


def _dead_of(site: Site) -> int:
    return site.dead


def _breakers(openings: list[Opening]) -> list[Told]:
    if not openings:
        return [("breakers", "none opened", "")]
    told = []
    for opening in openings[-_SITES_SHOWN:]:
        if opening.closed_at is None:
            ended = "still open at the end"
        else:
            ended = f"healed after {duration(opening.closed_at - opening.opened_at)}"
        at = time.strftime("%H:%M:%S", time.localtime(opening.opened_at))
        told.append(("", f"{opening.breaker} opened at {at} ({opening.reason}), {ended}", ""))
    return [("breakers", told[0][1], ""), *told[1:]]


def _proof(c: Closing) -> list[Told]:
    verdict = "✓ balanced" if c.ledger.balanced else f"✗ NOT BALANCED: {c.ledger.unaccounted:,} unaccounted"
    style = "good" if c.ledger.balanced else "bad"
    told: list[Told] = [("ledger", equation(c.ledger.total), ""), ("", verdict, style)]
    if c.audit.ok:
        told.append(
            ("audit", f"✓ every row recounted ({count(c.audit.messages, 'message')} kept), nothing missing", "good")
        )
    told += [("audit", f"✗ {printable(problem, 300)}", "bad") for problem in c.audit.problems[:10]]
    return told


def _where(c: Closing, traces: str) -> list[Told]:
    told: list[Told] = [("log", str(c.log), "copy")]
    if traces:
        told.append(("traces", traces, ""))
    if c.durable:
        told.append(("store", c.url, "copy"))
        beside = default_state_dir(addresses(c.url)) is not None
        asks = ["dlq list", *(("escalations list", "errors report") if beside else ()), "audit", "demo"]
        commands = [f"{own_command()} {ask} --url {shlex.quote(c.url)}" for ask in asks]
        told += [("next" if not number else "", command, "copy") for number, command in enumerate(commands)]
    return told


def _less(total: Account, before: Account) -> Account:
    return Account(*(getattr(total, name) - getattr(before, name) for name in Account.__struct_fields__))
