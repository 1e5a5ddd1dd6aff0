"""The layout of the tests: a directory for each room of the package, helpers for shared code, a complete README.md."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from places import TESTS

import pcsc_safe

PACKAGE = Path(pcsc_safe.__file__).parent
ON_TOP = {"hosts", "whole", "house"}
"""The directories of tests that belong to no single room of the package."""

FILES = sorted(TESTS.rglob("*.py"))
MODULES = [file for file in FILES if file.name.startswith("test_")]
HELPERS = [file for file in FILES if file not in MODULES]
ROOMS = {file.parent.name for file in MODULES}


def imported(file: Path) -> set[str]:
    """The names of all modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def sections() -> dict[str, set[str]]:
    """The files in the rows of each section of README.md."""
    found = {}
    for section in re.split(r"(?m)^## ", (TESTS / "README.md").read_text())[1:]:
        title, _, text = section.partition("\n")
        found[title] = set(re.findall(r"(?m)^\| `(\w+\.py)` \|", text))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_imports_a_test_module(file: Path) -> None:
    """What two test modules share is in a helper; a test module may import only itself, as pickle does."""
    tests = {module.stem for module in MODULES} - {file.stem}
    assert not tests & {name.rpartition(".")[2] for name in imported(file)}


def test_the_rooms() -> None:
    """Each test module is in a directory: one for a room of the package, or one of three others; none is a package."""
    rooms = {path.name.lstrip("_") for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms | ON_TOP == ROOMS
    assert {file.parent.parent for file in MODULES} == {TESTS}
    assert {file.parent for file in HELPERS} == {TESTS}
    assert not list(TESTS.rglob("__init__.py"))


def test_each_name_is_one_modules() -> None:
    """All file names differ, and no helper is named like a room or a standard module."""
    names = [file.stem for file in FILES]
    assert sorted(names) == sorted(set(names))
    helpers = {file.stem for file in HELPERS}
    assert not helpers & ROOMS
    assert not helpers & getattr(sys, "stdlib_module_names", set())  # since Python 3.10


def test_the_page_names_each_file() -> None:
    """README.md has a row for each file, in the section of its directory, and no other row."""
    expected = {room: {file.name for file in MODULES if file.parent.name == room} for room in ROOMS}
    assert sections() == {**expected, "Helpers": {file.name for file in HELPERS}}
