"""The stack of compose.yaml without Docker: the same configuration files, servers on the loopback of this machine.

    python scripts/local_stack.py [--without-demo] [OPTION OF THE DEMO ...]

Builds what is missing (scripts/servers.sh; needs Go, once), starts Jaeger, the collector, Alertmanager, Prometheus and
the demo, says where to look, and runs until Ctrl-C. Data, logs and rendered configuration are in .cache/stack.
However it ends, by SIGKILL too, its servers end with it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Self

from glassbus import GlassbusError, shipped
from glassbus.drill.servers import SERVERS_VARIABLE, Server, find_server, free_port

REPOSITORY = Path(__file__).resolve().parents[1]
ALERTMANAGER = "alerts/alertmanager.yml"
SERVERS = ("jaeger", "otelcol", "alertmanager", "prometheus")

#: Every address that the configurations name, as the network of compose.yaml knows it.
ADDRESSES = (
    *("demo:9464", "collector:4317", "collector:4318", "collector:8888", "collector:8889", "collector:13133"),
    *("jaeger:4317", "jaeger:8888", "jaeger:13133", "jaeger:16685", "jaeger:16686"),
    *("prometheus:9090", "alertmanager:9093"),
)
#: Those that people and their programs use: at the same port as in compose.yaml, if it is free.
USUAL = ("demo:9464", "collector:4317", "collector:4318", "jaeger:16686", "prometheus:9090", "alertmanager:9093")

_ADDRESS = re.compile(r"\b(?:demo|collector|jaeger|prometheus|alertmanager|grafana|nats):\d+\b")
_HOST = "127.0.0.1"
_DEMO = "import sys; from glassbus.cli import main; sys.exit(main())"
#: How often it is looked whether all servers still run.
_LOOK_S = 1.0


def render(text: str, addresses: Mapping[str, str]) -> str:
    """A configuration for this machine: other addresses, the rules by their full path, and all else as it is.

    Raises KeyError for an address of compose.yaml that `addresses` does not have.
    """
    moved = _ADDRESS.sub(lambda found: addresses[found[0]], text)
    return moved.replace("../alerts/", f"{shipped.find('alerts/glassbus.rules.yml').parent}/")


def loopback(usual: bool) -> dict[str, str]:
    """Where on the loopback each of `ADDRESSES` is; `usual`: people's at their usual ports, where these are free."""
    found: dict[str, str] = {}
    for address in ADDRESSES:
        port = int(address.rpartition(":")[2])
        if not (usual and address in USUAL and _is_free(port)):
            port = free_port()
        found[address] = f"{_HOST}:{port}"
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((_HOST, port))
        except OSError:
            return False
    return True


class Stack:
    """The four servers, with their files in `place`. A context manager: they are ready within, and stopped after it.

    For tests: `tuned` are variables of otel-collector.yaml that are to differ from their defaults; `every` replaces the
    intervals between scrapes and evaluations, and what Alertmanager waits before it tells of a group; `told` takes its
    notifications in the place of the demo (host:port).
    """

    def __init__(
        self,
        place: Path,
        *,
        usual: bool = False,
        tuned: Mapping[str, str] | None = None,
        every: str = "",
        told: str = "",
    ) -> None:
        self.place = place
        self.at = loopback(usual)
        self._told = told
        self._tuned = dict(tuned or {})
        self._every = every
        self._running = contextlib.ExitStack()
        place.mkdir(parents=True, exist_ok=True)
        self.jaeger = self._jaeger()
        self.collector = self._collector()
        self.alertmanager = self._alertmanager()
        self.prometheus = self._prometheus()
        self.servers = (self.jaeger, self.collector, self.alertmanager, self.prometheus)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as begun:
            for server in self.servers:
                begun.callback(server.stop)
                server.start()
            self._running = begun.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def url(self, address: str) -> str:
        """Where on this machine an address of compose.yaml is."""
        return f"http://{self.at[address]}"

    def of_a_service(self, name: str) -> dict[str, str]:
        """The environment of the service that is watched, called `name`."""
        return {
            "GLASSBUS_HTTP": self.at["demo:9464"],
            "OTEL_SERVICE_NAME": name,
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.url("collector:4317"),
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": "0.01",
        }

    def demo(self, *options: str) -> Server:
        """The demo as the service that is watched; not started."""
        command = ["demo", "--plain", "--url", f"sqlite:///{self.place / 'demo.db'}", *options]
        environment = self.of_a_service("glassbus-demo")
        return self._server("demo", [sys.executable, "-c", _DEMO, *command], "demo:9464", "/readyz", environment)

    def _server(
        self, name: str, command: list[str], at: str, page: str, environment: Mapping[str, str] | None = None
    ) -> Server:
        return Server(command, f"{self.url(at)}{page}", self.place, name=name, environment=environment or {})

    def _jaeger(self) -> Server:
        environment = {
            "JAEGER_OTLP": self.at["jaeger:4317"],
            "JAEGER_HTTP": self.at["jaeger:16686"],
            "JAEGER_GRPC": self.at["jaeger:16685"],
            "JAEGER_HEALTH": self.at["jaeger:13133"],
            "JAEGER_METRICS_HOST": _HOST,
            "JAEGER_METRICS_PORT": self.at["jaeger:8888"].rpartition(":")[2],
        }
        command = [find_server("jaeger"), "--config", f"file:{shipped.find('deploy/jaeger.yaml')}"]
        return self._server("jaeger", command, "jaeger:13133", "/status", environment)

    def _collector(self) -> Server:
        environment = {
            "GLASSBUS_OTLP_GRPC": self.at["collector:4317"],
            "GLASSBUS_OTLP_HTTP": self.at["collector:4318"],
            "GLASSBUS_OTELCOL_HEALTH": self.at["collector:13133"],
            "GLASSBUS_OTELCOL_METRICS_HOST": _HOST,
            "GLASSBUS_OTELCOL_METRICS_PORT": self.at["collector:8888"].rpartition(":")[2],
            "GLASSBUS_SPANMETRICS": self.at["collector:8889"],
            "GLASSBUS_JAEGER_OTLP": self.at["jaeger:4317"],
            "GLASSBUS_OTELCOL_QUEUE_DIR": str(self.place / "collector-queue"),
            **self._tuned,
        }
        command = [find_server("otelcol"), "--config", str(shipped.find("otel-collector.yaml"))]
        return self._server("collector", command, "collector:13133", "/", environment)

    def _alertmanager(self) -> Server:
        command = [
            find_server("alertmanager"),
            f"--config.file={self._rendered(ALERTMANAGER)}",
            f"--storage.path={self.place / 'alertmanager'}",
            f"--web.listen-address={self.at['alertmanager:9093']}",
            "--cluster.listen-address=",
        ]
        return self._server("alertmanager", command, "alertmanager:9093", "/-/ready")

    def _prometheus(self) -> Server:
        command = [
            find_server("prometheus"),
            f"--config.file={self._rendered('deploy/prometheus.yml')}",
            f"--storage.tsdb.path={self.place / 'prometheus'}",
            "--storage.tsdb.retention.time=31d",
            "--storage.tsdb.retention.size=4GB",
            "--enable-feature=exemplar-storage",
            f"--web.listen-address={self.at['prometheus:9090']}",
            # Hidden, and only about the start: without it, the first scrape comes 5 seconds after it.
            "--scrape.discovery-reload-interval=100ms",
        ]
        return self._server("prometheus", command, "prometheus:9090", "/-/ready")

    def _rendered(self, name: str) -> Path:
        text = shipped.find(name).read_text(encoding="utf-8")
        if self._told and name == ALERTMANAGER:
            text = text.replace("demo:9464", self._told)
        text = render(text, self.at)
        if self._every:
            text = re.sub(r"(scrape_interval|evaluation_interval|group_wait): \w+", rf"\1: {self._every}", text)
        path = self.place / Path(name).name
        path.write_text(text, encoding="utf-8")
        return path


# The command


def build() -> None:
    """Have every server in its pinned version. Raises SystemExit when one can be neither built nor found."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glassbus-ci" / "bin"
    built = subprocess.run(["sh", str(REPOSITORY / "scripts" / "servers.sh"), *SERVERS], check=False)  # noqa: S603, S607
    if built.returncode == 0:
        os.environ.setdefault(SERVERS_VARIABLE, str(folder))  # before PATH, which may have another version
        return
    try:
        found = [find_server(name) for name in SERVERS]
    except GlassbusError as error:
        raise SystemExit(f"make stack: {error}") from None
    print(f"using what this machine has: {', '.join(found)}", file=sys.stderr)


@contextlib.contextmanager
def alone_in(place: Path) -> Iterator[None]:
    """Raises SystemExit while another stack uses `place`."""
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"make stack: another one runs on {place}; end that first") from None
        yield


def describe(stack: Stack, demo: bool) -> str:
    """Where to look, for people."""
    rows = [
        ("Prometheus", f"{stack.url('prometheus:9090')}/api/v1/alerts", "alerts; queries by /api/v1/query?query=…"),
        ("Alertmanager", stack.url("alertmanager:9093"), "who is told of what"),
        ("Jaeger", stack.url("jaeger:16686"), "traces, by /api/v3/traces/{id} and /api/traces?service=glassbus-demo"),
        ("OTLP", f"{stack.url('collector:4317')} (gRPC), {stack.url('collector:4318')} (HTTP)", "spans of your own"),
    ]
    if demo:
        rows.append(("demo", f"{stack.url('demo:9464')}/metrics", "and /readyz; what it says is in demo.log"))
        rows.append(("its store", f"sqlite:///{stack.place / 'demo.db'}", "for commands: --url, or GLASSBUS_URL"))
    lines = [f"  {name:<13} {where:<32}  {what}" for name, where, what in rows]
    variables = [f"  {name}={value}" for name, value in grafana_variables(stack).items()]
    return "\n".join(
        [
            f"The stack is up; its logs and data are in {stack.place}.",
            *lines,
            "Prometheus and Jaeger have no web pages here (their Go modules lack them); their APIs answer.",
            "A Grafana of your own shows the dashboards when it is started with",
            *variables,
            "Ctrl-C ends all of it.",
        ]
    )


def grafana_variables(stack: Stack) -> dict[str, str]:
    """What a Grafana needs in its environment to be provisioned for this stack."""
    return {
        "GF_PATHS_PROVISIONING": str(shipped.find("deploy/grafana/provisioning")),
        "GLASSBUS_DASHBOARDS": str(shipped.find("dashboards/json")),
        "GLASSBUS_PROMETHEUS_URL": stack.url("prometheus:9090"),
        "GLASSBUS_JAEGER_URL": stack.url("jaeger:16686"),
        "GLASSBUS_ALERTMANAGER_URL": stack.url("alertmanager:9093"),
    }


def _end(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make stack", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--without-demo", action="store_true", help="nothing is watched but the stack itself")
    parser.add_argument("--place", type=Path, default=REPOSITORY / ".cache" / "stack", help="default: .cache/stack")
    arguments, demo_options = parser.parse_known_args()
    build()
    with alone_in(arguments.place), contextlib.ExitStack() as running:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _end)
        try:
            stack = running.enter_context(Stack(arguments.place, usual=True))
            watched = list(stack.servers)
            if not arguments.without_demo:
                demo = stack.demo(*demo_options)
                running.callback(demo.stop)
                watched.append(demo.start())
            print(describe(stack, demo=not arguments.without_demo), flush=True)
            while True:
                time.sleep(_LOOK_S)
                for server in watched:
                    server.check()
        except KeyboardInterrupt:
            print("ending", flush=True)
            return 0
        except GlassbusError as error:
            print(f"make stack: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    raise SystemExit(main())
