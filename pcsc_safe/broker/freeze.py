"""Lets a frozen program run as its own broker.

A fork changes nothing here: a broker is a new program.
"""

from __future__ import annotations

import sys

from . import start

__all__ = ["freeze_support"]


def freeze_support() -> None:
    """Let a frozen program (PyInstaller and similar tools) be its own broker.

    Call it at the beginning of the main module.  A frozen program has no Python interpreter for a broker.  So pcsc_safe
    starts the program again as the broker, and in that process this function doesn't return.  In every other process it
    does nothing.
    """
    start.can_freeze = True
    if sys.platform != "win32" and sys.argv[1:2] == [start.FROZEN_BROKER]:
        from .__main__ import main  # only in a process that becomes a broker

        sys.exit(main([]))
