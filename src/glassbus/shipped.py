"""Finds the files that ship with the package beside its code: dashboards, alerts, runbooks, the stack's configurations.

They stand once, at the root of the repository. A wheel carries the same tree within the package, as `shipped_files/`
(`pyproject.toml` names them once more), so a path relative to the root of the repository finds a file in both.
"""

from __future__ import annotations

from pathlib import Path

from glassbus.errors import ShippedFileMissing

#: What ships. A folder ships whole.
SHIPPED = (
    "LICENSE",
    "README.md",
    "alerts/alertmanager.yml",
    "alerts/glassbus.rules.yml",
    "alerts/runbooks",
    "compose.yaml",
    "dashboards/json",
    "deploy",
    "otel-collector.yaml",
    "pyproject.toml",
)


def root() -> Path:
    """The folder with everything in `SHIPPED`. Raises ShippedFileMissing where there is none."""
    package = Path(__file__).resolve().parent
    installed, checkout = package / "shipped_files", package.parents[1]
    if installed.is_dir():
        return installed
    if (checkout / "pyproject.toml").is_file() and (checkout / "deploy").is_dir():
        return checkout
    raise ShippedFileMissing(
        f"the files that ship with glassbus are neither in {installed} nor in {checkout}: install the package again"
    )


def find(name: str) -> Path:
    """The file or folder `name`, a path relative to the root, such as `alerts/glassbus.rules.yml`.

    Raises ShippedFileMissing where there is none, and ValueError for a name that is not within what ships.
    """
    if ".." in Path(name).parts or not any(name == one or name.startswith(f"{one}/") for one in SHIPPED):
        raise ValueError(f"{name!r} is not within what ships: {', '.join(SHIPPED)}")
    path = root() / name
    if not path.exists():
        raise ShippedFileMissing(f"{path} is missing, which ships with glassbus: install the package again")
    return path


def files(folder: str, suffix: str = "") -> list[Path]:
    """The files directly in `folder` whose names end in `suffix`, by name; never none: raises as `find` does."""
    found = sorted(one for one in find(folder).iterdir() if one.is_file() and one.name.endswith(suffix))
    if not found:
        raise ShippedFileMissing(
            f"{find(folder)} has no file that ends in {suffix!r}, which ships with glassbus: install the package again"
        )
    return found
