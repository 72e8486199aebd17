"""The bus, a file for each part of its face."""

from glassbus.bus.messagebus import MessageBus, default_observers, telemetry_observers
from glassbus.bus.operating import Drained

__all__ = ["Drained", "MessageBus", "default_observers", "telemetry_observers"]
