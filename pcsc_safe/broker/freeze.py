"""How a frozen program runs as its own broker.

A fork changes nothing here: a broker is a new program.
"""

from __future__ import annotations

import sys

from . import start

__all__ = ["freeze_support"]


def freeze_support() -> None:
    """Let a frozen program (PyInstaller and others) be its own broker.

    Call it at the beginning of the main module.  A frozen program has no Python interpreter for a broker, so pcsc_safe
    starts the program again, and this call then becomes the broker and doesn't return.  Otherwise it does nothing.
    """
    start.can_freeze = True
    if sys.platform != "win32" and sys.argv[1:2] == [start.FROZEN_BROKER]:
        from .__main__ import main  # only in a process that becomes a broker

        sys.exit(main([]))
