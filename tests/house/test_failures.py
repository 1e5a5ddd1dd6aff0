"""pcsc_safe never mistakes an exception of a signal handler, even an OSError, for the failure of its own call."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

import pcsc_safe

PACKAGE = Path(pcsc_safe.__file__).parent
IN_THE_BROKER = {"served", "server", "sharing", "watch", "__init__", "__main__"}
"""Modules that run in a broker, where no handler raises."""

WITH_A_REASON = {
    "_core.log._write": "print() runs whatever the application has put in the place of sys.stderr",
    "_core.reconnecting.reconnecting": "it raises what it doesn't know",
    "_native.interruptible.attempt": "on the way out of a handler's exception",
    "broker.start._path_of": "importlib's own errors, when a broker is started",
    "broker.values._read_text": "a UnicodeDecodeError is nobody else's",
    "broker.values._read_opaque": "a UnicodeDecodeError is nobody else's",
}


def modules() -> dict[str, Path]:
    """The modules whose code runs in the application's threads, in PC/SC calls."""
    files = [file for room in ("_core", "_native", "broker") for file in (PACKAGE / room).glob("*.py")]
    return {f"{file.parent.name}.{file.stem}": file for file in files if file.stem not in IN_THE_BROKER}


def catching(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Handlers that catch an exception of Python without checking its origin or raising it again."""
    kinds = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)}
    for node in ast.walk(function):
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} & kinds
            asks = any(isinstance(name, ast.Name) and name.id == "is_ours" for name in ast.walk(node))
            last = node.body[-1]
            if caught and not asks and not (isinstance(last, ast.Raise) and last.exc is None):
                yield node
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "contextlib.suppress":
            yield node


def test_who_catches_asks_whose_it_is() -> None:
    """Every handler uses ``failures.is_ours()`` or ``failures.suppress()``, or is in the list, with its reason."""
    found = {
        f"{name}.{function.name}"
        for name, file in modules().items()
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef) and any(catching(function))
    }
    assert found == set(WITH_A_REASON)


def test_what_it_raises_itself_has_a_text() -> None:
    """No ``raise`` of a class of Python alone: such an exception would be taken for one that another thread sends."""
    bare = {
        f"{name}:{node.lineno}"
        for name, file in modules().items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name) and node.exc.id in vars(builtins)
        if node.exc.id != "NotImplementedError"
    }
    assert bare == set()
