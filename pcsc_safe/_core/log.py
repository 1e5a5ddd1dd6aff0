"""Log lines of ``logging.getLogger("pcsc_safe")``, where one can be written.

Each record has the facts of its text as attributes too: :data:`FIELDS`.  Never called in an at-fork hook.  ``logging``
is imported when the first context is established: not with pcsc_safe, for it would make the import slower, and not in a
child, for another thread's import lock may have been held at the fork.
"""

from __future__ import annotations

from typing import Any

from . import process
from .unpatched import count_threads

__all__ = ["FIELDS", "debug", "info", "prepare", "warning"]

FIELDS = ("event", "pid", "owner_pid", "broker_pid", "function", "reader", "established_at")
"""What a record tells beside its text, each as ``pcsc_NAME``; None where it doesn't apply.  Never data of a card."""

_logging: Any = None


def prepare() -> None:
    """Import what a log line takes, so that nothing need be imported in a child or at interpreter exit."""
    global _logging
    import logging

    _logging = logging


def _write(level: str, event: str, text: str, fields: dict[str, Any]) -> None:
    epoch = process.current()
    # Only a hooked fork renews the locks of logging. After any other, a thread that is no more may be holding one.
    if _logging is None or (epoch.noticed_by in ("page", "pid") and count_threads()):
        return
    logger = _logging.getLogger("pcsc_safe")
    values = {**dict.fromkeys(FIELDS), "event": event, "pid": epoch.pid, **fields}
    if not logger.hasHandlers():  # then logging prints the text alone, and nobody would know whose it is
        text = f"pcsc_safe: {text}"
    extra = {f"pcsc_{name}": values[name] for name in FIELDS}
    getattr(logger, level)(text, values, extra=extra)


def debug(event: str, text: str, **fields: Any) -> None:
    """For who looks into how pcsc_safe works; arguments as for :func:`warning`."""
    _write("debug", event, text, fields)


def info(event: str, text: str, **fields: Any) -> None:
    """For who wants to know what a fork changed; arguments as for :func:`warning`."""
    _write("info", event, text, fields)


def warning(event: str, text: str, **fields: Any) -> None:
    """For what would look like a fault of the card or the reader, with the remedy.

    :param event: what happened, the same word from version to version.
    :param text: says it, with ``%(name)s`` for a field; ``pid`` is this process's.
    :param fields: what is told, by the names of :data:`FIELDS`; others may be in the text alone.
    """
    _write("warning", event, text, fields)
