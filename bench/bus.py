"""This bus's rows."""

from __future__ import annotations

from bench.rows import Row

MEMORY: tuple[Row, ...] = ()
LATENCY: tuple[Row, ...] = ()
OVERHEAD: tuple[Row, ...] = ()
ERRORS: tuple[Row, ...] = ()
DURABLE: tuple[Row, ...] = ()
