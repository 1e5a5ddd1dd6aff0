"""The shape of the library: which module may import which, and what importing it does."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pcsc_safe

PACKAGE = Path(pcsc_safe.__file__).parent
MAY_IMPORT = {
    "__init__": {"_bequest", "_configure", "_pcscd", "_settings", "broker", "errors", "policy", "retrofit"},
    "errors": set(),
    "policy": {"errors"},
    "_process": set(),
    "_events": {"_process"},
    "_late": {"_events", "_process", "retrofit"},
    "_records": {"_events"},
    "_watch": {"_events", "_records"},
    "_history": {"_records"},
    "_timeline": {"_history", "_records"},
    "_report": {"_events", "_history", "_records", "_timeline", "_watch"},
    "_run": {"_report", "_retrofitted", "_timeline", "_watch", "errors", "policy"},
    "_log": {"_process", "_unpatched"},
    "_sacrifice": set(),
    "_version": {"__version__"},
    "_descriptors": {"_process"},
    "_pcscd": {"_descriptors", "_gate", "_process"},
    "_calls": {"_descriptors", "_process", "policy"},
    "_unpatched": set(),
    "_gate": {"_process", "_unpatched"},
    "_pyscard": {"_calls", "_settings", "broker", "errors", "policy"},
    "_contexts": {"_calls", "_descriptors", "_gate", "_log", "_pcscd", "_process", "_pyscard", "_unpatched"},
    "_waits": {"_contexts", "_gate", "_pyscard", "_unpatched"},
    "_native": {"_calls", "_contexts", "_descriptors", "_gate", "_process", "_pyscard"},
    "_handles": {
        "_calls",
        "_descriptors",
        "_events",
        "_gate",
        "_process",
        "_proxies",
        "_unpatched",
        "errors",
        "policy",
    },
    "_proxies": {"_handles"},
    "_recorded": {"_calls", "_events", "_handles", "_pyscard"},
    "_settings": {"_gate", "_pcscd", "policy"},
    "_configure": {"_calls", "_handles", "_settings", "errors", "policy"},
    "_inherited": {
        "_calls",
        "_events",
        "_gate",
        "_handles",
        "_log",
        "_native",
        "_process",
        "_pyscard",
        "_recorded",
        "_settings",
        "broker",
        "errors",
        "policy",
    },
    "_bequest": {
        "_calls",
        "_descriptors",
        "_events",
        "_gate",
        "_handles",
        "_inherited",
        "_log",
        "_native",
        "_process",
        "_settings",
        "_unpatched",
        "broker",
        "errors",
        "policy",
    },
    "_router": {
        "_bequest",
        "_calls",
        "_contexts",
        "_descriptors",
        "_events",
        "_gate",
        "_handles",
        "_inherited",
        "_log",
        "_native",
        "_pcscd",
        "_process",
        "_pyscard",
        "_recorded",
        "_recovery",
        "_settings",
        "_waits",
        "broker",
    },
    "_recovery": {"_calls", "_gate", "_handles", "_process", "_pyscard", "_settings", "_waits", "policy"},
    "scard": {"_router"},
}
BROKER_MAY_IMPORT = {
    "__init__": set(),
    "_values": set(),
    "_wire": {"_calls", "_values"},
    "_start": {"_descriptors", "_retrofitted", "errors"},
    "_client": {"_calls", "_connection", "_descriptors", "_gate", "_log", "_process", "_start", "_wire", "errors"},
    "_connection": {"_descriptors", "_wire"},
    "_mine": {
        "_calls",
        "_client",
        "_connection",
        "_descriptors",
        "_events",
        "_gate",
        "_process",
        "_settings",
        "_start",
        "errors",
        "policy",
    },
    "_freeze": {"__main__", "_start"},
    "_server": {
        "_calls",
        "_contexts",
        "_descriptors",
        "_handles",
        "_native",
        "_pcscd",
        "_pyscard",
        "_router",
        "_sharing",
        "_start",
        "_wire",
    },
    "_sharing": {"_handles", "_pyscard", "_router"},
    "__main__": {"_server", "_start"},
}
RETROFIT_MAY_IMPORT = {
    "__init__": {"_framework", "_monitors", "_patches", "_process", "_scard"},
    "_patches": {"_process"},
    "_framework": {"_patches", "_process", "_settings"},
    "_monitors": {"_framework", "_patches", "_recovery", "_settings"},
    "_scard": {
        "_calls",
        "_descriptors",
        "_framework",
        "_gate",
        "_handles",
        "_inherited",
        "_patches",
        "_pcscd",
        "_process",
        "_pyscard",
        "_router",
        "_settings",
        "_unpatched",
        "policy",
    },
}
DOCTOR_MAY_IMPORT = {
    "__init__": set(),
    "_findings": set(),
    "_sockets": set(),
    "_proc": set(),
    "_ask": {"_sacrifice", "demo"},
    "_tasks": {"_proc", "_process", "_sockets", "broker", "demo"},
    "_machine": {"_ask", "_findings", "_version", "errors", "policy"},
    "_pcscd": {"_ask", "_findings", "_machine", "_proc", "policy"},
    "_fork": {"_ask", "_findings", "_machine", "policy"},
    "_probe": {"_ask", "_findings", "demo"},
    "_process": {"_findings", "_proc", "_sockets"},
    "_view": {"_findings", "demo"},
    "_command": {"__version__", "_findings", "_fork", "_machine", "_pcscd", "_probe", "_process", "_view", "policy"},
}
"""DESIGN section 6 as data: application > scard > router > gateway > PC/SC, and never back."""


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """The modules of the package, and the others, that a module imports anywhere in it."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            own.update([node.module] if node.module else [alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module or "")
    return {name.partition(".")[0] for name in own}, others


def test_the_import_table() -> None:
    """Each core module imports what the table gives it and no more, and each has a row."""
    modules = {path.stem: imports_of(path)[0] for path in PACKAGE.glob("*.py") if path.stem != "__main__"}
    assert modules == MAY_IMPORT
    broker = {path.stem: imports_of(path)[0] for path in (PACKAGE / "broker").glob("*.py")}
    assert broker == BROKER_MAY_IMPORT
    retrofit = {path.stem: imports_of(path)[0] for path in (PACKAGE / "retrofit").glob("*.py")}
    assert retrofit == RETROFIT_MAY_IMPORT
    doctor = {path.stem: imports_of(path)[0] for path in (PACKAGE / "doctor").glob("*.py")}
    assert doctor == DOCTOR_MAY_IMPORT


def test_one_module_imports_pyscard() -> None:
    """The untyped world has one door."""
    importers = {
        path.stem: {name for name in imports_of(path)[1] if name.startswith("smartcard")}
        for path in [*PACKAGE.glob("*.py"), *(PACKAGE / "broker").glob("*.py"), *(PACKAGE / "retrofit").glob("*.py")]
    }
    assert {stem: names for stem, names in importers.items() if names} == {"_pyscard": {"smartcard.scard"}}


def test_the_core_does_not_know_the_rest() -> None:
    """Test kit, demonstration and command line build on the library; nothing leads back."""
    for path in PACKAGE.glob("_[a-z]*.py"):
        assert not imports_of(path)[0] & {"testing", "demo", "doctor", "__main__"}, path


def test_importing_the_package_loads_nothing() -> None:
    """``import pcsc_safe`` loads neither pyscard nor wrapt; ``pcsc_safe.scard`` nothing that only a use needs."""
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


def test_the_hooks_are_registered_once() -> None:
    """One module registers at-fork hooks, for they cannot be taken back."""
    calls = []
    for path in PACKAGE.rglob("*.py"):
        calls += [
            (path.stem, node.lineno)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr == "register_at_fork"
        ]
    assert {stem for stem, _ in calls} == {"_process"}


def test_public_modules_say_what_is_public() -> None:
    """Each module has a docstring and ``__all__``, and what stands in it exists."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
    for name in pcsc_safe.__all__:
        assert getattr(pcsc_safe, name) is not None
