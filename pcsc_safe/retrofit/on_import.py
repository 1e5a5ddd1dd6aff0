"""Calls ``install()`` when a program imports pyscard, for a process that may never do so.

The modules that :func:`pcsc_safe.install` needs take longer to import than Python takes to start.  Forks are counted
from the beginning, so that a child that is the first to import pyscard knows that it is a child.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from typing import Any, Optional

from .._core import process
from .._trace import events

__all__ = ["install_late"]

_PYSCARD = "smartcard"


def install_late() -> None:
    """Retrofit pyscard when it is imported, or now if it is already imported."""
    if _PYSCARD in sys.modules:
        _install()
    elif _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


class _Finder:
    """A finder that sees which modules are imported, and finds none.

    It is never removed, because another thread's import may be going through Python's list of finders.
    """

    def __init__(self) -> None:
        self._has_installed = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Optional[ModuleSpec]:
        """See :class:`importlib.abc.MetaPathFinder`."""
        if fullname == _PYSCARD and not self._has_installed:
            _install()  # a signal handler may raise in it, and the program import pyscard again
            self._has_installed = True
        return None


_finder: Any = _Finder()


def _install() -> None:
    try:
        from .installation import install  # takes longer to import than Python takes to start

        install()
    except Exception as error:  # the program continues without pcsc_safe, and a message says so
        pid = process.current().pid
        print(f"pcsc_safe: process {pid} runs without pcsc_safe: {error}", file=sys.stderr)
    else:
        process.current()
        events.record("retrofit")
