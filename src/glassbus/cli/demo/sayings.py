"""What the demo's news say of facts that are only told: how it recovers by itself."""

from __future__ import annotations

from typing import Literal

from glassbus import facts as f
from glassbus.cli.common import duration, printable
from glassbus.facts import Fact

Mood = Literal["good", "warn", "bad", "dim"]


def saying(fact: Fact) -> tuple[Mood, str, str] | None:
    """(mood, text, key of the line) for `fact`; None when it says nothing to people who watch."""
    match fact:
        case f.FaultInjected():
            return "bad", f"fault injected: {fact.fault} at {fact.target} (the demo does that)", ""
        case f.FaultHealed():
            return "good", f"fault healed: {fact.fault} at {fact.target}, it struck {fact.hits:,} x", ""
        case f.HealthChanged():
            mood: Mood = "good" if fact.to_status == "healthy" else "bad" if fact.to_status == "critical" else "warn"
            return mood, f"health: {fact.from_status} -> {fact.to_status} ({printable(fact.detail, 120)})", ""
        case f.OverflowHandled():
            return (
                "warn",
                f"{fact.subscription}: queue full: {fact.action}",
                f"overflow {fact.subscription} {fact.action}",
            )
        case f.TimeoutAdapted():
            longer = fact.to_s > fact.from_s
            text = f"{fact.subscription}: timeout {duration(fact.from_s)} -> {duration(fact.to_s)}"
            return "warn" if longer else "good", text, f"timeout {fact.subscription} {longer}"
        case f.LoadShed() | f.LoadRegained():
            shed = isinstance(fact, f.LoadShed)
            low = ", low priority held" if fact.low_priority_held else ""
            text = f"{fact.subscription}: {fact.limit} of {fact.concurrency} at once{low}"
            return "warn" if shed else "good", text, f"load {fact.subscription} {shed}"
        case f.IntakePaused():
            return "bad", f"intake paused: {printable(fact.reason, 160)}", ""
        case f.IntakeResumed():
            return "good", f"intake resumed after {duration(fact.after_s)}", ""
        case f.CodecFellBack():
            text = f"{fact.delivery.subscription}: not {fact.declared}, but {fact.used}"
            return "warn", text, f"codec {fact.delivery.subscription}"
        case f.RecoveryConcluded():
            done = fact.outcome == "succeeded"
            text = f"{fact.component} {fact.target}: {fact.action} {fact.outcome}"
            return "good" if done else "bad", text, f"recovery {fact.component} {fact.target} {fact.outcome}"
        case f.ConnectionLost():
            return "bad", f"connection to {fact.endpoint} lost: {printable(fact.error, 120)}", "lost"
        case f.ConnectionRestored():
            return "good", f"connected to {fact.endpoint} after {duration(fact.after_s)}", ""
        case f.EscalationOpened():
            return (
                "bad",
                f"escalated ({fact.severity}): {printable(fact.summary, 160)}",
                f"escalated {fact.fingerprint}",
            )
        case f.EscalationResolved():
            return "good", f"escalation resolved: {fact.name}, {printable(fact.reason, 80)}", ""
        case f.EmergencyStopBegan():
            return "bad", f"EMERGENCY STOP: {printable(fact.reason, 160)}", ""
        case _:
            return None
