"""The journal's files under trouble: full disks, vanished folders, links, kills, floods, forks. Nothing raises."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from journal_kit import START, Kept, failed, lines_of, text_of

from glassbus import facts as f
from glassbus import files as disk
from glassbus.record import journalfiles, journalwriter, metricsfile, reading
from glassbus.record.journalfiles import journal_files
from glassbus.record.reading import JournalReader, read_story
from tests.facts_kit import sample


def eventually(is_so: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Poll what another thread or process does."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if is_so():
            return True
        time.sleep(0.01)
    return is_so()


class FullDisk:
    """Takes `room` bytes and then no more, as a full disk does: the last write is cut short."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room: int | None = room
        self.refused = 0
        self._write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor: int, data: Any) -> int:
        if self.room is not None:
            if self.room <= 0:
                self.refused += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = bytes(data)[: self.room]
            self.room -= len(data)
        return self._write(descriptor, data)


def test_a_full_disk_is_told_once_and_what_waited_is_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(tmp_path)
    kept.state(failed(message="before"))
    assert kept.journal.flush()
    full = FullDisk(monkeypatch, room=100)
    kept.state(*(failed(START + n, f"m-{n}", fingerprint="first seen on a full disk") for n in range(20)))
    assert not kept.journal.flush(0.3)
    kept.journal.look()
    tried = full.refused
    assert eventually(lambda: full.refused > tried)  # it tries again, and there is nothing new to tell
    kept.journal.look()
    assert [type(fact) for fact in kept.stated] == [f.JournalFailed]
    assert "No space left" in kept.stated[0].error
    assert "write" in kept.journal.statistics()["journal"]["trouble"]
    full.room = None
    assert kept.journal.close(10.0)
    reader = JournalReader(tmp_path)
    assert [line.message_id for line in reader.lines()] == ["before", *(f"m-{n}" for n in range(20))]
    assert reader.torn == 0
    assert kept.journal.dropped == 0
    (entry,) = read_story(tmp_path, "m-0")
    assert entry.report is not None
    assert "in charge" in entry.report.stack_trace  # its line was among those taken back


def test_what_does_not_fit_the_queue_is_counted_and_a_line_says_how_much_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journalwriter, "_TOGETHER_MAX", 2)
    kept = Kept(tmp_path, entries=10)
    full = FullDisk(monkeypatch, room=0)
    kept.state(failed(message="m-0"))
    assert eventually(lambda: kept.journal.trouble != "")
    kept.state(*(failed(START + n, f"m-{n}") for n in range(1, 50)))
    assert 0 < kept.journal.dropped < 50
    writer = kept.journal._writer
    assert writer is not None
    assert eventually(lambda: writer._told == kept.journal.dropped)  # a line about them waits for the disk
    kept.state(*(failed(START + n, f"m-{n}") for n in range(50, 100)))
    dropped = kept.journal.dropped
    full.room = None
    assert kept.journal.close(10.0)
    reader = JournalReader(tmp_path)
    assert len(list(reader.lines())) == 100 - dropped
    assert reader.lost == dropped
    assert f"{dropped} entries never reached the disk" in reader.notes()[0]


@pytest.mark.parametrize("how", ["folder", "file"])
def test_when_its_folder_vanishes_the_journal_says_so_and_begins_a_new_file(tmp_path: Path, how: str) -> None:
    kept = Kept(tmp_path / "state")
    kept.state(failed(message="m-1"))
    assert kept.journal.flush()
    if how == "folder":
        shutil.rmtree(tmp_path / "state")
    else:
        journal_files(tmp_path / "state")[0].unlink()
    kept.state(failed(message="m-2"))
    assert kept.journal.flush(10.0)
    kept.journal.look()
    (told,) = kept.stated
    assert isinstance(told, f.JournalFailed)
    assert "was removed" in told.error
    assert [entry.fact for entry in read_story(tmp_path / "state", "m-2")] == ["AttemptFailed"]
    kept.journal.close()


def test_it_never_writes_through_a_symbolic_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    state = tmp_path / "state"
    state.mkdir()
    (state / "journal").symlink_to(elsewhere)
    kept = Kept(state)
    kept.state(failed())
    assert not kept.journal.flush(0.3)
    assert "symbolic link" in kept.journal.trouble
    assert list(elsewhere.iterdir()) == []
    (state / "journal").unlink()
    assert kept.journal.close(10.0)


def test_a_named_pipe_in_the_folder_does_not_hang_a_reader(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    os.mkfifo(tmp_path / "journal" / "a.jsonl")
    reader = JournalReader(tmp_path)
    assert list(reader.lines()) == []
    assert "no regular file" in reader.notes()[0]


def test_files_are_rotated_and_bounded_over_all_processes(tmp_path: Path) -> None:
    first = Kept(tmp_path, file_bytes=64 * 1024, files=4)
    for batch in range(30):
        first.state(*(failed(START + batch, f"m-{batch}-{n}", text="x" * 500) for n in range(50)))
        assert first.journal.flush()
    files = journal_files(tmp_path)
    assert sum(path.stat().st_size for path in files) <= 4 * 64 * 1024
    assert all(path.stat().st_size <= 64 * 1024 for path in files)
    told = [line.message_id for line in lines_of(tmp_path)]
    assert told[-1] == "m-29-49"
    assert told == [f"m-{b}-{n}" for b in range(30) for n in range(50)][-len(told) :]
    os.utime(files[-1], (0, 0))
    second = Kept(tmp_path, file_bytes=64 * 1024, files=4)
    second.state(failed(message="m-new"))
    assert second.journal.flush()
    assert sum(path.stat().st_size for path in journal_files(tmp_path)) <= 4 * 64 * 1024
    assert files[-1] in journal_files(tmp_path)  # a file that a living process writes is never removed, however old
    assert not journalfiles._unused(files[-1])
    first.journal.close()
    second.journal.close()


def test_each_file_has_the_stacks_of_its_reports(tmp_path: Path) -> None:
    kept = Kept(tmp_path, file_bytes=64 * 1024, files=10)
    kept.state(*(failed(START + n / 10, f"m-{n}", text="x" * 500) for n in range(300)))
    kept.journal.close()
    files = journal_files(tmp_path)
    assert len(files) > 2
    assert all(path.read_bytes().splitlines()[1].startswith(b'{"kind":"site"') for path in files)
    for n in (0, 150, 299):
        (entry,) = read_story(tmp_path, f"m-{n}")
        assert entry.report is not None
        assert "in charge" in entry.report.stack_trace


def test_small_files_of_short_lives_do_not_push_out_large_ones_but_are_bounded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journalfiles, "_SMALL_FILES", 3)
    for n in range(20):
        kept = Kept(tmp_path, files=4)
        kept.state(failed(START + n, f"m-{n}"))
        kept.journal.close()
    assert len(journal_files(tmp_path)) == 12
    assert read_story(tmp_path, "m-19")
    assert not read_story(tmp_path, "m-0")


def test_a_torn_line_is_passed_over_and_counted(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.state(failed(message="m-1"), failed(message="m-2"))
    kept.journal.close()
    path = journal_files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-40])
    reader = JournalReader(tmp_path)
    assert [line.message_id for line in reader.lines()] == ["m-1"]
    assert reader.torn == 1
    path.write_bytes(path.read_bytes()[:200] + b"\xff\x00{}\n[1,2]\n" + b'{"kind":"later"}\n')
    assert list(JournalReader(tmp_path).lines()) == []
    assert read_story(tmp_path, "m-2") == []


@pytest.mark.parametrize(("fsync", "least"), [("always", 3), ("interval", 1), ("never", 0)])
def test_the_fsync_policy_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: str, least: int) -> None:
    synced: list[int] = []
    real = os.fsync

    def count(descriptor: int) -> None:
        if os.fstat(descriptor).st_size and "jsonl" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            synced.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", count)
    kept = Kept(tmp_path, fsync=fsync)
    for n in range(3):
        kept.state(failed(START + n, f"m-{n}"))
        kept.journal._writer._rouse()  # type: ignore[union-attr]
        assert eventually(lambda n=n: f'"m-{n}"' in text_of(tmp_path))  # type: ignore[misc]
    kept.journal.close()
    assert (len(synced) >= least) if least else not synced
    if fsync == "always":
        assert not kept.journal._writer.files.unsynced  # type: ignore[union-attr]


def test_a_killed_process_loses_nothing_that_was_written(tmp_path: Path) -> None:
    """Lines are with the operating system about 20 ms after the fact; SIGKILL takes none of them back."""
    program = textwrap.dedent(
        """
        import sys, time
        sys.path.insert(0, "tests/unit")
        from journal_kit import Kept, failed, START
        from pathlib import Path
        kept = Kept(Path(sys.argv[1]), flood_per_s=1_000_000)
        for n in range(1, 1_000_000):
            kept.state(failed(START + n, f"m-{n}"))
            if n % 100 == 0:
                kept.journal._writer.flush(30)
                print(n, flush=True)
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert child.stdout is not None
    written = [int(child.stdout.readline()) for _ in range(5)][-1]
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    reader = JournalReader(tmp_path)
    found = {line.message_id for line in reader.lines()}
    assert {f"m-{n}" for n in range(1, written + 1)} <= found
    assert reader.torn <= 1
    # The next process goes on beside it, and the dead one's file is no longer in use.
    assert journalfiles._unused(journal_files(tmp_path)[0])


def test_a_forked_child_writes_files_of_its_own(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.state(failed(message="m-parent"))
    assert kept.journal.flush()
    child = os.fork()
    if child == 0:  # in the child: no thread came along, and nothing of the parent's is written again
        kept.state(failed(message="m-child"))
        os._exit(0 if kept.journal.close(10.0) else 1)
    assert os.waitpid(child, 0)[1] == 0
    kept.state(failed(message="m-parent-2"))
    assert kept.journal.close()
    assert len(journal_files(tmp_path)) == 2
    assert sorted(line.message_id for line in lines_of(tmp_path)) == ["m-child", "m-parent", "m-parent-2"]


def test_the_writer_ends_when_it_is_idle_and_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glassbus.record.journalwriter._LINGER_S", 0.05)
    kept = Kept(tmp_path, metrics_every=0.1)
    writer = kept.journal._writer
    assert writer is not None
    for n in range(3):
        kept.state(failed(START + n, f"m-{n}"))
        assert eventually(lambda: writer._thread is None)
    assert [line.message_id for line in lines_of(tmp_path)] == ["m-0", "m-1", "m-2"]
    assert (tmp_path / "error_metrics.json").exists()
    kept.journal.close()


def test_metrics_are_written_on_an_interval_and_not_for_each_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    real = disk.replace_file

    def count(path: Path, data: bytes, mark: str) -> None:
        if path.parent == tmp_path:
            written.append(len(data))
        real(path, data, mark)

    monkeypatch.setattr(metricsfile, "replace_file", count)
    kept = Kept(tmp_path, metrics_every=60)
    kept.state(*(failed(START + n, f"m-{n}") for n in range(500)))
    assert kept.journal.flush()
    assert written == []
    kept.journal.close()
    assert len(written) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_metrics_that_cannot_be_written_are_trouble_but_stop_nothing(tmp_path: Path) -> None:
    (tmp_path / "error_metrics.json").mkdir()
    kept = Kept(tmp_path, metrics_every=0.1)
    kept.state(failed())
    assert eventually(lambda: kept.journal.trouble.startswith("metrics"))
    kept.journal.look()
    assert isinstance(kept.stated[0], f.JournalFailed)
    assert [entry.fact for entry in read_story(tmp_path, "m-1")] == ["AttemptFailed"]
    (tmp_path / "error_metrics.json").rmdir()
    assert eventually(lambda: kept.journal.trouble == "")
    kept.journal.close()


def test_a_process_that_saw_no_error_has_no_section(tmp_path: Path) -> None:
    """A replay of dead letters is in the journal, but counts as nothing."""
    kept = Kept(tmp_path)
    kept.state(sample(f.DeadLetterReplayed, at=START))
    assert kept.journal.close()
    assert [line.fact for line in lines_of(tmp_path)] == ["DeadLetterReplayed"]
    assert not (tmp_path / "error_metrics.json").exists()


def test_a_damaged_metrics_file_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "error_metrics.json").write_text('{"processes": 7')
    kept = Kept(tmp_path)
    kept.state(failed())
    kept.journal.close()
    assert '"total_errors": 1' in (tmp_path / "error_metrics.json").read_text()


def test_a_crash_between_write_and_rename_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "error_metrics.json"
    target.write_text("old")

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "power went")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="power went"):
            disk.replace_file(target, b"new", "x")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["error_metrics.json"]  # noqa: PTH208 - hidden files too
    disk.replace_file(target, b"new", "x")
    assert target.read_text() == "new"


def test_a_lock_that_another_holds_is_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with disk.locked(path), pytest.raises(OSError, match="another process held the lock"), disk.locked(path, 0.05):
        raise AssertionError("locked twice")
    with disk.locked(path, 0.05):
        assert path.exists()


def test_a_deeply_nested_line_and_a_very_long_one_are_torn_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(reading, "_LINE_BYTES_MAX", 300_000)
    kept = Kept(tmp_path)
    kept.state(failed(message="m1"))
    kept.journal.close()
    (path,) = journal_files(tmp_path)
    (good,) = [line for line in path.read_bytes().splitlines() if b'"m1"' in line]
    deep = good.replace(b'"kind":"fact"', b'"kind":"fact","fields":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 1)
    path.write_bytes(b"\n".join([good, deep, good, b"\0" * 1_000_000, good, b"\0" * 1_000_000]))
    reader = JournalReader(tmp_path)
    assert len(list(reader.lines())) == 3
    assert reader.torn == 3
    assert len(read_story(tmp_path, "m1")) == 3


@pytest.mark.parametrize("kind", ["pipe", "device", "nested"])
def test_metrics_are_written_in_the_place_of_what_is_no_file_of_ours(tmp_path: Path, kind: str) -> None:
    path = tmp_path / metricsfile.METRICS_NAME
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            path.write_text('{"processes":{"1":{"a":' + "[" * 100_000)
    kept = Kept(tmp_path)
    kept.state(failed())
    kept.journal.close()
    assert not path.is_symlink()
    assert path.is_file()
    assert '"total_errors": 1' in path.read_text()
