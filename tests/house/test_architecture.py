"""The structure of the package: what each room may import, what an import loads, and no circular imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pcsc_safe

PACKAGE = Path(pcsc_safe.__file__).parent
PUBLIC = {"__init__", "__main__", "errors", "policy", "scard"}
COMPOSITION = "_gateways"

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "policy": {"errors"},
    "_core": {"errors", "policy"},
    "_native": {"_core", "errors"},
    "broker": {"_core", "errors", "policy"},
    "_trace": {"_core"},
    COMPOSITION: {"_core", "_native", "_trace", "broker", "policy"},
    "scard": {COMPOSITION},
    "retrofit": {COMPOSITION, "_core", "_trace", "errors", "policy"},
    "testing": {"__init__", "errors"},
    "demo": {"__init__", "testing"},
    "doctor": {"__init__", "_core", "broker", "demo", "errors", "policy", "testing"},
    "__init__": {"_core", "policy"},  # the rest by name, on first access
    "__main__": {"__init__", "testing"},
}
"""A room, and the rooms that it may import; DESIGN, section 6.  Calls and imports only go down."""

WITH_A_REASON = {("broker.__main__", COMPOSITION)}
"""The broker's program, which imports the rooms after it has set up its process."""


class Import(NamedTuple):
    """One module imports another of the package.

    :ivar importer: its name in the package, with the room.
    :ivar imported: the name of the other module.
    :ivar line: the line of the import.
    :ivar is_inner: whether the import is in a function.
    """

    importer: str
    imported: str
    line: int
    is_inner: bool


def modules() -> dict[str, Path]:
    """The modules of the package, by name, without those that Python imports by itself."""
    files = [file for file in PACKAGE.rglob("*.py") if "site" not in file.parts]
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in files}


def imports() -> list[Import]:
    """All imports except those for type checkers."""
    found = []
    for name, file in modules().items():
        tree = ast.parse(file.read_text())
        skipped = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        inside = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.Lambda))
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level and node not in skipped:
                for imported in imported_by(name, node):
                    found.append(Import(name, imported, node.lineno, node in inside))
    return found


def imported_by(importer: str, node: ast.ImportFrom) -> set[str]:
    """The modules that a statement imports."""
    here = importer.split(".")[: -node.level]
    base = [*here, *(node.module.split(".") if node.module else [])]
    known = modules()
    found = set()
    for alias in node.names:
        names = (".".join([*base, alias.name]), ".".join([*base, alias.name, "__init__"]), ".".join(base))
        found.add(next((name for name in names if name in known), ".".join([*base, "__init__"])))
    return found


def room(module: str) -> str:
    """The room of a module."""
    return module.partition(".")[0]


def test_the_rooms() -> None:
    """Outside the rooms are only the public modules, and the module that connects the rooms."""
    top = {name for name in modules() if "." not in name}
    assert top == PUBLIC | {COMPOSITION}
    assert {room(name) for name in modules()} == MAY_IMPORT.keys()


def test_the_import_table() -> None:
    """Each room imports only what the table allows, and the table allows nothing that isn't imported."""
    used: dict[str, set[str]] = {name: set() for name in MAY_IMPORT}
    for one in imports():
        if room(one.importer) != room(one.imported) and (one.importer, room(one.imported)) not in WITH_A_REASON:
            used[room(one.importer)].add(room(one.imported))
    assert used == MAY_IMPORT


def test_no_import_runs_in_a_circle() -> None:
    """No import is circular, not even inside a function."""
    arrows: dict[str, set[str]] = {name: set() for name in modules()}
    for one in imports():
        if one.imported != one.importer:
            arrows[one.importer].add(one.imported)
    while leaves := [name for name, imported in arrows.items() if not imported & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert not arrows


def test_an_import_in_a_function_has_its_reason_beside_it() -> None:
    """An import in a function has a comment with its reason, on its line or in the line above."""
    silent = []
    for one in imports():
        if one.is_inner:
            lines = modules()[one.importer].read_text().split("\n")
            if "#" not in lines[one.line - 1] and "#" not in lines[one.line - 2]:
                silent.append(f"{one.importer}:{one.line}")
    assert not silent


def test_one_module_imports_pyscard() -> None:
    """Only one module imports pyscard, so untyped values enter in one place."""
    importers = set()
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(room(each) == "smartcard" for each in names) and room(name) not in ("demo", "doctor"):
                importers.add(name)
    assert importers == {"_native.pyscard"}


def test_importing_the_package_loads_nothing() -> None:
    """``import pcsc_safe`` loads neither pyscard nor wrapt; ``pcsc_safe.scard`` loads only what every program needs."""
    code = (
        "import sys, pcsc_safe\n"
        "assert not {'smartcard', 'wrapt', 'logging'} & set(sys.modules), sorted(sys.modules)\n"
        "import smartcard.scard\n"
        "pyscards = set(sys.modules)\n"
        "import pcsc_safe.scard\n"
        "heavy = {'wrapt', 'logging', 'socket', 'asyncio', 'inspect', 'dataclasses', 'subprocess'}\n"
        "assert not heavy & (set(sys.modules) - pyscards), sorted(set(sys.modules) - pyscards)\n"
    )
    subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"], check=True, timeout=30
    )


def test_it_can_be_imported_on_windows() -> None:
    """Importing ``pcsc_safe.scard`` needs no name that only Unix has; on Windows its functions are pyscard's own."""
    code = (
        "import os, select, signal, socket, sys\n"
        "lacks = {\n"
        "    os: 'fork register_at_fork posix_spawn set_blocking sysconf O_CLOEXEC O_DIRECTORY WNOHANG',\n"
        "    select: 'poll epoll', signal: 'SIGHUP SIGKILL SIGQUIT SIGALRM pthread_sigmask',\n"
        "    socket: 'AF_UNIX MSG_DONTWAIT SCM_RIGHTS CMSG_SPACE',\n"
        "}\n"
        "import smartcard.scard\n"
        "for module, names in lacks.items():\n"
        "    for name in names.split():\n"
        "        vars(module).pop(name, None)\n"
        "sys.modules.update(dict.fromkeys(('fcntl', 'resource', 'termios', 'pwd', 'grp')))\n"
        "sys.platform = 'win32'\n"
        "import pcsc_safe.scard\n"
        "assert pcsc_safe.scard.SCardTransmit is smartcard.scard.SCardTransmit\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_the_hooks_are_registered_once() -> None:
    """One module registers at-fork hooks, because they can't be unregistered."""
    calls = []
    for path in PACKAGE.rglob("*.py"):
        calls += [
            (path.stem, node.lineno)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr == "register_at_fork"
        ]
    assert {stem for stem, _ in calls} == {"process"}


def test_public_modules_say_what_is_public() -> None:
    """Each module has a docstring, and every name in the public ``__all__`` exists."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
    for name in pcsc_safe.__all__:
        assert getattr(pcsc_safe, name) is not None


def test_what_begins_with_an_epoch_is_registered() -> None:
    """Each module's ``_begin(epoch)`` is registered, so every child calls it; no other test would notice otherwise."""
    for name, file in modules().items():
        text = file.read_text()
        if "\ndef _begin(epoch" in text and name != "_core.process":
            assert "at_begin=_begin)" in text, name
