"""Log lines of ``logging.getLogger("pcsc_safe")``, where one can be written.

Each record also has the facts of its text as attributes: :data:`FIELDS`.  A child's at-fork hooks never log.
``logging`` is never imported here: it would slow down a program that reads one card; in a child, another thread may
have held an import lock at the fork; and at interpreter exit nothing can be imported.  A program that has not imported
``logging`` has not configured it, so warnings go to standard error, as logging would write them, and other lines are
dropped.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from . import process
from .unpatched import count_threads

__all__ = ["FIELDS", "debug", "info", "warning"]

FIELDS = ("event", "pid", "owner_pid", "broker_pid", "function", "reader", "established_at")
"""The attributes of a record, each as ``pcsc_NAME``; None if it doesn't apply.  Never data of a card."""


def _write(level: str, event: str, text: str, fields: dict[str, Any]) -> None:
    epoch = process.current()
    # logging renews its locks only in a hook.  After a fork without hooks, a thread of the parent may hold one.
    if epoch.noticed_by in ("page", "pid") and count_threads():
        return
    values = {**dict.fromkeys(FIELDS), "event": event, "pid": epoch.pid, **fields}
    get_logger = getattr(sys.modules.get("logging"), "getLogger", None)  # None also while it is being imported
    if get_logger is not None:
        logger = get_logger("pcsc_safe")
        if not logger.hasHandlers():  # then logging prints only the text, which doesn't say where it comes from
            text = f"pcsc_safe: {text}"
        extra = {f"pcsc_{name}": values[name] for name in FIELDS}
        getattr(logger, level)(text, values, extra=extra)
    elif level == "warning" and sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # it is closed
            print(f"pcsc_safe: {text}" % values, file=sys.stderr)


def debug(event: str, text: str, **fields: Any) -> None:
    """Log how pcsc_safe works; arguments as for :func:`warning`."""
    _write("debug", event, text, fields)


def info(event: str, text: str, **fields: Any) -> None:
    """Log that a context, a connection or a broker replaces another; arguments as for :func:`warning`."""
    _write("info", event, text, fields)


def warning(event: str, text: str, **fields: Any) -> None:
    """Log what a user should know or change, with the remedy.

    :param event: what happened, the same word from version to version.
    :param text: the message, with ``%(name)s`` for a field; ``pid`` is this process's.
    :param fields: the facts, by the names of :data:`FIELDS`; other names may be in the text alone.
    """
    _write("warning", event, text, fields)
