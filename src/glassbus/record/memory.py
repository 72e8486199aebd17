"""About how much memory records take, from a sample of them: for a gauge that is read every few seconds."""

from __future__ import annotations

import sys
from collections import deque

from glassbus import facts as f
from glassbus.errors import ErrorReport
from glassbus.record.entries import Record

_SAMPLE = 32
#: Facts whose report nothing newer in the ring refers to for the first time.
_OWN = (f.AttemptFailed, f.DeliveryDeadLettered)


def about_bytes(ring: deque[Record], more: int = 0) -> int:
    """What the records of `ring` take, and `more` like them. Reports that several records share are counted once."""
    length = len(ring)
    if not length:
        return 0
    step = max(1, length // _SAMPLE)
    sample = [ring[place] for place in range(0, length, step)]
    return sum(map(_bytes, sample)) * (length + more) // len(sample)


def _bytes(record: Record) -> int:
    report, kept = record[6], record[7]
    size = sys.getsizeof(record) + sys.getsizeof(record[1]) + sys.getsizeof(record[3]) + 32
    if record[11] is not None:
        size += sys.getsizeof(record[11]) + 24
    if type(kept) is tuple:
        size += sys.getsizeof(kept) + sum(sys.getsizeof(value) for value in kept if type(value) in (str, float))
    if report is not None and (record[10] or record[2] in _OWN):
        size += _report_bytes(report)
    return size


def _report_bytes(report: ErrorReport) -> int:
    """Without its stack, which all reports of a site share."""
    texts = sys.getsizeof(report.error_id) + sys.getsizeof(report.message)
    return sys.getsizeof(report) + texts + sys.getsizeof(report.context) + 64
