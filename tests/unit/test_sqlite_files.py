"""The database file: how it is made, and every file that cannot be one gives a clear, typed error."""

from __future__ import annotations

import asyncio
import stat
from contextlib import closing
from pathlib import Path

import apsw
import pytest
from sqlite_kit import Desk, Ears, peek, play

from glassbus.clock import SystemClock
from glassbus.config import Overflow
from glassbus.errors import (
    ConfigurationError,
    GlassbusError,
    StoreCorrupt,
    StoreLocked,
    StoreReadOnly,
    StoreTooNew,
    TransportError,
)
from glassbus.message import Priority
from glassbus.testing import VirtualClock
from glassbus.transport.sqlite import SqliteTransport, schema
from glassbus.transport.sqlite.store import Store


def opening_fails(path: Path, kind: type[GlassbusError], match: str = "", **options: float) -> None:
    async def scenario() -> None:
        transport = SqliteTransport(path, clock=SystemClock(), **options)  # type: ignore[arg-type]
        with pytest.raises(kind, match=match) as raised:
            await transport.open(Ears())
        assert path.name in str(raised.value)
        await transport.close(1.0)

    asyncio.run(scenario())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_files_are_private_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "store.db"

    async def scenario(clock: VirtualClock) -> None:
        desk = await Desk(path, clock).open()
        await desk.declare()
        await desk.publish()
        assert {p.name: oct(mode(p)) for p in path.parent.iterdir()} == {
            "store.db": "0o600",
            "store.db-wal": "0o600",
            "store.db-shm": "0o600",
            "store.db-owners": "0o700",
        }
        assert mode(path.parent) == mode(path.parent.parent) == 0o700
        assert [oct(mode(p)) for p in (path.parent / "store.db-owners").iterdir()] == ["0o600"]
        await desk.close()
        assert sorted(p.name for p in path.parent.iterdir()) == ["store.db", "store.db-owners"]
        assert list((path.parent / "store.db-owners").iterdir()) == []

    play(scenario)


def test_construction_does_no_io(tmp_path: Path) -> None:
    transport = SqliteTransport(tmp_path / "a" / "b.db", clock=SystemClock())
    assert not (tmp_path / "a").exists()
    assert transport.address == f"sqlite:///{tmp_path}/a/b.db"
    with pytest.raises(TransportError, match="not open"):
        transport.ledger()


def test_what_cannot_be_configured_is_refused_when_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="durability"):
        SqliteTransport(tmp_path / "a", clock=SystemClock(), durability="ram")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="path"):
        SqliteTransport("", clock=SystemClock())
    with pytest.raises(ConfigurationError, match="lease_s"):
        SqliteTransport(tmp_path / "a", clock=SystemClock(), lease_s=0)


def test_the_settings_of_the_connection(tmp_path: Path) -> None:
    for durability, synchronous in (("disk", 2), ("process", 1)):
        store = Store(tmp_path / "store.db", durability)
        store.open()
        with closing(store):
            found = {p: store.connection.pragma(p) for p in ("journal_mode", "synchronous", "trusted_schema")}
        assert found == {"journal_mode": "wal", "synchronous": synchronous, "trusted_schema": 0}


def test_a_folder_is_not_a_store(tmp_path: Path) -> None:
    opening_fails(tmp_path, ConfigurationError, "folder")


def test_a_symbolic_link_is_refused_and_not_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target.db", tmp_path / "link.db"
    link.symlink_to(target)
    opening_fails(link, ConfigurationError, "symbolic link")
    assert not target.exists()


def test_a_linked_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")

    async def scenario(clock: VirtualClock) -> None:
        await (await Desk(tmp_path / "link" / "store.db", clock).open()).close()

    play(scenario)
    assert (tmp_path / "real" / "store.db").exists()


def test_a_linked_owners_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store.db-owners").symlink_to(tmp_path / "elsewhere")
    opening_fails(tmp_path / "store.db", TransportError, "symbolic link")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("content", [b"this is no database, " * 500, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(content)
    opening_fails(path, StoreCorrupt, "move it away")
    assert path.read_bytes() == content


def test_damage_inside_is_found_when_the_store_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "store.db"

    async def scenario(clock: VirtualClock) -> None:
        desk = await Desk(path, clock).open()
        await desk.declare()
        await desk.publish(*[b"x" * 2000 for _ in range(100)])
        await desk.close()

    play(scenario)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = b"\xa5" * 4096
    path.write_bytes(content)
    opening_fails(path, StoreCorrupt, "backup")
    assert path.read_bytes() == content


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    peek(path, "CREATE TABLE theirs (x)")
    content = path.read_bytes()
    opening_fails(path, StoreCorrupt, "another program")
    assert path.read_bytes() == content


def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    play(lambda clock: _opened(path, clock))
    peek(path, f"PRAGMA user_version = {len(schema.MIGRATIONS) + 1}")
    opening_fails(path, StoreTooNew, "upgrade Glassbus")


async def _opened(path: Path, clock: VirtualClock) -> None:
    await (await Desk(path, clock).open()).close()


def test_a_store_locked_by_another_program_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    play(lambda clock: _opened(path, clock))
    with closing(apsw.Connection(str(path))) as other:
        other.execute("BEGIN IMMEDIATE")
        opening_fails(path, StoreLocked, "another program", busy_timeout_s=0.05)
    play(lambda clock: _opened(path, clock))


def test_what_cannot_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, who may write everything: SQLite's and the system's answers are played."""
    path = tmp_path / "store.db"
    play(lambda clock: _opened(path, clock))

    def refuse(store: Store) -> apsw.Connection:
        raise apsw.ReadOnlyError("ReadOnlyError: attempt to write a readonly database")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_connect", refuse)
        opening_fails(path, StoreReadOnly, "cannot be written")

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", deny)
        opening_fails(tmp_path / "sub" / "store.db", StoreReadOnly, "cannot create")


def test_a_folder_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    opening_fails(tmp_path / "file" / "store.db", StoreReadOnly, "cannot create")


# Versions


def test_a_store_is_migrated_with_all_it_holds(tmp_path: Path) -> None:
    """A version 2 that does not exist yet: its script runs once, and what was stored is still there."""
    path = tmp_path / "store.db"
    second = "ALTER TABLE messages ADD COLUMN colour TEXT; UPDATE messages SET colour = 'blue';"

    async def scenario(clock: VirtualClock) -> None:
        old = await Desk(path, clock).open()
        await old.declare()
        await old.publish(b"kept")
        await old.close()
        for _ in range(2):
            store = Store(path, "process")
            store.migrations = (*schema.MIGRATIONS, second)
            new = await Desk(path, clock, store=store).open()
            assert new.account().ready == 1
            await new.proven()
            await new.close()
        assert peek(path, "SELECT body, colour FROM messages") == [(b"kept", "blue")]
        assert peek(path, "PRAGMA user_version") == [(len(schema.MIGRATIONS) + 1,)]

    play(scenario)


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    play(lambda clock: _opened(path, clock))
    store = Store(path, "process")
    store.migrations = (*schema.MIGRATIONS, "CREATE TABLE half (x); INSERT INTO nowhere VALUES (1);")
    with pytest.raises(TransportError, match="nowhere"):
        store.open()
    assert peek(path, "PRAGMA user_version") == [(len(schema.MIGRATIONS),)]
    assert peek(path, "SELECT name FROM sqlite_schema WHERE name = 'half'") == []


def version_1(path: Path) -> None:
    """A store as version 1 wrote it: the script itself must never change."""
    with closing(apsw.Connection(str(path))) as connection:
        connection.execute((Path(__file__).parent / "data" / "store_v1.sql").read_text())


def test_the_first_version_still_opens(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    version_1(path)

    async def scenario(clock: VirtualClock) -> None:
        desk = await Desk(path, clock).open()
        assert desk.account("bill").ready == 1
        delivery = await desk.claim("bill")
        assert (delivery.envelope.topic, delivery.envelope.body) == ("orders.created", b'{"order_id":17}')
        assert await desk.settle(delivery)
        (record,) = await desk.dead_letters(subscription="bill")
        assert record.report.message == "it went wrong"
        await desk.proven()
        await desk.close()

    play(scenario)


def test_the_first_version_gets_the_overflow_ladder(tmp_path: Path) -> None:
    """Its subscriptions get the default rungs, and what it holds can give way."""
    path = tmp_path / "store.db"
    version_1(path)

    async def scenario(clock: VirtualClock) -> None:
        desk = await Desk(path, clock).open()
        before = desk.transport.queues()["bill"]
        assert (before.spec.overflow, before.expanded_until) == (Overflow(), 0.0)
        waiting = desk.account("bill").pending
        await desk.declare("bill", before.spec.pattern, capacity=waiting, overflow=Overflow(expand=1.0))
        await desk.publish(priority=Priority.CRITICAL, topic="orders.created")
        account = desk.account("bill")
        assert account.pending == waiting
        (displaced,) = [r for r in await desk.dead_letters(subscription="bill") if r.reason == "overflow"]
        assert displaced.report.fingerprint == "displaced:bill"
        await desk.proven()
        await desk.close()
        assert peek(path, "SELECT displace, expand FROM subscriptions WHERE name = 'bill'") == [(1, 1.0)]

    play(scenario)


# While it is open


@pytest.mark.parametrize("file", ["store.db", "store.db-wal"])
def test_a_store_that_is_deleted_under_us_stops_the_bus(tmp_path: Path, file: str) -> None:
    path = tmp_path / "store.db"

    async def scenario(clock: VirtualClock) -> None:
        desk = await Desk(path, clock).open()
        await desk.declare()
        claiming = asyncio.ensure_future(desk.transport.claim("s"))
        await asyncio.sleep(2)
        (tmp_path / file).unlink()
        await asyncio.sleep(2)
        with pytest.raises(TransportError):
            await claiming
        (error,) = desk.ears.errors
        assert "deleted or replaced" in str(error)
        assert "store.db" in str(error)
        with pytest.raises(TransportError):
            await desk.publish()
        await desk.close()

    play(scenario)


def test_a_transport_is_opened_once(tmp_path: Path) -> None:
    async def scenario(clock: VirtualClock) -> None:
        desk = await Desk(tmp_path / "store.db", clock).open()
        with pytest.raises(TransportError, match="opened before"):
            await desk.transport.open(desk.ears)
        await desk.close()
        assert await desk.transport.close(1.0) == (0, 0)
        assert desk.transport.ledger().accounts == {}

    play(scenario)
