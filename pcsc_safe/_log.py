"""Log lines of ``logging.getLogger("pcsc_safe")``, where one can be written.

Never called in an at-fork hook.  Imported, and logging with it, when the first context is established: a child must not
be the first to import, since another thread's import lock may have been held at the fork.
"""

from __future__ import annotations

import logging
import sys

from . import _process

__all__ = ["debug", "info", "warning"]

_logger = logging.getLogger("pcsc_safe")


def _write(level: int, text: str, *arguments: object) -> None:
    epoch = _process.current()
    # Only a hooked fork renews the locks of logging. After any other, a thread that is no more may be holding one.
    if epoch.noticed_by in ("page", "pid") and len(sys._current_frames()) > 1:
        return
    _logger.log(level, text, *arguments)


def debug(text: str, *arguments: object) -> None:
    """For who looks into how pcsc_safe works."""
    _write(logging.DEBUG, text, *arguments)


def info(text: str, *arguments: object) -> None:
    """For who wants to know what a fork changed."""
    _write(logging.INFO, text, *arguments)


def warning(text: str, *arguments: object) -> None:
    """For what would look like a fault of the card or the reader, with the remedy."""
    _write(logging.WARNING, text, *arguments)
