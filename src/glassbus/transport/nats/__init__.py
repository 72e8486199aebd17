"""The transport of `nats://`: a bus in one JetStream stream, followed and folded by every process (ADR 0015)."""

from __future__ import annotations

from glassbus.transport.nats.transport import LEASE_S, NatsTransport

__all__ = ["LEASE_S", "NatsTransport"]
