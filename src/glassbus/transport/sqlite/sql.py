"""Few, large statements: each one the writer runs gives up the interpreter lock, and may wait to get it back."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from typing import Any

import apsw

#: Rows to one INSERT, largest first; SQLite's limit is 32,766 parameters.
_CHUNKS = (256, 64, 16, 4, 1)


def select(connection: apsw.Connection, sql: str, values: Sequence[Any] = ()) -> list[Any]:
    """Every row of a query. What the columns hold, the schema says."""
    found: list[Any] = connection.execute(sql, values).fetchall()
    return found


def value(connection: apsw.Connection, sql: str, values: Sequence[Any] = ()) -> Any:
    """The one value of a query."""
    return connection.execute(sql, values).get


def numbers(values: Collection[int]) -> Any:
    """`values` as one parameter, for `IN carray(?)`."""
    return apsw.carray(array("q", values))


def texts(values: Collection[str]) -> Any:
    return apsw.carray(tuple(values))


class Bulk:
    """Inserts many rows by few statements."""

    def __init__(self, table: str, columns: str) -> None:
        names = columns.split()
        self._width = len(names)
        row = f"({','.join('?' * self._width)})"
        head = f"INSERT INTO {table} ({','.join(names)}) VALUES "  # noqa: S608 - constant names
        self._statements = [(n, head + ",".join([row] * n)) for n in _CHUNKS]

    def insert(self, connection: apsw.Connection, values: Sequence[Any]) -> None:
        """`values`: the rows, one after the other."""
        if not values:
            return
        at, left = 0, len(values) // self._width
        for rows, statement in self._statements:
            while left >= rows:
                end = at + rows * self._width
                connection.execute(statement, values[at:end])
                at, left = end, left - rows
