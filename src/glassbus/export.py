"""What ships beside the code, written out for those who run it: dashboards, alerts, the collector, the whole stack.

`exported` says which files with which content, `write` puts them into a folder. For Kubernetes they are ConfigMaps with
the label that Grafana's sidecar looks for, and a PrometheusRule of the Prometheus operator.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from glassbus import shipped
from glassbus.errors import ConfigurationError, shown
from glassbus.files import open_regular

#: What can be exported.
KINDS = ("dashboards", "alerts", "collector", "compose")
#: Those that there are objects of Kubernetes for.
KUBERNETES_KINDS = ("dashboards", "alerts", "collector")

#: Where the shipped files lead, which is the stack of compose.yaml.
RUNBOOKS_URL, DASHBOARDS_URL = "http://localhost:9464/runbooks", "http://localhost:3000"
#: What the API server takes as the data of a ConfigMap, in bytes.
CONFIG_MAP_BYTES_MAX = 1024 * 1024

#: An alert's name, or what Grafana puts one in the place of.
_RUNBOOK = re.compile(re.escape(RUNBOOKS_URL) + r"/(\w+|\$\{[\w.:]+\})", re.ASCII)
#: The links stand in YAML and JSON strings, quoted and not.
_URL = re.compile(r"https?://[\w.:@%/?&=#~+,;\-\[\]]*[\w/=\]]", re.ASCII)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
#: A domain, as Kubernetes takes them, before the name of a label: its parts have no length of their own.
_PREFIX = r"(?=.{1,253}/)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*/"
_LABEL_KEY = re.compile(rf"({_PREFIX})?[A-Za-z0-9]([\w.-]{{0,61}}[A-Za-z0-9])?", re.ASCII)
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?", re.ASCII)

#: By this label Grafana's sidecar finds dashboards, and nothing else.
_DASHBOARD_LABEL = "grafana_dashboard"

#: Of a source tree, beside the package itself: what `pip install .` needs of it.
_PROJECT = ("LICENSE", "README.md", "pyproject.toml")


class Links(msgspec.Struct, frozen=True, kw_only=True):
    """Where alerts and dashboards lead: the runbooks, as a prefix or with `{alert}` in it, and Grafana.

    Raises ConfigurationError for what is no plain http or https URL.
    """

    runbooks: str = RUNBOOKS_URL
    dashboards: str = DASHBOARDS_URL

    def __post_init__(self) -> None:
        for option, url in (("runbooks", self.runbooks.replace("{alert}", "A")), ("dashboards", self.dashboards)):
            if not _URL.fullmatch(url):
                raise ConfigurationError(f"the URL of the {option} is not a plain http or https URL: {shown(url)}")

    def put(self, text: str) -> str:
        """`text` with its links leading there."""
        runbooks = self.runbooks if "{alert}" in self.runbooks else f"{self.runbooks.rstrip('/')}/{{alert}}"
        # First what stays where it is named, so that no URL is replaced in one that was just put in.
        parts = _RUNBOOK.split(text)
        parts[::2] = [part.replace(DASHBOARDS_URL, self.dashboards.rstrip("/")) for part in parts[::2]]
        parts[1::2] = [runbooks.replace("{alert}", alert) for alert in parts[1::2]]
        return "".join(parts)


class Kubernetes(msgspec.Struct, frozen=True, kw_only=True):
    """How objects are to be labelled. Raises ConfigurationError for names that the API server would refuse."""

    namespace: str = ""
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.namespace and not _NAME.fullmatch(self.namespace):
            raise ConfigurationError(f"{shown(self.namespace)} is no name of a namespace")
        for key, value in self.labels.items():
            if not (_LABEL_KEY.fullmatch(key) and _LABEL_VALUE.fullmatch(value)):
                raise ConfigurationError(f"{shown(f'{key}={value}')} is no label")
            if key == _DASHBOARD_LABEL:
                raise ConfigurationError(f"the label {key} is that of the dashboards: they have it, nothing else may")

    def metadata(self, name: str, **more: Mapping[str, str]) -> dict[str, object]:
        """Of an object called `name`."""
        labels = {"app.kubernetes.io/name": "glassbus", **more.pop("labels", {}), **self.labels}
        where = {"namespace": self.namespace} if self.namespace else {}
        return {"name": name, **where, "labels": labels, **more}


def exported(kind: str, links: Links | None = None, kubernetes: Kubernetes | None = None) -> dict[str, bytes]:
    """The files of an export, by their path in its folder. Raises ConfigurationError and ShippedFileMissing."""
    links = links or Links()
    if kind not in KINDS:
        raise ConfigurationError(f"{shown(kind)} cannot be exported; what can: {', '.join(KINDS)}")
    if kubernetes is not None and kind not in KUBERNETES_KINDS:
        raise ConfigurationError(
            f"{kind} is for one machine; for Kubernetes there are {', '.join(KUBERNETES_KINDS)}, each of them alone"
        )
    made = dict(_plain(kind, links) if kubernetes is None else _objects(kind, links, kubernetes))
    return {name: made[name] for name in sorted(made)}


def _plain(kind: str, links: Links) -> Iterator[tuple[str, bytes]]:
    if kind == "dashboards":
        for path in shipped.files("dashboards/json", ".json"):
            yield path.name, _linked(path, links)
    elif kind == "alerts":
        for name in ("alerts/alertmanager.yml", "alerts/glassbus.rules.yml", "alerts/runbooks"):
            for path in _within(shipped.find(name)):
                yield str(path.relative_to(shipped.root() / "alerts")), _linked(path, links)
    elif kind == "collector":
        yield "otel-collector.yaml", shipped.find("otel-collector.yaml").read_bytes()
    else:
        yield from _stack(links)


def _stack(links: Links) -> Iterator[tuple[str, bytes]]:
    """A tree like that of the repository, the package's source in it: the demo's image is built from that."""
    root, package = shipped.root(), Path(__file__).resolve().parent
    for name in shipped.SHIPPED:
        for path in _within(shipped.find(name)):
            yield str(path.relative_to(root)), _linked(path, links)
    yield ".env", shipped.find("deploy/versions.env").read_bytes()
    for path in _within(package):
        inner = path.relative_to(package)
        if inner.parts[0] != "shipped_files":
            yield f"src/glassbus/{inner}", path.read_bytes()


def _within(path: Path) -> Iterator[Path]:
    """The file, or the files of the folder; not those that tools leave there."""
    if path.is_file():
        yield path
        return
    for one in sorted(path.rglob("*")):
        inner = one.relative_to(path).parts
        if one.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in inner):
            yield one


def _linked(path: Path, links: Links) -> bytes:
    """The file, with links that lead where they must if it has any."""
    if path.suffix not in (".json", ".yml", ".md") or path.name in _PROJECT:
        return path.read_bytes()
    return links.put(path.read_text(encoding="utf-8")).encode()


# Kubernetes


def _objects(kind: str, links: Links, kubernetes: Kubernetes) -> Iterator[tuple[str, bytes]]:
    if kind == "dashboards":
        for path in shipped.files("dashboards/json", ".json"):
            name = f"glassbus-dashboard-{path.stem.replace('_', '-').lower()}"
            metadata = kubernetes.metadata(
                name, labels={_DASHBOARD_LABEL: "1"}, annotations={"grafana_folder": "Glassbus"}
            )
            compact = json.dumps(json.loads(_linked(path, links)), ensure_ascii=False, separators=(",", ":"))
            yield f"{name}.json", _config_map(metadata, {f"glassbus-{path.name}": compact})
    elif kind == "collector":
        text = shipped.find("otel-collector.yaml").read_text(encoding="utf-8")
        metadata = kubernetes.metadata("glassbus-otel-collector")
        yield "glassbus-otel-collector.json", _config_map(metadata, {"otel-collector.yaml": text})
    else:
        yield "glassbus-prometheusrule.yaml", _rule(links, kubernetes)


def _config_map(metadata: Mapping[str, object], data: Mapping[str, str]) -> bytes:
    size = sum(len(key) + len(value.encode()) for key, value in data.items())
    if size > CONFIG_MAP_BYTES_MAX:
        raise ConfigurationError(f"{metadata['name']} would have {size:,} bytes, more than a ConfigMap may have")
    made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
    return json.dumps(made, indent=2, ensure_ascii=False).encode() + b"\n"


def _rule(links: Links, kubernetes: Kubernetes) -> bytes:
    """The rules are the `spec` as they stand, two columns to the right: a parser could only lose what they say."""
    rules = _linked(shipped.find("alerts/glassbus.rules.yml"), links).decode()
    metadata = json.dumps(kubernetes.metadata("glassbus"), ensure_ascii=False)
    spec = "".join(f"  {line}" if line.strip() else line for line in rules.splitlines(keepends=True))
    head = "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\n"
    return f"{head}metadata: {metadata}\nspec:\n{spec}".encode()


# Writing


class Written(msgspec.Struct, frozen=True):
    """What `write` did: the files that it made or replaced, and those that were there as they must be."""

    made: tuple[str, ...]
    unchanged: tuple[str, ...]


def write(files: Mapping[str, bytes], folder: Path, *, force: bool = False) -> Written:
    """Put `files` into `folder`, which is made where it is missing; each of them whole or not at all.

    Raises ConfigurationError, having written nothing, when files are there that differ, unless `force`. A symbolic
    link differs, wherever it leads; it is replaced, not followed. Raises OSError, also where something else is in the
    place of a file, such as a folder or a pipe.
    """
    made: list[str] = []
    differing: list[str] = []
    for name, content in files.items():
        try:
            if _differs(folder / name, content):
                differing.append(name)
        except FileNotFoundError:
            made.append(name)
    if differing and not force:
        where = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(folder))
        listed = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise ConfigurationError(f"nothing was written: {where} has other contents in {listed}; --force replaces them")
    for name in (*made, *differing):
        _put(folder / name, files[name])
    changed = {*made, *differing}
    return Written(
        tuple(name for name in files if name in changed), tuple(name for name in files if name not in changed)
    )


def _differs(path: Path, content: bytes) -> bool:
    """Whether `path` is another file. Raises FileNotFoundError, and OSError for what is there and is no file."""
    if path.is_symlink():
        return True
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        return file.read(len(content) + 1) != content


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.unlink(missing_ok=True)  # left by a dead process that had our id, or no file at all
        with beside.open("xb") as file:
            file.write(content)
        beside.replace(path)
    except OSError:
        with suppress(OSError):  # the first failure is the one to tell
            beside.unlink(missing_ok=True)
        raise
