"""A story as text: read in half a minute, in 80 columns, with or without colours."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from glassbus.cli.common import count, duration, own_command, paint, printable
from glassbus.story import Around, DeliveryStory, Failure, Published, Step, Story, TraceOfStory

_WIDTH_MIN, _WIDTH_MAX = 60, 110
_TIME = 14
_ERROR_MAX = 400
#: Of a longer story the middle is left out.
_FIRST, _LAST = 16, 32
_LABEL = 11
#: What happens around a message, not to it.
_MOVES = frozenset(
    {"breaker", "moves", "paused", "resumed", "load_shed", "load_regained", "intake_paused", "intake_resumed"}
)
_STATE_STYLES = {"handled": "good", "dead_lettered": "bad", "expired": "warn", "discarded": "warn", "unknown": "warn"}
_MARKS = {"handled": "✔", "dead_lettered": "✖", "expired": "✖", "discarded": "✖", "unknown": "?"}


class Places(NamedTuple):
    """How other commands are told where this is: those that ask the store, and those that read the journal."""

    store: str
    journal: str


def story_text(story: Story, places: Places) -> str:
    """All of it."""
    return "\n".join(_lines(story, places, max(_WIDTH_MIN, min(_WIDTH_MAX, shutil.get_terminal_size().columns))))


def _lines(story: Story, places: Places, width: int) -> Iterator[str]:
    published = story.published
    yield f"{paint('message', 'bold')}    {printable(story.message_id)}"
    yield from _labelled("published", _publish_text(published), width)
    for step in story.publishing:
        yield from _labelled("", f"{_clock(step.at)} {_named(step)}: {printable(step.why)}", width)
    day = _day(published.at)
    for delivery in story.deliveries:
        yield ""
        yield from _delivery_lines(delivery, day, width)
    if not story.deliveries and story.store:
        yield from _labelled("now", "in no queue: no subscription has it", width)
    if story.traces:
        yield ""
    for trace in story.traces:
        yield from _trace_lines(trace, first=trace is story.traces[0], width=width)
    yield from _section("notes", [printable(note) for note in story.notes], width, "dim")
    following = _next(story, places)
    if following:
        yield ""
    for number, command in enumerate(following):
        label = "" if number else "next"
        yield f"{paint(label, 'bold')}{' ' * (_LABEL - len(label))}{command}"


def _labelled(label: str, text: str, width: int, style: str = "") -> Iterator[str]:
    lines = textwrap.wrap(text, width - _LABEL, break_long_words=False, break_on_hyphens=False) or [""]
    for number, line in enumerate(lines):
        head = paint(label, "bold") + " " * (_LABEL - len(label)) if not number else " " * _LABEL
        yield f"{head}{paint(line, style)}".rstrip()


def _section(label: str, texts: list[str], width: int, style: str = "") -> Iterator[str]:
    if texts:
        yield ""
    for number, text in enumerate(texts):
        yield from _labelled(label if not number else "", text, width, style)


def _publish_text(published: Published) -> str:
    parts = [f"on {printable(published.topic)}"] if published.topic else []
    parts += [f"at {_moment(published.at)}"] if published.at else []
    parts += [f"level {printable(published.level)}"] if published.level else []
    if published.priority not in ("", "normal"):
        parts.append(f"{printable(published.priority)} priority")
    if published.key is not None:
        parts.append(f"key {printable(published.key, 60)}")
    if published.subscriptions:
        many = "to" if published.complete else "to at least"
        parts.append(f"{many} {', '.join(map(printable, published.subscriptions))}")
    return ", ".join(parts) or "unknown where and when"


def _trace_lines(trace: TraceOfStory, *, first: bool, width: int) -> Iterator[str]:
    held = ", ".join(map(printable, trace.holds)) or "nothing that is told here"
    held += f"; linked to {printable(trace.linked_to[:8])}" if trace.linked_to else ""
    trace_id = printable(trace.trace_id)
    label = "traces" if first else ""
    head = f"{paint(label, 'bold')}{' ' * (_LABEL - len(label))}{trace_id}"
    if _LABEL + len(trace_id) + 2 + len(held) <= width:
        yield f"{head}  {paint(held, 'dim')}"
    else:
        yield head
        yield from _labelled("", f"  {held}", width, "dim")
    if trace.url:
        yield f"{' ' * _LABEL}{printable(trace.url)}"


# One delivery


def _delivery_lines(delivery: DeliveryStory, day: str, width: int) -> Iterator[str]:
    now = delivery.now
    style = _STATE_STYLES.get(now.state, "warn" if now.owner_lives is False or now.held else "")
    mark = _MARKS.get(now.state, "·")
    name = printable(delivery.subscription)
    head = f"{paint(name, 'bold')}{' ' * max(1, _LABEL - len(name))}"
    lines = textwrap.wrap(f"{mark} {printable(now.text)}", width - _LABEL, break_on_hyphens=False)
    yield head + paint(lines[0], style)
    for line in lines[1:]:
        yield " " * _LABEL + paint(line, style)
    if delivery.steps:
        yield ""
    yield from _steps_lines(delivery.steps, day, width)


def _steps_lines(steps: tuple[Step, ...], day: str, width: int) -> Iterator[str]:
    told: Failure | None = None
    allowed = [step.details.get("max_attempts") for step in steps]
    most = max((value for value in allowed if type(value) is int), default=0)
    around = Around()
    process = 0
    left_out = range(_FIRST, len(steps) - _LAST) if len(steps) > _FIRST + _LAST else range(0)
    for number, step in enumerate(steps):
        if number in left_out:
            if number == left_out.start:
                yield paint(f"{'':<{_TIME}}… {len(left_out):,} steps are left out here: --json has them", "dim")
            continue
        if step.at and _day(step.at) != day:
            day = _day(step.at)
            yield paint(day, "dim")
        if step.process and step.process != process:
            if process:
                yield paint(f"{'':<{_TIME}}from here in process {step.process}", "dim")
            process = step.process
        yield from _step_lines(step, told, most, width)
        if step.kind == "attempt" and step.around is not None and step.around != around:
            around = step.around
            yield from _wrapped(f"around it: {_around_text(around)}", width, "warn" if not around.calm else "dim")
        told = step.error or told


def _step_lines(step: Step, told: Failure | None, most: int, width: int) -> Iterator[str]:
    clock = f"{_clock(step.started_at or step.at):<{_TIME}}"
    match step.kind:
        case "attempt" if step.outcome == "handled":
            yield paint(clock, "dim") + paint(f"{_attempt(step, most)}  ✔ handled", "good")
            yield from _wrapped(step.why, width)
        case "attempt":
            took = f"failed after {_took(step.duration_s)}" if step.duration_s is not None else "failed"
            yield paint(clock, "dim") + paint(f"{_attempt(step, most)}  ✖ {took}", "bad")
            yield from _error_lines(step.error, told, width)
        case "retry":
            when = f"in {_took(step.delay_s)}" if step.delay_s else "at once"
            why = f" ({step.why})" if step.why else ""
            yield from _wrapped(f"→ attempt {step.attempt + 1} {when}{why}", width)
        case "dead_lettered":
            yield paint(clock, "dim") + paint("dead letter", "bad")
            yield from _wrapped(step.why, width)
            yield from _error_lines(step.error, told, width)
        case kind if kind in _MOVES:
            named = step.why if kind in ("breaker", "moves") else f"{_named(step)}: {step.why}"
            first, *rest = textwrap.wrap(printable(named), width - _TIME, break_on_hyphens=False) or [""]
            yield paint(clock + first, "dim")
            yield from (paint(" " * _TIME + line, "dim") for line in rest)
        case _:
            yield f"{paint(clock, 'dim')}{paint(_named(step), 'warn')}"
            yield from _wrapped(step.why, width)
            if step.kind == "reported":
                yield from _error_lines(step.error, told, width)


def _attempt(step: Step, most: int) -> str:
    of_all = f" of {most}" if most >= step.attempt else ""
    return f"attempt {step.attempt}{of_all}" + (f" after replay {step.replays}" if step.replays else "")


def _took(seconds: float) -> str:
    return duration(seconds) if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


def _named(step: Step) -> str:
    name = printable(step.kind.replace("_", " "))
    if step.kind == "replayed":
        return f"replayed ({step.replays})"
    return "given again" if step.kind == "redelivered" else name


def _error_lines(error: Failure | None, told: Failure | None, width: int) -> Iterator[str]:
    if error is None:
        return
    if told is not None and (error.fingerprint, error.message) == (told.fingerprint, told.message):
        if error.error_id != told.error_id:
            yield from _wrapped(f"the same error again ({error.fingerprint})", width, "dim")
        return
    text = printable(f"{error.type.removeprefix('glassbus.errors.')}: {error.message}", _ERROR_MAX)
    yield from _wrapped(f"{text} ({error.category}, {error.severity}, {error.fingerprint})", width)


def _around_text(around: Around) -> str:
    parts = [] if around.kill_switch == "closed" else [f"kill switch {around.kill_switch}"]
    parts += ["paused by an operator"] if around.paused else []
    parts += [f"breaker {printable(name)} {state}" for name, state in around.breakers.items()]
    parts += [f"load shed, {count(around.load_limit, 'attempt')} at once"] if around.load_limit else []
    parts += ["intake paused"] if around.intake_paused else []
    return ", ".join(parts) or "all breakers closed again"


def _wrapped(text: str, width: int, style: str = "") -> Iterator[str]:
    for line in textwrap.wrap(printable(text), width - _TIME, break_on_hyphens=False):
        yield " " * _TIME + paint(line, style)


# What to do


def _next(story: Story, places: Places) -> list[str]:
    made = []
    for delivery in story.deliveries:
        letter = delivery.now.dead_letter
        if letter:
            made += [f"{own_command()} dlq {verb} {_word(letter)}{places.store}" for verb in ("show", "replay")]
    prints = [
        step.error.fingerprint
        for delivery in story.deliveries
        for step in delivery.steps
        if step.error is not None and step.error.fingerprint
    ]
    if prints:
        made.append(f"{own_command()} errors show {_word(prints[-1])}{places.journal}")
    return list(dict.fromkeys(made))[:6]


def _word(text: str) -> str:
    """`text` as one word of a command, whatever a shell or a terminal would make of what is in it."""
    return shlex.quote(printable(text))


# Times


def _clock(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%H:%M:%S.%f}"[:12] if _shows(at) else "-"


def _day(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d}" if _shows(at) else ""


def _moment(at: float) -> str:
    return f"{_day(at)} {_clock(at)} UTC" if _shows(at) else "an unknown time"


def _shows(at: float) -> bool:
    return 0 < at < 1e11
