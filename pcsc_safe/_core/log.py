"""Log lines of ``logging.getLogger("pcsc_safe")``, where one can be written.

Never called in an at-fork hook.  ``logging`` is imported when the first context is established: not with pcsc_safe, for
it would make the import slower, and not in a child, for another thread's import lock may have been held at the fork.
"""

from __future__ import annotations

from typing import Any

from . import process
from .unpatched import count_threads

__all__ = ["debug", "info", "prepare", "warning"]

_logging: Any = None


def prepare() -> None:
    """Import what a log line takes, so that nothing need be imported in a child or at interpreter exit."""
    global _logging
    import logging

    _logging = logging


def _write(level: str, text: str, *arguments: object) -> None:
    epoch = process.current()
    # Only a hooked fork renews the locks of logging. After any other, a thread that is no more may be holding one.
    if _logging is None or (epoch.noticed_by in ("page", "pid") and count_threads()):
        return
    getattr(_logging.getLogger("pcsc_safe"), level)(text, *arguments)


def debug(text: str, *arguments: object) -> None:
    """For who looks into how pcsc_safe works."""
    _write("debug", text, *arguments)


def info(text: str, *arguments: object) -> None:
    """For who wants to know what a fork changed."""
    _write("info", text, *arguments)


def warning(text: str, *arguments: object) -> None:
    """For what would look like a fault of the card or the reader, with the remedy."""
    _write("warning", text, *arguments)
