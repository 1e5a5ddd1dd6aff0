"""A simulated macOS: Python programs find PC/SC as a forked process finds it there.

``macos_libpcsclite.c`` is built as a ``libpcsclite.so.1`` that pyscard loads instead of the real one.  It forwards
every call.  In a process that was forked and has not called exec, it behaves like macOS: a fresh SCardEstablishContext
returns SCARD_E_NO_SERVICE, and a call on anything inherited dies of SIGSEGV.  It also simulates the other known
differences from pcsc-lite.  A ``sitecustomize`` beside it shows pcsc_safe what Python has on macOS (:mod:`darwin`); all
other code sees Linux.

The environment names both, so a program that is executed, such as a broker, also runs on the simulated macOS.
``pytest --darwin`` runs the tests themselves there.  By hand::

    python tests/macos.py script.py argument...

runs Python with these arguments (``-c`` and ``-m`` as well), on a virtual PC/SC stack unless PCSCLITE_CSOCK_NAME names
one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Optional

from places import TESTS

if TYPE_CHECKING:
    from pcsc_safe.testing import VirtualPcsc

__all__ = [
    "CANCELS_FAIL",
    "SERVICE_ENDS",
    "SWITCHES",
    "NoCompilerError",
    "OnMacos",
    "build",
    "directory",
    "environment",
    "run_pytest",
]

SOURCE = Path(__file__).with_name("macos_libpcsclite.c")
LIBRARY = "libpcsclite.so.1"
"""The name that pyscard passes to dlopen."""

OnMacos = Callable[["VirtualPcsc"], "dict[str, str]"]
"""The environment of a program that uses a stack on the simulated macOS."""

VARIABLE = "PCSCLITE_MACOS"
"""The variable that names the directory of this process's simulation; brokers inherit it."""

SWITCHES = "PCSCLITE_MACOS_SWITCHES"
"""The variable that names a directory with files, by which a test controls the library."""

CANCELS_FAIL, SERVICE_ENDS = "cancels-fail", "service-ends"
"""The files; see ``macos_libpcsclite.c``."""

_SITECUSTOMIZE = f'''\
"""Makes what pcsc_safe sees of Python macOS'; see tests/darwin.py."""

import importlib.util
import sys

spec = importlib.util.spec_from_file_location("darwin", {str(TESTS / "darwin.py")!r})
sys.modules["darwin"] = darwin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(darwin)
darwin.install()
'''


def directory() -> Optional[Path]:
    """The directory of the simulation that this process uses; None without a simulation."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


class NoCompilerError(Exception):
    """The simulation can't be built, because there is no C compiler."""


def build(directory: Path) -> Path:
    """Build the simulation.

    :param directory: the target.
    :return: the library.
    :raises NoCompilerError: neither ``cc`` nor the program that CC names exists.
    :raises OSError: there is no libpcsclite to forward to.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise NoCompilerError("the simulation of macOS takes a C compiler: install one (Debian, Ubuntu: gcc) or set CC")
    library = directory / LIBRARY
    subprocess.run(
        [
            *(compiler, "-Wall", "-Wextra", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{LIBRARY}"),
            *(f'-DREAL="{_real_library()}"', "-o", str(library), str(SOURCE), "-ldl", "-lpthread"),
        ],
        check=True,
        timeout=60,
    )
    (directory / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    return library


def environment(stack_env: Mapping[str, str], directory: Path) -> dict[str, str]:
    """The environment of a program that runs on the simulated macOS.

    :param stack_env: names its PC/SC stack, like ``VirtualPcsc.env``.
    :param directory: the directory that :func:`build` got.
    """
    env = {**stack_env, VARIABLE: str(directory)}
    for variable in ("LD_LIBRARY_PATH", "PYTHONPATH"):
        env[variable] = os.pathsep.join(filter(None, [str(directory), env.get(variable)]))
    return env


def _real_library() -> str:
    """The path of the libpcsclite that this process uses."""
    ctypes.CDLL(LIBRARY)
    # From /proc: the loader reports only where it searches, not what it found.
    with open("/proc/self/maps") as maps:
        paths = [line.rstrip("\n").split(maxsplit=5)[-1] for line in maps]
    return next(path for path in paths if os.path.basename(path).startswith("libpcsclite.so."))


def run_pytest(arguments: Sequence[str]) -> NoReturn:
    """Execute pytest on the simulated macOS, with these arguments; it removes the simulation."""
    directory = Path(tempfile.mkdtemp(prefix="macos-"))
    try:
        build(directory)
    except BaseException:
        shutil.rmtree(directory)
        raise
    os.execve(sys.executable, [sys.executable, "-m", "pytest", *arguments], environment(os.environ, directory))


def main(arguments: Sequence[str]) -> int:
    """Run Python with these arguments on the simulated macOS.

    :return: its exit status, or 128 plus the number of the signal that ended it.
    """
    from pcsc_safe.testing import EchoCard, VirtualPcsc

    with contextlib.ExitStack() as undo:
        directory = Path(undo.enter_context(tempfile.TemporaryDirectory()))
        build(directory)
        env: Mapping[str, str] = os.environ
        if not env.get("PCSCLITE_CSOCK_NAME"):
            env = undo.enter_context(VirtualPcsc(cards=[EchoCard(), EchoCard()], activate=False)).env
        status = subprocess.run([sys.executable, *arguments], env=environment(env, directory), check=False).returncode
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
