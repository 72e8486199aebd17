"""The blocking face: for programs of threads, over the same core as everything else."""

from glassbus.blocking.breaker import CircuitBreaker
from glassbus.blocking.bus import ProductionMessageBus
from glassbus.blocking.manager import ErrorRecoveryManager

__all__ = ["CircuitBreaker", "ErrorRecoveryManager", "ProductionMessageBus"]
