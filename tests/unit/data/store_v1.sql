-- A store as version 1 wrote it. Never change it: it proves that old stores still open.
BEGIN TRANSACTION;

DROP TABLE IF EXISTS consumers;
CREATE TABLE consumers (
  subscription INTEGER NOT NULL,
  owner        INTEGER NOT NULL,
  PRIMARY KEY (subscription, owner)
) STRICT, WITHOUT ROWID;

DROP TABLE IF EXISTS dead_letters;
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
INSERT INTO dead_letters VALUES(1,3,1,'timeout_error','TimeoutError','f-1','attempts_spent',1700000000.0,'{"error_id":"e-1","timestamp":1.0,"category":"timeout_error","severity":"high","message":"it went wrong","exception_type":"TimeoutError","stack_trace":"","context":{},"recovery_attempted":false,"recovery_successful":false,"retry_count":0,"escalated":false,"fingerprint":"f-1","component":"handler"}');
CREATE INDEX dead_letters_of ON dead_letters (subscription, died_at);

DROP TABLE IF EXISTS deliveries;
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
INSERT INTO deliveries VALUES(1,1,1,0,0,1,'k',0,NULL,NULL,0.0,0,0.0,NULL,0,1);
INSERT INTO deliveries VALUES(2,1,2,0,0,1,'k',0,NULL,NULL,0.0,0,0.0,NULL,0,2);
INSERT INTO deliveries VALUES(3,3,1,4,0,1,NULL,1,NULL,NULL,0.0,0,1700000000.0,NULL,0,3);
INSERT INTO deliveries VALUES(4,3,2,0,0,1,NULL,0,NULL,NULL,0.0,0,0.0,NULL,0,4);
CREATE INDEX deliveries_due      ON deliveries (state, due) WHERE due IS NOT NULL;
CREATE INDEX deliveries_expiring ON deliveries (expires_at) WHERE expires_at > 0 AND state < 3;
CREATE INDEX deliveries_held     ON deliveries (owner, id) WHERE state = 3;
CREATE INDEX deliveries_keys     ON deliveries (subscription, key, state, lane, priority, id) WHERE key IS NOT NULL;
CREATE INDEX deliveries_ready    ON deliveries (subscription, lane, priority, position, id) WHERE state = 0;

DROP TABLE IF EXISTS gone;
CREATE TABLE gone (
  id        INTEGER PRIMARY KEY CHECK (id = 0),
  accepted  INTEGER NOT NULL,
  handled   INTEGER NOT NULL,
  expired   INTEGER NOT NULL,
  discarded INTEGER NOT NULL
) STRICT;
INSERT INTO gone VALUES(0,0,0,0,0);

DROP TABLE IF EXISTS messages;
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
INSERT INTO messages VALUES(1,'m-1','orders.created','json',NULL,X'7B226F726465725F6964223A31377D',1,'k',1700000000.0,0.0,0.0,2,0.0,NULL,NULL);
INSERT INTO messages VALUES(3,'m-2','orders.created','json',NULL,X'7B226F726465725F6964223A31387D',1,NULL,1700000000.0,0.0,0.0,2,0.0,NULL,NULL);
CREATE INDEX messages_remembered ON messages (remember_until) WHERE remember_until > 0;

DROP TABLE IF EXISTS meta;
CREATE TABLE meta (key TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO meta VALUES('boot_id','boot');
INSERT INTO meta VALUES('generation',2);
INSERT INTO meta VALUES('next_id',5);
INSERT INTO meta VALUES('probe',0);
INSERT INTO meta VALUES('watermark',0);
INSERT INTO meta VALUES('watermark_until',0.0);

DROP TABLE IF EXISTS owners;
CREATE TABLE owners (
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  token       TEXT    NOT NULL UNIQUE,
  boot_id     TEXT    NOT NULL,
  pid         INTEGER NOT NULL,
  lease_until REAL    NOT NULL  -- monotonic seconds of boot_id
) STRICT;

DROP TABLE IF EXISTS subscriptions;
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
INSERT INTO subscriptions VALUES(1,'bill','orders.*',100,0,0,'',2,1,0,0,0,0,1,0,0,0,0);
INSERT INTO subscriptions VALUES(2,'ship','orders.>',50,0,0,'',2,2,0,0,0,0,0,0,0,0,0);

DELETE FROM main.sqlite_sequence WHERE name='dead_letters';
INSERT INTO main.sqlite_sequence VALUES ('dead_letters', 1);
DELETE FROM main.sqlite_sequence WHERE name='owners';
INSERT INTO main.sqlite_sequence VALUES ('owners', 1);
DELETE FROM main.sqlite_sequence WHERE name='subscriptions';
INSERT INTO main.sqlite_sequence VALUES ('subscriptions', 2);

pragma user_version=1;
pragma application_id=1735156339;

COMMIT TRANSACTION;

