"""`error_metrics.json`: what statistics say, for programs that read files. Whole or not at all, on an interval."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from glassbus.files import locked, open_regular, private_folder, replace_file
from glassbus.record.statistics import DAY_S, HOUR_S, combined

#: How often it is written while there is something new, in seconds.
METRICS_EVERY_S = 10.0
METRICS_NAME = "error_metrics.json"

_PROCESSES_MAX = 32
#: More than the sections of so many processes ever take; a longer file is cut here, and then is not ours.
_BYTES_MAX = 16 * 1024 * 1024


class MetricsFile:
    """The file at `path`, to which each process adds its own section; its top level is their sum.

    The lock file beside it keeps processes apart. Not thread-safe.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = secrets.token_hex(4)

    def write(self, snapshot: dict[str, Any], *, running: bool = True) -> None:
        """Put our `snapshot` into the file. Durable on return. Raises OSError.

        One without an error or a recovery is left out: commands that come and go must not crowd out what counts.
        """
        if not snapshot["total_errors"] and not any(snapshot["recoveries"].values()):
            return
        private_folder(self.path.parent)
        with locked(self.path.with_name(f".{self.path.stem}.lock")):
            process = f"{os.getpid()}-{self._token}"
            sections = _sections(self.path)
            sections[process] = {"running": running, **snapshot}
            kept = _newest(sections, snapshot["now"] - DAY_S)
            kept[process] = sections[process]
            whole = {"updated_at": snapshot["now"], **combined(_aged(kept, snapshot["now"])), "processes": kept}
            replace_file(self.path, msgspec.json.format(msgspec.json.encode(whole), indent=2) + b"\n", self._token)


def _newest(sections: dict[str, dict[str, Any]], since: float) -> dict[str, dict[str, Any]]:
    """Those written after `since`, the newest few: a restart must not make the file grow for ever."""
    names = sorted(sections, key=lambda name: -_number(sections[name].get("now")))[:_PROCESSES_MAX]
    return {name: sections[name] for name in names if _number(sections[name].get("now")) > since}


def _aged(sections: dict[str, dict[str, Any]], now: float) -> list[dict[str, Any]]:
    """The sections; what one that ended long ago called its last hour is none any more."""
    quiet = {"recent_errors_1h": 0, "error_rate_1h": 0.0, "categories_1h": {}, "severities_1h": {}}
    return [
        {**section, **quiet} if now - _number(section.get("now")) > HOUR_S else section for section in sections.values()
    ]


def _sections(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of all processes so far; none of a file that is missing or that is not ours."""
    with (
        suppress(OSError, ValueError, RecursionError, msgspec.MsgspecError),  # it is written anew
        os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file,
    ):
        return msgspec.json.decode(file.read(_BYTES_MAX), type=_File).processes
    return {}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


class _File(msgspec.Struct):
    processes: dict[str, dict[str, Any]]
