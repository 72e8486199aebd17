"""Prometheus and Alertmanager on loopback with the shipped rules at another speed, and what they say."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from glassbus.drill.durations import divided, milliseconds
from glassbus.drill.receiver import Receiver
from glassbus.drill.rules import faster_routing, faster_rules, read_yaml
from glassbus.drill.servers import Server, ask_json, find_server, free_port
from glassbus.errors import ConfigurationError
from glassbus.shipped import find

PROMETHEUS = "deploy/prometheus.yml"
#: Prometheus's own times, which are flags and not in its configuration.
_LOOKBACK, _RESEND = "5m", "1m"
#: No scrape is made more often: beyond that Python and a busy machine cannot follow.
_SCRAPE_MS_MIN = 100
#: Nobody waits for a drill that is slower than this, unless it was asked for.
_FACTOR_MIN = 10.0


class Target(NamedTuple):
    """Something that is scraped: `address` is host:port."""

    job: str
    address: str
    instance: str


class Active(NamedTuple):
    """An alert that Prometheus holds: `state` is pending or firing."""

    name: str
    labels: Mapping[str, str]
    state: str


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How much faster than real everything is, and what that makes of Prometheus's own intervals."""

    factor: float
    scrape: str = "15s"
    evaluation: str = "15s"

    @classmethod
    def shipped(cls, factor: float) -> Pace:
        """With the shipped intervals of Prometheus. Raises ConfigurationError for a factor that is too large."""
        given = read_yaml(find(PROMETHEUS)).get("global", {})
        pace = cls(
            factor=factor,
            scrape=str(given.get("scrape_interval", "1m")),
            evaluation=str(given.get("evaluation_interval", "1m")),
        )
        largest = milliseconds(pace.scrape) / _SCRAPE_MS_MIN
        if not 1 <= factor <= largest:
            raise ConfigurationError(
                f"the factor must be from 1 to {largest:g}: beyond, a scrape every {pace.scrape} would be more often "
                f"than every {_SCRAPE_MS_MIN} ms"
            )
        return pace

    @property
    def scrape_s(self) -> float:
        """The time between two scrapes here, in seconds."""
        return milliseconds(self.scrape) / 1000 / self.factor

    def slower(self) -> Pace:
        """At half the speed."""
        return msgspec.structs.replace(self, factor=self.factor / 2)

    @property
    def can_slow(self) -> bool:
        """Whether half of the speed is of use: a slow machine can do that, and people can wait for it."""
        return self.factor >= 2 * _FACTOR_MIN


class Stack:
    """Prometheus and Alertmanager in `place`, scraping `targets`. Not thread-safe.

    Raises ServerMissing when made, ServerFailed when started.
    """

    def __init__(
        self,
        place: Path,
        groups: list[dict[str, Any]],
        pace: Pace,
        targets: Iterable[Target],
        receiver: Receiver,
        *,
        routing: Mapping[str, Any],
        alertmanagers: Iterable[str] = (),
    ) -> None:
        self.pace = pace
        prometheus_at = f"127.0.0.1:{free_port()}"
        self.url = f"http://{prometheus_at}"
        self.alertmanager = alertmanager_server(place, "alertmanager", routing, pace, receiver.url)
        tells = [_address(self.alertmanager), *alertmanagers]
        scraped = [
            *targets,
            Target("prometheus", prometheus_at, "prometheus"),
            Target("alertmanager", tells[0], "alertmanager"),
        ]
        write_config(place / "glassbus.rules.yml", faster_rules(groups, pace.factor))
        write_config(place / "prometheus.yml", self._prometheus(scraped, tells))
        self.prometheus = Server(
            [
                find_server("prometheus"),
                f"--config.file={place / 'prometheus.yml'}",
                f"--storage.tsdb.path={place / 'prometheus'}",
                f"--web.listen-address={prometheus_at}",
                f"--query.lookback-delta={divided(_LOOKBACK, pace.factor)}",
                f"--rules.alert.resend-delay={divided(_RESEND, pace.factor)}",
                "--scrape.discovery-reload-interval=100ms",
                "--storage.tsdb.retention.time=30d",
                "--log.level=warn",
            ],
            f"http://{prometheus_at}/-/ready",
            place,
            environment={"GOGC": "400"},  # memory is to be had, the processor is wanted by all
        )

    def _prometheus(self, targets: list[Target], alertmanagers: list[str]) -> dict[str, Any]:
        jobs: dict[str, list[dict[str, Any]]] = {}
        for one in targets:
            jobs.setdefault(one.job, []).append({"targets": [one.address], "labels": {"instance": one.instance}})
        scrape = divided(self.pace.scrape, self.pace.factor)
        return {
            "global": {
                "scrape_interval": scrape,
                "scrape_timeout": scrape,
                "evaluation_interval": divided(self.pace.evaluation, self.pace.factor),
            },
            "rule_files": ["glassbus.rules.yml"],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": alertmanagers}]}]},
            "scrape_configs": [{"job_name": job, "static_configs": static} for job, static in jobs.items()],
        }

    async def start(self) -> None:
        """Raises ServerFailed."""
        await self.alertmanager.started()
        await self.prometheus.started()

    def close(self) -> None:
        """Kill both. Idempotent."""
        self.prometheus.kill()
        self.alertmanager.kill()

    def check(self) -> None:
        """Raises ServerFailed when one of them has ended by itself."""
        self.prometheus.check()
        self.alertmanager.check()

    # What they say. Each raises OSError where they do not answer.

    def active(self) -> list[Active]:
        """Every alert that is pending or firing."""
        said = ask_json(f"{self.url}/api/v1/alerts")
        return [
            Active(str(one["labels"]["alertname"]), one["labels"], str(one["state"])) for one in said["data"]["alerts"]
        ]

    def value(self, expression: str) -> list[tuple[Mapping[str, str], float]]:
        """The instant vector that an expression has now."""
        query = urllib.parse.urlencode({"query": expression})
        said = ask_json(f"{self.url}/api/v1/query?{query}")
        return [(one["metric"], float(one["value"][1])) for one in said["data"]["result"]]

    def trouble_with_rules(self) -> list[str]:
        """The rules that Prometheus could not evaluate, with its words for why."""
        said = ask_json(f"{self.url}/api/v1/rules")
        return [
            f"{rule['name']}: {rule['lastError']}"
            for group in said["data"]["groups"]
            for rule in group["rules"]
            if rule.get("health") == "err"
        ]

    def held(self) -> list[dict[str, Any]]:
        """Every alert that Alertmanager has, with its status."""
        found: list[dict[str, Any]] = ask_json(f"{_url(self.alertmanager)}/api/v2/alerts")
        return found


def alertmanager_server(place: Path, name: str, routing: Mapping[str, Any], pace: Pace, told: str) -> Server:
    """An Alertmanager with the shipped routing, which tells only the webhook at `told`. Raises ServerMissing."""
    at = f"127.0.0.1:{free_port()}"
    config = place / f"{name}.yml"
    write_config(config, faster_routing(dict(routing), pace.factor, told))
    return Server(
        [
            find_server("alertmanager"),
            f"--config.file={config}",
            f"--storage.path={place / name}",
            f"--web.listen-address={at}",
            "--cluster.listen-address=",
            "--log.level=warn",
        ],
        f"http://{at}/-/ready",
        place,
        name=name,
    )


def _url(server: Server) -> str:
    return server.ready.removesuffix("/-/ready")


def _address(server: Server) -> str:
    return _url(server).removeprefix("http://")


def write_config(path: Path, content: Mapping[str, Any]) -> None:
    """A configuration as JSON, which is YAML, and leaves no doubt about what is a string."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
