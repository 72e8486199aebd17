"""Locks every dependency with its hashes: `make lock`, and `python scripts/lock.py --check` to see if one is due.

Run it on the oldest Python that the package supports: what only an older Python needs (a
backport) is then in the lock, and does no harm on a newer one.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
#: Lock -> the file of requirements it comes from. Later ones agree with the ones above them.
SOURCES = {
    "runtime": "pyproject.toml",
    "build": "pyproject.toml",
    "dev": "requirements/dev.in",
    "typing": "requirements/typing.in",
    "bench": "bench/requirements.in",
}
# Nothing of the machine that compiled it may show in a lock: no index, host, option or path.
QUIET = ("--no-header", "--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host", "--no-emit-options")


def requirements(name: str) -> list[str]:
    """What lock `name` asks for, in order, without comments."""
    if SOURCES[name] != "pyproject.toml":
        lines = (ROOT / SOURCES[name]).read_text().splitlines()
        return sorted(bare for line in lines if (bare := line.partition("#")[0].strip()))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] if name == "runtime" else project["build-system"]["requires"]
    # An editable install asks hatchling's `editables` on top; it is never in the metadata.
    return sorted([*wanted, "editables"] if name == "build" else wanted)


def fingerprint(name: str) -> str:
    """A digest of everything that decides what lock `name` should hold."""
    floor = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    above = list(SOURCES)[: list(SOURCES).index(name)]
    text = "\n".join([floor, *requirements(name), *(fingerprint(one) for one in above)])
    return hashlib.sha256(text.encode()).hexdigest()


def header(name: str) -> str:
    return f"# Locked from {SOURCES[name]} by `make lock`; do not edit.\n# inputs: {fingerprint(name)}\n"


def stale() -> list[str]:
    """Locks that were made from other inputs than today's."""
    return [name for name in SOURCES if not _text(name).startswith(header(name))]


def _text(name: str) -> str:
    path = LOCKS / f"{name}.txt"
    return path.read_text() if path.exists() else ""


def compile_lock(name: str, upgrade: bool) -> None:
    target = LOCKS / f"{name}.txt"
    above = list(SOURCES)[: list(SOURCES).index(name)]
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, f"{name}.in"), Path(folder, f"{name}.txt")
        constraints = [f"-c {LOCKS / one}.txt" for one in above]
        source.write_text("\n".join([*requirements(name), *constraints]) + "\n")
        output.write_text(_text(name))  # what is locked stays where it can
        command = [sys.executable, "-m", "piptools", "compile", "--quiet", "--generate-hashes", "--allow-unsafe"]
        command += [*QUIET, "--strip-extras", "--no-annotate", *(["--upgrade"] if upgrade else [])]
        subprocess.run([*command, "-o", str(output), str(source)], check=True, cwd=folder)  # noqa: S603 - no shell, our words
        target.write_text(header(name) + output.read_text())


def main(arguments: list[str]) -> int:
    if "--check" in arguments:
        late = stale()
        if late:
            print(f"locks out of date: {', '.join(late)}; run `make lock` and commit requirements/")
        return 1 if late else 0
    floor = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    if sys.version_info[:2] != tuple(int(part) for part in floor.split(".")):
        print(f"make the lock on Python {floor}, the oldest supported: make lock PYTHON=python{floor}")
        return 1
    for name in SOURCES:
        print(f"locking {name}")
        compile_lock(name, upgrade="--upgrade" in arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
