"""Put together what is known of one message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from glassbus.message import Priority
from glassbus.record.entries import FloodLine
from glassbus.record.telling import Told
from glassbus.record.wording import moment
from glassbus.story.model import (
    FORMAT,
    DeliveryStory,
    Now,
    Published,
    Step,
    Story,
    TraceOfStory,
)
from glassbus.story.places import now_of
from glassbus.story.steps import Made, moves_around, steps_of
from glassbus.transport import DeadLetterRecord, QueueState, Whereabouts
from glassbus.transport.locating import SPOOL

#: Why nothing may be known of a message.
FORGETS = (
    "one that never failed leaves nothing once it is handled, and of one that failed the journal keeps what fits into "
    "its files, newest first"
)
#: What happened around an attempt this long before it began is told with it, in seconds.
_BEFORE_S = 1.0
#: Of more moves than this in one go, the middle ones are only counted.
_MOVES_MAX = 6
_PRIORITIES = {int(one): one.name.lower() for one in Priority}


class Asked(NamedTuple):
    """What the store at `address` answered. `where` None: it has nothing of the message."""

    address: str
    where: Whereabouts | None
    letters: Sequence[DeadLetterRecord]
    queues: Mapping[str, QueueState]


def tell(message_id: str, told: Told, asked: Asked | None, now: float, *, traces_at: str = "") -> Story | None:
    """The story at wall time `now`, or None where neither knows the message. `asked` None: no store was asked.

    `traces_at` is where traces can be seen, such as http://localhost:16686: for links.
    """
    where = asked.where if asked is not None else None
    if not message_id or (not told.entries and where is None):  # entries of no message are not the story of one
        return None
    made = steps_of(told)
    names = _names(made, where)
    deliveries, notes, whole = [], list(told.notes), True
    for name in names:
        own = [one for one in made if one.subscription == name]
        place = now_of(name, [one.step for one in own], asked, now)
        deliveries.append(DeliveryStory(name, place, tuple(_with_moves(told, name, own))))
        gaps = _gaps(name, [one.step for one in own], place)
        notes += gaps
        whole = whole and not gaps and place.certain
    if not whole:
        notes += _floods(told.floods, made, names)
    publishing = tuple(one.step for one in made if not one.subscription)
    published = _published(told, made, where, names)
    return Story(
        FORMAT,
        message_id,
        now,
        published,
        publishing,
        tuple(deliveries),
        tuple(_traces(published, deliveries, traces_at)),
        tuple(notes),
        asked.address if asked is not None else "",
    )


def _names(made: Iterable[Made], where: Whereabouts | None) -> list[str]:
    """Subscriptions in the order in which something is known of them."""
    told = [one.subscription for one in made if one.subscription]
    stored = [] if where is None else [*(where.routed or ()), *(one.subscription for one in where.deliveries)]
    return list(dict.fromkeys([*told, *stored]))


def _published(told: Told, made: Sequence[Made], where: Whereabouts | None, names: Sequence[str]) -> Published:
    entries = [entry for entry, _ in told.entries]
    topic = where.topic if where is not None else next((entry.topic for entry in entries if entry.topic), "")
    at = where.published_at if where is not None else next((e.published_at for e in entries if e.published_at), 0.0)
    level = next((process.level for _, process in told.entries if process.level), "")
    complete = where is not None and (where.routed is not None or (0 < where.fanout == len(names)))
    first = [one.step for one in made if one.step.trace_id and not one.step.replays and not _delayed(one.step, made)]
    return Published(
        topic,
        at,
        level,
        tuple(name for name in names if name != SPOOL),
        complete,
        _PRIORITIES.get(where.priority, "normal") if where is not None else "",
        where.key if where is not None else None,
        first[0].trace_id if first else "",
        any(step.parent_id for step in first),
    )


def _delayed(step: Step, made: Sequence[Made]) -> bool:
    """Whether `step` is of an attempt that a delayed retry led to: it is in a trace of its own."""
    retries = [one.step for one in made if one.step.kind == "retry" and one.step.replays == step.replays]
    return any(
        retry.details.get("next_attempt") == step.attempt and retry.details.get("action") == "delayed_retry"
        for retry in retries
    )


def _with_moves(told: Told, subscription: str, own: Sequence[Made]) -> list[Step]:
    """The steps of a delivery and what moved around it meanwhile, in time order."""
    steps = [one.step for one in own]
    if not steps:
        return []
    since = min(step.started_at or step.at for step in steps) - _BEFORE_S
    journals = frozenset(one.journal for one in own)
    moves = moves_around(told, subscription, journals, since, max(step.at for step in steps))
    merged = [step for _, step in sorted([*_placed(steps), *_placed(moves)], key=lambda pair: pair[0])]
    shown: list[Step] = []
    run: list[Step] = []
    moving = {id(step) for step in moves}
    for step in merged:
        if id(step) in moving:
            run.append(step)
            continue
        shown += [*_folded(run), step]
        run = []
    return [*shown, *_folded(run)]


def _placed(steps: Sequence[Step]) -> list[tuple[float, Step]]:
    """Each step and when it is told: an attempt when it began, and at once what was decided about it."""
    placed: list[tuple[float, Step]] = []
    for step in steps:
        at = step.started_at or step.at
        if placed and step.kind in ("retry", "dead_lettered") and placed[-1][1].kind in ("attempt", "abandoned"):
            at = placed[-1][0]
        placed.append((at, step))
    return placed


def _folded(run: list[Step]) -> list[Step]:
    if len(run) <= _MOVES_MAX:
        return run
    half = _MOVES_MAX // 2
    left_out = run[half:-half]
    fold = Step(left_out[0].at, "moves", f"{len(left_out):,} more moves until {moment(left_out[-1].at)}")
    return [*run[:half], fold, *run[-half:]]


# What is missing


def _gaps(subscription: str, steps: Sequence[Step], now: Now) -> list[str]:
    """Attempts that must have been, and are not told."""
    missing: list[tuple[int, int]] = []
    lives = sorted({step.replays for step in steps})
    for replays in lives:
        life = [step for step in steps if step.replays == replays and step.attempt]
        if any(step.kind == "dead_lettered" and step.details.get("reason") == "owner_died" for step in life):
            continue
        told = {step.attempt for step in life if step.kind in ("attempt", "retry", "given_back")}
        told |= {step.attempt - 1 for step in life if step.kind == "redelivered"}  # which says why it has no end
        last = max((step.attempt for step in life if step.kind != "redelivered"), default=0)
        if replays == lives[-1] and now.source == "store":
            running = now.state == "in_flight" or bool(now.redelivered)
            last = max(last, now.attempt - running)
        missing += [(replays, attempt) for attempt in range(1, min(last, 10_000) + 1) if attempt not in told]
    if not missing:
        return []
    attempts = ", ".join(
        str(attempt) + (f" (after replay {replays})" if replays else "") for replays, attempt in missing[:8]
    )
    more = f" and {len(missing) - 8:,} more" if len(missing) > 8 else ""
    which = ("attempt", "has", "its") if len(missing) == 1 else ("attempts", "have", "their")
    sentence = f"{subscription}: {which[0]} {attempts}{more} {which[1]} no lines of {which[2]} own"
    return [f"{sentence}: in a summary of a flood, lost, in a file that had to go, or without a journal"]


def _floods(floods: Sequence[FloodLine], made: Sequence[Made], names: Sequence[str]) -> list[str]:
    """Summaries in which something of this message may be."""
    if not floods or not made:
        return []
    first = min(one.step.started_at or one.step.at for one in made)
    last = max(one.step.at for one in made)
    prints = {one.step.error.fingerprint for one in made if one.step.error is not None}
    alike = [
        flood
        for flood in floods
        if flood.since <= last
        and flood.at >= first
        and (flood.report.fingerprint in prints if flood.report is not None else flood.subscription in names)
    ]
    if not alike:
        return []
    count = sum(flood.count for flood in alike)
    since, until = moment(min(flood.since for flood in alike)), moment(max(flood.at for flood in alike))
    when = f"at {since}" if since == until else f"from {since} to {until}"
    return [f"{count:,} facts alike came too fast {when} and are only counted; some may be of this message"]


# Traces


def _traces(published: Published, deliveries: Sequence[DeliveryStory], traces_at: str) -> list[TraceOfStory]:
    """Each trace in the order in which it begins, and what of the story is in it."""
    holds: dict[str, list[str]] = {}
    linked: dict[str, str] = {}
    several = len(deliveries) > 1
    if published.trace_id:
        holds[published.trace_id] = ["publish"] if published.sampled else []
    steps = [
        (step.at, delivery.subscription, step) for delivery in deliveries for step in delivery.steps if step.trace_id
    ]
    before: dict[tuple[str, int], str] = {}
    for _, subscription, step in sorted(steps, key=lambda one: one[0]):
        prefix = f"{subscription} " if several else ""
        held = holds.setdefault(step.trace_id, [])
        label = _label(step)
        if label and prefix + label not in held:
            held.append(prefix + label)
        # A delayed retry is linked to the attempt before it, a replay to the failure that it follows.
        life = (subscription, step.replays)
        earlier = before.get(life)
        if step.kind == "replayed":
            earlier = before.get((subscription, step.replays - 1))
        if earlier and earlier != step.trace_id and step.trace_id != published.trace_id:
            linked.setdefault(step.trace_id, earlier)
        before[life] = step.trace_id
    base = traces_at.rstrip("/")
    return [
        TraceOfStory(trace, tuple(held), linked.get(trace, ""), f"{base}/trace/{trace}" if base else "")
        for trace, held in holds.items()
    ]


def _label(step: Step) -> str:
    match step.kind:
        case "attempt" | "retry" | "settlement_refused" | "abandoned":
            return f"attempt {step.attempt}" + (f" after replay {step.replays}" if step.replays else "")
        case "dead_lettered":
            return "dead letter"
        case "replayed":
            return f"replay {step.replays}"
        case "expired" | "discarded":
            return step.kind
        case _:
            return ""
