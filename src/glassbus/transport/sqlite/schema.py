"""The tables of a Glassbus store, and how an older store becomes a current one.

    subscriptions 1 ─── n deliveries n ─── 1 messages
                              1
                              └── 0..1 dead_letters

A message's `seq` is also the id of its first delivery; its `fanout` deliveries have
the ids `seq .. seq + fanout - 1`. Ids come from one counter (`meta.next_id`) and are
never used twice, so their order is the order of acceptance. State changes touch the
small delivery rows only; bodies are written once and deleted once.
"""

from __future__ import annotations

from collections.abc import Sequence

import apsw

from glassbus.errors import StoreCorrupt, StoreTooNew
from glassbus.transport.sqlite.sql import value

#: Marks a file as ours in its header: "glbs".
APPLICATION_ID = 0x676C6273

#: The counts of `policy.ledger.Account`, in its order; columns of `subscriptions`.
COUNTS = (
    "accepted",
    "ready",
    "scheduled",
    "retrying",
    "in_flight",
    "handled",
    "dead_lettered",
    "expired",
    "discarded",
)

#: Where a ready delivery waits. FREE may be claimed; KEYED waits for its key; SUSPECT
#: is claimed alone, because its last owner died or lost its lease.
FREE, KEYED, SUSPECT = 0, 1, 2

#: `deliveries.suspect`: 0, or why the delivery is given again.
REDELIVERED = ("", "owner_died", "lease_expired")

_V1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO meta VALUES
  ('next_id', 1), ('generation', 0), ('boot_id', ''), ('watermark', 0), ('watermark_until', 0.0), ('probe', 0);

CREATE TABLE subscriptions (
  id            INTEGER PRIMARY KEY AUTOINCREMENT,
  name          TEXT    NOT NULL UNIQUE,
  pattern       TEXT    NOT NULL,
  capacity      INTEGER NOT NULL,
  strict_key    INTEGER NOT NULL,
  paused        INTEGER NOT NULL DEFAULT 0,
  forced        TEXT    NOT NULL DEFAULT '',
  accepted      INTEGER NOT NULL DEFAULT 0,
  ready         INTEGER NOT NULL DEFAULT 0,
  scheduled     INTEGER NOT NULL DEFAULT 0,
  retrying      INTEGER NOT NULL DEFAULT 0,
  in_flight     INTEGER NOT NULL DEFAULT 0,
  handled       INTEGER NOT NULL DEFAULT 0,
  dead_lettered INTEGER NOT NULL DEFAULT 0,
  expired       INTEGER NOT NULL DEFAULT 0,
  discarded     INTEGER NOT NULL DEFAULT 0,
  keyed         INTEGER NOT NULL DEFAULT 0,  -- of the ready ones, those that wait for their key
  suspects      INTEGER NOT NULL DEFAULT 0   -- of the ready ones, those that are claimed alone
) STRICT;

-- What forgotten subscriptions left in the ledger.
CREATE TABLE gone (
  id        INTEGER PRIMARY KEY CHECK (id = 0),
  accepted  INTEGER NOT NULL,
  handled   INTEGER NOT NULL,
  expired   INTEGER NOT NULL,
  discarded INTEGER NOT NULL
) STRICT;
INSERT INTO gone VALUES (0, 0, 0, 0, 0);

-- body NULL: settled, and kept only so that the id is recognised until remember_until.
CREATE TABLE messages (
  seq            INTEGER PRIMARY KEY,
  id             TEXT    NOT NULL UNIQUE,
  topic          TEXT    NOT NULL,
  codec          TEXT    NOT NULL,
  headers        TEXT,
  body           BLOB,
  priority       INTEGER NOT NULL,
  key            TEXT,
  published_at   REAL    NOT NULL,
  due_at         REAL    NOT NULL DEFAULT 0,
  expires_at     REAL    NOT NULL DEFAULT 0,
  fanout         INTEGER NOT NULL DEFAULT 1,
  remember_until REAL    NOT NULL DEFAULT 0,
  digest         BLOB,
  routed         TEXT
) STRICT;
CREATE INDEX messages_remembered ON messages (remember_until) WHERE remember_until > 0;

-- due: monotonic seconds while retrying, wall seconds while scheduled.
-- position: place in the queue; the id at first, behind all that is there after a delayed retry.
CREATE TABLE deliveries (
  id              INTEGER PRIMARY KEY,
  message         INTEGER NOT NULL,
  subscription    INTEGER NOT NULL,
  state           INTEGER NOT NULL,
  lane            INTEGER NOT NULL DEFAULT 0,
  priority        INTEGER NOT NULL,
  key             TEXT,
  attempt         INTEGER NOT NULL DEFAULT 0,
  owner           INTEGER,
  due             REAL,
  expires_at      REAL    NOT NULL DEFAULT 0,
  suspect         INTEGER NOT NULL DEFAULT 0,
  first_failed_at REAL    NOT NULL DEFAULT 0,
  recovering      TEXT,
  replays         INTEGER NOT NULL DEFAULT 0,
  position        INTEGER NOT NULL
) STRICT;
CREATE INDEX deliveries_ready    ON deliveries (subscription, lane, priority, position, id) WHERE state = 0;
CREATE INDEX deliveries_due      ON deliveries (state, due) WHERE due IS NOT NULL;
CREATE INDEX deliveries_held     ON deliveries (owner, id) WHERE state = 3;
CREATE INDEX deliveries_keys     ON deliveries (subscription, key, state, lane, priority, id) WHERE key IS NOT NULL;
CREATE INDEX deliveries_expiring ON deliveries (expires_at) WHERE expires_at > 0 AND state < 3;

CREATE TABLE dead_letters (
  id             INTEGER PRIMARY KEY AUTOINCREMENT,
  delivery       INTEGER NOT NULL UNIQUE,
  subscription   INTEGER NOT NULL,
  category       TEXT    NOT NULL,
  exception_type TEXT    NOT NULL,
  fingerprint    TEXT    NOT NULL,
  reason         TEXT    NOT NULL,
  died_at        REAL    NOT NULL,
  report         TEXT    NOT NULL
) STRICT;
CREATE INDEX dead_letters_of ON dead_letters (subscription, died_at);

CREATE TABLE owners (
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  token       TEXT    NOT NULL UNIQUE,
  boot_id     TEXT    NOT NULL,
  pid         INTEGER NOT NULL,
  lease_until REAL    NOT NULL  -- monotonic seconds of boot_id
) STRICT;
CREATE TABLE consumers (
  subscription INTEGER NOT NULL,
  owner        INTEGER NOT NULL,
  PRIMARY KEY (subscription, owner)
) STRICT, WITHOUT ROWID;
"""

# The overflow ladder. expanded_until: wall seconds; 0 while the capacity is the declared one. The index is for what
# waits for a retry or its time, which no other one finds by subscription.
_V2 = """
ALTER TABLE subscriptions ADD COLUMN displace INTEGER NOT NULL DEFAULT 1;
ALTER TABLE subscriptions ADD COLUMN expand REAL NOT NULL DEFAULT 1.5;
ALTER TABLE subscriptions ADD COLUMN expand_for REAL NOT NULL DEFAULT 60.0;
ALTER TABLE subscriptions ADD COLUMN expanded_until REAL NOT NULL DEFAULT 0.0;
CREATE INDEX deliveries_timed ON deliveries (subscription, priority, id) WHERE state IN (1, 2);
"""

#: Scripts in order: number n turns a store of version n - 1 into one of version n.
MIGRATIONS: tuple[str, ...] = (_V1, _V2)


def identify(connection: apsw.Connection, path: str, newest: int = len(MIGRATIONS)) -> int:
    """The version of the store behind `connection`: 0 for an empty file. Writes nothing.

    Raises StoreCorrupt when the file belongs to another program, StoreTooNew when a
    later Glassbus wrote it.
    """
    with connection:  # one read transaction: another process may be making the store just now
        application = connection.pragma("application_id")
        version = connection.pragma("user_version")
        empty = value(connection, "SELECT count(*) FROM sqlite_schema") == 0
    if application == 0 and version == 0 and empty:
        return 0
    if application != APPLICATION_ID:
        raise StoreCorrupt(f"{path} is a database of another program, not a Glassbus store; name another file")
    if version > newest:
        raise StoreTooNew(
            f"{path} was written by a later version of Glassbus (store version {version}, this one knows {newest}); "
            "upgrade Glassbus, or name another file"
        )
    return int(version)


def migrate(connection: apsw.Connection, path: str, scripts: Sequence[str] = MIGRATIONS) -> None:
    """Bring the store to the newest version in one transaction: all of it, or nothing."""
    if identify(connection, path, len(scripts)) == len(scripts):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Asked again under the lock: another process may have done it meanwhile.
        for script in scripts[identify(connection, path, len(scripts)) :]:
            connection.execute(script)
        connection.pragma("application_id", APPLICATION_ID)
        connection.pragma("user_version", len(scripts))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
