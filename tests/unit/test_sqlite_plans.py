"""What runs for every batch finds its rows by index, however many there are."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from glassbus.transport.sqlite import claiming, overflowing, publishing, reading, settling, transaction, upkeep
from glassbus.transport.sqlite.store import Store

IDS = apsw.carray(array("q", [1]))
NAMES = apsw.carray(("a",))
STATEMENTS = {
    "ready deliveries of a priority": (claiming._READY, (1, 1, 0, 0, 10)),
    "priorities with ready deliveries": (claiming._FILLED, (1,)),
    "suspects": (claiming._SUSPECTS, (1,)),
    "keys in flight": (claiming._IN_FLIGHT_KEYS, (1, NAMES)),
    "keys tried before": (claiming._TRIED_KEYS, (1, NAMES)),
    "take": (claiming._TAKE, (1, IDS)),
    "claimed deliveries": (transaction._BY_IDS, (IDS,)),
    "the next of a key": (transaction._FREE_KEY, (1, "k")),
    "messages that end": (transaction._DROP, (IDS, 0.0, 0)),
    "messages that end and are remembered": (transaction._BURY, (IDS, 0, 0.0, 0.0)),
    "known ids": (publishing._KNOWN, (NAMES,)),
    "handled deliveries": (settling._END, (IDS, 1)),
    "ours": (settling._OURS, (IDS, 1)),
    "due": (upkeep._DUE, (2, 0.0)),
    "try again": (upkeep._TRY_AGAIN, (1, 0.0)),
    "scheduled": (upkeep._MAKE_READY, (0.0,)),
    "next due": (upkeep._NEXT, ()),
    "overdue": (upkeep._OVERDUE, (0.0, 10)),
    "of a lost owner": (upkeep._TAKE_BACK, (1, 1)),
    "old ids": (upkeep._OVER, (0.0, 10)),
    "last in line, ready": (overflowing._READY_BACK, (1, 0, 0, True, 10)),
    "last in line, timed": (overflowing._TIMED_BACK, (1, 0, True, 10)),
    "places of what gives way": (overflowing._PLACES, (IDS,)),
    "what gives way": (overflowing._BURY, (IDS,)),
    "queues": (reading._QUEUES, ()),
    "accounts": (reading._ACCOUNTS, ()),
}


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[apsw.Connection]:
    store = Store(tmp_path_factory.mktemp("plans") / Path("store.db"), "process")
    store.open()
    with closing(store):
        yield store.connection


@pytest.mark.parametrize("name", STATEMENTS)
def test_no_statement_scans_deliveries_or_messages(connection: apsw.Connection, name: str) -> None:
    sql, values = STATEMENTS[name]
    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
    aliases = ("deliveries", "messages", "d", "m", "r", "x", "o")
    scans = [step for step in plan if step.startswith("SCAN ") and step.split()[1] in aliases]
    # A scan of a partial index looks at its few rows only.
    assert not [step for step in scans if "INDEX" not in step], plan
    assert not [step for step in plan if "FOR ORDER BY" in step], plan
