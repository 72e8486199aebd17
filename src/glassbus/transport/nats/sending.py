"""An entry on its way: what was asked for in it, and what follows from the verdicts, or from its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from glassbus.transport.nats import records as r
from glassbus.transport.nats.requests import Answers, Call, Publish

Finish = Callable[[Any, Answers], None]


class Sending:
    """One entry. `parts` go before it, and `bodies` (subject and bytes) before those.

    Each operation has a `Finish`; `undo` makes good that nothing of it was stored.
    """

    __slots__ = ("bodies", "calls", "finishes", "number", "ops", "owner", "parts", "publishes", "sent", "undos")

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.number = 0
        self.ops: list[r.Op] = []
        self.finishes: list[Finish] = []
        self.undos: list[Callable[[], None]] = []
        self.publishes: list[Publish] = []
        self.calls: list[Call] = []
        self.parts: list[r.Op] = []
        self.bodies: list[tuple[str, bytes]] = []
        self.sent = False  # whether anything of it but bodies may have reached the server

    def add(self, op: r.Op, finish: Finish | None = None, undo: Callable[[], None] | None = None) -> None:
        self.ops.append(op)
        self.finishes.append(finish or _nothing_follows)
        if undo is not None:
            self.undos.append(undo)

    def finish(self, verdicts: list[Any], answers: Answers) -> None:
        for finish, verdict in zip(self.finishes, verdicts, strict=True):
            finish(verdict, answers)

    def undo(self) -> None:
        for undo in reversed(self.undos):
            undo()
        self.undos = []

    def entries(self, at: float) -> list[r.Entry]:
        """What is written, in this order; the last one has this number."""
        first = self.number - len(self.parts)
        before = [r.Entry(self.owner, first + n, at, [part]) for n, part in enumerate(self.parts)]
        return [*before, r.Entry(self.owner, self.number, at, self.ops)]


def _nothing_follows(verdict: Any, answers: Answers) -> None:
    """Most operations of our own need no answer."""


def bears(entry: r.Entry) -> bool:
    """Whether it holds messages or reports, and so may be needed after a snapshot."""
    return any(isinstance(op, r.Publish | r.Part) or (isinstance(op, r.Settle) and bool(op.report)) for op in entry.ops)
