"""Feed the records of errors millions of them, and measure what memory they take.

    python -m tests.simulation.error_soak --errors 10000000

Each error is made as the bus makes it: an exception raised at one of many places, described by `FailureSites`, stated
to the journal as AttemptFailed with the decision about it, and written to disk in the background as usual. Some
fingerprints are constant, one is a flood, some come and go, so that every bound is reached. The time is made up: a
thousand errors a second. Memory is measured at every tenth, less what there was before the first error: the resident
set, or with `--trace` what tracemalloc says, which is exact and twenty times as slow. Ends with status 1 when error
state reaches 20 MB or still grows in the second half.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from glassbus.errors import ErrorCategory, ErrorReport, ErrorSeverity
from glassbus.facts import AttemptFailed, Delivery, DeliveryDeadLettered, RecoveryEnded, RetryScheduled
from glassbus.message import Envelope
from glassbus.record.fingerprint import FailureSites
from glassbus.record.journal import Journal

LIMIT_BYTES = 20 * 1024 * 1024
PER_SECOND = 1000
_SITES = 200


def _failing_places() -> list[BaseException]:
    """One exception from each of many places in the code, with its traceback."""
    kinds = (ConnectionError, TimeoutError, ValueError, KeyError, PermissionError, OSError, MemoryError, TypeError)
    made: list[BaseException] = []
    for place in range(_SITES):
        source = "\n" * place + "def fail():\n    raise kind('the service said no')\nfail()\n"
        try:
            exec(compile(source, f"shop_{place % 20}.py", "exec"), {"kind": kinds[place % len(kinds)]})  # noqa: S102
        except Exception as error:
            made.append(error)
    return made


class Soak:
    """Makes errors and states them to a journal in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.now = 1_700_000_000.0
        self.journal = Journal(state_dir=str(folder), wall=lambda: self.now)
        self.sites = FailureSites()
        self._places = _failing_places()

    def error(self, number: int) -> None:
        self.now += 1 / PER_SECOND
        if number % PER_SECOND == 0:
            self.journal.look()
        envelope = Envelope(f"message-{number}", "orders.created", b"", "json", {}, published_at=self.now)
        subscription = f"subscription-{number % 7}"
        delivery = Delivery(envelope, subscription, "orders.*", 1 + number % 3, first_failed_at=self.now)
        report = self._report(number, envelope, delivery)
        fact = AttemptFailed(at=self.now, delivery=delivery, report=report, duration_s=0.01)
        self.journal.on_fact(fact)
        if number % 3:
            self.journal.on_fact(
                RecoveryEnded(
                    at=self.now,
                    delivery=delivery,
                    category=report.category,
                    action="delayed_retry",
                    outcome="succeeded" if number % 2 else "failed",
                    duration_s=1.5,
                )
            )
        if number % 3 == 2:
            self.journal.on_fact(
                DeliveryDeadLettered(at=self.now, delivery=delivery, report=report, reason="attempts_spent")
            )
        else:
            self.journal.on_fact(
                RetryScheduled(
                    at=self.now, delivery=delivery, report=report, action="delayed_retry", delay_s=1.0, next_attempt=2
                )
            )

    def _report(self, number: int, envelope: Envelope, delivery: Delivery) -> ErrorReport:
        context = {"message_id": envelope.id, "topic": envelope.topic, "subscription": delivery.subscription}
        error_id = f"{envelope.id}:{delivery.subscription}:0.{delivery.attempt}"
        if number % 50:
            report = self.sites.describe(
                self._places[0 if number % 4 == 0 else number % _SITES],
                error_id=error_id,
                at=self.now,
                component="handler",
                context={**context, "attempt": delivery.attempt},
            )
            report.message = f"{report.message}: order {number} of customer {number % 977} " + "x" * (number % 120)
            return report
        # A fingerprint that is seen for a while and never again, as code changes.
        return ErrorReport(
            error_id=error_id,
            timestamp=self.now,
            category=list(ErrorCategory)[number % 8],
            severity=list(ErrorSeverity)[number % 4],
            message=f"rare {number}",
            exception_type=f"shop.Rare{number // 500}",
            stack_trace=f'  File "shop.py", line {number // 500}\nshop.Rare{number // 500}',
            context=context,
            fingerprint=f"{number // 500:016x}",
        )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def traced_bytes() -> int:
    return tracemalloc.get_traced_memory()[0]


def run(errors: int, folder: Path, *, trace: bool, say: Callable[[str], None]) -> list[int]:
    """Bytes of error state at every tenth."""
    if trace:
        tracemalloc.start()
    measure = traced_bytes if trace else resident_bytes
    soak = Soak(folder)
    gc.collect()
    before = measure()
    measured: list[int] = []
    started = time.monotonic()
    say(f"{'errors':>12} {'error state':>12} {'estimate':>10} {'each':>9}")
    for number in range(1, errors + 1):
        soak.error(number)
        if number % max(1, errors // 10) == 0:
            gc.collect()
            measured.append(measure() - before)
            estimate = soak.journal.memory_bytes() + soak.sites.memory_bytes()
            each_us = (time.monotonic() - started) / number * 1e6
            say(f"{number:>12,} {measured[-1] / 2**20:>9.1f} MB {estimate / 2**20:>7.1f} MB {each_us:>6.1f} us")
    if trace:
        tracemalloc.stop()
    counted = soak.journal.statistics()
    assert counted["total_errors"] == errors, counted["total_errors"]
    known = sum(soak.journal.fingerprints.values())
    assert known + counted["other_fingerprints"] == errors, "every error belongs to a fingerprint"
    soak.journal.close(30.0)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(f"on disk {size / 2**20:.1f} MB; journal {counted['journal']}; fingerprints {counted['fingerprints']:,}")
    return measured


def problems_of(measured: list[int]) -> list[str]:
    """What breaks the promise: below 20 MB, and flat in the second half."""
    found = []
    if max(measured) >= LIMIT_BYTES:
        found.append(f"error state takes {max(measured) / 2**20:.1f} MB, not below {LIMIT_BYTES / 2**20:.0f}")
    half = len(measured) // 2
    if max(measured[half:]) > 1.1 * max(measured[:half]):
        found.append("error state still grows in the second half")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", type=int, default=10_000_000)
    parser.add_argument("--trace", action="store_true", help="measure with tracemalloc instead of the resident set")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory() as folder:
        problems = problems_of(run(arguments.errors, Path(folder), trace=arguments.trace, say=say))
    for problem in problems:
        say(f"NOT OK: {problem}")
    if not problems:
        say("ok: error state is flat, and below its limit")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
