"""Who is told of what, asked of Alertmanager's own tool; and what silences what, asked of a real Alertmanager."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.alerts.rulebook import ALERTS, NAMES, RULES, read
from tests.server_kit import READY_S, Server, fetch, free_port, need, running

CONFIG = ALERTS / "alertmanager.yml"
#: What the bus pushes by itself; docs/escalation.md.
PUSHED = {"alertname": "GlassbusKillSwitchOpen", "source": "glassbus", "bus": "orders", "fingerprint": "5f1c"}


def amtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([need("amtool"), *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_the_configuration_is_valid() -> None:
    checked = amtool("check-config", str(CONFIG))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def routed(receivers: str, labels: dict[str, str]) -> None:
    pairs = [f"{name}={value}" for name, value in labels.items()]
    tested = amtool("config", "routes", "test", f"--config.file={CONFIG}", f"--verify.receivers={receivers}", *pairs)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize(
    ("severity", "receivers"),
    [("emergency", "emergency,critical"), ("critical", "critical"), ("warning", "warning"), ("info", "info")],
)
def test_each_severity_goes_to_its_people_and_an_emergency_to_both(severity: str, receivers: str) -> None:
    routed(receivers, {"alertname": "GlassbusX", "severity": severity, "bus": "orders", "subscription": "charge"})


@pytest.mark.parametrize(
    ("severity", "receivers"),
    [("critical", "critical"), ("high", "warning"), ("medium", "warning"), ("low", "info")],
)
def test_what_the_bus_pushes_is_routed_by_its_own_severities(severity: str, receivers: str) -> None:
    routed(receivers, {**PUSHED, "severity": severity})


def test_the_watchdog_goes_to_the_dead_mans_switch_alone() -> None:
    routed("deadman", {"alertname": "Watchdog", "severity": "none"})


def test_what_no_route_knows_is_not_lost() -> None:
    routed("warning", {"alertname": "SomebodyElses", "severity": "page"})


def test_a_wrong_route_is_found() -> None:
    with pytest.raises(AssertionError):
        routed("warning", {"alertname": "GlassbusX", "severity": "critical"})


def test_every_severity_of_a_rule_has_a_route() -> None:
    routes = read(CONFIG)["route"]["routes"]
    known = {"emergency", "critical", "warning", "info"}
    matched = {one for one in known for route in routes for matcher in route["matchers"] if one in matcher}
    assert {rule.labels["severity"] for rule in RULES if rule.name != "Watchdog"} == known == matched


def test_inhibitions_name_only_alerts_that_exist() -> None:
    pushed = {"GlassbusLedgerUnbalanced"}
    assert set(re.findall(r"Glassbus[A-Z]\w+", CONFIG.read_text("utf-8"))) <= set(NAMES) | pushed


#: What explains, what is silenced by it, and what is near and is not silenced. Each case has a bus of its own.
INHIBITIONS: dict[str, tuple[dict[str, str], list[dict[str, str]], list[dict[str, str]]]] = {
    "a higher tier speaks for the lower one of the same subscription": (
        {"alertname": "GlassbusQueueNearFull", "severity": "critical", "subscription": "a"},
        [{"alertname": "GlassbusQueueNearFull", "severity": "warning", "subscription": "a"}],
        [
            {"alertname": "GlassbusQueueNearFull", "severity": "warning", "subscription": "b"},
            {"alertname": "GlassbusHandlerSlow", "severity": "warning", "subscription": "a"},
        ],
    ),
    "an emergency speaks for every lower tier": (
        {"alertname": "GlassbusMessagesUnaccounted", "severity": "emergency"},
        [{"alertname": "GlassbusMessagesUnaccounted", "severity": one} for one in ("critical", "info")],
        [{"alertname": "GlassbusConnectionDown", "severity": "critical", "instance": "a:1"}],
    ),
    "a warning speaks for a note": (
        {"alertname": "GlassbusDeadLettersOld", "severity": "warning", "subscription": "a"},
        [{"alertname": "GlassbusDeadLettersOld", "severity": "info", "subscription": "a"}],
        [{"alertname": "GlassbusDeadLettersOld", "severity": "info", "subscription": "b"}],
    ),
    "the fast page speaks for the slow ticket": (
        {"alertname": "GlassbusErrorBudgetBurn", "severity": "critical", "subscription": "a", "long_window": "1h"},
        [{"alertname": "GlassbusErrorBudgetBurn", "severity": "warning", "subscription": "a", "long_window": "3d"}],
        [],
    ),
    "one breaker does not speak for another": (
        {"alertname": "GlassbusBreakerStuckOpen", "severity": "critical", "breaker": "x", "kind": "component"},
        [{"alertname": "GlassbusBreakerStuckOpen", "severity": "warning", "breaker": "x", "kind": "component"}],
        [{"alertname": "GlassbusBreakerStuckOpen", "severity": "warning", "breaker": "y", "kind": "component"}],
    ),
    "nobody is told twice of one ledger": (
        {"alertname": "GlassbusMessagesUnaccounted", "severity": "emergency"},
        [{"alertname": "GlassbusLedgerUnbalanced", "severity": "critical", "source": "glassbus"}],
        [{"alertname": "GlassbusEmergencyStop", "severity": "critical", "source": "glassbus"}],
    ),
    "a dead target explains what seems wrong with it, and with no other": (
        {"alertname": "GlassbusTargetDown", "severity": "warning", "job": "j", "instance": "a:1"},
        [{"alertname": "GlassbusConnectionDown", "severity": "critical", "job": "j", "instance": "a:1"}],
        [
            {"alertname": "GlassbusConnectionDown", "severity": "critical", "job": "j", "instance": "b:1"},
            {"alertname": "GlassbusMessagesUnaccounted", "severity": "emergency"},
        ],
    ),
    "a bus that is gone explains everything but an emergency": (
        {"alertname": "GlassbusBusAbsent", "severity": "critical"},
        [
            {"alertname": "GlassbusTargetDown", "severity": "warning", "job": "j", "instance": "a:1"},
            {"alertname": "GlassbusErrorBudgetBurn", "severity": "critical", "subscription": "a"},
        ],
        [{"alertname": "GlassbusCriticalUnresolved", "severity": "emergency", "unresolved": "GlassbusBusAbsent"}],
    ),
    "a lost connection explains the silence and the endpoint's breaker": (
        {"alertname": "GlassbusConnectionDown", "severity": "critical", "job": "j", "instance": "a:1"},
        [
            {"alertname": "GlassbusStoreSilent", "severity": "critical", "job": "j", "instance": "a:1"},
            {"alertname": "GlassbusHealthCritical", "severity": "critical", "job": "j", "instance": "a:1"},
            {"alertname": "GlassbusBreakerStuckOpen", "severity": "warning", "breaker": "e", "kind": "endpoint"},
        ],
        [
            {"alertname": "GlassbusSpoolFilling", "severity": "critical", "job": "j", "instance": "a:1"},
            {"alertname": "GlassbusBreakerStuckOpen", "severity": "warning", "breaker": "q", "kind": "component"},
        ],
    ),
    "a held subscription explains that its messages get old": (
        {"alertname": "GlassbusSubscriptionHeld", "severity": "warning", "subscription": "a"},
        [
            {"alertname": "GlassbusMessageStale", "severity": "warning", "subscription": "a"},
            {"alertname": "GlassbusRetryStorm", "severity": "warning", "subscription": "a"},
        ],
        [
            {"alertname": "GlassbusMessageStale", "severity": "warning", "subscription": "b"},
        ],
    ),
    "but not that they get very old": (
        {"alertname": "GlassbusSubscriptionHeld", "severity": "warning", "subscription": "a"},
        [{"alertname": "GlassbusHandlerSlow", "severity": "warning", "subscription": "a"}],
        [{"alertname": "GlassbusMessageStale", "severity": "critical", "subscription": "a"}],
    ),
    "hanging handlers explain the stall": (
        {"alertname": "GlassbusHandlersOverdue", "severity": "critical", "subscription": "a"},
        [{"alertname": "GlassbusConsumerStalled", "severity": "critical", "subscription": "a"}],
        [{"alertname": "GlassbusConsumerStalled", "severity": "critical", "subscription": "b"}],
    ),
    "without a collector no span gets out": (
        {"alertname": "GlassbusPipelineTargetDown", "severity": "critical", "job": "collector"},
        [{"alertname": "GlassbusSpanExportFailing", "severity": "warning", "instance": "a:1", "queue": "failures"}],
        [{"alertname": "GlassbusObserverFailing", "severity": "warning", "observer": "x"}],
    ),
}


@pytest.fixture(scope="module")
def alertmanager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    place = tmp_path_factory.mktemp("alertmanager")
    url = f"http://127.0.0.1:{free_port()}"
    quiet = read(CONFIG)
    quiet["receivers"] = [{"name": one["name"]} for one in quiet["receivers"]]  # only who is silenced is asked here
    config = place / "alertmanager.yml"
    config.write_text(json.dumps(quiet), "utf-8")
    command = [
        need("alertmanager"),
        f"--config.file={config}",
        f"--storage.path={place}",
        f"--web.listen-address={url.removeprefix('http://')}",
        "--cluster.listen-address=",
    ]
    with running(Server(command, f"{url}/-/ready", place)):
        yield url


def silenced(url: str, alerts: list[dict[str, str]], expected: list[bool]) -> list[bool | None]:
    """Push `alerts`, and whether each is inhibited, in their order, as soon as that is as expected.

    It takes them up one after the other: for a moment a consequence may be known without its cause. None: not taken up.
    """
    ends = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    body = json.dumps([{"labels": labels, "endsAt": ends} for labels in alerts]).encode()
    request = urllib.request.Request(f"{url}/api/v2/alerts", body, {"Content-Type": "application/json"})  # noqa: S310 - loopback
    with urllib.request.urlopen(request, timeout=10):  # noqa: S310
        pass
    until = time.monotonic() + READY_S
    while True:
        shown: list[dict[str, Any]] = json.loads(fetch(f"{url}/api/v2/alerts"))
        of = {json.dumps(one["labels"], sort_keys=True): one["status"] for one in shown}
        statuses = [of.get(json.dumps(labels, sort_keys=True)) for labels in alerts]
        found = [None if not one or one["state"] == "unprocessed" else bool(one["inhibitedBy"]) for one in statuses]
        if found == expected or time.monotonic() > until:
            return found
        time.sleep(0.05)


@pytest.mark.parametrize("case", INHIBITIONS)
def test_what_explains_silences_what_follows_from_it_and_nothing_else(alertmanager: str, case: str) -> None:
    source, follows, near = INHIBITIONS[case]
    own = {"bus": f"bus-{list(INHIBITIONS).index(case)}"}
    alerts = [{**own, **labels} for labels in (source, *follows, *near)]
    expected = [False] + [True] * len(follows) + [False] * len(near)
    assert silenced(alertmanager, alerts, expected) == expected


def test_nothing_at_all_explains_every_absence(alertmanager: str, tmp_path: Path) -> None:
    alerts = [
        {"alertname": "GlassbusAbsent", "severity": "critical"},
        {"alertname": "GlassbusBusAbsent", "severity": "critical", "bus": "any"},
        {"alertname": "GlassbusTargetDown", "severity": "warning", "bus": "other", "job": "j", "instance": "z:1"},
    ]
    assert silenced(alertmanager, alerts, [False, True, True]) == [False, True, True]
