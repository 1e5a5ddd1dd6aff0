"""Log lines of ``logging.getLogger("pcsc_safe")``, where one can be written.

Never called in an at-fork hook.  ``logging`` is never imported here: a program that reads one card would pay for it, in
a child another thread may have held an import lock at the fork, and at interpreter exit nothing can be imported.  A
program that has not imported it has configured nothing, so the lines become what logging makes of them then: warnings
go to standard error, the others nowhere.
"""

from __future__ import annotations

import contextlib
import sys

from . import process
from .unpatched import count_threads

__all__ = ["debug", "info", "warning"]


def _write(level: str, text: str, *arguments: object) -> None:
    epoch = process.current()
    # Only a hooked fork renews the locks of logging. After any other, a thread that is no more may be holding one.
    if epoch.noticed_by in ("page", "pid") and count_threads():
        return
    get_logger = getattr(sys.modules.get("logging"), "getLogger", None)  # None also while it is being imported
    if get_logger is not None:
        getattr(get_logger("pcsc_safe"), level)(text, *arguments)
    elif level == "warning" and sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # it is closed
            print(text % arguments, file=sys.stderr)


def debug(text: str, *arguments: object) -> None:
    """For who looks into how pcsc_safe works."""
    _write("debug", text, *arguments)


def info(text: str, *arguments: object) -> None:
    """For who wants to know what a fork changed."""
    _write("info", text, *arguments)


def warning(text: str, *arguments: object) -> None:
    """For what would look like a fault of the card or the reader, with the remedy."""
    _write("warning", text, *arguments)
