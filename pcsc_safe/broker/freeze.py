"""How a frozen program runs as its own broker.

A fork changes nothing here: a broker is a new program.
"""

from __future__ import annotations

import sys

from . import start

__all__ = ["freeze_support"]


def freeze_support() -> None:
    """For frozen programs (PyInstaller and others): call it first thing in the main module.

    A broker of such a program is the program itself, started again; this call is where it becomes one, and doesn't
    return.  Anywhere else it does nothing.
    """
    start.can_freeze = True
    if sys.platform != "win32" and sys.argv[1:2] == [start.FROZEN_BROKER]:
        from .__main__ import main  # only in a process that becomes a broker

        sys.exit(main([]))
