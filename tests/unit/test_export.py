"""`glassbus export`: what is written is valid and whole, leads where it is told to, and replaces nothing unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from glassbus import ConfigurationError, export, shipped
from glassbus.cli import main
from glassbus.export import KINDS, KUBERNETES_KINDS, Kubernetes, Links, exported

REPOSITORY = Path(__file__).parents[2]


def objects(kind: str, links: Links | None = None, **more: Any) -> list[dict[str, Any]]:
    return [yaml.safe_load(text) for text in exported(kind, links, Kubernetes(**more)).values()]


def rules(text: bytes | str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"] if "alert" in rule]


def held(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dashboards_are_those_of_the_repository() -> None:
    made = exported("dashboards")
    assert set(made) == {path.name for path in (REPOSITORY / "dashboards" / "json").glob("*.json")}
    for name, text in made.items():
        assert text == (REPOSITORY / "dashboards" / "json" / name).read_bytes()


def test_a_dashboard_is_a_config_map_that_grafanas_sidecar_finds() -> None:
    made = objects("dashboards", namespace="monitoring")
    assert len(made) == len(exported("dashboards"))
    assert len({one["metadata"]["name"] for one in made}) == len(made)
    for one in made:
        assert (one["apiVersion"], one["kind"]) == ("v1", "ConfigMap")
        assert one["metadata"]["namespace"] == "monitoring"
        assert one["metadata"]["labels"]["grafana_dashboard"] == "1"
        ((name, text),) = one["data"].items()
        assert json.loads(text) == json.loads(
            shipped.find(f"dashboards/json/{name.removeprefix('glassbus-')}").read_text()
        )
        # kubectl apply keeps a copy in an annotation, which may have 256 KiB.
        assert len(json.dumps(one)) < 256 * 1024


def test_more_than_a_config_map_may_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "CONFIG_MAP_BYTES_MAX", 1000)
    with pytest.raises(ConfigurationError, match="more than a ConfigMap may have"):
        exported("dashboards", None, Kubernetes())


def test_alerts_are_rules_routes_and_a_runbook_for_each() -> None:
    made = exported("alerts")
    alerts = {rule["alert"] for rule in rules(made["glassbus.rules.yml"])}
    assert {"alertmanager.yml", "glassbus.rules.yml"} | {f"runbooks/{alert}.md" for alert in alerts} <= set(made)


def test_a_prometheus_rule_has_the_rules_as_they_are_and_the_labels_that_select_it() -> None:
    (one,) = objects("alerts", labels={"release": "kube-prometheus-stack"})
    assert (one["apiVersion"], one["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert one["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    assert one["spec"] == yaml.safe_load(shipped.find("alerts/glassbus.rules.yml").read_text())


def test_the_collector_is_a_config_map_too() -> None:
    (one,) = objects("collector")
    assert one["data"]["otel-collector.yaml"].encode() == exported("collector")["otel-collector.yaml"]


@pytest.mark.parametrize(
    ("runbooks", "wanted"),
    [
        ("https://wiki.example.com/run/", "https://wiki.example.com/run/{}"),
        ("https://git.example.com/r/{alert}.md?at=1#top", "https://git.example.com/r/{}.md?at=1#top"),
        ("http://localhost:3000/runbooks", "http://localhost:3000/runbooks/{}"),
    ],
)
def test_links_lead_where_they_are_told_to(runbooks: str, wanted: str) -> None:
    links = Links(runbooks=runbooks, dashboards="https://grafana.example.com/g/")
    for kubernetes in (None, Kubernetes()):
        made = exported("alerts", links, kubernetes)
        name = "glassbus.rules.yml" if kubernetes is None else "glassbus-prometheusrule.yaml"
        loaded = yaml.safe_load(made[name])
        groups = loaded["groups"] if kubernetes is None else loaded["spec"]["groups"]
        found = [rule for group in groups for rule in group["rules"] if "alert" in rule]
        assert found
        for rule in found:
            assert rule["annotations"]["runbook_url"] == wanted.format(rule["alert"])
            assert rule["annotations"]["dashboard_url"].startswith("https://grafana.example.com/g/d/")
    for text in exported("dashboards", links).values():
        json.loads(text)
        assert b"localhost:9464" not in text


@pytest.mark.parametrize(
    "url", ["", "wiki", "ftp://x/", "http://a b", "http://a'b/x", 'http://a"', "http://a\nb", "http://x:", "http://{x}"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="URL"):
        Links(runbooks=url)
    with pytest.raises(ConfigurationError, match="URL"):
        Links(dashboards=url)


def test_what_kubernetes_would_refuse_is_refused() -> None:
    for namespace in ("Upper", "a b", "-a", "a" * 64):
        with pytest.raises(ConfigurationError, match="namespace"):
            Kubernetes(namespace=namespace)
    for key, value in (("", "x"), ("a b", "x"), ("a", "x y"), ("a", "-x")):
        with pytest.raises(ConfigurationError, match="label"):
            Kubernetes(labels={key: value})
    for prefix in ("......", "", "-a", "a-", "a..b", "a.", ".a", "A", "a_b", "a/b", "a" * 254, "a\n"):
        with pytest.raises(ConfigurationError, match="label"):
            Kubernetes(labels={f"{prefix}/a": "v"})
    for key in ("a/b", "example.com/a_B.c", f"{'a' * 253}/a", "a--b.1/x", "x" * 63):
        assert Kubernetes(labels={key: "v"}).labels == {key: "v"}
    with pytest.raises(ConfigurationError, match="for one machine"):
        exported("compose", None, Kubernetes())
    with pytest.raises(ConfigurationError, match="cannot be exported"):
        exported("everything")


def test_the_label_by_which_dashboards_are_found_is_not_for_the_user_to_set() -> None:
    with pytest.raises(ConfigurationError, match="grafana_dashboard"):
        Kubernetes(labels={"grafana_dashboard": "0"})


# The command


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_it_wrote_and_writes_it_once(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / kind
    assert main(["export", kind, str(folder)]) == 0
    wrote = capsys.readouterr().out
    for name in held(folder):
        assert f"wrote {folder / name}\n" in wrote or f"wrote {folder / name.partition('/')[0]}/ (" in wrote
    assert main(["export", kind, str(folder)]) == 0
    assert "wrote" not in capsys.readouterr().out
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("kind", KUBERNETES_KINDS)
def test_objects_are_written_with_their_names(kind: str, tmp_path: Path) -> None:
    assert main(["export", kind, str(tmp_path), "--kubernetes", "--namespace", "ops", "--label", "team=bus"]) == 0
    for path in tmp_path.iterdir():
        one = yaml.safe_load(path.read_text())
        assert (one["metadata"]["namespace"], one["metadata"]["labels"]["team"]) == ("ops", "bus")


def test_a_file_that_differs_is_replaced_by_force_alone_and_nothing_is_half_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "overview.json"
    mine.write_text("mine")
    assert main(["export", "dashboards", str(tmp_path)]) == 2
    assert "overview.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["overview.json"]
    assert main(["export", "dashboards", str(tmp_path), "--force"]) == 0
    assert mine.read_bytes() == exported("dashboards")["overview.json"]


def test_a_link_is_a_file_that_differs_wherever_it_leads(tmp_path: Path) -> None:
    folder, aim = tmp_path / "to", tmp_path / "aim"
    folder.mkdir()
    aim.write_bytes(exported("collector")["otel-collector.yaml"])
    link = folder / "otel-collector.yaml"
    for target in (aim, tmp_path / "missing"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert main(["export", "collector", str(folder)]) == 2
        assert link.readlink() == target
    assert main(["export", "collector", str(folder), "--force"]) == 0
    assert not link.is_symlink()
    assert not (tmp_path / "missing").exists()


def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "otel-collector.yaml")
    code = "import sys; from glassbus.cli import main; sys.exit(main())"
    for more in ([], ["--force"]):
        words = [sys.executable, "-c", code, "export", "collector", str(tmp_path), *more]
        ran = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 2, ran.stderr
        assert "otel-collector.yaml cannot be written: it is no regular file" in ran.stderr
    assert (tmp_path / "otel-collector.yaml").is_fifo()


def test_a_name_that_a_terminal_would_obey_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a\x1b[31m\nb"
    assert main(["export", "collector", str(folder)]) == 0
    assert r"a\x1b[31m\nb" in capsys.readouterr().out
    (folder / "otel-collector.yaml").write_text("mine")
    assert main(["export", "collector", str(folder)]) == 2
    assert r"a\x1b[31m\nb has other contents" in capsys.readouterr().err
    (folder / "otel-collector.yaml").unlink()
    (folder / "otel-collector.yaml").mkdir()
    assert main(["export", "collector", str(folder)]) == 2
    assert r"a\x1b[31m\nb/otel-collector.yaml cannot be written" in capsys.readouterr().err


def test_what_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["export", "collector", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    (tmp_path / "otel-collector.yaml").mkdir()
    assert main(["export", "collector", str(tmp_path)]) == 2
    assert "otel-collector.yaml" in capsys.readouterr().err
    for wrong in (["--label", "x"], ["--namespace", "x"], ["--label", "team=bus"]):
        assert main(["export", "collector", str(tmp_path / "x"), *wrong]) == 2
    assert not (tmp_path / "x").exists()


# The whole stack


def test_the_exported_stack_has_every_file_that_it_names(tmp_path: Path) -> None:
    assert main(["export", "compose", str(tmp_path)]) == 0
    compose = yaml.safe_load((tmp_path / "compose.yaml").read_text())
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or (tmp_path / source).exists(), volume
        if "build" in service:
            context = tmp_path / service["build"]["context"]
            assert (context / service["build"]["dockerfile"]).is_file()
    assert (tmp_path / ".env").read_text() == (REPOSITORY / "deploy" / "versions.env").read_text()


def test_a_wheel_made_of_the_exported_stack_exports_the_same(tmp_path: Path) -> None:
    """What the demo's image does, and what users have who never saw the repository."""
    tree, wheels, installed, again = (tmp_path / name for name in ("tree", "wheels", "installed", "again"))
    assert main(["export", "compose", str(tree)]) == 0
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(tree)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, timeout=120, cwd=tmp_path)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); from glassbus.cli import main; sys.exit(main())"
    for kind in KINDS:
        ran = subprocess.run(
            [sys.executable, "-c", code, "export", kind, str(again / kind)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
    assert held(again / "compose") == held(tree)
    assert held(again / "dashboards") == held(tree / "dashboards" / "json")
    assert held(again / "alerts") == held(tree / "alerts")
    assert held(again / "collector") == {"otel-collector.yaml": (tree / "otel-collector.yaml").read_bytes()}
