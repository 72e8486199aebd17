"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "glassbus",
    "apsw",
    "msgspec",
    "opentelemetry-sdk",
    "prometheus-client",
    "pyee",
    "bubus",
    "dramatiq",
    "taskiq",
    "persist-queue",
    "huey",
)


def describe(folder: Path) -> dict[str, str]:
    """The machine, the interpreter, the file system of `folder`, and every version that matters."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    found = {
        "cpu": f"{os.cpu_count()} x {_cpu()}",
        "os": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "filesystem": _filesystem(folder),
        "load at start": f"{load:.2f}",
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def _filesystem(folder: Path) -> str:
    """Type of the file system that holds `folder`, or "unknown" where `df` cannot tell."""
    shown = subprocess.run(  # noqa: S603 - a fixed command on a folder of ours
        ["/bin/df", "-T", str(folder)], capture_output=True, text=True, check=False
    )
    fields = shown.stdout.splitlines()[-1].split() if shown.returncode == 0 and shown.stdout else []
    return fields[1] if len(fields) > 1 and platform.system() == "Linux" else "unknown"
