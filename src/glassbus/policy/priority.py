"""Weighted choice between the four priorities, so that the lowest never starves."""

from __future__ import annotations

from glassbus.message import Priority

#: Shares when every priority has messages waiting; out of 15 claims LOW gets 1.
WEIGHTS: dict[Priority, int] = {Priority.CRITICAL: 8, Priority.HIGH: 4, Priority.NORMAL: 2, Priority.LOW: 1}


def _cycle() -> tuple[int, ...]:
    """Smooth weighted round robin over one full turn (nginx's algorithm): shares spread evenly."""
    total = sum(WEIGHTS.values())
    credit = dict.fromkeys(WEIGHTS, 0)
    turn = []
    for _ in range(total):
        for priority, weight in WEIGHTS.items():
            credit[priority] += weight
        best = max(credit, key=lambda p: (credit[p], p))
        credit[best] -= total
        turn.append(int(best))
    return tuple(turn)


CYCLE: tuple[int, ...] = _cycle()


class PriorityTurn:
    """Says which priority is next. Priorities without messages give their turn to the highest that has some."""

    __slots__ = ("_at",)

    def __init__(self) -> None:
        self._at = -1

    def order(self) -> tuple[int, ...]:
        """Priorities in the order to try for one claim; the first is the one whose turn it is."""
        self._at = at = (self._at + 1) % _TURNS
        return _ORDERS[at]


_TURNS = len(CYCLE)
_ORDERS: tuple[tuple[int, ...], ...] = tuple(
    (first, *(int(p) for p in sorted(Priority, reverse=True) if p != first)) for first in CYCLE
)
