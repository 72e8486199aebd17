"""`import glassbus` offers what `__all__` says, no more and no less."""

from __future__ import annotations

import inspect
import types

import glassbus
from glassbus import errors

#: What the package itself needs to give each bus its observers; no user's business.
WIRING = {"default_observers", "telemetry_observers"}


def test_all_names_exactly_what_the_package_offers() -> None:
    offered = {
        name
        for name, value in vars(glassbus).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name not in WIRING
    }
    assert {name for name in glassbus.__all__ if name != "__version__"} == offered
    assert list(glassbus.__all__) == sorted(glassbus.__all__)


def test_every_exception_can_be_caught_by_its_name_from_the_package() -> None:
    raised = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.GlassbusError)
    }
    assert raised <= set(glassbus.__all__)


def test_the_tree_at_the_top_of_errors_is_the_tree_there_is() -> None:
    drawn: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.lstrip("│├└─ ").split(" ")[0]
        if name and name != "Everything":
            drawn.append(((len(line) - len(line.lstrip("│├└─ "))) // 4, name))
    path: list[str] = []
    for depth, name in drawn:
        path[depth:] = [name]
        kind = getattr(errors, name)
        assert kind.__mro__[1].__name__ == (path[depth - 1] if depth else "Exception"), name
    assert {name for _, name in drawn} == {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.GlassbusError)
    }
