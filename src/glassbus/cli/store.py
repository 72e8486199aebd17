"""`glassbus health` and `glassbus audit`: a store seen from outside, whoever runs on it."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from glassbus.cli.common import (
    EXIT_NO,
    EXIT_OK,
    add_url,
    count,
    duration,
    equation,
    opened_store,
    paint,
    print_json,
    printable,
    table,
    url_of,
)
from glassbus.policy.ledger import Account, Audit, Ledger
from glassbus.transport import QueueState

_HEALTH_NOTES = """\
This judges the store, not a bus that runs on it: that answers at /readyz.
Exit status: 0 ok or degraded, 1 critical, 2 when the store cannot be opened.
degraded: a subscription is held, or has messages and nobody consumes them. critical: the ledger does not balance.
"""

_AUDIT_NOTES = """\
Recounted, row by row: what is stored (pending, in flight, dead-lettered). Accepted, handled, expired and discarded
are counters, kept in the same transactions as the rows; what is gone cannot be recounted, only checked against them.
Exit status: 0 when every message is accounted for, 1 when not.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    if parser.prog.endswith("health"):
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = _HEALTH_NOTES
        parser.set_defaults(run=health)
    else:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = _AUDIT_NOTES
        parser.set_defaults(run=audit)


# audit


def audit(arguments: argparse.Namespace) -> int:
    found = asyncio.run(_audit(url_of(arguments)))
    if arguments.json:
        print_json(
            {
                "ok": found.ok,
                "problems": list(found.problems),
                "messages": found.messages,
                "unaccounted": found.ledger.unaccounted,
                "total": _account(found.ledger.total),
                "recounted": _account(found.recounted.total),
                "subscriptions": {name: _account(a) for name, a in sorted(found.ledger.accounts.items())},
                "forgotten": _account(found.ledger.gone),
            }
        )
    else:
        _print_audit(found)
    return EXIT_OK if found.ok else EXIT_NO


async def _audit(url: str) -> Audit:
    async with opened_store(url) as store:
        return await store.audit()


def _print_audit(found: Audit) -> None:
    for name, account in sorted(found.ledger.accounts.items()):
        _print_equation(name, account)
    if found.ledger.gone.accepted:
        _print_equation("(forgotten subscriptions)", found.ledger.gone)
    _print_equation("total", found.ledger.total)
    for problem in found.problems:
        print(paint(f"problem: {printable(problem)}", "bad"))
    recounted = f"{count(found.messages, 'stored message')} recounted"
    if found.ok:
        print(paint(f"ok: {recounted}; every delivery is in exactly one place", "good"))
    else:
        print(paint(f"NOT OK: {recounted}; {count(len(found.problems), 'problem')}", "bad"))
    print(paint("recounted: pending, in flight, dead-lettered; counters: accepted, handled, expired, discarded", "dim"))


def _print_equation(name: str, account: Account) -> None:
    mark = (
        paint("balanced", "good") if not account.unaccounted else paint(f"UNACCOUNTED {account.unaccounted:,}", "bad")
    )
    print(f"{paint(name, 'bold')}\n  {equation(account)}  {mark}")


# health


def health(arguments: argparse.Namespace) -> int:
    status, reasons, ledger, queues, took_s = asyncio.run(_health(url_of(arguments)))
    if arguments.json:
        print_json(_health_json(status, reasons, ledger, queues, took_s))
    else:
        _print_health(status, reasons, ledger, queues, took_s)
    return EXIT_NO if status == "critical" else EXIT_OK


async def _health(url: str) -> tuple[str, list[str], Ledger, dict[str, QueueState], float]:
    async with opened_store(url) as store:
        started = time.perf_counter()
        ledger, queues = store.ledger(), store.queues()
        took_s = time.perf_counter() - started
    status, reasons = judge(ledger, queues)
    return status, reasons, ledger, queues, took_s


def judge(ledger: Ledger, queues: dict[str, QueueState]) -> tuple[str, list[str]]:
    """(status, reasons) of a store, from what can be known without being its bus."""
    if not ledger.balanced:
        wrong = [name for name, account in ledger.accounts.items() if account.unaccounted]
        return "critical", [f"the ledger does not balance: {', '.join(wrong) or 'forgotten subscriptions'}"]
    reasons = []
    for name, queue in sorted(queues.items()):
        account = ledger.accounts.get(name, Account())
        if queue.hold.held:
            reasons.append(f"{name} is {_hold(queue)} and keeps {count(account.pending, 'message')}")
        elif account.pending and not queue.consumers:
            reasons.append(f"nobody consumes {name}: {count(account.pending, 'message')} waiting")
    return ("degraded" if reasons else "ok"), reasons


def _hold(queue: QueueState) -> str:
    return "paused" if queue.hold.paused else queue.hold.forced.replace("_", " ")


def _print_health(
    status: str, reasons: list[str], ledger: Ledger, queues: dict[str, QueueState], took_s: float
) -> None:
    style = {"ok": "good", "degraded": "warn"}.get(status, "bad")
    print(f"store: {paint(status, style)}; read in {duration(took_s)}")
    for reason in reasons:
        print(f"  {reason}")
    now = time.time()
    rows = []
    for name, queue in sorted(queues.items()):
        account = ledger.accounts.get(name, Account())
        rows.append(
            [
                name,
                queue.spec.pattern,
                f"{queue.consumers:,}",
                f"{account.pending:,}",
                duration(max(0.0, now - queue.oldest_at)) if queue.oldest_at else "-",
                f"{account.in_flight:,}",
                f"{account.handled:,}",
                f"{account.dead_lettered:,}",
                _hold(queue) if queue.hold.paused or queue.hold.forced else "-",
            ]
        )
    headings = ["subscription", "pattern", "consumers", "waiting", "oldest", "in flight", "handled", "dead", "hold"]
    print(table(rows, headings, frozenset({2, 3, 4, 5, 6, 7})))
    print(f"{equation(ledger.total)}  {'balanced' if ledger.balanced else 'NOT BALANCED'}")


def _health_json(
    status: str, reasons: list[str], ledger: Ledger, queues: dict[str, QueueState], took_s: float
) -> dict[str, Any]:
    return {
        "store": status,
        "reasons": reasons,
        "took_seconds": took_s,
        "balanced": ledger.balanced,
        "total": _account(ledger.total),
        "subscriptions": {
            name: {
                "pattern": queue.spec.pattern,
                "capacity": queue.spec.capacity,
                "capacity_now": queue.capacity,
                "expanded_until": queue.expanded_until or None,
                "consumers": queue.consumers,
                "paused": queue.hold.paused,
                "forced": queue.hold.forced,
                "oldest_at": queue.oldest_at or None,
                "oldest_dead_letter_at": queue.dead_letter_oldest_at or None,
                **_account(ledger.accounts.get(name, Account())),
            }
            for name, queue in sorted(queues.items())
        },
    }


def _account(account: Account) -> dict[str, int]:
    counts = {name: getattr(account, name) for name in Account.__struct_fields__}
    return {**counts, "pending": account.pending, "unaccounted": account.unaccounted}
