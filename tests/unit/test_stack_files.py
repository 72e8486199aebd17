"""The files of the stack fit each other: compose, Prometheus, Grafana's provisioning, and what `make stack` does."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from local_stack import ADDRESSES, loopback, render

from tests.server_kit import REPOSITORY, need

DEPLOY = REPOSITORY / "deploy"
VERSIONS = dict(re.findall(r"^(\w+)=(.+)$", (DEPLOY / "versions.env").read_text(), re.MULTILINE))
ADDRESS = re.compile(r"\b[a-z]+:\d{4,5}\b")


def compose(*profiles: str) -> dict[str, Any]:
    """compose.yaml as Docker Compose reads it."""
    ran = subprocess.run(
        [need("docker-compose"), "config", "--format", "json"],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "COMPOSE_PROFILES": ",".join(profiles)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=REPOSITORY,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    made: dict[str, Any] = json.loads(ran.stdout)
    return made


def test_compose_reads_it_with_a_broker_and_without() -> None:
    small, whole = compose()["services"], compose("brokers")["services"]
    assert set(whole) - set(small) == {"nats"}
    assert set(small) == {"demo", "collector", "jaeger", "prometheus", "alertmanager", "grafana"}


def test_every_service_is_pinned_checked_limited_and_on_the_loopback() -> None:
    whole = compose("brokers")
    for name, service in whole["services"].items():
        tag = service["image"].rpartition(":")[2]
        assert tag == "local" or tag.removeprefix("v").removesuffix("-alpine") in VERSIONS.values(), name
        assert service["healthcheck"]["test"], name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        assert {port["host_ip"] for port in service["ports"]} == {"127.0.0.1"}, name
        assert service["cap_drop"] == ["ALL"], name
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert volume["read_only"], name
                assert Path(volume["source"]).exists(), name
            else:
                assert volume["source"] in whole["volumes"], name


def test_versions_are_pinned_in_one_place() -> None:
    assert (REPOSITORY / ".env").resolve() == DEPLOY / "versions.env"
    text = (REPOSITORY / "compose.yaml").read_text()
    assert not [version for version in VERSIONS.values() if version in text]


def test_what_is_scraped_and_told_is_in_compose_and_at_hand_natively() -> None:
    services = compose("brokers")["services"]
    for name in (DEPLOY / "prometheus.yml", REPOSITORY / "alerts" / "alertmanager.yml"):
        named = set(ADDRESS.findall(name.read_text())) - {"localhost:9464"}
        assert named
        assert named <= set(ADDRESSES)
        assert {address.partition(":")[0] for address in named} <= set(services)


@pytest.mark.parametrize("name", ["deploy/prometheus.yml", "alerts/alertmanager.yml"])
def test_rendering_changes_addresses_and_nothing_else(name: str) -> None:
    given, at = (REPOSITORY / name).read_text(), loopback(usual=False)
    assert len(set(at.values())) == len(ADDRESSES)
    rendered = render(given, at)
    assert not [address for address in ADDRESSES if address in rendered]
    back = rendered.replace(f"{REPOSITORY / 'alerts'}/", "../alerts/")
    for address, place in at.items():
        back = back.replace(place, address)
    assert back == given


def test_an_address_that_is_not_known_is_an_error() -> None:
    with pytest.raises(KeyError):
        render('targets: ["demo:1234"]', loopback(usual=False))


def test_grafana_finds_what_it_is_provisioned_with() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "glassbus.yaml").read_text())["datasources"]
    by_uid = {source["uid"]: source for source in sources}
    assert {source["type"] for source in sources} == {"prometheus", "jaeger", "alertmanager"}

    metrics = by_uid["glassbus-prometheus"]["jsonData"]
    (exemplar,) = metrics["exemplarTraceIdDestinations"]
    assert (exemplar["name"], by_uid[exemplar["datasourceUid"]]["type"]) == ("trace_id", "jaeger")
    assert by_uid[metrics["alertmanagerUid"]]["type"] == "alertmanager"
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert metrics["timeInterval"] == prometheus["global"]["scrape_interval"]
    back = by_uid["glassbus-jaeger"]["jsonData"]["tracesToMetrics"]
    assert by_uid[back["datasourceUid"]]["type"] == "prometheus"

    given = compose()["services"]["grafana"]
    texts = "".join(path.read_text() for path in provisioning.rglob("*.yaml"))
    assert set(re.findall(r"\$\{(\w+)\}", texts)) <= set(given["environment"])
    targets = {volume["target"] for volume in given["volumes"]}
    assert given["environment"]["GLASSBUS_DASHBOARDS"] in targets
    assert given["environment"]["GF_PATHS_PROVISIONING"].removesuffix("/grafana/provisioning") in targets


def test_the_images_context_has_what_the_wheel_needs() -> None:
    """Docker sends only what is named there: what the build reads must be among it."""
    allowed = [
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    project = (REPOSITORY / "pyproject.toml").read_text()
    needed = re.findall(r'^"([^"]+)" = "glassbus/shipped_files/', project, re.MULTILINE)
    assert needed
    assert [name for name in needed if not any(f"{name}/".startswith(f"{one}/") for one in allowed)] == []
