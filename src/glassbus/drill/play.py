"""One fault, where it befalls, and the alerts that it must make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from glassbus.drill.outside import Outside
    from glassbus.drill.scenes.base import Scene

#: The site of plays that do not mind company: as many processes as it takes.
SHARED = "shared"


class Play(msgspec.Struct, frozen=True, kw_only=True):
    """A drill of one or more alerts, which one fault makes.

    `alerts` are ids of rules: the alert's name, with `/` and its tier where several rules make it. `fault` says what
    goes wrong, for people. `scene` befalls a bus, in the process `site`; `outside` befalls a process as a whole,
    or the servers that watch. By which labels an alert is known to be of this play say `marks` (one of them is
    enough; default: the label `bus` is the play's name). `own_rule` is a recording rule of the user's own that is
    evaluated besides. `last`: it blinds everything, so it is played on servers of its own, after the others like it.
    `inverted`: it fires always, and must be missed when it does not. `heavy`: to make its fault takes much of a
    processor, so those are made one after the other. `needs`: servers besides Prometheus and Alertmanager.
    """

    name: str
    fault: str
    alerts: tuple[str, ...]
    scene: type[Scene] | None = None
    outside: type[Outside] | None = None
    site: str = SHARED
    marks: tuple[Mapping[str, str], ...] = ()
    own_rule: str = ""
    last: bool = False
    inverted: bool = False
    heavy: bool = False
    needs: tuple[str, ...] = ()

    def claims(self, labels: Mapping[str, str]) -> bool:
        """Whether an alert with these labels is of this play."""
        return any(mark.items() <= labels.items() for mark in self.marks or ({"bus": self.name},))
