"""From a transport URL to the transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from glassbus.clock import Clock
from glassbus.config import Address, Settings, Spool
from glassbus.errors import ConfigurationError
from glassbus.transport import Supervise, Transport
from glassbus.transport.memory import MemoryTransport


def make_transport(
    addresses: Sequence[Address],
    *,
    settings: Settings,
    clock: Clock,
    durability: str = "disk",
    supervise: Supervise | None = None,
    spool: Spool | None = None,
) -> Transport:
    """The transport for `addresses`; does no I/O. Raises ConfigurationError.

    `supervise` makes what keeps a broker's transport connected; `spool` is what to keep while it is not.
    """
    if any(address.scheme == "nats" for address in addresses):
        return _spooling(lambda watch: _nats(addresses, settings, clock, watch), settings, clock, supervise, spool)
    if spool is not None and spool.enabled:
        raise ConfigurationError("a spool is for a broker that may be away; memory:// and sqlite:// need none")
    if len(addresses) > 1:
        raise ConfigurationError("a failover set needs a broker transport; memory:// and sqlite:// take one URL")
    address = addresses[0]
    if address.host or address.port:
        raise ConfigurationError(
            f"{address} names a host; write sqlite:///relative/path.db or sqlite:////absolute/path.db (three or four "
            "slashes), or memory://"
        )
    known = {"durability"} if address.scheme == "sqlite" else set()
    unknown = sorted(set(address.options) - known)
    if unknown:
        hint = "'durability' (disk or process)" if known else "none"
        raise ConfigurationError(f"unknown option {unknown[0]!r} in the URL of {address}; it takes {hint}")
    if address.scheme == "memory":
        if address.path.strip("/"):
            raise ConfigurationError(
                f"memory:// takes no path, got {address}; use sqlite:/// to keep messages in a file"
            )
        return MemoryTransport(clock=clock, spill_dir=settings.spill_dir, name=settings.name)
    # Imported here so that a bus in memory does not load the database engine.
    from glassbus.transport.sqlite import SqliteTransport

    path = address.path[1:]
    if not path or path.endswith("/"):
        raise ConfigurationError(f"{address} names no file; write sqlite:///path/to/file.db")
    wanted = address.options.get("durability", durability)
    if wanted not in ("disk", "process"):
        raise ConfigurationError(f"durability must be 'disk' or 'process', not {wanted!r}")
    return SqliteTransport(path, clock=clock, durability="disk" if wanted == "disk" else "process")


def _spooling(
    make: Callable[[Supervise | None], Transport],
    settings: Settings,
    clock: Clock,
    supervise: Supervise | None,
    spool: Spool | None,
) -> Transport:
    """A broker's transport, with a spool before it where there is a place for one and nobody turned it off."""
    if settings.state_dir is None and spool is not None and spool.enabled:
        raise ConfigurationError("a spool is a file: say where, with state_dir=")
    if settings.state_dir is None or supervise is None or not (spool is None or spool.enabled):
        return make(supervise)
    from glassbus.transport.spool import SpoolingTransport  # which needs the database engine

    return SpoolingTransport(
        make, supervise, spool or Spool(), folder=settings.state_dir, bus=settings.name, clock=clock
    )


def _nats(addresses: Sequence[Address], settings: Settings, clock: Clock, supervise: Supervise | None) -> Transport:
    if any(address.scheme != "nats" for address in addresses):
        raise ConfigurationError("a failover set is of one kind: nats:// URLs go with nats:// URLs only")
    try:
        from glassbus.transport.nats import NatsTransport
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "nats":
            raise
        raise ConfigurationError(
            "nats:// needs nats-py: pip install 'glassbus[nats]', or from a clone pip install '.[nats]'"
        ) from error
    if supervise is None:
        raise ConfigurationError(
            "a transport of nats:// needs a supervisor that keeps it connected: give it `supervise`"
        )
    return NatsTransport(addresses, clock=clock, name=settings.name, supervise=supervise)
