"""Where a delivery is now: from the store where it was asked, else from the last thing that the journal tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from glassbus.record.wording import moment, span
from glassbus.story.model import Failure, Now, Step
from glassbus.transport import Located, QueueState
from glassbus.transport.locating import SPOOL

if TYPE_CHECKING:
    from glassbus.story.tell import Asked

#: What a journal's last word on a delivery means for where it is. Others leave it where it was.
_ENDS = {"expired": "expired", "discarded": "discarded", "dead_lettered": "dead_lettered"}


def now_of(subscription: str, steps: Sequence[Step], asked: Asked | None, now: float) -> Now:
    if asked is None:
        return _by_journal(steps, now)
    located = None
    if asked.where is not None:
        located = next((one for one in asked.where.deliveries if one.subscription == subscription), None)
    queue = asked.queues.get(subscription)
    if located is not None:
        return _located(located, queue, asked, steps, now)
    return _gone(steps, queue, asked)


# By the store


def _located(located: Located, queue: QueueState | None, asked: Asked, steps: Sequence[Step], now: float) -> Now:
    held = "" if queue is None else "paused" if queue.hold.paused else queue.hold.forced
    letter = next((one for one in asked.letters if one.id == located.dead_letter), None)
    if letter is None and located.dead_letter:
        letter = next((one for one in asked.letters if one.subscription == located.subscription), None)
    died = [step for step in steps if step.kind == "dead_lettered"]
    since = letter.died_at if letter is not None else died[-1].at if died and located.dead_letter else 0.0
    return Now(
        state=located.state,
        text=_text(located, queue, held, letter.reason if letter is not None else "", since, now),
        source="store",
        since=since,
        due_at=located.due_at,
        expires_at=located.expires_at,
        attempt=located.attempt,
        owner=located.owner,
        owner_lives=located.owner_lives,
        waits_for_key=located.waits_for_key,
        redelivered=located.redelivered,
        held=held if held != "disabled" else "",
        consumers=queue.consumers if queue is not None else None,
        dead_letter=located.dead_letter,
        reason=letter.reason if letter is not None else "",
        error=Failure.of(letter.report) if letter is not None else None,
    )


def _text(located: Located, queue: QueueState | None, held: str, reason: str, since: float, now: float) -> str:
    if located.subscription == SPOOL and located.state != "dead_lettered":
        return "in the local spool, to be forwarded when the broker is back"
    match located.state:
        case "dead_lettered":
            when = f" at {moment(since)}" if since else ""
            why = f" ({reason.replace('_', ' ')})" if reason else ""
            made = f"{located.attempt:,} attempt{'' if located.attempt == 1 else 's'}"
            return f"dead-lettered{when} after {made}{why}"
        case "in_flight":
            who = f" with {located.owner}" if located.owner else ""
            lives = {True: "", False: ", which is dead: given again when a bus next looks", None: ""}
            return f"in flight: attempt {located.attempt}{who}{lives[located.owner_lives]}"
        case "retrying":
            return f"waiting for attempt {located.attempt + 1}, {_due(located.due_at, now)}{_waits(queue, held)}"
        case "scheduled":
            return f"waiting for its time, {_due(located.due_at, now)}{_waits(queue, held)}"
        case _:
            again = f", to be given again ({located.redelivered.replace('_', ' ')})" if located.redelivered else ""
            key = ", behind another message of its key" if located.waits_for_key else ""
            return f"ready for attempt {located.attempt + 1}{again}{key}{_waits(queue, held)}"


def _due(at: float, now: float) -> str:
    return f"at {moment(at)} (in {span(at - now)})" if at > now else "due now"


def _waits(queue: QueueState | None, held: str) -> str:
    if held == "paused":
        return "; its subscription is paused"
    if held == "forced_open":
        return "; its kill switch is forced open"
    return "; nobody consumes its subscription now" if queue is not None and not queue.consumers else ""


def _gone(steps: Sequence[Step], queue: QueueState | None, asked: Asked) -> Now:
    """It left the store. Of its ends, being handled after a success is the only one that the journal need not tell."""
    last = _last_word(steps)
    if last is not None and last.kind in ("expired", "discarded"):
        return Now(last.kind, f"{last.kind} at {moment(last.at)}: {last.why}", "journal", since=last.at)
    if last is not None and last.outcome == "handled":
        return Now("handled", f"handled at {moment(last.at)} by attempt {last.attempt}", "journal", since=last.at)
    if any(step.kind == "unrouted" for step in steps):
        return Now("unknown", "it went nowhere", "journal")
    if queue is None and asked.queues:
        return Now("unknown", "its subscription is no longer in the store", "store", certain=False)
    if last is not None and last.kind == "dead_lettered":
        text = "no longer in the store: its dead letter was replayed and handled, or discarded, without this journal"
        return Now("unknown", text, "store", certain=False)
    text = "handled, it seems: no longer in the store, and no other end is told"
    return Now("handled", text, "store", certain=False)


# By the journal alone


def _last_word(steps: Sequence[Step]) -> Step | None:
    telling = [
        step
        for step in steps
        if step.kind in (*_ENDS, "attempt", "retry", "replayed", "redelivered", "given_back", "spooled")
    ]
    return telling[-1] if telling else None


def _by_journal(steps: Sequence[Step], now: float) -> Now:
    last = _last_word(steps)
    if last is None:
        return Now("unknown", "no store was asked, and the journal does not tell", "journal", certain=False)
    if last.kind in ("expired", "discarded"):
        return Now(last.kind, f"{last.kind} at {moment(last.at)}: {last.why}", "journal", since=last.at)
    if last.outcome == "handled":
        return Now("handled", f"handled at {moment(last.at)} by attempt {last.attempt}", "journal", since=last.at)
    asked = "as the journal has it; no store was asked"
    if last.kind == "dead_lettered":
        text = f"dead-lettered at {moment(last.at)}, {asked}"
        return Now(
            "dead_lettered", text, "journal", certain=False, since=last.at, attempt=last.attempt, error=last.error
        )
    if last.kind == "retry":
        text = f"waiting for attempt {last.attempt + 1}, due at {moment(last.due_at)}, {asked}"
        return Now("retrying", text, "journal", certain=False, due_at=last.due_at, attempt=last.attempt)
    if last.kind in ("replayed", "given_back"):
        return Now("ready", f"back in its queue since {moment(last.at)}, {asked}", "journal", certain=False)
    return Now(
        "unknown", f"attempt {last.attempt} was at work at {moment(last.at)}; no store was asked", "journal", False
    )
