"""What the source must never hold, found in its syntax tree; and each finder proved on a bad snippet."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import glassbus

PACKAGE = Path(glassbus.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

Finder = Callable[[ast.Module, str], Iterator[int]]


def silent_excepts(tree: ast.Module, text: str) -> Iterator[int]:
    """An error that leaves no trace: `except` with nothing in it but pass, continue, break or a constant.

    Three exceptions are answers and no errors: StopIteration, queue.Full and queue.Empty.
    """
    for node in ast.walk(tree):
        if not (isinstance(node, ast.ExceptHandler) and all(map(_says_nothing, node.body))):
            continue
        if node.type is None or _name(node.type) not in ("StopIteration", "Full", "Empty"):
            yield node.lineno


def _says_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Pass | ast.Continue | ast.Break):
        return True
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def suppressions_without_reason(tree: ast.Module, text: str) -> Iterator[int]:
    """`contextlib.suppress` of BaseException, or without a comment on its line or the one above."""
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and _name(node.func) == "suppress"):
            continue
        broad = {_name(argument) for argument in node.args} & {"BaseException"}
        explained = any("#" in lines[number] for number in (node.lineno - 1, node.lineno - 2) if number >= 0)
        if broad or not explained:
            yield node.lineno


def unfinished_work(tree: ast.Module, text: str) -> Iterator[int]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and any(word in token.string for word in ("TODO", "FIXME", "XXX", "HACK")):
            yield token.start[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None and _name(node.exc) == "NotImplementedError":
            # msgspec asks an enc_hook to say so when a type is not its own.
            function = next((f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and node in ast.walk(f)), None)
            if function is None or function.name != "_plain":
                yield node.lineno


def pickle_imports(tree: ast.Module, text: str) -> Iterator[int]:
    banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and _name(node.func) in ("__import__", "import_module") and node.args:
            first = node.args[0]
            names = [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
        else:
            continue
        if banned & {name.partition(".")[0] for name in names}:
            yield node.lineno


def wait_for_calls(tree: ast.Module, text: str) -> Iterator[int]:
    """`asyncio.wait_for` can swallow a cancellation on Python 3.11; a Condition's own `wait_for` is another thing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "wait_for" and _name(node.value) == "asyncio":
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "asyncio" and "wait_for" in {a.name for a in node.names}:
            yield node.lineno


def tasks_without_reference(tree: ast.Module, text: str) -> Iterator[int]:
    """A task that nobody holds may be collected while it runs. One in a TaskGroup is held by the group."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and _makes_a_task(node.value):
            yield node.lineno
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            read = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and _makes_a_task(node.value):
                    for target in node.targets:
                        if isinstance(target, ast.Name) and target.id not in read:
                            yield node.lineno


def _makes_a_task(node: ast.expr) -> bool:
    if not (isinstance(node, ast.Call) and _name(node.func) in ("create_task", "ensure_future")):
        return False
    receiver = _name(node.func.value) if isinstance(node.func, ast.Attribute) else ""
    return "group" not in receiver and receiver != "tg"


def _name(node: ast.expr) -> str:
    """The last name of `a.b.c` or `c(...)`."""
    if isinstance(node, ast.Call):
        return _name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


FINDERS: list[Finder] = [
    silent_excepts,
    suppressions_without_reason,
    unfinished_work,
    pickle_imports,
    wait_for_calls,
    tasks_without_reference,
]


@pytest.mark.parametrize("find", FINDERS, ids=lambda find: find.__name__)
def test_the_source_holds_none(find: Finder) -> None:
    assert len(SOURCES) > 20
    found = []
    for path in SOURCES:
        text = path.read_text()
        found += [f"{path.relative_to(PACKAGE)}:{line}" for line in find(ast.parse(text), text)]
    assert found == []


BAD: list[tuple[Finder, str]] = [
    (silent_excepts, "try:\n    f()\nexcept OSError:\n    pass"),
    (silent_excepts, "for x in y:\n    try:\n        f()\n    except OSError:\n        continue"),
    (silent_excepts, "while 1:\n    try:\n        f()\n    except OSError:\n        break"),
    (silent_excepts, "try:\n    f()\nexcept OSError:\n    ..."),
    (silent_excepts, "try:\n    f()\nexcept OSError:\n    'not worth a word'\n    pass"),
    (silent_excepts, "async def f():\n    try:\n        await g()\n    except BaseException as error:\n        pass"),
    (silent_excepts, "try:\n    f()\nexcept* OSError:\n    pass"),
    (suppressions_without_reason, "with contextlib.suppress(OSError):\n    f()"),
    (suppressions_without_reason, "# everything may fail\nwith suppress(BaseException):\n    f()"),
    (unfinished_work, "x = 1  # TODO: later"),
    (unfinished_work, "# FIXME"),
    (unfinished_work, "def f():\n    raise NotImplementedError"),
    (unfinished_work, "def f():\n    raise NotImplementedError('soon')"),
    (pickle_imports, "import pickle"),
    (pickle_imports, "import os, pickle as p"),
    (pickle_imports, "from pickle import loads"),
    (pickle_imports, "def f():\n    import cloudpickle"),
    (pickle_imports, "importlib.import_module('pickle')"),
    (wait_for_calls, "async def f():\n    await asyncio.wait_for(g(), 1)"),
    (wait_for_calls, "from asyncio import wait_for"),
    (tasks_without_reference, "asyncio.create_task(f())"),
    (tasks_without_reference, "async def f():\n    loop.create_task(g())"),
    (tasks_without_reference, "asyncio.ensure_future(f())"),
    (tasks_without_reference, "async def f():\n    task = asyncio.create_task(g())"),
]
GOOD: list[tuple[Finder, str]] = [
    (silent_excepts, "try:\n    f()\nexcept OSError as error:\n    count(error)"),
    (silent_excepts, "try:\n    f()\nexcept OSError:\n    return None"),
    (silent_excepts, "while 1:\n    try:\n        q.put(x, timeout=1)\n    except queue.Full:\n        continue"),
    (suppressions_without_reason, "# gone already: that is what is wanted\nwith suppress(FileNotFoundError):\n    f()"),
    (suppressions_without_reason, "with suppress(OSError):  # not Linux\n    f()"),
    (unfinished_work, "todo = 'TODO'"),
    (pickle_imports, "import picklejar"),
    (wait_for_calls, "condition.wait_for(lambda: True)"),
    (tasks_without_reference, "self.task = asyncio.create_task(f())"),
    (tasks_without_reference, "async def f():\n    task = asyncio.create_task(g())\n    tasks.add(task)"),
    (tasks_without_reference, "async def f():\n    async with TaskGroup() as group:\n        group.create_task(g())"),
]


@pytest.mark.parametrize(("find", "snippet"), BAD, ids=[f"{find.__name__}-{n}" for n, (find, _) in enumerate(BAD)])
def test_each_finder_finds_what_it_is_for(find: Finder, snippet: str) -> None:
    assert list(find(ast.parse(snippet), snippet)), snippet


@pytest.mark.parametrize(("find", "snippet"), GOOD, ids=[f"{find.__name__}-{n}" for n, (find, _) in enumerate(GOOD)])
def test_no_finder_finds_what_is_fine(find: Finder, snippet: str) -> None:
    assert not list(find(ast.parse(snippet), snippet)), snippet


def test_every_finder_is_proved() -> None:
    assert {find for find, _ in BAD} == {find for find, _ in GOOD} == set(FINDERS)
