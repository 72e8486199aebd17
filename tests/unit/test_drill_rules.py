"""What a drill makes of the shipped rules and routes, and that each alert has its fault."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from glassbus import ConfigurationError
from glassbus.drill import scenes
from glassbus.drill.durations import milliseconds
from glassbus.drill.outside import Outside
from glassbus.drill.play import Play
from glassbus.drill.rules import (
    YamlMissing,
    faster_routing,
    faster_rules,
    read_yaml,
    rules_of,
    shipped_groups,
    shipped_routing,
    without,
)
from glassbus.drill.scenes.base import Scene
from glassbus.drill.stack import Pace
from glassbus.drill.table import BY_ALERT, PLAYS

GROUPS = shipped_groups()
RULES = rules_of(GROUPS)
HOOK = "http://127.0.0.1:1"


def test_every_shipped_alert_has_one_fault_that_makes_it() -> None:
    assert set(BY_ALERT) == set(RULES)
    listed = [alert for play in PLAYS.values() for alert in play.alerts]
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("play", PLAYS.values(), ids=lambda play: play.name)
def test_a_play_befalls_something_and_says_what(play: Play) -> None:
    assert play.scene is not None or play.outside is not None
    assert play.fault == play.fault.strip() != ""
    for what, base in ((play.scene, Scene), (play.outside, Outside)):
        assert what is None or (issubclass(what, base) and inspect.getdoc(what))
    if play.outside is None:
        assert play.scene is not None
        assert play.scene is not Scene


def test_rules_are_faster_and_otherwise_as_shipped() -> None:
    before = json.loads(json.dumps(GROUPS))
    fast = faster_rules(GROUPS, 60)["groups"]
    assert before == GROUPS
    assert [group["name"] for group in fast] == [group["name"] for group in GROUPS]
    for group, shipped in zip(fast, GROUPS, strict=True):
        for rule, original in zip(group["rules"], shipped["rules"], strict=True):
            changed = {key for key in original if rule[key] != original[key]}
            assert rule.keys() == original.keys()
            assert changed <= {"expr", "for", "keep_firing_for"}
            for key in changed - {"expr"}:
                assert milliseconds(rule[key]) * 60 == milliseconds(original[key])


def test_intervals_of_a_group_are_divided_too() -> None:
    group = {"name": "g", "interval": "1m", "query_offset": "30s", "rules": [{"record": "a", "expr": "b"}]}
    made = faster_rules([group], 60)["groups"][0]
    assert (made["interval"], made["query_offset"]) == ("1000ms", "500ms")


def test_two_rules_that_cannot_be_told_apart_are_refused() -> None:
    rule = {"alert": "A", "expr": "up", "labels": {"severity": "warning"}}
    with pytest.raises(ConfigurationError, match="two rules are A/warning"):
        rules_of([{"name": "g", "rules": [rule, rule]}])


def test_a_rule_takes_the_windows_of_the_recording_rules_that_it_rests_on() -> None:
    groups = [
        {
            "name": "g",
            "rules": [
                {"record": "a:b:rate1h", "expr": "rate(b[1h])"},
                {"record": "a:c", "expr": "a:b:rate1h / 2"},
                {"alert": "A", "expr": "a:c > 1 and up[5m]", "for": "10m", "keep_firing_for": "5m"},
            ],
        }
    ]
    rule = rules_of(groups)["A"]
    assert (rule.window_s, rule.for_s, rule.keep_firing_for_s) == (3600, 600, 300)
    assert (rule.fires_within_s, rule.resolves_within_s) == (4200, 3900)


def test_rules_can_be_left_out_with_what_only_they_rest_on() -> None:
    left = without(GROUPS, ["GlassbusErrorBudgetBurn/3d", "Watchdog"])
    assert set(rules_of(left)) == RULES.keys() - {"GlassbusErrorBudgetBurn/3d", "Watchdog"}
    recorded = {rule["record"] for group in left for rule in group["rules"] if "record" in rule}
    assert recorded
    assert {name for name in recorded if name.endswith("3d")} == set()
    assert {name for name in recorded if name.endswith("1d")}


def routes(route: dict[str, Any]) -> list[dict[str, Any]]:
    return [route, *(one for child in route.get("routes", ()) for one in routes(child))]


def test_routes_are_faster_and_everybody_is_told_at_the_webhook_under_his_own_name() -> None:
    shipped = shipped_routing()
    made = faster_routing(shipped, 60, HOOK)
    for fast, original in zip(routes(made["route"]), routes(shipped["route"]), strict=True):
        for key in ("group_wait", "group_interval", "repeat_interval"):
            if key in original:
                assert milliseconds(fast[key]) == pytest.approx(milliseconds(original[key]) / 60, abs=1)
        assert {k: v for k, v in fast.items() if k in ("matchers", "receiver", "group_by", "continue")} == {
            k: v for k, v in original.items() if k in ("matchers", "receiver", "group_by", "continue")
        }
    assert made["inhibit_rules"] == shipped["inhibit_rules"]
    assert [one["name"] for one in made["receivers"]] == [one["name"] for one in shipped["receivers"]]
    assert {one["webhook_configs"][0]["url"] for one in made["receivers"]} == {
        f"{HOOK}/{one['name']}" for one in shipped["receivers"]
    }


def test_who_is_not_told_that_it_is_over_is_not_told_so_in_a_drill() -> None:
    receivers = [
        {"name": "hook", "webhook_configs": [{"url": "x"}]},
        {"name": "quiet", "webhook_configs": [{"url": "x", "send_resolved": False}]},
        {"name": "mail", "email_configs": [{"to": "x"}]},
        {"name": "mail-too", "email_configs": [{"to": "x", "send_resolved": True}]},
        {"name": "nobody"},
    ]
    made = faster_routing({"route": {"receiver": "hook"}, "receivers": receivers}, 60, HOOK)
    told = {one["name"]: one["webhook_configs"][0]["send_resolved"] for one in made["receivers"]}
    assert told == {"hook": True, "quiet": False, "mail": False, "mail-too": True, "nobody": True}
    # What a route leaves out is Alertmanager's own, which is divided as well.
    assert made["route"]["group_interval"] == "5000ms"
    assert made["global"] == {"resolve_timeout": "5000ms"}


@pytest.mark.parametrize("broken", [{}, {"route": {}}, []])
def test_a_configuration_without_routes_is_refused(broken: Any) -> None:
    with pytest.raises(ConfigurationError, match="no route"):
        faster_routing(broken, 60, HOOK)


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rules.yml"
    path.write_text("groups: [")
    with pytest.raises(ConfigurationError, match=r"rules\.yml"):
        read_yaml(path)


def test_without_pyyaml_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(YamlMissing, match=r"glassbus\[drill\]"):
        read_yaml(tmp_path / "any.yml")


@pytest.mark.parametrize("factor", [0.5, 1000.0])
def test_a_factor_that_cannot_be_is_refused(factor: float) -> None:
    with pytest.raises(ConfigurationError, match="the factor must be from 1 to"):
        Pace.shipped(factor)


def test_it_slows_down_by_halves_as_long_as_somebody_waits_for_it() -> None:
    pace = Pace.shipped(60.0)
    factors = [pace.factor]
    while pace.can_slow:
        pace = pace.slower()
        factors.append(pace.factor)
    assert factors == [60, 30, 15]


def test_every_scene_is_played() -> None:
    """One that no alert needs any more would rot."""
    modules = [vars(__import__(f"{scenes.__name__}.{name}", fromlist=["x"])) for name in ("handlers", "queues")]
    modules += [vars(__import__(f"{scenes.__name__}.{name}", fromlist=["x"])) for name in ("stores", "telemetry")]
    made = {
        one
        for module in modules
        for one in module.values()
        if isinstance(one, type) and issubclass(one, Scene) and one.__module__ == module["__name__"]
    }
    played = {play.scene for play in PLAYS.values()}
    bases = {base for one in made for base in one.__mro__[1:]}
    assert made - played - bases == set()
