"""Sealed files: read as they were written, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassbus.transport import sealed

LINES = st.lists(st.binary(max_size=40).map(lambda line: line.hex().encode()), max_size=6)


@given(LINES)
def test_what_was_written_is_read_and_nothing_else_is_left(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "file.jsonl"
        sealed.write(path, lines)
        sealed.write(path, lines)
        assert sealed.read(path) == lines
        assert [one.name for one in path.parent.iterdir()] == ["file.jsonl"]
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700


@given(LINES, st.data())
def test_a_file_that_was_changed_or_cut_anywhere_is_never_half_read(lines: list[bytes], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.jsonl"
        sealed.write(path, lines)
        text = path.read_bytes()
        at = data.draw(st.integers(0, len(text) - 1))
        if data.draw(st.booleans()):
            text = text[:at]
        else:
            text = text[:at] + bytes([text[at] ^ data.draw(st.integers(1, 255))]) + text[at + 1 :]
        path.write_bytes(text)
        with contextlib.suppress(ValueError):
            assert sealed.read(path) == lines  # only its last line break is gone


def test_damaged_files_of_one_name_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "0.json"
    names = []
    for text in ("a", "b", "c"):
        path.write_text(text)
        names.append(sealed.move_aside(path).name)
    assert names == ["0.damaged", "0.damaged.1", "0.damaged.2"]
    assert [(tmp_path / name).read_text() for name in names] == ["a", "b", "c"]


def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.jsonl"
    sealed.write(path, [b"old"])

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sealed.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        sealed.write(path, [b"new"])
    monkeypatch.undo()
    assert sealed.read(path) == [b"old"]
    assert [one.name for one in tmp_path.iterdir()] == ["file.jsonl"]


def test_a_file_behind_a_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "file.jsonl").symlink_to(precious)
    sealed.write(tmp_path / "file.jsonl", [b"line"])
    assert precious.read_text() == "mine"
    assert sealed.read(tmp_path / "file.jsonl") == [b"line"]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link", "sparse"])
def test_what_is_no_sealed_file_is_damaged_and_neither_waited_for_nor_read_whole(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "0.json"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "link":
            sealed.write(tmp_path / "other", [b"a"])
            path.symlink_to(tmp_path / "other")
        case _:
            path.write_bytes(b"")
            os.truncate(path, 1 << 36)
    with pytest.raises(ValueError, match=r"no regular file|no seal"):
        sealed.read(path)


def test_a_sweep_removes_what_killed_writers_left_and_not_what_a_living_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0.json.0a0b0c0d.tmp").write_bytes(b"half")
    (tmp_path / "1.json.0a0b0c0d.tmp").write_bytes(b"half")
    sealed.sweep(tmp_path, "0.")
    assert [path.name for path in tmp_path.iterdir()] == ["1.json.0a0b0c0d.tmp"]
    fsync = os.fsync

    def sweep_meanwhile(descriptor: int) -> None:
        sealed.sweep(tmp_path)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sweep_meanwhile)
    sealed.write(tmp_path / "0.json", [b"a"])
    assert [path.name for path in tmp_path.iterdir()] == ["0.json"]
