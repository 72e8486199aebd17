"""The shipped alert rules and Alertmanager configuration, at another speed.

What is changed is written down here and nowhere else: every duration is divided by one factor, and each receiver
tells one webhook, under its own name. Expressions, labels, routes and inhibitions are as shipped.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from glassbus import shipped
from glassbus.drill.durations import divided, longest_s, milliseconds, scaled, tokens
from glassbus.errors import ConfigurationError, GlassbusError

RULES = "alerts/glassbus.rules.yml"
ALERTMANAGER = "alerts/alertmanager.yml"

_HOUR_S = 3600.0
_ROUTE_TIMES = ("group_wait", "group_interval", "repeat_interval")
_RULE_TIMES = ("for", "keep_firing_for")
_GROUP_TIMES = ("interval", "query_offset")


class YamlMissing(GlassbusError):
    """PyYAML is not installed."""


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """An alert rule as shipped. Durations in seconds.

    `id` is its alert's name and, where several rules make that alert, `/` and the tier: the long window of a burn
    rate, else the severity. `labels` are those that the rule gives.
    """

    id: str
    alert: str
    labels: Mapping[str, str]
    expression: str
    for_s: float
    keep_firing_for_s: float
    #: The longest range or offset, of the recording rules that it reads too.
    window_s: float
    summary: str

    @property
    def severity(self) -> str:
        return self.labels.get("severity", "")

    @property
    def fires_within_s(self) -> float:
        """What it takes at most from the fault on."""
        return self.for_s + self._telling_s

    @property
    def resolves_within_s(self) -> float:
        """What it takes at most from the healing on."""
        return self._telling_s + self.keep_firing_for_s

    @property
    def _telling_s(self) -> float:
        """The window that decides: of two windows the short one; of a long look back at what is usual, its end."""
        short = self.labels.get("short_window")
        return milliseconds(short) / 1000 if short else min(self.window_s, _HOUR_S)


def read_yaml(path: Path) -> Any:
    """What a YAML file says. Raises YamlMissing, or ConfigurationError for what is no YAML."""
    try:
        import yaml
    except ImportError as error:
        raise YamlMissing("drills read YAML: pip install 'glassbus[drill]', or pip install PyYAML") from error
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error


def shipped_groups() -> list[dict[str, Any]]:
    """The rule groups that ship. Raises ShippedFileMissing, or as `read_yaml` does."""
    return groups_of([shipped.find(RULES)])


def shipped_routing() -> dict[str, Any]:
    """The Alertmanager configuration that ships. Raises as `shipped_groups` does."""
    read: dict[str, Any] = read_yaml(shipped.find(ALERTMANAGER))
    return read


def groups_of(paths: list[Path]) -> list[dict[str, Any]]:
    """The rule groups in these files. Raises ConfigurationError for a file without."""
    groups: list[dict[str, Any]] = []
    for path in paths:
        read = read_yaml(path)
        found = read.get("groups") if isinstance(read, dict) else None
        if not isinstance(found, list):
            raise ConfigurationError(f"{path} has no rule groups")
        groups += found
    return groups


def rules_of(groups: list[dict[str, Any]]) -> dict[str, Rule]:
    """Every alert rule, by its id. Raises ConfigurationError where two have the same."""
    rules = [rule for group in groups for rule in group.get("rules", ())]
    recorded = {str(rule["record"]): str(rule["expr"]) for rule in rules if "record" in rule}
    alerting = [rule for rule in rules if "alert" in rule]
    tiers = Counter(str(rule["alert"]) for rule in alerting)
    found: dict[str, Rule] = {}
    for rule in alerting:
        name, expression = str(rule["alert"]), str(rule["expr"])
        labels = {str(key): str(value) for key, value in rule.get("labels", {}).items()}
        tier = labels.get("long_window", labels.get("severity", ""))
        known = f"{name}/{tier}" if tiers[name] > 1 else name
        if known in found:
            raise ConfigurationError(f"two rules are {known}: their alerts cannot be told apart")
        found[known] = Rule(
            id=known,
            alert=name,
            labels=labels,
            expression=expression,
            for_s=_seconds(rule, "for"),
            keep_firing_for_s=_seconds(rule, "keep_firing_for"),
            window_s=max(longest_s(one) for one in _with_recorded(expression, recorded)),
            summary=str(rule.get("annotations", {}).get("summary", "")),
        )
    return found


def without(groups: list[dict[str, Any]], ids: Collection[str]) -> list[dict[str, Any]]:
    """The groups without these alert rules, and without the recording rules that then nothing rests on."""
    found = rules_of(groups)
    gone = {(found[one].alert, *sorted(found[one].labels.items())) for one in ids}
    made = copy.deepcopy(groups)
    for group in made:
        group["rules"] = [
            rule
            for rule in group["rules"]
            if "alert" not in rule or (rule["alert"], *sorted(rule.get("labels", {}).items())) not in gone
        ]
    recorded = {str(rule["record"]): str(rule["expr"]) for group in made for rule in group["rules"] if "record" in rule}
    alerting = [str(rule["expr"]) for group in made for rule in group["rules"] if "alert" in rule]
    read = {token.text for alert in alerting for one in _with_recorded(alert, recorded) for token in tokens(one)}
    for group in made:
        group["rules"] = [rule for rule in group["rules"] if "alert" in rule or rule["record"] in read]
    return made


def _seconds(rule: dict[str, Any], key: str) -> float:
    return milliseconds(str(rule.get(key, "0"))) / 1000


def _with_recorded(expression: str, recorded: dict[str, str]) -> Iterator[str]:
    """`expression`, and those of the recording rules that it rests on."""
    waiting, seen = [expression], set[str]()
    while waiting:
        one = waiting.pop()
        yield one
        for token in tokens(one):
            if token.kind == "name" and token.text in recorded and token.text not in seen:
                seen.add(token.text)
                waiting.append(recorded[token.text])


def faster_rules(groups: list[dict[str, Any]], factor: float) -> dict[str, Any]:
    """A rule file with `groups`, each duration divided by `factor`. Raises ConfigurationError."""
    made = copy.deepcopy(groups)
    for group in made:
        _divide(group, _GROUP_TIMES, factor)
        for rule in group.get("rules", ()):
            rule["expr"] = scaled(str(rule["expr"]), factor)
            _divide(rule, _RULE_TIMES, factor)
    return {"groups": made}


def faster_routing(shipped_config: dict[str, Any], factor: float, url: str) -> dict[str, Any]:
    """An Alertmanager configuration whose times are divided by `factor`, and whose receivers tell the webhook at `url`.

    A receiver that is shipped without `send_resolved` keeps that. Raises ConfigurationError.
    """
    if not isinstance(shipped_config, dict) or "route" not in shipped_config or "receivers" not in shipped_config:
        raise ConfigurationError("the Alertmanager configuration has no route, or no receivers")
    made = copy.deepcopy(shipped_config)
    kept = made.get("global") or {}
    timeout = kept.get("resolve_timeout", "5m")
    # The rest of `global` is about mail servers and chats, which are not told.
    made["global"] = {"resolve_timeout": divided(str(timeout), factor)}
    made.pop("templates", None)
    _divide_routes(made["route"], factor, root=True)
    made["receivers"] = [_told_here(one, url) for one in made["receivers"]]
    return made


def _divide(holder: dict[str, Any], keys: tuple[str, ...], factor: float) -> None:
    for key in keys:
        if key in holder:
            holder[key] = divided(str(holder[key]), factor)


#: Alertmanager's own, for a root route that leaves them out.
_ROOT_TIMES = {"group_wait": "30s", "group_interval": "5m", "repeat_interval": "4h"}


def _divide_routes(route: dict[str, Any], factor: float, *, root: bool = False) -> None:
    if root:
        for key, usual in _ROOT_TIMES.items():
            route.setdefault(key, usual)
    _divide(route, _ROUTE_TIMES, factor)
    for child in route.get("routes", ()):
        _divide_routes(child, factor)


def _told_here(receiver: dict[str, Any], url: str) -> dict[str, Any]:
    ways = [way for key, value in receiver.items() if key.endswith("_configs") for way in value or ()]
    # One that is shipped to tell nobody is told here all the same: that is how its route is seen. Only some kinds
    # of receivers (webhook among them) tell by default that an alert is resolved.
    tells = not ways or any(
        way.get("send_resolved", key in _TELL_RESOLVED)
        for key, value in receiver.items()
        if key.endswith("_configs")
        for way in value or ()
    )
    return {
        "name": receiver["name"],
        "webhook_configs": [{"url": f"{url}/{receiver['name']}", "send_resolved": tells, "max_alerts": 0}],
    }


_TELL_RESOLVED = frozenset({"webhook_configs", "pagerduty_configs", "opsgenie_configs", "victorops_configs"})
