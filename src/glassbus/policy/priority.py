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

    __slots__ = ("_at", "_orders")

    def __init__(self) -> None:
        self._at = -1
        self._orders = _ORDERS

    def hold_back_low(self, held: bool) -> None:
        """Leave LOW out until further notice, or no longer."""
        self._orders = _WITHOUT_LOW if held else _ORDERS

    def order(self) -> tuple[int, ...]:
        """Priorities in the order to try for one claim; the first is the one whose turn it is."""
        self._at = at = (self._at + 1) % _TURNS
        return self._orders[at]


_TURNS = len(CYCLE)
_ORDERS: tuple[tuple[int, ...], ...] = tuple(
    (first, *(int(p) for p in sorted(Priority, reverse=True) if p != first)) for first in CYCLE
)
_WITHOUT_LOW = tuple(tuple(p for p in order if p != Priority.LOW) for order in _ORDERS)
