"""What the documents say is so: the sample prints what is shown, rooms are the rooms, links lead somewhere."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from glassbus import MessageBus, subscription, tuning

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_the_readme_sample_prints_what_the_readme_shows(tmp_path: Path) -> None:
    sample, shown = re.findall(r"```(?:python)?\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[:2]
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", sample], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (ran.stdout, ran.returncode) == (shown, 0), ran.stderr


def test_the_architecture_table_names_every_room_and_no_other() -> None:
    table = (ROOT / "docs/ARCHITECTURE.md").read_text().partition("## The rooms")[2].partition("## ")[0]
    rows = [row.split("|")[2] for row in table.splitlines() if row.startswith("|")]
    named = {name.removesuffix(".py").rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    package = ROOT / "src/glassbus"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert named == modules | rooms


def test_the_layers_contract_names_them_too() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {name.strip(" ()") for layer in contracts[0]["layers"] for name in layer.split("|")}
    package = ROOT / "src/glassbus"
    assert layers >= ({path.stem for path in package.glob("*.py")} - {"__init__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_test_that_the_acceptance_list_names_exists() -> None:
    named = re.findall(r"`(tests/[^`:]+)::(\w+)`", (ROOT / "docs/acceptance.md").read_text())
    assert named
    assert [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).exists()
        or not re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
    ] == []


def test_every_line_of_the_acceptance_list_is_shown_or_says_what_is_open() -> None:
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs/acceptance.md").read_text().splitlines() if line[:1] == "|"]
    assert [row[0].strip() for row in rows if row[0].strip().isdigit()] == [str(n) for n in range(1, 17)]
    assert [row for row in rows if not row[-2].strip() and "later issue" not in row[-1]] == []


def test_the_configuration_that_is_shown_is_whole_and_says_what_holds_anyway(tmp_path: Path) -> None:
    """Every setting there is, each with its default: to reload it changes nothing."""
    (shown,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/configuration.md").read_text(), re.DOTALL)
    file = tmp_path / "bus.toml"
    file.write_text("")

    async def charge(payload: object) -> None: ...

    async def reloaded() -> tuple[object, object]:
        bus = MessageBus(configuration=file, telemetry=False)
        bus.subscribe("orders.*", name="charge")(charge)
        async with bus:
            before = bus.subscribers()[0].subscription
            file.write_text(shown)
            assert await bus.reload() == ()
            return before, bus.subscribers()[0].subscription

    before, after = asyncio.run(reloaded())
    assert after == before
    told = tomllib.loads(shown)
    assert set(told["bus"]) == set(tuning._BUS)
    assert set(told["subscriptions"]["charge"]) == set(subscription._TUNABLE)
    for name, settings in (
        ("retry", subscription._RETRY),
        ("kill_switch", subscription._KILL_SWITCH),
        ("overflow", subscription._OVERFLOW),
        ("adaptive_timeout", subscription._ADAPTIVE),
    ):
        assert set(told["subscriptions"]["charge"][name]) == set(settings)
