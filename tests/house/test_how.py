"""docs/how.md describes the code as it is."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import pcsc_safe

PACKAGE = Path(pcsc_safe.__file__).parent
ROOT = PACKAGE.parent
PAGE = (ROOT / "docs" / "how.md").read_text()


@pytest.fixture(scope="module")
def rooms() -> ModuleType:
    specification = importlib.util.spec_from_file_location("rooms", ROOT / "scripts" / "rooms.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_picture_is_drawn_from_the_imports(rooms: ModuleType) -> None:
    """The picture is what scripts/rooms.py draws now; its arrows lead down or sideways."""
    assert rooms.PICTURE.read_text() == rooms.svg(), "run scripts/rooms.py --write"
    layer = {name: number for number, names in enumerate(rooms.LAYERS) for name in names}
    assert [(one, other) for one, other in rooms.arrows() if layer[one] > layer[other]] == []
    assert {path.stem if path.suffix else path.name for path in PACKAGE.iterdir()} - {"__init__", "__main__"} >= set(
        layer
    )


def test_every_file_and_function_exists() -> None:
    """Every file and function that the page names exists."""
    files = set(re.findall(r"`(pcsc_safe/[\w/]+\.py)`", PAGE))
    assert files
    assert [name for name in files if not (ROOT / name).is_file()] == []
    trees = [ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")]
    defined = {
        node.name for tree in trees for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    called = set(re.findall(r"`(\w+)\(\)`", PAGE)) - {"exec"}
    assert len(called) > 10
    assert called - defined == set()
