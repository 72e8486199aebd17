"""ErrorLogger: its line is in the file when the call returns, and no report is lost, however hard it is written."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from glassbus import ConfigurationError, ErrorCategory, ErrorLogger, ErrorReport, ErrorSeverity
from glassbus.record import shared_lines
from glassbus.record.shared_lines import KEPT_MIN, SharedLines, rotated


def report(number: object = 1, **more: Any) -> ErrorReport:
    return ErrorReport(
        **{
            "error_id": f"e-{number}",
            "timestamp": time.time(),
            "category": ErrorCategory.TIMEOUT_ERROR,
            "severity": ErrorSeverity.HIGH,
            "message": "too slow",
            "exception_type": "TimeoutError",
            **more,
        }
    )


def logged(folder: Path) -> list[str]:
    """The ids of all reports in all files, each line whole."""
    return [
        json.loads(line)["error_id"]
        for path in [*rotated(folder / "message_bus_errors.json"), folder / "message_bus_errors.json"]
        if path.exists()
        for line in path.read_text().splitlines()
    ]


def test_the_line_is_in_the_file_when_the_call_returns(tmp_path: Path) -> None:
    logger = ErrorLogger(tmp_path / "logs")
    for number in range(5):
        told = report(number, context={"message_id": "m-1", "attempt": 2})
        assert logger.log_error(told) is True
        last = logger.error_log_file.read_text().splitlines()[-1]
        assert json.loads(last) == {**told.to_dict(), "fingerprint": logger.error_history[-1].fingerprint}
    assert stat.S_IMODE(logger.error_log_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(logger.log_dir.stat().st_mode) == 0o700
    logger.close()


def test_without_arguments_it_logs_below_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logger = ErrorLogger()
    assert not (tmp_path / "logs").exists()
    assert logger.log_error(report())
    monkeypatch.chdir("/")
    assert logger.log_error(report(2))
    assert logged(tmp_path / "logs") == ["e-1", "e-2"]
    assert logger.error_log_file == tmp_path / "logs" / "message_bus_errors.json"
    assert logger.metrics_file == tmp_path / "logs" / "error_metrics.json"
    logger.close()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_log_size": 0}, "max_log_size"),
        ({"max_log_size": "10MB"}, "max_log_size"),
        ({"max_log_size": True}, "max_log_size"),
        ({"fsync": "maybe"}, "fsync"),
        ({"log_dir": 7}, "log_dir"),
    ],
    ids=str,
)
def test_arguments_that_cannot_work_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        ErrorLogger(**arguments)


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="takes an ErrorReport, not ValueError"):
        ErrorLogger(tmp_path).log_error(ValueError("x"))  # type: ignore[arg-type]


WORK = """
    import sys, threading
    sys.path.insert(0, "tests/unit")
    from test_errorlog import ErrorLogger, report
    logger = ErrorLogger(sys.argv[2], int(sys.argv[3]))
    own = ErrorLogger(sys.argv[2], int(sys.argv[3]))  # several instances in one process, too

    def work(thread):
        for n in range(150):
            assert (logger if thread % 2 else own).log_error(report(f"{sys.argv[1]}-{thread}-{n}"))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    logger.close()
    own.close()
"""


@pytest.mark.parametrize("size", [1, 2000], ids=["a file for each report", "some reports a file"])
def test_no_report_is_lost_by_threads_processes_and_tiny_files(tmp_path: Path, size: int) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORK), name, str(tmp_path), str(size)],
            cwd=Path(__file__).parents[2],
        )
        for name in ("a", "b")
    ]
    assert [child.wait(120) for child in children] == [0, 0]
    found = logged(tmp_path)
    assert sorted(found) == sorted(f"e-{p}-{t}-{n}" for p in "ab" for t in range(8) for n in range(150))
    files = rotated(tmp_path / "message_bus_errors.json")
    assert len(files) > 100
    assert all(path.stat().st_size <= 2000 or size == 1 for path in files)
    assert json.loads((tmp_path / "error_metrics.json").read_text())["total_errors"] == 2400


def test_a_logger_whose_file_another_has_rotated_goes_on_in_the_new_one(tmp_path: Path) -> None:
    first, second = ErrorLogger(tmp_path, 2000), ErrorLogger(tmp_path, 1000)
    first.log_error(report("a"))
    second.log_error(report("large", message="x" * 900))
    assert len(rotated(tmp_path / "message_bus_errors.json")) == 1
    first.log_error(report("b"))
    assert json.loads(first.error_log_file.read_text().splitlines()[-1])["error_id"] == "e-b"
    first.close()
    second.close()


@pytest.mark.parametrize("line", [b"%099d", b"%0999d"], ids=["files of the size", "lines larger than a file"])
def test_at_least_fifty_rotated_files_are_kept_and_the_oldest_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes
) -> None:
    monkeypatch.setattr(shared_lines, "_SWEEP_EVERY", 1)
    lines = SharedLines(tmp_path / "log.json", 100, kept_bytes=0)
    for n in range(200):
        lines.append(line % n)
    lines.close()
    kept = [path.read_bytes().split() for path in rotated(tmp_path / "log.json")]
    assert len(kept) == KEPT_MIN
    assert [int(line) for (line,) in kept] == list(range(199 - KEPT_MIN, 199))


def test_a_full_disk_is_told_by_the_answer_and_what_waited_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = ErrorLogger(tmp_path)
    assert logger.log_error(report(0))
    real, room = os.write, [10]

    def full(descriptor: int, data: Any) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        cut = bytes(data)[: room[0]]
        room[0] -= len(cut)
        return real(descriptor, cut)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "glassbus"):
        patch.setattr(os, "write", full)
        assert [logger.log_error(report(n)) for n in range(1, 6)] == [False] * 5
        assert logger.flush() is False
    assert len([one for one in caplog.records if "cannot be written, kept in memory" in one.message]) == 1
    statistics = logger.get_error_statistics()
    assert (statistics["total_errors"], statistics["write_failures"], statistics["lost"]) == (6, 5, 0)
    assert [one.error_id for one in logger.error_history] == [f"e-{n}" for n in range(6)]
    assert logger.flush() is True
    assert logger.log_error(report(6)) is True
    assert logged(tmp_path) == [f"e-{n}" for n in range(7)]
    logger.close()


def test_what_waits_for_the_disk_is_bounded_and_the_loss_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glassbus.record.errorlog._UNWRITTEN_MAX", 10)
    (tmp_path / "file").write_text("where the folder should be")
    logger = ErrorLogger(tmp_path / "file")
    assert not any(logger.log_error(report(n)) for n in range(25))
    assert logger.get_error_statistics()["lost"] == 15
    (tmp_path / "file").unlink()
    assert logger.flush()
    assert logged(tmp_path / "file") == [f"e-{n}" for n in range(15, 25)]
    logger.close()


def test_a_folder_that_vanishes_is_made_anew(tmp_path: Path) -> None:
    logger = ErrorLogger(tmp_path / "logs")
    assert logger.log_error(report(1))
    shutil.rmtree(tmp_path / "logs")
    assert logger.log_error(report(2))
    assert logged(tmp_path / "logs") == ["e-2"]
    logger.close()


def test_a_folder_that_is_a_link_is_followed_a_file_that_is_a_link_is_not(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "logs").symlink_to(tmp_path / "real")
    logger = ErrorLogger(tmp_path / "logs")
    assert logger.log_error(report(1))
    assert logged(tmp_path / "real") == ["e-1"]
    logger.close()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "message_bus_errors.json").symlink_to(victim)
    refused = ErrorLogger(tmp_path / "other")
    assert not refused.log_error(report(1))
    assert victim.read_text() == "mine"
    refused.close()


def test_after_a_torn_line_the_next_begins_on_its_own(tmp_path: Path) -> None:
    """A process was killed in the middle of a line; with ours running, too."""
    path = tmp_path / "message_bus_errors.json"
    path.write_text('{"error_id":"torn')
    logger = ErrorLogger(tmp_path)
    assert logger.log_error(report(1))
    with path.open("a") as other:
        other.write('{"torn again')
    assert logger.log_error(report(2))
    lines = path.read_text().splitlines()
    assert [lines[0], lines[2]] == ['{"error_id":"torn', '{"torn again']
    assert [json.loads(lines[n])["error_id"] for n in (1, 3)] == ["e-1", "e-2"]
    logger.close()


def test_the_statistics_have_the_names_that_users_know(tmp_path: Path) -> None:
    logger = ErrorLogger(tmp_path)
    assert logger.get_error_statistics()["recovery_success_rate"] == 1.0
    logger.log_error(report(1, recovery_attempted=True, recovery_successful=True))
    late = report(2, severity=ErrorSeverity.LOW, recovery_attempted=True)
    logger.log_error(late)
    logger.log_error(report(3, category=ErrorCategory.QUEUE_OVERFLOW, timestamp=time.time() - 7200))
    found = logger.get_error_statistics()
    assert found["total_errors"] == 3
    assert found["recent_errors_1h"] == 2
    assert found["error_rate_1h"] == pytest.approx(2 / 3600)
    assert found["categories"] == {"timeout_error": 2, "queue_overflow": 1}
    assert found["severity_distribution"] == {"high": 2, "low": 1}
    assert found["recovery_success_rate"] == 0.5
    late.recovery_successful = True  # the report is marked after it was logged
    assert logger.get_error_statistics()["recovery_success_rate"] == 1.0
    assert logger.error_counts == {"timeout_error": 2, "queue_overflow": 1}
    assert logger.error_counts[ErrorCategory.TIMEOUT_ERROR] == 2
    json.dumps(found)
    logger.close()


def test_reports_with_wild_times_change_no_window(tmp_path: Path) -> None:
    logger = ErrorLogger(tmp_path)
    logger.log_error(report(1))
    wild = [0.0, -1e300, 1e300, float("nan"), float("inf"), 2**70, None, "now", datetime(9999, 12, 31, tzinfo=UTC)]
    for number, at in enumerate(wild):
        assert logger.log_error(report(number, timestamp=at))
    logger.log_error(report(3))
    found = logger.get_error_statistics()
    assert found["total_errors"] == len(wild) + 2
    assert 2 <= found["recent_errors_1h"] <= 4  # those of the future count as now
    logger.close()


class Hostile:
    def __repr__(self) -> str:
        raise SystemExit("no")

    __str__ = __repr__


class HostileMapping(Mapping[str, Any]):
    def __getitem__(self, name: str) -> Any:
        raise KeyboardInterrupt

    def __iter__(self) -> Any:
        raise KeyboardInterrupt

    def __len__(self) -> int:
        raise KeyboardInterrupt


def test_history_holds_plain_bounded_values_and_no_exception(tmp_path: Path) -> None:
    logger = ErrorLogger(tmp_path)
    error = ValueError("the culprit")
    logger.log_error(
        report(
            1,
            message="x" * 100_000,
            stack_trace="s" * 100_000,
            exception_type=Hostile(),
            error_id="lone \ud800",
            context={"error": error, "hostile": Hostile(), Hostile(): 1, "payload": b"secret", "deep": [[[[[error]]]]]},
        )
    )
    logger.log_error(report(2, context=HostileMapping()))
    logger.log_error(report(3, context=["no mapping"]))
    kept = logger.error_history[0]
    assert len(kept.message) == 1024
    assert len(kept.stack_trace) == 16 * 1024
    assert kept.context["error"] == "the culprit"
    assert kept.context["payload"] == "<6 bytes>"
    assert "secret" not in logger.error_log_file.read_text()
    assert len(logger.error_log_file.read_text().splitlines()) == 3
    name = f"error_{id(error)}"
    gc.collect()
    assert not any(one is kept.context for one in gc.get_referrers(error)), name
    logger.close()


def test_history_and_counts_are_bounded(tmp_path: Path) -> None:
    logger = ErrorLogger(tmp_path)
    for n in range(1500):
        logger.log_error(report(n, category=f"kind-{n}", fingerprint=f"print-{n}"))
    assert len(logger.error_history) == 1000
    assert len(logger.error_counts) <= 201
    assert sum(logger.error_counts.values()) == 1500
    logger.close()


def test_metrics_come_with_the_first_report_then_on_an_interval_and_at_the_end(tmp_path: Path) -> None:
    with ErrorLogger(tmp_path) as logger:
        logger.log_error(report(1))
        assert json.loads(logger.metrics_file.read_text())["total_errors"] == 1
        for n in range(100):
            logger.log_error(report(n))
        assert json.loads(logger.metrics_file.read_text())["total_errors"] == 1
    assert json.loads(logger.metrics_file.read_text())["total_errors"] == 101


def test_what_is_logged_last_reaches_the_files_without_a_close(tmp_path: Path) -> None:
    program = "import sys; sys.path.insert(0, 'tests/unit'); from test_errorlog import *\n" + textwrap.dedent(
        """
        logger = ErrorLogger(sys.argv[1])
        [logger.log_error(report(n)) for n in range(20)]
        """
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60, cwd=Path(__file__).parents[2]
    )
    assert len(logged(tmp_path)) == 20
    assert json.loads((tmp_path / "error_metrics.json").read_text())["total_errors"] == 20


def test_a_forked_child_shares_the_file_and_not_the_locks(tmp_path: Path) -> None:
    logger = ErrorLogger(tmp_path, 3000)
    logger.log_error(report("first"))
    with logger._lock, logger._lines._guard:  # a thread of the parent's is writing as it forks
        child = os.fork()
        if child == 0:
            written = [logger.log_error(report(f"child-{n}")) for n in range(50)]
            os._exit(0 if all(written) else 1)
    for n in range(50):
        assert logger.log_error(report(f"parent-{n}"))
    assert os.waitpid(child, 0)[1] == 0
    assert len(logged(tmp_path)) == len(set(logged(tmp_path))) == 101
    logger.close()


@pytest.mark.parametrize(("fsync", "least", "most"), [("always", 20, 30), ("interval", 1, 5), ("never", 0, 0)])
def test_the_fsync_policy_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: Any, least: int, most: int
) -> None:
    synced: list[str] = []
    real = os.fsync

    def count(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink()
        if name == tmp_path / "message_bus_errors.json":
            synced.append(str(name))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", count)
    with ErrorLogger(tmp_path, fsync=fsync) as logger:
        for n in range(20):
            assert logger.log_error(report(n))
    assert least <= len(synced) <= most


def test_threads_that_log_at_once_all_return(tmp_path: Path) -> None:
    logger = ErrorLogger(tmp_path, 5000)
    answers: list[bool] = []

    def work(thread: int) -> None:
        answers.extend([logger.log_error(report(f"{thread}-{n}")) for n in range(100)])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [True] * 800
    assert len(set(logged(tmp_path))) == 800
    assert logger.get_error_statistics()["total_errors"] == 800
    logger.close()
