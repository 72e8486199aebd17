"""Durable floors and peers: fsync itself, sqlite3, persist-queue, huey. A file of its own for each round."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.rows import PAYLOAD, Row, Run, Sample, Stopwatch, Tally, Wrong, peer


@contextlib.contextmanager
def fresh(run: Run) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="row-", dir=run.folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def fsync_rate(run: Run) -> Sample:
    """4 KiB appended and fsynced, one after the other: what one durable step costs on this disk."""
    block = b"\0" * 4096
    count = run.count(2_000)
    with fresh(run) as folder:
        file = os.open(folder / "appended", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        try:
            with Stopwatch() as watch:
                for _ in range(count):
                    os.write(file, block)
                    os.fsync(file)
        finally:
            os.close(file)
    return watch.throughput(count)


def raw_sqlite(run: Run) -> Sample:
    """The interpreter's sqlite3, WAL and FULL: one transaction to publish, one to acknowledge."""
    json = peer("json")
    count = run.count(1_500)
    with fresh(run) as folder, contextlib.closing(sqlite3.connect(folder / "raw.db", isolation_level=None)) as db:
        db.execute("pragma journal_mode=wal")
        db.execute("pragma synchronous=full")
        db.execute("create table messages (id integer primary key, topic text not null, body blob not null)")
        handled = 0
        with Stopwatch() as watch:
            for _ in range(count):
                body = json.dumps(PAYLOAD).encode()
                db.execute("begin immediate")
                db.execute("insert into messages (topic, body) values ('orders.created', ?)", (body,))
                db.execute("commit")
                rowid, body = db.execute("select id, body from messages order by id limit 1").fetchone()
                json.loads(body)
                handled += 1
                db.execute("begin immediate")
                db.execute("delete from messages where id = ?", (rowid,))
                db.execute("commit")
        left = db.execute("select count(*) from messages").fetchone()[0]
    if left or handled != count:
        raise Wrong(f"{handled} of {count} handled, {left} left")
    return watch.throughput(count)


def persist_queue(run: Run) -> Sample:
    queue_class = peer("persistqueue").SQLiteAckQueue
    count = run.count(1_000)
    with fresh(run) as folder:
        queue = queue_class(str(folder / "queue"), multithreading=True)
        with Stopwatch() as watch:
            for _ in range(count):
                queue.put(PAYLOAD)
                queue.ack(queue.get())
        left, acked = queue.active_size(), queue.acked_count()
        queue.close()
    if left or acked != count:
        raise Wrong(f"{acked} of {count} acknowledged, {left} left")
    return watch.throughput(count)


def huey_sqlite(run: Run) -> Sample:
    huey_class = peer("huey").SqliteHuey
    count = run.count(1_000)
    tally = Tally()
    with fresh(run) as folder:
        huey = huey_class("bench", filename=str(folder / "huey.db"), fsync=True, results=False)

        def handler(_payload: dict[str, Any]) -> None:
            tally.hit()

        task = huey.task()(handler)
        with Stopwatch() as watch:
            for _ in range(count):
                task(PAYLOAD)
                huey.execute(huey.dequeue())
        left = huey.pending_count()
        huey.storage.close()
    tally.check(count)
    if left:
        raise Wrong(f"{left} left")
    return watch.throughput(count)


def group_commit(run: Run, publishers: int = 256) -> Sample:
    """A hand-written group commit on sqlite3: what a bus without any contract could do here.

    `publishers` wait for each commit; what was delivered is deleted in the next one.
    """
    json = peer("json")
    count = run.count(40_000, publishers)
    with fresh(run) as folder, contextlib.closing(sqlite3.connect(folder / "raw.db", isolation_level=None)) as db:
        db.execute("pragma journal_mode=wal")
        db.execute("pragma synchronous=full")
        db.execute("create table messages (id integer primary key, topic text not null, body blob not null)")
        acks: list[tuple[int]] = []
        handled = 0
        with Stopwatch() as watch:
            for start in range(0, count + publishers, publishers):
                bodies = [(json.dumps(PAYLOAD).encode(),) for _ in range(publishers)] if start < count else []
                db.execute("begin immediate")
                db.executemany("insert into messages (topic, body) values ('orders.created', ?)", bodies)
                db.executemany("delete from messages where id = ?", acks)
                db.execute("commit")
                acks = []
                for rowid, body in db.execute("select id, body from messages order by id limit ?", (publishers,)):
                    json.loads(body)
                    handled += 1
                    acks.append((rowid,))
        left = db.execute("select count(*) from messages").fetchone()[0]
    if left or handled != count:
        raise Wrong(f"{handled} of {count} handled, {left} left")
    return watch.throughput(count)


FLOOR = Row("4 KiB append + fsync", fsync_rate, "the unit of the target; no message handled")
PEERS = (
    Row("sqlite3 FULL, batches of 256", group_commit, "no contract: the commits alone"),
    Row("sqlite3 FULL, one transaction each", raw_sqlite, "publish and ack; 2 commits a message"),
    Row("persist-queue SQLiteAckQueue", persist_queue, "put, get, ack; 3 commits a message"),
    Row("huey SqliteHuey fsync=True", huey_sqlite, "deleted before it runs: at most once"),
)
