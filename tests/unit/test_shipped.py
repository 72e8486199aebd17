"""What ships beside the code is found, in a checkout and in a wheel, or it is said that it is not."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from glassbus import ShippedFileMissing, shipped

REPOSITORY = Path(__file__).parents[2]


def test_a_checkout_serves_its_own_files() -> None:
    assert shipped.root() == REPOSITORY
    assert shipped.find("otel-collector.yaml").read_text() == (REPOSITORY / "otel-collector.yaml").read_text()
    assert shipped.find("deploy/versions.env") in shipped.files("deploy", ".env")


def test_the_wheel_is_told_to_carry_what_the_code_looks_for() -> None:
    wheel = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {name: f"glassbus/shipped_files/{name}" for name in shipped.SHIPPED}
    assert all((REPOSITORY / name).exists() for name in shipped.SHIPPED)


def test_files_in_the_package_come_before_any_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "glassbus" / "shipped_files"
    (installed / "deploy").mkdir(parents=True)
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "glassbus" / "shipped.py"))
    assert shipped.find("deploy") == installed / "deploy"
    with pytest.raises(ShippedFileMissing, match=r"compose\.yaml is missing"):
        shipped.find("compose.yaml")
    with pytest.raises(ShippedFileMissing, match=r"no file that ends in '\.yml'"):
        shipped.files("deploy", ".yml")


def test_an_installation_without_them_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "lib" / "glassbus" / "shipped.py"))
    with pytest.raises(ShippedFileMissing, match="install the package again"):
        shipped.find("alerts/glassbus.rules.yml")


@pytest.mark.parametrize("name", ["/etc/passwd", "alerts/../pyproject.toml", "CHANGELOG.md", "deployment"])
def test_nothing_else_is_served(name: str) -> None:
    with pytest.raises(ValueError, match="not within what ships"):
        shipped.find(name)
